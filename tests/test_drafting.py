"""Drafts on a device that can be computed by hand: they change the number of steps and nothing else."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Sequence as Sequences
from typing import Any

import numpy as np
import pytest
from fakes import FIRST, VOCAB, FakeRunner, check, expected_ids, next_token, run_all

from llama import EngineConfig, SamplingParams
from llama.engine.drafting import Drafter, Drafting, Drafts
from llama.engine.engine import Engine
from llama.engine.pace import AdaptivePace, Offer, Pace
from llama.engine.sequence import DraftCounts, Sequence
from llama.errors import ConfigError, EngineError
from llama.inputs import scored_sequence

SMALL: dict[str, Any] = {"max_seq_len": 128, "buckets": (16, 4, 1), "key_buckets": (32, 64), "draft_lens": (3, 7)}


class Oracle(Drafter):
    """Knows what comes, and is wrong on purpose now and then.

    Attributes:
        told: what ``accepted`` was called with.
        ended: what ``finished`` was called with.
    """

    def __init__(self, right: float = 1.0, seed: int = 0, most: int = 99) -> None:
        self._right, self._chooser, self._most = right, random.Random(seed), most
        self.told: list[list[int]] = []
        self.ended: list[Sequence] = []
        self.asked = 0

    def propose(self, sequences: Sequences[Sequence], draft_len: int) -> Drafts:
        self.asked += 1
        return Drafts.of([self._guess(s, draft_len) for s in sequences], draft_len)

    def _guess(self, sequence: Sequence, draft_len: int) -> list[int]:
        ids, guess = list(sequence.ids), []
        seed = (sequence.params.seed or 0) if sequence.params.temperature else 0
        for _ in range(self._chooser.randint(0, min(draft_len, self._most))):
            token = next_token(ids, VOCAB, seed)
            if self._chooser.random() >= self._right:
                token = self._chooser.randrange(-5, VOCAB + 5)
            ids.append(token)
            guess.append(token)
        return guess

    def accepted(self, counts: np.ndarray) -> None:
        self.told.append(counts.tolist())

    def finished(self, sequence: Sequence) -> None:
        self.ended.append(sequence)


def make_engine(drafter: Drafter, pace: Pace | None = None, **settings: Any) -> Engine:
    config = EngineConfig(**{**SMALL, "max_batch_size": 4, **settings})
    pace = pace or Pace(config.draft_lens, always=config.batch_invariant)
    return Engine(config, FakeRunner(config, VOCAB), Drafting(drafter, pace, VOCAB))


def sequence(length: int, count: int, seed: int = 0, **more: Any) -> Sequence:
    chooser = random.Random(1000 * length + seed)
    prompt = tuple(chooser.randrange(FIRST, VOCAB) for _ in range(length))
    return Sequence(prompt, SamplingParams(count, 1.0, seed=seed), **more)


def steps(engine: Engine, kind: str) -> int:
    assert isinstance(engine.runner, FakeRunner)
    return [ran[0] for ran in engine.runner.ran].count(kind)


# --- the text is the same ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("slots", [1, 2, 4, 8])
def test_everybody_gets_the_text_that_they_would_get_alone(slots: int, seed: int) -> None:
    """Right and wrong guesses, ids that do not exist, stop tokens, all prompt lengths, more requests than slots, both
    paces.
    """
    chooser = random.Random(seed)
    lens = chooser.choice([(1,), (3,), (7,), (3, 7), (31,), (2, 5, 20)])
    drafter = Oracle(chooser.choice([0.0, 0.5, 0.9, 1.0]), seed)
    pace = chooser.choice([None, AdaptivePace(lens, 8)])
    engine = make_engine(
        drafter,
        pace,
        max_batch_size=slots,
        draft_lens=lens,
        read_every=chooser.choice([1, 4, 16]),
        prefill_budget=chooser.choice([1, 20, 500]),
        batch_invariant=pace is None and chooser.random() < 0.3,
        bucket_policy=chooser.choice(["greedy", "pad"]),
    )
    if chooser.random() < 0.5:
        engine.runner.compile()
    sequences = []
    for number in range(2 * slots + 3):
        each = sequence(chooser.randint(1, 60), chooser.randint(1, 60), number)
        if chooser.random() < 0.3:
            known = expected_ids(each.prompt_ids, each.params, VOCAB)
            each.stop_ids = (known[chooser.randrange(len(known))],)
        sequences.append(each)
    run_all(engine, sequences)
    check(*sequences)
    assert sorted(s.id for s in drafter.ended) == [s.id for s in sequences]


@pytest.mark.parametrize("room", range(10))
def test_nothing_is_written_past_the_cache(room: int) -> None:
    """Up to the last position, with the longest step that there is: the fake device checks every write."""
    engine = make_engine(Oracle(), draft_lens=(7,))
    each = sequence(60, 128 - 60 - room)
    run_all(engine, [each])
    check(each)


def test_a_prompts_tail_rides_along() -> None:
    """Tokens of a prompt that fill no chunk are run several a step, beside drafts of another request."""
    engine = make_engine(Oracle(most=3), draft_lens=(3,), buckets=(16, 1), max_batch_size=2)
    first, second = sequence(16, 40), sequence(16 + 11, 20, seed=1)
    engine.submit(first)
    while len(first.ids) < 20:
        engine.step()
    run_all(engine, [second])
    check(first, second)
    assert second.runs < 1 + 11 + 20


# --- steps and counters -----------------------------------------------------------------------------------------------


def test_right_guesses_save_steps() -> None:
    """Seven right guesses and the token after them: eight tokens a step."""

    class Sure(Oracle):
        def _guess(self, sequence: Sequence, draft_len: int) -> list[int]:
            return expected_ids(sequence.ids, SamplingParams(draft_len, 1.0, seed=sequence.params.seed), VOCAB)

    engine = make_engine(Sure(), draft_lens=(7,))
    each = sequence(16, 41)
    run_all(engine, [each])
    check(each)
    assert steps(engine, "verify") == 5
    assert each.drafting == DraftCounts(5, 35, 35, [5] * 7)
    assert each.drafting.rejected_tokens == 0


def test_counters_add_up() -> None:
    """The engine's counters are the sum of the requests', and the drafter hears what came true of each proposal."""
    drafter = Oracle(0.7)
    engine = make_engine(drafter, draft_lens=(7,))
    sequences = [sequence(5 + n, 30, n) for n in range(6)]
    run_all(engine, sequences)
    total = DraftCounts()
    for each in sequences:
        total.merge(each.drafting)
    assert total == engine.drafting.counts  # type: ignore[union-attr]
    assert 0 < total.accepted_tokens < total.draft_tokens
    assert sum(total.accepted_per_position) == total.accepted_tokens
    assert total.accepted_per_position == sorted(total.accepted_per_position, reverse=True)
    assert sum(map(sum, drafter.told)) <= total.accepted_tokens


def test_the_step_that_checks_is_the_nearest_in_length() -> None:
    """Four guesses are not worth a step for seven, where there is one for three."""
    pace, each = Pace((3, 7)), sequence(5, 50)
    chosen = {count: pace.choose([Offer(each, 0), Offer(each, count)], 2) for count in range(9)}
    assert chosen == {0: 0, 1: 3, 2: 3, 3: 3, 4: 3, 5: 3, 6: 7, 7: 7, 8: 7}
    assert Pace((3, 7), always=True).choose([Offer(each, 0)], 1) == 7


def test_drafts_end_at_stop_tokens_and_before_the_limit() -> None:
    each = sequence(4, 6, stop_ids=(50,))
    assert each.draft([10, 11, 12, 13, 14, 15, 16], VOCAB).token_ids == [10, 11, 12, 13, 14]  # one is chosen anyway
    assert each.draft([10, 50, 12], VOCAB).token_ids == [10, 50]
    assert each.draft([10, VOCAB, 12], VOCAB).token_ids == [10]
    assert each.draft([-1], VOCAB).token_ids == []


# --- when something breaks --------------------------------------------------------------------------------------------


def test_a_drafter_that_raises_ends_its_requests_and_nothing_else() -> None:
    """The error is the requests', and the next ones run."""

    class Broken(Oracle):
        broken = True

        def propose(self, sequences: Sequences[Sequence], draft_len: int) -> Drafts:
            if self.broken:
                raise EngineError("the drafter broke")
            return super().propose(sequences, draft_len)

    drafter = Broken()
    engine = make_engine(drafter)
    first = sequence(9, 20)
    run_all(engine, [first])
    assert isinstance(first.error, EngineError)
    drafter.broken = False
    second = sequence(9, 20, 1)
    run_all(engine, [second])
    check(second)


