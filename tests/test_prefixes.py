"""The radix trie against a naive one, and the scheduler that places requests by it, on a device computed by hand."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import pytest
from fakes import VOCAB, FakeRunner, check, details_of, run_all, token_logprob

from llama import EngineConfig, SamplingParams
from llama.engine.engine import Engine
from llama.engine.prefixes import Prefixes, key_of, run_order, shared_with_others
from llama.engine.scheduler import KEEP_PAYS, LOOK_AHEAD, MOST_PASSED_OVER
from llama.engine.sequence import Sequence, Status, common_prefix
from llama.inputs import scored_sequence

SMALL: dict[str, Any] = {"max_seq_len": 256, "buckets": (16, 4, 1), "key_buckets": (64,)}


def ids(count: int, seed: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(3, VOCAB) for _ in range(count)]


def make_engine(kept_rows: int = 0, **settings: Any) -> tuple[Engine, FakeRunner]:
    config = EngineConfig(**SMALL | {"prefix_cache_bytes": kept_rows} | settings)
    runner = FakeRunner(config, kept_rows=kept_rows)
    return Engine(config, runner), runner


def request(prompt: list[int], count: int = 5, seed: int = 0, **params: Any) -> Sequence:
    return Sequence(tuple(prompt), SamplingParams(count, 0.0, seed=seed, **params))


def scoring(context: list[int], continuation: list[int], index: int = 0) -> Sequence:
    return scored_sequence(index, context, continuation, None, prefix_cache=True)


def check_scores(*sequences: Sequence) -> None:
    """Every continuation got the log-probabilities that its whole text gives."""
    for each in sequences:
        assert each.status is Status.FINISHED
        assert each.error is None
        assert each.scored_from is not None
        told = [float(value) for part in each.prompt_details for value in part.logprobs[:, 0]]  # type: ignore[index]
        places = range(each.scored_from, len(each.prompt_ids))
        expected = [token_logprob(each.prompt_ids[:p], each.prompt_ids[p], VOCAB) for p in places]
        assert told == pytest.approx(expected)


def ran(runner: FakeRunner, *kinds: str) -> list[tuple[object, ...]]:
    return [run for run in runner.ran if run[0] in kinds]


def positions_run(runner: FakeRunner) -> int:
    """Positions of all chunks, and steps."""
    return sum(run[3] if run[0] == "chunk" else 1 for run in ran(runner, "chunk", "decode"))  # type: ignore[misc]


# --- the trie ---------------------------------------------------------------------------------------------------------


class Naive:
    """What ``Prefixes`` answers, by comparing everything with everything."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[list[int], object]] = {}

    def matches(self, wanted: list[int], salt: object) -> dict[int, int]:
        shared = {row: common_prefix(held, wanted) for row, (held, own) in self.rows.items() if own == salt}
        return {row: count for row, count in shared.items() if count}

    def alone(self, row: int) -> int:
        held, salt = self.rows[row]
        others = [common_prefix(held, other) for r, (other, own) in self.rows.items() if r != row and own == salt]
        return len(held) - max(others, default=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_trie_is_the_naive_one(seed: int) -> None:
    """2,000 operations each: insert, replace, copy, remove and look up, over few ids, so that much is shared."""
    chooser = random.Random(seed)
    trie, naive = Prefixes(), Naive()

    def text() -> list[int]:
        if naive.rows and chooser.random() < 0.6:
            base, _ = chooser.choice(list(naive.rows.values()))
            return base[: chooser.randint(0, len(base))] + [chooser.randint(0, 3) for _ in range(chooser.randint(0, 9))]
        return [chooser.randint(0, 3) for _ in range(chooser.randint(1, 12))]

    for _ in range(2000):
        row, salt, kind = chooser.randrange(12), chooser.choice([None, "a"]), chooser.random()
        wanted = text()
        if kind < 0.4:
            trie.hold(row, key_of(wanted), salt)
            naive.rows.pop(row, None)
            if wanted:
                naive.rows[row] = wanted, salt
        elif kind < 0.5 and naive.rows:
            source = chooser.choice(list(naive.rows))
            if source != row:
                trie.copy(source, row)
                naive.rows[row] = naive.rows[source]
        elif kind < 0.7:
            trie.forget(row)
            naive.rows.pop(row, None)
        else:
            found = list(trie.matches(key_of(wanted), salt))
            assert dict(found) == naive.matches(wanted, salt)
            assert [count for _, count in found] == sorted((count for _, count in found), reverse=True)
        assert {r: trie.key(r) for r in trie.held} == {r: key_of(held) for r, (held, _) in naive.rows.items()}
        assert {r: held.length for r, held in trie.held.items()} == {r: len(h) for r, (h, _) in naive.rows.items()}
        for each in naive.rows:
            assert trie.alone(each) == naive.alone(each)
    for row in list(trie.held):
        trie.forget(row)
    assert not trie._roots


def test_the_least_used_row() -> None:
    """One that holds nothing first, then by the last use."""
    trie = Prefixes()
    for row in range(3):
        trie.hold(row, key_of([row]), None)
    trie.use(0)
    assert trie.least_used(range(3)) == 1
    assert trie.least_used(range(5)) == 3


@pytest.mark.alone
def test_an_operation_is_quick() -> None:
    """At 100,000 cached tokens a look-up and an insertion take 100 microseconds of the processor at most: medians of
    300, so that a pause of the machine does not count.
    """
    trie, shots = Prefixes(), ids(1000, 0)
    texts = [[*shots[: 250 * (row % 5)], *ids(2000 - 250 * (row % 5), row + 1)] for row in range(50)]
    for row, text in enumerate(texts):
        trie.hold(row, key_of(text), None)
    assert sum(held.length for held in trie.held.values()) == 100_000
    look_ups, insertions = [], []
    chooser = random.Random(1)
    for number in range(300):
        text = texts[chooser.randrange(50)]
        key = key_of([*text[: chooser.randrange(2000)], *ids(50, number)])
        began = time.thread_time()
        best = next(trie.matches(key, None), None)
        found = time.thread_time()
        trie.hold(chooser.randrange(50), key, None)
        look_ups.append(found - began)
        insertions.append(time.thread_time() - found)
        assert best is None or best[1] > 0
    assert statistics.median(look_ups) < 100e-6
    assert statistics.median(insertions) < 100e-6


def test_run_order() -> None:
    """Prompts that share enough come together, the groups as their first members came; nothing else moves."""
    a, b = ids(40, 1), ids(40, 2)
    prompts = [[*a, 1], [*b, 1], [*a, 2], ids(5, 3), [*b, 2], [*a, 1, 7]]
    order = run_order([key_of(p) for p in prompts], 32)
    assert sorted(order) == list(range(6))
    assert [prompts[i][0] for i in order] == [a[0]] * 3 + [b[0]] * 2 + [prompts[3][0]]
    assert abs(order.index(0) - order.index(5)) == 1  # they share one more token than either with 2
    assert run_order([key_of(ids(50, n)) for n in range(9)], 32) == list(range(9))
    assert shared_with_others([key_of(p) for p in prompts]) == [41, 40, 40, 0, 40, 41]


# --- placing ----------------------------------------------------------------------------------------------------------


def test_a_shared_beginning_is_computed_once() -> None:
    """32 requests with one system prompt, in eight slots and in one: its positions are run once."""
    for slots in (8, 1):
        engine, runner = make_engine(max_batch_size=slots)
        system = ids(160, 1)
        requests = [request([*system, *ids(5, n)]) for n in range(32)]
        run_all(engine, requests)
        check(*requests)
        assert [r.cached >= 145 for r in requests] == [False] + [True] * 31
        chunks = [run for run in ran(runner, "chunk") if run[2] < 144]  # type: ignore[operator]
        assert len(chunks) == 9


def test_several_prefixes_run_side_by_side() -> None:
    """Each of four groups has its first request at once, and its others when that is there."""
    engine, runner = make_engine(max_batch_size=8)
    systems = [ids(100, n) for n in range(4)]
    requests = [request([*systems[n % 4], *ids(5, 100 + n)]) for n in range(16)]
    run_all(engine, requests)
    check(*requests)
    assert sum(r.cached > 80 for r in requests) == 12
    first_four = [run[1] for run in ran(runner, "admit")][:4]
    assert len(set(first_four)) == 4


def test_one_row_serves_requests_in_groups() -> None:
    """With a single slot and nothing kept, requests in the run order compute each prefix once; as they came, they would
    compute it again and again.
    """
    systems = [ids(100, n) for n in range(2)]
    prompts = [[*systems[n % 2], *ids(5, 100 + n)] for n in range(12)]
    engine, _ = make_engine()
    order = run_order([key_of(p) for p in prompts], 32)
    requests = [request(prompts[i]) for i in order]
    run_all(engine, requests)
    check(*requests)
    assert sum(r.cached > 80 for r in requests) == 10


def test_kept_rows_hold_what_slots_lose() -> None:
    """A conversation comes back after others have used its slot: with a kept row it goes on, without it starts anew."""
    for kept, expected in ((0, 0), (1, 100)):
        engine, runner = make_engine(kept)
        first = request(ids(120, 1))
        run_all(engine, [first])
        others = [request(ids(120, 2)), request([*first.prompt_ids, *first.ids[120:], *ids(10, 3)])]
        for each in others:
            run_all(engine, [each])
        check(first, *others)
        assert others[1].cached >= expected
        assert bool(others[1].cached) == bool(expected)
        assert len(ran(runner, "copy")) == 2 * kept  # out of the way, and back


def test_the_least_recently_used_prefix_goes_first() -> None:
    """Of three in two rows and a slot the oldest is gone, and counted."""
    engine, _ = make_engine(2)
    prompts = [ids(80, n) for n in range(4)]
    for prompt in prompts:
        run_all(engine, [request(prompt)])
    assert engine.scheduler.counts.evictions == 1
    found = [engine.scheduler.best_source(request(prompt))[0] for prompt in prompts]
    assert found[0] == 0
    assert all(found[1:])


def test_a_row_that_is_copied_from_is_not_overwritten() -> None:
    """The only kept row holds what comes next: nothing else is put there first."""
    engine, _ = make_engine(1)
    a, b = ids(80, 1), ids(80, 2)
    for prompt in (a, b, a, b, [*a, 5], [*b, 6]):
        done = request(prompt)
        run_all(engine, [done])
        check(done)


def test_memory_is_what_was_planned() -> None:
    """Whatever comes, no row beyond the slots and the kept ones is used, and none longer than it is."""
    engine, runner = make_engine(3, max_batch_size=2)
    chooser = random.Random(3)
    for _ in range(60):
        requests = [request(ids(chooser.randint(1, 200), chooser.randrange(6)), 9) for _ in range(3)]
        run_all(engine, requests)
        check(*requests)
    assert len(runner.slots) == 5
    assert set(engine.scheduler.prefixes.held) <= set(range(5))
    assert max(held.length for held in engine.scheduler.prefixes.held.values()) <= 256
    assert max(len(slot.cache) for slot in runner.slots) <= engine.config.positions


def test_a_request_waits_for_a_prefix_that_is_being_computed() -> None:
    """And others run meanwhile; if the one that computes it is cancelled, it goes on by itself."""
    engine, _ = make_engine(max_batch_size=3)
    system = ids(200, 1)
    first, second, other = request([*system, 7]), request([*system, 8]), request(ids(30, 2))
    for each in (first, second, other):
        engine.submit(each)
    engine.step()
    assert (first.status, second.status) == (Status.PREFILLING, Status.WAITING)
    assert other.status is Status.PREFILLING
    engine.cancel(first)
    engine.step()
    assert second.is_live
    run_all(engine, [])
    check(second, other)


def test_many_that_wait_for_one_prefix_cost_little() -> None:
    """A round looks at no more than ``LOOK_AHEAD`` of them."""
    engine, _ = make_engine(max_batch_size=2)
    system = ids(250, 1)
    for number in range(500):
        engine.submit(request([*system, number % 300 + 3], 1))
    engine.step()
    looked = []
    real = engine.scheduler._waits_for_prefix
    engine.scheduler._waits_for_prefix = lambda s: looked.append(s) or real(s)  # type: ignore[method-assign,func-returns-value]
    engine.step()
    assert 0 < len(looked) <= LOOK_AHEAD


@pytest.mark.parametrize("off", ["engine", "request", "salt"])
def test_who_shares_nothing(off: str) -> None:
    """Switched off, for all or for one; or with another salt. What such a request leaves, nobody finds."""
    engine, _ = make_engine(2, **({"prefix_cache": False, "prefix_cache_bytes": 0} if off == "engine" else {}))
    prompt = ids(100, 1)
    params: dict[str, Any] = {"engine": {}, "request": {"prefix_cache": False}, "salt": {"cache_salt": "me"}}[off]
    run_all(engine, [request(prompt, **params)])
    again, mine = request(prompt), request(prompt, **params)
    run_all(engine, [again])
    run_all(engine, [mine])
    check(again, mine)
    assert again.cached == 0
    assert bool(mine.cached) == (off == "salt")


def test_samples_share_their_prompt_in_any_case() -> None:
    """``n`` of a prompt that takes no part in the prefix cache: run once, and found by nobody else."""
    engine, runner = make_engine(max_batch_size=2)
    params = SamplingParams(5, 0.5, seed=3, prefix_cache=False)
    leader = Sequence(tuple(ids(80, 1)), params)
    samples = [leader, *(Sequence(leader.prompt_ids, params, leader=leader) for _ in range(3))]
    run_all(engine, samples)
    check(*samples)
    assert len(ran(runner, "chunk")) == 5
    other = request(ids(80, 1))
    run_all(engine, [other])
    assert other.cached == 0


def test_counters() -> None:
    """Tokens that were looked up and found, as vLLM counts them."""
    engine, _ = make_engine()
    prompt = ids(100, 1)
    for _ in range(2):
        run_all(engine, [request(prompt)])
    run_all(engine, [request(prompt, prefix_cache=False)])
    stats = engine.scheduler.stats()
    assert stats["prefix_cache_queries"] == 200
    assert stats["prefix_cache_hits"] == 99
    assert stats["prefix_cache_evictions"] == 1  # the request that keeps nothing took the only slot


def test_a_prefix_worth_little_is_not_used() -> None:
    """One shared token, as BOS is, would turn a chunk of 16 into three of 4 and three of 1. Nothing short is kept."""
    engine, runner = make_engine(1)
    run_all(engine, [request([1, *ids(15, 1)])])
    second = request([1, *ids(15, 2)])
    run_all(engine, [second])
    assert second.cached == 0
    assert not ran(runner, "copy")
    assert KEEP_PAYS > 20


# --- scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 4])
def test_choices_of_one_context(slots: int) -> None:
    """Four choices of each of ten contexts with the same shots: shots once, contexts once, choices a chunk each."""
    engine, runner = make_engine(max_batch_size=slots)
    shots = ids(100, 1)
    contexts = [[*shots, *ids(20, 10 + n)] for n in range(10)]
    every = [scoring(context, ids(3, 90 + n)) for context in contexts for n in range(4)]
    run_all(engine, every)
    check_scores(*every)
    assert positions_run(runner) < 16 * 8 + 10 * (32 + 4 * 8)
    assert 10 <= sum(each.cached < 119 - 4 for each in every) <= 12


def test_scores_and_generations_side_by_side() -> None:
    """They share slots, prefixes and rounds; nobody's result changes."""
    engine, _ = make_engine(2, max_batch_size=3)
    shots = ids(60, 1)
    texts = [request([*shots, *ids(n, 5)], 12) for n in range(1, 9)]
    scores = [scoring([*shots, *ids(n, 6)], ids(n, 7)) for n in range(1, 20, 2)]
    mixed = [each for pair in zip(texts, scores, strict=False) for each in pair] + scores[8:]
    run_all(engine, mixed)
    check(*texts)
    check_scores(*scores)


@pytest.mark.parametrize(("context", "continuation"), [(1, 1), (1, 256), (256, 1), (200, 57), (128, 64)])
def test_the_smallest_and_the_largest_pairs(context: int, continuation: int) -> None:
    """The last token is not run, so one more fits than the cache has positions."""
    for slots in (1, 2):
        engine, _ = make_engine(max_batch_size=slots)
        for _ in range(2):
            pair = scoring(ids(context, 1), ids(continuation, 2))
            run_all(engine, [pair])
            check_scores(pair)
        assert pair.cached <= context - 1


def test_a_score_that_is_cancelled() -> None:
    """At every step: it ends as interrupted, and the slot serves the next one."""
    for steps in range(8):
        engine, _ = make_engine()
        pair, after = scoring(ids(60, 1), ids(30, 2)), scoring(ids(60, 1), ids(30, 3))
        engine.submit(pair)
        for _ in range(steps):
            engine.step()
        ended = pair.status is Status.FINISHED
        engine.cancel(pair)
        run_all(engine, [after])
        assert pair.finish_reason == ("length" if ended else "interrupted")
        check_scores(after)


def test_who_goes_on_where_a_slot_is_free_goes_first() -> None:
    """Of two that wait, the second one continues what the only slot holds: the first does not overwrite it, but is not
    passed over for ever.
    """
    engine, _ = make_engine()
    first = request(ids(120, 1))
    run_all(engine, [first])
    other, following = request(ids(120, 2)), [request([*ids(120, 1), *ids(9, n)]) for n in range(40)]
    run_all(engine, [other, *following])
    check(other, *following)
    before = [each for each in following if (each.admitted or 0) < (other.admitted or 0)]
    assert len(before) == MOST_PASSED_OVER
    assert sum(each.cached == 0 for each in following) == 1


def test_details_of_a_fake() -> None:
    """The oracle of these tests: 0 for the token that would be chosen."""
    text = ids(4, 1)
    found = details_of(text, 1, 3, VOCAB).logprobs
    assert found is not None
    assert found[:, 0].tolist() == pytest.approx([token_logprob(text[:p], text[p], VOCAB) for p in (1, 2, 3)])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_anything_at_any_time(seed: int, invariant: bool, groups: int) -> None:
    """Requests, scores, samples, salts and cancels over a few prefixes, in slots of one group of devices or of two, and
    two kept rows: every result is what the request gets alone. A position that another left behind would raise or
    change it.
    """
    chooser = random.Random(seed)
    kept, slots = chooser.choice([0, 2]), groups * chooser.choice([1, 3])
    engine, _ = make_engine(kept, max_batch_size=slots, batch_invariant=invariant, data_parallel=groups)
    roots = [ids(chooser.choice([20, 70, 150]), n) for n in range(4)]
    done: list[Sequence] = []
    cancelled: set[int] = set()
    for _ in range(300):
        kind, root = chooser.random(), chooser.choice(roots)
        prompt = [*root[: chooser.randint(1, len(root))], *ids(chooser.randint(0, 30), chooser.randrange(9))]
        salt = chooser.choice([None, None, "a"])
        if kind < 0.3:
            done.append(request(prompt, chooser.randint(1, 20), cache_salt=salt, prefix_cache=chooser.random() < 0.8))
        elif kind < 0.5:
            done.append(scoring(prompt, ids(chooser.randint(1, 20), chooser.randrange(9))))
        elif kind < 0.55:
            params = SamplingParams(5, 0.5, seed=1, cache_salt=salt)
            leader = Sequence(tuple(prompt), params)
            done += [leader, Sequence(tuple(prompt), params, leader=leader)]
            engine.submit(leader)
        elif kind < 0.6 and done:
            victim = chooser.choice(done)
            cancelled.add(victim.id)
            engine.cancel(victim)
            continue
        else:
            for _ in range(chooser.randint(1, 4)):
                engine.step()
            continue
        engine.submit(done[-1])
    run_all(engine, [])
    ended = [each for each in done if each.finish_reason != "interrupted"]
    assert len(ended) >= len(done) - len(cancelled)
    check(*(each for each in ended if each.generates))
    check_scores(*(each for each in ended if not each.generates))
    assert all(each.cached <= each.most_cached for each in done)
