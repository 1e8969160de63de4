"""Hugging Face's format: config.json with model.safetensors, in one file or several with an index.

Supported are LlamaForCausalLM, and MistralForCausalLM where it computes the same as LLaMA. Settings that would change
the computation in an unsupported way are refused by name; settings that change nothing (dropout, caches, token ids) are
ignored. Older checkpoints in pytorch_model.bin are read with a warning.

transformers rotates the two halves of a head's columns where Meta rotates neighbouring pairs, and stores the rows of wq
and wk in that order; ``read`` restores Meta's order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llama.checkpoint import names
from llama.checkpoint.files import PickleFile, SafetensorsFile, TensorFile
from llama.checkpoint.source import Found, Source
from llama.errors import CheckpointError
from llama.settings import read_config, read_json

log = logging.getLogger("llama")


class HFSource(Source):
    """A checkpoint in Hugging Face's format.

    Args:
        directory: with config.json and the weights.

    Raises:
        CheckpointError: a missing or damaged file, an index that contradicts the files, an unsupported setting, or see
            Source.
    """

    format = "huggingface"

    def __init__(self, directory: Path) -> None:
        settings = read_config(directory / "config.json")
        self._files = open_weights(directory)
        self._home: dict[str, TensorFile] = {}
        found = {}
        for file in self._files:
            for theirs, header in file.headers.items():
                if not names.DERIVED.fullmatch(theirs):
                    name = names.to_meta(theirs) or f"{theirs} (no weight of LLaMA's)"
                    self._home[name] = file
                    found[name] = Found(header.shape, header.dtype, file.path)
        super().__init__(directory, settings, found, tuple(file.path for file in self._files))

    def label(self, name: str) -> str:
        """A weight's name in Meta's and in this checkpoint's files."""
        theirs = names.to_hugging_face(name)
        return f"{name} ({theirs})" if theirs else name

    def _let_go(self, name: str) -> None:
        self._home[name].let_go()

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._home[name].read(names.to_hugging_face(name) or name).contiguous()
        if name.endswith((".wq.weight", ".wk.weight")):
            return to_pairs(tensor, self.args.head_dim)
        return tensor


def to_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of wq or wk [heads x head_dim, dim] from halves (transformers) to neighbouring pairs (Meta)."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])  # [heads, half, pair, dim]
    return halves.transpose(1, 2).reshape(weight.shape)


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
        if index.exists() and path.exists():
            raise CheckpointError(
                f"{directory} has both {whole} and {index.name}, expected one of them: which is meant is not clear"
            )
        if not index.exists() and not path.exists():
            continue
        if kind is PickleFile:
            log.warning(
                "%s: pytorch_model.bin is a pickle; load it from people you trust only, or convert it in a sandbox",
                directory,
            )
        return [kind(path)] if path.exists() else open_indexed(index, kind)
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
                f"{index.parent / Path(file).name} is missing: {index.name} says that it holds {name}"
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
