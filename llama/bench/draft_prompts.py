"""The prompts of the drafting benchmark: passages to copy, passages to edit, and stories to tell.

``draft_prompts.jsonl`` was made by ``scripts/make_draft_prompts.py`` for the demo model; a user's own file has the same
lines and any tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from llama.errors import ConfigError, setting
from llama.tokenizer import Tokenizer

PROMPTS_FILE = Path(__file__).with_name("draft_prompts.jsonl")
EXPECTED = '{"task": "copy", "prompt": "..."}, with "held_out": true where it is not measured'


class Prompt(NamedTuple):
    """A prompt of the benchmark.

    Attributes:
        task: what kind of text it asks for.
        text: the prompt.
        held_out: it is not measured: its answer goes into the datastore.
    """

    task: str
    text: str
    held_out: bool


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of prompts, one JSON object a line; blank lines are skipped.

    Raises:
        ConfigError: it cannot be read, a line is something else, or none is measured.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts_file: {path} cannot be read ({error}); expected JSON lines {EXPECTED}") from error
    found = [_prompt(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if all(prompt.held_out for prompt in found):
        raise ConfigError(f"prompts_file: {path} has no prompt to measure, expected JSON lines {EXPECTED}")
    return found


def _prompt(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
        task, text, held_out = value["task"], value["prompt"], value.get("held_out", False)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"prompts_file: {where}: got {line[:80]!r}, expected {EXPECTED}") from None
    if not (isinstance(task, str) and task and isinstance(text, str) and isinstance(held_out, bool)):
        raise ConfigError(f"prompts_file: {where}: got {line[:80]!r}, expected {EXPECTED}")
    return Prompt(task, text, held_out)


def by_task(prompts: Iterable[Prompt]) -> dict[str, list[str]]:
    """The texts of the prompts that are measured, by task."""
    found: dict[str, list[str]] = {}
    for prompt in prompts:
        if not prompt.held_out:
            found.setdefault(prompt.task, []).append(prompt.text)
    return found


def check_fit(prompts: Iterable[Prompt], tokenizer: Tokenizer, gen_len: int, positions: int) -> None:
    """Refuse prompts that leave no room for ``gen_len`` tokens in a cache of ``positions``.

    Raises:
        ConfigError: the first such prompt.
    """
    for prompt in prompts:
        needed = len(tokenizer.encode(prompt.text)) + gen_len
        if needed > positions:
            raise ConfigError(
                f"max_seq_len: got {positions}, expected at least {needed}: {needed - gen_len} tokens of the prompt "
                f"{prompt.text[:40]!r} and {setting('gen_len')} {gen_len}"
            )
