"""The keys and values of all positions so far: two stacked, preallocated tensors, donated from program to program.

    keys      [n_layers, rows, kv_heads, positions, head_dim]
    values    [n_layers, rows, kv_heads, blocks x head_dim, 128]     xla/kv_cache.py says why

The first rows are the slots. Behind them may stand kept rows, which no step runs: prefixes are copied there and back.

Two tensors and not two per layer, because XLA matches donated inputs to outputs by size alone: with several of the same
size it crosses them and copies whole caches every step. So these two never have the same size: the values have one
block more than the keys would fill.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from llama import planning
from llama.config import EngineConfig, ModelArgs
from llama.errors import ConfigError
from llama.sharding import local_args
from llama.xla import kv_cache, ops, transfers
from llama.xla.control_flow import Tensors, switch
from llama.xla.mesh import Split


def row_bytes(args: ModelArgs, config: EngineConfig, dtype: torch.dtype) -> int:
    """Bytes of one row of a cache of this dtype, of all devices that hold the model together."""
    return planning.row_bytes(args, config, str(dtype).removeprefix("torch."))


def kept_rows(args: ModelArgs, config: EngineConfig, dtype: torch.dtype) -> int:
    """Rows that ``prefix_cache_bytes`` has room for, as many in each group of devices.

    Raises:
        ConfigError: it is more than nothing and less than one row a group.
    """
    room, groups = config.prefix_cache_bytes, config.data_parallel
    rows = row_bytes(args, config, dtype) * groups
    if 0 < room < rows:
        raise ConfigError(
            f"prefix_cache_bytes: got {room}, expected 0, or {rows} at least: "
            f"{'one row' if groups == 1 else f'{groups} rows, one for each group,'} of the cache, "
            f"{config.max_seq_len} positions of this model"
        )
    return room // rows * groups


def split(parts: int) -> Split:
    """How the cache is split over a mesh: rows over its groups, key heads over the T devices that hold the model."""
    return (None, "data", "tensor" if parts > 1 else None)


def allocate(
    args: ModelArgs, config: EngineConfig, dtype: torch.dtype, device: torch.device, parts: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroed keys and values on the device. Zeroed, so that positions never written hold finite numbers: they are
    masked, not skipped.

    Args:
        dtype: of keys and values; see ``memory.cache_dtype_for``. The CPU device holds bfloat16 as its bits, int16
            (``ops.HALVES``): xla/kv_cache.py knows.
        parts: T, over how many devices the model is split.
    """
    rows = config.max_batch_size + kept_rows(args, config, dtype)
    heads = local_args(args, parts).kv_heads * parts  # with more devices than key heads several hold the same
    held, every = ops.held_as(dtype, device), (args.n_layers, rows, heads)
    columns = planning.value_blocks(config.positions) * args.head_dim
    keys = transfers.zeros((*every, config.positions, args.head_dim), held, device, split(parts))
    values = transfers.zeros((*every, columns, planning.VALUE_BLOCK), held, device, split(parts))
    return keys, values


def up_to(positions: torch.Tensor, key_len: int) -> torch.Tensor:
    """What each position attends to, [B, T, key_len] bool: all keys up to its own; ``positions`` [B, T]."""
    key_positions = torch.arange(key_len, device=positions.device, dtype=positions.dtype)
    return key_positions.view(1, 1, -1) <= positions.unsqueeze(-1)


class SlidingWindow(NamedTuple):
    """How far back attention reaches. The cache keeps all positions: only the mask differs.

    Attributes:
        size: how many positions a position attends to, its own included.
        first_layer: the layers before it attend to all.
    """

    size: int
    first_layer: int

    @classmethod
    def of(cls, args: ModelArgs) -> SlidingWindow | None:
        """The window of a model of this shape; None where no layer has one."""
        if args.sliding_window is None or args.first_sliding_layer >= args.n_layers:
            return None
        return cls(args.sliding_window, args.first_sliding_layer)

    def limit(
        self, seen: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor, layer: int | torch.Tensor
    ) -> torch.Tensor:
        """What is left of ``seen`` [B, T, S] bool.

        A row that does not count may stand behind all keys: it keeps the last ones, because a softmax over none is NaN,
        which it would write into the cache.

        Args:
            positions: [B, T] of the tokens.
            key_positions: [B or 1, T or 1, S] of the keys.
            layer: its number; a scalar tensor in a loop over layers.
        """
        key_len = seen.shape[-1]
        if key_len <= self.size or (isinstance(layer, int) and layer < self.first_layer):
            return seen
        last = positions.clamp(max=key_len - 1).unsqueeze(-1)
        within = key_positions > last - self.size
        if isinstance(layer, torch.Tensor) and self.first_layer:
            within = within | (layer < self.first_layer)
        return seen & within


