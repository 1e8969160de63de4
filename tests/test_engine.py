"""The engine on a device that can be computed by hand: who runs when, in which slot, and that nobody's text changes."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Sequence as Sequences
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FIRST, VOCAB, FakeRunner, StaleReadError, check, expected_ids, fake_llm, next_token, run_all

from llama import EngineConfig, LLaMA, SamplingParams
from llama.engine.engine import Engine
from llama.engine.programs import Program
from llama.engine.runner import REPORT_WINDOW, new_tokens
from llama.engine.scheduler import MOST_PASSED_OVER, Scheduler
from llama.engine.sequence import Sequence, Status
from llama.errors import ConfigError, EngineError, InterruptedRunError, QueueFullError, RecompileError

SMALL: dict[str, Any] = {"max_seq_len": 128, "buckets": (16, 4, 1), "key_buckets": (32, 64)}


def make_engine(**settings: Any) -> Engine:
    config = EngineConfig(**{**SMALL, "max_batch_size": 4, **settings})
    return Engine(config, FakeRunner(config, VOCAB))


def runner_of(engine: Engine | LLaMA) -> FakeRunner:
    runner = (engine.engine if isinstance(engine, LLaMA) else engine).runner
    assert isinstance(runner, FakeRunner)
    return runner


def sequence(length: int, count: int, seed: int = 0, **controls: Any) -> Sequence:
    chooser = random.Random(1000 * length + seed)
    prompt = tuple(chooser.randrange(FIRST, VOCAB) for _ in range(length))
    return Sequence(prompt, SamplingParams(count, 1.0, seed=seed, **controls))


def kinds(engine: Engine) -> list[object]:
    return [ran[0] for ran in runner_of(engine).ran]


# --- one request ------------------------------------------------------------------------------------------------------


def test_the_fake_notices_a_stale_position() -> None:
    """The check that all tests here rest on can fail."""
    engine = make_engine()
    wrong = sequence(9, 5)
    engine.submit(wrong)
    engine.step()
    runner_of(engine).slots[0].cache[2] = 77
    while engine.has_work:
        engine.step()
    assert isinstance(wrong.error, StaleReadError | AssertionError)


@pytest.mark.parametrize("length", range(1, 40))
@pytest.mark.parametrize("invariant", [False, True])
def test_every_prompt_length(length: int, invariant: bool) -> None:
    engine = make_engine(batch_invariant=invariant)
    each = sequence(length, 10)
    run_all(engine, [each])
    check(each)


def test_the_life_of_a_slot() -> None:
    """The drawing in compiled/steps.py: a prompt of 12, chunks of 8 and 1, three tokens."""
    engine = make_engine(buckets=(8, 1), max_batch_size=1, read_every=1)
    run_all(engine, [sequence(12, 3)])
    ran = runner_of(engine).ran
    assert ran == [("admit", 0), ("chunk", 0, 0, 8), *[("decode", 0, 1)] * 6]


def test_not_one_step_too_many() -> None:
    """To a length limit exactly; after a stop token at most ``read_every`` steps and the one in flight."""
    for read_every in (1, 3, 16):
        engine = make_engine(read_every=read_every)
        each = sequence(17, 30)
        run_all(engine, [each])
        assert kinds(engine).count("decode") == 1 + 29
        stop = expected_ids(each.prompt_ids, each.params, VOCAB)[4]
        engine = make_engine(read_every=read_every)
        stopped = Sequence(each.prompt_ids, each.params, stop_ids=(stop,))
        run_all(engine, [stopped])
        check(stopped)
        assert kinds(engine).count("decode") <= 1 + 4 + read_every + 1


def test_a_read_that_would_lose_tokens_is_an_error() -> None:
    """The report holds so many tokens; more would be lost without a word."""
    row = np.arange(REPORT_WINDOW + 2)
    assert new_tokens(row, 3) == list(range(REPORT_WINDOW - 3, REPORT_WINDOW))
    for count in (REPORT_WINDOW + 1, -1):
        with pytest.raises(EngineError, match="would lose tokens"):
            new_tokens(row, count)


# --- several requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 8])
def test_everybody_gets_the_text_that_they_would_get_alone(slots: int, seed: int) -> None:
    """Random lengths and limits, more requests than slots, programs compiled or not."""
    chooser = random.Random(seed)
    engine = make_engine(
        max_batch_size=slots,
        read_every=chooser.choice([1, 4, 16]),
        prefill_budget=chooser.choice([1, 20, 500]),
        schedule=chooser.choice(["fcfs", "shortest"]),
        batch_invariant=chooser.random() < 0.3,
        bucket_policy=chooser.choice(["greedy", "pad"]),
    )
    if chooser.random() < 0.5:
        engine.runner.compile()
    requests = [sequence(chooser.randint(1, 60), chooser.randint(1, 40), seed=n) for n in range(12)]
    run_all(engine, requests)
    check(*requests)
    assert engine.scheduler.slots == [None] * slots


def test_a_slot_is_free_as_soon_as_its_request_has_ended() -> None:
    """A short request's slot goes to a waiting one while the long one runs on; its result does not wait either."""
    engine = make_engine(max_batch_size=2)
    long, short, waiting = sequence(8, 60), sequence(4, 3), sequence(4, 5)
    for each in (long, short, waiting):
        engine.submit(each)
    while waiting.finish_reason is None:
        engine.step()
    assert short.finished is not None
    assert waiting.finished is not None
    assert (short.slot, waiting.slot) == (1, 1)
    assert long.status is Status.RUNNING
    run_all(engine, [])
    check(long, short, waiting)


