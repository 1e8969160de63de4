"""XLA operations that torch lacks, or writes in a way that XLA does not do well.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from llama.xla import backend, mesh

# XLA:CPU slices and updates bfloat16 by way of float32 and back, number by number: of a cache all of it, at every write
# (docs/log.md, 2026-11-26). As integers the numbers are only moved.
HALVES = {torch.bfloat16: torch.int16}
LEAST = {"s16": -(2**15), "s32": -(2**31)}  # of XLA's integers; of floats it is -inf
LANES = 64  # partial reductions over a vocabulary that run side by side


def held_as(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a tensor on the device that holds numbers of ``dtype`` and is sliced or updated: see ``HALVES``."""
    on_cpu = device.type == "xla" and backend.device_kind() == "CPU"
    return HALVES.get(dtype, dtype) if on_cpu else dtype


def as_held(x: Any, like: Any) -> Any:
    """The builder's numbers x as a tensor ``like`` this one holds them: in its dtype, or as their bits."""
    import torch_xla.core.xla_builder as xb

    dtype = like.shape().dtype
    return x.cast(xb.Type.BF16).bitcast(dtype) if dtype == xb.Type.S16 else x.cast(dtype)


def numbers(x: Any) -> Any:
    """The builder's numbers that a slice x of a held tensor stands for."""
    import torch_xla.core.xla_builder as xb

    return x.bitcast(xb.Type.BF16) if x.shape().dtype == xb.Type.S16 else x


def materialised(x: torch.Tensor) -> torch.Tensor:
    """x, computed once and written to memory before anything reads it."""
    if x.device.type != "xla":
        return x
    written: torch.Tensor = _materialised_op()(x.reshape(1, -1))
    return written.view(x.shape)


@cache
def _materialised_op() -> Any:
    """The registered XLA operation behind ``materialised``.

    A sliding maximum over each number and a padding of -inf, which changes nothing and which XLA:CPU fuses into no
    reader of its result. (An optimisation barrier would say it plainly, but is taken away before the fusion.)
    """
    import torch_xla.core.xla_op_registry as registry

    return registry.register("llama_materialised", written)


def written(x: Any) -> Any:
    """The builder's part of ``materialised``, for x [1, n]."""
    import torch_xla.core.xla_builder as xb

    dtype = x.shape().dtype
    least = xb.Op.scalar(x.builder(), LEAST.get(dtype, float("-inf")), dtype=dtype)
    return x.reduce_window(least, lambda a, b: a.max(b), [2, 1], [1, 1], "same")


def may_lack_rows(rows: int) -> bool:
    """Whether a program that runs so many rows of each group may have none for some: one that runs a single row."""
    return rows == 1 and mesh.current().data > 1


def unless_lacking(x: Any, new: Any, first: Any, at: Sequence[Any]) -> Any:
    """The builder's update of x at some place: ``new``, or what is there already where ``first`` is -1."""
    import torch_xla.core.xla_builder as xb

    sizes = list(new.shape().sizes)
    old = x.dynamic_slice(list(at), sizes)
    has_row = first >= xb.Op.scalar(x.builder(), 0, dtype=xb.Type.S32)
    return has_row.broadcast(sizes).select(new, old)


@cache
def _take_rows_op() -> Any:
    """The registered XLA operation behind ``take_rows``."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    def lower(x: Any, first: Any, count: int) -> Any:
        _, *rest = x.shape().sizes
        zero = xb.Op.scalar(x.builder(), 0, dtype=xb.Type.S32)
        return x.dynamic_slice([first.reshape([]), *[zero] * len(rest)], [count, *rest])

    return registry.register("llama_take_rows", lower)


def take_rows(x: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """Rows [first, first + count) of x; ``first`` is an int32 of one element."""
    if x.shape[0] == count:
        return x
    if x.device.type != "xla":
        return x[int(first) : int(first) + count]
    rows: torch.Tensor = _take_rows_op()(x, first, count=count)
    return rows


@cache
def _put_rows_op() -> Any:
    """The registered XLA operation behind ``put_rows``."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    def lower(x: Any, rows: Any, first: Any, may_lack: bool) -> Any:
        zero, place = xb.Op.scalar(x.builder(), 0, dtype=xb.Type.S32), first.reshape([])
        at = (place, *[zero] * (len(x.shape().sizes) - 1))
        return x.dynamic_update_slice(unless_lacking(x, rows, place, at) if may_lack else rows, at)

    return registry.register("llama_put_rows", lower)


