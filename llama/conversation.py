"""A conversation: a dialog that grows turn by turn, over a LLaMA and a chat format.

Each turn's prompt is the whole dialog, but the cache still holds the earlier turns, so only the new part is prefilled.
This module knows no terminal: the command ``llama-xla chat`` is a thin loop around it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llama.chat import ChatFormat, Message
from llama.config import OVERFLOWS, Overflow
from llama.errors import ChatError, ConfigError, setting
from llama.generation import LLaMA
from llama.outputs import Generation
from llama.sampling_params import SamplingParams

log = logging.getLogger("llama")


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
        self.set_system(system_prompt)

    def say(self, text: str) -> Iterator[str]:
        """Add a user's message and yield the answer in pieces; an interrupted answer is kept.

        Raises:
            ChatError: the dialog does not fit, or the format refuses the text. The dialog is then unchanged.
        """
        dialog: list[Message] = [*self.messages, {"role": "user", "content": text}]
        dialog, ids = self._fitting(dialog)
        room = self._llm.config.max_seq_len - len(ids)
        most = min(self._params.max_gen_len, room)
        params = replace(self._params, max_gen_len=most, min_tokens=min(self._params.min_tokens, most))
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

    def _fitting(self, dialog: list[Message]) -> tuple[list[Message], list[int]]:
        """Return the dialog and its ids, without the oldest turns if it must and may be shortened."""
        most = self._llm.config.max_seq_len - self._min_answer
        first = 1 if dialog[0]["role"] == "system" else 0
        dropped = 0
        ids = self._format.encode(dialog)
        while len(ids) > most:
            if self._on_overflow == "refuse" or len(dialog) - first < 3:
                what = "the message alone" if len(dialog) - first < 3 else "the dialog"
                raise ChatError(
                    f"{what} does not fit: {len(ids)} tokens, and {self._min_answer} for an answer, max_seq_len is "
                    f"{self._llm.config.max_seq_len}; /undo or /reset, {setting('on_overflow')} drop, or a larger "
                    f"{setting('max_seq_len')}"
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
        first = self._first_turn()
        if len(self.messages) - first < 2:
            return False
        del self.messages[-2:]
        return True

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        del self.messages[self._first_turn() :]

    def set_system(self, text: str | None) -> None:
        """Replace the system prompt; None or an empty text removes it. The turns stay."""
        turns = self.messages[self._first_turn() :]
        self.messages = [{"role": "system", "content": text}, *turns] if text else turns

    def save(self, path: Path) -> None:
        """Write the dialog as JSON, a list of messages; the file is complete or not there.

        Raises:
            ChatError: it cannot be written.
        """
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True) if partial.parent.is_dir() else None
            raise ChatError(f"cannot save to {path}: {error.strerror or error}") from error

    def _first_turn(self) -> int:
        return 1 if self.messages and self.messages[0]["role"] == "system" else 0
