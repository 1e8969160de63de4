"""Scores beside transformers' log-softmax of the same weights; with and without the prefix cache; of pairs that do not
fit; and at every interrupt.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import fake_llm
from test_parity_transformers import GROUPED_QUERY, TIED, Shape, random_prompts, reference, write_checkpoint

from llama import EngineConfig, LLaMA, SamplingParams, load_tokenizer
from llama.errors import ConfigError, InterruptedRunError, PromptError
from llama.scoring import Pair, RollingScore, Score, encode_pair, fitted, rolling_windows
from llama.xla.counters import counters

CLOSE = 1e-4
POSITIONS = 128
VOCAB = 320


@pytest.fixture(scope="module", params=[1, 3], ids=["batch-1", "batch-3"])
def slots(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module", params=[GROUPED_QUERY, TIED], ids=lambda shape: shape.name)
def shape(request: pytest.FixtureRequest) -> Shape:
    found: Shape = request.param
    return found


@pytest.fixture(scope="module")
def directory(shape: Shape, tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    return write_checkpoint(shape, tmp_path_factory.mktemp("scored") / "model", tokenizer_path)


@pytest.fixture(scope="module")
def llm(directory: Path, slots: int) -> LLaMA:
    config = EngineConfig(max_seq_len=POSITIONS, max_batch_size=slots, buckets=(64, 8, 1), fail_on_recompile=True)
    made = LLaMA.build(directory, config=config)
    made.warm_up()
    return made


def expected(shape: Shape, context: list[int], continuation: list[int]) -> tuple[list[float], bool]:
    """transformers' log-probabilities of the continuation, and whether it is the greedy one."""
    with torch.no_grad():
        logits = reference(shape)(torch.tensor([[*context, *continuation]])).logits[0].double()
    places = logits[len(context) - 1 : -1].log_softmax(dim=-1)
    wanted = torch.tensor(continuation)
    return places.gather(1, wanted.unsqueeze(-1)).squeeze(-1).tolist(), bool((places.argmax(-1) == wanted).all())


def pairs_of(shape: Shape, sizes: list[tuple[int, int]], seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Contexts and continuations of some sizes that begin alike."""
    text = random_prompts(shape, 1, POSITIONS + 1, seed)[0].tolist()
    return [(text[:c], random_prompts(shape, 1, n, seed + c + n)[0].tolist()) for c, n in sizes]


# --- beside transformers ----------------------------------------------------------------------------------------------

SIZES = [(1, 1), (1, 128), (128, 1), (64, 65), (70, 3), (70, 9), (71, 20), (5, 5), (120, 9), (70, 3), (1, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_log_probabilities_are_transformers(llm: LLaMA, shape: Shape, *, prefix_cache: bool) -> None:
    """Every token's within 1e-4, whatever the sizes and whatever rows hold; one token more fits than there are
    positions. Nothing is compiled.
    """
    pairs = pairs_of(shape, SIZES)
    greedy = [(context, greedy_continuation(shape, context, 4)) for context, _ in pairs[3:6]]
    compiled = counters.compiled
    found = llm.score(*map(list, zip(*pairs, *greedy, strict=True)), prefix_cache=prefix_cache)
    for score, (context, continuation) in zip(found, [*pairs, *greedy], strict=True):
        logprobs, is_greedy = expected(shape, context, continuation)
        assert score is not None
        assert list(score.token_logprobs) == pytest.approx(logprobs, abs=CLOSE)
        assert score.logprob == pytest.approx(sum(logprobs), abs=len(logprobs) * CLOSE)
        assert score.is_greedy == is_greedy
        assert (score.token_ids, score.context_tokens) == (tuple(continuation), len(context))
        assert score.cached_tokens < len(context)
        assert prefix_cache or not score.cached_tokens
    assert sum(score.is_greedy for score in found[-3:] if score) == 3
    assert counters.compiled == compiled


def greedy_continuation(shape: Shape, context: list[int], count: int) -> list[int]:
    ids = list(context)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(reference(shape)(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 300])
def test_rolling_scores_every_token_once(llm: LLaMA, shape: Shape, length: int) -> None:
    """Each token after as much context as its window has; the sum is that of transformers over the same windows."""
    ids = random_prompts(shape, 1, length, 3)[0].tolist() if length else []
    (found,) = llm.rolling([ids])
    total, scored = 0.0, 0
    for context, continuation, _ in rolling_windows(ids, llm.tokenizer.bos_id, POSITIONS + 1):
        total += sum(expected(shape, list(context), list(continuation))[0])
        scored += len(continuation)
    assert scored == length
    assert found == RollingScore(0, pytest.approx(total, abs=CLOSE * max(length, 1)), length, -(-length // POSITIONS))  # type: ignore[arg-type]


@pytest.mark.slow
def test_scores_beside_generations(llm: LLaMA, shape: Shape) -> None:
    """Another thread generates from the same contexts meanwhile: neither's results change."""
    pairs = pairs_of(shape, SIZES, seed=4)
    contexts, continuations = (list(part) for part in zip(*pairs, strict=True))
    prompts = [context[:100] for context in contexts]
    params = [SamplingParams(20, 0.0, seed=0)] * len(prompts)

    def texts() -> list[list[int]]:
        results = [piece.result for piece in llm.pieces(prompts, params) if piece.result is not None]
        return [result.token_ids for result in sorted(results, key=lambda result: result.index)]

    alone = texts()
    beside: list[list[list[int]]] = []
    thread = threading.Thread(target=lambda: beside.append(texts()))
    thread.start()
    found = llm.score(contexts, continuations)
    thread.join()
    assert beside == [alone]
    for score, (context, continuation) in zip(found, pairs, strict=True):
        assert score is not None
        assert list(score.token_logprobs) == pytest.approx(expected(shape, context, continuation)[0], abs=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 2])
