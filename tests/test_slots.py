"""Slots on the XLA device: bits that do not depend on neighbours, any mixture of callers, memory, threads, steps of
several tokens.
"""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import LLMFactory

from llama import LLaMA, SamplingParams
from llama.compiled import steps
from llama.compiled.state import CONTROLS, State
from llama.xla import backend, programs, transfers
from llama.xla.counters import counters, xla_compilations

SLOTS = 4
WISHES = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.0, "logit_bias": {40: 3.0}, "bad_words": ((50, 51), (60,))},
    {"temperature": 1.0, "typical_p": 0.6, "min_tokens": 4},
    {"temperature": 0.9, "stop": ("e",), "include_stop": True},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 1.0, "regex": "[a-z ]{3,20}"},
    {"temperature": 0.8, "n": 2},
    {"temperature": 0.8, "n": 1, "best_of": 3},
]


def random_request(chooser: random.Random) -> tuple[list[int], SamplingParams]:
    prompt = [1, *(chooser.randrange(3, 320) for _ in range(chooser.choice([0, 1, 5, 9, 20, 70])))]
    controls: dict[str, Any] = dict(chooser.choice(WISHES))
    return prompt, SamplingParams(chooser.randint(4, 20), seed=chooser.randrange(2**40), **controls)


@pytest.fixture(scope="module")
def invariant(make_llm: LLMFactory) -> LLaMA:
    llm = make_llm(
        max_batch_size=SLOTS, batch_invariant=True, fail_on_recompile=True, read_every=4, prefill_budget=30, seed=55
    )
    llm.warm_up()
    return llm


def test_bits_do_not_depend_on_neighbours(invariant: LLaMA) -> None:
    """Raw logits of a request alone, and in any slot beside any others: equal to the last bit."""
    chooser = random.Random(1)
    prompts = [[1, *(chooser.randrange(3, 320) for _ in range(length))] for length in (3, 17, 64, 90)]
    params = [SamplingParams(12, 0.0, logits=True, ignore_eos=True)] * SLOTS
    alone = [invariant.generate([prompt], params=params[:1])[0].logits for prompt in prompts]
    for seed in range(3):
        order = list(range(SLOTS))
        random.Random(seed).shuffle(order)
        together = invariant.generate([prompts[i] for i in order], params=params)
        for i, result in zip(order, together, strict=True):
            assert alone[i] is not None
            assert np.array_equal(alone[i], result.logits)  # type: ignore[arg-type]


def test_any_mixture_of_what_callers_do(invariant: LLaMA) -> None:
    """400 random operations: submit with any controls, read on, drop, cancel in the queue, interrupt, raise in the
    consumer. Every finished text is that of the request alone, to the last bit of its log-probabilities; nothing
    compiles and no slot leaks.
    """
    chooser = random.Random(2)
    llm, before = invariant, xla_compilations()
    known: dict[str, Any] = {}

    def alone(prompt: list[int], params: SamplingParams) -> list[Any]:
        key = repr((prompt, params))
        if key not in known:
            llm.take_interrupt()  # one that came too late to end a call would end this one
            results = llm.generate([prompt], params=params)
            known[key] = [(r.token_ids, r.generation, r.stop_reason, r.cumulative_logprob) for r in results]
        return known[key]  # type: ignore[no-any-return]

    open_calls: list[tuple[Any, list[int], SamplingParams, list[Any]]] = []
    finished = 0
    for _ in range(400):
        action = chooser.random()
        if action < 0.2 or not open_calls:
            prompt, params = random_request(chooser)
            open_calls.append((llm.pieces([prompt], [params]), prompt, params, []))
        elif action < 0.88:
            call = open_calls[chooser.randrange(len(open_calls))]
            stream, prompt, params, results = call
            piece = next(stream, None)
            if piece is not None and piece.result is not None:
                results.append(piece.result)
            if piece is None:
                open_calls.remove(call)
                found = sorted(results, key=lambda r: r.sample)
                if all(r.finish_reason != "interrupted" for r in found) and len(found) == params.n:
                    finished += 1
                    mine = [(r.token_ids, r.generation, r.stop_reason, r.cumulative_logprob) for r in found]
                    assert mine == alone(prompt, params)
        elif action < 0.94:
            open_calls.pop(chooser.randrange(len(open_calls)))[0].close()
        elif action < 0.96:
            llm.interrupt()
        else:
            with pytest.raises(KeyError):
                open_calls.pop(chooser.randrange(len(open_calls)))[0].throw(KeyError())
    for stream, *_ in open_calls:
        stream.close()
    llm.take_interrupt()
    assert llm.generate([[1, 5]], 3, 0.0)[0].finish_reason == "length"
    assert llm.engine.scheduler.slots == [None] * SLOTS
    assert llm.engine.scheduler.waiting == []
    assert xla_compilations() == before
    assert finished >= 10


def test_threads_share_the_slots(invariant: LLaMA) -> None:
    """Three threads, each with its own controls: the texts are those of the same requests alone."""
    chooser = random.Random(3)
    requests = [random_request(chooser) for _ in range(9)]
    expected = [[r.token_ids for r in invariant.generate([p], params=w)] for p, w in requests]
    found: dict[int, Any] = {}

    def work(first: int) -> None:
        for number in range(first, 9, 3):
            prompt, params = requests[number]
            try:
                found[number] = [r.token_ids for r in invariant.generate([prompt], params=params)]
            except Exception as error:
                found[number] = error

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found.get(n) for n in range(9)] == expected


