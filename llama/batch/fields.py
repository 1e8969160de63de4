"""What a request says, and the values of JSON that it takes: prompts, messages, and controls by their types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from llama.batch.lines import shown
from llama.chat import Message
from llama.errors import ConfigError, PromptError
from llama.inputs import Prompt
from llama.sampling_params import SamplingParams

NOT_IN_LINES = ("hidden_states", "logits")  # arrays, for which JSON is no place
RENAMED = {  # other systems' names
    "max_tokens": "max_gen_len",
    "max_completion_tokens": "max_gen_len",
    "max_new_tokens": "max_gen_len",
    "repeat_penalty": "repetition_penalty",
}


@dataclass(frozen=True)
class Request:
    """What a line asks for.

    Attributes:
        prompts: texts or ids; empty for a dialog.
        dialog: messages, or None.
        controls: fields of SamplingParams.
        url: OpenAI's endpoint; empty in the package's own form.
        model: the name that OpenAI's form gives, which is repeated in the response.
        echo: the text begins with the prompt.
    """

    prompts: tuple[Prompt, ...]
    dialog: tuple[Message, ...] | None = None
    controls: Mapping[str, Any] = field(default_factory=dict)
    url: str = ""
    model: str = ""
    echo: bool = False


def prompts_of(value: Any) -> tuple[Prompt, ...]:
    """OpenAI's prompt: a text, ids, or a list of either.

    Raises:
        PromptError: something else.
    """
    if isinstance(value, str) or (is_ids(value) and value):
        return (value,)
    if isinstance(value, list) and value and (all(isinstance(v, str) for v in value) or all(map(is_ids, value))):
        return tuple(value)
    raise PromptError(
        f"prompt: got {shown(value)}, expected a text, a list of token ids, or a list of texts or of lists"
    )


def messages_of(value: Any) -> tuple[Message, ...]:
    """A dialog's messages; their order is the chat format's matter.

    Raises:
        PromptError: something else than a list of objects with role and content.
    """
    if not isinstance(value, list) or not value:
        raise PromptError(f"messages: got {shown(value)}, expected a list of messages")
    return tuple(_message(index, message) for index, message in enumerate(value))


def _message(index: int, value: Any) -> Message:
    where = f"message {index}"
    if not isinstance(value, dict):
        raise PromptError(f"{where}: got {shown(value)}, expected an object with role and content")
    unknown = [name for name in value if name not in ("role", "content", "name")]
    if unknown:
        raise PromptError(f"{where}: unknown key {unknown[0]!r:.60}, expected role and content")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(where, part) for part in content)
    if not isinstance(value.get("role"), str) or not isinstance(content, str):
        raise PromptError(f"{where}: got {shown(value)}, expected role and content, both text")
    return {"role": value["role"], "content": content}


def _text_part(where: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise PromptError(
            f'{where}: got {shown(part)}, expected {{"type": "text", "text": "..."}}: the model reads text'
        )
    text: str = part["text"]
    return text


# --- controls ---------------------------------------------------------------------------------------------------------


def controls_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams from JSON, each of its type.

    Raises:
        PromptError: an unknown name, or one field under two names.
        ConfigError: a value of another type; ranges are checked by SamplingParams.
    """
    found: dict[str, Any] = {}
    for written, value in given.items():
        name = RENAMED.get(written, written)
        if name not in TYPES:
            raise PromptError(
                f"unknown key {written!r:.60}, expected a prompt, custom_id, or a control such as max_gen_len"
            )
        if name in found:
            raise PromptError(f"got {name} under two names, expected one of them")
        is_allowed, expected = TYPES[name]
        if not is_allowed(value):
            raise ConfigError(f"{written}: got {shown(value)}, expected {expected}")
        found[name] = value
    return found


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether it is a number that fits into a float."""
    return isinstance(value, float) or (_is_int(value) and abs(value) < 1e300)


def is_ids(value: Any) -> bool:
    """Whether it is a list of whole numbers."""
    return isinstance(value, list) and all(map(_is_int, value))


def _is_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _is_words(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(word, str) or is_ids(word) for word in value)
    )


def _is_biases(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {  # of a field's annotation: whether a value is one, in words
    "int": (_is_int, "a whole number"),
    "float": (_is_number, "a number"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "str": (lambda value: isinstance(value, str), "a text"),
    "Mapping[int, float]": (_is_biases, "an object with a number for each token id"),
    "tuple[str, ...]": (_is_texts, "a text, or a list of texts"),
    "tuple[int, ...]": (is_ids, "a list of token ids"),
    "tuple[str | tuple[int, ...], ...]": (_is_words, "a text, or a list of texts or lists of token ids"),
    "str | Mapping[str, Any]": (lambda value: isinstance(value, (str, dict)), "an object, or its text"),
}
TYPES = {
    f.name: KINDS[str(f.type).removesuffix(" | None")] for f in fields(SamplingParams) if f.name not in NOT_IN_LINES
}
