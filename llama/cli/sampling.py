"""The flags of a request's controls, made from the declarations of SamplingParams for all commands that generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import starmap
from pathlib import Path
from typing import Any

from llama.cli.flags import Command, section, with_flags
from llama.config import GenerationDefaults
from llama.errors import FlagError
from llama.sampling_params import Control, SamplingParams, controls

FROM_CHECKPOINT = {f.name for f in fields(GenerationDefaults)}
KINDS = {  # how a flag writes a field's type, where that differs
    "Mapping[int, float]": "dict[int, float]",
    "tuple[str | tuple[int, ...], ...]": "list[str]",
    "tuple[str, ...]": "list[str]",
    "tuple[int, ...]": "list[int]",
    "str | Mapping[str, Any]": "str",
}


def takes_controls(
    *, without: Sequence[str] = (), params: type[SamplingParams] = SamplingParams, **defaults: Any
) -> Callable[[Callable[..., None]], Command]:
    """Give a command a flag for each control; it receives their values in its parameter ``sampling``, by field.

    In the command's docstring ``{sampling}`` stands for the help of these flags.

    Args:
        without: controls that the command lacks, or has flags of its own for.
        params: the dataclass that declares the controls.
        defaults: the command's own defaults, for a checkpoint that has none.
    """
    chosen = {name: each for name, each in controls(params).items() if name not in without}
    declared = {f.name: defaults.get(f.name, f.default) for f in fields(params)}
    kinds = {f.name: _kind(str(f.type)) for f in fields(params)}
    absent = {name: _flag_default(name, declared[name]) for name in chosen}
    return with_flags("sampling", absent, kinds, {"sampling": _help(chosen, declared)})


def _kind(annotation: str) -> str:
    """Return the type of a field's flag, as parsers are found by it."""
    plain = annotation.removesuffix(" | None")
    return KINDS.get(plain, plain) + (" | None" if plain not in ("bool", annotation) else "")


def _flag_default(name: str, default: Any) -> Any:
    """Return a flag's default: None where a checkpoint's default or an empty value stands without the flag."""
    return None if default == () or name in FROM_CHECKPOINT else default


def _help(chosen: Mapping[str, Control], declared: Mapping[str, Any]) -> str:
    """Write the sections of a command's docstring that describe these controls."""
    sections: dict[str, dict[str, str]] = {}
    for name, each in chosen.items():
        text = each.flag or each.described
        if name in FROM_CHECKPOINT:
            text += f" Default: generation_config.json's, else {declared[name]}."
        sections.setdefault(each.group, {})[name] = text
    return "\n\n".join(starmap(section, sections.items()))


def checked(sampling: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the fields of SamplingParams that the user gave, checked as far as possible without a model.

    Args:
        sampling: the values of the flags by field; None where one is absent.
        more: fields for which the command has flags of its own.

    Raises:
        FlagError: the schema's file cannot be read.
        ConfigError: a value is out of its range, two contradict each other, or a grammar is wrong.
    """
    given = {name: value for name, value in {**sampling, **more}.items() if value is not None}
    schema = given.get("json_schema")
    if schema is not None:
        try:
            given["json_schema"] = Path(schema).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FlagError(f"--json_schema {schema}: {getattr(error, 'strerror', None) or error}") from error
    params = SamplingParams(**given)
    if params.is_constrained:
        from llama.grammar import compile_grammar

        compile_grammar(params)
    return given
