"""The header of a GGUF file: its metadata, and the names, shapes, types and places of its tensors.

No tensors here: `plan` and the tokenizers read a header without torch. The library gguf names the types; its own reader
is not used, because it makes an array object for every string (seconds for a vocabulary of 128,000) and does not check
counts and lengths against the file (a damaged one makes it run for hours).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from llama.config import LARGEST_SIZE
from llama.errors import CheckpointError
from llama.regular_files import check_regular, hint

SUFFIX = ".gguf"
OTHER_WEIGHTS = (".safetensors", ".pth", ".bin")
MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4
LONGEST_NAME = 64  # bytes of a tensor's name
SHORTEST_ENTRY = 8  # bytes: what an entry of metadata, a tensor or a string in an array takes at least
SCALARS = dict(enumerate("BbHhIif?**Qqd"))  # struct's letters by GGUF's numbers
BOOL, STRING, ARRAY = 7, 8, 9


class StoredTensor(NamedTuple):
    """A tensor as the header describes it.

    Attributes:
        shape: in torch's order.
        kind: by gguf's name, such as ``Q4_K``.
        start: of its data, in bytes from the beginning of the file.
        size: of its data in bytes.
    """

    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


class GGUFHeader(NamedTuple):
    """A header that was read and checked. Do not change it: others share it."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def gguf_in(path: Path) -> Path | None:
    """Return the GGUF file that a path stands for, or None.

    It is the file itself, or the only one of a directory that holds no weights of another format.
    """
    if os.path.isfile(path):
        return path if path.suffix.lower() == SUFFIX or _magic(path) == MAGIC else None
    try:
        files = list(path.iterdir())
    except (OSError, ValueError):
        return None
    found = [file for file in files if file.suffix.lower() == SUFFIX]
    return found[0] if len(found) == 1 and not any(file.suffix in OTHER_WEIGHTS for file in files) else None


