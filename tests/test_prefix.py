"""The prefix cache on the device: what rows hold is not run again, and texts and bits are the same."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from conftest import LLMFactory

from llama import LLaMA, SamplingParams
from llama.engine.sequence import Sequence, common_prefix
from llama.xla.counters import counters

WISH = SamplingParams(12, 0.0, 1.0, 0)


def run(llm: LLaMA, prompts: list[list[int]], reuse: bool) -> tuple[list[list[int]], list[int], int]:
    """Generated ids of each prompt, its tokens that were not run again, and program runs in all."""
    before = counters.runs
    results = llm.pieces(prompts, [replace(WISH, prefix_cache=reuse)] * len(prompts))
    found = sorted((piece.result for piece in results if piece.result is not None), key=lambda result: result.index)
    return [r.token_ids for r in found], [r.cached_tokens for r in found], counters.runs - before


def reusable(llm: LLaMA, prompt: list[int]) -> int:
    return llm.engine.scheduler.best_source(Sequence(tuple(prompt), WISH))[0]


def nearly(cached: list[int], held: list[int]) -> bool:
    """Whether all of what is held is used, but for what a chunk of eight runs again instead of chunks of one."""
    return all(h - 8 < c <= h for c, h in zip(cached, held, strict=True))


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
    warm, cold = make_llm(seed=5, prefix_cache=True), make_llm(seed=5, read_every=7)
    prompt = [1, *ids(60, 1)]
    for turn in range(3):
        expected, _, cold_runs = run(cold, [prompt], reuse=False)
        found, (cached,), warm_runs = run(warm, [prompt], reuse=True)
        assert found == expected
        if turn:
            assert nearly([cached], [len(prompt) - 5 - 1])  # all but the new part and the token that was not run yet
            assert warm_runs < cold_runs
        prompt = [*prompt, *found[0], *ids(5, turn)]


def test_a_changed_history_is_run_again_from_the_change_on(make_llm: LLMFactory) -> None:
    """An undone or edited turn keeps the common beginning and nothing behind it."""
    warm, cold = make_llm(seed=5, prefix_cache=True), make_llm(seed=5, read_every=7)
    before = [1, *ids(40, 2)]
    run(warm, [before], reuse=True)
    changed = [*before[:25], *ids(10, 3)]
    found, (cached,), _ = run(warm, [changed], reuse=True)
    assert nearly([cached], [25])
    assert found == run(cold, [changed], reuse=False)[0]


def test_the_same_prompt_again_runs_one_token(make_llm: LLMFactory) -> None:
    """Its last token must run, because its hidden state is what the answer begins with."""
    llm = make_llm(seed=5, prefix_cache=True)
    prompt = [1, *ids(20, 4)]
    first, _, _ = run(llm, [prompt], reuse=True)
    again, (cached,), runs = run(llm, [prompt], reuse=True)
    assert (again, cached, runs) == (first, len(prompt) - 1, WISH.max_gen_len)


@pytest.mark.parametrize("policy", ["greedy", "pad"])
def test_every_prompt_keeps_its_own_prefix(make_llm: LLMFactory, policy: str) -> None:
    """Each finds the slot that holds its beginning, whichever slot it is then given; nobody's text changes, also with a
    padded tail at the cache's end.
    """
    settings: dict[str, Any] = {"seed": 5, "max_batch_size": 2, "bucket_policy": policy}
    warm, cold = make_llm(**settings, prefix_cache=True), make_llm(**settings)
    prompts = [[1, *ids(30, 5)], [1, *ids(12, 6)]]
    answers, _, _ = run(warm, prompts, reuse=True)
    longer = [[*prompts[0], *answers[0], *ids(60, 7)], [*prompts[1], *answers[1], *ids(3, 8)]]
    found, cached, _ = run(warm, longer, reuse=True)
    assert nearly(cached, [len(prompts[i]) + len(answers[i]) - 1 for i in range(2)])
    assert found == run(cold, longer, reuse=False)[0]


def test_a_prefix_is_copied_from_a_slot_in_use(make_llm: LLMFactory) -> None:
    """Two turns that begin alike run side by side: one goes on where the prefix is, the other gets a copy."""
    warm, cold = make_llm(seed=5, max_batch_size=2, prefix_cache=True), make_llm(seed=5, max_batch_size=2)
    prompt = [1, *ids(50, 11)]
    run(warm, [prompt], reuse=True)
    turns = [[*prompt, *ids(4, 12)], [*prompt, *ids(9, 13)]]
    found, cached, _ = run(warm, turns, reuse=True)
    assert nearly(cached, [len(prompt)] * 2)
    assert found == run(cold, turns, reuse=False)[0]


def test_warm_up_and_an_interrupt_keep_what_is_true(make_llm: LLMFactory) -> None:
    """Compiling runs nothing; an interrupted prefill leaves only what had been run."""
    llm = make_llm(seed=6, read_every=1, prefix_cache=True)
    prompt = [1, *ids(40, 9)]
    run(llm, [prompt], reuse=True)
    llm.warm_up()
    assert reusable(llm, prompt) == len(prompt) - 1
    pieces = llm.pieces([[2, *prompt]], [WISH])
    llm.interrupt()
    assert [p.result.finish_reason for p in pieces if p.result is not None] == ["interrupted"]
    assert reusable(llm, prompt) == len(prompt) - 1  # it had not begun


def test_an_interrupted_caller_loses_nothing(make_llm: LLMFactory) -> None:
    """The bug: an exception in the middle of a batch lost the cache. A round is never cut now, and the prefix stays."""
    llm = make_llm(seed=6, read_every=1, prefix_cache=True)
    prompt = [1, *ids(20, 10)]
    expected, _, _ = run(llm, [prompt], reuse=True)
    stream = llm.pieces([prompt], [WISH])
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert reusable(llm, prompt) == len(prompt) - 1
    assert run(llm, [prompt], reuse=True)[:2] == (expected, [len(prompt) - 1])


def test_a_lost_cache_is_never_reused(make_llm: LLMFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that broke may have donated the cache: nothing of it counts, and the next request gets a new one."""
    llm = make_llm(seed=6, read_every=1, prefix_cache=True)
    prompt = [1, *ids(20, 10)]
    expected, _, _ = run(llm, [prompt], reuse=False)
    with monkeypatch.context() as broken:
        broken.setattr(llm.engine.runner, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(llm, [prompt], reuse=False)
    assert reusable(llm, prompt) == 0
    uploads = counters.uploads
    assert run(llm, [prompt], reuse=True)[:2] == (expected, [0])
    assert counters.uploads > uploads
