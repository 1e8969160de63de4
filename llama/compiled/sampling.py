"""Choosing the next token inside the compiled step, row by row, from per-row parameter tensors.

A temperature of 0 is a row's value and not another program, so greedy and sampled rows mix, and a control that a row
does not use has the value that changes nothing. Two decisions keep the step static and cheap:

- **No sort of the vocabulary.** top-k, top-p and typical-p each keep the first tokens of an order until they hold a
  share of something. Floats that are not negative order like their bit patterns read as integers, so the place where to
  cut is built exactly, bit by bit, in 31 sums (``ops.first_holding``), which are left out where no row asks for the
  filter.
- **A counter-based generator.** The noise of a token is a pure function of (seed, position, token id): Threefry-2x32-20
  (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). No state is carried, so the same seed draws the
  same text in any row of any batch. The token is the winner of an exponential race, argmax(w / E) with E ~ Exp(1),
  which is an exact draw.

The order is that of Hugging Face's generation: penalties, bias and bans (``shaping``), then temperature, top-k, top-p,
min-p and typical-p, each of what the ones before have left, with the probabilities renormalised. Equal tokens are kept
or left together.

Shapes: B batch rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama.xla import ops

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
SMALLEST = 1e-30  # temperatures and shares below are computed as this one: float32 cannot divide by much less
LARGEST = 2.0**127  # logits beyond are computed as this one
_ONE_BITS = 0x3F800000  # the bit pattern of 1.0: no weight is above it
INF = float("inf")


class Filters(NamedTuple):
    """How each row draws; a row of the values in brackets draws from all tokens.

    Attributes:
        temperature: [B] float32, 0 for the likeliest token (the lowest id among equals) whatever the others say.
        top_k: [B] int32, keep so many of the likeliest tokens (0).
        top_p: [B] float32 in (0, 1], keep the smallest set of the likeliest that holds this share of the probability
            (1).
        min_p: [B] float32 in [0, 1], keep what has at least this share of the likeliest token's probability (0).
        typical_p: [B] float32 in (0, 1], locally typical sampling (Meister et al. 2022): keep the smallest set of the
            tokens whose surprise is nearest to the entropy that holds this share (1). None where no row asks for it.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    typical_p: torch.Tensor | None = None


