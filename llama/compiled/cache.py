"""The keys and values of all positions so far: one stacked, preallocated tensor, donated from program to program.

    [2 x n_layers, slots, kv_heads, positions, head_dim]

One tensor and not one per layer, because XLA matches donated inputs to outputs by size alone: with several of the same
size it crosses them and copies whole caches every step. Positions before heads' columns, because a step reads a prefix
of positions of every head, and that order reads memory in a line.
"""

from __future__ import annotations

import torch

from llama.config import EngineConfig, ModelArgs
from llama.xla import ops, transfers


def cache_shape(args: ModelArgs, config: EngineConfig) -> tuple[int, int, int, int, int]:
    """The stacked cache's sizes: [2 x layers, slots, kv_heads, positions, head_dim]."""
    return (2 * args.n_layers, config.max_batch_size, args.kv_heads, config.positions, args.head_dim)


def allocate(args: ModelArgs, config: EngineConfig, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A zeroed cache on the device. Zeroed, so that positions never written hold finite numbers: they are masked,
    not skipped.
    """
    return transfers.upload(torch.zeros(cache_shape(args, config), dtype=dtype), device)


class CacheView:
    """One program's access to the cache while its layers run: each writes its chunk and reads a prefix.

    Args:
        kv_cache: the stacked cache.
        first: [1] int32; row r of the program is slot ``first + r``.
        starts: [B] int32, the position of the chunk's first token in each row.
        key_len: how many leading positions the layers read; static, at least ``starts + T`` for every row.
    """

    def __init__(self, kv_cache: torch.Tensor, first: torch.Tensor, starts: torch.Tensor, key_len: int) -> None:
        self.kv_cache = kv_cache
        self.first, self.starts, self.key_len = first, starts, key_len

    def update(
        self, layer: int | torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's ``keys`` and ``values`` [B, K, T, D]; return its first ones, [B, K, key_len, D]."""
        dtype = self.kv_cache.dtype
        self.kv_cache = ops.write_cache(
            self.kv_cache, keys.to(dtype), values.to(dtype), self.first, self.starts, layer
        )
        rows = self.starts.shape[0]
        read = ops.read_cache(self.kv_cache, self.first, layer, rows=rows, key_len=self.key_len)
        return read[0].to(keys.dtype), read[1].to(values.dtype)
