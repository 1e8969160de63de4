"""How fast this machine reads memory: what no decode step of a model larger than the caches can exceed."""

from __future__ import annotations

import time

import torch

BYTES = 2**29  # far more than any cache holds
ROUNDS = 7


def read_ceiling() -> float:
    """Bytes per second of reading with all of torch's threads, the best of a few rounds."""
    numbers = torch.ones(BYTES // 4)
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - began)
    return BYTES / best
