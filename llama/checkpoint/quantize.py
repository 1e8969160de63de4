"""Weight-only int8 and int4: integers times float32 scales, one scale for a row or for each group of numbers in it.

Symmetric and without calibration, so it can be computed while a checkpoint streams by; activations are not quantised.

    int8   a row of integers from -127 to 127 times one scale (LLM.int8()'s row-wise absmax, Dettmers et al. 2022,
           applied to weights); read from GGUF's Q8_0 also in groups of 32 with a scale each
    int4   groups of G integers from -8 to 7 times one scale, two in a byte: byte j of a group's G / 2 holds number j in
           its low half and number j + G / 2 in its high one, each with 8 added (the layout of GGUF's Q4_0, whose G is
           32). So a group's bytes become two runs of numbers by a mask and a shift.

A weight is (numbers, scale): numbers [out, in] int8, or [out, in / 2] uint8 for int4; scale [out], or [out, in / G].
"""

from __future__ import annotations

import torch

from llama.storage import GROUPS, WeightFormat, group_of

LARGEST = 127
ZERO = 8  # what a half of an int4 byte holds for zero
BLOCK = 2**20  # numbers scaled at a time, which bounds the temporary memory
INT4_BLOCK = 2**17  # likewise; what several passes read stays in a core's second cache
# Scales that are tried for a group, as parts of the one that makes its number of largest magnitude -8: smaller ones cut
# that number short and round the others more finely
TRIED = (1.0, 0.92, 0.85)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to int8.

    Args:
        weight: [out, in], floating point, finite.

    Returns:
        [out, in] int8, and the scales [out] float32: ``weight`` is about ``int8 * scale``, off by half a scale at most.
        A row of zeros has scale 1.
    """
    numbers = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0])
    rows = max(BLOCK // weight.shape[1], 1)
    for block, out, scale in zip(*(torch.split(t, rows) for t in (weight, numbers, scales)), strict=True):
        wide = block.float()
        largest = wide.abs().amax(dim=1)
        scale.copy_(torch.where(largest > 0, largest / LARGEST, 1.0))
        out.copy_((wide / scale.unsqueeze(1)).round_().clamp_(-LARGEST, LARGEST))
    return numbers, scales


def quantize_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to int4, each group with that scale of a few whose squared error is the least.

    Args:
        weight: [out, in], floating point, finite.
        group: G, which divides ``in``: 32, 64 or 128.

    Returns:
        [out, in / 2] uint8, and the scales [out, in / G] float32, which may be negative. A group of zeros has scale 1.
    """
    channels, width = weight.shape
    assert group in GROUPS
    assert width % group == 0
    packed = torch.empty(channels, width // 2, dtype=torch.uint8)
    scales = torch.empty(channels, width // group)
    rows = max(INT4_BLOCK // width, 1)
    for block, out, scale in zip(*(torch.split(t, rows) for t in (weight, packed, scales)), strict=True):
        numbers, found = _rounded(block.float().reshape(-1, group))
        scale.copy_(found.view(scale.shape))
        numbers.add_(ZERO)
        out.copy_(pack(numbers.to(torch.uint8).view(block.shape), group))
    return packed, scales


def _rounded(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [n, G] from -8 to 7, in float32, and scales [n, 1] of groups [n, G] float32.

    With the scale that fits some integers best, the squared error is (sum of w^2) - (sum of n w)^2 / (sum of n^2): the
    integers with the largest second term win.
    """
    least, greatest = groups.aminmax(dim=1, keepdim=True)
    first = torch.where(greatest > -least, greatest, least) / -ZERO  # of the extreme, with its sign
    first = torch.where(first.abs() < torch.finfo(torch.float32).tiny, 1.0, first)
    units = groups / first  # from -8 to 8, so that no square overflows
    best, most = torch.ones_like(first), torch.full_like(first, -1.0)
    for part in TRIED:
        numbers = (units * (1 / part)).round_().clamp_(-ZERO, ZERO - 1)
        squares = numbers.square().sum(dim=1, keepdim=True)
        product = numbers.mul_(units).sum(dim=1, keepdim=True)
        gain = torch.where(squares > 0, product * product / squares, 0.0)
        best = torch.where(gain > most, torch.where(squares > 0, product / squares, part), best)
        most = torch.maximum(gain, most)
    return (units / best).round_().clamp_(-ZERO, ZERO - 1), first * best


def pack(numbers: torch.Tensor, group: int) -> torch.Tensor:
    """Two numbers into each byte: [out, in / 2] uint8.

    Args:
        numbers: [out, in] uint8, 0 to 15.
        group: G, which divides ``in``.
    """
    low, high = numbers.view(len(numbers), -1, 2, group // 2).unbind(2)  # [out, in / G, G / 2] each
    return (low | (high << 4)).view(len(numbers), -1)


def unpack(packed: torch.Tensor, group: int) -> torch.Tensor:
    """The numbers of ``pack``: [out, in] uint8, 0 to 15."""
    halves = packed.view(len(packed), -1, 1, group // 2)
    return torch.cat((halves & 15, halves >> 4), dim=2).view(len(packed), -1)


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The numbers that a quantised weight stands for: [out, in] float32.

    Args:
        weight: [out, in] int8, or [out, in / 2] uint8, which is int4.
        scale: [out], or [out, in / G]; floating point.
    """
    is_int4 = weight.dtype == torch.uint8
    width = weight.shape[1] * (2 if is_int4 else 1)
    wide = torch.empty(len(weight), width)
    rows = max(BLOCK // width, 1)
    for block, own, out in zip(*(torch.split(t, rows) for t in (weight, scale, wide)), strict=True):
        own = own.float().reshape(len(block), -1, 1)
        group = width // own.shape[1]
        numbers = unpack(block, group).to(torch.int8) - ZERO if is_int4 else block
        torch.mul(numbers.view(len(block), -1, group), own, out=out.view(len(block), -1, group))
    return wide


def regrouped(weight: torch.Tensor, scale: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same int4 weight in smaller groups, several of which have the same scale.

    Args:
        weight: [out, in / 2] uint8.
        scale: [out, in / G].
        group: divides G.
    """
    before = format_of(weight, scale).group
    if before == group:
        return weight, scale
    return pack(unpack(weight, before), group), scale.repeat_interleave(before // group, dim=1)


def format_of(weight: torch.Tensor, scale: torch.Tensor) -> WeightFormat:
    """The format of a quantised weight."""
    dtype = "int4" if weight.dtype == torch.uint8 else "int8"
    return WeightFormat(dtype, group_of(weight.shape, dtype, scale.shape))


def in_format(
    weight: torch.Tensor, scale: torch.Tensor | None, wanted: WeightFormat | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight and its scales in another format; as they are where that is theirs.

    Args:
        scale: of a quantised weight, else None.
        wanted: None leaves floating point as it is, and widens a quantised weight to float32.
    """
    if scale is not None:
        own = format_of(weight, scale)
        if wanted is not None and own.dtype == wanted.dtype == "int4" and own.group % wanted.group == 0:
            return regrouped(weight, scale, wanted.group)
        if own == wanted:
            return weight, scale
        weight = dequantize(weight, scale)
    if wanted is None:
        return weight, None
    if wanted.dtype == "int8":
        return quantize(weight)
    if wanted.dtype == "int4":
        return quantize_int4(weight, wanted.group)
    return weight.to(getattr(torch, wanted.dtype)), None
