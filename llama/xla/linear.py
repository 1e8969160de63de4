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
from typing import Any

import torch
import torch.nn.functional as F

from llama.xla import backend, modules
from llama.xla.ops import materialised, written
from llama.xla.stacks import LayerWeight, part

# What decides between the lowerings on the CPU device; the kernel table and docs/performance.md have the measurements.
WIDEST_ROW = 4080  # numbers: XLA:CPU fuses no row of 16 KiB into the loop, and transposes the weight at every step
FIRST_CACHE = 16384  # bytes of a core's first cache that rows of x may take while a loop reads the weight beside them
MOST_LOOP_ROWS = 4  # so many rows of float32 take as long as one
MOST_ONEDNN_ROWS = 128  # with more, Eigen's product on all cores wins
WIDE = 1024  # from so many numbers a row on, turning the weight into panels costs less than it saves
PANEL = 8  # output channels side by side
MOST_NARROW_ROWS = 96  # of a bfloat16 or int8 weight, which a matrix product would first have widened in memory
_ROWS_ALIKE: ContextVar[bool] = ContextVar("rows_alike", default=False)
FEW_QUERIES = 8  # of a key head, up to which attention is sums


def linear(x: torch.Tensor, weight: torch.Tensor | LayerWeight, scale: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T`` in the dtype of x, written the way the device's compiler does best.

    Args:
        x: [..., in], the activations' dtype.
        weight: [out, in] as checkpoints keep it, any storage dtype; XLA fuses the conversion into the product. In a
            loop over layers that of the layer, which XLA fuses, too, or a library's product reads where it is.
        scale: [out] float32, of an int8 weight (quantize.py): multiplies the product.

    Returns:
        [..., out] in x's dtype.
    """
    if scale is not None:
        return (linear(x, weight) * scale).to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    lowering = choose_lowering(len(rows), x.shape[-1], weight.dtype, x.device)
    if not isinstance(weight, LayerWeight):
        product = LOWERINGS[lowering](rows, weight)
    elif lowering == "onednn" and weight.has_each:
        product = _layer_onednn(rows, weight)
    elif lowering == "row_by_row":
        product = _layer_row_by_row(rows, weight)
    else:
        product = LOWERINGS[lowering](rows, weight.taken())
    return product.reshape(*x.shape[:-1], weight.shape[0])


def _layer_onednn(x: torch.Tensor, weight: LayerWeight) -> torch.Tensor:
    """``linear_onednn`` with the weight of a loop's layer: XLA would copy a part of the stack for the library."""
    return weight.product(materialised(x.t().contiguous())).t()


def _layer_row_by_row(x: torch.Tensor, weight: LayerWeight) -> torch.Tensor:
    """``linear_row_by_row`` with the weight of a loop's layer, taken within the loop over rows: before it, it would be
    written to memory.
    """
    out: torch.Tensor = _row_by_row_op()(x, *weight.source, sizes=tuple(weight.shape))
    return out


def choose_lowering(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Which of ``LOWERINGS`` a linear layer takes: the one table of what depends on the device kind.

    Args:
        rows: how many positions go through the layer at once.
        width: the numbers of each.
        dtype: of the weight.
    """
    if not _on_cpu_device(device):
        return "plain"
    if rows == 1:
        return "one_row"
    if dtype != torch.float32:
        if rows <= MOST_NARROW_ROWS:
            return "row_by_row"
    elif rows <= 2 * loop_rows(width):
        return "row_by_row" if _ROWS_ALIKE.get() else "loop"
    elif rows <= MOST_ONEDNN_ROWS and platform.machine() == "x86_64":
        return "onednn"
    return "panels" if width >= WIDE else "matrix"


@contextmanager
def rows_alike(wanted: bool) -> Iterator[None]:
    """Within: where ``wanted``, a row's product is the same to the last bit whichever of the rows it is.

    The loop over the weight is left out: LLVM unrolls it over the rows and sums them in different orders, at least on
    processors without AVX-512 (docs/log.md, 2026-11-25).
    """
    token = _ROWS_ALIKE.set(wanted)
    try:
        yield
    finally:
        _ROWS_ALIKE.reset(token)


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


def loop_rows(width: int) -> int:
    """How many rows of x of so many float32 numbers stay in a core's first cache beside the weight."""
    return min(FIRST_CACHE // (4 * width), MOST_LOOP_ROWS)


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
    whole, group = materialised(x), max(loop_rows(x.shape[-1]), 1)
    wide, product = widened(weight, whole), _product_op("loop")
    return torch.cat([product(wide, whole[a : a + group]).t() for a in range(0, len(whole), group)])


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
    "row_by_row": linear_row_by_row,
    "onednn": linear_onednn,
    "matrix": linear_matrix,
    "panels": linear_panels,
}


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
