"""Products of a few rows in tiles: some output channels by all rows, whose sums stay in registers.

XLA:CPU writes such a product as a loop over its results: for each, a pass over a row of the weight and a row of x
loads two numbers to multiply them once. Here one reduction has a result for each pair of a tile's channels and rows: a
number meets several others once it is loaded. So matrix products are written by hand (Goto and van de Geijn, "Anatomy
of High-Performance Matrix Multiplication", 2008).

A reduction with several results runs on one core. So the channels go in strips, one for each core, and each strip reads
a copy of x of its own, made by XNNPACK: XLA runs that library on another thread, and goes on there with what waits for
it (docs/decisions.md).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from llama.environment import cores
from llama.xla import modules
from llama.xla.ops import materialised, written

CHANNELS, MOST_ROWS = 4, 8  # of a tile, whose sums fill the registers of AVX-512
MOST_STRIPS = 8


class Strip(NamedTuple):
    """Output channels [start, stop), in tiles of ``channels``; ``core`` is which copy of x they read."""

    start: int
    stop: int
    channels: int
    core: int


def linear_tiled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` for a few rows x [R, in] and a weight [out, in] of any storage dtype: [R, out] float32.

    More rows than a tile has go one group after another, and read the weight anew.
    """
    if x.device.type != "xla":
        return F.linear(x, weight.to(x.dtype))
    groups = (x[a : a + MOST_ROWS].float() for a in range(0, len(x), MOST_ROWS))
    return torch.cat([_tiled_op()(materialised(group), weight) for group in groups])


def strips(channels: int, count: int) -> list[Strip]:
    """The output channels in equal strips of whole tiles, one for each of so many cores, and what is left."""
    count = min(count, MOST_STRIPS)
    each = channels // (count * CHANNELS) * CHANNELS
    whole = [Strip(core * each, (core + 1) * each, CHANNELS, core) for core in range(count)] if each else []
    rest = Strip(count * each, channels, 1, 0)
    return whole if rest.start == channels else [*whole, rest]


@cache
def _tiled_op() -> Any:
    """The registered XLA operation behind ``linear_tiled``."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    def lower(x: Any, weight: Any) -> Any:
        rows, width = x.shape().sizes
        channels = weight.shape().sizes[0]
        cut = strips(channels, cores())
        copies = _copies(x, 1 + max(strip.core for strip in cut))
        zero = xb.Op.scalar(x.builder(), 0.0, dtype=x.shape().dtype)
        columns: list[list[Any]] = [[] for _ in range(rows)]
        for strip in cut:
            size = strip.stop - strip.start, width
            tiles = modules.tiles(size, str(weight.shape().dtype), rows, strip.channels)
            part = weight.slice_in_dim(strip.start, strip.stop, 0)
            sums = xb.Op.call(tiles, (part, copies[strip.core], zero))
            for number in range(strip.channels * rows):
                columns[number % rows].append(sums.get_tuple_element(number))
        # one concatenation: with one for each strip, XLA would give strips the same memory, in turn
        every = [piece for row in columns for piece in row]
        return written(every[0].concat_in_dim(every, 0).reshape([1, rows * channels])).reshape([rows, channels])

    return registry.register("llama_linear_tiled", lower)


def _copies(x: Any, count: int) -> list[Any]:
    """So many copies of the builder's x, each of which is made on a thread of its own; x itself if that is one."""
    import torch_xla.core.xla_builder as xb

    if count == 1:
        return [x]
    sizes = list(x.shape().sizes)
    in_line = x.reshape([1, sizes[0] * sizes[1]])
    copies = (xb.Op.call(modules.numbered_copy(sizes[0] * sizes[1], i, count), (in_line,)) for i in range(count))
    return [copy.reshape(sizes) for copy in copies]