def test_a_long_prompt_does_not_stop_the_others() -> None:
    """Between two steps of the running request one chunk runs at most, where the budget is a chunk."""
    engine = make_engine(prefill_budget=16)
    running, long = sequence(4, 60), sequence(100, 3)
    engine.submit(running)
    engine.step()
    run_all(engine, [long])
    ran = kinds(engine)
    between = ["".join(str(k)[0] for k in group) for is_step, group in itertools.groupby(ran, lambda k: k == "decode")]
    assert ran.count("chunk") >= 6
    assert all(group.count("c") <= 2 for group in between[1:])  # a chunk, and at the end the choice of its first token
    check(running, long)


def test_the_tail_of_a_prompt_rides_with_the_others() -> None:
    """Its last few tokens take no runs of their own while others decode."""
    engine = make_engine(buckets=(16, 1))
    running, tail = sequence(1, 40), sequence(30, 5)
    engine.submit(running)
    engine.step()
    before = kinds(engine).count("decode")
    run_all(engine, [tail])
    assert tail.ready == 16
    assert kinds(engine).count("decode") - before == 40 - 1
    check(running, tail)


def test_a_step_is_as_narrow_as_the_live_slots() -> None:
    """One live request among 8 slots runs alone, wherever it is; two neighbours run together."""
    engine = make_engine(max_batch_size=8)
    engine.runner.compile()
    run_all(engine, [sequence(5, 20)])
    assert {ran[2] for ran in runner_of(engine).ran if ran[0] == "decode"} == {1}
    runner_of(engine).ran.clear()
    run_all(engine, [sequence(5, 20), sequence(5, 20, 1)])
    assert {ran[2] for ran in runner_of(engine).ran if ran[0] == "decode"} <= {1, 2}


def test_a_row_moves_where_that_makes_the_steps_narrower() -> None:
    """Seven short requests end, the first and the last go on: the last moves beside the first."""
    engine = make_engine(max_batch_size=8)
    engine.runner.compile()
    requests = [sequence(5, 60 if n in (0, 7) else 6, seed=n) for n in range(8)]
    run_all(engine, requests)
    check(*requests)
    assert kinds(engine).count("move") == 1
    assert requests[7].slot == 1
    widths = [ran[2] for ran in runner_of(engine).ran if ran[0] == "decode"]
    assert widths[-30:] == [2] * 30


def test_a_row_may_move_to_a_slot_whose_request_has_just_ended() -> None:
    """The bug: the end of that request, still to be carried out, ended the one that had moved there."""
    engine = make_engine(max_batch_size=8)
    engine.runner.compile()
    requests = [sequence(5, 60 if n in (0, 7) else 6, seed=n) for n in range(8)]
    for each in requests:
        engine.submit(each)
    narrow = engine._narrow

    def narrowing() -> None:
        if (
            engine.scheduler.slots[1] is None
        ):  # as where a stop string is found after a prompt's last chunk of the round
            engine._to_end.add(1)
        narrow()
        if engine.scheduler.slots[1] is None:
            engine._to_end.discard(1)

    engine._narrow = narrowing  # type: ignore[method-assign]
    run_all(engine, [])
    assert requests[7].slot == 1
    check(*requests)


