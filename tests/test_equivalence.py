"""Same text, whatever the route: chunk plans, batches, row orders, streams, passes, and what a batch does beyond its
rows' ends.
"""

from __future__ import annotations

import random

import pytest
from conftest import TINY, LLMFactory

from llama import Generation, LLaMA, SamplingParams
from llama.config import MAX_STOP_IDS
from llama.xla.counters import counters

pytestmark = pytest.mark.slow

PROMPTS = [
    "Once upon a time",
    "the dog ran home and the cat sang to the green house once upon a time there was",
    "",
    "x",
    "A house, a cat & 12 dogs: caf\u00e9 \U0001f600",
]
BUCKET_SETS = [(64, 8, 1), (32, 4, 1), (16, 1), (128, 7, 1), (1,)]


def ids(results: list[Generation]) -> list[list[int]]:
    return [r.token_ids for r in results]


def assert_any_order(llm: LLaMA, params: list[SamplingParams], expected: list[list[int]]) -> None:
    """The prompts, each with its parameters, give the expected token ids in three random orders."""
    order = list(range(len(PROMPTS)))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        found = ids(llm.generate([PROMPTS[i] for i in order], params=[params[i] for i in order]))
        assert found == [expected[i] for i in order]


@pytest.fixture(scope="module")
def greedy_alone(make_llm: LLMFactory) -> list[list[int]]:
    """Each prompt alone, one row, default buckets, temperature 0: what every other route must reproduce."""
    llm = make_llm()
    found = [llm.generate([p], max_gen_len=30, temperature=0)[0].token_ids for p in PROMPTS]
    assert len({tuple(f) for f in found}) == len(PROMPTS), (
        "the prompts must lead to different texts, or nothing is compared"
    )
    return found


@pytest.mark.parametrize("policy", ["greedy", "pad"])
@pytest.mark.parametrize("buckets", BUCKET_SETS)
def test_every_chunk_plan_gives_the_same_text(
    make_llm: LLMFactory, greedy_alone: list[list[int]], buckets: tuple[int, ...], policy: str
) -> None:
    """Bucket sets and policies, five ragged prompts in one batch."""
    llm = make_llm(buckets=buckets, bucket_policy=policy, max_batch_size=5)
    assert ids(llm.generate(PROMPTS, max_gen_len=30, temperature=0)) == greedy_alone


def test_every_key_bucket_gives_the_same_text(make_llm: LLMFactory, greedy_alone: list[list[int]]) -> None:
    """Programs that read 16, 32, 64 or all 128 positions of the cache follow each other within one text."""
    llm = make_llm(key_buckets=(16, 32, 64), max_batch_size=2)
    assert ids(llm.generate(PROMPTS, max_gen_len=30, temperature=0)) == greedy_alone


@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 8])
def test_every_batch_size_and_row_order_gives_the_same_text(
    make_llm: LLMFactory, greedy_alone: list[list[int]], max_batch_size: int
) -> None:
    """More prompts than rows run in several batches, fewer leave rows empty, and nobody's text depends on its
    neighbours.
    """
    llm = make_llm(max_batch_size=max_batch_size)
    assert_any_order(llm, [SamplingParams(30, 0.0)] * len(PROMPTS), greedy_alone)


def test_a_second_pass_gives_the_same_text(make_llm: LLMFactory, greedy_alone: list[list[int]]) -> None:
    """What the first pass left in the cache is never read by the second, also where the second is shorter."""
    llm = make_llm(max_batch_size=2)
    llm.generate([PROMPTS[1] * 2, PROMPTS[4]], max_gen_len=20, temperature=0)
    assert ids(llm.generate(PROMPTS, max_gen_len=30, temperature=0)) == greedy_alone


@pytest.mark.parametrize("read_every", [1, 3, 16])
def test_late_reading_loses_nothing(make_llm: LLMFactory, greedy_alone: list[list[int]], read_every: int) -> None:
    """However rarely the host reads, every token arrives, once."""
    llm = make_llm(read_every=read_every, max_batch_size=2)
    for max_gen_len in (1, 2, 3, 16, 17, 30):
        found = ids(llm.generate(PROMPTS, max_gen_len=max_gen_len, temperature=0))
        assert found == [alone[:max_gen_len] for alone in greedy_alone]


