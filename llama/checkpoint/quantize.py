"""Weight-only int8: each output channel is integers from -127 to 127 times one float32 scale.

Symmetric and without calibration, so it can be computed while a checkpoint streams by; activations are not quantised.
(The scheme is LLM.int8()'s row-wise absmax, Dettmers et al. 2022, applied to weights.)
"""

from __future__ import annotations

import torch

LARGEST = 127
BLOCK = 2**20  # numbers scaled at a time, which bounds the temporary memory


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
