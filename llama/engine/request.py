"""One row's request, and a batch's requests as host tensors: the controls that every step reads, and those that some
do.

Shapes: B batch rows, V vocabulary, W = ceil(V / 32) words of 32 bits each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from llama.sampling_params import MAX_BIASED_IDS, SamplingParams

MAX_STOP_IDS = 16  # a row; more would widen a tensor of every program
MAX_BAD_WORDS = 64  # a row, of two tokens and more
MAX_BAD_WORD_LEN = 16  # tokens


Kinds = tuple[bool, bool, bool]  # log-probabilities, hidden states, logits


class Constraint(Protocol):
    """A grammar that follows one row's generation."""

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Which tokens may come next: [W] int32 words of bits, the lowest bit first."""
        ...

    def advance(self, token_ids: Sequence[int]) -> None:
        """Follow what was chosen."""
        ...


@dataclass(frozen=True)
class Request:
    """One row of a batch.

    Attributes:
        prompt_ids: at least one token id.
        params: what is wanted; ``seed`` settled, and prompt plus ``max_gen_len`` within ``max_seq_len``.
        stop_ids: ids that end the row; they are not part of its tokens.
        bad_words: token sequences that are never completed.
        constraint: what may come next, or None for everything.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    constraint: Constraint | None = None

    @property
    def limit(self) -> int:
        """The row's length, prompt included, at which it ends."""
        return len(self.prompt_ids) + self.params.max_gen_len

    @property
    def kinds(self) -> Kinds:
        """What must be known of each token: what the caller asks for, and log-probabilities where the best samples are
        to be found.
        """
        return self.params.logprobs is not None or self.params.is_ranked, self.params.hidden_states, self.params.logits

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Which tokens may come next as far as single tokens say it: [W] int32 words of bits.

        A grammar has the last word: where it allows bad words only, they are allowed.
        """
        if self.constraint is not None:
            allowed = self.constraint.allowed(vocab_size)
        elif self.params.allowed_token_ids is not None:
            allowed = bits_of(self.params.allowed_token_ids, vocab_size)
        else:
            allowed = np.full(-(-vocab_size // 32), -1, dtype=np.int32)
        banned = [word[0] for word in self.bad_words if len(word) == 1]
        if not banned:  # the usual case, at every step of a batch that follows a grammar
            return allowed
        rest = allowed & ~bits_of(banned, vocab_size)
        return rest if rest.any() else allowed


def bits_of(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """A set of token ids as [W] int32 words of bits, the lowest bit first."""
    member = np.zeros(-(-vocab_size // 32) * 32, dtype=bool)
    member[list(token_ids)] = True
    return np.packbits(member, bitorder="little").view(np.int32)


class Controls(NamedTuple):
    """What each row's request asks for; unchanged through a batch.

    Attributes:
        temperature, top_k, top_p, min_p: [B], see ``sampling.Filters``.
        seed: [B, 2] int32, low and high word.
        limit: [B] int32, the length at which the row ends.
        stop_ids: [B, n] int32, the tokens that end the row; -1 fills up.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    limit: torch.Tensor
    stop_ids: torch.Tensor


class Shaping(NamedTuple):
    """What the rows ask of the logits besides; ``allowed`` changes from step to step where a grammar says what may
    come.

    Attributes:
        typical_p: [B] float32, see ``sampling.Filters``.
        repetition, presence, frequency: [B] float32, see ``shaping.penalised``.
        prompt_len: [B] int32, where the output begins.
        first_stop: [B] int32, the length from which on a stop token may be chosen.
        bias_ids, bias: [B, 300] int32 and float32, added to these tokens' logits; zeros fill up.
        bad_words: [B, n, m] int32, token sequences at the end of each line; -1 before them, and in all of an unused
            line.
        in_prompt: [B, W] int32, bits of the tokens in the prompt.
        allowed: [B, W] int32, bits of the tokens that may come next.
    """

    typical_p: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    prompt_len: torch.Tensor
    first_stop: torch.Tensor
    bias_ids: torch.Tensor
    bias: torch.Tensor
    bad_words: torch.Tensor
    in_prompt: torch.Tensor
    allowed: torch.Tensor


