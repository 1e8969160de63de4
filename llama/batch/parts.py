"""Results on the disk: each process appends to a part of its own, and the last one merges the parts.

    OUT.parts/part-00000.jsonl     of rank 0: a header, then a record for each line that has ended, in any order
    OUT.parts/merge.lock           held by the process that merges
    OUT.parts/merged.jsonl         what becomes OUT, by a rename, when it is complete

A record holds its line's index, so that any number of processes may go on with the parts of any other number. A record
that is torn, because its process was killed, does not count; its line is run again. A process holds a lock on its part
while it runs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama.batch.lines import InputLines
from llama.batch.records import as_bytes
from llama.batch.settings import RunSettings
from llama.errors import FlagError, setting
from llama.ranks import Ranks

log = logging.getLogger("llama.batch")

FORMAT = 1
PATTERN = "part-*.jsonl"
LOCK, MERGED = "merge.lock", "merged.jsonl"
BUFFER = 2**20
SHOWN_LINES = 5  # of those that a message names


class Header(NamedTuple):
    """The first line of a part.

    Attributes:
        lines: of the input.
        created: when the run began, in seconds since 1970.
        settings: what results depend on.
    """

    lines: int
    created: int
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The object that is written."""
        return {"llama_xla_batch": FORMAT, **self._asdict()}


class Merged(NamedTuple):
    """What a merge wrote.

    Attributes:
        lines: in all.
        failed: of them, those that are errors.
        cut: those with a text that ended before its grammar was satisfied.
    """

    lines: int
    failed: int
    cut: int = 0


@dataclass
class _Found:
    """The records of all parts, by line: in which part and where; -1 where there is none."""

    paths: list[Path]
    part: array[int]
    offset: array[int]
    failed: int = 0
    cut: int = 0

    @property
    def missing(self) -> list[int]:
        """The lines without a record."""
        return [index for index, part in enumerate(self.part) if part < 0]


class Parts:
    """The parts of a run; a context, within which the own part is open and locked.

    Args:
        output: what they become.
        ranks: this process among those that run.
        lines: of the input.
        settings: of this run.
        created: now, in seconds since 1970.
        restart: forget earlier parts, and overwrite the output.

    Attributes:
        header: the run's; of the first process that began it.

    Raises:
        FlagError: the output is there already, the parts are of another run, another process has the same rank, or the
            file system reports an error.
    """

    def __init__(
        self, output: Path, ranks: Ranks, lines: int, settings: RunSettings, created: int, *, restart: bool = False
    ) -> None:
        self.output, self.directory, self._ranks = output, parts_directory(output), ranks
        _check_output(output, self.directory, restart)
        if restart:
            _check_alone(ranks, self.directory)
            with _locked_parts(self.directory, f"end it before {setting('restart')}"):
                _remove(self.directory)
        self._own = self.directory / f"part-{ranks.rank:05}.jsonl"
        with _told(self.directory):
            self.directory.mkdir(exist_ok=True)
            self._file = os.open(self._own, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(self._file, self._own, ranks.rank)
            headers = [(path, header) for path in _parts(self.directory) if (header := read_header(path)) is not None]
            for path, header in headers:
                _check_same(path, header, lines, settings)
            self.header = Header(lines, min((h.created for _, h in headers), default=created), dict(settings.values))
            with _told(self._own):
                self._end = self._repair()
                self._found = _scan(self.directory, lines)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    def _repair(self) -> int:
        """Cut off a torn record, and write the header where there is none; return the part's length."""
        end = 0
        with open(self._own, "rb") as file:
            for line in file:
                end += len(line) if line.endswith(b"\n") else 0
        os.ftruncate(self._file, end)
        if end:
            return end
        header = as_bytes(self.header.as_json())
        _write(self._file, header, 0)
        return len(header)

    @property
    def is_done(self) -> bytes:
        """For each line, whether it has a record: 1 or 0."""
        return bytes(part >= 0 for part in self._found.part)

    def add(self, index: int, output: dict[str, Any], *, failed: bool, cut: bool = False) -> None:
        """Append what became of a line. It survives the end of this process, however that comes.

        Args:
            failed, cut: see ``Merged``.

        Raises:
            FlagError: the file system reports an error; earlier records stay whole.
        """
        record = as_bytes({"line": index, "failed": failed, "cut": cut, "output": output})
        with _told(self._own):
            try:
                _write(self._file, record, self._end)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file, self._end)
                raise
        self._end += len(record)

    def merge(self) -> Merged | None:
        """Merge all parts if this run is complete and nobody else has.

        Returns:
            None if lines are missing, which the log says, or another process has merged.

        Raises:
            FlagError: the file system reports an error; the parts stay.
        """
        with _told(self._own):
            os.fsync(self._file)
        with _merging(self.directory) as is_there:
            if not is_there:
                return None
            found = _scan(self.directory, self.header.lines)
            missing = found.missing
            if not missing:
                return _merge(found, self.output, self.directory)
        if any(index % self._ranks.world_size == self._ranks.rank for index in missing):
            raise FlagError(_missing_told(missing, None, self.output))  # of this process, which had them all
        log.info("%s", _missing_told(missing, self._ranks.world_size, self.output))
        return None


