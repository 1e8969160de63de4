"""Rewrite what documents repeat of the code: the help of commands, and the table of a request's controls.

A command's help is the fenced block after ``<!-- help: llama-xla COMMAND -->``. The
table begins with ``| control |``.

.venv/bin/python scripts/refresh_help.py docs/cli.md docs/sampling.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from llama.cli import COMMANDS
from llama.cli.flags import help_text
from llama.sampling_params import controls_table

BLOCK = re.compile(r"(<!-- help: llama-xla (\w+) -->\n```text\n).*?(^```)", flags=re.MULTILINE | re.DOTALL)


TABLE = re.compile(r"^\| control \|.*\n(?:\|.*\n)*", flags=re.MULTILINE)


def refresh(document: Path) -> None:
    """Write every command's ``--help`` into its block, and the controls into their table."""
    text = TABLE.sub(lambda _: controls_table(), document.read_text(encoding="utf-8"))
    document.write_text(BLOCK.sub(lambda m: f"{m[1]}{block(m[2])}{m[3]}", text), encoding="utf-8")


def block(name: str) -> str:
    """What ``llama-xla NAME --help`` prints."""
    return help_text(name, COMMANDS[name]).strip() + "\n"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        refresh(Path(argument))
