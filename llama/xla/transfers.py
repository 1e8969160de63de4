"""Tensors to and from the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama.xla import mesh
from llama.xla.backend import device_kind
from llama.xla.counters import counters, xla_compilations

ALIGNMENT = 64  # bytes


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device, or to each device of a mesh. A transfer: it compiles nothing."""
    counters.sent(tensor)
    if device.type == "xla" and not mesh.current().is_single:
        return mesh.from_parts([tensor.detach()], mesh.WHOLE)
    return tensor.to(device)


def upload_rows(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``upload`` a tensor whose rows belong to the groups of a mesh, in their order: each gets its own."""
    if device.type != "xla" or mesh.current().data == 1:
        return upload(tensor, device)
    counters.sent(tensor)
    return mesh.from_rows(tensor)


def upload_parts(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Give each device of a group its part of a tensor.

    Args:
        parts: host tensors, one for each device of a group.
        axis: along which they make up the whole.
    """
    for part in parts:
        counters.sent(part)
    return mesh.from_parts([part.contiguous() for part in parts], (*[None] * axis, "tensor"))


def zeros(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, split: mesh.Split = mesh.WHOLE
) -> torch.Tensor:
    """A tensor of zeros, made on the device. Its memory is the device's own: on the CPU device an uploaded tensor's is
    not, and the first program that it is donated to copies it.

    Args:
        split: of a mesh; ``shape`` is that of the whole.
    """
    made = torch.zeros(*shape, dtype=dtype, device=device)
    if device.type == "xla":
        import torch_xla

        compilations = xla_compilations()
        mesh.mark(made, split)
        torch_xla.sync()
        counters.expected += xla_compilations() - compilations
    return made


def adopt(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Give a host tensor that nobody will write to any more to the device.

    On the CPU device without a copy: the program reads the host's memory, which may be a mapped file. It must begin at
    a multiple of 64 bytes, as PJRT demands, or else is copied to where it does. Other devices get a copy, like
    ``upload``'s.
    """
    if device.type != "xla" or device_kind() != "CPU" or not mesh.current().is_single:
        return upload(tensor, device)
    from torch_xla.utils.dlpack import from_dlpack

    counters.sent(tensor)
    host = tensor.detach().contiguous()
    adopted: torch.Tensor = from_dlpack(host.clone() if host.data_ptr() % ALIGNMENT else host)
    return adopted


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a device tensor to the host. Host sync: yes, it waits until the program that makes the tensor has run.

    Of a mesh: one that is the same on all devices.
    """
    counters.fetches += 1
    counters.fetched_bytes += tensor.nbytes
    return tensor.cpu()


def fetch_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``fetch`` a tensor whose rows belong to the groups of a mesh, in their order."""
    if tensor.device.type != "xla" or mesh.current().data == 1:
        return fetch(tensor)
    counters.fetches += 1
    counters.fetched_bytes += tensor.nbytes
    return mesh.rows_to_host(tensor)
