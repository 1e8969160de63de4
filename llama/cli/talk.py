"""The conversation of `llama-xla chat` at a terminal: messages, commands, and what Ctrl-C does between them."""

from __future__ import annotations

import difflib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llama.cli.lines import Lines, PlainLines, tell
from llama.cli.output import counted, interruptible, write
from llama.cli.terminal import as_shown, can_edit, visible
from llama.errors import ChatError, InterruptedRunError, LLaMAError, OutputError, UserError

if TYPE_CHECKING:
    from llama.conversation import Conversation
    from llama.generation import LLaMA

turns = logging.getLogger("llama.turns")

SAVED_AS = "conversation.json"


class Talk:
    """Answers message after message until /exit or Ctrl-D; errors and interrupts are shown, and the talk goes on.

    Args:
        llm: the conversation's.
        described: an error's message as users read it.
    """

    def __init__(
        self, llm: LLaMA, conversation: Conversation, lines: Lines, described: Callable[[LLaMAError], str]
    ) -> None:
        self._llm, self._conversation, self._lines, self._described = llm, conversation, lines, described

    def run(self) -> None:
        """Talk.

        Raises:
            OutputError: stdout cannot be written.
        """
        tell("/help lists the commands.\n")
        with _interrupts_ignored():
            while self._step():
                pass

    def _step(self) -> bool:
        """Read a message or a command and carry it out; return False to end."""
        try:
            return self._carry_out(self._lines.read("> "))
        except EOFError:
            return False
        except OutputError:
            raise
        except InterruptedRunError as error:
            self._show(f"{error}; /regen asks again")
        except UserError as error:
            self._show(self._described(error))
        except KeyboardInterrupt:
            pass  # at the prompt: a new one
        return True

    def _show(self, problem: str) -> None:
        print(as_shown(f"llama-xla: {problem}", sys.stderr), file=sys.stderr)

    def _carry_out(self, text: str) -> bool:
        word = (text.split() or [""])[0]
        name = ALIASES.get(word, word)
        is_block = "\n" in text.strip()
        if not text.startswith("/") or (is_block and name not in COMMANDS):
            if text.strip():
                self._answer(lambda: self._conversation.say(text))
            return True
        if name not in COMMANDS:
            near = difflib.get_close_matches(word, (*COMMANDS, *ALIASES), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            tell(
                f"{visible(word)} is no command; {hint}/help lists them. "
                "A message may begin with a space before its slash.\n"
            )
            return True
        command, rest = COMMANDS[name], text[len(word) :].strip()
        if rest and not command.takes:
            raise ChatError(f"{word}: got {rest!r:.50} after it, expected nothing")
        if name == "/exit":
            return False
        command.act(self, rest)
        return True

    def _answer(self, asked: Callable[[], Iterator[str]]) -> None:
        try:
            with interruptible(self._llm):
                stream_answer(asked, self._conversation)
        finally:
            self._llm.take_interrupt()  # one that came when the answer had just ended is not for the next
        if self._conversation.unanswered is not None:
            tell("No answer came, so the dialog is as before. /regen asks again, /edit changes the message.\n")

    def _regen(self, rest: str) -> None:
        self._answer(self._conversation.regenerate)

    def _edit(self, rest: str) -> None:
        last = self._conversation.last_message
        if last is not None and not rest and not self._lines.edits:
            tell(f"Your last message is below; /edit TEXT sends another one instead.\n{as_shown(last)}\n")
            return
        if last is not None and not rest:
            try:
                rest = self._lines.read("edit> ", last)
            except (KeyboardInterrupt, EOFError):
                rest = ""
            if not rest.strip():
                tell("Nothing is changed.\n")
                return
        self._answer(lambda: self._conversation.edit(rest))

    def _undo(self, rest: str) -> None:
        tell("Taken back.\n" if self._conversation.undo() else "There is nothing to take back.\n")

    def _system(self, rest: str) -> None:
        self._conversation.set_system(rest or None)
        tell("Set.\n" if rest else "Taken away.\n")

    def _load(self, rest: str) -> None:
        path = _path(rest)
        self._conversation.load(path)
        messages = self._conversation.messages
        count = sum(message["role"] == "assistant" for message in messages)
        has_system = bool(messages) and messages[0]["role"] == "system"
        tell(
            f"Loaded {counted(count, 'turn')} from {as_shown(str(path))}, "
            f"{'with a' if has_system else 'without a'} system prompt.\n"
        )
        if self._conversation.unanswered is not None:
            tell("Its last message has no answer yet: /regen asks it.\n")

    def _save(self, rest: str) -> None:
        path = _path(rest)
        shown = as_shown(str(path))
        if path.is_file() and not self._lines.agrees(f"{shown} is there already. Overwrite it?"):
            tell("Not saved.\n")
            return
        self._conversation.save(path)
        tell(f"Saved to {shown}.\n")

    def _reset(self, rest: str) -> None:
        self._conversation.reset()
        tell("All turns are forgotten.\n")

    def _help(self, rest: str) -> None:
        tell(HELP)


class Command(NamedTuple):
    """A command of the conversation.

    Attributes:
        takes: what may come after its name; empty if nothing.
        does: a line of /help.
        act: the method, which gets what came.
    """

    takes: str
    does: str
    act: Callable[[Talk, str], None]


def _end(talk: Talk, rest: str) -> None:
    raise AssertionError("/exit is no action")


COMMANDS = {
    "/regen": Command("", "answer the last message again", Talk._regen),
    "/edit": Command("TEXT", "change the last message and send it; with TEXT, send that instead", Talk._edit),
    "/undo": Command("", "take back the last turn", Talk._undo),
    "/system": Command("TEXT", "set the system prompt; without TEXT, take it away", Talk._system),
    "/save": Command("FILE", f"write the dialog as JSON, to {SAVED_AS} without FILE", Talk._save),
    "/load": Command("FILE", f"go on with a saved dialog, from {SAVED_AS} without FILE", Talk._load),
    "/reset": Command("", "forget all turns; the system prompt stays", Talk._reset),
    "/help": Command("", "list the commands", Talk._help),
    "/exit": Command("", "end; so does Ctrl-D", _end),
}
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help"}
HELP = "".join(f"{name + ' ' + each.takes:13} {each.does}\n" for name, each in COMMANDS.items()) + (
    "Ctrl-C stops an answer. A pasted block is one message. A line that ends in \\ goes on in the next.\n"
)


def _path(rest: str) -> Path:
    return Path(os.path.expanduser(rest or SAVED_AS))


def open_lines() -> Lines:
    """Return the best way to read from this terminal."""
    if can_edit():
        try:
            from llama.cli.line_editor import LineEditor  # only who edits pays for importing prompt_toolkit
        except ImportError:
            return PlainLines()
        return LineEditor()
    return PlainLines()


def stream_answer(asked: Callable[[], Iterator[str]], conversation: Conversation) -> None:
    """Stream one answer to stdout, and log its tokens and times.

    Args:
        asked: returns the answer in pieces.
        conversation: that it belongs to.
    """
    for piece in asked():
        write(as_shown(piece))
    write("\n")
    result = conversation.result
    if result is not None:
        turns.info(
            "[%d tokens kept, %d new, %d generated%s; first token after %.2f s, then %.1f tok/s]",
            result.cached_tokens,
            result.prompt_tokens - result.cached_tokens,
            len(result.token_ids),
            {"stop": "", "length": ", cut at the limit", "interrupted": ", interrupted"}[result.finish_reason],
            result.timing.ttft_s,
            result.timing.decode_tok_s,
        )


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Within: Ctrl-C does nothing but where a block says otherwise, so that none ends the talk between two of them.

    By a handler, because processes that are started would inherit SIG_IGN.
    """
    before = signal.signal(signal.SIGINT, lambda signum, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
