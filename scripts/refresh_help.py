"""Rewrite the help blocks of documents: the fenced block after each ``<!-- help: llama-xla COMMAND -->``.

python scripts/refresh_help.py docs/cli.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from llama.cli import COMMANDS
from llama.cli.flags import help_text

BLOCK = re.compile(r"(<!-- help: llama-xla (\w+) -->\n```text\n).*?(^```)", flags=re.MULTILINE | re.DOTALL)


def refresh(document: Path) -> None:
    """Write every command's ``--help`` into its block."""
    text = document.read_text(encoding="utf-8")
    document.write_text(BLOCK.sub(lambda m: f"{m[1]}{block(m[2])}{m[3]}", text), encoding="utf-8")


def block(name: str) -> str:
    """What ``llama-xla NAME --help`` prints."""
    return help_text(name, COMMANDS[name]).strip() + "\n"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        refresh(Path(argument))