def test_batch_invariance_is_one_width_and_ones_own_chunks() -> None:
    engine = make_engine(batch_invariant=True)
    requests = [sequence(n, 10, seed=n) for n in (3, 30, 17, 50)]
    run_all(engine, requests)
    check(*requests)
    assert {ran[1:] for ran in runner_of(engine).ran if ran[0] == "decode"} == {(0, 4)}
    decodes = [p for p in runner_of(engine).compiled if p.kind == "decode"]
    assert decodes == [Program("decode", rows=4, key_len=128)]
    for each in requests:
        alone = make_engine(batch_invariant=True)
        again = Sequence(each.prompt_ids, each.params)
        run_all(alone, [again])
        chunks, others = (
            [ran[2:] for ran in runner_of(e).ran if ran[0] == "chunk" and ran[1] == s.slot]
            for e, s in ((alone, again), (engine, each))
        )
        assert chunks == others


def test_nothing_is_compiled_that_was_not_foreseen() -> None:
    """What ``prepare`` compiles for some requests is what they run, beside each other and beside those already live."""
    chooser = random.Random(5)
    for _ in range(60):
        engine = make_engine(fail_on_recompile=True, max_batch_size=chooser.choice([1, 2, 3, 8]))
        live: list[Sequence] = []
        for _ in range(3):
            new = [
                sequence(chooser.randint(1, 90), chooser.randint(1, 38), seed=chooser.randrange(99))
                for _ in range(chooser.randint(1, 4))
            ]
            runner_of(engine).is_warm = False
            engine.prepare(new)
            for each in new:
                engine.submit(each)
            live += new
            for _ in range(chooser.randint(0, 20)):
                engine.step()
        run_all(engine, [])
        check(*live)


def test_the_longest_row_may_end_unseen() -> None:
    """The bug: prompts of 508 and 2 tokens, limits of 2 and 40: a step later than planned needed a program that was not
    compiled.
    """
    config = EngineConfig(max_seq_len=1024, max_batch_size=2, fail_on_recompile=True)
    engine = Engine(config, FakeRunner(config, VOCAB))
    requests = [sequence(508, 2), sequence(2, 40)]
    engine.prepare(requests)
    run_all(engine, requests)
    check(*requests)


# --- sharing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("invariant", [False, True])
def test_samples_share_their_prompt(slots: int, invariant: bool) -> None:
    """The first one's chunks are run; the others copy what its slot holds, and their text is their own."""
    engine = make_engine(max_batch_size=slots, batch_invariant=invariant)
    leader = sequence(47, 12, seed=1)
    others = [Sequence(leader.prompt_ids, SamplingParams(12, 1.0, seed=n), leader=leader) for n in range(2, 7)]
    run_all(engine, [leader, *others])
    check(leader, *others)
    held = 44 if invariant else 46  # where its last chunk begins, or its last token
    assert [each.cached for each in others] == [held] * 5
    copied = [ran[3] for ran in runner_of(engine).ran if ran[0] == "copy"]
    assert set(copied) <= {held}
    assert bool(copied) == (slots > 1)


def test_a_cancelled_leader_leaves_its_samples_whole() -> None:
    engine = make_engine(prefill_budget=1)
    leader = sequence(60, 12, seed=1)
    others = [Sequence(leader.prompt_ids, SamplingParams(12, 1.0, seed=n), leader=leader) for n in (2, 3)]
    for each in (leader, *others):
        engine.submit(each)
    engine.step()
    engine.cancel(leader)
    run_all(engine, [])
    assert leader.finish_reason == "interrupted"
    check(*others)


# --- ends -------------------------------------------------------------------------------------------------------------