class CacheView:
    """One program's access to the cache while its layers run: each writes its chunk and attends to a prefix.

    Args:
        key_cache, value_cache: the stacked cache.
        first: [1] int32; row r of the program is slot ``first + r``.
        starts: [B] int32, the position of the chunk's first token in each row.
        keys: [1] int32, how many leading positions the layers have to read: at least ``starts + T`` for every row that
            counts.
        key_lens: how many they can read, ascending; each is a branch of the program, and the first that is enough is
            taken.
    """

    def __init__(
        self,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        first: torch.Tensor,
        starts: torch.Tensor,
        keys: torch.Tensor,
        key_lens: tuple[int, ...],
    ) -> None:
        self.key_cache, self.value_cache = key_cache, value_cache
        self.first, self.starts, self.keys, self.key_lens = first, starts, keys, key_lens

    def with_tensors(self, *tensors: torch.Tensor) -> CacheView:
        """The same access through the tensors that a loop's body gets for ``cache`` and for ``tensors``."""
        key_cache, value_cache, first, starts, keys = tensors
        return CacheView(key_cache, value_cache, first, starts, keys, self.key_lens)

    def seen(self, positions: torch.Tensor, starts: torch.Tensor, key_len: int) -> torch.Tensor:
        """What each token of the chunk attends to of the first keys, [B, T, key_len] bool.

        Args:
            positions: [B, T] of the tokens.
            starts: [B] int32.
        """
        return up_to(positions, key_len)

    def key_positions(self, starts: torch.Tensor, count: int, key_len: int) -> torch.Tensor:
        """The positions of the first keys in their rows, [B or 1, 1, key_len] int32.

        Args:
            starts: [B] int32.
            count: T, the chunk's tokens.
        """
        return torch.arange(key_len, dtype=torch.int32, device=starts.device).view(1, 1, -1)

    @property
    def cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The cache as it is now."""
        return self.key_cache, self.value_cache

    @property
    def tensors(self) -> Tensors:
        """What it reads beside the cache."""
        return self.first, self.starts, self.keys

    def write(self, layer: int | torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write a layer's ``keys`` [B, K, T, D] and ``values`` [B, K, D, T]."""
        self.key_cache = kv_cache.write_keys(self.key_cache, keys, self.first, self.starts, layer)
        self.value_cache = kv_cache.write_values(self.value_cache, values, self.first, self.starts, layer)

    def attend(
        self,
        layer: int | torch.Tensor,
        attention: Callable[..., torch.Tensor],
        queries: torch.Tensor,
        positions: torch.Tensor,
        window: SlidingWindow | None = None,
    ) -> torch.Tensor:
        """``attention(queries, keys, values, seen)`` with a layer's first keys [B, K, key_len, D] and the blocks of
        values [B, K, N, D, W] that hold as many, in the queries' dtype.

        Args:
            window: limits what is seen; None where the model has none.
        """
        in_loop = (layer,) if isinstance(layer, torch.Tensor) else ()

        def branch(key_len: int) -> Callable[..., Tensors]:
            def attended(
                key_cache: torch.Tensor,
                value_cache: torch.Tensor,
                first: torch.Tensor,
                starts: torch.Tensor,
                queries: torch.Tensor,
                positions: torch.Tensor,
                *at: Any,
            ) -> Tensors:
                place, rows = at[0] if at else layer, len(queries)
                sizes, columns = {"rows": rows, "key_len": key_len}, key_cache.shape[-1]
                keys = kv_cache.read_keys(key_cache, first, place, **sizes).to(queries.dtype)
                values = kv_cache.read_values(value_cache, first, place, **sizes, columns=columns).to(queries.dtype)
                seen = self.seen(positions, starts, key_len)
                if window is not None:
                    key_positions = self.key_positions(starts, positions.shape[1], key_len)
                    seen = window.limit(seen, positions, key_positions, place)
                return (attention(queries, keys, values, seen),)

            return attended

        enough = torch.stack([self.keys > key_len for key_len in self.key_lens]).int().sum()
        inputs = (*self.cache, self.first, self.starts, queries, positions, *in_loop)
        (result,) = switch(enough, [branch(key_len) for key_len in self.key_lens], inputs)
        return result


class LookaheadView(CacheView):
    """The access of a chunk that is a Jacobi window (``steps.lookahead``), not a text.

    The chunk holds a row's last known token, then the window's levels, each of ``width`` tokens. A token of level l
    and column j continues the last known token by level 0 up to its column, and then by its own column up to its
    level::

        level 0    a b c d       c of level 1 continues: last, a, b, c (level 0), c (level 1)
        level 1    a b c d
    """

    def __init__(self, width: int, *access: Any) -> None:
        super().__init__(*access)
        self.width = width

    def with_tensors(self, *tensors: torch.Tensor) -> LookaheadView:
        """The same access through the tensors that a loop's body gets for ``cache`` and for ``tensors``."""
        return LookaheadView(self.width, *tensors, self.key_lens)

    def seen(self, positions: torch.Tensor, starts: torch.Tensor, key_len: int) -> torch.Tensor:
        """What each token of the window attends to, [B, T, key_len] bool; keys lie in the chunk's order."""
        count = positions.shape[1]
        order = torch.arange(count, dtype=torch.int32, device=positions.device).view(1, -1, 1)
        place = torch.arange(key_len, dtype=torch.int32, device=positions.device).view(1, 1, -1) - starts.view(-1, 1, 1)
        inside = (place > 0) & (place < count) & (order > 0)
        level, column = (order - 1).clamp(min=0) // self.width, (order - 1).clamp(min=0) % self.width
        key_level, key_column = (place - 1).clamp(min=0) // self.width, (place - 1).clamp(min=0) % self.width
        on_the_way = (key_level == 0) & (key_column <= column)
        above = (key_column == column) & (key_level <= level)
        return (place <= 0) | (inside & (on_the_way | above))

    def key_positions(self, starts: torch.Tensor, count: int, key_len: int) -> torch.Tensor:
        """The positions of the first keys, [B, 1, key_len] int32; those of the window follow from level and column."""
        place = torch.arange(key_len, dtype=torch.int32, device=starts.device).view(1, 1, -1) - starts.view(-1, 1, 1)
        order = place.clamp(min=1) - 1
        behind = torch.where(place > 0, 1 + order // self.width + order % self.width, place)
        return behind + starts.view(-1, 1, 1)