def parts_directory(output: Path) -> Path:
    """Where the parts of an output are."""
    return output.with_name(f"{output.name}.parts")


def merge_parts(output: Path, lines: InputLines | None = None) -> Merged:
    """Merge parts that were put in one directory, without a model.

    Args:
        lines: the input, if it is to be compared with that of the parts.

    Raises:
        FlagError: there are no parts, they are of different runs or of another input, lines are missing, a process
            still writes one, or the file system reports an error.
    """
    directory = parts_directory(output)
    if not directory.is_dir():
        raise FlagError(f"{directory}: no such directory; put the files {PATTERN} of all hosts in it")
    headers = [(path, header) for path in _parts(directory) if (header := read_header(path)) is not None]
    if not headers:
        raise FlagError(f"{directory} has no parts; put the files {PATTERN} of all hosts in it")
    _check_output(output, directory, restart=False)
    (_, first), *others = headers
    if lines is not None and lines.sha256 != first.settings.get("input"):
        raise FlagError(
            f"{lines.path} is not the input of the parts in {directory}; leave {setting('input')} out, or name it"
        )
    for path, header in others:
        _check_same(path, header, first.lines, RunSettings(first.settings))
    with _locked_parts(directory, "wait for its end"), _merging(directory) as is_there:
        if not is_there:
            raise FlagError(f"{directory}: another process has merged the parts meanwhile")
        with _told(directory):
            found = _scan(directory, first.lines)
        if found.missing:
            raise FlagError(_missing_told(found.missing, None, output))
        return _merge(found, output, directory)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_output(output: Path, directory: Path, restart: bool) -> None:
    """Refuse an output that must not be overwritten, or cannot be written."""
    if not output.absolute().parent.is_dir():
        raise FlagError(f"{output}: {output.absolute().parent} is not a directory; make it first")
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_file():
        raise FlagError(f"{output}: expected a new file, or a regular one; choose another name")
    if not restart and not _parts(directory):
        raise FlagError(
            f"{output} is there already and is not overwritten; choose another name, remove it, or run all lines again "
            f"by {setting('restart')}"
        )


def _check_alone(ranks: Ranks, directory: Path) -> None:
    if not ranks.is_alone:
        raise FlagError(
            f"{setting('restart')} with {ranks.world_size} processes: one could remove what another has begun; remove "
            f"{directory} before they start, and leave {setting('restart')} out"
        )


def _check_same(path: Path, header: Header, lines: int, settings: RunSettings) -> None:
    """Refuse a part of another run."""
    changes = settings.changes(header.settings)
    if not changes and header.lines != lines:
        changes = [f"the input had {header.lines} lines and has {lines}"]
    if changes:
        raise FlagError(
            f"{path} was written with another input or other settings: {'; '.join(changes)}. Run with those of then to "
            f"go on, or {setting('restart')} to forget what is done"
        )