def test_a_cancelled_request_leaves_the_others_alone() -> None:
    engine = make_engine(Oracle(0.8))
    sequences = [sequence(10 + n, 60, n) for n in range(4)]
    for each in sequences:
        engine.submit(each)
    for _ in range(12):
        engine.step()
    engine.cancel(sequences[1])
    run_all(engine, [])
    check(sequences[0], *sequences[2:])
    assert sequences[1].finish_reason == "interrupted"
    whole = expected_ids(sequences[1].prompt_ids, sequences[1].params, VOCAB)
    assert sequences[1].token_ids == whole[: len(sequences[1].token_ids)]


def test_a_device_that_fails_is_started_again() -> None:
    engine = make_engine(Oracle(0.8))
    first = sequence(10, 60)
    engine.submit(first)
    for _ in range(5):
        engine.step()
    assert isinstance(engine.runner, FakeRunner)
    engine.runner.fail_after = 0
    engine.step()
    assert isinstance(first.error, EngineError)
    second = sequence(12, 40, 1)
    run_all(engine, [second])
    check(second)


def test_scores_are_not_drafted() -> None:
    """A drafter hears nothing of sequences that generate nothing, and those beside them are drafted as ever."""
    drafter = Oracle()
    engine = make_engine(drafter, max_batch_size=2)
    texts = [sequence(10 + n, 12) for n in range(3)]
    scores = [scored_sequence(n, [5, 6, n + 7] * 4, [8, 9], None, prefix_cache=True) for n in range(6)]
    run_all(engine, [scores[0], texts[0], *scores[1:4], *texts[1:], *scores[4:]])
    check(*texts)
    assert all(each.is_scored and each.finish_reason == "length" for each in scores)
    assert drafter.asked
    assert {each.id for each in drafter.ended} == {each.id for each in texts}


