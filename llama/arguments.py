"""What Python callers give to the class LLaMA, checked by type before anything runs. No tensor here.

Annotations are no checks: without these a wrong type would end as a TypeError somewhere in the engine, or pass, as a
text does where a list of texts is expected: it is a sequence of texts, too.
"""

from __future__ import annotations

import difflib
import errno
import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama.chat import Dialog
from llama.errors import ChatError, ConfigError, PromptError
from llama.inputs import Prompt
from llama.sampling_params import SamplingParams

WHOLE_NUMBERS = ("max_gen_len", "min_tokens", "seed", "n", "best_of")
KINDS: dict[type, str] = {str: "a text", Mapping: "a dict"}  # what messages call them
ID_LISTS = ("stop_token_ids", "allowed_token_ids")
TEXT_LISTS = ("stop", "bad_words")


def described(value: Any) -> str:
    """A value's type, and the value where that is short."""
    written = repr(value)
    kind = type(value).__name__
    return kind if value is None or len(written) > 40 or "\n" in written else f"the {kind} {written}"


# --- prompts ----------------------------------------------------------------------------------------------------------


def several(name: str, values: Any) -> list[Any]:
    """A list of prompts, of which each is still to be checked.

    Args:
        name: the argument's, for the message.

    Raises:
        PromptError: one text where several are expected, or nothing that has an order.
    """
    if isinstance(values, str):
        raise PromptError(f"{name}: got one text, expected a list of them: [{values[:20]!r}]")
    if isinstance(values, bytes | bytearray | Mapping | Set) or not isinstance(values, Iterable):
        raise PromptError(f"{name}: got {described(values)}, expected a list of texts, or of lists of token ids")
    return list(values)


def prompt_of(name: str, index: int, value: Any) -> Prompt:
    """A prompt: a text, or token ids as a tuple of int, also where they come as an array.

    Args:
        name: what it is, for the message.
        index: its place in its call.

    Raises:
        PromptError: it is neither.
    """
    if isinstance(value, str):
        return value
    expected = "expected a text, or a list of token ids"
    if isinstance(value, int) or (hasattr(value, "__index__") and not hasattr(value, "__len__")):
        raise PromptError(f"{name} {index}: got {described(value)}, {expected}: one prompt as ids is written [[1, 2]]")
    if hasattr(value, "ndim") and hasattr(value, "tolist"):  # numpy's, torch's
        if value.ndim != 1:
            raise PromptError(f"{name} {index}: got an array of {value.ndim} dimensions, {expected}")
        value = value.tolist()
    if isinstance(value, bytes | bytearray | memoryview) or not isinstance(value, Sequence):
        raise PromptError(f"{name} {index}: got {described(value)}, {expected}")
    return tuple(i if type(i) is int else _id(name, index, i) for i in value)


