"""Write checkpoint files safely: complete or absent, verified, and without holding tensors in memory.

A directory is written under a temporary name beside its own and renamed at the end. It is locked meanwhile, which shows
the next run what a killed one has left. Every file's bytes are hashed on
their way to the disk, then read back from it and hashed again. Of the tensors, only those that are being moved are in
memory: torch.save, which takes all of a file's tensors at once, gets them as a mapped scratch file whose pages are
released as they are written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn, cast

import torch

from llama.checkpoint.checksums import sha256_of
from llama.checkpoint.files import KNOWN
from llama.errors import CheckpointError
from llama.xla.transfers import ALIGNMENT

log = logging.getLogger("llama")

PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial")
RELEASE_AFTER = 16 * 2**20  # bytes
DTYPE_NAMES = {dtype: name for name, dtype in KNOWN.items()}
TERMINATED = 128 + signal.SIGTERM


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``target``; rename it to ``target`` if the block succeeds.

    If the block fails (an error, Ctrl-C, SIGTERM), the temporary directory is removed. SIGKILL leaves it
    there; the next run for the same target removes it, and the log names those of other targets.

    Raises:
        CheckpointError: ``target`` exists, its parent does not, another process is writing it, or the file system
            reports an error.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} is there already and is not overwritten; remove it, or choose another name")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(f"{target.absolute().parent} is not a directory; make it first")
    temporary = target.absolute().parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        _clear_leftovers(target.absolute())
        temporary.mkdir()
        with _sigterm_raises(), _locked(temporary):
            yield temporary
            temporary.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error}; nothing of it was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _clear_leftovers(target: Path) -> None:
    """Remove what killed runs for ``target`` have left beside it, and log what those for other targets have.

    Raises:
        CheckpointError: another process is writing ``target``.
    """
    for path in sorted(target.parent.iterdir()):
        found = PARTIAL.fullmatch(path.name)
        if found is None or not path.is_dir():
            continue
        abandoned, is_own = _is_abandoned(path), found[1] == target.name
        if is_own and abandoned:
            log.warning("Removing %s, which a run that was killed has left", path)
            shutil.rmtree(path, ignore_errors=True)
        elif is_own and abandoned is False:
            raise CheckpointError(
                f"{target} is being written by another process, into {path}; wait for it, or choose another name"
            )
        elif abandoned is not False:
            log.warning(
                "%s is there, which a run that was killed has left%s; remove it",
                path,
                "" if abandoned else ", unless one on another machine is writing it",
            )


def _is_abandoned(path: Path) -> bool | None:
    """Whether no process is writing a temporary directory; None where the file system cannot tell."""
    try:
        with _locked(path, must=True):
            return True
    except BlockingIOError:
        return False
    except OSError:
        return None


@contextmanager
def _locked(path: Path, must: bool = False) -> Iterator[None]:
    """Hold a lock on a directory, which ends with the process at the latest.

    Args:
        path: of the directory.
        must: raise OSError where that fails; without it, a file system that has no such locks is written all the same.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if must:
                raise
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception inside the block, so that it can clean up; main thread only."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class HashedFile:
    """A new file that is written from front to back and hashed on the way; a context, which closes it.

    Args:
        path: must not exist.
        wrote: called with the number of bytes after every write.
    """

    def __init__(self, path: Path, wrote: Callable[[int], None] | None = None) -> None:
        self.path = path
        self._wrote = wrote
        self._hash = hashlib.sha256()
        self._file = path.open("xb")

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        self._hash.update(data)
        written = self._file.write(data)
        if self._wrote is not None:
            self._wrote(written)
        return written

    def flush(self) -> None:
        """Flush buffered bytes to the system; torch.save requires this method."""
        self._file.flush()

    def finish(self) -> str:
        """Bring the file to the disk, read it back, and return its sha256.

        Raises:
            CheckpointError: what was read back is not what was written.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        os.posix_fadvise(
            self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED
        )  # so that the disk is read and not the page cache
        if sha256_of(self.path) != self._hash.hexdigest():
            raise CheckpointError(
                f"{self.path}: what was read back is not what was written: the disk or the file system is at fault"
            )
        return self._hash.hexdigest()


def write_bytes(path: Path, content: bytes) -> str:
    """Write a small file; returns its sha256."""
    with HashedFile(path) as file:
        file.write(content)
        return file.finish()


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Encode an object as the JSON files of a checkpoint are written."""
    return (json.dumps(content, indent=2) + "\n").encode()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


class Scratch:
    """A context that collects the tensors of one shard in a file, for torch.save.

    Args:
        path: must not exist; removed by ``pack``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb")
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor."""
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        self._places[name] = (self._file.tell(), tensor.dtype, tensor.shape)
        self._file.write(raw_bytes(tensor))

    def pack(self, path: Path, wrote: Callable[[int], None]) -> str:
        """Write all tensors as a .pth file, remove this file, and return the new one's sha256.

        ``wrote`` as for HashedFile.
        """
        self._file.close()
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = {
            name: torch.frombuffer(mapped, dtype=dtype, count=shape.numel(), offset=start).view(shape)
            for name, (start, dtype, shape) in self._places.items()
        }
        pending = 0

        def let_go(written: int) -> None:
            nonlocal pending
            pending += written
            if pending > RELEASE_AFTER:
                mapped.madvise(mmap.MADV_DONTNEED)
                pending = 0
            wrote(written)

        with HashedFile(path, let_go) as target:
            try:
                torch.save(tensors, cast(IO[bytes], target))  # it calls write and flush only
            except RuntimeError as error:  # after Ctrl-C or a full disk it complains about the unfinished file instead
                raise error.__context__ or error from None
            self.path.unlink()
            return target.finish()


def write_safetensors(
    path: Path, table: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str], tensors: Iterable[torch.Tensor]
) -> str:
    """Write a .safetensors file tensor by tensor; returns its sha256.

    The library's writer takes all tensors of the file at once, so it is not used. The file is 8 bytes with the header's
    length, the header in JSON padded with spaces, and the tensors, which begin where the CPU device can use them
    without a copy.

    Args:
        path: must not exist.
        table: from ``safetensors_table``.
        metadata: of the file.
        tensors: in the table's order.
    """
    header = json.dumps({"__metadata__": dict(metadata), **table}).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    with HashedFile(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for tensor in tensors:
            file.write(raw_bytes(tensor))
        return file.finish()


def safetensors_table(infos: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, dict[str, Any]]:
    """Return the header's entries for tensors of these shapes and dtypes.

    The widest dtypes come first, so that every tensor is aligned.
    """
    table: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (shape, dtype) in sorted(infos.items(), key=lambda item: -item[1][1].itemsize):
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    return table