def test_cancel_keeps_what_was_generated() -> None:
    """Waiting, prefilling or running, once or twice: it ends at the next step with every token that it has."""
    for rounds in range(30):
        engine = make_engine(max_batch_size=1, read_every=16)
        first, second = sequence(30, 20), sequence(5, 5)
        engine.submit(first)
        engine.submit(second)
        for _ in range(rounds):
            engine.step()
        if first.finish_reason is None:
            engine.cancel(first)
            engine.cancel(first)
            updates = engine.step()
            assert first.finish_reason in ("interrupted", "length")
            assert [u.sequence for u in updates if u.is_last and u.sequence is first] == [first]
            expected = expected_ids(first.prompt_ids, first.params, VOCAB)
            assert first.token_ids == expected[: len(first.token_ids)]
            assert len(first.token_ids) >= min(rounds - 6, 20)
        run_all(engine, [])
        check(second)


def test_a_device_that_fails_ends_what_was_live_and_nothing_else() -> None:
    """At every run: the live requests end with the error, the waiting ones run, and the engine goes on."""
    for after in range(60):
        engine = make_engine(max_batch_size=2)
        requests = [sequence(20 + n, 12, seed=n) for n in range(5)]
        for each in requests:
            engine.submit(each)
        runner_of(engine).fail_after = after
        run_all(engine, [])
        failed = [each for each in requests if each.error is not None]
        assert len(failed) <= 3
        assert all(isinstance(each.error, EngineError) for each in failed)
        check(*(each for each in requests if each.error is None))
        assert engine.scheduler.slots == [None, None]
        runner_of(engine).fail_after = None
        again = sequence(20, 12)
        run_all(engine, [again])
        check(again)


class Refusing:
    """A grammar that cannot be followed after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def allowed(self, vocab_size: int) -> np.ndarray:
        return np.full(-(-vocab_size // 32), -1, np.int32)

    def advance(self, token_ids: Sequences[int]) -> None:
        self.left -= len(token_ids)
        if self.left < 0:
            raise ConfigError("the grammar cannot be followed")


def test_a_grammar_that_fails_ends_its_own_request_alone() -> None:
    engine = make_engine()
    bad = Sequence((5, 6), SamplingParams(20, regex="a*"), grammar=Refusing(3))
    good = sequence(9, 20)
    run_all(engine, [bad, good])
    assert isinstance(bad.error, ConfigError)
    check(good)
    assert engine.scheduler.slots == [None] * 4


# --- the queue --------------------------------------------------------------------------------------------------------


def test_shortest_first_starves_nobody() -> None:
    """A long prompt waits while short ones come for ever, but not longer than ``MOST_PASSED_OVER`` of them."""
    scheduler = Scheduler(EngineConfig(**SMALL, schedule="shortest"))
    long = sequence(100, 1)
    scheduler.submit(long)
    admitted: list[Sequence] = []
    for number in range(100):
        scheduler.submit(sequence(3, 1, seed=number))
        admission = scheduler.next_admission()
        assert admission is not None
        chosen, placement = admission
        assert placement.slot == 0
        scheduler.admit(chosen, placement)
        scheduler.release(chosen)
        admitted.append(chosen)
    assert admitted.index(long) == MOST_PASSED_OVER
    assert len(admitted[0].prompt_ids) == 3


def test_first_come_first_served_is_the_default() -> None:
    engine = make_engine(max_batch_size=1)
    requests = [sequence(n, 3) for n in (50, 3, 20)]
    run_all(engine, requests)
    assert sorted(requests, key=lambda s: s.admitted or 0.0) == requests


def test_a_full_queue_refuses() -> None:
    """The one that is too many ends with the error; the others are served."""
    engine = make_engine(max_batch_size=1, max_waiting=2)
    requests = [sequence(5, 3, seed=n) for n in range(4)]
    run_all(engine, requests)
    assert [type(each.error) for each in requests] == [type(None), type(None), QueueFullError, QueueFullError]
    check(*requests[:2])


def test_a_batch_is_collected_for_a_time_or_a_number_of_tokens() -> None:
    """Nothing starts before the time is over, the tokens are there or the slots are full; then everything does."""
    now = [10.0]

    def fresh() -> Scheduler:
        return Scheduler(EngineConfig(**SMALL, max_batch_size=4, collect_s=2.0, collect_tokens=30), lambda: now[0])

    def submit(scheduler: Scheduler, length: int) -> None:
        each = sequence(length, 1)
        each.submitted = now[0]
        scheduler.submit(each)

    late, large, many = fresh(), fresh(), fresh()
    for scheduler in (late, large, many):
        submit(scheduler, 10)
        assert scheduler.next_admission() is None
    submit(large, 20)
    assert large.next_admission() is not None
    for _ in range(3):
        assert many.next_admission() is None
        submit(many, 1)
    assert many.next_admission() is not None
    now[0] = 12.0
    assert late.next_admission() is not None


def test_a_call_waits_while_requests_are_collected(tokenizer_path: Path) -> None:
    """Alone it starts when the time is over; a full set of slots starts at once."""
    llm = fake_llm(tokenizer_path, max_batch_size=2, collect_s=0.4)
    (alone,) = llm.generate(["x"], 3, 0.0)
    assert alone.timing.queue_s >= 0.4
    both = llm.generate(["x", "y"], 3, 0.0)
    assert max(r.timing.queue_s for r in both) < 0.4


def test_what_is_counted() -> None:
    engine = make_engine()
    requests = [sequence(17, 5), sequence(9, 5)]
    for each in requests:
        engine.submit(each)
    engine.step()
    stats = engine.scheduler.stats()
    assert (stats["running"], stats["waiting"], stats["slot_share"]) == (2, 0, 0.5)
    assert 0 < stats["cache_share"] < 1
    run_all(engine, [])
    stats = engine.scheduler.stats()
    assert (stats["requests"], stats["finished"], stats["running"], stats["prompt_tokens"]) == (2, 2, 0, 26)
    assert stats["generated_tokens"] == 10
    assert 0 <= stats["padding_share"] < 0.5


# --- callers ----------------------------------------------------------------------------------------------------------


def outcome(llm: LLaMA, prompt: str, count: int) -> list[int]:
    return expected_ids(
        llm.tokenizer.encode(prompt), SamplingParams(count, 0.0), llm.vocab_size, llm.tokenizer.stop_ids
    )


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_generate_inside_a_stream(tokenizer_path: Path, slots: int) -> None:
    """The bug: it ended the stream's rows, or failed an assertion. Each gets the text that it would get alone."""
    llm = fake_llm(tokenizer_path, max_batch_size=slots, read_every=1)
    expected = "".join(fake_llm(tokenizer_path).stream("the cat", 30, 0.0))
    pieces = []
    for piece in llm.stream("the cat", 30, 0.0):
        pieces.append(piece)
        (inner,) = llm.generate(["a dog"], 5, 0.0)
        assert inner.token_ids == outcome(llm, "a dog", 5)
    assert "".join(pieces) == expected