def test_bits_with_and_without_the_cache(directory: Path, slots: int, kept: int) -> None:
    """Under ``batch_invariant`` every log-probability and every text is the same to the last bit, cold, warm, and with
    kept rows; among them a prefix that decode steps computed, and one that longer chunks did.
    """
    row = 2 * 2 * 2 * (POSITIONS + 7) * 8 * 4  # layers, keys and values, heads, positions, columns, bytes
    settings: dict[str, Any] = {"max_seq_len": POSITIONS, "max_batch_size": slots, "buckets": (64, 16, 8, 1)}
    chooser = random.Random(5)
    text = [chooser.randrange(3, VOCAB) for _ in range(POSITIONS)]
    contexts = [text[: chooser.randint(1, 110)] + [chooser.randrange(3, VOCAB)] * (n % 3) for n in range(40)]
    continuations = [[chooser.randrange(3, VOCAB) for _ in range(chooser.randint(1, 16))] for _ in contexts]
    found = []
    for prefix_cache in (False, True):
        config = EngineConfig(
            **settings,
            batch_invariant=True,
            prefix_cache=prefix_cache,
            prefix_cache_bytes=kept * row * 2 if prefix_cache else 0,
        )
        llm = LLaMA.build(directory, config=config)
        params = [SamplingParams(20, n % 2, seed=n) for n in range(len(contexts))]
        first = [r.token_ids for r in llm.generate([c[:100] for c in contexts], params=params)]
        turns = [[*c[:90], *ids[:12], 5, 6, 7] for c, ids in zip(contexts, first, strict=True)]
        second = llm.generate(turns, params=params)
        scores = llm.score(contexts, continuations)
        assert any(r.cached_tokens for r in second) == prefix_cache
        assert any(s is not None and s.cached_tokens for s in scores) == prefix_cache
        told = [s.token_logprobs for s in scores if s is not None]
        found.append((first, [r.token_ids for r in second], told))
    assert found[0] == found[1]


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_fake(tokenizer_path: Path) -> LLaMA:
    return fake_llm(tokenizer_path, max_batch_size=2)


def test_spaces_belong_to_the_continuation(tokenizer_path: Path) -> None:
    """A context's last spaces move, the whole is encoded at once, and BOS stands once."""
    tokenizer = load_tokenizer(tokenizer_path)
    whole = tuple(tokenizer.encode("the cat ran home"))
    for context, continuation in (("the cat", " ran home"), ("the cat ", "ran home")):
        before, after = encode_pair(tokenizer, 0, context, continuation, VOCAB)
        assert before + after == whole
        assert before == tuple(tokenizer.encode("the cat"))
    before, after = encode_pair(tokenizer, 0, "", "the cat", VOCAB)
    assert before == (tokenizer.bos_id,)
    assert before + after == tuple(tokenizer.encode("the cat"))
    assert encode_pair(tokenizer, 0, [5, 6], [7], VOCAB) == ((5, 6), (7,))


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ("the cat", "", "the continuation '' adds no token"),
        ("the cat", [5], "got a text and token ids"),
        ([5], "a", "got a text and token ids"),
        ([], [5], "got no ids"),
        ([5], [], "got no ids"),
        ([5], [VOCAB], f"got id {VOCAB}"),
        ("a\ud800", "b", "not valid Unicode"),
    ],
)
def test_pairs_that_cannot_be_encoded(on_fake: LLaMA, context: Any, continuation: Any, message: str) -> None:
    """Refused with the pair's number, before anything is run."""
    with pytest.raises(PromptError, match=message):
        on_fake.score([[3], context], [[4], continuation])
    assert not on_fake.engine.scheduler.counts.requests


