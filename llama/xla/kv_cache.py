"""The operations on the cache's two tensors: write a chunk's keys and values, read a layer's first ones, copy a row's.

    keys      [L, rows, K, S, D]
    values    [L, rows, K, N D, W]     in blocks of W positions, each by columns: position p is number p % W of each
                                       column of block p // W

Attention multiplies one query with rows of D numbers of the keys, and its probabilities with rows of W numbers of the
values: XLA:CPU reads both where they are, in a line, whatever part of the cache is live. Values stored like keys were
copied out before every product, because their sum over positions runs across the rows: at 8,192 positions 39 ms a step
instead of 8 (docs/log.md, 2026-11-26).

(A block's number and the heads' columns share a dimension: torch_xla splits no tensor of six over a mesh.)

Shapes: B rows of a program, T chunk length, L layers, K key/value heads, S cache positions, D head size, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from llama.xla import ops

FEW_TOKENS = 8  # of a row, up to which values are written token by token; more go block by block


def write_keys(
    cache: torch.Tensor, keys: torch.Tensor, first: torch.Tensor, starts: torch.Tensor, layer: int | torch.Tensor
) -> torch.Tensor:
    """Write one layer's new keys, each row at its own position.

    Args:
        cache: [L, rows, K, S, D].
        keys: [B, K, T, D], which are rounded to the cache's dtype.
        first: int32 of one element; row r goes to row ``first + r`` of the cache. On a mesh, -1 where the group has no
            row: nothing is written.
        starts: [B] int32, the first position of each row. The caller keeps ``starts + T <= S``: XLA clamps a start that
            does not fit and would overwrite the last positions without a word.
        layer: its number; in a loop over layers an int32 scalar.

    Returns:
        The cache with the update in it: use it and forget the argument. In place where the argument is donated to the
        program.
    """
    return _written(_write_keys_op(), cache, keys, first, starts, layer)


def write_values(
    cache: torch.Tensor, values: torch.Tensor, first: torch.Tensor, starts: torch.Tensor, layer: int | torch.Tensor
) -> torch.Tensor:
    """Write one layer's new values [B, K, D, T] into the cache [L, rows, K, N D, W]; see ``write_keys``."""
    return _written(_write_values_op(), cache, values, first, starts, layer)


def read_keys(
    cache: torch.Tensor, first: torch.Tensor, layer: int | torch.Tensor, *, rows: int, key_len: int
) -> torch.Tensor:
    """One layer's first ``key_len`` keys of ``rows`` rows from ``first`` on: [rows, K, key_len, D]."""
    if _is_known(cache, layer, rows):  # XLA does better with a slice that it knows
        return cache[layer, :, :, :key_len]
    read: torch.Tensor = _with_layer(_read_op(), (cache, first), layer, rows=rows, count=key_len)
    return read


