"""How a linear layer and attention's scores are lowered: every way to write them, and the one table of which is taken.

Shapes: B batch rows, T chunk length, K key/value heads, S cache positions, D head size.
"""

from __future__ import annotations

import functools
import itertools
import operator
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from llama.xla import backend, modules, tiled
from llama.xla.ops import materialised, written
from llama.xla.quantized import linear_int16, widened_parts
from llama.xla.stacks import LayerWeight, part

# What decides between the lowerings on the CPU device; the kernel table and docs/performance.md have the measurements.
WIDEST_ROW = 4080  # numbers: XLA:CPU fuses no row of 16 KiB into the loop, and transposes the weight at every step
MOST_LOOP_ROWS = 4  # of float32, which a loop multiplies with a weight's row while it is in the cache
NARROW = 1024  # up to so many numbers a row such loops beat tiles, and for a written weight two of them oneDNN
MOST_ONEDNN_ROWS = 128  # with more, Eigen's product on all cores wins
WIDE = 1024  # from so many numbers a row on, turning the weight into panels costs less than it saves
PANEL = 8  # output channels side by side
MOST_NARROW_ROWS = 96  # of a bfloat16 or int8 weight, which a matrix product would first have widened in memory
MOST_BFLOAT16_ROWS = 32  # with more, XNNPACK's product of bfloat16 wins, which turns the weight into panels first
MOST_GROUPED_ROWS = (
    0.5  # for each number of a group: with more, the groups' sums would take much more memory than a weight
)
FEW_QUERIES = 8  # of a key head, up to which attention is sums


class Rules(NamedTuple):
    """What a model's configuration says of its linear layers on the CPU device; see ``EngineConfig``.

    Attributes:
        rows_alike: a row's product is the same to the last bit whichever of the rows it is. The loop over a float32
            weight is left out then: LLVM unrolls it over the rows and sums them in different orders, at least on
            processors without AVX-512 (docs/log.md, 2026-11-25).
        activations: what rows are rounded to before they meet int8 and int4 weights: ``int16``, or ``float32`` for not
            at all.
        prefill_products: what many rows are rounded to before they meet bfloat16 and int4 weights.
    """

    rows_alike: bool = False
    activations: str = "int16"
    prefill_products: str = "bfloat16"


_RULES: ContextVar[Rules] = ContextVar("rules", default=Rules())  # noqa: B039  (it is immutable)


def linear(
    x: torch.Tensor, weight: torch.Tensor | LayerWeight, scale: torch.Tensor | LayerWeight | None = None
) -> torch.Tensor:
    """``x @ weight.T`` in the dtype of x, written the way the device's compiler does best.

    Args:
        x: [..., in], the activations' dtype.
        weight: [out, in] as checkpoints keep it, any storage dtype; XLA fuses the conversion into the product. In a
            loop over layers that of the layer, which XLA fuses, too, or a library's product reads where it is.
        scale: of a quantised weight (quantize.py), float32: [out] multiplies the product of an int8 weight, [out, in /
            G] the groups of an int8 or int4 one.

    Returns:
        [..., out] in x's dtype.
    """
    rows, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
    group = width // scale.shape[1] if scale is not None and len(scale.shape) > 1 else None
    lowering = choose_lowering(len(rows), width, weight.dtype, x.device, group)
    if scale is not None and (lowering == "int16" or group):
        product = quantized_product(rows, weight, scale, lowering)
    else:
        product = _product(rows, weight, lowering)
        product = product if scale is None else product * _taken(scale)
    return product.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def quantized_product(
    x: torch.Tensor, weight: torch.Tensor | LayerWeight, scale: torch.Tensor | LayerWeight, lowering: str
) -> torch.Tensor:
    """The product with an int4 weight, or of integers: [rows, out]."""
    numbers, per_group = _taken(weight), _taken(scale)
    if lowering == "int16":
        return linear_int16(x, numbers, per_group)
    if x.device.type == "xla":  # no sooner than x is there
        numbers = waiting_for(x, numbers)
    dtype = torch.bfloat16 if lowering == "xnnpack" else x.dtype
    parts = widened_parts(x, numbers, per_group, dtype)
    return functools.reduce(torch.add, (LOWERINGS[lowering](*part) for part in parts))


def _product(x: torch.Tensor, weight: torch.Tensor | LayerWeight, lowering: str) -> torch.Tensor:
    """``LOWERINGS[lowering]``, which two of them know how to do with the weight of a loop's layer."""
    if isinstance(weight, LayerWeight) and lowering == "onednn" and weight.has_each:
        return _layer_onednn(x, weight)
    if isinstance(weight, LayerWeight) and lowering == "row_by_row":
        return _layer_row_by_row(x, weight)
    return LOWERINGS[lowering](x, _taken(weight))