def choose(logits: torch.Tensor, filters: Filters, seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The next token of each row.

    Args:
        logits: [B, V] float32. A token of -inf is never chosen; where a row has no other, all are alike.
        filters: of each row.
        seed: [B, 2] int32, low and high word of the row's seed.
        position: [B] int32, the position that the token will take in its sequence: the generator's counter.

    Returns:
        [B] int32 token ids.
    """
    greedy = (filters.temperature == 0).unsqueeze(-1)
    finite = logits.clamp(-LARGEST, LARGEST)  # the difference of two infinities would be NaN
    best = finite.amax(dim=-1, keepdim=True)
    # subtracted first: a tiny temperature would make infinities of large logits
    distance = (best - finite) / torch.where(greedy, 1.0, filters.temperature.clamp(min=SMALLEST).unsqueeze(-1))
    distance = torch.where((logits > -INF) | (best == -LARGEST), distance, INF)
    drawn = filtered(distance, filters) / exponential_noise(seed, position, logits.shape[-1])
    return argmax(torch.where(greedy, logits, drawn))


def filtered(distance: torch.Tensor, filters: Filters) -> torch.Tensor:
    """What a row's filters leave of its tokens' weights.

    Args:
        distance: [B, V] float32, how far each token's logit, divided by the temperature, lies below the row's
            likeliest; at least 0.
        filters: of each row; those of a greedy row may be left out.

    Returns:
        [B, V] float32, proportional to the probabilities, 1 for the likeliest token and 0 for what is left out. The
        likeliest token stays, except for ``typical_p``, which may prefer others.
    """
    sampled = filters.temperature > 0
    weights = torch.where(top_k_mask(distance, filters.top_k, sampled), (-distance).exp(), 0.0)
    weights = torch.where(
        top_p_mask(weights, filters.top_p, sampled) & (weights >= filters.min_p.unsqueeze(-1)), weights, 0.0
    )
    if filters.typical_p is not None:
        weights = torch.where(typical_p_mask(distance, weights, filters.typical_p, sampled), weights, 0.0)
    return weights


def top_k_mask(distance: torch.Tensor, top_k: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """Which tokens are among the ``top_k`` [B] int32 nearest, [B, V] bool; 0 keeps all, and so does a row that is
    not ``sampled``.
    """
    return ops.first_holding(ops.float_bits(distance), torch.ones_like(distance), top_k.float(), sampled & (top_k > 0))


def top_p_mask(weights: torch.Tensor, top_p: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """Which tokens belong to the nucleus: the smallest set of the heaviest tokens that holds a share ``top_p`` of
    the weight.

    Args:
        weights: [B, V] float32 in [0, 1], proportional to the probabilities, the heaviest exactly 1.
        top_p: [B] float32 in (0, 1]; 1 keeps all.
        sampled: [B] bool; a row that is not keeps all.

    Returns:
        [B, V] bool. Tokens of equal weight are kept or left together.
    """
    wanted = top_p.clamp(min=SMALLEST) * _sum(weights)
    return ops.first_holding(_ONE_BITS - ops.float_bits(weights), weights, wanted, sampled & (top_p < 1))


def typical_p_mask(
    distance: torch.Tensor, weights: torch.Tensor, typical_p: torch.Tensor, sampled: torch.Tensor
) -> torch.Tensor:
    """Which tokens are typical: the smallest set of those whose surprise is nearest to the entropy that holds a
    share ``typical_p``.

    Args:
        distance, weights: as in ``filtered``; what weighs nothing is never typical.
        typical_p: [B] float32 in (0, 1]; 1 keeps all.
        sampled: [B] bool; a row that is not keeps all.

    Returns:
        [B, V] bool.
    """
    total = _sum(weights)
    surprise = distance + total.log().unsqueeze(-1)  # -log p
    entropy = _sum(torch.where(weights > 0, weights * surprise, 0.0)) / total
    unusual = torch.where(weights > 0, (surprise - entropy.unsqueeze(-1)).abs(), INF)
    wanted = typical_p.clamp(min=SMALLEST) * total
    return ops.first_holding(ops.float_bits(unusual), weights, wanted, sampled & (typical_p < 1))


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """The index of each row's largest score, the lowest among equals: [B, V] float32 to [B] int32.

    Two reductions, the largest score and the first index that holds it: torch.argmax compiles to one scalar loop into
    which XLA fuses whatever makes the scores, at up to seven times the time (docs/log.md).
    """
    vocab_size = scores.shape[-1]
    best = ops.in_lanes(scores, -INF).amax(dim=1).amax(dim=-1, keepdim=True)
    ids = torch.arange(vocab_size, dtype=torch.int32, device=scores.device)
    candidates = torch.where(scores == best, ids, vocab_size - 1)
    return ops.in_lanes(candidates, vocab_size).amin(dim=1).amin(dim=-1)


def _sum(weights: torch.Tensor) -> torch.Tensor:
    """Sum over the vocabulary: [B, V] to [B]."""
    return ops.in_lanes(weights, 0.0).sum(dim=1).sum(dim=-1)


def exponential_noise(seed: torch.Tensor, position: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Independent Exp(1) variables, [B, V] float32 and above 0, for each row's seed [B, 2] and position [B] (int32)."""
    ids = torch.arange(vocab_size, dtype=torch.int32, device=seed.device).unsqueeze(0)
    bits, _ = threefry_2x32((seed[:, :1], seed[:, 1:]), (ids, position.unsqueeze(-1)))
    unsigned = bits.float() + torch.where(bits < 0, 2.0**32, 0.0)
    uniform = (unsigned + 0.5) * 2.0**-32  # near 0, where races are won, as fine as float32 can say
    uniform = uniform.clamp(max=1.0 - 2.0**-24)  # the largest words round to 1, whose noise would be infinite
    return -torch.log1p(-uniform)


def threefry_2x32(
    key: tuple[torch.Tensor, torch.Tensor], counter: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Threefry-2x32 with 20 rounds: 64 random bits for a 64-bit key and a 64-bit counter, each as two int32 tensors
    that broadcast.
    """
    words = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x0, x1 = counter[0] + words[0], counter[1] + words[1]
    for block in range(5):
        for distance in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = ops.rotate_left(x1, distance) ^ x0
        x0 = x0 + words[(block + 1) % 3]
        x1 = x1 + words[(block + 2) % 3] + (block + 1)
    return x0, x1
