"""Messages with several lines, editing and a history, through prompt_toolkit.

A pasted block is one piece, whatever it holds: terminals mark it (bracketed paste). The history ends with the process.
"""

from __future__ import annotations

import sys
from contextlib import suppress

from prompt_toolkit import PromptSession
from prompt_toolkit.history import DummyHistory
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.vt100 import Vt100_Output

from llama.cli.lines import Lines


class LineEditor(Lines):
    """Reads messages with an editor: Enter sends, Alt-Enter or a backslash at the end begins a line."""

    edits = True

    def __init__(self) -> None:
        keyboard = Vt100Input(sys.stdin)
        screen = _Screen.from_pty(sys.stdout, enable_bell=False)
        screen.enable_cpr = False  # asks the terminal where its cursor is, for menus, which we have not
        self._messages: PromptSession[str] = PromptSession(
            input=keyboard,
            output=screen,
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            reserve_space_for_menu=0,
            enable_suspend=True,
        )
        self._answers: PromptSession[str] = PromptSession(
            input=keyboard, output=screen, history=DummyHistory(), reserve_space_for_menu=0
        )

    def read(self, prompt: str, text: str = "") -> str:
        """See Lines."""
        return _asked(self._messages, prompt, text)

    def answer(self, question: str) -> str:
        """See Lines."""
        return _asked(self._answers, question)


def _asked(session: PromptSession[str], prompt: str, text: str = "") -> str:
    try:
        typed = session.prompt(prompt, default=text, set_exception_handler=False)
    except OSError:
        raise EOFError from None  # the terminal is gone
    return typed.encode(errors="surrogateescape").decode(errors="replace")  # bytes that are not UTF-8


def _keys() -> KeyBindings:
    """Return the keys that differ from prompt_toolkit's for several lines, where Enter begins a line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _Screen(Vt100_Output):
    """The screen, of which it is no error that it is gone: the keyboard notices."""

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()
