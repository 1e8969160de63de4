"""What the files of the drafting room have in common: which tokenizer they belong to, a header, safe writing.

    16 bytes    what it is, in ASCII
    u32         version of the format
    u32         vocabulary size
    32 bytes    sha256 of the vocabulary
    4 x u64     sizes, which the kind of file gives a meaning
    u32         CRC-32 of all that follows the header
    u32         CRC-32 of the header up to here

All numbers are little-endian. The sizes say how long the file is, so a truncated one is noticed without reading it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from llama.errors import DatastoreError
from llama.tokenizer.base import Tokenizer

_LAYOUT = struct.Struct("<16sII32s4QI")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _LAYOUT.size + _CHECKSUM.size
_VERSION_END = 20
_READ = 2**22  # bytes at a time


class Fingerprint(NamedTuple):
    """A vocabulary: equal ones have equal fingerprints, whatever file they were read from.

    Attributes:
        vocab_size: number of ids.
        digest: sha256 of the bytes of all ids.
    """

    vocab_size: int
    digest: bytes

    def __str__(self) -> str:
        return f"{self.digest.hex()[:12]} ({self.vocab_size} ids)"


def fingerprint(tokenizer: Tokenizer) -> Fingerprint:
    """The fingerprint of a tokenizer's vocabulary: the bytes of its ids, in order, each with its length before it."""
    digest = hashlib.sha256()
    for token_id in range(tokenizer.n_words):
        data = tokenizer.token_bytes(token_id)
        digest.update(len(data).to_bytes(4, "little") + data)
    return Fingerprint(tokenizer.n_words, digest.digest())


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        name: as errors call it.
        magic: 16 bytes that a file begins with.
        version: of the format that is written, and the only one that is read.
        cure: what helps where a file cannot be used.
    """

    name: str
    magic: bytes
    version: int
    cure: str


class Header(NamedTuple):
    """The beginning of a file.

    Attributes:
        fingerprint: the vocabulary that it belongs to.
        sizes: four numbers.
        checksum: CRC-32 of the rest.
    """

    fingerprint: Fingerprint
    sizes: tuple[int, int, int, int]
    checksum: int

    def pack(self, kind: Kind) -> bytes:
        """The header as bytes."""
        data = _LAYOUT.pack(kind.magic, kind.version, *self.fingerprint, *self.sizes, self.checksum)
        return data + _CHECKSUM.pack(zlib.crc32(data))


def read_header(path: Path, kind: Kind, body_bytes: Callable[[tuple[int, int, int, int]], int]) -> Header:
    """Read a file's header and check the file's length.

    Args:
        path: the file.
        kind: what it should be.
        body_bytes: how many bytes follow a header with these sizes.

    Raises:
        DatastoreError: the file is absent, of another kind or version, damaged, or too short or long.
    """
    try:
        with path.open("rb") as file:
            data = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DatastoreError(f"no {kind.name} at {path} ({error.strerror}); {kind.cure}") from error
    if data[: len(kind.magic)] != kind.magic:
        raise DatastoreError(f"{path} is no {kind.name}: it begins with {data[:16]!r}, expected {kind.magic!r}")
    version = int.from_bytes(data[len(kind.magic) : _VERSION_END], "little")
    if version != kind.version and len(data) >= _VERSION_END:
        raise DatastoreError(f"{path} is a {kind.name} of version {version}, expected {kind.version}; {kind.cure}")
    if len(data) < HEADER_BYTES:
        raise DatastoreError(f"{path} ends within its header: got {size} bytes, expected {HEADER_BYTES}; {kind.cure}")
    if zlib.crc32(data[: _LAYOUT.size]) != _CHECKSUM.unpack(data[_LAYOUT.size :])[0]:
        raise DatastoreError(f"{path}: its header is damaged (its checksum differs); {kind.cure}")
    _, _, vocab_size, digest, *sizes, checksum = _LAYOUT.unpack(data[: _LAYOUT.size])
    header = Header(Fingerprint(vocab_size, digest), (sizes[0], sizes[1], sizes[2], sizes[3]), checksum)
    expected = HEADER_BYTES + body_bytes(header.sizes)
    if size != expected:
        raise DatastoreError(f"{path} is damaged: got {size} bytes, expected {expected}; {kind.cure}")
    return header


def check_fingerprint(path: Path, kind: Kind, found: Fingerprint, expected: Fingerprint) -> None:
    """Compare a file's vocabulary with the tokenizer's.

    Raises:
        DatastoreError: they differ.
    """
    if found != expected:
        raise DatastoreError(
            f"{path} belongs to another tokenizer: got vocabulary {found}, expected {expected}; {kind.cure}"
        )


def body_checksum(path: Path) -> int:
    """CRC-32 of what follows a file's header; reads all of it."""
    checksum = 0
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while data := file.read(_READ):
            checksum = zlib.crc32(data, checksum)
    return checksum


class Body:
    """The part of a new file after its header: written from front to back, and summed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.checksum = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self.checksum = zlib.crc32(data, self.checksum)
        self._file.write(data)


def write_file(
    path: Path, kind: Kind, vocabulary: Fingerprint, sizes: tuple[int, int, int, int], fill: Callable[[Body], None]
) -> None:
    """Write a file under a temporary name beside ``path``, and rename it when it is complete on the disk.

    A file of the same kind is replaced; who has it open keeps the old one.

    Args:
        path: the file.
        kind: of the file.
        vocabulary: that it belongs to.
        sizes: for its header.
        fill: writes what follows the header.

    Raises:
        DatastoreError: the file system reports an error; nothing is left behind.
    """
    temporary = path.absolute().parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        with temporary.open("xb") as file:
            file.write(bytes(HEADER_BYTES))
            body = Body(file)
            fill(body)
            file.seek(0)
            file.write(Header(vocabulary, sizes, body.checksum).pack(kind))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DatastoreError(f"{path} could not be written: {error.strerror}; nothing of it was kept") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_target(path: Path, kind: Kind) -> None:
    """Refuse a path that cannot be written, or where something else is, before any work is done for it.

    Raises:
        DatastoreError: its directory is absent, or it is no file of this kind.
    """
    if not path.absolute().parent.is_dir():
        raise DatastoreError(f"{path}: {path.absolute().parent} is not a directory; make it first")
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            found = file.read(len(kind.magic))
    except OSError as error:
        raise DatastoreError(f"{path} cannot be read ({error.strerror}); choose another name") from error
    if found != kind.magic:
        raise DatastoreError(f"{path} is there already and is no {kind.name}: not overwritten; choose another name")
