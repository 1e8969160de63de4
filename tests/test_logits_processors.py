"""What requests do to the logits, on the host and on the XLA device, against plain NumPy and transformers' logits
processors.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_sampling import on_device

from llama import SamplingParams
from llama.compiled import logits_processors
from llama.compiled.state import logits_controls
from llama.config import MAX_STOP_IDS
from llama.engine.runner import packed_logits_controls
from llama.engine.sequence import Sequence

VOCAB, POSITIONS = 331, 40
INF = float("inf")
PLAIN = SamplingParams(10)


def shaped(*tensors: torch.Tensor) -> torch.Tensor:
    logits, stop_ids, tokens, length, packed = tensors
    return logits_processors.process_logits(logits, logits_controls(VOCAB).unpack(packed), stop_ids, tokens, length)


def packed_rows(requests: list[Sequence]) -> torch.Tensor:
    return torch.from_numpy(np.stack([packed_logits_controls(request, VOCAB) for request in requests]))


def run(requests: list[Sequence], outputs: list[list[int]], logits: np.ndarray) -> np.ndarray:
    """The device's logits after ``outputs`` have been generated; on the host the same, but for multiply-adds that round
    once less.
    """
    rows = len(requests)
    tokens = torch.full((rows, POSITIONS), 7, dtype=torch.int32)  # what stands beyond a row's length must not count
    stop_ids = torch.full((rows, MAX_STOP_IDS), -1, dtype=torch.int32)
    length = torch.zeros(rows, dtype=torch.int32)
    for i, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        ids = [*request.prompt_ids, *output]
        tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        stop_ids[i, : len(request.stop_ids)] = torch.tensor(request.stop_ids, dtype=torch.int32)
        length[i] = len(ids)
    args = torch.from_numpy(logits), stop_ids, tokens, length, packed_rows(requests)
    (found,) = on_device(shaped, *args)
    torch.testing.assert_close(shaped(*args), found, rtol=1e-6, atol=1e-6)
    return found.numpy()


def random_logits(rows: int, seed: int) -> np.ndarray:
    """Of both signs, a tenth of them -inf, and some exactly 0."""
    generator = np.random.default_rng(seed)
    logits = (generator.normal(size=(rows, VOCAB)) * 4).astype(np.float32)
    logits[generator.random(logits.shape) < 0.1] = -INF
    logits[generator.random(logits.shape) < 0.05] = 0
    return logits


def random_ids(generator: np.random.Generator, most: int, few: int = 12) -> list[int]:
    """Ids of which many repeat."""
    return generator.integers(0, few, generator.integers(1, most)).tolist()


def test_a_row_that_asks_nothing_is_unchanged() -> None:
    """Bit for bit, beside rows that ask for much: the defaults change nothing."""
    logits = random_logits(2, seed=1)
    wild = replace(
        PLAIN,
        repetition_penalty=2,
        presence_penalty=1,
        frequency_penalty=1,
        logit_bias={3: 9},
        allowed_token_ids=(1, 2, 3),
    )
    found = run([Sequence((1, 2, 3), PLAIN, (2,)), Sequence((1, 2, 3), wild, (2,))], [[5, 5], [5, 5]], logits)
    assert np.array_equal(found[0], logits[0])
    assert not np.array_equal(found[1], logits[1])


def test_penalties_and_bias_equal_numpy() -> None:
    """64 rows of everything at once: penalties count prompt and output as the field does, bias comes before them, bans
    last.
    """
    generator = np.random.default_rng(2)
    logits = random_logits(64, seed=2)
    requests, outputs, expected = [], [], logits.astype(np.float64)
    for i in range(64):
        prompt, output = random_ids(generator, 20), random_ids(generator, 15, 25)
        bias = {
            int(k): float(np.float32(v))
            for k, v in zip(generator.integers(0, VOCAB, 5), generator.uniform(-9, 9, 5), strict=True)
        }
        repetition, presence, frequency = (
            float(np.float32(x)) for x in (generator.uniform(0.5, 2), *generator.uniform(-2, 2, 2))
        )
        params = replace(
            PLAIN,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            logit_bias=bias,
            min_tokens=8,
        )
        requests.append(Sequence(tuple(prompt), params, (30, 31)))
        outputs.append(output)
        row = expected[i]
        for token, value in bias.items():
            row[token] += value
        for token in {*prompt, *output}:
            row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
        for token in set(output):
            row[token] -= presence + frequency * output.count(token)
        if len(output) < 8:
            row[[30, 31]] = -INF
    found = run(requests, outputs, logits)
    assert np.array_equal(np.isinf(found), np.isinf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=2e-6, atol=1e-5)


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(8, seed=3)
    for penalty in (0.7, 1.3, 5.0):
        prompt, output = [1, 2, 3, 3], [4, 4, 90]
        found = run([Sequence(tuple(prompt), replace(PLAIN, repetition_penalty=penalty))] * 8, [output] * 8, logits)
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        expected = processor(torch.tensor([prompt + output] * 8), torch.from_numpy(logits))
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_bias_is_that_of_transformers() -> None:
    from transformers import SequenceBiasLogitsProcessor

    bias = {5: -3.5, 9: 2.25, 300: 100.0}
    logits = random_logits(4, seed=4)
    found = run([Sequence((1,), replace(PLAIN, logit_bias=bias))] * 4, [[2]] * 4, logits)
    processor = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    assert np.array_equal(found, processor(torch.tensor([[1, 2]] * 4), torch.from_numpy(logits)).numpy())


def test_bad_words_are_those_of_transformers() -> None:
    """Single tokens always, sequences where what stands before the next token is their beginning, across prompt and
    output.
    """
    from transformers import NoBadWordsLogitsProcessor

    words = ((9,), (3, 4), (1, 2, 3), (5, 5), (2, 3, 3, 8), tuple(range(20, 36)))
    texts = [
        ([1, 2], [3]),
        ([3], [3]),
        ([5], [5]),
        ([2], [3, 3]),
        ([8, 1], [1, 2]),
        (list(range(20, 30)), list(range(30, 35))),
        ([3], [1]),
    ]
    logits = np.random.default_rng(5).normal(size=(len(texts), VOCAB)).astype(np.float32)
    requests = [Sequence(tuple(prompt), PLAIN, bad_words=words) for prompt, _ in texts]
    found = run(requests, [output for _, output in texts], logits)
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=None)
    for i, (prompt, output) in enumerate(texts):
        expected = processor(torch.tensor([prompt + output]), torch.from_numpy(logits[i : i + 1]))[0].numpy()
        assert np.array_equal(found[i], expected), i
    assert (np.isinf(found).sum(axis=1) > 1).sum() >= 5


def test_a_bad_word_longer_than_the_text_is_not_completed() -> None:
    found = run([Sequence((4,), PLAIN, bad_words=((1, 2, 3, 4, 5),))], [[]], np.zeros((1, VOCAB), np.float32))
    assert np.array_equal(found, np.zeros((1, VOCAB), np.float32))


@pytest.mark.parametrize(("generated", "banned"), [(0, True), (2, True), (3, False), (4, False)])
def test_min_tokens_bans_stop_tokens_at_first(generated: int, banned: bool) -> None:
    """transformers' MinNewTokensLengthLogitsProcessor bans them at the same steps."""
    from transformers import MinNewTokensLengthLogitsProcessor

    logits = np.random.default_rng(6).normal(size=(1, VOCAB)).astype(np.float32)
    found = run([Sequence((1, 1), replace(PLAIN, min_tokens=3), (2, 0))], [[5] * generated], logits)
    processor = MinNewTokensLengthLogitsProcessor(2, 3, [2, 0], device="cpu")
    expected = processor(torch.tensor([[1, 1] + [5] * generated]), torch.from_numpy(logits)).numpy()
    assert np.array_equal(found, expected)
    assert bool(np.isinf(found[0, [0, 2]]).all()) == banned