def test_seeded_sampling_depends_on_prompt_parameters_and_seed_only(make_llm: LLMFactory) -> None:
    """The same request alone, in any row of a batch of five, and beside other temperatures, gives the same text."""
    wishes = [
        SamplingParams(25, t, p, seed)
        for t, p, seed in [(1.0, 1.0, 7), (0.8, 0.9, 7), (0.0, 1.0, 1), (1.3, 0.5, 2**40 + 5), (0.6, 0.95, 0)]
    ]
    alone = [make_llm().generate([p], params=[w])[0].token_ids for p, w in zip(PROMPTS, wishes, strict=True)]
    order = [3, 0, 4, 2, 1]
    mixed = make_llm(max_batch_size=5).generate([PROMPTS[i] for i in order], params=[wishes[i] for i in order])
    assert ids(mixed) == [alone[i] for i in order]


def test_seeds_matter_and_a_missing_one_is_reported(make_llm: LLMFactory) -> None:
    """Two seeds give two texts; without one a new seed is drawn, and repeating it repeats the text."""
    llm = make_llm()
    first, second = (llm.generate(["x"], 25, 1.0, 1.0, seed)[0] for seed in (1, 2))
    assert first.token_ids != second.token_ids
    drawn = [llm.generate(["x"], 25, 1.0, 1.0)[0] for _ in range(2)]
    assert drawn[0].seed != drawn[1].seed
    assert llm.generate(["x"], 25, 1.0, 1.0, drawn[0].seed)[0].token_ids == drawn[0].token_ids
    high = llm.generate(["x"], 25, 1.0, 1.0, 1 + 2**32)[0]
    assert high.token_ids != first.token_ids, "the upper word of a seed must count"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_joined_is_the_whole_text(make_llm: LLMFactory, prompt: str) -> None:
    """Random weights give byte tokens in any order, so that broken and split UTF-8 is met."""
    llm = make_llm()
    pieces = list(llm.stream(prompt, 40, 1.0, 1.0, seed=3))
    whole = llm.generate([prompt], 40, 1.0, 1.0, seed=3)[0]
    assert "".join(pieces) == whole.generation
    assert len(pieces) > 1
    text = llm.tokenizer.decode([*llm.tokenizer.encode(prompt), *whole.token_ids])
    assert text == prompt + whole.generation


def test_a_stop_token_ends_its_row_and_is_not_part_of_it(make_llm: LLMFactory, greedy_alone: list[list[int]]) -> None:
    """A row that meets a stop token is cut before it, says so, and leaves its batch mates alone."""
    llm = make_llm(max_batch_size=5)
    stop = greedy_alone[1][7]
    before = llm.tokenizer.stop_ids
    llm.tokenizer.stop_ids = (stop,)
    try:
        results = llm.generate(PROMPTS, max_gen_len=30, temperature=0)
    finally:
        llm.tokenizer.stop_ids = before
    for result, alone in zip(results, greedy_alone, strict=True):
        cut = alone[: alone.index(stop)] if stop in alone else alone
        assert result.token_ids == cut
        assert result.finish_reason == ("stop" if stop in alone else "length")
    assert results[1].finish_reason == "stop"


def test_nothing_is_computed_after_all_rows_have_ended(make_llm: LLMFactory, greedy_alone: list[list[int]]) -> None:
    """To a length limit: not one step too many. After a stop token: at most read_every steps and the one in flight."""
    llm = make_llm(read_every=4)
    runs = counters.runs
    result = llm.generate([PROMPTS[3]], max_gen_len=30, temperature=0)[0]
    chunks = len(llm.tokenizer.encode(PROMPTS[3]))
    assert counters.runs - runs == result.programs.runs == chunks + 29
    stop = greedy_alone[3][0]
    before = llm.tokenizer.stop_ids
    llm.tokenizer.stop_ids = (stop,)
    try:
        stopped = llm.generate([PROMPTS[3]], max_gen_len=30, temperature=0)[0]
    finally:
        llm.tokenizer.stop_ids = before
    assert stopped.token_ids == []
    assert stopped.programs.runs <= chunks + 5


