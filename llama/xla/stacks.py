"""The weights of all layers as a loop reads them: stacks, of which its body takes its layer's part.

A stack is no second copy. On the CPU device every layer's weight stays where it is, in a mapped file or in memory of
its own, and the stack is the range of addresses from the first to the last, with a table of where each layer's weight
begins; nothing between them is ever read. Other devices hold one tensor [L, ...] and no tensors of single layers.

XLA:CPU fuses the taking of a part into loops that it compiles, and copies the part first where a library is to read it.
For a long chunk that copy is nothing beside the product; for a few dozen rows ``LayerWeight.product`` spares it: a
branch for each layer, with that layer's own tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from llama.xla import backend, mesh, modules, ops, programs, transfers


def spans_layers(device: torch.device) -> bool:
    """Whether stacks are ranges of memory that holds the layers' own tensors; else they are tensors of their own."""
    return device.type != "xla" or (backend.device_kind() == "CPU" and mesh.current().is_single)


class StackedWeight:
    """One weight of every layer."""

    def __init__(self, whole: torch.Tensor, places: torch.Tensor | None, each: Sequence[torch.Tensor]) -> None:
        """Use ``spanning`` or ``of_one_tensor``.

        Args:
            whole: [n], a range of memory, or [L, ...].
            places: [L] int64, where in the range each layer's weight begins; None with [L, ...].
            each: every layer's own tensor; none with [L, ...].
        """
        self._whole, self._places, self._each = whole, places, tuple(each)

    @property
    def shape(self) -> torch.Size:
        """Of one layer's."""
        return self._whole.shape[1:] if self._places is None else self._each[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """Of one layer's."""
        return self._whole.dtype if self._places is None else self._each[0].dtype

    @classmethod
    def spanning(cls, each: Sequence[torch.Tensor]) -> StackedWeight:
        """A stack of weights on the CPU device, where they are.

        Args:
            each: every layer's, of one shape and dtype.
        """
        import torch_xla

        device, dtype = each[0].device, each[0].dtype
        addresses = [torch_xla._XLAC._unsafe_buffer_pointer(weight) for weight in each]
        first = min(addresses)
        size = max(addresses) + each[0].nbytes - first
        # a range of addresses and not an allocation: only the weights' places in it are read, and it owns them
        memory: Any = (ctypes.c_uint8 * size).from_address(first)
        memory.owns = tuple(each)
        whole = torch.frombuffer(memory, dtype=ops.HALVES.get(dtype, dtype))
        places = torch.tensor([(address - first) // dtype.itemsize for address in addresses])
        return cls(transfers.adopt(whole, device), transfers.upload(places, device), each)

    @classmethod
    def of_one_tensor(cls, whole: torch.Tensor) -> StackedWeight:
        """A stack that is one tensor [L, ...] on the device."""
        return cls(whole, None, ())

    def at(self, layer: torch.Tensor) -> LayerWeight:
        """The weight of a layer; ``layer`` is an int32 scalar that a loop counts."""
        return LayerWeight(self, layer)


class StackInTheMaking:
    """A stack that is one tensor on the device, into which the layers' weights are put there: the host never holds it.

    Args:
        layers: L.
        like: a layer's weight on the device.
        axis: along which it is split over the devices of a mesh; None where it is whole.
    """

    def __init__(self, layers: int, like: torch.Tensor, axis: int | None) -> None:
        split = mesh.WHOLE if axis is None else (*[None] * (axis + 1), "tensor")
        self._whole = transfers.zeros((layers, *like.shape), like.dtype, like.device, split)
        number = transfers.upload(torch.tensor([0], dtype=torch.int32), like.device)
        self._put = programs.compile_program(
            "(stack)", _with_layer, (self._whole, like, number), donated=(0,), edits=True, splits=[split]
        )

    def put(self, layer: int, weight: torch.Tensor) -> None:
        """Put a layer's weight where it belongs."""
        number = transfers.upload(torch.tensor([layer], dtype=torch.int32), weight.device)
        (self._whole,) = self._put(self._whole, weight, number)

    def finished(self) -> StackedWeight:
        """The stack, after the last layer."""
        return StackedWeight.of_one_tensor(self._whole)


def _with_layer(whole: torch.Tensor, weight: torch.Tensor, layer: torch.Tensor) -> tuple[torch.Tensor]:
    return (ops.put_layer(whole, weight, layer),)


class LayerWeight:
    """The weight of the layer that a loop is at.

    Attributes:
        shape, dtype: its own.
    """

    def __init__(self, stack: StackedWeight, layer: torch.Tensor) -> None:
        self._stack, self._layer = stack, layer
        self.shape, self.dtype = stack.shape, stack.dtype

    @property
    def source(self) -> tuple[torch.Tensor, ...]:
        """What ``part`` takes it from."""
        stack = self._stack
        return (stack._whole, self._layer) if stack._places is None else (stack._whole, stack._places, self._layer)

    def taken(self) -> torch.Tensor:
        """It as a tensor."""
        taken: torch.Tensor = _part_op()(*self.source, sizes=tuple(self.shape))
        return taken

    @property
    def has_each(self) -> bool:
        """Whether every layer's weight is a tensor of its own."""
        return bool(self._stack._each)

    def product(self, columns: torch.Tensor) -> torch.Tensor:
        """The product by oneDNN, which reads the weight where it is: [out, n] float32.

        Args:
            columns: [in, n] float32, in memory.
        """
        product: torch.Tensor = _product_op()(self._layer, columns, *self._stack._each)
        return product


def part(source: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The builder's part of ``taken``.

    Args:
        source: the builder's values of ``LayerWeight.source``, or a weight alone.
        sizes: of the weight.
    """
    import torch_xla.core.xla_builder as xb

    if len(source) == 1:
        return source[0]
    *stack, layer = source
    if len(stack) == 1:
        zero = xb.Op.scalar(layer.builder(), 0, dtype=xb.Type.S32)
        return stack[0].dynamic_slice([layer, *[zero] * len(sizes)], [1, *sizes]).reshape(list(sizes))
    whole, places = stack
    place = places.dynamic_slice([layer], [1]).reshape([])
    taken = whole.dynamic_slice([place], [torch.Size(sizes).numel()]).reshape(list(sizes))
    return ops.numbers(taken)


@cache
def _part_op() -> Any:
    """The registered XLA operation behind ``LayerWeight.taken``."""
    import torch_xla.core.xla_op_registry as registry

    def lower(*source: Any, sizes: tuple[int, ...]) -> Any:
        return part(source, sizes)

    return registry.register("llama_layer_part", lower)


@cache
def _product_op() -> Any:
    """The registered XLA operation behind ``LayerWeight.product``."""
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_op_registry as registry

    def lower(layer: Any, columns: Any, *each: Any) -> Any:
        weight, of_x = tuple(each[0].shape().sizes), tuple(columns.shape().sizes)
        computation = modules.product(weight, of_x, kind="onednn", layers=len(each))
        return xb.Op.call(computation, (layer, columns, *each))

    return registry.register("llama_layers_onednn", lower)
