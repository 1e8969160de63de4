"""The command line, `llama-xla`: one module per command; flags.py and output.py hold the code that they share.

A command is a function. Its signature declares its flags with their types and defaults, and its docstring is their
help. Results go to stdout, the log to stderr. Errors of errors.py are shown without a traceback and set the exit code;
130 is Ctrl-C.
"""

from __future__ import annotations

import difflib
import inspect
import io
import os
import sys
from collections.abc import Sequence

from llama import __version__
from llama.cli import streams
from llama.cli.batch import batch
from llama.cli.bench import bench, kernels
from llama.cli.chat import chat
from llama.cli.checkpoints import convert, inspect as inspect_directory, reshard
from llama.cli.datastore import datastore
from llama.cli.evaluate import evaluate
from llama.cli.flags import Command, help_text, normalise, parser_for, shown
from llama.cli.generate import generate
from llama.cli.output import write
from llama.cli.plan import plan
from llama.cli.score import score
from llama.errors import FlagError, InterruptedRunError, LLaMAError, OutputError
from llama.ranks import current_ranks

__all__ = ["COMMANDS", "main", "run"]

EXIT_CLOSED_PIPE = 141
COMMANDS: dict[str, Command] = {
    "generate": generate,
    "chat": chat,
    "batch": batch,
    "eval": evaluate,
    "score": score,
    "plan": plan,
    "inspect": inspect_directory,
    "convert": convert,
    "reshard": reshard,
    "datastore": datastore,
    "bench": bench,
    "kernels": kernels,
}
USAGE = f"""llama-xla {__version__}: text generation with LLaMA models on PyTorch/XLA

  llama-xla TEXT       continue a text: short for llama-xla generate TEXT
  llama-xla generate   continue prompts
  llama-xla chat       talk with a chat model
  llama-xla batch      answer every line of a file, over one or several processes
  llama-xla eval       run lm-evaluation-harness's tasks
  llama-xla score      choose between given answers, and count the right ones
  llama-xla plan       show how a prompt is cut into chunks, or a model over devices
  llama-xla inspect    show what a checkpoint holds and needs
  llama-xla convert    write a checkpoint as safetensors
  llama-xla reshard    split or join a checkpoint in Meta's format
  llama-xla datastore  make or show the file that retrieval drafts from
  llama-xla bench      measure speed, alone or beside transformers and llama.cpp
  llama-xla kernels    time the ways to compute a linear layer
  llama-xla --version

llama-xla help COMMAND lists a command's flags, and so does llama-xla COMMAND --help.
"""
VERSION = ("-V", "--version", "version")
HELP = ("-h", "--help", "help")


def run(arguments: Sequence[str]) -> None:
    """Run one command from raw arguments, the command's name first.

    Raises:
        LLaMAError: the command failed; ``main`` shows the message.
    """
    import fire
    from fire.decorators import SetParseFns

    name, *flags = arguments
    command = COMMANDS[name]
    parameters = inspect.signature(command).parameters
    flags = normalise(command, flags)
    missing = [
        k for k, p in parameters.items() if p.default is p.empty and not any(f.startswith(f"--{k}=") for f in flags)
    ]
    if missing:
        raise FlagError(f"--{missing[0]} is needed; llama-xla {name} --help lists the flags")
    parsers = {key: parser_for(key, str(p.annotation)) for key, p in parameters.items()}
    fire.Fire(SetParseFns(**parsers)(command), command=flags, name=f"llama-xla {name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script ``llama-xla``: run a command, show errors without a traceback, exit with their code."""
    try:
        streams.mend()
    except OutputError as error:
        print(f"llama-xla: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(_exit_code(list(sys.argv[1:] if arguments is None else arguments)))


def _exit_code(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks must not end the run
    if arguments and _begins_with_text(arguments):
        arguments = ["generate", *arguments]
    try:
        code = _dispatch(arguments)
        write("")  # flushes what a library has printed, here, where a closed pipe is expected
        return code
    except LLaMAError as error:
        command = COMMANDS.get(arguments[0]) if arguments else None
        print(f"llama-xla: {error if command is None else shown(error, command)}", file=sys.stderr)
        if isinstance(error, OutputError):
            streams.discard(sys.stdout)
        return error.exit_code
    except KeyboardInterrupt:
        print("llama-xla: interrupted", file=sys.stderr)
        return InterruptedRunError.exit_code
    except BrokenPipeError:
        streams.discard(sys.stdout)
        return EXIT_CLOSED_PIPE


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments:
        print(USAGE, file=sys.stderr)
        return FlagError.exit_code
    name, *rest = arguments
    if name in VERSION:
        if rest:
            raise FlagError(f"unexpected argument {rest[0]!r} after {name}, expected none")
        write(f"llama-xla {__version__}\n")
    elif name in HELP:
        write(f"{_help(rest)}\n")
    elif name not in COMMANDS:
        raise _unknown(name)
    elif {"-h", "--help"} & set(rest):
        write(f"{help_text(name, COMMANDS[name])}\n")
    else:
        _check_directory()
        current_ranks()  # before anything is loaded
        run(arguments)
    return 0


def _help(arguments: Sequence[str]) -> str:
    """Return the help of the command that the arguments name, or of all commands."""
    named = [argument for argument in arguments if not argument.startswith("-")]
    if not named:
        return USAGE
    if named[0] not in COMMANDS:
        raise _unknown(named[0])
    return help_text(named[0], COMMANDS[named[0]])


def _begins_with_text(arguments: Sequence[str]) -> bool:
    """Whether the first argument is a text to continue: several words, or one that is like no command."""
    first, *rest = arguments
    if first in (*VERSION, *HELP) or first.startswith("-") or not first.strip():
        return False
    if len(first.split()) > 1:
        return True
    has_prompt = any(argument.startswith("--prompt") for argument in rest)
    return not has_prompt and not difflib.get_close_matches(first, COMMANDS, n=1)


def _unknown(argument: str) -> FlagError:
    near = difflib.get_close_matches(argument, (*COMMANDS, *VERSION, *HELP), n=1)
    if near and near[0] != argument:
        hint = f"did you mean {near[0]}?"
    elif argument.startswith("-"):
        hint = f"flags come after a command, for instance llama-xla generate {argument}"
    else:
        hint = f"expected one of {', '.join(COMMANDS)}"
    return FlagError(f"unknown command {argument!r}; {hint}")


def _check_directory() -> None:
    """Refuse to run in a directory that has been deleted: some libraries end the process there."""
    try:
        os.getcwd()
    except OSError as error:
        raise FlagError(f"the current directory: {error.strerror}; change to another one") from error
