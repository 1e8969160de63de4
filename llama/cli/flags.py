"""Flags: what is typed, checked against a command's signature; and the help, made from its docstring.

fire dispatches, but would read ``--prompt "1, 2"`` as a tuple, keep the last of a repeated flag only, and answer a
misspelt one with a trace. So arguments are checked and written out before it sees them, and each value is parsed as its
parameter is annotated.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama.errors import FlagError, LLaMAError

Command = Callable[..., None]

ALIASES = {  # other systems' names, where a command has the flag that they stand for
    "max_tokens": "max_gen_len",
    "max_new_tokens": "max_gen_len",
    "repeat_penalty": "repetition_penalty",
}
NOT_YET = {"mp": "splitting a model over several devices is not supported yet; run without it, on one device"}


def normalise(command: Command, arguments: Sequence[str]) -> list[str]:
    """Check raw arguments against a command's signature and write each as ``--name=value``, as fire takes it without
    guessing.

    Args:
        arguments: what follows the command's name. A flag is ``--name value``, ``--name=value``, or ``--name`` for a
            boolean; dashes and underscores within a name are the same. Parameters that are not keyword-only may come
            without their names, in order. ``command.short`` may name one-letter forms of some.

    Returns:
        One string a flag; a repeatable flag's values are joined into one JSON list.

    Raises:
        FlagError: an unknown flag (the nearest right one is named), a missing or repeated value, or an argument that is
            no flag.
    """
    parameters = inspect.signature(command).parameters
    kinds = {name: str(p.annotation) for name, p in parameters.items()}
    short = {f"-{letter}": f"--{name}" for letter, name in getattr(command, "short", {}).items()}
    places = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    values: dict[str, list[str]] = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        argument = short.get(argument, argument)
        if places and not argument.startswith("-"):
            values.setdefault(places.pop(0), []).append(argument)
            continue
        if not argument.startswith("--") or argument == "--":
            raise FlagError(
                f"unexpected argument {argument!r}: every value belongs to a flag, for instance --prompt {argument!r}"
            )
        written, has_value, value = argument[2:].partition("=")
        name = written.replace("-", "_")
        name = ALIASES[name] if name not in kinds and ALIASES.get(name) in kinds else name
        if name not in kinds:
            raise FlagError(_unknown(written, name, kinds))
        if kinds[name] == "bool":
            is_separate = not has_value and bool(queue) and queue[0].lower() in ("true", "false")
            value = value if has_value else (queue.pop(0) if is_separate else "true")
        elif not has_value:
            if not queue or _is_flag(queue[0], kinds):
                hint = f"; if {queue[0]!r} is meant as its value, write --{name}={queue[0]}" if queue else ""
                raise FlagError(f"--{name}: got no value, expected one behind it{hint}")
            value = queue.pop(0)
        values.setdefault(name, []).append(value)
    return [f"--{name}={_joined(name, kinds[name], found)}" for name, found in values.items()]


def _is_flag(argument: str, known: Mapping[str, str]) -> bool:
    return argument.startswith("--") and argument[2:].partition("=")[0].replace("-", "_") in known


def _unknown(written: str, name: str, known: dict[str, str]) -> str:
    if name in NOT_YET:
        return f"--{written}: {NOT_YET[name]}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
    return f"unknown flag --{written}; {hint}"


def _joined(name: str, kind: str, values: list[str]) -> str:
    """The one value of a flag, or the JSON list of a repeatable one's."""
    if not kind.startswith("list[str]"):
        if len(values) > 1:
            raise FlagError(f"--{name}: got it {len(values)} times, expected once")
        return values[0]
    texts: list[str] = []
    for value in values:
        try:
            parsed = json.loads(value) if value.startswith("[") else None
        except ValueError:
            parsed = None  # a text that begins with a bracket
        texts += parsed if isinstance(parsed, list) and all(isinstance(t, str) for t in parsed) else [value]
    if not texts:
        raise FlagError(f"--{name}: got an empty list, expected at least one text (an empty one is --{name} '')")
    return json.dumps(texts)


def parser_for(name: str, kind: str) -> Callable[[str], Any]:
    """How the text behind a flag becomes its value."""

    def parse(text: str) -> Any:
        try:
            return PARSERS[kind.removesuffix(" | None")](text)
        except (ValueError, KeyError, TypeError):
            raise FlagError(f"--{name}: got {text!r}, expected {EXPECTED[kind.removesuffix(' | None')]}") from None

    return parse


def _biases(text: str) -> dict[int, float]:
    """``15043:-100,29889:5``, or a JSON object."""
    if text.startswith("{"):
        return {int(name): float(value) for name, value in json.loads(text).items()}
    pairs = [part.split(":") for part in text.split(",")]
    return {int(name): float(value) for name, value in pairs}


PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "list[str]": json.loads,
    "list[int]": lambda text: [int(part) for part in text.strip("[]() ").split(",")],
    "dict[int, float]": _biases,
}
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list[int]": "whole numbers such as 512,64,8,1",
    "dict[int, float]": "token ids and numbers such as 15043:-100,29889:2.5, or a JSON object",
}


def help_text(name: str, command: Command) -> str:
    """A command's docstring with its flags as they are typed: the one source of ``--help``, and of the README's
    table.
    """
    parameters = inspect.signature(command).parameters
    text = f"llama-xla {name}: {inspect.getdoc(command)}"
    return "\n".join(_help_line(line, parameters) for line in text.split("\n"))


def _help_line(line: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    flag, colon, text = line.strip().partition(": ")
    if not colon or flag not in parameters:
        return line
    kind, default = str(parameters[flag].annotation).removesuffix(" | None"), parameters[flag].default
    required = " Required." if default is inspect.Parameter.empty else ""
    shown = f" [{default}]" if isinstance(default, (int, float, str)) and not isinstance(default, bool) else ""
    return f"  --{flag}{PLACEHOLDERS[kind]}".ljust(31) + f"{text}{required}{shown}"


PLACEHOLDERS = {
    "str": " TEXT",
    "int": " N",
    "float": " X",
    "bool": "",
    "list[str]": " TEXT",
    "list[int]": " N,N,...",
    "dict[int, float]": " N:X,...",
}


def one_of(flag: str, value: str, allowed: Sequence[Any]) -> Any:
    """The value, where it is among those that the flag takes.

    Raises:
        FlagError: it is not.
    """
    if value not in allowed:
        raise FlagError(f"--{flag}: got {value!r}, expected one of {', '.join(allowed)}")
    return value


def shown(error: LLaMAError, command: Command) -> str:
    """Return an error's message with the settings for which the command has a flag written as ``--flag``."""
    known = inspect.signature(command).parameters
    return error.shown(lambda name: f"--{name}" if name in known else name)