def put_rows(x: torch.Tensor, rows: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """x with ``rows`` in the place of its rows from ``first`` on; ``first`` is an int32 of one element. On a mesh, -1
    where the group has no row: x as it is.
    """
    may_lack = x.device.type == "xla" and may_lack_rows(len(rows))
    if x.shape == rows.shape and not may_lack:
        return rows
    if x.device.type != "xla":
        return torch.cat((x[: int(first)], rows, x[int(first) + len(rows) :]))
    result: torch.Tensor = _put_rows_op()(x, rows, first, may_lack=may_lack)
    return result


def put_layer(whole: torch.Tensor, weight: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
    """A stack [L, ...] with a layer's weight in its place; ``layer`` is an int32 of one element."""
    result: torch.Tensor = _put_rows_op()(whole, weight.unsqueeze(0), layer, may_lack=False)
    return result


@cache
def _float_bits_op() -> Any:
    """The registered XLA operation behind ``float_bits``."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    return registry.register("llama_float_bits", lambda x: x.bitcast(xb.Type.S32))


@cache
def _float_of_bits_op() -> Any:
    """The registered XLA operation behind ``float_of_bits``."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    return registry.register("llama_float_of_bits", lambda x: x.bitcast(xb.Type.F32))


def float_of_bits(x: torch.Tensor) -> torch.Tensor:
    """The float32 numbers whose bit patterns an int32 tensor holds."""
    if x.device.type != "xla":
        return x.view(torch.float32)
    numbers: torch.Tensor = _float_of_bits_op()(x)
    return numbers


def float_bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a float32 tensor as int32. torch's own ``view(dtype)`` would leave the device and cut the
    graph.
    """
    if x.device.type != "xla":
        return x.view(torch.int32)
    bits: torch.Tensor = _float_bits_op()(x)
    return bits


def first_holding(keys: torch.Tensor, mass: torch.Tensor, wanted: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Which tokens are the first, in the order of their keys, that together hold the mass that is wanted.

    The last key that belongs to them is the largest number below which less than that is held: it is built from its
    highest bit on, in 31 sums. A loop inside the program, which is not entered where no row asks: an unused filter
    costs nothing.

    Args:
        keys: [B, V] int32, at least 0.
        mass: [B, V] float32, at least 0.
        wanted: [B] float32, above 0. Where all tokens hold less, as sums of floats can, all are kept.
        asked: [B] bool, the rows that ask.

    Returns:
        [B, V] bool; tokens of equal keys are kept or left together. All tokens of a row that does not ask.
    """
    lanes = in_lanes(keys, 2**31 - 1), in_lanes(mass, 0.0)
    first_bit = torch.where(asked.any(), 1 << 30, 0).to(torch.int32)
    find = _last_key_op() if keys.device.type == "xla" else _last_key
    last: torch.Tensor = find(*lanes, wanted, first_bit)
    return (keys <= last.unsqueeze(-1)) | ~asked.unsqueeze(-1)


def _last_key(keys: torch.Tensor, mass: torch.Tensor, wanted: torch.Tensor, first_bit: torch.Tensor) -> torch.Tensor:
    """The last key of ``first_holding``, [B] int32; keys and mass [B, V / lanes, lanes]."""
    last, bit = torch.zeros_like(wanted, dtype=torch.int32), int(first_bit)
    while bit:
        below = torch.where(keys < (last + bit).view(-1, 1, 1), mass, 0.0).sum(dim=1).sum(dim=-1)
        last = torch.where(below < wanted, last + bit, last)
        bit //= 2
    return last


@cache
def _last_key_op() -> Any:
    """The registered XLA operation that is ``_last_key`` on the device."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    def lower(keys: Any, mass: Any, wanted: Any, first_bit: Any) -> Any:
        builder, sizes = keys.builder(), list(keys.shape().sizes)
        none = xb.Op.scalar(builder, 0, dtype=xb.Type.S32).broadcast(sizes[:1])

        def more(bit: Any, last: Any, keys: Any, mass: Any, wanted: Any) -> Any:
            return bit > xb.Op.scalar(bit.builder(), 0, dtype=xb.Type.S32)

        def one_bit(bit: Any, last: Any, keys: Any, mass: Any, wanted: Any) -> Any:
            zero = xb.Op.scalar(bit.builder(), 0.0, dtype=mass.shape().dtype)
            candidate = last + bit.broadcast(sizes[:1])
            is_below = keys < candidate.broadcast_in_dim(sizes, [0])
            below = is_below.select(mass, zero.broadcast(sizes)).reduce(zero, _add, [1]).reduce(zero, _add, [1])
            half = bit / xb.Op.scalar(bit.builder(), 2, dtype=xb.Type.S32)
            return xb.Op.tuple([half, (below < wanted).select(candidate, last), keys, mass, wanted])

        return xb.Op.mkwhile([first_bit, none, keys, mass, wanted], more, one_bit).get_tuple_element(1)

    return registry.register("llama_last_key", lower)


def _add(a: Any, b: Any) -> Any:
    return a + b


def in_lanes(x: torch.Tensor, fill: float) -> torch.Tensor:
    """Fold [B, V] into [B, V / lanes, lanes], padded with ``fill``, for a reduction over the slow axis first.

    XLA:CPU vectorises a reduction over the slow axis, not one over the fast.
    """
    padded = F.pad(x, (0, -x.shape[-1] % LANES), value=fill)
    return padded.view(x.shape[0], -1, LANES)


@cache
def _rotate_left_op() -> Any:
    """The registered XLA operation behind ``rotate_left``."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    def lower(x: Any, distance: int) -> Any:
        word, builder = x.cast(xb.Type.U32), x.builder()
        high = word << xb.Op.scalar(builder, distance, dtype=xb.Type.U32)
        low = word / xb.Op.scalar(
            builder, 1 << (32 - distance), dtype=xb.Type.U32
        )  # the builder names no right shift; LLVM finds it
        return (high | low).cast(xb.Type.S32)

    return registry.register("llama_rotate_left", lower)


def rotate_left(x: torch.Tensor, distance: int) -> torch.Tensor:
    """Rotate the 32-bit words of an int32 tensor left by ``distance``, 1 to 31.

    An operation of its own because torch_xla 2.9 lowers ``>>`` of integers to a division that rounds towards zero:
    wrong for every negative word that is not a multiple.
    """
    if x.device.type != "xla":
        return (x << distance) | ((x >> (32 - distance)) & ((1 << distance) - 1))
    rotated: torch.Tensor = _rotate_left_op()(x, distance=distance)
    return rotated
