"""The flags that say how tokens are chosen, declared once for all commands that generate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

from llama.cli.flags import Command
from llama.errors import FlagError
from llama.sampling_params import SamplingParams


@dataclass(frozen=True)
class SamplingFlags:
    """Sampling:
        temperature: 0 takes the likeliest token; higher is more random. Without it: the checkpoint's own wish, or
            {temperature}.
        top_k: Sample from so many of the likeliest tokens; 0 for all. Without it: the checkpoint's own wish, or 0.
        top_p: Sample from the likeliest tokens that together have this probability, above 0, at most 1. Without it:
            likewise, or {top_p}.
        min_p: Sample from tokens of at least this share of the likeliest one's probability, 0 to 1. Without it:
            likewise, or 0.
        typical_p: Sample from the tokens nearest to the entropy that together have this probability. Without it:
            likewise, or 1.
        seed: Same seed, same text. Without it: a new one for each {result}.

    What may come:
        repetition_penalty: Above 1, tokens of prompt and output become less likely (also --repeat_penalty). Without it:
            likewise, or 1.
        presence_penalty: Subtracted from the logit of every token in the output, -2 to 2.
        frequency_penalty: Subtracted for each time that the token is in the output, -2 to 2.
        logit_bias: Added to tokens' logits, -100 to 100: ID:X,ID:X,... or a JSON object; up to 300.
        bad_words: A text that must not be written. May be repeated, or be a JSON list of strings.
        allowed_token_ids: The only tokens that may be chosen.
        json_schema: A file with a JSON schema; the {result} is an instance of it.
        regex: A regular expression that the whole {result} matches.

    Where it ends:
        stop: A text that ends the {result}. May be repeated, or be a JSON list of strings.
        stop_token_ids: Tokens that end it, besides the model's own.
        include_stop: What ended the {result} stays a part of it.
        min_tokens: It does not end before so many tokens.
        ignore_eos: The model's own stop tokens do not end it.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    json_schema: str | None = None
    regex: str | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop: bool = False
    min_tokens: int | None = None
    ignore_eos: bool = False

    def given(self, **more: Any) -> dict[str, Any]:
        """The fields of SamplingParams that the user asked for, checked as far as that goes without a model.

        Args:
            more: fields that the command has flags of its own for.

        Raises:
            FlagError: the schema cannot be read.
            ConfigError: a value out of its range, or two that contradict each other, or a grammar that is none.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)} | more
        chosen = {name: value for name, value in values.items() if value is not None and value is not False}
        if self.json_schema is not None:
            try:
                chosen["json_schema"] = Path(self.json_schema).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise FlagError(
                    f"--json_schema {self.json_schema}: {getattr(error, 'strerror', None) or error}"
                ) from error
        params = SamplingParams(**chosen)
        if params.is_constrained:
            from llama.grammar import compile_grammar

            compile_grammar(params)
        return chosen


def takes_sampling_flags(**words: object) -> Callable[[Callable[..., None]], Command]:
    """Give a command the flags of SamplingFlags, in place of its parameter ``sampling``.

    Args:
        words: fill the places in the flags' help. Where the command's docstring says ``{sampling}``, that help stands.
    """

    def decorate(command: Callable[..., None]) -> Command:
        names = [f.name for f in fields(SamplingFlags)]

        @wraps(command)
        def with_flags(**values: Any) -> None:
            own = {name: value for name, value in values.items() if name not in names}
            command(sampling=SamplingFlags(**{name: values[name] for name in names if name in values}), **own)

        signature = inspect.signature(command)
        added = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(SamplingFlags)
        ]
        kept = [p for name, p in signature.parameters.items() if name != "sampling"]
        with_flags.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        help_lines = (SamplingFlags.__doc__ or "").rstrip().format(**words)
        with_flags.__doc__ = (command.__doc__ or "").replace("{sampling}", help_lines.lstrip())
        return with_flags

    return decorate
