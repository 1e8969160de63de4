"""A line becomes a request, and with a model's tokenizer and defaults prompts and parameters."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from llama.batch.fields import Request, controls_of, is_ids, messages_of
from llama.batch.lines import EXPECTED, Line, shown
from llama.batch.openai import request_of_body
from llama.chat import ChatFormat, choose_format
from llama.errors import ConfigError, PromptError
from llama.inputs import Prompt
from llama.sampling_params import SamplingParams
from llama.tokenizer import Tokenizer

MOST_SAMPLES = 1024  # of a line, all its prompts together
PROMPTS = ("prompt", "prompt_ids", "messages")


def request_of(line: Line) -> Request:
    """What a line asks for, as far as it can be told without a model.

    Raises:
        UserError: the line cannot be read, or a key or a value in it is not allowed.
    """
    if line.error is not None:
        raise line.error
    if line.is_openai:
        return request_of_body(line.value)
    given = {name: value for name, value in line.value.items() if value is not None and name != "custom_id"}
    kinds = [name for name in PROMPTS if name in given]
    if len(kinds) != 1:
        raise PromptError(f"got {' and '.join(kinds) or 'no prompt'}, expected one of {', '.join(PROMPTS)}; {EXPECTED}")
    value = given.pop(kinds[0])
    controls = controls_of(given)
    if kinds[0] == "messages":
        return Request((), messages_of(value), controls)
    if kinds[0] == "prompt" and not isinstance(value, str):
        raise PromptError(f"prompt: got {shown(value)}, expected a text; ids are given as prompt_ids")
    if kinds[0] == "prompt_ids" and not is_ids(value):
        raise PromptError(f"prompt_ids: got {shown(value)}, expected a list of token ids")
    return Request((value,), controls=controls)


def seed_of(seed: int, index: int) -> int:
    """The seed of a line that has none: a function of the batch's seed and the line's place."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Prepared:
    """Turns requests into prompts and parameters for one model.

    Args:
        tokenizer: the model's.
        directory: the checkpoint's, which may hold a chat template.
        defaults: the controls that a line leaves out.
        seed: of the batch.
        chat_format: a format's name; None chooses by the checkpoint.

    Raises:
        ChatError: a format that the model does not have was named.
    """

    def __init__(
        self, tokenizer: Tokenizer, directory: Path, defaults: SamplingParams, seed: int, chat_format: str | None = None
    ) -> None:
        self._tokenizer, self._directory, self._name = tokenizer, directory, chat_format
        self._defaults, self._seed = defaults, seed
        if chat_format is not None:
            _ = self._format

    @cached_property
    def _format(self) -> ChatFormat:
        return choose_format(self._tokenizer, self._directory, self._name)

    def prompts(self, request: Request) -> tuple[Prompt, ...]:
        """The prompts of a request.

        Raises:
            ChatError: the model has no chat format, or it refuses the dialog.
        """
        return request.prompts if request.dialog is None else (self._format.encode(request.dialog),)

    def stop_ids(self, request: Request) -> tuple[int, ...]:
        """The ids that end it, besides the model's own."""
        return () if request.dialog is None else tuple(self._format.stop_ids)

    def params(self, index: int, request: Request) -> SamplingParams:
        """The parameters of each of a request's prompts.

        Args:
            index: the line's.

        Raises:
            ConfigError: a value out of its range, two that contradict each other, or too many samples.
        """
        given = {"seed": seed_of(self._seed, index), **request.controls}
        params = replace(self._defaults, **given)
        samples = params.samples * max(len(request.prompts), 1)
        if samples > MOST_SAMPLES:
            raise ConfigError(f"n: got {samples} samples of a line, expected at most {MOST_SAMPLES}; use several lines")
        return params
