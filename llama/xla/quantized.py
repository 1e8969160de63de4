"""Products with int8 and int4 weights as sums of integers, and the weights as the numbers that they stand for.

A row of x is rounded to int16, by a scale of its own. XLA:CPU then multiplies pairs of numbers and adds them up in one
instruction (vpmaddwd) where it would widen every weight to float32, and a sum of integers is the same in any order.

How far that rounds: of n numbers none is more than sqrt(n) times their root mean square, and there are ``levels(n)``
steps for the largest. At 4,096 numbers a step is at most 0.016 of the root mean square; in a block of llama.cpp's Q8_0
it is 0.024 for usual numbers. Longer rows are rounded in parts. What it does to logits: docs/performance.md.

Shapes: R rows, P blocks of a row whose integers are summed up together: the groups of the weight's scales, or the parts
of x.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from llama.xla.ops import materialised

LARGEST_INT32, LARGEST_INT16, LARGEST_INT8 = 2**31 - 1, 2**15 - 1, 127
WIDEST_PART = 4096  # numbers of a row that are rounded by one scale
MOST_PARTS = 16


def dequantized(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of a quantised weight as the numbers that they stand for: [rows, in].

    Args:
        weight: [rows, in] int8, or [rows, in / 2] uint8 in int4's layout (checkpoint/quantize.py).
        scale: [rows], or [rows, in / G] for groups of G numbers.
        dtype: of the result.
    """
    per_group = scale.reshape(len(weight), -1, 1)
    groups = weight.reshape(len(weight), per_group.shape[1], -1)
    if weight.dtype == torch.uint8:
        numbers = torch.cat([half.float() for half in _nibbles(groups)], dim=-1) - 8.0
    else:
        numbers = groups.float()
    return (numbers * per_group.float()).reshape(len(weight), -1).to(dtype)


def widened_parts(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of x [R, in] and of the numbers that a weight with groups stands for, the sum of whose products is theirs.

    int4's low and high halves are parts of their own: to join them number by number takes longer than to multiply them.
    """
    if weight.dtype != torch.uint8:
        return [(x, dequantized(weight, scale, dtype))]
    blocks, per_group = scale.shape[1], scale.float().unsqueeze(-1)
    of_x = x.reshape(len(x), blocks, 2, -1).unbind(2)
    of_weight = _nibbles(weight.reshape(len(weight), blocks, -1))
    return [
        (part.reshape(len(x), -1), ((half.float() - 8.0) * per_group).reshape(len(weight), -1).to(dtype))
        for part, half in zip(of_x, of_weight, strict=True)
    ]


def linear_int16(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T`` with x rounded to int16: [R, out] in x's dtype.

    Args:
        x: [R, in].
        weight: [out, in] int8, or [out, in / 2] uint8 in int4's layout.
        scale: [out], or [out, in / G]; None leaves it out.
    """
    is_grouped = scale is not None and scale.dim() > 1
    blocks = scale.shape[1] if is_grouped else rounding_parts(x.shape[1])  # type: ignore[union-attr]
    rounded, step = to_int16(x, blocks, own_steps=not is_grouped)
    sums = integer_sums(rounded, weight, blocks)  # [out, R, P]
    if blocks == 1:
        product = sums.squeeze(-1).t().to(x.dtype) * step
        return product if scale is None else product * scale.reshape(-1)
    weighted = materialised(sums).to(x.dtype) * (scale.unsqueeze(1) if is_grouped else step)  # type: ignore[union-attr]
    product = weighted.sum(-1).t()
    if is_grouped:
        return product * step
    return product if scale is None else product * scale


def rounding_parts(width: int) -> int:
    """In how many equal parts a row of so many numbers is rounded: as few as leave each enough levels."""
    least = -(-width // WIDEST_PART)
    return next((count for count in range(least, MOST_PARTS + 1) if width % count == 0), 1)


def levels(width: int) -> int:
    """The largest integer that a number is rounded to, so that no sum of so many products with int8 leaves int32."""
    return min(LARGEST_INT16, LARGEST_INT32 // (LARGEST_INT8 * width))


def to_int16(x: torch.Tensor, blocks: int, *, own_steps: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R, in] as [R, P, in / P] int16, in memory, and what a level is worth.

    Layers that read the same x share the rounding: XLA finds that they compute the same.

    Args:
        own_steps: each block has a step of its own, [R, P]; else each row has, [R, 1].
    """
    whole = materialised(x).reshape(len(x), blocks, -1)
    size = whole.abs().amax(dim=(2,) if own_steps else (1, 2))
    step = size.reshape(len(x), -1).clamp(min=torch.finfo(torch.float32).tiny) / levels(whole.shape[-1])
    return materialised((whole * (1.0 / step).unsqueeze(-1)).round().to(torch.int16)), step


def integer_sums(x: torch.Tensor, weight: torch.Tensor, blocks: int) -> torch.Tensor:
    """The sum of the products of each block, [out, R, P] int32.

    Args:
        x: [R, P, in / P] int16.
        weight: as ``linear_int16`` takes it.
    """
    wide, groups = torch.int32, weight.reshape(len(weight), 1, blocks, -1)
    if weight.dtype != torch.uint8:
        return (groups.to(wide) * x.unsqueeze(0).to(wide)).sum(-1, dtype=wide)
    low, high = _nibbles(groups)
    first, second = x.unsqueeze(0).to(wide).chunk(2, dim=-1)
    sums = (low.to(wide) * first + high.to(wide) * second).sum(-1, dtype=wide)
    return sums - 8 * x.to(wide).sum(-1, dtype=wide).unsqueeze(0)


def _nibbles(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The low and the high four bits of uint8 numbers."""
    if packed.device.type != "xla":
        return packed % 16, packed // 16
    low, high = _nibbles_op()(packed)
    return low, high


@cache
def _nibbles_op() -> Any:
    """The registered XLA operation behind ``_nibbles``. torch's own would divide as float32."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    def lower(packed: Any) -> Any:
        sizes = list(packed.shape().sizes)
        mask, sixteen = (xb.Op.scalar(packed.builder(), each, dtype=xb.Type.U8).broadcast(sizes) for each in (15, 16))
        return xb.Op.tuple([packed & mask, packed / sixteen])  # LLVM makes a shift of it

    return registry.register("llama_nibbles", lower)
