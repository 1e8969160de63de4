"""Several devices as one mesh: how tensors are split over them, and what the devices tell each other.

A program is written for one device. On a mesh each device runs it on its own part of every tensor (what XLA calls
manual sharding, and JAX shard_map): the slots of its group, its heads, its columns of a weight. Nothing moves between
devices but by ``all_reduce`` and ``all_gather``, so a program communicates what it says and no more.

Devices, groups and axes are those of ``llama/sharding.py``. A process has one mesh: torch_xla knows no other way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from llama.errors import ConfigError, setting
from llama.sharding import Mesh
from llama.xla import modules

# How a tensor is split: for each of its dimensions the mesh axis, or None; dimensions behind the last are whole.
Split = tuple[str | None, ...]
WHOLE: Split = ()
ROWS: Split = ("data",)  # its rows are slots

_mesh = Mesh()


def current() -> Mesh:
    """The mesh that this process's programs run on."""
    return _mesh


def start(mesh: Mesh) -> None:
    """Make the devices one mesh. Before the first tensor; a mesh of one device leaves everything as it is.

    Raises:
        ConfigError: the process runs on another mesh already, or has put tensors on single devices.
    """
    global _mesh
    if mesh == _mesh:
        return
    import torch_xla
    import torch_xla.runtime

    if not _mesh.is_single or torch_xla._XLAC._xla_get_spmd_config_is_locked():
        raise ConfigError(
            f"tensor_parallel: got {mesh.tensor} with {setting('data_parallel')} {mesh.data}, but this process runs on "
            f"{'one device' if _mesh.is_single else f'{_mesh.tensor} with {_mesh.data}'} already, and a process has "
            "one mesh; use a new process"
        )
    torch_xla.runtime.use_spmd()
    # numbers in a program become constants of it; as inputs they would be tensors that are not split
    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)
    _mesh = mesh


def device_count() -> int:
    """How many devices there are, on all hosts."""
    import torch_xla.runtime

    return int(torch_xla.runtime.global_runtime_device_count())


def host_count() -> int:
    """How many processes share the devices."""
    import torch_xla.runtime

    return int(torch_xla.runtime.process_count())


# --- tensors of all devices -------------------------------------------------------------------------------------------


@cache
def _sharding(split: Split, dims: int) -> Any:
    """torch_xla's description of a split of a tensor of so many dimensions."""
    import numpy as np
    import torch_xla.distributed.spmd as spmd

    grid = spmd.Mesh(np.arange(_mesh.devices), (_mesh.data, _mesh.tensor), ("data", "tensor"))
    return grid.get_op_sharding((*map(_on_several, split), *[None] * (dims - len(split))))


def _on_several(axis: str | None) -> str | None:
    """The axis, or None where it has one device."""
    return axis if axis is not None and getattr(_mesh, axis) > 1 else None


def whole_shape(part: Sequence[int], split: Split) -> tuple[int, ...]:
    """The shape of a tensor on all devices, from that of one device's part."""
    counts = [1 if axis is None else int(getattr(_mesh, axis)) for axis in split]
    return tuple(size * count for size, count in zip(part, (*counts, *[1] * (len(part) - len(split))), strict=True))


def from_parts(parts: Sequence[torch.Tensor], split: Split) -> torch.Tensor:
    """A tensor of the mesh from host tensors, one for each place in a group; every group gets the same. A transfer.

    Args:
        parts: one for each of the T devices of a group, or a single one for all.
        split: how the parts make up the whole. Rows cannot be split here: see ``from_rows``.
    """
    import torch_xla

    each = [parts[device % _mesh.tensor] if len(parts) > 1 else parts[0] for device in _local_devices()]
    shape = whole_shape(parts[0].shape, split)
    made: torch.Tensor = torch_xla._XLAC._global_tensor_from_cpu_shards(each, _sharding(split, len(shape)), shape)
    return made


def from_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the mesh whose rows are divided among the groups, in their order. A transfer."""
    import torch_xla

    groups = tensor.chunk(_mesh.data)
    each = [groups[device // _mesh.tensor].contiguous() for device in _local_devices()]
    sharding = _sharding(ROWS, tensor.dim())
    made: torch.Tensor = torch_xla._XLAC._global_tensor_from_cpu_shards(each, sharding, tensor.shape)
    return made


def mark(tensor: torch.Tensor, split: Split) -> None:
    """Have a tensor that is about to be computed split over the mesh."""
    import torch_xla

    if not _mesh.is_single:
        torch_xla._XLAC._xla_mark_sharding(tensor, _sharding(split, tensor.dim()))


def rows_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all groups on the host, in the groups' order. Host sync: yes, until nothing runs any more."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    xm.wait_device_ops()  # or the rows may not be there
    (shards,) = torch_xla._XLAC._get_local_shards([tensor])
    return torch.cat([shard for shard, _ in shards[:: _mesh.tensor]])


@cache
def _local_devices() -> tuple[int, ...]:
    """The numbers of this host's devices in the mesh, in the order in which torch_xla takes their parts."""
    import torch_xla

    number_of = {name: number for number, name in enumerate(torch_xla._XLAC._xla_get_all_runtime_devices())}
    return tuple(number_of[name] for name in torch_xla._XLAC._xla_get_runtime_devices())


