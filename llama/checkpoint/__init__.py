"""Read checkpoints of any format, and load their weights onto the device.

`open_checkpoint` recognises the format, `checked` reads the weights one by one, `place` moves them to the device.

    recognise.py   which format a directory holds     source.py      an opened checkpoint of any format
    meta_pth.py, hf_safetensors.py, native.py         the formats
    files.py       one file: JSON or mapped tensors   names.py       one table: names and shapes of the weights
    partition.py   cutting weights for several ranks  quantize.py    int8 and int4 weights
    reshard.py     writing whole checkpoints          writing.py     writing files
    checksums.py   comparing files with their sums   duplicates.py  a shard that is there twice
    packed.py      weights that others quantised
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from llama.checkpoint.checksums import check_files
from llama.checkpoint.names import is_scale, scale_of
from llama.checkpoint.partition import device_parts
from llama.checkpoint.quantize import in_format
from llama.checkpoint.recognise import open_checkpoint
from llama.checkpoint.source import Source, TensorInfo, checked, is_finite
from llama.compiled.memory import storage_of
from llama.compiled.model import Transformer
from llama.config import ModelArgs
from llama.sharding import LAYER
from llama.storage import Storage, WeightFormat
from llama.xla import backend, transfers
from llama.xla.stacks import StackInTheMaking, spans_layers

__all__ = [
    "Source",
    "TensorInfo",
    "check_files",
    "checked",
    "is_finite",
    "is_scale",
    "open_checkpoint",
    "place",
    "random_tensors",
]

WAIT_AFTER = 64 * 2**20  # bytes on their way to the device


def place(
    model: Transformer,
    tensors: Iterable[tuple[str, torch.Tensor]],
    storage: torch.dtype | Storage,
    device: torch.device,
) -> Iterator[int]:
    """Move tensors into a model built on the meta device, one at a time, and stack its layers (xla/stacks.py).

    There is never a second copy of the weights, and on a mesh each device receives its part of them. Where stacks are
    tensors of their own, the weights of the layers end up in them alone, and the model's parameters of single layers
    stay on the meta device.

    Args:
        model: its parameters are replaced.
        tensors: (name, host tensor) for every parameter; a quantised weight's scales come after it.
        storage: how the weights are stored on the device; a dtype is that without anything kept, torch's int4 int4.

    Yields:
        The number of bytes of each tensor, when it is on the device, for a progress bar.
    """
    storage = storage_of(storage)
    on_the_way, in_ranges = 0, spans_layers(device)
    filling: dict[str, StackInTheMaking] = {}  # by name in a layer
    for name, tensor, scale in with_scales(tensors):
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        stored = stored_as(tensor, scale, leaf, storage.format_of(name, model.args, model.parts))
        del tensor, scale  # or they would stay in memory while the next one is read
        size = 0
        for part, host in stored.items():
            if in_ranges:
                placed = transfers.adopt(host, device)
            else:
                pieces, axis = device_parts(f"{module}.{part}", host, model.args, model.parts)
                placed = transfers.upload(host, device) if axis is None else transfers.upload_parts(pieces, axis)
                layer = LAYER.match(name)
                if layer is not None:
                    stack = f"{module[layer.end() :]}.{part}"
                    if stack not in filling:
                        filling[stack] = StackInTheMaking(model.args.n_layers, placed, axis)
                    filling[stack].put(int(layer[1]), placed)
                    placed = host.to("meta")
                del pieces
            setattr(owner, part, nn.Parameter(placed, requires_grad=False))
            size += host.nbytes
        del stored, host, placed
        on_the_way += size
        if on_the_way > WAIT_AFTER and device.type == "xla":
            backend.wait()  # a transfer keeps its host tensor until it is done
            on_the_way = 0
        yield size
    model.rotary = transfers.upload(model.rotary, device)
    model.stacks |= {name: stack.finished() for name, stack in filling.items()}
    if in_ranges and device.type == "xla":
        model.stack_layers()
    if model.parts > 1:
        rows = len(model.tok_embeddings.weight) // model.parts
        first_ids = [torch.tensor([rows * rank]) for rank in range(model.parts)]
        model.tok_embeddings.register_buffer("first_id", transfers.upload_parts(first_ids, 0), persistent=False)


def with_scales(
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Join quantised weights with their scales, which come next: (name, weight, scale), or (name, tensor, None)."""
    waiting: tuple[str, torch.Tensor] | None = None
    for name, tensor in tensors:
        if waiting is not None:
            assert name == scale_of(waiting[0])
            yield (*waiting, tensor)
            waiting = None
        elif tensor.is_floating_point():
            yield name, tensor, None
        else:
            waiting = name, tensor
        del tensor  # or it would stay in memory while the next one is read


def stored_as(
    tensor: torch.Tensor, scale: torch.Tensor | None, leaf: str, wanted: WeightFormat | None
) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensor as the model stores it, by parameter name: a quantised weight with its scale.

    Args:
        tensor: a weight or a bias.
        scale: of a weight that is quantised, else None.
        leaf: the parameter that it is for.
        wanted: how it is stored; None leaves floating point as it is.
    """
    made, scale = in_format(tensor, scale, wanted)
    if scale is not None:
        return {leaf: made, "scale": scale.to(torch.float32, copy=True)}  # a view would keep the whole file mapped
    return {leaf: made.clone() if wanted is None else made}  # likewise


def random_tensors(args: ModelArgs, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield seeded random weights for every parameter of a model of this shape, for tests and timings.

    They are normal with deviation 0.02; norms are all one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Transformer(args, 2).named_parameters()}
    for name, shape in shapes.items():
        if len(shape) == 1:
            yield name, torch.ones(shape)
        else:
            yield name, torch.empty(shape).normal_(std=0.02, generator=generator)