def test_sequences_are_not_kept() -> None:
    drafter = Oracle(0.8)
    engine = make_engine(drafter, AdaptivePace((3, 7), 8))
    each = sequence(10, 30)
    seen = weakref.ref(each)
    run_all(engine, [each])
    drafter.ended.clear()
    run_all(engine, [sequence(3, 60, 1)])  # the slot and the last proposal are another's now
    drafter.ended.clear()
    del each
    assert isinstance(engine.runner, FakeRunner)
    engine.runner.reset()
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(("lens", "max_seq_len"), [((0,), 128), ((32,), 128), ((-1, 3), 128), ((7,), 8)])
def test_lengths_that_do_not_work_are_refused(lens: tuple[int, ...], max_seq_len: int) -> None:
    with pytest.raises(ConfigError, match="draft_lens: got"):
        EngineConfig(draft_lens=lens, max_seq_len=max_seq_len)


# --- the adaptive pace ------------------------------------------------------------------------------------------------


def paced(ratio: float, accept: float, rounds: int = 300) -> tuple[list[int], AdaptivePace]:
    """What a pace chooses on a machine where a step with K drafts takes ``1 + ratio * K`` decode steps, and for guesses
    of eight tokens each of which comes true with chance ``accept``.
    """
    pace, chooser, each = AdaptivePace((3, 7), 8), random.Random(0), sequence(5, 50)
    chosen = []
    for _ in range(rounds):
        draft_len = pace.choose([Offer(each, 8)], 1)
        chosen.append(draft_len)
        pace.took(draft_len, 1, 1.0 + ratio * draft_len)
        right = next((n for n in range(8) if chooser.random() >= accept), 8)
        pace.learn(Offer(each, 8), right)
    return chosen, pace


def test_it_drafts_where_that_pays() -> None:
    """Sure guesses: the longest step; cheap steps: too, though half of the guesses are wrong."""
    assert paced(0.1, 0.98)[0][50:].count(7) > 240
    assert paced(0.02, 0.6)[0][50:].count(0) < 20
    assert paced(0.1, 0.98)[1].wait == 0


def test_it_stops_where_that_does_not_pay() -> None:
    """Wrong guesses, or steps that cost as much as the tokens that they save; then it asks less and less often."""
    for ratio, accept in ((0.1, 0.02), (1.2, 0.9)):
        chosen, pace = paced(ratio, accept)
        assert chosen[50:].count(0) > 240, (ratio, accept)
        assert pace.wait == 8


def test_it_comes_back_when_guesses_come_true() -> None:
    """A text that begins to repeat itself: guesses that nobody checked are compared with what came."""
    pace, each = AdaptivePace((3, 7), 8), sequence(5, 50)
    for _ in range(30):
        pace.took(pace.choose([Offer(each, 8)], 1), 1, 1.0)
        pace.learn(Offer(each, 8), 0)
    assert pace.choose([Offer(each, 8)], 1) == 0
    for _ in range(4):
        pace.learn(Offer(each, 8), 8)
    assert pace.choose([Offer(each, 8)], 1) == 7


def test_a_drafter_that_takes_long_is_asked_rarely() -> None:
    """A proposal that takes three steps in vain: one in 256 steps at most; and its time counts against drafts."""
    pace, each = AdaptivePace((3, 7), 8), sequence(5, 50)
    for _ in range(40):
        pace.asked(3.0)
        pace.took(pace.choose([Offer(each, 8)], 1), 1, 1.0)
        pace.learn(Offer(each, 8), 0)
    assert pace.wait == 256
    sure, dear = AdaptivePace((3, 7), 8), AdaptivePace((3, 7), 8)
    dear.asked(9.0)
    for one in (sure, dear):
        one.took(0, 1, 1.0)
        one.took(0, 1, 1.0)
        one.learn(Offer(each, 7), 7)
    assert (sure.choose([Offer(each, 7)], 1), dear.choose([Offer(each, 7)], 1)) == (7, 0)


def test_a_bad_measurement_is_forgotten() -> None:
    pace, each = AdaptivePace((3,), 8), sequence(5, 50)
    for _ in range(5):
        pace.took(3, 1, 100.0)
        pace.took(0, 1, 1.0)
    assert pace.choose([Offer(each, 3)], 1) == 0
    for _ in range(600):
        pace.took(0, 1, 1.0)
    assert pace.seconds(3, 1) < 2.0
