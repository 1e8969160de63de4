"""checksums.json: the sha256 of every file of a checkpoint that this package wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from llama.errors import CheckpointError
from llama.settings import read_json

CHECKSUMS = "checksums.json"
BLOCK = 2**22  # bytes read in one go


def sha256_of(path: Path) -> str:
    """The hexadecimal sha256 of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def read_checksums(directory: Path) -> dict[str, str]:
    """The sums that a directory's checksums.json gives, by file name.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it names a file of another directory.
    """
    path = directory / CHECKSUMS
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {CHECKSUMS}, so its files cannot be compared; llama-xla convert and reshard write one"
        )
    sums = read_json(path)
    for name, value in sums.items():
        if Path(name).name != name or not isinstance(value, str):
            raise CheckpointError(f"{path}: got {name!r}: {str(value)[:80]!r}, expected a file's name and its sha256")
    return sums


def differing_files(directory: Path, sums: dict[str, str]) -> Iterator[str]:
    """Compare files with their sums; yield a line for each that differs, is missing, or has no sum.

    Hidden files and subdirectories need no sum.
    """
    files = {path.name for path in directory.iterdir() if path.is_file() and not path.name.startswith(".")}
    for name in sorted(sums.keys() | files - {CHECKSUMS}):
        if name not in sums:
            yield f"{name} has no sum in {CHECKSUMS}: it was added after the checkpoint had been written"
        elif not (directory / name).is_file():
            yield f"{name} is missing: {CHECKSUMS} names it"
        else:
            yield from _difference(directory / name, sums[name])


def _difference(path: Path, expected: str) -> Iterator[str]:
    try:
        found = sha256_of(path)
    except OSError as error:
        yield f"{path.name} cannot be read: {error.strerror}"
        return
    if found != expected:
        yield f"{path.name} was changed after it had been written: its sha256 is {found}, expected {expected}"