def read_values(
    cache: torch.Tensor, first: torch.Tensor, layer: int | torch.Tensor, *, rows: int, key_len: int, columns: int
) -> torch.Tensor:
    """One layer's first blocks of values, as many as hold ``key_len`` positions: [rows, K, n, D, W]; ``columns`` is
    D.
    """
    count = columns * -(-key_len // cache.shape[-1])
    read: torch.Tensor
    if _is_known(cache, layer, rows):
        read = cache[layer, :, :, :count]
    else:
        read = _with_layer(_read_op(), (cache, first), layer, rows=rows, count=count)
    return read.reshape(*read.shape[:2], -1, columns, read.shape[-1])


def copy_row(cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor, count: int) -> torch.Tensor:
    """Copy the first ``count`` positions, or columns of blocks, of one row to another.

    Args:
        source, target: int32 of one element.

    Returns:
        The cache with the copy in it, in place where the argument is donated.
    """
    copied: torch.Tensor = _copy_op()(cache, source, target, count=count)
    return copied


def _written(
    op: Any,
    cache: torch.Tensor,
    update: torch.Tensor,
    first: torch.Tensor,
    starts: torch.Tensor,
    layer: int | torch.Tensor,
) -> torch.Tensor:
    result: torch.Tensor = _with_layer(
        op, (cache, update, first, starts), layer, may_lack=ops.may_lack_rows(len(starts))
    )
    return result


def _is_known(cache: torch.Tensor, layer: int | torch.Tensor, rows: int) -> bool:
    """Whether a read is the same part of the cache in every run, and of a dtype that XLA:CPU slices as it is."""
    return cache.shape[1] == rows and isinstance(layer, int) and cache.dtype not in ops.HALVES.values()


def _with_layer(op: Any, tensors: Sequence[torch.Tensor], layer: int | torch.Tensor, **sizes: int | bool) -> Any:
    """Call a registered operation whose lowering takes a layer's number, which is known or a loop's count."""
    if isinstance(layer, int):
        return op(*tensors, layer=layer, **sizes)
    return op(*tensors, layer, **sizes)


def _scalar(builder: Any, value: Any) -> Any:
    """An int32 of the builder: of a number, or one that is there already."""
    import torch_xla.core.xla_builder as xb

    return xb.Op.scalar(builder, value, dtype=xb.Type.S32) if isinstance(value, int) else value


def _rows(cache: Any, update: Any, first: Any, starts: Any) -> list[tuple[Any, Any, Any]]:
    """The builder's new part [1, 1, K, ...], its row of the cache, and its first position, of each row."""
    all_rows = cache.shape().sizes[1] == starts.shape().sizes[0]
    first, held = first.reshape([]), ops.as_held(update, cache)
    found = []
    for row in range(update.shape().sizes[0]):
        new = held.slice_in_dim(row, row + 1, 0)
        place = _scalar(cache.builder(), row)
        start = starts.slice([row], [row + 1]).reshape([])
        found.append((new.reshape([1, *new.shape().sizes]), place if all_rows else first + place, start))
    return found


def _put(cache: Any, new: Any, first: Any, at: Sequence[Any], may_lack: bool) -> Any:
    """The builder's update of the cache, in place; XLA runs a DynamicUpdateSlice so where a scatter would be a loop."""
    new = ops.unless_lacking(cache, new, first.reshape([]), at) if may_lack else new
    return cache.dynamic_update_slice(new, at)


@cache
def _write_keys_op() -> Any:
    """The registered XLA operation behind ``write_keys``; built on first use: importing starts nothing."""
    import torch_xla.core.xla_op_registry as registry

    def lower(cache: Any, keys: Any, first: Any, starts: Any, layer: Any, may_lack: bool) -> Any:
        layer, zero = _scalar(cache.builder(), layer), _scalar(cache.builder(), 0)
        for new, row, start in _rows(cache, keys, first, starts):
            cache = _put(cache, new, first, (layer, row, zero, start, zero), may_lack)
        return cache

    return registry.register("llama_write_keys", lower)


@cache
def _write_values_op() -> Any:
    """The registered XLA operation behind ``write_values``."""
    import torch_xla.core.xla_op_registry as registry

    def lower(cache: Any, values: Any, first: Any, starts: Any, layer: Any, may_lack: bool) -> Any:
        width, (*_, columns, count) = cache.shape().sizes[-1], values.shape().sizes
        layer, zero, one, wide, high = (_scalar(cache.builder(), each) for each in (layer, 0, 1, width, columns))
        for new, row, start in _rows(cache, values, first, starts):
            if count > FEW_TOKENS:
                cache = _put_blocks(cache, new, first, layer, row, start, may_lack)
                continue
            for token in range(count):
                block = start / wide
                at = (layer, row, zero, block * high, start - block * wide)
                cache = _put(cache, new.slice_in_dim(token, token + 1, 4), first, at, may_lack)
                start = start + one
        return cache

    return registry.register("llama_write_values", lower)


def _put_blocks(cache: Any, new: Any, first: Any, layer: Any, row: Any, start: Any, may_lack: bool) -> Any:
    """Write the builder's values [1, 1, K, D, T] of a row: the blocks that they touch, with what else is in them."""
    (*_, heads, rows, width), (*_, columns, count) = cache.shape().sizes, new.shape().sizes
    blocks, builder = rows // columns, cache.builder()
    touched = min((count + width - 2) // width + 1, blocks)
    zero, wide, high = (_scalar(builder, each) for each in (0, width, columns))
    begin = (start / wide).min(_scalar(builder, blocks - touched))
    at, sizes = (layer, row, zero, begin * high, zero), [1, 1, heads, touched * columns, width]
    found = cache.dynamic_slice(list(at), sizes).reshape([heads, touched, columns, width])
    in_line = found.transpose([0, 2, 1, 3]).reshape([1, 1, heads, columns, touched * width])
    changed = in_line.dynamic_update_slice(new, (zero, zero, zero, zero, start - begin * wide))
    in_blocks = changed.reshape([heads, columns, touched, width]).transpose([0, 2, 1, 3]).reshape(sizes)
    return _put(cache, in_blocks, first, at, may_lack)


@cache
def _read_op() -> Any:
    """The registered XLA operation behind ``read_keys`` and ``read_values``."""
    import torch_xla.core.xla_op_registry as registry

    def lower(cache: Any, first: Any, layer: Any, rows: int, count: int) -> Any:
        _, every, heads, _, width = cache.shape().sizes
        layer, zero = _scalar(cache.builder(), layer), _scalar(cache.builder(), 0)
        row = zero if every == rows else first.reshape([])
        found = cache.dynamic_slice([layer, row, zero, zero, zero], [1, rows, heads, count, width])
        return ops.numbers(found.reshape([rows, heads, count, width]))

    return registry.register("llama_cache_read", lower)


@cache
def _copy_op() -> Any:
    """The registered XLA operation behind ``copy_row``."""
    import torch_xla.core.xla_op_registry as registry

    def lower(cache: Any, source: Any, target: Any, count: int) -> Any:
        layers, _, heads, _, width = cache.shape().sizes
        zero = _scalar(cache.builder(), 0)
        live = cache.dynamic_slice([zero, source.reshape([]), zero, zero, zero], [layers, 1, heads, count, width])
        return cache.dynamic_update_slice(live, (zero, target.reshape([]), zero, zero, zero))

    return registry.register("llama_cache_copy", lower)