def _id(name: str, index: int, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        hint = "; a list of prompts has one pair of brackets" if isinstance(value, str) else ""
        raise PromptError(f"{name} {index}: got {described(value)} among its ids, expected whole numbers{hint}")
    try:
        return operator.index(value)
    except TypeError as error:  # an array of numbers, or of fractions
        raise PromptError(f"{name} {index}: got {described(value)} among its ids, expected whole numbers") from error


def texts_of(name: str, values: Any) -> list[str]:
    """A list of texts.

    Raises:
        PromptError: it is not.
    """
    found = several(name, values)
    for index, value in enumerate(found):
        if not isinstance(value, str):
            raise PromptError(f"{name} {index}: got {described(value)}, expected a text; generate also takes ids")
    return found


def dialogs_of(values: Any) -> list[Dialog]:
    """A list of dialogs, of which each is still to be checked by its format.

    Raises:
        ChatError: one dialog where several are expected, or something else.
    """
    expected = "expected a list of dialogs, each a list of messages"
    if isinstance(values, str | bytes | bytearray | Mapping | Set) or not isinstance(values, Iterable):
        raise ChatError(f"dialogs: got {described(values)}, {expected}")
    found = list(values)
    for index, dialog in enumerate(found):
        if isinstance(dialog, Mapping):
            raise ChatError(f"dialog {index}: got a message, {expected}: one dialog is written [[...]]")
        if isinstance(dialog, str | bytes | bytearray) or not isinstance(dialog, Sequence):
            raise ChatError(f"dialog {index}: got {described(dialog)}, {expected}")
    return found


# --- settings ---------------------------------------------------------------------------------------------------------


def sampling(given: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from a call's keywords.

    Raises:
        ConfigError: an unknown name, a value of another type, or see SamplingParams.
    """
    known = {field.name: field.default for field in fields(SamplingParams)}
    for name in given.keys() - known.keys():
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        raise ConfigError(f"{name}: no such control; {hint}")
    checked = dict(given)
    for name, value in given.items():
        if value is None and known[name] is not None and name not in TEXT_LISTS + ID_LISTS:
            raise ConfigError(f"{name}: got None, expected a value; leave it out for {known[name]}")
        if isinstance(known[name], bool):
            flag(name, value)
    for name in given.keys() & set(WHOLE_NUMBERS):
        if given[name] is not None or known[name] is not None:
            checked[name] = whole_number(name, given[name])
    for name in given.keys() & set(ID_LISTS):
        if given[name] is not None:
            checked[name] = tuple(whole_number(name, i) for i in _listed(name, given[name]))
    for name in given.keys() & set(TEXT_LISTS):
        if given[name] is not None and not isinstance(given[name], str):
            checked[name] = tuple(_text_or_ids(name, each) for each in _listed(name, given[name]))
    for name, kind in (("logit_bias", Mapping), ("cache_salt", str), ("regex", str)):
        optional(name, given.get(name), kind)
    if given.get("json_schema") is not None:
        checked["json_schema"] = _schema(given["json_schema"])
    return SamplingParams(**checked)


def _schema(value: Any) -> str:
    """A JSON schema as text."""
    optional("json_schema", value, str, Mapping)
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except RecursionError as error:
        raise ConfigError("json_schema: got a dict that is nested too deeply, or that holds itself") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"json_schema: got what cannot be written as JSON: {error}") from error


def _text_or_ids(name: str, value: Any) -> str | tuple[int, ...]:
    """A text, or the ids of a bad word."""
    if isinstance(value, str):
        return value
    if name == "stop":
        raise ConfigError(f"stop: got {described(value)}, expected texts; ids are given with stop_token_ids")
    return tuple(whole_number(name, i) for i in _listed(name, value))


def _listed(name: str, value: Any) -> Iterable[Any]:
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"{name}: got {described(value)}, expected a list")
    return value


def params_of(values: Any, count: int) -> list[SamplingParams]:
    """One set of sampling parameters for each of so many prompts.

    Raises:
        ConfigError: something else than SamplingParams, or a list of them.
    """
    if isinstance(values, SamplingParams):
        return [values] * count
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise ConfigError(
            f"params: got {described(values)}, expected SamplingParams, or a list with one for each prompt"
        )
    found = list(values)
    for index, value in enumerate(found):
        if not isinstance(value, SamplingParams):
            raise ConfigError(f"params: got {described(value)} for prompt {index}, expected SamplingParams")
    return found


def whole_number(name: str, value: Any) -> int:
    """A whole number, also numpy's.

    Raises:
        ConfigError: it is not one.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{name}: got {described(value)}, expected a whole number")
    try:
        return operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name}: got {described(value)}, expected a whole number") from error


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: got {described(value)}, expected True or False")
    return value


def optional(name: str, value: Any, *kinds: type) -> None:
    """Check that a value is None, or of one of the classes.

    Raises:
        ConfigError: it is not.
    """
    if value is not None and not isinstance(value, kinds):
        expected = " or ".join(KINDS.get(kind, kind.__name__) for kind in kinds)
        raise ConfigError(f"{name}: got {described(value)}, expected {expected}")


def path_of(name: str, value: Any) -> Path:
    """A path, whether or not there is a file.

    Raises:
        ConfigError: it is no path, or one that no file can have.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise ConfigError(f"{name}: got {described(value)}, expected a path as a text or a pathlib.Path")
    path = Path(value)
    try:
        path.stat()
    except ValueError as error:  # a NUL byte, half of a surrogate pair
        raise ConfigError(f"{name}: got {str(path)[:60]!r}, which is no path: {error}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{name}: got {len(str(path))} characters, too many for a path") from error
    return path
