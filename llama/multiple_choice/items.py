"""Items of multiple choice, and the files that hold them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.errors import PromptError

EXPECTED = '{"context": "...", "choices": ["...", "..."], "gold": 0}'


@dataclass(frozen=True)
class Item:
    """A question, or a text to go on with.

    Attributes:
        context: may be empty.
        choices: at least two texts, no two of them alike.
        gold: the place of the right one; None if it is not known.
    """

    context: str
    choices: tuple[str, ...]
    gold: int | None = None

    def is_like(self, other: Item) -> bool:
        """Whether it asks the same, in any order of the choices."""
        return self.context == other.context and set(self.choices) == set(other.choices)


def read_items(path: Path) -> list[Item]:
    """Read a file of items, one JSON object a line; blank lines are skipped, and so are other keys.

    ``gold`` is a choice's place or its text; a line without it, or with null, has no right choice.

    Raises:
        PromptError: the file cannot be read, holds no item, or a line is something else; the message names the line.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror or error}; expected JSON lines {EXPECTED}") from error
    items = [_item(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise PromptError(f"{path}: got no items, expected JSON lines {EXPECTED}")
    return items


def _item(line: bytes, where: str) -> Item:
    """The item of one line."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{where} is not UTF-8: byte {error.start}; convert the file, for instance with iconv"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not JSON ({error}); expected {EXPECTED}") from error
    if not isinstance(value, dict):
        raise PromptError(f"{where}: got a JSON {type(value).__name__}, expected {EXPECTED}")
    for key in ("context", "choices"):
        if key not in value:
            raise PromptError(f"{where}: got the keys {', '.join(value) or 'none'}, but not {key}; expected {EXPECTED}")
    context, choices = _text(value["context"], f"{where}: context"), _choices(value["choices"], where)
    return Item(context, choices, _gold(value.get("gold"), choices, where))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise PromptError(f"{where}: got {_shown(value)}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{where}: character {error.start} is half of a surrogate pair, expected Unicode") from error
    return value


def _choices(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise PromptError(f"{where}: choices: got {_shown(value)}, expected a list of two texts or more")
    choices = tuple(_text(choice, f"{where}: choice {place}") for place, choice in enumerate(value))
    for place, choice in enumerate(choices):
        if not choice.strip():
            raise PromptError(f"{where}: choice {place} is empty, expected a text")
        if choice in choices[:place]:
            raise PromptError(
                f"{where}: choices {choices.index(choice)} and {place} are both {_shown(choice)}; "
                "expected different ones, of which one can be right"
            )
    return choices


def _gold(value: Any, choices: tuple[str, ...], where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise PromptError(
        f"{where}: gold: got {_shown(value)}, expected a place from 0 to {len(choices) - 1}, or a choice's text"
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
