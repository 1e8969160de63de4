"""Where weights come from: `open_checkpoint` recognises a format, `checked` reads weight by weight, `place` puts them on the device.

In here:

    files.py       one file: JSON, or tensors mapped from it     names.py       one table: names, shapes, axes of a split
    source.py      an opened checkpoint, whatever its format     partition.py   fairscale's arithmetic of a split
    meta_pth.py, hf_safetensors.py, native.py: the formats       recognise.py   which of them a directory holds
    reshard.py     writing whole checkpoints                     writing.py     writing files
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from llama import runtime
from llama.checkpoint.recognise import open_checkpoint
from llama.checkpoint.source import Source, TensorInfo, checked, is_finite
from llama.model import Transformer

__all__ = ["Source", "TensorInfo", "checked", "is_finite", "open_checkpoint", "place", "random_tensors"]

WAIT_AFTER = 64 * 2**20  # bytes on their way to the device


def place(model: Transformer, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, device: torch.device) -> Iterator[int]:
    """Move tensors into a model built on the meta device, one at a time, so that no second copy of the weights is ever held.

    Args:
        model: its parameters are replaced.
        tensors: (name, host tensor) for every parameter.
        dtype: storage dtype on the device.

    Yields:
        The bytes of each tensor on the device, as it arrives: what a progress bar counts.
    """
    on_the_way = 0
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        stored = runtime.adopt(tensor.to(dtype), device)
        setattr(model.get_submodule(module), leaf, nn.Parameter(stored, requires_grad=False))
        del tensor  # or it would stay in memory while the next one is read
        on_the_way += stored.numel() * stored.element_size()
        if on_the_way > WAIT_AFTER and device.type == "xla":
            runtime.wait()  # a transfer keeps its host tensor until it is done
            on_the_way = 0
        yield stored.numel() * stored.element_size()
    model.rotary = runtime.upload(model.rotary, device)


def random_tensors(model: Transformer, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Seeded random weights for every parameter of ``model``: normal with deviation 0.02, norms all one. For tests and timings."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            yield name, torch.ones(parameter.shape)
        else:
            yield name, torch.empty(parameter.shape).normal_(std=0.02, generator=generator)
