"""Reuse of the last batch's cache: a conversation's next turn runs only what is new, and the text is the same."""

from __future__ import annotations

import random

import pytest
from conftest import LLMFactory

from llama import LLaMA, SamplingParams
from llama.engine.batch import BatchClock
from llama.engine.engine import common_prefix
from llama.engine.programs import keys_for
from llama.engine.request import Request
from llama.xla.counters import counters

WISH = SamplingParams(12, 0.0, 1.0, 0)


def run(llm: LLaMA, prompts: list[list[int]], reuse: bool) -> tuple[list[list[int]], int, int]:
    """Generated ids of each row, tokens that were not run again, and program runs."""
    requests = [Request(tuple(p), WISH) for p in prompts]
    cached = llm.engine.reusable(requests) if reuse else 0
    llm.engine.warm_up(keys_for(requests, llm.config, cached))
    found: list[list[int]] = [[] for _ in prompts]
    clock = BatchClock()
    for progress in llm.engine.run(requests, clock, cached):
        found[progress.row] += progress.new_ids
    return found, cached, clock.runs


def ids(count: int, seed: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(3, 320) for _ in range(count)]


def test_common_prefix() -> None:
    """The leading ids that two sequences share."""
    assert [common_prefix(a, b) for a, b in [([], [1]), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 9, 3]), ([4], [5])]] == [
        0,
        2,
        1,
        0,
    ]


def test_a_next_turn_runs_only_what_is_new(make_llm: LLMFactory) -> None:
    """Three turns, each the last prompt, its answer and something new: same ids as from scratch, for a fraction of the
    runs.
    """
    warm, cold = make_llm(seed=5), make_llm(seed=5, read_every=7)
    prompt = [1, *ids(60, 1)]
    for turn in range(3):
        expected, _, cold_runs = run(cold, [prompt], reuse=False)
        found, cached, warm_runs = run(warm, [prompt], reuse=True)
        assert found == expected
        if turn:
            assert cached >= len(prompt) - 6 - 1  # all but the new part and the one token that was chosen but not run
            assert warm_runs < cold_runs
        prompt = [*prompt, *found[0], *ids(5, turn)]


def test_a_changed_history_is_run_again_from_the_change_on(make_llm: LLMFactory) -> None:
    """An undone or edited turn keeps the common beginning and nothing behind it."""
    warm, cold = make_llm(seed=5), make_llm(seed=5, read_every=7)
    before = [1, *ids(40, 2)]
    run(warm, [before], reuse=True)
    changed = [*before[:25], *ids(10, 3)]
    found, cached, _ = run(warm, [changed], reuse=True)
    assert cached == 25
    assert found == run(cold, [changed], reuse=False)[0]


def test_the_same_prompt_again_runs_one_token(make_llm: LLMFactory) -> None:
    """Its last token must run, because its hidden state is what the answer begins with."""
    llm = make_llm(seed=5)
    prompt = [1, *ids(20, 4)]
    first, _, _ = run(llm, [prompt], reuse=False)
    again, cached, runs = run(llm, [prompt], reuse=True)
    assert (again, cached, runs) == (first, len(prompt) - 1, WISH.max_gen_len)


@pytest.mark.parametrize("policy", ["greedy", "pad"])
def test_rows_share_the_smallest_prefix(make_llm: LLMFactory, policy: str) -> None:
    """Rows of a batch run through one plan from one start; nobody's text changes, also with a padded tail at the
    cache's end.
    """
    warm, cold = (make_llm(seed=5, max_batch_size=2, bucket_policy=policy, read_every=n) for n in (8, 7))
    prompts = [[1, *ids(30, 5)], [1, *ids(12, 6)]]
    answers, _, _ = run(warm, prompts, reuse=True)
    longer = [[*prompts[0], *answers[0], *ids(60, 7)], [*prompts[1], *answers[1], *ids(3, 8)]]
    found, cached, _ = run(warm, longer, reuse=True)
    assert cached == len(prompts[1]) + len(answers[1]) - 1
    assert found == run(cold, longer, reuse=False)[0]


def test_warm_up_and_an_interrupt_keep_what_is_true(make_llm: LLMFactory) -> None:
    """Compiling runs nothing; an interrupted prefill leaves only what had been run."""
    llm = make_llm(seed=6, read_every=1)
    prompt = [1, *ids(40, 9)]
    run(llm, [prompt], reuse=False)
    llm.warm_up()
    request = Request(tuple(prompt), WISH)
    assert llm.engine.reusable([request]) == len(prompt) - 1
    llm.engine.interrupted = True
    assert [p.finish_reason for p in llm.engine.run([Request((2, *prompt), WISH)], BatchClock())] == ["interrupted"]
    llm.engine.interrupted = False
    assert llm.engine.reusable([request]) == 0


def test_a_lost_cache_is_never_reused(make_llm: LLMFactory) -> None:
    """A batch that broke in the middle has donated the cache: nothing of it counts, and the next batch gets a new
    one.
    """
    llm = make_llm(seed=6, read_every=1)
    prompt = [1, *ids(20, 10)]
    expected, _, _ = run(llm, [prompt], reuse=False)
    stream = llm.engine.run([Request(tuple(prompt), WISH)], BatchClock())
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert llm.engine.reusable([Request(tuple(prompt), WISH)]) == 0
    uploads = counters.uploads
    assert run(llm, [prompt], reuse=True)[:2] == (expected, 0)
    assert counters.uploads > uploads