def _taken(weight: torch.Tensor | LayerWeight) -> torch.Tensor:
    return weight.taken() if isinstance(weight, LayerWeight) else weight


def _layer_onednn(x: torch.Tensor, weight: LayerWeight) -> torch.Tensor:
    """``linear_onednn`` with the weight of a loop's layer: XLA would copy a part of the stack for the library."""
    return weight.product(materialised(x.t().contiguous())).t()


def _layer_row_by_row(x: torch.Tensor, weight: LayerWeight) -> torch.Tensor:
    """``linear_row_by_row`` with the weight of a loop's layer, taken within the loop over rows: before it, it would be
    written to memory.
    """
    out: torch.Tensor = _row_by_row_op()(x, *weight.source, sizes=tuple(weight.shape))
    return out


def choose_lowering(rows: int, width: int, dtype: torch.dtype, device: torch.device, group: int | None = None) -> str:
    """Which of ``LOWERINGS`` a linear layer takes: the one table of what depends on the device kind.

    Args:
        rows: how many positions go through the layer at once.
        width: the numbers of each.
        dtype: of the weight.
        group: how many numbers of it share a scale; None for a row or where there is none.
    """
    if not _on_cpu_device(device):
        return "plain"
    rules = _RULES.get()
    if group is not None:
        return _choose_for_groups(rows, width, group, rules)
    if dtype == torch.int8 and rules.activations == "int16":
        return "int16"
    if rows == 1:
        return "one_row"
    is_short = dtype == torch.float32 and rows <= MOST_LOOP_ROWS and (width <= NARROW or rows == 2)
    if rows <= tiled.MOST_ROWS and not is_short and not rules.rows_alike:
        return "tiled"
    if dtype == torch.float32:
        return _choose_for_float32(rows, width, rules)
    if rows > MOST_BFLOAT16_ROWS and dtype == torch.bfloat16 and rules.prefill_products == "bfloat16":
        return "xnnpack"
    return "row_by_row" if rows <= MOST_NARROW_ROWS else _choose_for_many(width)


def _choose_for_float32(rows: int, width: int, rules: Rules) -> str:
    """As ``choose_lowering``, for a weight that is stored in float32, or written to memory so first."""
    if rows == 1:
        return "one_row"
    if rows <= MOST_LOOP_ROWS * (2 if width <= NARROW else 1):
        return "row_by_row" if rules.rows_alike else "loop"
    if rows <= MOST_ONEDNN_ROWS and platform.machine() == "x86_64":
        return "onednn"
    return _choose_for_many(width)


def _choose_for_many(width: int) -> str:
    return "panels" if width >= WIDE else "matrix"


def _choose_for_groups(rows: int, width: int, group: int, rules: Rules) -> str:
    """As ``choose_lowering``, for a weight with groups, which all lowerings but int16 take as the numbers it stands
    for.
    """
    if rows <= group * MOST_GROUPED_ROWS and rules.activations == "int16":
        return "int16"
    if rows > MOST_BFLOAT16_ROWS and rules.prefill_products == "bfloat16":
        return "xnnpack"
    return _choose_for_float32(rows, width, rules)


@contextmanager
def ruled(rules: Rules) -> Iterator[None]:
    """Within: lowerings are chosen by these rules."""
    token = _RULES.set(rules)
    try:
        yield
    finally:
        _RULES.reset(token)


def choose_layers(device: torch.device) -> str:
    """How the layers of a model become a program: as one ``loop``, or ``unrolled``.

    A loop for every device, number of rows, width and dtype: it compiles in a tenth of the time and runs about as fast
    (docs/performance.md; ``llama-xla kernels`` times both, and a program run once a layer).
    """
    return "loop"


def _on_cpu_device(device: torch.device) -> bool:
    """Whether that is XLA's device on the CPU, whose compiler needs help; asking starts nothing for torch's own
    devices.
    """
    return device.type == "xla" and backend.device_kind() == "CPU"


