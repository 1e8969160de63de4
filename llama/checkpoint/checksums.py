"""Sums of a checkpoint's files: those that this package writes, and those that others put beside their weights.

    checksums.json               sha256 of every file, written by convert and reshard
    sizes.json                   bytes of every file of weights and a sum of some of its blocks, compared at every load
    *checklist.chk               md5, as Meta distributes them
    *.sha256, SHA256SUMS         sha256, as sha256sum writes them

Sums of whole files are compared on request, because that takes as long as reading them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama.errors import CheckpointError
from llama.regular_files import read_bytes
from llama.settings import read_json

CHECKSUMS = "checksums.json"
SIZES = "sizes.json"
LISTS = ("*checklist.chk", "*.sha256", "SHA256SUMS")
ALGORITHMS = {32: "md5", 64: "sha256"}  # by hexadecimal digits
NAMED_AT_MOST = 10
BLOCK = 2**22  # bytes read in one go
END = 2**20  # bytes at a file's beginning and end, where the headers of both kinds of files are
PLACES = 16  # between them
PLACE = 2**12  # bytes


def sha256_of(path: Path) -> str:
    """The hexadecimal sha256 of a file's bytes."""
    return digest_of(path, "sha256")


def digest_of(path: Path, algorithm: str) -> str:
    """The hexadecimal sum of a file's bytes by one of hashlib's algorithms."""
    found = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def sample_of(path: Path) -> dict[str, Any]:
    """What sizes.json holds of a file: its bytes, and the sha256 of its beginning, its end and blocks between them.

    The central directory of a .pth file is at its end. It holds a CRC-32 of every tensor, so that shards with other
    weights have other samples. A file of up to 2 MiB is read whole.
    """
    size, found = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        found.update(file.read(END))
        for number in range(PLACES):
            file.seek(max(END, END + (size - 2 * END) * number // PLACES))
            found.update(file.read(PLACE))
        file.seek(max(END, size - END))
        found.update(file.read(END))
    return {"bytes": size, "sample_sha256": found.hexdigest()}


def read_checksums(directory: Path) -> dict[str, str]:
    """The sums that a directory's checksums.json gives, by file name.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it names a file of another directory.
    """
    path = directory / CHECKSUMS
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{directory} has no {CHECKSUMS} and no other list of sums ({', '.join(LISTS)}), so its files cannot be "
            "compared; llama-xla convert and reshard write one"
        )
    sums = read_json(path)
    for name, value in sums.items():
        if Path(name).name != name or not isinstance(value, str):
            raise CheckpointError(f"{path}: got {name!r}: {str(value)[:80]!r}, expected a file's name and its sha256")
    return sums


def read_list(path: Path) -> dict[str, str]:
    """The sums in a list as md5sum or sha256sum writes it, by file name; files of other directories are left out.

    A file with a sum alone is about the file that it is named after: ``model.safetensors.sha256``.

    Raises:
        CheckpointError: the file cannot be read, or a line is not a sum and a name.
    """
    try:
        lines = read_bytes(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a readable list of sums: {error}") from error
    sums = {}
    for line in filter(str.strip, lines):
        found = re.fullmatch(r"([0-9a-fA-F]+)(?:\s+\*?(\S.*?))?\s*", line)
        name = found and (found[2] or path.stem).removeprefix("./")
        if found is None or name is None or len(found[1]) not in ALGORITHMS:
            raise CheckpointError(f"{path}: got the line {line[:80]!r}, expected an md5 or sha256 and a file's name")
        if Path(name).name == name:
            sums[name] = found[1].lower()
    return sums


def recorded_sums(directory: Path) -> dict[str, dict[str, str]]:
    """All sums that lie beside a checkpoint's files, by the file that gives them; may be empty.

    Raises:
        CheckpointError: one of these files is damaged.
    """
    found = {CHECKSUMS: read_checksums(directory)} if os.path.isfile(directory / CHECKSUMS) else {}
    paths = sorted({path for pattern in LISTS for path in directory.glob(pattern) if os.path.isfile(path)})
    return found | {path.name: read_list(path) for path in paths}


def differing_files(directory: Path, sums: Mapping[str, str], given_by: str = CHECKSUMS) -> Iterator[str]:
    """Compare files with their sums; yield a line for each that differs, is missing, or has no sum.

    Hidden files and subdirectories need no sum. A list of others need not name every file.

    Args:
        directory: of the files.
        sums: by file name; the number of digits says which sum it is.
        given_by: the file that gives the sums.
    """
    files = {path.name for path in directory.iterdir() if os.path.isfile(path) and not path.name.startswith(".")}
    added = files - {CHECKSUMS} if given_by == CHECKSUMS else set()
    for name in sorted(sums.keys() | added):
        if name not in sums:
            yield f"{name} has no sum in {CHECKSUMS}: it was added after the checkpoint had been written"
        elif not os.path.isfile(directory / name):
            yield f"{name} is missing: {given_by} names it"
        else:
            yield from _difference(directory / name, sums)


def _difference(path: Path, sums: Mapping[str, str]) -> Iterator[str]:
    expected = sums[path.name]
    algorithm = ALGORITHMS.get(len(expected), "sha256")
    try:
        found = digest_of(path, algorithm)
    except OSError as error:
        yield f"{path.name} cannot be read: {error.strerror}"
        return
    if found != expected:
        yield (
            f"{path.name} was changed after it had been written: its {algorithm} is {found}, expected {expected}"
            + _belongs_to(path.name, found, sums)
        )


def _belongs_to(name: str, found: str, sums: Mapping[str, str]) -> str:
    """Return a hint if what a file holds is what another one should hold."""
    others = [other for other, each in sums.items() if each == found and other != name]
    return f"; that is {others[0]}'s: the files were swapped, or one was copied over the other" if others else ""


def differences(directory: Path) -> Iterator[str]:
    """Compare all files with every sum that lies beside them; yield a line for each that differs.

    Raises:
        CheckpointError: there are no sums, or they are damaged.
    """
    for given_by, sums in (recorded_sums(directory) or {CHECKSUMS: read_checksums(directory)}).items():
        yield from differing_files(directory, sums, given_by)


def differing_samples(files: Iterable[Path]) -> Iterator[str]:
    """Compare files of weights with their sizes.json, if they have one; yield a line for each that differs.

    Raises:
        CheckpointError: sizes.json is damaged.
    """
    for path in files:
        samples = _read_sizes(path.parent)
        expected = samples.get(path.name)
        if expected is None:
            continue
        try:
            found = sample_of(path)
        except OSError as error:
            yield f"{path.name} cannot be read: {error.strerror}"
            continue
        if found["bytes"] != expected["bytes"]:
            yield f"{path.name} has {found['bytes']} bytes, expected {expected['bytes']}"
        elif found != expected:
            sums = {name: sample["sample_sha256"] for name, sample in samples.items()}
            yield (
                f"{path.name} was changed after it had been written: the sum of its samples is "
                f"{found['sample_sha256']}, expected {expected['sample_sha256']}"
                + _belongs_to(path.name, found["sample_sha256"], sums)
            )


def _read_sizes(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / SIZES
    if not os.path.lexists(path):
        return {}
    content = read_json(path)
    for name, value in content.items():
        kinds = {"bytes": int, "sample_sha256": str}
        if not isinstance(value, dict) or {key: type(each) for key, each in value.items()} != kinds:
            raise CheckpointError(f"{path}: got {name!r}: {str(value)[:80]}, expected its bytes and sample_sha256")
    return content


def check_files(directory: Path, files: Iterable[Path], whole: bool = False) -> None:
    """Refuse a checkpoint whose files are not those that were written.

    Args:
        directory: of the checkpoint, or a file in it.
        files: those with the weights; their sizes and samples are always compared, where sizes.json gives them.
        whole: read all files, and compare them with every sum that lies beside them.

    Raises:
        CheckpointError: names the files; or there are no sums to compare whole files with.
    """
    directory = directory if os.path.isdir(directory) else directory.parent
    found = list(differences(directory) if whole else differing_samples(files))
    if found:
        listed = "; ".join(found[:NAMED_AT_MOST]) + ("; ..." if len(found) > NAMED_AT_MOST else "")
        lists = ", ".join([*recorded_sums(directory), *([SIZES] if os.path.lexists(directory / SIZES) else [])])
        raise CheckpointError(
            f"{directory}: {listed}. Restore these files"
            + ("" if whole else " (llama-xla inspect --check_sums compares every byte)")
            + f"; if the change is meant, remove {lists}"
        )
