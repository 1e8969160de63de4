"""XLA operations that torch lacks, and how a linear layer is lowered.

Shapes: B batch rows, T chunk length, L layers, K key/value heads, S cache positions, D head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from llama import runtime

# On the CPU device F.linear with up to this many rows is one fused loop per row; with more, w @ x.t() reaches XLA's matrix product.
CPU_ROWS_ONE_BY_ONE = 1


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T`` in the dtype of x, written the way the device's compiler does best.

    Args:
        x: [..., in], the activations' dtype.
        weight: [out, in] as checkpoints keep it, any storage dtype; XLA fuses the conversion into the product.
        scale: [out] float32, of an int8 weight (quantize.py): multiplies the product.

    Returns:
        [..., out] in x's dtype. On XLA:CPU one row is a fused loop of ``F.linear``; several rows would fall to a fortieth of the
        speed that way, and go through ``(w @ x.t()).t()`` (DESIGN facts measured again in docs/log.md).
    """
    if scale is not None:
        return (linear(x, weight) * scale).to(x.dtype)
    weight = weight.to(x.dtype)
    if x.device.type != "xla" or runtime.device_kind() != "CPU":
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] <= CPU_ROWS_ONE_BY_ONE:
        return F.linear(x, weight)
    return (weight @ rows.t()).t().reshape(*x.shape[:-1], weight.shape[0])


@cache
def _cache_write_op() -> Any:
    """The registered XLA operation behind ``write_cache``; built on first use, so that importing this module starts nothing."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    def lower(kv_cache: Any, update: Any, starts: Any, layer: int) -> Any:
        """One DynamicUpdateSlice per batch row: XLA runs them in place where a scatter would be a loop."""
        builder = kv_cache.builder()
        int32 = starts.shape().dtype
        zero = xb.Op.scalar(builder, 0, dtype=int32)
        pair = xb.Op.scalar(builder, 2 * layer, dtype=int32)
        for row in range(update.shape().sizes[1]):
            start = starts.slice([row], [row + 1]).reshape([])
            place = (pair, xb.Op.scalar(builder, row, dtype=int32), zero, start, zero)
            kv_cache = kv_cache.dynamic_update_slice(update.slice_in_dim(row, row + 1, 1), place)
        return kv_cache

    return registry.register("llama_cache_write", lower)


@cache
def _float_bits_op() -> Any:
    """The registered XLA operation behind ``float_bits``."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    return registry.register("llama_float_bits", lambda x: x.bitcast(xb.Type.S32))


def float_bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a float32 tensor as int32. torch's own ``view(dtype)`` would leave the device and cut the graph."""
    if x.device.type != "xla":
        return x.view(torch.int32)
    bits: torch.Tensor = _float_bits_op()(x)
    return bits


@cache
def _rotate_left_op() -> Any:
    """The registered XLA operation behind ``rotate_left``."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    def lower(x: Any, distance: int) -> Any:
        word, builder = x.cast(xb.Type.U32), x.builder()
        high = word << xb.Op.scalar(builder, distance, dtype=xb.Type.U32)
        low = word / xb.Op.scalar(builder, 1 << (32 - distance), dtype=xb.Type.U32)  # the builder names no right shift; LLVM finds it
        return (high | low).cast(xb.Type.S32)

    return registry.register("llama_rotate_left", lower)


def rotate_left(x: torch.Tensor, distance: int) -> torch.Tensor:
    """Rotate the 32-bit words of an int32 tensor left by ``distance``, 1 to 31.

    An operation of its own because torch_xla 2.9 lowers ``>>`` of integers to a division that rounds towards zero: wrong for
    every negative word that is not a multiple.
    """
    if x.device.type != "xla":
        return (x << distance) | ((x >> (32 - distance)) & ((1 << distance) - 1))
    rotated: torch.Tensor = _rotate_left_op()(x, distance=distance)
    return rotated


def write_cache(kv_cache: torch.Tensor, update: torch.Tensor, starts: torch.Tensor, layer: int) -> torch.Tensor:
    """Write one layer's new keys and values into the stacked cache, each row at its own position.

    Args:
        kv_cache: [2 L, B, K, S, D], the keys of layer l at 2 l and its values at 2 l + 1.
        update: [2, B, K, T, D] in the cache's dtype.
        starts: [B] int32, the first position of each row. The caller keeps ``starts + T <= S``: XLA clamps a start that does
            not fit and would overwrite the last positions without a word.
        layer: l.

    Returns:
        The cache with the update in it: use it and forget the argument. In place where the argument is donated to the program.
    """
    result: torch.Tensor = _cache_write_op()(kv_cache, update, starts, layer=layer)
    return result
