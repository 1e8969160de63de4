"""Every error that a user can cause, in one tree.

    LLaMAError                 exit code 1
    ├── UserError              exit code 2: the caller can mend it
    │   ├── FlagError          a flag is unknown, misspelt or has a value that is not allowed
    │   ├── ConfigError        two settings contradict each other, or one is out of its range
    │   ├── CheckpointError    a checkpoint directory, its params.json or its tensors
    │   ├── TokenizerError     a tokenizer file, or one that does not match the model
    │   ├── PromptError        a prompt that cannot be served as asked
    │   └── ChatError          a dialog that no prompt can be made of, or a chat template that does not work
    ├── ProblemsFoundError     exit code 2: `inspect` found problems, which have been printed
    ├── EngineError            exit code 1: the engine lost its state, and with it the requests that ran
    ├── QueueFullError         exit code 1: more requests wait than may
    ├── RecompileError         exit code 3: a program was compiled after warm-up
    └── InterruptedRunError    exit code 130: Ctrl-C, after what had been generated was printed

A message says what happened, what was got, what was expected, and how to mend it. The command line prints the message
without a traceback and exits with ``exit_code``. ``assert`` is kept for invariants that no input can break.
"""


class LLaMAError(Exception):
    """The root of the tree; catch it to catch all of them."""

    exit_code = 1


class UserError(LLaMAError):
    """Something that the caller gave and can mend."""

    exit_code = 2


class FlagError(UserError):
    """An unknown flag, or a value that its flag does not take."""


class ConfigError(UserError, ValueError):
    """A setting out of its range, or two that contradict each other."""


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged, or not what its params.json says."""


class TokenizerError(UserError):
    """A tokenizer that is absent, damaged, or does not match the model."""


class PromptError(UserError, ValueError):
    """A prompt that does not fit, or that cannot be read."""


class ChatError(UserError, ValueError):
    """A dialog whose roles or contents are not allowed, or a chat template that is absent, damaged, or takes too
    much.
    """


class ProblemsFoundError(UserError):
    """A checkpoint was looked at, and something stands in the way of using it."""


class QueueFullError(LLaMAError):
    """A request was not taken because ``max_waiting`` others wait already."""


class EngineError(LLaMAError):
    """The engine lost its state, for instance because the device failed; the requests that ran have ended."""


class RecompileError(LLaMAError):
    """A program was compiled after warm-up although ``fail_on_recompile`` promised that none would be."""

    exit_code = 3


class InterruptedRunError(LLaMAError):
    """The command line was interrupted; the results so far have been printed."""

    exit_code = 130
