"""What a user types at a terminal, message by message: here as the terminal itself hands it over, line by line.

line_editor.py is the other way, where the terminal can move its cursor.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import ClassVar

from llama.cli.output import write
from llama.errors import OutputError, PromptError

LONGEST_LINE = (
    4095  # bytes before the newline that Linux keeps of a line (N_TTY_BUF_SIZE); it drops the others silently
)


class Lines(ABC):
    """Reads messages from the terminal.

    Attributes:
        edits: whether ``read`` can offer a text to change.
    """

    edits: ClassVar[bool]

    @abstractmethod
    def read(self, prompt: str, text: str = "") -> str:
        """Return the next message, which may have several lines.

        Args:
            prompt: shown before it.
            text: what stands there already, if ``edits``.

        Raises:
            KeyboardInterrupt: Ctrl-C; what was typed is forgotten.
            EOFError: Ctrl-D, or the terminal is gone.
            PromptError: the terminal has cut the line.
        """

    @abstractmethod
    def answer(self, question: str) -> str:
        """Return the line that answers a question. Raises as ``read`` does."""

    def agrees(self, question: str) -> bool:
        """Ask a question that only ``y`` or ``yes`` agrees to; Ctrl-C, Ctrl-D and anything else mean no."""
        try:
            return self.answer(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except (KeyboardInterrupt, EOFError, PromptError):
            return False


class PlainLines(Lines):
    """Lines as the terminal hands them over. One that ends in a backslash goes on in the next."""

    edits = False

    def read(self, prompt: str, text: str = "") -> str:
        """See Lines."""
        line = self.answer(prompt)
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self.answer("  ")
        return line

    def answer(self, question: str) -> str:
        """See Lines."""
        try:
            with _interrupts_raise() as wakes:
                tell(question)
                data = _line(sys.stdin.fileno(), wakes)
        except KeyboardInterrupt:
            tell("\n")
            raise
        except OSError:
            data = b""
        if not data:
            with suppress(OutputError):  # the terminal may be gone
                tell("\n")
            raise EOFError
        line = data.removesuffix(b"\n")
        if len(line) >= LONGEST_LINE:
            raise PromptError(
                f"got a line of {LONGEST_LINE:,} bytes or more, which this terminal cuts; end shorter lines with \\, "
                "or send the message through a pipe"
            )
        return line.decode(errors="replace")


@contextmanager
def _interrupts_raise() -> Iterator[int]:
    """Within: Ctrl-C is a KeyboardInterrupt, whatever it is around. Yields a descriptor that becomes readable then."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    try:
        yield readable
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGINT, handler)
        os.close(readable)
        os.close(writable)


def _line(terminal: int, wakes: int) -> bytes:
    """Read a line; without a newline at its end where Ctrl-D ended it, and empty at the end of the input.

    A read alone would miss a Ctrl-C that comes just before it, until the next key.
    """
    data = b""
    while not data.endswith(b"\n"):
        while terminal not in select.select([terminal, wakes], [], [])[0]:
            pass  # Python runs the signal's handler here
        more = os.read(terminal, 2 * LONGEST_LINE)
        if not more:
            break
        data += more
    return data


def tell(text: str) -> None:
    """Show what is no answer of the model: on stdout at a terminal, else on stderr, so that a file gets answers only.

    Raises:
        OutputError: stdout cannot be written.
    """
    if sys.stdout.isatty():
        write(text)
    else:
        print(text, end="", file=sys.stderr, flush=True)