def test_two_generators_in_turn_and_one_dropped(tokenizer_path: Path) -> None:
    llm = fake_llm(tokenizer_path, max_batch_size=2, read_every=1)
    whole = {prompt: "".join(fake_llm(tokenizer_path).stream(prompt, 20, 0.0)) for prompt in ("once", "green house")}
    streams = {prompt: llm.stream(prompt, 20, 0.0) for prompt in whole}
    dropped = llm.stream("dropped", 60, 0.0)
    next(dropped)
    found = dict.fromkeys(whole, "")
    for number in range(100):
        for prompt, stream in streams.items():
            found[prompt] += next(stream, "")
        if number == 5:
            dropped.close()
    assert found == whole
    llm.generate(["x"], 1, 0.0)  # a round in which the dropped one leaves
    assert llm.engine.scheduler.slots == [None, None]


def test_threads_share_the_slots(tokenizer_path: Path) -> None:
    """Eight threads on three slots: each gets its own text, and every slot is free in the end."""
    llm = fake_llm(tokenizer_path, max_batch_size=3)
    wrong: list[object] = []

    def work(number: int) -> None:
        for turn in range(10):
            prompt = f"once {number} {turn}"
            try:
                (result,) = llm.generate([prompt], 5 + number, 0.0)
            except Exception as error:
                wrong.append(error)
                return
            if result.token_ids != outcome(llm, prompt, 5 + number):
                wrong.append((prompt, result.token_ids))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert llm.engine.scheduler.slots == [None] * 3


