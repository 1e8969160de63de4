"""Flags: arguments checked against a command's signature, and the help made from its docstring.

fire dispatches, but would read ``--prompt "1, 2"`` as a tuple, keep only the last of a repeated flag, and answer a
misspelt one with a trace. So arguments are checked and written out before fire sees them, and each value is parsed by
the annotation of its parameter.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from llama.cli.hub import is_hub_name, locate
from llama.errors import FlagError, LLaMAError

Command = Callable[..., None]
REQUIRED = inspect.Parameter.empty  # in place of a flag's default

ALIASES = {  # other systems' names, where a command has the flag that they stand for
    "max_tokens": "max_gen_len",
    "max_new_tokens": "max_gen_len",
    "repeat_penalty": "repetition_penalty",
    "draft_len": "draft_lens",
}


def normalise(command: Command, arguments: Sequence[str]) -> list[str]:
    """Check raw arguments against a command's signature and write each as ``--name=value``.

    Args:
        command: its attribute ``short``, if any, names one-letter forms of flags; ``nameless`` the repeatable flag of
            text whose values may come without its name.
        arguments: those after the command's name. A flag is ``--name value``, ``--name=value``, or ``--name`` for a
            boolean; dashes and underscores within a name are the same. Parameters that are not keyword-only may come
            without their names, in order.

    Returns:
        One string per flag; the values of a repeatable flag are joined into one JSON list.

    Raises:
        FlagError: an unknown flag (the message names the nearest known one), a missing or repeated value, or an
            argument that is no flag.
    """
    parameters = inspect.signature(command).parameters
    kinds = {name: str(p.annotation) for name, p in parameters.items()}
    short = {f"-{letter}": f"--{name}" for letter, name in getattr(command, "short", {}).items()}
    places = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    texts: list[str] | None = [] if hasattr(command, "nameless") else None
    values: dict[str, list[str]] = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        argument = short.get(argument, argument)
        if places and not argument.startswith("-"):
            values.setdefault(places.pop(0), []).append(argument)
            continue
        if texts is not None and not argument.startswith("-"):
            texts.append(argument)
            continue
        if not argument.startswith("--") or argument == "--":
            hint = f"for instance --prompt {argument!r}" if "prompt" in kinds else "--help lists the flags"
            raise FlagError(f"unexpected argument {argument!r}: every value belongs to a flag; {hint}")
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
                raise FlagError(f"--{name}: got no value, expected one after it{hint}")
            value = queue.pop(0)
        values.setdefault(name, []).append(value)
    if texts:
        values[command.nameless] = [_nameless(command.nameless, texts, values)]  # type: ignore[attr-defined]
    return [f"--{name}={_joined(name, kinds[name], found)}" for name, found in values.items()]


def _nameless(flag: str, texts: Sequence[str], values: Mapping[str, Sequence[str]]) -> str:
    """Return the texts that came without their flag's name, as a JSON list; what may be something else is refused."""
    if flag in values:
        raise FlagError(
            f"unexpected argument {texts[0]!r} beside --{flag}: put a text of several words in quotes, and --{flag} "
            "before each text"
        )
    words = [text for text in texts if text == "".join(text.split())]
    if words and len(texts) > 1:
        raise FlagError(
            f"unexpected argument {texts[1]!r} after {texts[0]!r}: put a text of several words in quotes, or --{flag} "
            "before each text"
        )
    for word in words:
        if (found := _looks_like(word)) is not None:
            what, cure = found
            raise FlagError(
                f"unexpected argument {word!r}: that is {what}, expected a text; write {cure}, or --{flag} {word} "
                "if it is the text"
            )
    return json.dumps(list(texts))


def _looks_like(word: str) -> tuple[str, str] | None:
    """Return what a word is that hardly is a prompt, and the flag to write instead."""
    if os.path.isdir(word):
        return "a directory", f"--ckpt_dir {word}"
    if word.endswith(WEIGHTS) and os.path.isfile(word):
        return "a file of weights", f"--ckpt_dir {word if word.endswith('.gguf') else Path(word).parent}"
    if os.path.isfile(word):
        return "a file", f"--prompts_file {word}"
    if is_hub_name(word):
        return "like the name of a model", f"--ckpt_dir {word}"
    return None


def _is_flag(argument: str, known: Mapping[str, str]) -> bool:
    return argument.startswith("--") and argument[2:].partition("=")[0].replace("-", "_") in known


