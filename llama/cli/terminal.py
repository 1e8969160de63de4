"""Text of a model as a terminal may show it: a model can write escape sequences, and a terminal would obey them."""

from __future__ import annotations

import os
import re
import sys
from typing import TextIO

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # without tab and newline


def visible(text: str) -> str:
    r"""Return text with control characters written out, such as ``\x1b``; newline and tab stay.

    They are those of C0 and C1, DEL, and what turns the direction of writing (U+202A to U+202E, U+2066 to U+2069).
    """
    return _OBEYED.sub(lambda found: _escaped(ord(found[0])), text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def as_shown(text: str, stream: TextIO | None = None) -> str:
    """Return text as a stream (default: stdout) should get it: ``visible`` at a terminal, exact elsewhere."""
    return visible(text) if (stream or sys.stdout).isatty() else text


def can_edit() -> bool:
    """Whether stdin and stdout are a terminal that can move its cursor."""
    has_cursor = os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")
    return has_cursor and sys.stdin.isatty() and sys.stdout.isatty()
