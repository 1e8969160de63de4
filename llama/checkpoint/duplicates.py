"""Find a shard that is there twice, without reading the weights.

The parts of a split weight differ from shard to shard. Two shards whose parts are all equal are copies of one file
under two names, and the model computes something else than was trained. Replicated weights (norms, key/value heads
that several shards hold) are equal in every checkpoint and say nothing; neither do constant ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama.checkpoint.files import TensorFile
from llama.checkpoint.source import same_bits
from llama.errors import CheckpointError

SAMPLED = 8  # weights
COLUMNS = 1024  # of the rows that are compared: the first, the middle and the last one


def check_distinct(shards: Sequence[TensorFile], split: Sequence[str]) -> None:
    """Refuse two shards that hold the same bytes; reads some kilobytes of each, and all of two that look alike.

    Args:
        shards: in the order of their ranks.
        split: names of the weights of which every shard holds a part of its own, two-dimensional.

    Raises:
        CheckpointError: names both files.
    """
    if len(shards) == 1 or not split:
        return
    sampled = split[:: -(-len(split) // SAMPLED)]
    seen: dict[bytes, TensorFile] = {}
    for shard in shards:
        first = seen.setdefault(b"".join(_sample(shard.read(name)) for name in sampled), shard)
        if first is not shard and _are_copies(first, shard, split):
            raise CheckpointError(
                f"{shard.path.parent}: {shard.path.name} holds the same bytes as {first.path.name} in all {len(split)} "
                "weights that are split between them, expected another part of each: one file was copied over the "
                "other; fetch both again"
            )


def _sample(part: torch.Tensor) -> bytes:
    """Bytes of three rows of a part [rows, columns]."""
    rows = part[[0, len(part) // 2, -1], :COLUMNS].contiguous()
    return rows.view(torch.uint8).numpy().tobytes()


def _are_copies(one: TensorFile, other: TensorFile, split: Sequence[str]) -> bool:
    """Whether all parts are equal, and at least one is not constant."""
    informative = False
    for name in split:
        part = one.read(name)
        if not same_bits(part, other.read(name)):
            return False
        informative = informative or not bool((part == part[0, 0]).all())
    return informative