def attention_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The product of every query with every key of its head.

    Args:
        queries: [B, K, T, D].
        keys: [B, K, S, D], which may be a slice of the cache.

    Returns:
        [B, K, T, S]. On XLA:CPU for few queries as sums of products, which read a slice of the cache where it is; a
        product would have it copied first. For many as einsum, which runs six times as fast as ``q @ k.transpose``
        (docs/log.md).
    """
    if scored_by_sums(queries.shape[2], queries.device):
        return scores_by_sums(queries, keys)
    return torch.einsum("bktd,bksd->bkts", queries, keys)


def scored_by_sums(queries: int, device: torch.device) -> bool:
    """Whether ``attention_scores`` takes the sums for so many queries of a key head."""
    return queries <= FEW_QUERIES and _on_cpu_device(device)


def scores_by_sums(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``attention_scores`` as sums of products; what makes the queries is kept out of the loop over the keys."""
    return (materialised(queries).unsqueeze(3) * keys.unsqueeze(2)).sum(-1)


def attention_values(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the values of every query's keys.

    Args:
        weights: [B, K, T, S].
        values: [B, K, N, D, W], in blocks of W positions (kv_cache.py); numbers behind S, which are finite, do not
            count.

    Returns:
        [B, K, T, D]. On XLA:CPU for few queries as sums: of each block, read in a line where it is, then of the blocks.
    """
    *_, blocks, columns, width = values.shape
    per_block = F.pad(weights, (0, blocks * width - weights.shape[-1])).reshape(*weights.shape[:3], blocks, width)
    if scored_by_sums(weights.shape[2], weights.device):
        parts = (materialised(per_block).unsqueeze(4) * values.unsqueeze(2)).sum(-1)  # [B, K, T, N, D]
        return materialised(parts).sum(3)
    in_line = values.transpose(3, 4).reshape(*values.shape[:2], blocks * width, columns)
    return torch.einsum("bkts,bksd->bktd", per_block.flatten(-2), in_line)


def linear_plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``F.linear``, for devices whose compiler needs no help."""
    return F.linear(x, weight.to(x.dtype))


def linear_one_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``F.linear`` of one row: on XLA:CPU a fused loop that reads the weight once, in whatever dtype it is stored.

    What makes x must stay out of that loop: XLA would compute a norm, a softmax's division or SwiGLU anew for each
    output channel. Long rows go in parts, whose products are added, each written to memory before: fused with the sum,
    one part would be a dot again.
    """
    whole = materialised(x)
    first, *others = (F.linear(whole[:, a:b], weight[:, a:b].to(x.dtype)) for a, b in parts_of(x.shape[-1]))
    return functools.reduce(torch.add, map(materialised, others), materialised(first)) if others else first


def parts_of(width: int) -> list[tuple[int, int]]:
    """The columns [a, b) of the parts that a row of so many goes in."""
    count = -(-width // WIDEST_ROW)
    bounds = [width * i // count for i in range(count + 1)]
    return list(itertools.pairwise(bounds))


def linear_matrix(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``(w @ x.t()).t()``: XLA:CPU hands this form to Eigen's matrix product, and not the one of ``F.linear``."""
    whole = x if weight.dtype == x.dtype else materialised(x)
    return (widened(weight, whole) @ whole.t()).t()


def linear_row_by_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A loop inside the program over the rows of x [rows, in]: one small kernel, whose weight stays in the cache
    from row to row.
    """
    if x.device.type != "xla":
        return F.linear(x, weight.to(x.dtype))
    out: torch.Tensor = _row_by_row_op()(x, weight, sizes=tuple(weight.shape))
    return out


def linear_loop(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A loop over the float32 weight's rows, each multiplied by a few rows of x while it is in the cache: about the
    time of one.
    """
    if x.device.type != "xla":
        return F.linear(x, weight.to(x.dtype))
    whole = materialised(x)
    wide, product = widened(weight, whole), _product_op("loop")
    groups = range(0, len(whole), MOST_LOOP_ROWS)
    return torch.cat([product(wide, whole[a : a + MOST_LOOP_ROWS]).t() for a in groups])


def linear_onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``(w @ x.t()).t()`` by oneDNN, which XLA:CPU carries: for a few dozen rows faster than Eigen, which first
    copies the weight.
    """
    if x.device.type != "xla":
        return F.linear(x, weight.to(x.dtype))
    columns = materialised(x.t().contiguous())
    product: torch.Tensor = _product_op("onednn")(widened(weight, columns), columns)
    return product.t()


def linear_panels(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eigen's product with the weight turned into panels of a few output channels side by side, [out / 8, in, 8].

    It takes wide weights as they are stored at half of its speed, because it packs them number by number.
    """
    channels, width = weight.shape
    if channels % PANEL:
        return linear_matrix(x, weight)
    whole = materialised(x)
    panels = materialised(waiting_for(whole, weight).view(-1, PANEL, width).permute(0, 2, 1).to(x.dtype).contiguous())
    return torch.einsum("ri,bio->rbo", whole, panels).reshape(-1, channels)


def linear_xnnpack(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product by XNNPACK with x rounded to bfloat16: a bfloat16 weight, or one that is widened to it without loss.

    The library runs on one core, so the rows go in two halves, which XLA runs side by side.
    """
    if x.device.type != "xla":
        return F.linear(x.bfloat16().float(), weight.float()).to(x.dtype)
    whole = materialised(materialised(x).bfloat16())
    narrow = weight if weight.dtype == torch.bfloat16 else waiting_for(whole, weight).bfloat16()
    middle = -(-len(whole) // 2)
    halves = [materialised(half) for half in (whole[:middle], whole[middle:]) if len(half)]
    return torch.cat([_bfloat16_product_op()(half, narrow) for half in halves]).to(x.dtype)


def widened(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The weight in the dtype of x, written to memory where it is narrower, but no sooner than x is there."""
    return weight if weight.dtype == x.dtype else waiting_for(x, weight).to(x.dtype)


def waiting_for(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weight, unchanged, but not to be converted or packed before x is there.

    What depends on weights alone could run at once, and XLA:CPU does run it early: the whole model would lie in memory
    a second time. So add what is always zero and only x can tell.
    """
    return weight + (x[:1, :1] > float("inf")).to(weight.dtype)


LOWERINGS = {
    "plain": linear_plain,
    "one_row": linear_one_row,
    "loop": linear_loop,
    "tiled": tiled.linear_tiled,
    "row_by_row": linear_row_by_row,
    "onednn": linear_onednn,
    "matrix": linear_matrix,
    "panels": linear_panels,
    "xnnpack": linear_xnnpack,
    "int16": linear_int16,
}
ROUNDING = {
    "xnnpack": (torch.bfloat16, torch.int8),
    "int16": (torch.int8,),
}  # those that round x: the weights they take


@cache
def _product_op(kind: modules.ProductKind) -> Any:
    """The registered XLA operation of one ready-made product, ``modules.product``."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    def lower(weight: Any, x: Any) -> Any:
        computation = modules.product(tuple(weight.shape().sizes), tuple(x.shape().sizes), kind=kind)
        return xb.Op.call(computation, (weight, x))

    return registry.register(f"llama_product_{kind}", lower)


@cache
def _bfloat16_product_op() -> Any:
    """The registered XLA operation of ``modules.bfloat16_product``."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    def lower(x: Any, weight: Any) -> Any:
        computation = modules.bfloat16_product(tuple(x.shape().sizes), tuple(weight.shape().sizes))
        return xb.Op.call(computation, (x, weight))

    return registry.register("llama_bfloat16_product", lower)


@cache
def _row_by_row_op() -> Any:
    """The registered XLA operation behind ``linear_row_by_row``.

    XLA must not move the widening of the weight out of the loop, which would write it to memory as a whole:
    runtime.py's flags.
    """
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    int32 = xb.Type.S32

    def lower(x: Any, *source: Any, sizes: tuple[int, int]) -> Any:
        builder = x.builder()
        rows, width = x.shape().sizes
        wide = x.shape().dtype
        out = xb.Op.scalar(builder, 0.0, dtype=wide).broadcast([rows, sizes[0]])

        def more(row: Any, x: Any, out: Any, *source: Any) -> Any:
            return row < xb.Op.scalar(row.builder(), rows, dtype=int32)

        def one_row(row: Any, x: Any, out: Any, *source: Any) -> Any:
            zero = xb.Op.scalar(row.builder(), 0, dtype=int32)
            weight = part(source, sizes)
            products = [
                x.dynamic_slice([row, xb.Op.scalar(row.builder(), a, dtype=int32)], [1, b - a])
                @ weight.slice_in_dim(a, b, 1).cast(wide).transpose([1, 0])
                for a, b in parts_of(width)
            ]
            product = functools.reduce(operator.add, map(written, products)) if len(products) > 1 else products[0]
            following = row + xb.Op.scalar(row.builder(), 1, dtype=int32)
            return xb.Op.tuple([following, x, out.dynamic_update_slice(product, [row, zero]), *source])

        first = xb.Op.scalar(builder, 0, dtype=int32)
        return xb.Op.mkwhile([first, x, out, *source], more, one_row).get_tuple_element(2)

    return registry.register("llama_linear_row_by_row", lower)
