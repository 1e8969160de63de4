"""What is known about a token: its log-probability, its rank, and the likeliest ones beside it.

OpenAI's semantics: the log-softmax of the raw logits, before temperature, penalties, bias and filters, so that a
log-probability says what the model holds of a token and not how it was drawn. ``describe`` runs inside the compiled
programs that were asked for it; ``TokenLogprob`` is what the host makes of its numbers.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llama.sampling_params import MAX_LOGPROBS

WIDTH = 2 + 2 * MAX_LOGPROBS  # numbers that describe a position: see ``describe``


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
