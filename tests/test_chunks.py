"""The chunk plan, exhaustively: pure integers, no device."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from typing import Any

import pytest

from llama import EngineConfig, SamplingParams
from llama.engine.chunks import Chunk, cost, is_scored, plan, prefill, resumed, scored_lengths
from llama.engine.programs import Program, all_programs, programs_for
from llama.engine.sequence import Sequence
from llama.errors import ConfigError

BUCKET_SETS = [(512, 64, 8, 1), (64, 8, 1), (128, 1), (1,), (7, 3, 1), (300, 200, 100, 1)]


def config(max_seq_len: int, **settings: object) -> EngineConfig:
    return EngineConfig(max_seq_len=max_seq_len, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (96, (96,)),
        (512, (512,)),
        (2048, (512, 1024, 2048)),
        (3000, (512, 1024, 2048, 3000)),
        (8192, (512, 1024, 2048, 3072, 4096, 6144, 8192)),
    ],
)
def test_key_buckets(positions: int, expected: tuple[int, ...]) -> None:
    """Doublings, and from 2,048 on one half-way, too, so that a step reads at most half more than is live."""
    assert config(positions).key_buckets == expected
    assert config(positions, key_buckets=(64,)).key_buckets == tuple(sorted({64, positions}))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["greedy", "pad"])
@pytest.mark.parametrize(
    ("buckets", "max_seq_len"),
    # a length of 2,048 in chunks of 1 or 7 is what one of 600 is, only more often
    [(buckets, n) for buckets in BUCKET_SETS for n in (2, 63, 64, 65, 600, 2048) if n <= 600 or buckets[0] >= 300],
)
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


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["greedy", "pad"])
@pytest.mark.parametrize("buckets", [(512, 64, 8, 1), (512, 1), (1,), (7, 3, 1)])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_full_warm_up_holds_what_every_prompt_needs(buckets: tuple[int, ...], policy: str, invariant: bool) -> None:
    """What warm_up compiles is what any prompt can need, scored or not, from the start or from what a slot holds."""
    settings = config(
        1100, buckets=buckets, bucket_policy=policy, key_buckets=(128, 512), max_batch_size=4, batch_invariant=invariant
    )
    every = all_programs(settings)

    def covered(programs: list[Program]) -> bool:
        return all(any(one.covers(program) for one in every) for program in programs)

    for prompt_len in (*range(1, 140), *range(500, 600), *range(1000, 1100)):
        for params in (SamplingParams(1), SamplingParams(min(40, 1100 - prompt_len), logprobs=1, prompt_logprobs=True)):
            sequence = Sequence((1,) * prompt_len, params, scored_from=1 if params.prompt_logprobs else None)
            for cached in {0, prompt_len // 3, prompt_len - 1} if sequence.scored_from is None else {0}:
                assert covered(programs_for([sequence], settings, [(cached,)]))
        sequence = Sequence((1,) * (prompt_len + 1), scored_from=prompt_len, params=SamplingParams(1), generates=False)
        assert covered(programs_for([sequence], settings, [(0, prompt_len // 3, prompt_len - 1)]))
    leader = Sequence((1,) * 600, SamplingParams(40, regex="a*"))
    sequences = [leader, Sequence((1,) * 600, leader.params, leader=leader), Sequence((1,), leader.params)]
    assert Program("copy", key_len=1024) in programs_for(sequences, settings)
    assert covered(programs_for(sequences, settings))


@pytest.mark.parametrize("policy", ["greedy", "pad"])
@pytest.mark.parametrize("scored", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("buckets", BUCKET_SETS)
def test_a_prompt_is_prefilled_by_chunks_and_its_tail_by_steps(
    buckets: tuple[int, ...], scored: float | None, policy: str
) -> None:
    """No gap between chunks and decode steps; nothing past the cache; all of a prompt of which a part is scored goes
    through chunks, and those of that part are short.
    """
    settings = config(300, buckets=buckets, bucket_policy=policy)
    for prompt_len in range(1, 301):
        scored_from = None if scored is None else 1 + int(scored * (prompt_len - 1))
        most = prompt_len if scored_from is None else scored_from
        for cached in {0, most // 2, most - 1}:
            chunks, ready = prefill(prompt_len, settings, cached, scored_from=scored_from)
            valid = [c.valid for c in chunks]
            assert [c.start for c in chunks] == list(itertools.accumulate(valid, initial=cached))[:-1]
            assert ready == cached + sum(valid) <= prompt_len
            assert all(c.start + c.length <= settings.positions for c in chunks)
            assert all(c.end <= c.key_len <= 300 for c in chunks)
            assert scored is not None or all(c.length > 1 for c in chunks)
            if scored is not None:
                assert ready == prompt_len
                assert all(c.length <= 64 for c in chunks if is_scored(c, scored_from))
                assert {c.length for c in chunks if is_scored(c, scored_from)} <= set(scored_lengths(settings))
            else:
                assert prompt_len - ready < min((b for b in settings.buckets if b > 1), default=301)


@pytest.mark.parametrize("policy", ["greedy", "pad"])
@pytest.mark.parametrize("buckets", BUCKET_SETS)
def test_a_resumed_prompt_never_costs_more(buckets: tuple[int, ...], policy: str) -> None:
    """It goes on at or before the end of what is held, and is the cheapest of all places to go on from that are as
    good as that; a cold start costs no less.
    """
    settings = config(300, buckets=buckets, bucket_policy=policy)
    chooser = random.Random(1)
    for _ in range(300):
        count = chooser.randint(2, 300)
        scored_from = chooser.choice([None, chooser.randint(1, count)])
        held = chooser.randint(1, (count if scored_from is None else scored_from) - 1 or 1)
        held = min(held, count - 1 if scored_from is None else scored_from - 1)
        start, saved = resumed(count, settings, held, scored_from=scored_from)
        cold = cost(count, settings, 0, scored_from=scored_from)
        assert 0 <= start <= held
        assert saved == cold - cost(count, settings, start, scored_from=scored_from) >= 0
        assert cold - saved <= cost(count, settings, held, scored_from=scored_from)


def test_where_to_resume() -> None:
    """Three positions again turn five chunks of one token into one of eight; one chunk of 512 beats seven of 64; where
    steps run anyway, the ones ride with them.
    """
    settings = config(2048)
    assert resumed(105, settings, 100)[0] == 97
    assert resumed(105, settings, 100, rides=True)[0] == 100
    assert resumed(512, settings, 1) == (0, 0)
    assert resumed(600, settings, 599)[0] == 599
    assert resumed(1024, settings, 520)[0] == 512


@pytest.mark.parametrize("policy", ["greedy", "pad"])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("buckets", BUCKET_SETS)
def test_a_plan_from_one_of_its_chunks_is_its_rest(buckets: tuple[int, ...], scored: bool, policy: str) -> None:
    """So that under ``batch_invariant`` a resumed prompt is run by the chunks of a cold start."""
    settings = config(300, buckets=buckets, bucket_policy=policy, batch_invariant=True)
    for count in range(2, 301, 7):
        for scored_from in (count // 2 + 1, count) if scored else (None,):
            whole, ready = prefill(count, settings, scored_from=scored_from)
            for place, chunk in enumerate(whole):
                if scored_from is None or chunk.start < scored_from:
                    rest = prefill(count, settings, chunk.start, scored_from=scored_from)
                    assert rest == (whole[place:], ready)


def test_what_a_full_warm_up_compiles() -> None:
    """docs/architecture.md: for one slot, for eight, and for eight of which each keeps its bits; and with drafts, which
    add four programs at most.
    """
    drafts: dict[str, Any] = {"draft_lens": (3, 7)}
    for settings, expected in (
        (config(2048), 3 + 1 + 1 + 1 + 2 + 2),
        (config(2048, prefix_cache_bytes=1), 3 + 1 + 1 + 1 + 2 + 2 + 6),
        (config(2048, max_batch_size=8), 3 + 4 + 1 + 4 + 2 + 2 + 6 + 1),
        (config(2048, max_batch_size=8, batch_invariant=True), 3 + 1 + 1 + 2 + 2 + 2 + 6 + 1),
        (config(2048, **drafts), 10 + 2),
        (config(2048, max_batch_size=8, **drafts), 23 + 4),
        (config(2048, max_batch_size=8, **drafts, lookahead=(5, 3)), 23 + 4 + 2),
    ):
        programs = all_programs(settings)
        assert len(programs) == len(set(programs)) == expected


@pytest.mark.parametrize("prompt_len", [0, -1, 2049])
def test_a_length_that_cannot_be_planned_is_refused(prompt_len: int) -> None:
    """Zero tokens, or more than the cache has positions."""
    with pytest.raises(ConfigError, match="expected 1 to max_seq_len=2048"):
        plan(prompt_len, config(2048))


def test_planning_needs_no_torch() -> None:
    """The plan command answers at once, on a machine without a device."""
    code = "import sys, llama.engine.chunks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_program_covers() -> None:
    """One that reads more keys does for less; another length, width or kind does not, nor does a longer copy."""
    decode = Program("decode", rows=2, key_len=64)
    assert decode.covers(decode)
    assert decode.covers(Program("decode", rows=2, key_len=32))
    assert not decode.covers(Program("decode", rows=2, key_len=65))
    assert not decode.covers(Program("decode", rows=1, key_len=32))
    assert not decode.covers(Program("chunk", rows=2, key_len=64))
    assert not Program("copy", key_len=64).covers(Program("copy", key_len=32))


def test_a_call_asks_for_the_largest_program_only() -> None:
    """Prompts of several key buckets share a program of each length and width."""
    settings = config(2048, max_batch_size=2)
    sequences = [Sequence((1,) * length, SamplingParams(40)) for length in (513, 1601)]
    found = programs_for(sequences, settings)
    assert [p for p in found if p.kind == "chunk" and p.length == 512] == [Program("chunk", length=512, key_len=2048)]
    assert [p for p in found if p.kind == "decode"] == [Program("decode", rows=2, key_len=2048)]
