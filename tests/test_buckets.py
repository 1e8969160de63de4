"""The chunk plan, exhaustively: pure integers, no device."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from llama import EngineConfig
from llama.engine.chunks import Chunk, plan, program_shapes
from llama.errors import ConfigError

BUCKET_SETS = [(512, 64, 8, 1), (64, 8, 1), (128, 1), (1,), (7, 3, 1), (300, 200, 100, 1)]


def config(max_seq_len: int, **settings: object) -> EngineConfig:
    return EngineConfig(max_seq_len=max_seq_len, **settings)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["greedy", "pad"])
@pytest.mark.parametrize("max_seq_len", [2, 63, 64, 65, 600, 2048])
@pytest.mark.parametrize("buckets", BUCKET_SETS)
def test_every_prompt_length_is_covered_exactly(buckets: tuple[int, ...], max_seq_len: int, policy: str) -> None:
    """For every length: no gap, no overlap, padding at the very end only, nothing past the cache, keys enough for every
    chunk.
    """
    settings = config(max_seq_len, buckets=buckets, bucket_policy=policy)
    for prompt_len in range(1, max_seq_len + 1):
        chunks = plan(prompt_len, settings)
        assert [c.start for c in chunks] == [0, *itertools.accumulate(c.valid for c in chunks[:-1])]
        assert chunks[-1].end == prompt_len
        assert all(c.valid == c.length for c in chunks[:-1])
        assert 1 <= chunks[-1].valid <= chunks[-1].length
        assert all(c.start + c.length <= c.key_len <= max_seq_len for c in chunks)
        assert {c.length for c in chunks} <= set(buckets)
        if policy == "greedy":
            assert chunks[-1].valid == chunks[-1].length


def test_greedy_takes_the_longest_that_fits() -> None:
    """The 17 sections that pytorch-tpu/llama prints for its 1,501-token prompt (pull request 13)."""
    chunks = plan(1501, config(2048))
    assert [c.length for c in chunks] == [512] * 2 + [64] * 7 + [8] * 3 + [1] * 5


def test_a_padded_tail_costs_less_than_the_chunks_it_replaces() -> None:
    """The pad policy runs one program of 8 for a tail of 5, and never pads where an exact chunk is cheaper."""
    assert plan(5, config(2048, bucket_policy="pad")) == (Chunk(0, 8, 5, 512),)
    assert [c.length for c in plan(512 + 64, config(2048, bucket_policy="pad"))] == [512, 64]
    greedy, padded = (len(plan(1501, config(2048, bucket_policy=p))) for p in ("greedy", "pad"))
    assert padded < greedy


def test_padding_never_passes_the_end_of_the_cache() -> None:
    """XLA would clamp such a write and overwrite the last positions without a word."""
    assert [c.length for c in plan(62, config(63, buckets=(64, 8, 1), bucket_policy="pad"))][-1] == 1


def test_program_shapes_hold_every_plan() -> None:
    """What warm_up compiles is what any prompt can need."""
    settings = config(1100, bucket_policy="pad")
    shapes = set(program_shapes(settings))
    for prompt_len in range(1, 1101):
        assert {(c.length, c.key_len) for c in plan(prompt_len, settings)} <= shapes


@pytest.mark.parametrize("prompt_len", [0, -1, 2049])
def test_a_length_that_cannot_be_planned_is_refused(prompt_len: int) -> None:
    """Zero tokens, or more than the cache has positions."""
    with pytest.raises(ConfigError, match="expected 1 to max_seq_len=2048"):
        plan(prompt_len, config(2048))


def test_planning_needs_no_torch() -> None:
    """The plan command answers at once, on a machine without a device."""
    code = "import sys, llama.buckets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
