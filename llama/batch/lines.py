"""The input of a batch: the place of every line, its JSON, and the lines whose custom_id is taken.

The file is read twice: once from front to back, and line by line when each one's turn comes. Of a line its place is
kept, 8 bytes, and its custom_id.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import stat
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from llama.errors import PromptError, UserError

OPENAI_KEYS = {"method", "url", "body"}
EXPECTED = '{"prompt": "..."}, {"messages": [...]}, or OpenAI\'s {"custom_id", "method", "url", "body"}'


@dataclass(frozen=True)
class Line:
    """One line of the input.

    Attributes:
        index: its place among the lines that are not blank, from 0.
        custom_id: the caller's name for it, if it can be read.
        is_openai: it is answered in OpenAI's form.
        value: its JSON object; empty where there is an error.
        error: why it cannot be read; None if it can.
    """

    index: int
    custom_id: str | None
    is_openai: bool
    value: dict[str, Any]
    error: UserError | None = None


class InputLines:
    """The lines of a file that are not blank. A context, which closes the file.

    Args:
        path: a regular file.

    Attributes:
        sha256: of its bytes.

    Raises:
        PromptError: it cannot be read, or holds no line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise PromptError(f"{path}: {error.strerror or error}; expected JSON lines {EXPECTED}") from error
        self._offsets = array("Q")
        self._duplicates: set[int] = set()
        self._is_openai = False
        try:
            self._state = self._stat()
            self.sha256 = self._scan()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> InputLines:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> Line:
        """A line, whatever it holds.

        Raises:
            PromptError: the file was changed since it was opened, or cannot be read any more.
        """
        try:
            if self._stat() != self._state:
                raise PromptError(
                    f"{self.path} was changed while its lines were run; put the old file back and run the same command "
                    "again, or restart with the new one"
                )
            self._file.seek(self._offsets[index])
            data = self._file.readline()
        except OSError as error:
            raise PromptError(f"{self.path}: {error.strerror or error}") from error
        line = _parsed(index, data, self._is_openai)
        if index in self._duplicates:
            taken = PromptError(f"custom_id: got {line.custom_id!r:.60}, which an earlier line has; expected another")
            return replace(line, value={}, error=taken)
        return line

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise PromptError(f"{self.path}: expected a regular file, because it is read twice")
        return found.st_size, found.st_mtime_ns

    def _scan(self) -> str:
        """Find the lines; return the sha256 of all bytes."""
        digest, place, names = hashlib.sha256(), 0, set[str]()
        try:
            for data in self._file:
                digest.update(data)
                mark = len(codecs.BOM_UTF8) if not place and data.startswith(codecs.BOM_UTF8) else 0
                if data[mark:].strip():
                    self._note(_parsed(len(self._offsets), data[mark:], False), names)
                    self._offsets.append(place + mark)
                place += len(data)
        except OSError as error:
            raise PromptError(f"{self.path}: {error.strerror or error}") from error
        if not self._offsets:
            raise PromptError(f"{self.path}: got no lines, expected JSON lines {EXPECTED}")
        return digest.hexdigest()

    def _note(self, line: Line, names: set[str]) -> None:
        """Remember a line's custom_id, and whether the first readable line is in OpenAI's form."""
        if line.error is None and not self._offsets:
            self._is_openai = line.is_openai
        if line.custom_id is None:
            return
        if line.custom_id in names:
            self._duplicates.add(line.index)
        names.add(line.custom_id)


def _parsed(index: int, data: bytes, is_openai: bool) -> Line:
    """A line from its bytes.

    Args:
        is_openai: the form in which it is answered if it cannot be read.
    """
    try:
        value = _object(data)
    except UserError as error:
        return Line(index, None, is_openai, {}, error)
    name = value.get("custom_id")
    own = bool(OPENAI_KEYS & value.keys())
    if name is not None and not isinstance(name, str):
        return Line(index, None, own, {}, PromptError(f"custom_id: got {shown(name)}, expected a text"))
    return Line(index, name, own, value)


def _object(data: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        PromptError: it is something else.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"the line is not UTF-8: byte {error.start}; convert the file, for instance with iconv"
        ) from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"the line is not JSON ({error}); expected {EXPECTED}") from None
    if not isinstance(value, dict):
        raise PromptError(f"got a JSON {type(value).__name__}, expected {EXPECTED}")
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise PromptError("the line is not valid Unicode: it holds half of a surrogate pair") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def shown(value: Any) -> str:
    """A JSON value for a message, cut if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
