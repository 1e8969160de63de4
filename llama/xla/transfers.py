"""Tensors to and from the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama.xla.backend import device_kind
from llama.xla.counters import counters, xla_compilations

ALIGNMENT = 64  # bytes


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device. A transfer: it compiles nothing."""
    counters.sent(tensor)
    return tensor.to(device)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeros, made on the device. Its memory is the device's own: on the CPU device an uploaded tensor's is
    not, and the first program that it is donated to copies it.
    """
    made = torch.zeros(*shape, dtype=dtype, device=device)
    if device.type == "xla":
        import torch_xla

        compilations = xla_compilations()
        torch_xla.sync()
        counters.expected += xla_compilations() - compilations
    return made


def adopt(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Give a host tensor that nobody will write to any more to the device.

    On the CPU device without a copy: the program reads the host's memory, which may be a mapped file. It must begin at
    a multiple of 64 bytes, as PJRT demands, or else is copied to where it does. Other devices get a copy, like
    ``upload``'s.
    """
    if device.type != "xla" or device_kind() != "CPU":
        return upload(tensor, device)
    from torch_xla.utils.dlpack import from_dlpack

    counters.sent(tensor)
    host = tensor.detach().contiguous()
    adopted: torch.Tensor = from_dlpack(host.clone() if host.data_ptr() % ALIGNMENT else host)
    return adopted


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a device tensor to the host. Host sync: yes, it waits until the program that makes the tensor has run."""
    counters.fetches += 1
    counters.fetched_bytes += tensor.nbytes
    return tensor.cpu()