def test_memory_is_flat(make_llm: LLMFactory) -> None:
    """Resident memory after 2,000 short requests is that after the first 200, within 2 %."""
    llm = make_llm(max_batch_size=SLOTS, seed=56)
    process = psutil.Process()

    def serve(count: int) -> int:
        for _ in range(count // 50):
            llm.generate([[1, 5, 6]] * 50, max_gen_len=2, temperature=0)
        return process.memory_info().rss

    before = serve(200)
    assert serve(2000) <= 1.02 * before


def test_one_live_request_runs_one_row(make_llm: LLMFactory) -> None:
    """Among 4 slots, warm: its steps are of width 1, and the counters say that no row was idle."""
    llm = make_llm(max_batch_size=SLOTS, seed=57, fail_on_recompile=True)
    llm.warm_up()
    llm.generate([[1] * 9], max_gen_len=20, temperature=0)
    assert llm.engine.scheduler.counts.idle_rows == 0
    before = counters.runs
    llm.generate([[1] * 9] * 4, max_gen_len=20, temperature=0)
    assert counters.runs - before <= 4 + 4 + 20 + 4


def appended(chosen: list[list[int]], count: list[int], limit: list[int], stop: int, length: list[int]) -> State:
    """``steps.append`` on the device, for slots of 12 positions whose tokens are 100, 101, ..."""
    rows = len(chosen)
    tokens = torch.arange(100, 112, dtype=torch.int32).repeat(rows, 1)
    known = torch.tensor(length, dtype=torch.int32)
    packed = torch.from_numpy(np.stack([CONTROLS.pack(limit=each, stop_ids=[stop, *[-1] * 15]) for each in limit]))
    report = torch.zeros(rows, 6 + 2, dtype=torch.int32)
    done = torch.zeros(rows, dtype=torch.bool)
    host = (tokens, known, known * 0, known, torch.zeros(rows, 1), done, report, packed)
    host = (*host, torch.tensor(chosen, dtype=torch.int32), torch.tensor(count, dtype=torch.int32))
    args = [transfers.upload(each.clone(), backend.init()) for each in host]

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *fields, packed, chosen, count = given
        row = State(packed, packed, *fields)
        return tuple(steps.append(row, CONTROLS.unpack(packed), chosen, count))[2:]

    program = programs.compile_program("append", run, args)
    return State(torch.zeros(0), torch.zeros(0), *map(transfers.fetch, program(*args)))


def test_a_step_may_write_several_tokens() -> None:
    """Of up to 3 tokens a row: cut at a stop token, at the limit and at the cache's end; 0 changes nothing."""
    state = appended(
        chosen=[[7, 8, 9], [7, 66, 9], [7, 8, 9], [7, 8, 9], [7, 8, 9], [7, 8, 9]],
        count=[3, 3, 3, 3, 0, 2],
        limit=[12, 12, 7, 99, 12, 12],
        stop=66,
        length=[5, 5, 5, 10, 5, 5],
    )
    assert state.length.tolist() == [8, 7, 7, 12, 5, 7]
    assert state.done.tolist() == [False, True, True, True, False, False]
    assert state.start.tolist() == [7, 6, 6, 11, 5, 6]
    assert [row[5:8] for row in state.tokens.tolist()] == [
        [7, 8, 9],
        [7, 66, 107],
        [7, 8, 107],
        [105, 106, 107],
        [105, 106, 107],
        [7, 8, 107],
    ]
    assert state.tokens.tolist()[3][9:] == [109, 7, 8]
    reports = state.report.tolist()
    assert [row[:6] for row in reports] == [
        [0, 0, 0, 7, 8, 9],
        [0, 0, 0, 0, 7, 66],
        [0, 0, 0, 0, 7, 8],
        [0, 0, 0, 0, 7, 8],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 7, 8],
    ]
    assert [row[6:] for row in reports] == [[8, 0], [7, 1], [7, 1], [12, 1], [5, 0], [7, 0]]


@pytest.mark.parametrize(
    "controls",
    [{"logprobs": 2}, {"logits": True}, {"hidden_states": True}, {"temperature": 1.0, "best_of": 3}],
    ids=lambda controls: next(reversed(controls)),
)
@pytest.mark.parametrize("read_every", [1, 2, 3])
def test_an_interrupt_at_any_step_keeps_the_details(
    make_llm: LLMFactory, monkeypatch: pytest.MonkeyPatch, read_every: int, controls: dict[str, Any]
) -> None:
    """The bug: at a step that is read it raised a TypeError and all text was lost."""
    llm = make_llm(read_every=read_every, max_batch_size=2, seed=58)
    params = SamplingParams(9, **{"temperature": 0.0, "seed": 1, **controls})
    whole = llm.generate([[1, 5, 6]], params=params)
    step = llm.engine.step
    for at in range(1, 14):
        rounds = iter(range(100))

        def interrupting(rounds: Any = rounds, at: int = at) -> Any:
            if next(rounds) == at:
                llm.interrupt()
            return step()

        with monkeypatch.context() as patched:
            patched.setattr(llm.engine, "step", interrupting)
            results = llm.generate([[1, 5, 6]], params=params)
        llm.take_interrupt()
        assert len(results) == len(whole)
        for cut, full in zip(results, whole, strict=True):
            count = len(cut.token_ids)
            for details, expected in ((cut.logprobs, full.logprobs), (cut.logits, full.logits)):
                assert expected is not None or details is None
                assert len(details if details is not None else ()) == (count if expected is not None else 0)
            assert cut.hidden_states is None or len(cut.hidden_states) == count
            if params.best_of is None:
                assert cut.token_ids == full.token_ids[:count]
                assert cut.logprobs is None or cut.logprobs == (full.logprobs or [])[:count]
    assert llm.generate([[1, 5, 6]], params=params)[0].token_ids == whole[0].token_ids