def controls_of(requests: Sequence[Request], rows: int) -> Controls:
    """The requests' controls as host tensors of ``rows`` rows; the rows behind them are greedy and end at once."""
    seed = torch.zeros(rows, 2, dtype=torch.int32)
    stop_ids = torch.full((rows, MAX_STOP_IDS), -1, dtype=torch.int32)
    for i, request in enumerate(requests):
        seed[i] = _seed_words(request.params.seed or 0)
        stop_ids[i, : len(request.stop_ids)] = torch.tensor(request.stop_ids, dtype=torch.int32)
    wishes = [request.params for request in requests]
    return Controls(
        temperature=_column([p.temperature for p in wishes], rows, 0.0),
        top_k=_column([p.top_k for p in wishes], rows, 0),
        top_p=_column([p.top_p for p in wishes], rows, 1.0),
        min_p=_column([p.min_p for p in wishes], rows, 0.0),
        seed=seed,
        limit=_column([r.limit for r in requests], rows, 1),
        stop_ids=stop_ids,
    )


def shaping_of(requests: Sequence[Request], rows: int, vocab_size: int) -> Shaping:
    """What the requests ask of the logits, as host tensors of ``rows`` rows; the rows behind them ask nothing."""
    bias_ids = torch.zeros(rows, MAX_BIASED_IDS, dtype=torch.int32)
    bias = torch.zeros(rows, MAX_BIASED_IDS)
    bad_words = torch.full((rows, MAX_BAD_WORDS, MAX_BAD_WORD_LEN), -1, dtype=torch.int32)
    in_prompt = torch.zeros(rows, -(-vocab_size // 32), dtype=torch.int32)
    for i, request in enumerate(requests):
        biased = request.params.logit_bias or {}
        bias_ids[i, : len(biased)] = torch.tensor(list(biased), dtype=torch.int32)
        bias[i, : len(biased)] = torch.tensor(list(biased.values()), dtype=torch.float32)
        for line, word in enumerate(word for word in request.bad_words if len(word) > 1):
            bad_words[i, line, -len(word) :] = torch.tensor(word, dtype=torch.int32)
        in_prompt[i] = torch.from_numpy(bits_of(request.prompt_ids, vocab_size))
    wishes = [request.params for request in requests]
    return Shaping(
        typical_p=_column([p.typical_p for p in wishes], rows, 1.0),
        repetition=_column([p.repetition_penalty for p in wishes], rows, 1.0),
        presence=_column([p.presence_penalty for p in wishes], rows, 0.0),
        frequency=_column([p.frequency_penalty for p in wishes], rows, 0.0),
        prompt_len=_column([len(r.prompt_ids) for r in requests], rows, 1),
        first_stop=_column([len(r.prompt_ids) + r.params.min_tokens for r in requests], rows, 0),
        bias_ids=bias_ids,
        bias=bias,
        bad_words=bad_words,
        in_prompt=in_prompt,
        allowed=allowed_of(requests, rows, vocab_size),
    )


def allowed_of(requests: Sequence[Request | None], rows: int, vocab_size: int) -> torch.Tensor:
    """``Shaping.allowed`` for the rows' next step; a row of None may take every token."""
    allowed = np.full((rows, -(-vocab_size // 32)), -1, dtype=np.int32)
    for i, request in enumerate(requests):
        if request is not None:
            allowed[i] = request.allowed(vocab_size)
    return torch.from_numpy(allowed)


def _column(values: Sequence[float], rows: int, otherwise: float) -> torch.Tensor:
    """One value a row: [rows] float32, or int32 where ``otherwise`` is a whole number."""
    dtype = torch.int32 if isinstance(otherwise, int) else torch.float32
    return torch.tensor([*values, *[otherwise] * (rows - len(values))], dtype=dtype)


def _seed_words(seed: int) -> torch.Tensor:
    """A 63-bit seed as two int32 words, low first."""
    return torch.tensor([seed & 0xFFFFFFFF, seed >> 32], dtype=torch.int64).to(torch.int32)