def _unknown(written: str, name: str, known: dict[str, str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
    return f"unknown flag --{written}; {hint}"


def _joined(name: str, kind: str, values: list[str]) -> str:
    """Return the one value of a flag, or the values of a repeatable one as a JSON list."""
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
    """Return the function that turns the text after a flag into its value."""

    def parse(text: str) -> Any:
        if name in CHECKPOINTS:
            if not text:
                raise FlagError(f"--{name}: got an empty text, expected the directory of a checkpoint")
            return locate(text)
        try:
            return PARSERS[kind.removesuffix(" | None")](text)
        except (ValueError, KeyError, TypeError):
            raise FlagError(f"--{name}: got {text!r}, expected {EXPECTED[kind.removesuffix(' | None')]}") from None

    return parse


CHECKPOINTS = ("ckpt_dir", "draft_ckpt_dir", "directory", "src")  # flags that name a checkpoint
WEIGHTS = (".gguf", ".safetensors", ".pth", ".bin")


def section(title: str, texts: Mapping[str, str]) -> str:
    """The section of a command's docstring that describes flags, by their names."""
    return "\n".join([f"{title}:", *(f"    {name}: {text}" for name, text in texts.items())])


def with_flags(
    parameter: str, defaults: Mapping[str, Any], kinds: Mapping[str, str], texts: Mapping[str, str]
) -> Callable[[Callable[..., None]], Command]:
    """Give a command flags that are declared elsewhere; it receives their values in one parameter, by name.

    Args:
        defaults: of each flag; ``REQUIRED`` for one that must be given.
        kinds: the annotation of each flag's value, by which its parser is found.
        texts: help by its name, which in the command's docstring, in braces, stands for it: sections as a docstring has
            them, or a flag's line.
    """

    def decorate(command: Callable[..., None]) -> Command:
        @wraps(command)
        def flagged(*places: Any, **values: Any) -> None:
            signature.bind(*places, **values)  # refuses a call without a required flag
            given = {name: values.pop(name, default) for name, default in defaults.items()}
            command(*places, **{parameter: given}, **values)

        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[name])
            for name, default in defaults.items()
        ]
        signature = inspect.signature(command)
        own = [p for name, p in signature.parameters.items() if name != parameter]
        signature = signature.replace(parameters=[*own, *added])
        flagged.__signature__ = signature  # type: ignore[attr-defined]
        described = inspect.getdoc(command) or ""
        for name, text in texts.items():
            described = described.replace(f"{{{name}}}", text)
        flagged.__doc__ = described
        return flagged

    return decorate


def _biases(text: str) -> dict[int, float]:
    """Parse ``15043:-100,29889:5``, or a JSON object."""
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
    """Render a command's docstring with its flags as they are typed: the text of ``--help``.

    A flag is a line ``name: text`` in the docstring; the lines after it that are indented at least as
    far continue its text.
    """
    parameters = inspect.signature(command).parameters
    entries: list[tuple[str, str]] = []  # (flag or "", text)
    for line in f"llama-xla {name}: {inspect.getdoc(command)}".split("\n"):
        words = line.strip()
        flag, _, text = words.partition(": ")
        indent = len(line) - len(words)
        if flag in parameters and indent == FLAG_INDENT:
            entries.append((flag, text))
        elif words and indent >= FLAG_INDENT and entries[-1][0]:
            entries[-1] = entries[-1][0], f"{entries[-1][1]} {words}"
        else:
            entries.append(("", line))
    return "\n".join(_flag_help(flag, text, parameters[flag]) if flag else text for flag, text in entries)


def _flag_help(flag: str, text: str, parameter: inspect.Parameter) -> str:
    """Render a flag, its help, its other names and its default, wrapped within the help's column."""
    kind, default = str(parameter.annotation).removesuffix(" | None"), parameter.default
    others = [f"--{other}" for other, meant in ALIASES.items() if meant == flag]
    text += REPEATABLE.get(kind, "")
    text += f" Also {', '.join(others)}." if others else ""
    text += " Required." if default is inspect.Parameter.empty else ""
    text += f" [{default}]" if isinstance(default, (int, float, str)) and not isinstance(default, bool) else ""
    label = f"  --{flag}{PLACEHOLDERS[kind]}".ljust(HELP_COLUMN - 1) + " "
    joined = text.replace(" --", f"{JOINT}--")  # a line that began with another flag would look like its entry
    filled = textwrap.fill(
        joined, HELP_WIDTH, initial_indent=label, subsequent_indent=" " * HELP_COLUMN, break_on_hyphens=False
    )
    return filled.replace(JOINT, " ")


FLAG_INDENT = 4
HELP_COLUMN = 31
HELP_WIDTH = 110
JOINT = "\N{NO-BREAK SPACE}"
REPEATABLE = {
    "list[str]": " May be repeated, or be a JSON list of strings.",
    "dict[int, float]": " Also as a JSON object.",
}
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
    """Return the value if it is one of those that the flag takes.

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
