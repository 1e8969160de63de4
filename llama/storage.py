"""How a model's weights are stored: their dtypes, and how many numbers share a scale; no tensors here.

A checkpoint's quantised weights stay as they are unless another dtype is asked for; the others take the storage's
dtype. ``Storage`` says for each weight what becomes of it: for loading, converting and planning alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from llama.config import EngineConfig, ModelArgs
from llama.sharding import EMBEDDING, HEAD, device_axis, local_shape, numberless, span, whole_shape

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
GROUPS = (128, 64, 32)  # of int4; 32 is what other programs write, or what no larger one divides
INT8_GROUP = 32  # of GGUF's Q8_0, the only groups of int8
QUANTISED = {"I8": "int8", "U8": "int4", "int8": "int8", "uint8": "int4"}  # by safetensors' and torch's names


class WeightFormat(NamedTuple):
    """How one weight is stored.

    Attributes:
        dtype: ``float32``, ``bfloat16``, ``float16``, ``int8`` or ``int4``.
        group: how many numbers of a row share a scale; 0: all of them, or there are no scales.
    """

    dtype: str
    group: int = 0

    @property
    def is_quantised(self) -> bool:
        """Whether it has scales."""
        return self.dtype in ("int8", "int4")

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a weight [out, in] or of a vector, its scales in float32 included."""
        numbers = prod(shape)
        scales = (numbers // self.group if self.group else shape[0]) if self.is_quantised else 0
        return (numbers // 2 if self.dtype == "int4" else numbers * ITEMSIZE[self.dtype]) + scales * ITEMSIZE["float32"]

    def __str__(self) -> str:
        return f"{self.dtype} in groups of {self.group}" if self.group else self.dtype


@dataclass(frozen=True)
class Storage:
    """How the weights of a model are stored.

    Attributes:
        dtype: what linear layers become. With ``int4``, those of the layers; embedding and head become int8. Without
            quantised weights, everything else becomes it, too; beside them it stays as the checkpoint has it.
        group: of int4, how many numbers share a scale, where that divides a row; else the next smaller of GROUPS.
        kept: quantised weights that stay as the checkpoint has them, by numberless names.
    """

    dtype: str
    group: int = EngineConfig.int4_group
    kept: Mapping[str, WeightFormat] = field(default_factory=dict)

    @classmethod
    def of(cls, storage: str | Storage) -> Storage:
        """A storage, which a dtype's name alone stands for, too."""
        return cls(storage) if isinstance(storage, str) else storage

    @property
    def is_quantised(self) -> bool:
        """Whether some weights are quantised."""
        return bool(self.kept) or WeightFormat(self.dtype).is_quantised

    @property
    def label(self) -> str:
        """The narrowest dtype in it."""
        return min((self.dtype, *(each.dtype for each in self.kept.values())), key=_width)

    def nbytes(self, name: str, args: ModelArgs, tensor: int = 1) -> int:
        """Bytes of a weight on one of T devices; in floating point float32 at most, where the checkpoint says which."""
        kind = self.format_of(name, args, tensor) or WeightFormat("float32")
        return kind.nbytes(local_shape(numberless(name), args, tensor))

    def format_of(self, name: str, args: ModelArgs, tensor: int = 1) -> WeightFormat | None:
        """How a weight is stored; None: as the checkpoint has it, in floating point.

        Args:
            name: Meta's, with the layer's number or ``{}``.
            args: the whole model's shape, its vocabulary settled.
            tensor: over how many devices it is split: no group is cut.
        """
        name = numberless(name)
        kept = self.kept.get(name)
        if kept is not None:
            group = largest_group(name, args, tensor, kept.group) if kept.group else 0
            if group is not None and (kept.dtype == "int4" or group in (0, kept.group)):
                return kept._replace(group=group)
        if len(whole_shape(name, args)) != 2 or (name == EMBEDDING and self.dtype != "int4"):
            return None if self.is_quantised else WeightFormat(self.dtype)
        if self.dtype != "int4":
            return WeightFormat(self.dtype)
        group = None if name in (EMBEDDING, HEAD) else largest_group(name, args, tensor, self.group)
        return WeightFormat("int8") if group is None else WeightFormat("int4", group)


def _width(dtype: str) -> int:
    return 8 * ITEMSIZE.get(dtype, 0)


def largest_group(name: str, args: ModelArgs, tensor: int, most: int) -> int | None:
    """The largest of GROUPS up to ``most`` that divides each device's part of a weight's rows; None where none does."""
    width, parts = whole_shape(name, args)[1], [(0, 0)]
    if tensor > 1 and device_axis(name) == 1:
        width = local_shape(name, args, tensor)[1]
        parts = [span(name, args, tensor, rank) for rank in range(tensor)]
    for group in GROUPS:
        if group <= most and not any(size % group for size in (width, *(size for part in parts for size in part))):
            return group
    return None


def choose_storage(
    dtype: str, stored: Mapping[str, WeightFormat], *, wide: str = "float32", group: int = EngineConfig.int4_group
) -> Storage:
    """What becomes of a checkpoint's weights.

    Args:
        dtype: ``auto`` keeps what is quantised, ``int8`` what is int8, ``int4`` what is int4 and an int8 embedding or
            head; every other linear layer is rounded anew. A floating-point dtype widens all of it.
        stored: the quantised weights of the checkpoint, by numberless names; see ``formats_of``.
        wide: the dtype of floating point under ``auto``.
        group: of int4.
    """
    kept = {
        name: each
        for name, each in stored.items()
        if dtype in ("auto", each.dtype) or (dtype == "int4" and name in (EMBEDDING, HEAD))
    }
    return Storage(wide if dtype == "auto" else dtype, group, kept)


def formats_of(tensors: Mapping[str, tuple[Sequence[int], str]]) -> dict[str, WeightFormat]:
    """The quantised weights of a checkpoint by numberless names, those left out whose layers differ.

    Args:
        tensors: shape and dtype of every tensor, by Meta's names; the dtype by safetensors' or torch's name.
    """
    found: dict[str, set[WeightFormat | None]] = {}
    for name, (shape, dtype) in tensors.items():
        if name.endswith(".weight"):
            scale = tensors.get(scale_of(name))
            own = QUANTISED.get(dtype)
            is_usable = own is not None and scale is not None and len(shape) == 2
            found.setdefault(numberless(name), set()).add(
                WeightFormat(own, group_of(shape, own, scale[0])) if is_usable and own and scale else None
            )
    return {name: each for name, formats in found.items() for each in formats if each and len(formats) == 1}


def group_of(shape: Sequence[int], dtype: str, scale: Sequence[int]) -> int:
    """How many numbers share a scale, by the shapes of a weight as it is stored and of its scales; 0: a row."""
    width = shape[1] * (2 if dtype == "int4" else 1)
    return width // max(scale[1], 1) if len(scale) > 1 else 0


def scale_of(name: str) -> str:
    """The name of a quantised weight's scales."""
    return name.removesuffix("weight") + "scale"