# --- within a program -------------------------------------------------------------------------------------------------


def to_part(tensor: torch.Tensor) -> torch.Tensor:
    """A device's part of a tensor of the mesh: what its program computes with."""
    import torch_xla

    part: torch.Tensor = torch_xla._XLAC._spmd_full_to_shard_shape(tensor)
    return part


def to_whole(part: torch.Tensor, split: Split) -> torch.Tensor:
    """The tensor of the mesh that the devices' parts make up; its split is fixed, whatever XLA would choose."""
    import torch_xla
    from torch_xla.distributed.spmd.xla_sharding import ShardingType

    xlac = torch_xla._XLAC
    xlac._mark_manual_sharding(part, xlac.OpSharding([], [], [], ShardingType.MANUAL))
    shape = whole_shape(part.shape, split)
    whole: torch.Tensor = xlac._spmd_shard_to_full_shape(part, _sharding(split, len(shape)), list(shape), part.dtype)
    return whole


def part_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of some tensors on each device: measured, of those that this host has, the largest."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    xm.wait_device_ops()
    held: Counter[str] = Counter()
    for tensor in tensors:
        if _mesh.is_single:
            held["all"] += tensor.nbytes
            continue
        (shards,) = torch_xla._XLAC._get_local_shards([tensor])
        for shard, device in shards:
            held[device] += shard.nbytes
    return max(held.values())


def split_of(tensor: torch.Tensor) -> str:
    """How a tensor of the mesh is split, in torch_xla's words."""
    import torch_xla

    return str(torch_xla._XLAC._get_xla_sharding_spec(tensor))


@contextmanager
def parts_of(*owners: torch.nn.Module, tables: Iterable[dict[str, Any]] = ()) -> Iterator[None]:
    """Within: the device tensors that some objects hold are one device's parts of them. Nothing happens without a mesh.

    Args:
        owners: their weights and buffers.
        tables: others, by any name.
    """
    held = [module for owner in owners for module in owner.modules()]
    every = [*tables, *(table for module in held for table in (module._parameters, module._buffers))]
    with _replaced(_places_in(every) if not _mesh.is_single else [], to_part) as replaced:
        _places.append([place for place, _, _ in replaced])
        try:
            yield
        finally:
            _places.pop()


@contextmanager
def held_as(placeholder: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Within: ``parts_of``'s tensors are placeholders, as a loop's body needs them; yields (part, placeholder) of each.

    What closes over a part would otherwise take the whole tensor into the loop.
    """
    with _replaced(_places[-1] if _places else [], placeholder) as replaced:
        yield [(part, instead) for _, part, instead in replaced]


Place = tuple[dict[str, Any], str]  # a table of tensors, and a name in it
_places: list[list[Place]] = []  # of the tensors that ``parts_of`` has replaced


def _places_in(tables: Iterable[dict[str, Any]]) -> list[Place]:
    """Where tables hold tensors of the device."""
    return [
        (table, name)
        for table in tables
        for name, held in table.items()
        if isinstance(held, torch.Tensor) and held.device.type == "xla"
    ]


@contextmanager
def _replaced(
    places: Sequence[Place], instead: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[list[tuple[Place, torch.Tensor, torch.Tensor]]]:
    """Within: other tensors are in some places; yields (place, tensor, its replacement) of each."""
    found = [((table, name), table[name], instead(table[name])) for table, name in places]
    try:
        for (table, name), _, new in found:
            table[name] = new
        yield found
    finally:
        for (table, name), old, _ in found:
            table[name] = old


# --- what devices tell each other -------------------------------------------------------------------------------------


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over the devices of a group, on each of them."""
    import torch_xla

    summed: torch.Tensor = torch_xla._XLAC._xla_spmd_all_reduce("sum", x, 1.0, _mesh.groups())
    return summed


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """x of all devices of a group side by side in the last dimension, on each of them: [..., n] becomes [..., T n]
    float32.
    """
    flat = x.reshape(-1, x.shape[-1])
    gathered: torch.Tensor = _all_gather_op()(flat.float())
    return gathered.reshape(*x.shape[:-1], -1)


@cache
def _all_gather_op() -> Any:
    """The registered XLA operation behind ``all_gather``: torch_xla has none for manual sharding."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    def lower(x: Any) -> Any:
        rows, width = x.shape().sizes
        return xb.Op.call(modules.all_gather((rows, width), tuple(map(tuple, _mesh.groups()))), (x,))

    return registry.register("llama_all_gather", lower)