def test_allowed_ids_leave_nothing_else() -> None:
    """Every id by itself, so that every bit of every word is tried, and several at once."""
    logits = random_logits(VOCAB, seed=7)
    logits[np.isinf(logits)] = -1
    found = run([Sequence((1,), replace(PLAIN, allowed_token_ids=(i, 5))) for i in range(VOCAB)], [[]] * VOCAB, logits)
    for i in range(VOCAB):
        assert np.flatnonzero(np.isfinite(found[i])).tolist() == sorted({i, 5})
        assert found[i, i] == logits[i, i]


def test_where_nothing_is_left_what_is_allowed_comes_back() -> None:
    """Bans that exhaust what is allowed give way, so that a row never has to choose among impossible tokens."""
    params = replace(PLAIN, allowed_token_ids=(4, 6))
    found = run([Sequence((3,), params, bad_words=((3, 4), (3, 6)))], [[]], random_logits(1, seed=8))
    assert np.flatnonzero(found[0] > -INF).tolist() == [4, 6]


def test_a_bad_word_of_one_token_gives_way_only_to_a_grammar_that_has_no_other() -> None:
    """The mask of single tokens is made on the host: bad words are taken out of what is allowed, unless nothing would
    be left.
    """

    class Only:
        def allowed(self, vocab_size: int) -> np.ndarray:
            words = np.zeros(-(-vocab_size // 32), dtype=np.int32)
            words[0] = 0b1100
            return words

        def advance(self, token_ids: object) -> None: ...

    assert Sequence((1,), PLAIN, bad_words=((2,),), grammar=Only()).allowed(VOCAB)[0] == 0b1000
    assert Sequence((1,), PLAIN, bad_words=((2,), (3,)), grammar=Only()).allowed(VOCAB)[0] == 0b1100
