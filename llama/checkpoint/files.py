"""One file of a checkpoint: JSON, or tensors that are memory-mapped and read one at a time.

Opening a file reads its header only. A tensor that is read is a view of the mapping; its bytes come from the disk when
they are first used. Touched pages of a mapping count as resident memory until it is closed, so a file is mapped anew
after each thirty-second part of it; a view keeps its mapping alive.

``weights_only`` keeps pickled code out; what it does not guard against on torch 2.9 is said in docs/checkpoints.md
(CVE-2026-24747): load a stranger's .pth or .bin file in a sandbox only.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open

from llama.checkpoint.pickles import check_names, would_run
from llama.errors import CheckpointError
from llama.regular_files import check_regular, hint, reason_of
from llama.settings import first_line

SMALLEST_REMAP = 4 * 2**20  # bytes
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # by safetensors' names
INTEGERS = {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}  # of quantised weights
KNOWN = {**FLOATING, **INTEGERS}
LONGEST_REASON = 120  # characters of what torch says about a pickle


class Header(NamedTuple):
    """One tensor as a file's header describes it; ``dtype`` is a string if it is not supported."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


class TensorFile(ABC):
    """A file of named tensors.

    Args:
        path: the file.

    Attributes:
        headers: shape and dtype of every tensor, by name.
        metadata: the other entries of the header.

    Raises:
        CheckpointError: the file cannot be opened, or its header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._touched = 0
        try:
            check_regular(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error
        self._get: Callable[[str], torch.Tensor] | None = self._open()
        self.headers = self._headers()
        try:
            self._remap_after = max(SMALLEST_REMAP, path.stat().st_size // 32)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    @abstractmethod
    def _open(self) -> Callable[[str], torch.Tensor]:
        """Map the file; return a function from a tensor's name to the tensor."""

    @abstractmethod
    def _headers(self) -> dict[str, Header]:
        """Return shape and dtype of every tensor without reading one."""

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as a view of the mapped file: do not write to it.

        Raises:
            CheckpointError: the file was changed since it was opened.
        """
        self.let_go()
        if self._get is None:
            self._get = self._open()
        try:
            tensor = self._get(name)
        except (KeyError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read: {first_line(error)}") from error
        if (tuple(tensor.shape), tensor.dtype) != self.headers[name]:
            raise CheckpointError(
                f"{self.path} was changed while it was being read: tensor {name} now has another shape or dtype"
            )
        self._touched += tensor.numel() * tensor.element_size()
        return tensor

    def let_go(self) -> None:
        """Close the mapping if enough of it was touched.

        Views keep the old mapping alive; the next ``read`` maps the file anew.
        """
        if self._touched > self._remap_after:
            self._get = None
            self._close()
            self._touched = 0

    @abstractmethod
    def _close(self) -> None:
        """Drop the mapping."""


class SafetensorsFile(TensorFile):
    """A .safetensors file; its library checks that the header covers the file without gaps or overlaps."""

    def _open(self) -> Callable[[str], torch.Tensor]:
        try:
            self._handle = cast(Any, safe_open(self.path, framework="pt"))
            self.metadata = self._handle.metadata() or {}
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is not a safetensors file, or a damaged one: {first_line(error)}{hint(self.path)}"
            ) from error
        get: Callable[[str], torch.Tensor] = self._handle.get_tensor
        return get

    def _close(self) -> None:
        self._handle = None

    def _headers(self) -> dict[str, Header]:
        slices = ((name, self._handle.get_slice(name)) for name in self._handle.keys())  # noqa: SIM118 (it is no dict)
        return {name: Header(tuple(s.get_shape()), KNOWN.get(s.get_dtype(), s.get_dtype())) for name, s in slices}

    def table(self) -> dict[str, Any]:
        """Return the header's entries as written: dtype, shape and data_offsets by name."""
        with self.path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        return header


class PickleFile(TensorFile):
    """A .pth or .bin file that torch.save wrote."""

    def _open(self) -> Callable[[str], torch.Tensor]:
        if not zipfile.is_zipfile(self.path):
            with self.path.open("rb") as file:
                start = file.read(16)
            warning = _warning(self.path)
            raise CheckpointError(
                f"{self.path} is not a checkpoint: got {self.path.stat().st_size} bytes that begin with {start!r}, "
                "expected the zip archive that torch.save writes since 1.6"
                + (f"; it may be cut short{warning}" if warning else hint(self.path))
            )
        try:
            check_names(self.path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a protocol that torch.save does not write: it fails below
                loaded: Any = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # the restricted unpickler fails in many ways on damaged input, all of them harmless
            reason = _warning(self.path).removeprefix("; ") or _unpickling_failed(error)
            raise CheckpointError(f"{self.path} is not a checkpoint, or a damaged one: {reason}") from error
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{self.path}: got a {type(loaded).__name__}, expected a dict of tensors by name")
        for name, tensor in loaded.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise CheckpointError(
                    f"{self.path}: got a {type(tensor).__name__} under {name!r}, expected a dict of tensors by name"
                )
            if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
                raise CheckpointError(
                    f"{self.path}: tensor {name} is not a plain one (sparse, quantised, or without data)"
                )
        self._loaded: dict[str, torch.Tensor] = loaded
        return lambda name: loaded[name].detach()

    def _close(self) -> None:
        self._loaded = {}

    def _headers(self) -> dict[str, Header]:
        self._check_records()
        known = set(FLOATING.values())
        return {
            n: Header(tuple(t.shape), t.dtype if t.dtype in known else str(t.dtype)) for n, t in self._loaded.items()
        }

    def _check_records(self) -> None:
        """Check that the archive holds every tensor's bytes.

        For a record that is too short, mapping would silently read the next record's bytes.
        """
        storages = [tensor.untyped_storage() for tensor in self._loaded.values()]
        wanted = Counter({s.data_ptr(): s.nbytes() for s in storages}.values())
        with zipfile.ZipFile(self.path) as archive:
            short = wanted - Counter(info.file_size for info in archive.infolist() if "/data/" in info.filename)
        if short:
            missing = (
                f"{short.total()} tensors have no record of their size in it, for instance one of {min(short)} bytes"
            )
            raise CheckpointError(f"{self.path} is not a checkpoint, or a damaged one: {missing}")


def _warning(path: Path) -> str:
    """Return what a file's pickle would run, as the end of a message; empty if that is nothing."""
    names = would_run(path)
    return (
        f"; it holds more than tensors: pickle would run {names}, which is never done here; do not load it "
        "elsewhere, ask its author for safetensors"
        if names
        else ""
    )


def _unpickling_failed(error: Exception) -> str:
    """Return torch's reason without its advice to load the file nevertheless."""
    _, is_unpickling, reason = str(error).rpartition("WeightsUnpickler error:")
    line = (reason.strip().partition("\n")[0] if is_unpickling else first_line(error))[:LONGEST_REASON]
    if isinstance(error, OSError) or (isinstance(error, RuntimeError) and "weights_only" not in line):
        return line  # of the file, or the archive
    line = "no reason given" if not line or "weights_only" in line else line
    return f"its pickle is damaged, or none that torch.save writes ({type(error).__name__}: {line})"
