"""The standard streams where one is closed, full or gone: results still arrive, and no file takes a stream's place."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from llama.errors import OutputError, PromptError


def mend() -> None:
    """Make stdin, stdout and stderr usable at the start of a process.

    A stream that was closed is opened on the null device: the next file would get its descriptor otherwise, and be
    written into. A closed stdin is an empty one. A stderr that cannot be written goes silent: losing the log is no
    reason to lose the result.

    Raises:
        OutputError: stdout is closed, so that no result could be printed.
    """
    has_stdout = sys.stdout is not None
    sys.stdin = sys.stdin or _null_device("r")
    sys.stdout = sys.stdout or _null_device("w")
    sys.stderr = sys.stderr or _null_device("w")
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Stderr(sys.stderr)
    if not has_stdout:
        raise OutputError("stdout is closed, expected a terminal, a file or a pipe for the result")


def _null_device(mode: str) -> TextIO:
    """Open the null device at the lowest free descriptor: in the order of the streams, that of the closed stream."""
    return open(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8")  # type: ignore[return-value]


class _Stderr(io.TextIOWrapper):
    """stderr, which drops what it cannot write.

    Args:
        stream: the interpreter's own, whose buffer is shared.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(
            stream.buffer, stream.encoding, stream.errors, line_buffering=True, write_through=stream.write_through
        )

    def write(self, text: str, /) -> int:
        with self._silent_where_dead():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._silent_where_dead():
            super().flush()

    @contextmanager
    def _silent_where_dead(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            discard(self)


def discard(stream: TextIO) -> None:
    """Send what a stream still holds, and all that follows, to the null device: the interpreter flushes it at exit."""
    with suppress(OSError, ValueError):  # not one of the system's: a test's, for instance
        descriptor = stream.fileno()
        opened = os.open(os.devnull, os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)


def is_terminal() -> bool:
    """Whether stdin is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_stdin() -> bytes:
    """Return everything that comes on stdin.

    Raises:
        PromptError: it cannot be read.
    """
    try:
        data = getattr(sys.stdin, "buffer", sys.stdin).read()
    except OSError as error:
        raise PromptError(f"stdin: {error.strerror or error}; expected a terminal, a file or a pipe") from error
    return data if isinstance(data, bytes) else str(data).encode(errors="surrogateescape")


def decoded(data: bytes, where: str) -> str:
    """Return UTF-8 text, without a byte order mark.

    Raises:
        PromptError: it is not UTF-8; the message names the first line that is not.
    """
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[mark:].decode()
    except UnicodeDecodeError as error:
        place = mark + error.start
        line = data[:place].count(b"\n") + 1
        raise PromptError(
            f"{where} is not UTF-8: byte {place} in line {line}; convert it, for instance with iconv"
        ) from error
