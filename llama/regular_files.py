"""Open what must be a regular file. Opening a FIFO waits for a writer, and a device such as /dev/zero has no end.

All of it raises OSError, as ``open`` does, so that a caller's handler covers both.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}
MOST_BYTES = 2**28  # of a file that is read whole; the largest tokenizer.json have some 40 MB

MISTAKEN = {  # beginnings of files that stand in the place of others, in lower case: what they are, and the cure
    b"version https://git-lfs": "it is a Git LFS pointer: fetch the file itself with git lfs pull",
    b"<": "it is a web page, for instance a request to log in: download it again",
    **dict.fromkeys(
        (b"entry not found", b"repository not found", b"access to", b"invalid "),
        "it is an answer of the Hugging Face hub that there is no such file, or no access to it: log in and download "
        "it again",
    ),
}


def check_regular(path: Path, most: int | None = None) -> None:
    """Check that a path leads to a regular file that may be read.

    Args:
        path: links are followed.
        most: bytes that it may have; None means any number.

    Raises:
        OSError: it is something else, absent, closed to this user, or larger.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, f"it is {kind_of(found.st_mode)}, expected a regular file")
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, expected at most {most}")
    os.close(os.open(path, os.O_RDONLY))  # libraries call a file absent that may not be read


def kind_of(mode: int) -> str:
    """Say what a file is that is not regular."""
    return KINDS.get(stat.S_IFMT(mode), "no file")


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: see check_regular; or it has more than MOST_BYTES.
    """
    check_regular(path, MOST_BYTES)
    return path.read_bytes()


def reason_of(error: OSError) -> str:
    """Say why a file cannot be opened, without its path, which the message names already."""
    return error.strerror or str(error)


def mistaken(path: Path) -> str | None:
    """Return what stands in the place of a file, and the cure; None if it is nothing of what downloads leave."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError:
        return None
    return next((said for beginning, said in MISTAKEN.items() if start.startswith(beginning)), None)


def hint(path: Path) -> str:
    """Return the end of a message about a damaged file: what may have happened, and the cure."""
    return f"; {mistaken(path) or 'it may be cut short: download it again'}"
