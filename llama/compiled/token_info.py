"""What is known about a token: its log-probability, its rank, and the likeliest ones beside it.

OpenAI's semantics: the log-softmax of the raw logits, before temperature, penalties, bias and filters, so that a
log-probability says what the model holds of a token and not how it was drawn. ``describe`` runs inside the compiled
programs that were asked for it; ``TokenLogprob`` is what the host makes of its numbers.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from llama.sampling_params import MAX_LOGPROBS
from llama.tokenizer import Tokenizer

WIDTH = 2 + 2 * MAX_LOGPROBS  # numbers that describe a position: see ``describe``
LEAST = -9999.0  # what JSON says for -inf, which it has no number for (as OpenAI and vLLM)


def describe(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What is known of one token at each position.

    Args:
        logits: [N, V] float32, raw.
        ids: [N] int32, the token.

    Returns:
        [N, WIDTH] float32: the token's log-probability; its rank, 1 and as many as are likelier; the log-probabilities
        of the likeliest tokens, in order, the lowest id first among equals; and their ids, which float32 holds exactly
        up to 2**24. A vocabulary of fewer tokens than MAX_LOGPROBS is filled up with -inf and id 0.
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(1, ids.long().unsqueeze(-1))  # [N, 1]
    rank = 1.0 + (logits > own).float().sum(dim=-1, keepdim=True)
    count = min(MAX_LOGPROBS, logits.shape[-1])
    best, best_ids = logits.topk(count, dim=-1)
    missing = (0, MAX_LOGPROBS - count)
    top, top_ids = F.pad(best - total, missing, value=float("-inf")), F.pad(best_ids.float(), missing)
    return torch.cat((own - total, rank, top, top_ids), dim=-1)


@dataclass(frozen=True)
class TopLogprob:
    """One of the likeliest tokens at a position; the fields are those of ``TokenLogprob``."""

    token_id: int
    token: str
    bytes: tuple[int, ...]
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(TopLogprob):
    """What is known of a token that was chosen, or that stands in a prompt.

    Attributes:
        token_id: its id.
        token: its text; U+FFFD where it holds only part of a character.
        bytes: its text as UTF-8 bytes, which joined over tokens are always whole.
        logprob: natural logarithm of its probability.
        rank: 1 for the likeliest token of the vocabulary, 2 for the next.
        top: the likeliest tokens, as many as were asked for, likeliest first.
    """

    rank: int
    top: tuple[TopLogprob, ...]

    def as_json(self) -> dict[str, Any]:
        """In the shape of OpenAI's chat completions, with the id and the rank."""
        return {**_json(self), "rank": self.rank, "top_logprobs": [_json(each) for each in self.top]}


def _json(each: TopLogprob) -> dict[str, Any]:
    return {"id": each.token_id, "token": each.token, "bytes": list(each.bytes), "logprob": finite(each.logprob)}


def finite(logprob: float) -> float:
    """A log-probability as JSON can say it."""
    return max(round(logprob, 6), LEAST) if logprob > -np.inf else LEAST


def read(described: np.ndarray, token_ids: Sequence[int], top: int, tokenizer: Tokenizer) -> list[TokenLogprob]:
    """Tokens with what ``describe`` found of them.

    Args:
        described: [n, WIDTH] float32.
        token_ids: n ids.
        top: how many of the likeliest are wanted, up to MAX_LOGPROBS.
        tokenizer: what ids mean.
    """
    found = []
    for token_id, numbers in zip(token_ids, described.tolist(), strict=True):
        likeliest, ids = numbers[2 : 2 + MAX_LOGPROBS], numbers[2 + MAX_LOGPROBS :]
        alternatives = [
            _named(int(i), value, tokenizer)
            for i, value in zip(ids[:top], likeliest[:top], strict=True)
            if value > -np.inf
        ]
        own = _named(token_id, numbers[0], tokenizer)
        found.append(
            TokenLogprob(own.token_id, own.token, own.bytes, own.logprob, int(numbers[1]), tuple(alternatives))
        )
    return found


def _named(token_id: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    return TopLogprob(token_id, data.decode(errors="replace"), tuple(data), logprob)
