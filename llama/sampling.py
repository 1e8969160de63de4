"""Choosing the next token inside the compiled step, row by row, from per-row parameter tensors.

A temperature of 0 is a row's value and not another program, so greedy and sampled rows mix. Two decisions keep the step static
and cheap:

- **No sort of the vocabulary.** The nucleus of top-p is the set of tokens whose weight is at least a threshold. Positive floats
  order like their bit patterns read as integers, so the threshold is built exactly, bit by bit, in 30 sums.
- **A counter-based generator.** The noise of a token is a pure function of (seed, position, token id): Threefry-2x32-20 (Salmon
  et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). No state is carried, so the same seed draws the same text in any
  row of any batch. The token is the winner of an exponential race, argmax(log w - log E) with E ~ Exp(1), which is an exact draw.

Shapes: B batch rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llama import ops

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
SMALLEST = 1e-30  # temperatures below are computed as this one: float32 cannot divide by much less
_ONE_BITS = 0x3F800000  # the bit pattern of 1.0: no weight is above it
_LANES = 64  # partial reductions run side by side: XLA:CPU vectorises one over the slow axis, not over the fast one


def choose(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, seed: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """The next token of each row.

    Args:
        logits: [B, V] float32.
        temperature: [B] float32, 0 for the likeliest token (the lowest id among equals).
        top_p: [B] float32 in (0, 1], applied after the temperature.
        seed: [B, 2] int32, low and high word of the row's seed.
        position: [B] int32, the position that the token will take in its sequence: the generator's counter.

    Returns:
        [B] int32 token ids.
    """
    greedy = (temperature == 0).unsqueeze(-1)
    behind = logits - logits.amax(dim=-1, keepdim=True)  # subtracted first: a tiny temperature would make infinities of large logits
    scaled = behind / torch.where(greedy, 1.0, temperature.clamp(min=SMALLEST).unsqueeze(-1))
    kept = top_p_mask(scaled.exp(), top_p)
    noisy = torch.where(kept, scaled - exponential_noise(seed, position, logits.shape[-1]).log(), float("-inf"))
    return argmax(torch.where(greedy, logits, noisy))


def top_p_mask(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Which tokens belong to the nucleus: the smallest set of the heaviest tokens that holds a share ``top_p`` of the weight.

    Args:
        weights: [B, V] float32 in [0, 1], proportional to the probabilities, the heaviest exactly 1.
        top_p: [B] float32 in (0, 1].

    Returns:
        [B, V] bool. Tokens of equal weight are kept or left together.
    """
    bits = ops.float_bits(weights)
    wanted = top_p * _sum(weights)
    threshold = torch.zeros_like(wanted, dtype=torch.int32)
    for bit in reversed(range(_ONE_BITS.bit_length())):
        candidate = threshold + (1 << bit)
        held = _sum(torch.where(bits >= candidate.unsqueeze(-1), weights, 0.0))
        threshold = torch.where(held >= wanted, candidate, threshold)
    threshold = threshold.clamp(max=_ONE_BITS)  # a share that rounds to nothing still keeps the heaviest
    return bits >= threshold.unsqueeze(-1)


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """The index of each row's largest score, the lowest among equals: [B, V] float32 to [B] int32.

    Two reductions, the largest score and the first index that holds it: torch.argmax compiles to one scalar loop into which XLA
    fuses whatever makes the scores, at up to seven times the time (docs/log.md).
    """
    vocab_size = scores.shape[-1]
    best = _lanes(scores, float("-inf")).amax(dim=1).amax(dim=-1, keepdim=True)
    ids = torch.arange(vocab_size, dtype=torch.int32, device=scores.device)
    candidates = torch.where(scores == best, ids, vocab_size - 1)
    return _lanes(candidates, vocab_size).amin(dim=1).amin(dim=-1)


def _sum(weights: torch.Tensor) -> torch.Tensor:
    """Sum over the vocabulary: [B, V] to [B]."""
    return _lanes(weights, 0.0).sum(dim=1).sum(dim=-1)


def _lanes(x: torch.Tensor, fill: float) -> torch.Tensor:
    """Fold [B, V] into [B, V / lanes, lanes], padded with ``fill``, for a reduction over the slow axis first."""
    padded = F.pad(x, (0, -x.shape[-1] % _LANES), value=fill)
    return padded.view(x.shape[0], -1, _LANES)


def exponential_noise(seed: torch.Tensor, position: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Independent Exp(1) variables, [B, V] float32 and above 0, for each row's seed [B, 2] and position [B] (int32)."""
    ids = torch.arange(vocab_size, dtype=torch.int32, device=seed.device).unsqueeze(0)
    bits, _ = threefry_2x32((seed[:, :1], seed[:, 1:]), (ids, position.unsqueeze(-1)))
    unsigned = bits.float() + torch.where(bits < 0, 2.0**32, 0.0)
    uniform = (unsigned + 0.5) * 2.0**-32  # near 0, where races are won, as fine as float32 can say
    uniform = uniform.clamp(max=1.0 - 2.0**-24)  # the largest words round to 1, whose noise would be infinite
    return -torch.log1p(-uniform)


def threefry_2x32(key: tuple[torch.Tensor, torch.Tensor], counter: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Threefry-2x32 with 20 rounds: 64 random bits for a 64-bit key and a 64-bit counter, each as two int32 tensors that broadcast."""
    words = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x0, x1 = counter[0] + words[0], counter[1] + words[1]
    for block in range(5):
        for distance in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = ops.rotate_left(x1, distance) ^ x0
        x0 = x0 + words[(block + 1) % 3]
        x1 = x1 + words[(block + 2) % 3] + (block + 1)
    return x0, x1
