"""Our own format: safetensors with Meta's names, and a params.json.

    model.safetensors   or   model-00001-of-0000N.safetensors and on, with model.safetensors.index.json

The files' metadata hold the format and its version, the format that they were converted from, the dtype, the content of
params.json, and a digest of all that with the table of tensors. So a changed header is refused even if it is still
valid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.files import SafetensorsFile, TensorFile
from llama.checkpoint.hf_safetensors import open_weights
from llama.checkpoint.names import is_scale
from llama.checkpoint.source import Found, Source, TensorInfo, dtype_name
from llama.config import ModelArgs
from llama.errors import CheckpointError
from llama.settings import Settings, read_params

FORMAT = "llama-xla"
VERSION, GROUPS_VERSION = "1", "2"  # the second has weights in groups, int4 or int8: readers of the first refuse it
INDEX = "model.safetensors.index.json"


class NativeSource(Source):
    """A checkpoint that ``llama-xla convert`` wrote.

    Args:
        directory: with params.json and the weights.

    Raises:
        CheckpointError: a missing or damaged file, a newer version, or see Source.
    """

    format = FORMAT
    may_be_quantised = True

    def __init__(self, directory: Path) -> None:
        args = read_params(directory)
        files = open_weights(directory)
        notes = [_checked_metadata(file, args, directory) for file in files]
        self._home = {name: file for file in files for name in file.headers}
        found = {name: Found(*file.headers[name], file.path) for name, file in self._home.items()}
        window, axis = notes[0].get("sliding_window"), notes[0].get("embedding_axis")
        settings = Settings(
            args, directory / "params.json", int(window) if window else None, int(axis) if axis else None
        )
        super().__init__(directory, settings, found, tuple(file.path for file in files))

    def _let_go(self, name: str) -> None:
        self._home[name].let_go()

    def _read(self, name: str) -> torch.Tensor:
        return self._home[name].read(name)


def is_native(file: TensorFile) -> bool:
    """Whether a file's metadata name this format."""
    return file.metadata.get("format") == FORMAT


def make_metadata(notes: Mapping[str, str], table: Mapping[str, Any], args: ModelArgs) -> dict[str, str]:
    """The metadata of one file.

    Args:
        notes: ``version``, ``source``, ``dtype``, and if known ``sliding_window`` and ``embedding_axis``.
        table: the header's entries: dtype, shape and data_offsets by name.
        args: the content of params.json.
    """
    metadata = {"format": FORMAT, **notes, "params": json.dumps(args.to_params(), sort_keys=True)}
    return {**metadata, "digest": _digest(metadata, table)}


def _digest(metadata: Mapping[str, str], table: Mapping[str, Any]) -> str:
    covered = {"metadata": dict(metadata), "tensors": dict(table)}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _checked_metadata(file: TensorFile, args: ModelArgs, directory: Path) -> dict[str, str]:
    """Return a file's metadata after comparing them with its table and with params.json."""
    if not isinstance(file, SafetensorsFile) or not is_native(file):
        raise CheckpointError(f"{file.path} was not written by llama-xla convert, other files of {directory} were")
    metadata = dict(file.metadata)
    if metadata.get("version") not in (VERSION, GROUPS_VERSION):
        raise CheckpointError(
            f"{file.path}: got format version {metadata.get('version')}, expected {VERSION} or {GROUPS_VERSION}: "
            "update llama-xla"
        )
    digest = metadata.pop("digest", None)
    if digest != _digest(metadata, file.table()):
        raise CheckpointError(
            f"{file.path}: the header does not match its digest: it was changed after it had been written"
        )
    if metadata["params"] != json.dumps(args.to_params(), sort_keys=True):
        raise CheckpointError(
            f"{file.path} belongs to another params.json than {directory / 'params.json'}, which was changed "
            "or mistaken"
        )
    return metadata


def version_of(infos: Mapping[str, TensorInfo]) -> str:
    """The format's version that holds some weights."""
    has_groups = any(is_scale(name) and len(info.shape) > 1 for name, info in infos.items())
    return GROUPS_VERSION if has_groups else VERSION


def dtype_label(dtypes: set[torch.dtype]) -> str:
    """Join the dtypes of a checkpoint in one word: ``bfloat16``, or ``bfloat16+float32``; bytes are int4's."""
    return "+".join(sorted("int4" if dtype == torch.uint8 else dtype_name(dtype) for dtype in dtypes))


def shards_of(sizes: Mapping[str, int], most: int | None) -> list[list[str]]:
    """Group weights, in order, into files of at most ``most`` bytes.

    A weight that is larger gets a file of its own.
    """
    groups: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if room is not None and size > room and groups[-1]:
            groups.append([])
            room = most
        groups[-1].append(name)
        room = None if room is None else room - size
    return groups


def file_names(count: int) -> list[str]:
    """Return the names of ``count`` files."""
    return (
        ["model.safetensors"]
        if count == 1
        else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    )


def index_of(groups: Mapping[str, list[str]], total_size: int) -> dict[str, Any]:
    """Return the index of several files: which weight is in which, as in Hugging Face's index."""
    return {
        "metadata": {"total_size": total_size},
        "weight_map": {weight: file for file, group in groups.items() for weight in group},
    }