@pytest.mark.parametrize("read_every", [1, 2, 8])
def test_an_interrupt_at_every_round(tokenizer_path: Path, read_every: int) -> None:
    """The text so far is kept, every request says why it ended, and the next call is whole."""
    prompts = ["the cat sang", "a", "once upon a time there was a green house"]
    params = [SamplingParams(20, 0.0)] * 3
    rounds = 0
    while True:
        llm = fake_llm(tokenizer_path, max_batch_size=2, read_every=read_every)
        step, count = llm.engine.step, itertools.count()

        def interrupting(llm: LLaMA = llm, step: Any = step, count: Any = count, at: int = rounds) -> Any:
            if next(count) == at:
                llm.interrupt()
            return step()

        llm.engine.step = interrupting  # type: ignore[method-assign]
        results = {p.result.index: p.result for p in llm.pieces(prompts, params) if p.result is not None}
        assert sorted(results) == [0, 1, 2]
        for index, result in results.items():
            expected = outcome(llm, prompts[index], 20)
            cut = result.finish_reason == "interrupted"
            assert result.token_ids == (expected[: len(result.token_ids)] if cut else expected)
        interrupted = any(r.finish_reason == "interrupted" for r in results.values())
        assert llm.take_interrupt() == (not interrupted and next(count) > rounds)
        (after,) = llm.generate(["x"], 5, 0.0)
        assert after.finish_reason == "length"
        if not interrupted:
            break
        rounds += 1
    assert rounds > 10


def test_a_call_that_is_refused_harms_nobody(tokenizer_path: Path) -> None:
    """It needs a program after warm-up, or the queue is full: its caller gets the error, an open stream goes on."""
    llm = fake_llm(tokenizer_path, max_batch_size=2, fail_on_recompile=True, read_every=1, max_waiting=2)
    expected = "".join(fake_llm(tokenizer_path).stream("x", 20, 0.0))
    found = ""
    for piece in llm.stream("x", 20, 0.0):
        found += piece
        with pytest.raises(RecompileError):
            llm.generate(["the cat sang " * 8], 3, 0.0)
    assert found == expected
    runner_of(llm).is_warm = False
    with pytest.raises(QueueFullError, match="max_waiting is 2"):
        llm.generate(["x"] * 5, 3, 0.0)
    assert llm.generate(["x"], 3, 0.0)[0].finish_reason == "length"


def test_an_interrupt_before_a_call_ends_it_and_nothing_after_it(tokenizer_path: Path) -> None:
    llm = fake_llm(tokenizer_path)
    llm.interrupt()
    (first,), (second,) = (llm.generate(["x"], 5, 0.0) for _ in range(2))
    assert (first.finish_reason, first.token_ids, second.finish_reason) == ("interrupted", [], "length")


