"""A conversation: a dialog that grows turn by turn, over a LLaMA and a chat format.

Each turn's prompt is the whole dialog, but the cache still holds the earlier turns, so only the new part is prefilled.
This module knows no terminal: the command ``llama-xla chat`` is a thin loop around it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llama.batch.fields import messages_of
from llama.chat import ChatFormat, Message
from llama.chat.formats import check_dialog
from llama.config import OVERFLOWS, Overflow
from llama.errors import ChatError, ConfigError, PromptError, setting
from llama.generation import LLaMA
from llama.outputs import Generation
from llama.sampling_params import SamplingParams

log = logging.getLogger("llama")

MAX_FILE_BYTES = 2**26  # of a saved dialog: far more than any cache holds
UNDO = "/undo or /reset, "


class _Question(NamedTuple):
    """A user's message to answer, and whether it takes the place of the last turn or follows it."""

    text: str
    replaces: bool


class Conversation:
    """A dialog with a model.

    Args:
        llm: its first row is used.
        chat_format: how the dialog becomes a prompt.
        params: of every answer, which is one sample; ``max_gen_len`` is its limit, which is lower if the cache has less
            room.
        system_prompt: the first message, or None.
        on_overflow: when the dialog no longer fits, ``refuse`` it, or ``drop`` as few of the oldest turns as possible.
        min_answer: an answer must have room for at least this many tokens.

    Attributes:
        messages: the dialog so far, the system prompt included.
        result: of the last answer; None if there is none, or if it was not read to its end.
    """

    def __init__(
        self,
        llm: LLaMA,
        chat_format: ChatFormat,
        params: SamplingParams,
        *,
        system_prompt: str | None = None,
        on_overflow: Overflow = "refuse",
        min_answer: int = 16,
    ) -> None:
        if on_overflow not in OVERFLOWS:
            raise ConfigError(f"on_overflow: got {on_overflow!r}, expected one of {', '.join(OVERFLOWS)}")
        if params.samples > 1:
            raise ConfigError(
                f"n: got {params.samples} samples of an answer, expected 1: a conversation goes on in one way"
            )
        self._llm, self._format, self._params = llm, chat_format, params
        self._on_overflow, self._min_answer = on_overflow, min_answer
        self.messages: list[Message] = []
        self.result: Generation | None = None
        self._asked: _Question | None = None  # without an answer
        self._answered_again = 0
        self.set_system(system_prompt)

    @property
    def unanswered(self) -> str | None:
        """The message that was given last, if it got no answer and so is not in the dialog."""
        return None if self._asked is None else self._asked.text

    @property
    def last_message(self) -> str | None:
        """The user's message that ``regenerate`` answers and ``edit`` replaces; None if there is none."""
        last = self._last()
        return None if last is None else last.text

    def say(self, text: str) -> Iterator[str]:
        """Add a user's message and yield the answer in pieces; an interrupted answer is kept.

        Raises:
            ChatError: the dialog does not fit, or the format refuses the text. The dialog is then unchanged.
        """
        return self._ask(_Question(text, replaces=False), self._params)

    def regenerate(self) -> Iterator[str]:
        """Answer the last message again and yield the answer in pieces; the earlier answer stays until text comes.

        Of parameters with a seed, each call takes the seed that follows, as the samples of one prompt do.

        Raises:
            ChatError: there is no message, or see ``say``.
        """
        return self._again(None)

    def edit(self, text: str) -> Iterator[str]:
        """Put a text in place of the last message and yield its answer in pieces; the turn stays until text comes.

        The seed is as for ``regenerate``.

        Raises:
            ChatError: there is no message, or see ``say``.
        """
        return self._again(text)

    def _again(self, text: str | None) -> Iterator[str]:
        last = self._last()
        if last is None:
            raise ChatError("there is no message to answer again; write one first")
        params = self._params
        if params.seed is not None:  # counted over the conversation: the answer that is there has an earlier one
            self._answered_again += 1
            params = replace(params, seed=(params.seed + self._answered_again) % 2**63)
        return self._ask(last if text is None else last._replace(text=text), params)

    def _last(self) -> _Question | None:
        if self._asked is None and len(self.messages) - self._first_turn() >= 2:
            return _Question(self.messages[-2]["content"], replaces=True)
        return self._asked

    def _ask(self, question: _Question, params: SamplingParams) -> Iterator[str]:
        self._asked = question
        before = self.messages[:-2] if question.replaces else self.messages
        dialog, ids = self._fitting([*before, {"role": "user", "content": question.text}], UNDO)
        most = min(params.max_gen_len, self._llm.config.max_seq_len - len(ids))
        params = replace(params, max_gen_len=most, min_tokens=min(params.min_tokens, most))
        return self._answer(dialog, ids, params)

    def _answer(self, dialog: list[Message], ids: list[int], params: SamplingParams) -> Iterator[str]:
        parts: list[str] = []
        self.result = None
        try:
            for piece in self._llm.pieces([ids], [params], stop_ids=self._format.stop_ids):
                parts.append(piece.text)
                self.result = piece.result
                if piece.text:
                    yield piece.text
        finally:
            answer = "".join(parts).strip()
            if answer:
                self.messages = [*dialog, {"role": "assistant", "content": answer}]
                self._asked = None

    def _fitting(self, dialog: list[Message], cure: str) -> tuple[list[Message], list[int]]:
        """Return the dialog and its ids, without the oldest turns if it must and may be shortened.

        Raises:
            ChatError: it does not fit, or the format refuses it; ``cure`` is what helps besides the settings.
        """
        most = self._llm.config.max_seq_len - self._min_answer
        first = 1 if dialog[0]["role"] == "system" else 0
        dropped = 0
        ids = self._format.encode(dialog)
        while len(ids) > most:
            if self._on_overflow == "refuse" or len(dialog) - first < 3:
                is_one = len(dialog) - first < 3
                raise ChatError(
                    f"{'the message alone' if is_one else 'the dialog'} does not fit: {len(ids)} tokens, and "
                    f"{self._min_answer} for an answer, max_seq_len is {self._llm.config.max_seq_len}; "
                    + ("shorten it, or " if is_one else f"{cure}{setting('on_overflow')} drop, or ")
                    + f"a larger {setting('max_seq_len')}"
                )
            del dialog[first : first + 2]
            dropped += 1
            ids = self._format.encode(dialog)
        if dropped:
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            log.warning("Dropped the oldest %s to make room", turns)
        return dialog, ids

    def undo(self) -> bool:
        """Remove the last user's message and its answer; return False if there is none."""
        self._asked = None
        if len(self.messages) - self._first_turn() < 2:
            return False
        del self.messages[-2:]
        return True

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self._asked = None
        del self.messages[self._first_turn() :]

    def set_system(self, text: str | None) -> None:
        """Replace the system prompt; None or an empty text removes it. The turns stay."""
        turns = self.messages[self._first_turn() :]
        self.messages = [{"role": "system", "content": text}, *turns] if text else turns

    def save(self, path: Path) -> None:
        """Write the dialog as JSON, a list of messages; the file is complete, or as it was before.

        Raises:
            ChatError: it cannot be written, or something other than a file is there.
        """
        temporary: Path | None = None
        try:
            mode = _file_mode(path)
            text = json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n"
            temporary = path.absolute().parent / f".{path.name}.{secrets.token_hex(4)}.partial"
            with temporary.open("xb") as file:
                file.write(text.encode())
            if mode is not None:
                temporary.chmod(mode)
            temporary.replace(path)
        except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
            raise ChatError(f"cannot save to {path}: {getattr(error, 'strerror', None) or error}") from error
        finally:
            if temporary is not None:
                with suppress(OSError, ValueError):
                    temporary.unlink()

    def load(self, path: Path) -> None:
        """Go on with a dialog that ``save`` has written; the file's system prompt, or none, takes this one's place.

        A user's message at its end has no answer yet: it becomes ``unanswered``, and ``regenerate`` answers it. A
        dialog that does not fit is treated as ``on_overflow`` says.

        Raises:
            ChatError: there is no such file, or it holds no dialog of this format, or one that does not fit. The
                conversation is then unchanged.
        """
        messages = _saved_messages(path)
        asked = messages.pop() if messages and messages[-1]["role"] == "user" else None
        question: Message = asked or {"role": "user", "content": "?"}
        try:
            check_dialog([*messages, question])
            dialog, _ = self._fitting([*messages, question], "")
        except ChatError as error:
            raise ChatError(f"cannot load {path}: {error.shown(setting)}") from error
        self.messages, self.result = dialog[:-1], None
        self._asked = None if asked is None else _Question(asked["content"], replaces=False)

    def _first_turn(self) -> int:
        return 1 if self.messages and self.messages[0]["role"] == "system" else 0


def _file_mode(path: Path) -> int | None:
    """Return the permissions of the file at a path, or None if nothing is there.

    Raises:
        OSError: something else is there, or it cannot be told.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or a socket"
        raise OSError(f"it is {what}, expected a file")
    return stat.S_IMODE(status.st_mode)


def _saved_messages(path: Path) -> list[Message]:
    """Return the messages of a file, of which neither the order nor the length has been checked.

    Raises:
        ChatError: it cannot be read, or is not a JSON list of messages.
    """
    try:
        if _file_mode(path) is None:
            raise OSError("there is no such file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise OSError(f"it is larger than {MAX_FILE_BYTES >> 20} MiB, so it is no dialog")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ChatError(f"cannot load {path}: it is not UTF-8, byte {error.start}") from error
    except (OSError, ValueError) as error:
        raise ChatError(f"cannot load {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        value = json.loads(text)
        return [] if value == [] else list(messages_of(value))
    except PromptError as error:
        raise ChatError(f"cannot load {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "too many levels of brackets"
        raise ChatError(f"cannot load {path}: it is not JSON: {reason}; /save writes what is expected") from error