def test_the_host_reads_packed(make_llm: LLMFactory) -> None:
    """One transfer for the first token, then one for read_every steps; nothing is sent to the device on the way."""
    llm = make_llm(read_every=8)
    llm.generate(["x"], max_gen_len=65, temperature=0)
    fetches, uploads = counters.fetches, counters.uploads
    stream = llm.stream("x", max_gen_len=65, temperature=0)
    next(stream)
    assert counters.fetches - fetches <= 2  # more than one only where the first token is half a character
    sent = counters.uploads
    assert sum(1 for _ in stream) > 0
    assert counters.uploads == sent > uploads
    assert counters.fetches - fetches == 1 + 64 // 8


def test_interrupt_keeps_what_was_generated(make_llm: LLMFactory, greedy_alone: list[list[int]]) -> None:
    """The running batch ends after its step, the batches behind it before their first one; all say why, and the engine
    lives on.
    """
    llm = make_llm(read_every=1)
    results = {}
    for piece in llm.pieces(PROMPTS, [SamplingParams(30, 0)] * len(PROMPTS)):
        if piece.index == 1 and piece.text:
            llm.interrupt()
        if piece.result is not None:
            results[piece.index] = piece.result
    reasons = [results[i].finish_reason for i in range(len(PROMPTS))]
    assert reasons == ["length", "interrupted", "interrupted", "interrupted", "interrupted"]
    assert 0 < len(results[1].token_ids) < 30
    assert results[1].token_ids == greedy_alone[1][: len(results[1].token_ids)]
    assert results[2].token_ids == []
    assert ids(llm.generate(PROMPTS, max_gen_len=30, temperature=0)) == greedy_alone


def test_an_abandoned_stream_leaves_the_engine_whole(make_llm: LLMFactory, greedy_alone: list[list[int]]) -> None:
    """A caller that stops listening half-way does not spoil the next call."""
    llm = make_llm(read_every=1)
    stream = llm.stream(PROMPTS[1], 30, 0.0)
    next(stream)
    stream.close()
    assert ids(llm.generate(PROMPTS, max_gen_len=30, temperature=0)) == greedy_alone


def test_an_exception_in_the_caller_leaves_the_engine_whole(
    make_llm: LLMFactory, greedy_alone: list[list[int]]
) -> None:
    """The same for an error raised while pieces are consumed."""
    llm = make_llm(read_every=1)

    def consume() -> None:
        for piece in llm.pieces([PROMPTS[1]], [SamplingParams(30, 0)]):
            if piece.text:
                raise KeyError

    with pytest.raises(KeyError):
        consume()
    assert ids(llm.generate(PROMPTS, max_gen_len=30, temperature=0)) == greedy_alone


def test_bfloat16_weights_are_close_to_float32(make_llm: LLMFactory) -> None:
    """bfloat16 storage takes half the bytes, and greedy text agrees at least at its beginning."""
    wide, narrow = make_llm(), make_llm(dtype="bfloat16")
    size = {
        llm: sum(p.numel() * p.element_size() for p in llm.engine.runner.model.parameters()) for llm in (wide, narrow)
    }
    assert size[narrow] * 2 == size[wide]
    a, b = (llm.generate(PROMPTS, max_gen_len=4, temperature=0) for llm in (wide, narrow))
    assert sum(x.token_ids[0] == y.token_ids[0] for x, y in zip(a, b, strict=True)) >= 4


def test_stop_ids_fit_their_tensor(make_llm: LLMFactory) -> None:
    """The engine's tensor of stop tokens holds what the tokenizer has."""
    assert len(make_llm().tokenizer.stop_ids) <= MAX_STOP_IDS
    assert TINY.vocab_size >= make_llm().tokenizer.n_words
