"""Hugging Face's format: config.json with model.safetensors, in one file or several with an index.

Which architectures are supported, and which settings refused, is in llama/settings.py. Older checkpoints in
pytorch_model.bin are read with a warning.

transformers rotates the two halves of a head's columns where Meta rotates neighbouring pairs, and stores the rows of wq
and wk in that order, their biases and norms, too; ``read`` restores Meta's order. Phi-3's fused weights are cut.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from llama.checkpoint import names
from llama.checkpoint.files import PickleFile, SafetensorsFile, TensorFile
from llama.checkpoint.packed import PackedLayer, Part
from llama.checkpoint.source import Found, Source
from llama.config import ModelArgs
from llama.errors import CheckpointError
from llama.quantization import SUFFIXES, packed_layer
from llama.settings import Settings, read_config, read_json
from llama.sharding import whole_shape

log = logging.getLogger("llama")

IN_HALVES = (
    *(".wq.weight", ".wk.weight", ".wq.scale", ".wk.scale", ".wq.bias", ".wk.bias"),
    *(".q_norm.weight", ".k_norm.weight"),
)


class Home(NamedTuple):
    """Where a weight is.

    Attributes:
        file: that holds it.
        name: in the file.
        first, rows: which of that tensor's rows it is; ``rows`` None: all.
    """

    file: TensorFile
    name: str
    first: int = 0
    rows: int | None = None


class PackedHome(NamedTuple):
    """Where a quantised weight is.

    Attributes:
        layer: that it is, or is some rows of.
        name: of the layer in its file.
        first, rows: which of the layer's rows it is.
    """

    layer: PackedLayer
    name: str
    first: int
    rows: int


class HFSource(Source):
    """A checkpoint in Hugging Face's format.

    Args:
        directory: with config.json and the weights.

    Raises:
        CheckpointError: a missing or damaged file, an index that contradicts the files, an unsupported setting, or see
            Source.
    """

    format = "huggingface"
    may_be_quantised = True

    def __init__(self, directory: Path) -> None:
        settings = read_config(directory / "config.json")
        self._files = open_weights(directory)
        self._home: dict[str, Home] = {}
        self._packed: dict[str, PackedHome] = {}
        self._quantization = settings.quantization
        packed: dict[str, dict[str, Part]] = {}
        biases: dict[str, Part] = {}  # of layers that LLaMA has without
        found: dict[str, Found] = {}
        for file in self._files:
            for theirs, header in file.headers.items():
                if names.DERIVED.fullmatch(theirs):
                    continue
                if (place := self._part_of(theirs)) is not None:
                    packed.setdefault(place[0], {})[place[1]] = Part(file, theirs)
                    continue
                if self._is_stray_bias(theirs, settings):
                    biases[theirs.removesuffix(".bias")] = Part(file, theirs)
                    continue
                fused = names.fused_in(theirs) if settings.is_fused else []
                if fused:
                    found |= self._cut(file, theirs, fused, settings.args)
                    continue
                name = names.to_meta(theirs) or f"{theirs} (no weight of LLaMA's)"
                self._home[name] = Home(file, theirs)
                found[name] = Found(header.shape, header.dtype, file.path)
        for layer, parts in packed.items():
            own = {"bias": biases.pop(layer)} if layer in biases else {}
            found |= self._unpacked(layer, parts | own, settings)
        for layer, part in biases.items():
            header = part.file.headers[part.name]
            found[f"{layer}.bias (no weight of LLaMA's)"] = Found(header.shape, header.dtype, part.file.path)
        if self._quantization is not None and not packed:
            raise CheckpointError(
                f"{directory / 'config.json'}: quantization_config says {self._quantization.method}, but no layer has "
                f"its tensors ({', '.join(SUFFIXES[self._quantization.method])}): remove the key if the weights are "
                "not quantised"
            )
        super().__init__(directory, settings, found, tuple(file.path for file in self._files))

    def _part_of(self, theirs: str) -> tuple[str, str] | None:
        """The packed layer that a tensor belongs to, and the tensor's suffix; None for any other tensor."""
        return None if self._quantization is None else packed_layer(theirs, self._quantization.method)

    def _is_stray_bias(self, theirs: str, settings: Settings) -> bool:
        """Whether a tensor is a bias that the model has not: AutoGPTQ wrote one of zeros for every layer."""
        ours = names.to_meta(theirs)
        is_known = ours is not None and names.numberless(ours) in names.weights_of(settings.args)
        return self._quantization is not None and theirs.endswith(".bias") and not is_known

    def _unpacked(self, layer: str, parts: Mapping[str, Part], settings: Settings) -> dict[str, Found]:
        """The weights that a packed layer is, with their scales where it stays narrow.

        Raises:
            CheckpointError: see PackedLayer; or it has not as many rows as the weights that are fused in it.
        """
        assert self._quantization is not None
        opened, theirs = PackedLayer(self._quantization, layer, parts), f"{layer}.weight"
        channels, width = opened.shape
        path, group = opened.file.path, opened.group
        ours = names.to_meta(theirs) or f"{theirs} (no weight of LLaMA's)"
        rows = {name: whole_shape(name, settings.args)[0] for name in names.fused_in(theirs) if settings.is_fused}
        rows = rows or {ours: channels}
        if sum(rows.values()) != channels:
            raise CheckpointError(
                f"{path}: {layer} has {channels} rows, expected {sum(rows.values())}: those of {', '.join(rows)}"
            )
        first, found = 0, {}
        for name, count in rows.items():
            self._packed[name] = PackedHome(opened, layer, first, count)
            if group is None:
                found[name] = Found((count, width), torch.float32, path)
            else:
                found[name] = Found((count, width // 2), torch.uint8, path)
                found[names.scale_of(name)] = Found((count, width // group), opened.scale_dtype, path)
            first += count
        return found

    def rounded(self) -> dict[str, str]:
        """Also those that are widened: of AWQ, and of GPTQ with zero points."""
        label = "" if self._quantization is None else self._quantization.label
        return super().rounded() | {name: label for name, home in self._packed.items() if home.layer.group is None}

    def _cut(self, file: TensorFile, theirs: str, fused: Sequence[str], args: ModelArgs) -> dict[str, Found]:
        """The weights that are the rows of a fused one.

        Raises:
            CheckpointError: it has not as many rows as they have together.
        """
        header, first = file.headers[theirs], 0
        found = {}
        for name in fused:
            rows = whole_shape(name, args)[0]
            self._home[name] = Home(file, theirs, first, rows)
            found[name] = Found((rows, *header.shape[1:]), header.dtype, file.path)
            first += rows
        if header.shape[:1] != (first,):
            raise CheckpointError(
                f"{file.path}: tensor {theirs} is {list(header.shape)}, expected {first} rows: "
                f"those of {', '.join(fused)}"
            )
        return found

    def label(self, name: str) -> str:
        """A weight's name in Meta's and in this checkpoint's files."""
        if (packed := self._packed.get(names.weight_of_scales(name))) is not None:
            return f"{name} ({packed.name})"
        theirs = self._home[name].name if name in self._home else names.to_hugging_face(name)
        return f"{name} ({theirs})" if theirs and names.weight_of(name) else name

    def _let_go(self, name: str) -> None:
        weight = names.weight_of_scales(name)
        if weight in self._packed:
            self._packed[weight].layer.let_go()
        else:
            self._home[name].file.let_go()

    def _read(self, name: str) -> torch.Tensor:
        weight = names.weight_of_scales(name)
        if weight in self._packed:
            layer, _, first, rows = self._packed[weight]
            tensor = layer.widened() if layer.group is None else layer.packed() if name == weight else layer.scales()
            tensor = tensor[first : first + rows]
        else:
            home = self._home[name]
            tensor = home.file.read(home.name)
            if home.rows is not None:
                tensor = tensor[home.first : home.first + home.rows]
        if name.endswith(IN_HALVES):
            return to_pairs(tensor, self.args.head_dim, self.args.turned)
        return tensor.contiguous()


def to_pairs(weight: torch.Tensor, head_dim: int, turned: int) -> torch.Tensor:
    """Rows of wq or wk [heads x head_dim, dim], or a vector's numbers, from halves (transformers) to neighbouring pairs
    (Meta).

    Args:
        turned: how many of each head's rows are in halves, the first ones; the others stay.
    """
    heads = weight.reshape(-1, head_dim, *weight.shape[1:])
    halves = heads[:, :turned].reshape(-1, 2, turned // 2, *weight.shape[1:])  # [heads, half, pair, ...]
    return torch.cat((halves.transpose(1, 2).flatten(1, 2), heads[:, turned:]), dim=1).reshape(weight.shape)


def open_weights(directory: Path) -> list[TensorFile]:
    """Open the files that hold the weights: safetensors, or else pytorch_model.bin.

    Either is one file, or several with an index.

    Raises:
        CheckpointError: there are none, or both a whole file and an index; see also open_indexed.
    """
    kinds: tuple[tuple[type[TensorFile], str], ...] = (
        (SafetensorsFile, "model.safetensors"),
        (PickleFile, "pytorch_model.bin"),
    )
    for kind, whole in kinds:
        path, index = directory / whole, directory / f"{whole}.index.json"
        if os.path.lexists(index) and os.path.lexists(path):
            raise CheckpointError(
                f"{directory} has both {whole} and {index.name}, expected one of them: which is meant is not clear"
            )
        if not os.path.lexists(index) and not os.path.lexists(path):
            continue
        if kind is PickleFile:
            log.warning(
                "%s: pytorch_model.bin is a pickle; load it from people you trust only, or convert it in a sandbox",
                directory,
            )
        return [kind(path)] if os.path.lexists(path) else open_indexed(index, kind)
    parts = sorted(path.name for path in directory.iterdir() if path.suffix in (".safetensors", ".bin"))
    if parts:
        raise CheckpointError(
            f"{directory} holds {parts[0]} but no model.safetensors.index.json or pytorch_model.bin.index.json, which "
            "says what its files hold: download it"
        )
    raise CheckpointError(
        f"{directory} has neither model.safetensors nor model.safetensors.index.json nor pytorch_model.bin"
    )


def open_indexed(index: Path, kind: type[TensorFile]) -> list[TensorFile]:
    """Open all files that an index names, and compare the index with their headers.

    Raises:
        CheckpointError: a missing file, or a tensor that is in no file, in two, or in another one than the index says.
    """
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{index}: got no usable weight_map, expected an object from tensors' names to files' names"
        )
    there = {path.name for path in index.parent.iterdir()}
    for name, file in weight_map.items():
        if file not in there:
            raise CheckpointError(
                f"{index.parent / Path(file).name} is missing: {index.name} says that it holds {name}; "
                "download the file"
            )
    files = [kind(index.parent / file) for file in sorted(set(weight_map.values()))]
    _check_index(index, weight_map, files)
    return files


def _check_index(index: Path, weight_map: Mapping[str, str], files: Sequence[TensorFile]) -> None:
    held: dict[str, str] = {}
    for file in files:
        for name in file.headers:
            if name in held:
                raise CheckpointError(f"{file.path}: tensor {name} is in {held[name]}, too, expected every tensor once")
            held[name] = file.path.name
    for name in sorted(held.keys() | weight_map.keys()):
        if held.get(name) != weight_map.get(name):
            said, is_in = weight_map.get(name, "no file"), held.get(name, "no file")
            raise CheckpointError(f"{index}: says that tensor {name} is in {said}, but it is in {is_in}")