@pytest.mark.parametrize("call", ["generate", "warm_up"])
def test_an_interrupt_while_compiling_is_an_error_of_that_call_alone(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Nothing has been generated: no result. What was compiled is kept, and the next call runs."""
    llm = fake_llm(tokenizer_path)
    runner = runner_of(llm)
    compiled: list[object] = []

    class InterruptAtTheSecond(list[object]):
        def append(self, program: object) -> None:
            super().append(program)
            if len(self) == 1:
                llm.interrupt()

    with monkeypatch.context() as patched:
        patched.setattr(runner, "compiled", InterruptAtTheSecond(compiled))
        with pytest.raises(InterruptedRunError, match=r"^interrupted while compiling$"):
            llm.warm_up() if call == "warm_up" else llm.generate(["x"], 5, 0.0)
        assert len(runner.compiled) == 1
    assert not llm.take_interrupt()
    assert llm.generate(["x"], 5, 0.0)[0].finish_reason == "length"


def test_best_of_with_more_samples_than_slots_can_be_interrupted(tokenizer_path: Path) -> None:
    """The bug: an AssertionError, or an interrupt that stayed set and ended the next call."""
    llm = fake_llm(tokenizer_path, max_batch_size=2, read_every=1)
    results = []
    for piece in llm.pieces(["once"], [SamplingParams(20, 1.0, seed=1, n=7)]):
        if piece.text:
            llm.interrupt()
        if piece.result is not None:
            results.append(piece.result)
    assert len(results) == 7
    assert "interrupted" in {r.finish_reason for r in results}
    assert llm.generate(["x"], 3, 0.0)[0].finish_reason == "length"


def test_an_interrupted_warm_up_is_not_warm(tokenizer_path: Path) -> None:
    """The bug: what it had not compiled counted as a recompile afterwards."""
    llm = fake_llm(tokenizer_path, fail_on_recompile=True)
    runner = runner_of(llm)
    runner.stop_compiling = True
    with pytest.raises(InterruptedRunError):
        runner.compile()
    assert runner.compiled == []
    runner.stop_compiling = False
    assert llm.generate(["x"], 3, 0.0)[0].finish_reason == "length"
    with pytest.raises(RecompileError):
        llm.generate(["x " * 40], 3, 0.0)


def test_equal_samples_are_ranked_by_their_number() -> None:
    """The bug: samples of equal mean log-probability came in the order in which they ended."""
    from llama.generation import _Ranking

    ranking = _Ranking()
    params = SamplingParams(3, 1.0, n=2, best_of=3)

    class Result:
        def __init__(self, sample: int) -> None:
            self.sample, self.generation = sample, str(sample)

    found = []
    for sample in (2, 0, 1):
        each = Sequence((1,), params, sample=sample)
        import llama.generation as generation

        original = generation.replace
        generation.replace = lambda result, sample: result  # type: ignore[assignment]
        try:
            found += [p.result.generation for p in ranking.take(each, Result(sample)) if p.result]  # type: ignore[arg-type]
        finally:
            generation.replace = original
    assert found == ["0", "1"]


@pytest.mark.parametrize("seed", range(15))
def test_any_mixture_of_what_callers_do(tokenizer_path: Path, seed: int) -> None:
    """400 random operations on four slots: submit, read on, drop, interrupt, raise in the consumer. Every finished text
    is that of the request alone, and no slot leaks.
    """
    chooser = random.Random(seed)
    shapes = {"read_every": chooser.choice([1, 3, 8]), "prefill_budget": 20, "data_parallel": chooser.choice([1, 2, 4])}
    llm = fake_llm(tokenizer_path, max_batch_size=4, **shapes)
    if chooser.random() < 0.5:
        llm.warm_up()
    open_calls: list[tuple[Any, str, int, list[str]]] = []
    finished = 0
    for _ in range(400):
        action = chooser.random()
        if action < 0.25 or not open_calls:
            prompt, count = "ab c d"[: chooser.randint(1, 6)] * chooser.randint(1, 9), chooser.randint(1, 25)
            open_calls.append((llm.pieces([prompt], [SamplingParams(count, 0.0)]), prompt, count, []))
        elif action < 0.85:
            stream, prompt, count, parts = open_calls[chooser.randrange(len(open_calls))]
            piece = next(stream, None)
            if piece is not None:
                parts.append(piece.text)
            if piece is not None and piece.result is not None:
                expected, cut = outcome(llm, prompt, count), piece.result.finish_reason == "interrupted"
                found = piece.result.token_ids
                assert found == (expected[: len(found)] if cut else expected)
                assert "".join(parts) == piece.result.generation
                finished += 1
                open_calls = [each for each in open_calls if each[0] is not stream]
        elif action < 0.93:
            stream, *_ = open_calls.pop(chooser.randrange(len(open_calls)))
            stream.close()
        elif action < 0.96:
            llm.interrupt()
        else:
            stream, *_ = open_calls.pop(chooser.randrange(len(open_calls)))
            with pytest.raises(KeyError):
                stream.throw(KeyError())
    for stream, *_ in open_calls:
        stream.close()
    llm.take_interrupt()
    assert llm.generate(["x"], 3, 0.0)[0].finish_reason == "length"
    assert llm.engine.scheduler.slots == [None] * 4
    assert llm.engine.scheduler.waiting == []
    assert finished > 20


def test_stats_of_a_model(tokenizer_path: Path) -> None:
    llm = fake_llm(tokenizer_path, max_batch_size=2, read_every=1)
    stream = llm.stream("the cat", 30, 0.0)
    next(stream)
    assert (llm.stats()["running"], llm.stats()["slot_share"]) == (1, 0.5)
    assert sum(1 for _ in stream) > 0
    assert (llm.stats()["running"], llm.stats()["generated_tokens"]) == (0, 30)


def test_next_token_depends_on_every_token() -> None:
    """The fake model is worth something: another token anywhere before gives another text."""
    ids = list(range(5, 25))
    for place in range(20):
        changed = [*ids[:place], ids[place] + 1, *ids[place + 1 :]]
        assert next_token(changed, VOCAB) != next_token(ids, VOCAB)