def test_a_number_of_contexts_and_another_of_continuations(on_fake: LLaMA) -> None:
    with pytest.raises(PromptError, match="got 2 contexts and 1 continuations"):
        on_fake.score([[3], [4]], [[5]])
    assert on_fake.score([], []) == []
    assert on_fake.rolling([]) == []


def test_what_does_not_fit() -> None:
    """Refused with the sizes that would do, cut from the left, or left out; a continuation that leaves no room for a
    context can only be left out.
    """
    context, continuation = tuple(range(10)), (7, 8)
    assert fitted(0, context, continuation, 12, "refuse") == Pair(context, continuation)
    with pytest.raises(PromptError, match=r"pair 3 does not fit: 10 context tokens \+ 2 .* = 12, expected at most 11"):
        fitted(3, context, continuation, 11, "refuse")
    assert fitted(0, context, continuation, 9, "truncate") == Pair(context[3:], continuation, 3)
    assert fitted(0, context, continuation, 3, "truncate") == Pair((9,), continuation, 9)
    assert fitted(0, context, continuation, 9, "skip") is None
    for rule in ("refuse", "truncate"):
        with pytest.raises(PromptError, match="the continuation alone has 2 tokens, expected at most 1"):
            fitted(0, context, continuation, 2, rule)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="too_long: got 'cut', expected one of refuse, truncate, skip"):
        fitted(0, context, continuation, 99, "cut")  # type: ignore[arg-type]


def test_what_does_not_fit_is_counted(on_fake: LLaMA, caplog: pytest.LogCaptureFixture) -> None:
    """In the results and in the log."""
    contexts, continuations = [[3] * 200, [3] * 20, [3] * 140], [[4], [5], [6]]
    with caplog.at_level(logging.WARNING, "llama"):
        cut = on_fake.score(contexts, continuations, too_long="truncate")
        left = on_fake.score(contexts, continuations, too_long="skip")
    assert [each.truncated_tokens if each else None for each in cut] == [72, 0, 12]
    assert [each and each.index for each in left] == [None, 1, None]
    assert "Cut 2 of 3 contexts from the left" in caplog.text
    assert "Skipped 2 of 3 pairs" in caplog.text


def test_windows_are_disjoint_and_full() -> None:
    """Every token once, in order; the first window begins with the prefix, and each later one is as long as fits."""
    for length in range(40):
        for longest in (2, 3, 7, 40):
            ids = list(range(100, 100 + length))
            windows = list(rolling_windows(ids, 1, longest))
            assert [each for window in windows for each in window.continuation] == ids
            for number, (context, continuation, _) in enumerate(windows):
                assert len(context) + len(continuation) <= longest
                before = [1, *ids[: continuation[0] - 100]]
                assert context == tuple(before[-len(context) :])
                assert number == 0 or len(context) + len(continuation) == longest
            assert len(windows) == -(-length // (longest - 1))


def test_perplexity() -> None:
    """Of a token on average; a text without tokens has none to be surprised by."""
    assert RollingScore(0, -2.0, 2, 1).perplexity == pytest.approx(2.718281828)
    assert RollingScore(0, 0.0, 0, 0).perplexity == 1.0


# --- interrupts and consumers -----------------------------------------------------------------------------------------


def test_an_interrupt_loses_nothing_that_was_known(on_fake: LLaMA) -> None:
    """After each number of results: those come, the error says how many, and the next call runs."""
    contexts, continuations = [[3, n + 3] * 20 for n in range(9)], [[7, 8]] * 9
    whole = on_fake.score(contexts, continuations, prefix_cache=False)
    for count in range(9):
        found: list[Score] = []
        try:
            take(on_fake.score_each(contexts, continuations, prefix_cache=False), count, on_fake, found)
        except InterruptedRunError as error:
            assert str(error) == f"interrupted after {len(found)} of 9 continuations"  # noqa: PT017
        else:  # too late to end anything: the next call would be interrupted
            assert len(found) == 9
            assert on_fake.take_interrupt()
        assert len(found) >= count
        assert all(each == whole[each.index] for each in found)
    assert on_fake.score(contexts, continuations, prefix_cache=False) == whole


def take(scores: Iterator[Score], count: int, llm: LLaMA, found: list[Score]) -> None:
    """Take results, and interrupt after so many."""
    if not count:
        llm.interrupt()
    for each in scores:
        found.append(each)
        if len(found) == count:
            llm.interrupt()


def test_a_consumer_that_stops_listening(on_fake: LLaMA) -> None:
    """Its other pairs are cancelled, and the slots are free."""
    contexts, continuations = [[3, n + 3] * 20 for n in range(9)], [[7, 8]] * 9
    scores = on_fake.score_each(contexts, continuations)
    next(scores)
    scores.close()  # type: ignore[attr-defined]
    expected_scores = on_fake.score(contexts, continuations)
    assert all(expected_scores)
    assert not on_fake.engine.has_work
