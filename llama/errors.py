"""Every error that a user can cause, in one tree.

    LLaMAError                 exit code 1
    ├── UserError              exit code 2: the caller can mend it
    │   ├── FlagError          a flag is unknown, misspelt or has a value that is not allowed
    │   ├── ConfigError        two settings contradict each other, or one is out of its range
    │   ├── CheckpointError    a checkpoint directory, its params.json or its tensors
    │   ├── TokenizerError     a tokenizer file, or one that does not match the model
    │   ├── PromptError        a prompt that cannot be read or does not fit
    │   ├── ChatError          a dialog that cannot become a prompt, or a chat template that does not work
    │   ├── DatastoreError     a drafter's file (datastore or word bank) that cannot be read, used or written
    │   ├── OutputError        stdout, where it is closed or cannot be written
    │   ├── TaskError          a task of an evaluation that is unknown, or that fails
    │   └── LibraryError       a library that only an extra of this package installs, and that is not there
    ├── ProblemsFoundError     exit code 2: `inspect` found problems, which have been printed
    ├── EngineError            exit code 1: the engine lost its state, and with it the requests that ran
    ├── QueueFullError         exit code 1: more requests wait than may
    ├── RecompileError         exit code 3: a program was compiled after warm-up
    ├── GrammarCutError        exit code 4: under `--strict_grammar` a text ended before its grammar was satisfied
    └── InterruptedRunError    exit code 130: an interrupt while programs were compiled, or Ctrl-C on the command line

A message says what happened, what was got, what was expected, and how to mend it. It names settings as Python does
(``max_seq_len``), by ``setting("max_seq_len")`` where the name stands within the message; a command shows those that it
has as flags (``--max_seq_len``). The command line prints the message without a traceback and exits with ``exit_code``.
``assert`` is kept for invariants that no input can break.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_MARK = "\x1f"  # ASCII's unit separator, which no other part of a message contains
_SETTING = re.compile(f"{_MARK}(\\w+){_MARK}")
_CONTROL = re.compile(f"(?!{_MARK})[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LEADING = re.compile(r"^\w+(?=: )")


def setting(name: str) -> str:
    """Mark a setting's name for an error's message: plain in ``str(error)``, a flag on the command line."""
    return f"{_MARK}{name}{_MARK}"


def on_one_line(text: str) -> str:
    """Write control characters as escapes: those of names in files could break a line, or command a terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class LLaMAError(Exception):
    """The root of the tree; catch it to catch all of them.

    Args:
        message: one line, for control characters are written as escapes; names that ``setting`` marked become plain in
            ``str(error)``.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        self._message = on_one_line(message)
        super().__init__(_SETTING.sub(r"\1", self._message))

    def shown(self, spell: Callable[[str], str]) -> str:
        """Return the message with the name of each setting as ``spell`` writes it."""
        return _SETTING.sub(lambda found: spell(found[1]), self._message)


class UserError(LLaMAError):
    """Something that the caller gave and can mend."""

    exit_code = 2


class FlagError(UserError):
    """An unknown flag, or a value that its flag does not take."""


class ConfigError(UserError, ValueError):
    """A setting out of its range, or two that contradict each other.

    A message that begins with a name and a colon (``top_p: got 2, ...``) begins with a setting.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_LEADING.sub(lambda found: setting(found[0]), message))


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged, or not what its params.json says."""


class TokenizerError(UserError):
    """A tokenizer that is absent, damaged, or does not match the model."""


class PromptError(UserError, ValueError):
    """A prompt that does not fit, or that cannot be read."""


class ChatError(UserError, ValueError):
    """A dialog that is not allowed, or a chat template that is absent, damaged, or exceeds its limits."""


class DatastoreError(UserError):
    """A datastore or word bank that is absent, damaged, or of another tokenizer; or text that cannot become one."""


class OutputError(UserError):
    """stdout is closed, or a result cannot be written to it."""


class TaskError(UserError):
    """A task of lm-evaluation-harness that is unknown, damaged, or fails."""


class LibraryError(UserError, ImportError):
    """A library that an extra of this package installs, and that is not there."""


class ProblemsFoundError(UserError):
    """``inspect`` found problems in a checkpoint and has printed them."""


class QueueFullError(LLaMAError):
    """A request was not taken because ``max_waiting`` others wait already."""


class EngineError(LLaMAError):
    """The engine lost its state, for instance because the device failed; the requests that ran have ended."""


class RecompileError(LLaMAError):
    """A program would be compiled after warm-up, which ``fail_on_recompile`` forbids."""

    exit_code = 3


class GrammarCutError(LLaMAError):
    """A generation, which has been printed, ended before its grammar was satisfied, under ``--strict_grammar``."""

    exit_code = 4


class InterruptedRunError(LLaMAError):
    """Interrupted: while programs were compiled, or on the command line, where the results so far have been printed."""

    exit_code = 130