def read_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file; the last ones are kept in memory.

    Raises:
        CheckpointError: the file cannot be read, is none of version 2 or 3, is damaged or cut short, or is one of
            several parts.
    """
    try:
        check_regular(path)
        status = path.stat()
        return _read_header(path, status.st_mtime_ns, status.st_size, status.st_ino)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=2)
def _read_header(path: Path, changed: int, size: int, inode: int) -> GGUFHeader:
    """``read_header``; the other arguments tell a file that was changed."""
    magic = _magic(path)
    if magic != MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}{hint(path)}")
    try:
        with path.open("rb") as file:
            cursor = _Cursor(file.read, size)
            cursor.take(len(MAGIC))
            _check_version(cursor.number("I"))
            n_tensors, n_entries = cursor.count(), cursor.count()
            metadata = _metadata(cursor, n_entries)
            _check_parts(metadata)
            described = [_tensor(cursor) for _ in range(n_tensors)]
            tensors = _placed(described, file.tell(), _alignment(metadata), size)
    except ValueError as error:
        raise CheckpointError(f"{path} is a damaged GGUF file, or not supported: {error}") from error
    return GGUFHeader(path, metadata, tensors)


def _magic(path: Path) -> bytes:
    try:
        check_regular(path)
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError:
        return b""


class _Cursor:
    """Reads the parts of a header one after the other; a ValueError says what does not fit in the file."""

    def __init__(self, read: Callable[[int], bytes], left: int) -> None:
        self._read = read
        self.left = left

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise ValueError(f"it ends within its header ({size} bytes expected, {self.left} left); fetch it again")
        self.left -= size
        data = self._read(size)
        if len(data) != size:
            raise ValueError("it became shorter while it was read")
        return data

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(letter)))
        return value

    def count(self) -> int:
        """The number of entries that follow, as far as the file has room for them."""
        found: int = self.number("Q")
        if found * SHORTEST_ENTRY > self.left:
            raise ValueError(f"it declares {found} entries in {self.left} bytes; fetch it again")
        return found

    def text(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise ValueError(f"the text {data[:40]!r} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array(self.number("I"))
        if kind == BOOL:
            flag = self.number("B")
            if flag > 1:
                raise ValueError(f"a truth value is {flag}, expected 0 or 1")
            return bool(flag)
        return self.number(_letter(kind))

    def _array(self, kind: int) -> list[Any]:
        if kind == STRING:
            return [self.text() for _ in range(self.count())]
        length: int = self.number("Q")
        letter = "B" if kind == BOOL else _letter(kind)
        return list(struct.unpack(f"<{length}{letter}", self.take(length * struct.calcsize(letter))))


def _letter(kind: int) -> str:
    if kind not in SCALARS or SCALARS[kind] == "*":
        raise ValueError(f"a value has type {kind}, expected 0 to {len(SCALARS) - 1} (no arrays in arrays)")
    return SCALARS[kind]


def _check_version(version: int) -> None:
    if version in VERSIONS:
        return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    order = (
        ": it is for big-endian machines; convert the original for little-endian ones" if swapped in VERSIONS else ""
    )
    raise ValueError(f"its version is {version}, expected {' or '.join(map(str, VERSIONS))}{order}")


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text()
        if key in found:
            raise ValueError(f"it has the key {key[:80]} twice")
        found[key] = cursor.value(cursor.number("I"))
    return found


def _check_parts(metadata: dict[str, Any]) -> None:
    parts = metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise ValueError(
            f"it is one of {parts} parts (split.count), expected a whole one: join them with llama-gguf-split --merge"
        )


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {str(alignment)[:40]}, expected a power of two from 8")
    return alignment


class _Described(NamedTuple):
    """A tensor's entry as written."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _tensor(cursor: _Cursor) -> _Described:
    name, dimensions = cursor.text(), cursor.number("I")
    if len(name.encode()) > LONGEST_NAME or not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {dimensions} dimensions and the name {name[:80]!r}")
    sizes = [cursor.number("Q") for _ in range(dimensions)]
    if not all(1 <= size <= LARGEST_SIZE for size in sizes):
        raise ValueError(f"tensor {name} has the sizes {sizes}")
    return _Described(name, tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q"))


def _placed(described: list[_Described], end_of_header: int, alignment: int, file_size: int) -> dict[str, StoredTensor]:
    """Return the tensors by name; their data must fill the rest of the file, in order, padded to the alignment."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    tensors: dict[str, StoredTensor] = {}
    begin, end = _padded(end_of_header, alignment), 0
    for each in described:
        if each.name in tensors:
            raise ValueError(f"it has the tensor {each.name} twice")
        try:
            kind = GGMLQuantizationType(each.kind)
        except ValueError:
            raise ValueError(f"tensor {each.name} has the unknown type {each.kind}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if each.shape[-1] % block:
            raise ValueError(
                f"tensor {each.name} has rows of {each.shape[-1]}, expected a multiple of {block} ({kind.name})"
            )
        size = prod(each.shape) // block * block_bytes
        if each.offset != _padded(end, alignment):
            raise ValueError(f"tensor {each.name} begins at {each.offset}, expected {_padded(end, alignment)}")
        end = each.offset + size
        tensors[each.name] = StoredTensor(each.shape, kind.name, begin + each.offset, size)
    if not begin + end <= file_size <= begin + _padded(end, alignment):
        raise ValueError(f"it has {file_size} bytes, expected {begin + end} as its header says; fetch it again")
    return tensors


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def read_floats(header: GGUFHeader, name: str) -> list[float]:
    """Return the numbers of a small float32 tensor.

    Raises:
        CheckpointError: it is of another type, or the file cannot be read.
    """
    tensor = header.tensors[name]
    if tensor.kind != "F32" or tensor.size > 2**16:
        raise CheckpointError(f"{header.path}: tensor {name} is {tensor.kind} {list(tensor.shape)}, expected a few F32")
    try:
        with header.path.open("rb") as file:
            file.seek(tensor.start, os.SEEK_SET)
            return list(struct.unpack(f"<{tensor.size // 4}f", file.read(tensor.size)))
    except (OSError, struct.error) as error:
        raise CheckpointError(f"{header.path} cannot be read: {error}") from error