def read_header(path: Path) -> Header | None:
    """A part's header; None where its process has not written it yet.

    Raises:
        FlagError: the file is something else, or cannot be read.
    """
    with _told(path), path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
        if value.pop("llama_xla_batch") != FORMAT or not isinstance(value["settings"], dict):
            raise ValueError
        return Header(int(value["lines"]), int(value["created"]), value["settings"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FlagError(f"{path} is no part of a batch of this version; move it away, or use another output") from None


def _missing_told(missing: Sequence[int], world_size: int | None, output: Path) -> str:
    """Which lines have no record, and what to do."""
    named = ", ".join(map(str, missing[:SHOWN_LINES])) + (", ..." if len(missing) > SHOWN_LINES else "")
    told = f"{len(missing)} lines are missing in {parts_directory(output)} (counted from 0: {named})"
    if world_size is None:
        return f"{told}; add the parts that hold them, or run the batch again, which does them"
    ranks = ", ".join(map(str, sorted({index % world_size for index in missing})))
    return (
        f"{told}, of rank {ranks}: the process that ends last merges. If the processes have no common file system, put "
        f"their files {PATTERN} in one directory {parts_directory(output).name} and run llama-xla batch --merge "
        f"--output {output.name}"
    )


# --- reading and merging ----------------------------------------------------------------------------------------------


def _parts(directory: Path) -> list[Path]:
    return sorted(directory.glob(PATTERN))


def _scan(directory: Path, lines: int) -> _Found:
    """Find the records of all parts; the first of a line counts."""
    found = _Found(_parts(directory), array("q", [-1]) * lines, array("q", [-1]) * lines)
    for number, path in enumerate(found.paths):
        damaged = 0
        with path.open("rb", buffering=BUFFER) as file:
            place = len(file.readline())
            for data in file:
                index, failed, cut = _read(data, lines)
                damaged += index is None and data.endswith(b"\n")
                if index is not None and found.part[index] < 0:
                    found.part[index], found.offset[index] = number, place
                    found.failed += failed
                    found.cut += cut
                place += len(data)
        if damaged:
            log.warning("%s: %d records are damaged and do not count", path, damaged)
    return found


def _read(data: bytes, lines: int) -> tuple[int | None, bool, bool]:
    """The line that a record is of, and whether that failed or was cut; None for a torn or damaged record."""
    try:
        value = json.loads(data) if data.endswith(b"\n") else {}
    except ValueError:
        return None, False, False
    index = value.get("line") if isinstance(value, dict) and isinstance(value.get("output"), dict) else None
    if not isinstance(index, int) or not 0 <= index < lines:
        return None, False, False
    return index, value.get("failed") is True, value.get("cut") is True  # earlier parts do not say whether it was cut


def _merge(found: _Found, output: Path, directory: Path) -> Merged:
    """Write all outputs in the order of the input, rename the file to its name, and remove the parts."""
    merged = directory / MERGED
    with _told(output):
        files = [path.open("rb") for path in found.paths]
        try:
            with merged.open("wb", buffering=BUFFER) as target:
                for part, offset in zip(found.part, found.offset, strict=True):
                    files[part].seek(offset)
                    target.write(as_bytes(json.loads(files[part].readline())["output"]))
                target.flush()
                os.fsync(target.fileno())
            merged.replace(output)
        except OSError:
            with suppress(OSError):
                merged.unlink(missing_ok=True)
            raise
        finally:
            for file in files:
                file.close()
        _remove(directory)
    return Merged(len(found.part), found.failed, found.cut)


def _remove(directory: Path) -> None:
    """Remove a directory of parts: by a rename first, so that no other process takes half of them for a run."""
    removed = directory.with_name(f"{directory.name}.removed")
    with _told(directory):
        _empty(removed)
        if directory.is_dir() and not removed.exists():
            directory.replace(removed)
            _empty(removed)
        _empty(directory)


def _empty(directory: Path) -> None:
    """Remove a directory with what this module writes; other files stay, and with them the directory."""
    if directory.is_dir():
        for path in [*_parts(directory), directory / MERGED, directory / LOCK]:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            directory.rmdir()


# --- locks and errors -------------------------------------------------------------------------------------------------


def _lock(file: int, path: Path, rank: int) -> None:
    """Lock the own part.

    Raises:
        FlagError: another process has.
    """
    with _told(path):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlagError(
                f"{path}: another process with rank {rank} writes it; wait for its end, or choose another output"
            ) from None


@contextmanager
def _locked_parts(directory: Path, cure: str) -> Iterator[None]:
    """Within: all parts are locked.

    Raises:
        FlagError: a process writes one of them.
    """
    files = []
    try:
        for path in _parts(directory):
            with _told(path):
                files.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
                try:
                    fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise FlagError(f"{path}: a process writes it; {cure}") from None
        yield
    finally:
        for file in files:
            os.close(file)


@contextmanager
def _merging(directory: Path) -> Iterator[bool]:
    """Within: no other process merges. Yields whether the directory is still there."""
    path = directory / LOCK
    with _told(path):
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            yield False
            return
    try:
        with _told(path):
            fcntl.flock(file, fcntl.LOCK_EX)  # waits for one that merges
        yield path.exists() and os.path.samestat(os.fstat(file), path.stat())
    finally:
        os.close(file)


def _write(file: int, data: bytes, offset: int) -> None:
    """Write all of it at a place."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn the file system's errors into ours.

    Raises:
        FlagError: what it reports, and how to go on.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cure = "make room, and run the same command again: what is finished stays" if full else "choose another place"
        raise FlagError(f"cannot use {error.filename or path}: {error.strerror or error}; {cure}") from error
