"""The controls of one request: the dataclass SamplingParams, whose fields declare them once.

Each field carries its range, its meaning and where else it is found. Checks, the class's documentation, the command
line's flags and their help, and the table of controls in the documentation are made from these declarations. There is
no tensor and no device here: a value out of its range is refused before any file is opened.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from llama.errors import ConfigError, setting

MAX_BIASED_IDS = 300
MAX_LOGPROBS = 20
LARGEST_BIAS = 100
LARGEST_JSON_SPACE = 20  # bytes of white space before or after a value, or more
LONGEST_KNOWN = 10_000  # characters of an expression or a match; longer ones count as without a limit
LARGEST_REPETITION_PENALTY = 1e6  # the smallest is its inverse: float32 must be able to multiply a logit by it


@dataclass(frozen=True)
class Range:
    """The values that a control takes, in words; subclasses check them.

    Attributes:
        expected: completes "expected ..." in an error, and is the range in the documentation.
    """

    expected: str = ""

    def check(self, name: str, value: Any) -> None:
        """Accept any value: what depends on other fields is checked by SamplingParams as a whole.

        Raises:
            ConfigError: the value of the control ``name`` is out of its range.
        """


@dataclass(frozen=True)
class Number(Range):
    """A number from ``low`` to ``high``, both included unless ``above_low`` or ``below_high``."""

    low: float = 0
    high: float = math.inf
    above_low: bool = False
    below_high: bool = False
    whole: bool = False

    def check(self, name: str, value: Any) -> None:
        """See Range."""
        is_number = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        if (
            not is_number
            or not self.low <= value <= self.high
            or (self.above_low and value == self.low)
            or (self.below_high and value == self.high)
        ):
            raise ConfigError(f"{name}: got {value!r:.60}, expected {self.expected}")


@dataclass(frozen=True)
class Biases(Range):
    """A number for each of a few token ids."""

    def check(self, name: str, value: Mapping[int, float]) -> None:
        """See Range."""
        if len(value) > MAX_BIASED_IDS:
            raise ConfigError(f"{name}: got {len(value)} ids, expected at most {MAX_BIASED_IDS}")
        for token_id, bias in value.items():
            if not abs(bias) <= LARGEST_BIAS:
                raise ConfigError(f"{name}: got {bias} for id {token_id}, expected a number from -100 to 100")


@dataclass(frozen=True)
class Ids(Range):
    """Token ids, at least one."""

    def check(self, name: str, value: tuple[int, ...]) -> None:
        """See Range."""
        if not value:
            raise ConfigError(f"{name}: got no ids, expected at least one; leave it out to allow all")


@dataclass(frozen=True)
class Texts(Range):
    """Texts or sequences of token ids, none of them empty."""

    def check(self, name: str, value: tuple[str | tuple[int, ...], ...]) -> None:
        """See Range."""
        if not all(value):
            raise ConfigError(f"{name}: got an empty one, expected at least one character in each")


@dataclass(frozen=True)
class Control:
    """What a field of SamplingParams declares beside its type and its default.

    Attributes:
        help: what the control does, in full sentences.
        group: the heading under which ``--help`` and the documentation list it.
        range: the values that it takes.
        same_in: other systems that have the same control, under its name there where that differs.
        flag: help of the command line's flag, where the flag takes something else than the field.
    """

    help: str
    group: str
    range: Range = Range()
    same_in: str = ""
    flag: str = ""

    @property
    def described(self) -> str:
        """The help with the range as a sentence of its own."""
        expected = self.range.expected
        return f"{self.help} {expected[0].upper()}{expected[1:]}." if expected else self.help


def control(default: Any, **declared: Any) -> Any:
    """Declare a field of SamplingParams; the keywords are the attributes of Control."""
    return field(default=default, metadata={"control": Control(**declared)})


def controls(params: type[SamplingParams] | None = None) -> dict[str, Control]:
    """Return the declaration of each field by its name, group by group, the groups in the order of the fields."""
    found = {f.name: f.metadata["control"] for f in fields(params or SamplingParams)}
    groups = list(dict.fromkeys(each.group for each in found.values()))
    return dict(sorted(found.items(), key=lambda item: groups.index(item[1].group)))


def controls_table(params: type[SamplingParams] | None = None) -> str:
    """Render all controls as the Markdown table of the documentation."""
    defaults = {f.name: f.default for f in fields(params or SamplingParams)}
    lines = ["| control | default | range | what it does | the same in |", "|---|---|---|---|---|"]
    for name, each in controls(params).items():
        default = "none" if defaults[name] in (None, ()) else defaults[name]
        cells = (f"`{name}`", default, each.range.expected, each.help, each.same_in)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _attributes() -> Iterator[str]:
    """Yield the lines that document the fields of SamplingParams in its docstring."""
    for name, each in controls().items():
        yield from textwrap.wrap(f"{name}: {each.described}", 108, subsequent_indent="    ")


LENGTH = "Length"
SAMPLING = "Sampling"
CONSTRAINTS = "Penalties and constraints"
STOPPING = "Stopping"
PREFIXES = "Shared beginnings"
DETAILS = "Token details"
PROBABILITY = Number("a number above 0 and at most 1", 0, 1, above_low=True)
PENALTY = Number("a number from -2 to 2", -2, 2)


@dataclass(frozen=True)
class SamplingParams:
    """The controls of one request. All of them reach the device as data, so that no value compiles a program.

    Attributes:
        {attributes}

    Raises:
        ConfigError: a value is out of its range, or two contradict each other.
    """

    max_gen_len: int = control(
        256,
        group=LENGTH,
        help="Most tokens to generate.",
        range=Number("at least 1", 1, whole=True),
        same_in="OpenAI and vLLM `max_tokens`, transformers `max_new_tokens`",
    )
    temperature: float = control(
        0.8,
        group=SAMPLING,
        help="Divides the logits before sampling; 0 takes the likeliest token.",
        range=Number("a finite number of 0 or more", below_high=True),
        same_in="all",
    )
    top_p: float = control(
        0.95,
        group=SAMPLING,
        help="Sample from the likeliest tokens that together hold this probability.",
        range=PROBABILITY,
        same_in="all",
    )
    seed: int | None = control(
        None,
        group=SAMPLING,
        help="The same seed gives the same text in any batch. Without one each prompt draws its own. The samples of a "
        "prompt take the seeds that follow.",
        range=Number("0 to 2**63 - 1", 0, 2**63 - 1, whole=True),
        same_in="vLLM",
    )
    _: KW_ONLY
    top_k: int = control(
        0,
        group=SAMPLING,
        help="Sample from this many of the likeliest tokens.",
        range=Number("a whole number of 0 or more (0 and -1 keep all tokens)", -1, 2**31 - 1, whole=True),
        same_in="transformers, vLLM, llama.cpp, TGI",
    )
    min_p: float = control(
        0.0,
        group=SAMPLING,
        help="Sample from tokens with at least this share of the likeliest one's probability.",
        range=Number("a number from 0 to 1", 0, 1),
        same_in="transformers, vLLM, llama.cpp",
    )
    typical_p: float = control(
        1.0,
        group=SAMPLING,
        help="Sample from the tokens nearest to the entropy that together hold this probability.",
        range=PROBABILITY,
        same_in="transformers, TGI, llama.cpp `typical`",
    )
    repetition_penalty: float = control(
        1.0,
        group=CONSTRAINTS,
        help="Divides positive logits of tokens in the prompt or the output, and multiplies negative ones: above 1 "
        "they become less likely.",
        range=Number("a number above 0, from 1e-6 to 1e6", 1 / LARGEST_REPETITION_PENALTY, LARGEST_REPETITION_PENALTY),
        same_in="transformers, vLLM, TGI; llama.cpp looks at the last 64 tokens",
    )
    presence_penalty: float = control(
        0.0,
        group=CONSTRAINTS,
        help="Subtracted from the logit of every token in the output.",
        range=PENALTY,
        same_in="OpenAI, vLLM",
    )
    frequency_penalty: float = control(
        0.0,
        group=CONSTRAINTS,
        help="Subtracted from a token's logit for each time that it is in the output.",
        range=PENALTY,
        same_in="OpenAI, vLLM",
    )
    logit_bias: Mapping[int, float] | None = control(
        None,
        group=CONSTRAINTS,
        help="Added to the logits of these token ids, before the penalties.",
        range=Biases("a number from -100 to 100 for each of at most 300 ids"),
        same_in="OpenAI, vLLM",
    )
    bad_words: tuple[str | tuple[int, ...], ...] = control(
        (),
        group=CONSTRAINTS,
        help="Texts, or lists of token ids, that are never completed, within a word or after a space.",
        range=Texts("at most 64 of several tokens, each of up to 16"),
        same_in="transformers `bad_words_ids`; vLLM looks at the output only",
        flag="A text that is never completed, within a word or after a space.",
    )
    allowed_token_ids: tuple[int, ...] | None = control(
        None,
        group=CONSTRAINTS,
        help="Only these token ids are chosen.",
        range=Ids("at least one id"),
        same_in="vLLM",
    )
    json_schema: str | Mapping[str, Any] | None = control(
        None,
        group=CONSTRAINTS,
        help="The text is an instance of this JSON schema.",
        range=Range("an object, or its text"),
        same_in="OpenAI, vLLM, TGI, llama.cpp",
        flag="A file with a JSON schema; the text is an instance of it.",
    )
    regex: str | None = control(
        None,
        group=CONSTRAINTS,
        help="The whole text matches this regular expression.",
        same_in="vLLM, TGI",
    )
    stop: tuple[str, ...] = control(
        (),
        group=STOPPING,
        help="Texts that end the generation where they appear, also across tokens; removed unless include_stop.",
        range=Texts("texts of at least one character"),
        same_in="OpenAI, vLLM, TGI, llama.cpp",
        flag="A text that ends the generation where it appears; removed unless include_stop.",
    )
    stop_token_ids: tuple[int, ...] = control(
        (),
        group=STOPPING,
        help="Token ids that end the generation, besides the model's own stop tokens.",
        range=Range("at most 16 with the model's own"),
        same_in="vLLM, transformers `eos_token_id`",
    )
    include_stop: bool = control(
        False,
        group=STOPPING,
        help="Keep the stop token or stop text in the result.",
        same_in="vLLM `include_stop_str_in_output`",
    )
    min_tokens: int = control(
        0,
        group=STOPPING,
        help="Choose no stop token, and look for no stop text, before this many tokens.",
        range=Range("0 to max_gen_len"),
        same_in="vLLM, transformers `min_new_tokens`",
    )
    ignore_eos: bool = control(
        False,
        group=STOPPING,
        help="The model's own stop tokens do not end the generation.",
        same_in="vLLM, llama.cpp",
    )
    n: int = control(
        1,
        group=LENGTH,
        help="Samples of each prompt, which is prefilled once.",
        range=Number("at least 1", 1, whole=True),
        same_in="OpenAI, vLLM, transformers `num_return_sequences`",
    )
    best_of: int | None = control(
        None,
        group=LENGTH,
        help="Generate this many samples, and return the n whose tokens have the highest mean log-probability, best "
        "first.",
        range=Range("at least n"),
        same_in="OpenAI (completions), TGI",
    )
    logprobs: int | None = control(
        None,
        group=DETAILS,
        help="Return the log-probabilities of the chosen tokens and of this many of the likeliest: the log-softmax of "
        "the raw logits, before any other control.",
        range=Number(f"0 to {MAX_LOGPROBS}", 0, MAX_LOGPROBS, whole=True),
        same_in="OpenAI, vLLM",
    )
    prompt_logprobs: bool = control(
        False,
        group=DETAILS,
        help="Return the requested details of the prompt's tokens, too; needs logprobs, hidden_states or logits.",
        same_in="OpenAI `echo`, vLLM",
    )
    hidden_states: bool = control(
        False,
        group=DETAILS,
        help="Return the last layer's hidden states, after its norm, from which each token was chosen.",
        same_in="transformers `output_hidden_states`",
    )
    logits: bool = control(
        False,
        group=DETAILS,
        help="Return the raw logits from which each token was chosen.",
        same_in="transformers `output_logits`",
    )

    prefix_cache: bool = control(
        True,
        group=PREFIXES,
        help="Do not run the beginning of the prompt again where an earlier request has computed it, and let later "
        "requests use what this one leaves.",
        same_in="vLLM `enable_prefix_caching`, llama.cpp `cache_prompt`",
        flag="--prefix_cache false runs every prompt from its start, also where an earlier one began in the same way.",
    )
    cache_salt: str | None = control(
        None,
        group=PREFIXES,
        help="Share beginnings with requests of the same salt only, so that nobody learns from a time to first token "
        "what others have asked.",
        same_in="vLLM",
    )

    def __post_init__(self) -> None:
        self._settle()
        for f in fields(self):
            if getattr(self, f.name) is not None:
                f.metadata["control"].range.check(f.name, getattr(self, f.name))
        self._check_together()

    def _settle(self) -> None:
        """Convert fields that may be written in several ways to one."""
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            texts = (value,) if isinstance(value, str) else tuple(value or ())
            object.__setattr__(self, name, tuple(t if isinstance(t, str) else tuple(t) for t in texts))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if self.logit_bias is not None:
            try:
                biases = {int(name): float(value) for name, value in self.logit_bias.items()}
            except (TypeError, ValueError) as error:
                raise ConfigError(f"logit_bias: got {self.logit_bias}, expected a number for each token id") from error
            object.__setattr__(self, "logit_bias", biases)
        if isinstance(self.json_schema, Mapping):
            object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)

    def _check_together(self) -> None:
        """Refuse what depends on two fields."""
        if not 0 <= self.min_tokens <= self.max_gen_len:
            raise ConfigError(f"min_tokens: got {self.min_tokens}, expected 0 to max_gen_len={self.max_gen_len}")
        if self.best_of is not None and self.best_of < self.n:
            raise ConfigError(
                f"best_of: got {self.best_of}, expected at least n={self.n}, because n of them are returned"
            )
        if self.temperature == 0 and self.samples > 1:
            name = "n" if self.n > 1 else "best_of"
            raise ConfigError(
                f"{name}: got {self.samples} at temperature 0, where all samples are the same; "
                "expected 1, or a temperature above 0"
            )
        if self.prompt_logprobs and not self.wants_details:
            raise ConfigError(
                "prompt_logprobs: needs logprobs (0 is enough), hidden_states or logits, "
                "which choose the details of the prompt"
            )
        if self.json_schema is not None and self.regex is not None:
            raise ConfigError(f"got both {setting('json_schema')} and {setting('regex')}, expected one of them")
        if self.is_constrained and self.ignore_eos:
            raise ConfigError(f"ignore_eos: with a {self.constraint_name} the generation must be able to end")
        if self.is_constrained and self.allowed_token_ids is not None:
            raise ConfigError(
                f"allowed_token_ids: the {self.constraint_name} says which tokens are allowed; leave one of them out"
            )
        self._check_something_left()
        if self.is_constrained:
            self._check_length_of_constraint()
            self._check_texts_of_constraint()

    def _check_something_left(self) -> None:
        """Refuse bans that leave no token at all, as far as ids show it; ``inputs`` knows those of texts."""
        if self.allowed_token_ids is None:
            return
        left = set(self.allowed_token_ids) - self.banned_ids
        if not left:
            raise ConfigError(
                f"allowed_token_ids: {setting('bad_words')} bans all of them ({_listed(self.allowed_token_ids)}), "
                "expected at least one id that is left; allow another one, or ban fewer"
            )
        if self.min_tokens and left <= set(self.stop_token_ids):
            raise ConfigError(
                f"allowed_token_ids: got only {setting('stop_token_ids')} ({_listed(sorted(left))}), of which "
                f"{setting('min_tokens')}={self.min_tokens} allows none at first; allow another id"
            )

    def _check_length_of_constraint(self) -> None:
        """Refuse min_tokens where every text that the grammar allows is shorter, as far as that can be told."""
        if not self.min_tokens:
            return
        longest = longest_match(self.regex) if isinstance(self.regex, str) else _longest_instance(str(self.json_schema))
        if longest is not None and self.min_tokens > longest:
            raise ConfigError(
                f"min_tokens: got {self.min_tokens}, but the longest text that the {self.constraint_name} allows has "
                f"{longest} bytes at most, and a token has one or more: expected {longest} at most"
            )

    def _check_texts_of_constraint(self) -> None:
        """Refuse bad words and stop texts that are in every text that a regular expression of plain texts allows."""
        texts = plain_texts(self.regex) if isinstance(self.regex, str) and (self.bad_words or self.stop) else None
        if texts is None:
            return
        bad = [word for word in self.bad_words if isinstance(word, str)]
        if all(any(word in text for word in bad) for text in texts):
            raise ConfigError(
                f"regex: {setting('bad_words')} is in every text that it allows ({_listed(map(repr, texts))}), "
                "expected one that can be written; change one of them"
            )
        if not self.min_tokens and all(any(self._cuts(text, stop) for stop in self.stop) for text in texts):
            raise ConfigError(
                f"regex: {setting('stop')} cuts every text that it allows ({_listed(map(repr, texts))}), "
                "expected one that can be completed; leave the stop text out"
            )

    def _cuts(self, text: str, stop: str) -> bool:
        """Whether a stop text takes something from a text."""
        return stop in (text[:-1] if self.include_stop and text.find(stop) == len(text) - len(stop) else text)

    @property
    def banned_ids(self) -> set[int]:
        """The bad words of one token that are given as ids."""
        return {word[0] for word in self.bad_words if not isinstance(word, str) and len(word) == 1}

    @property
    def samples(self) -> int:
        """How many generations are run for the prompt."""
        return self.n if self.best_of is None else self.best_of

    @property
    def is_ranked(self) -> bool:
        """Whether more samples are generated than are returned."""
        return self.samples > self.n

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar restricts the tokens."""
        return self.json_schema is not None or self.regex is not None

    @property
    def constraint_name(self) -> str:
        """The control that gives the grammar."""
        return "json_schema" if self.json_schema is not None else "regex"

    @property
    def wants_details(self) -> bool:
        """Whether details of each token are returned."""
        return self.logprobs is not None or self.hidden_states or self.logits

    @property
    def reshapes_logits(self) -> bool:
        """Whether a control is used that greedy choice and plain sampling do not read."""
        return (
            (self.typical_p != 1 and self.temperature > 0)
            or self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or bool(self.logit_bias)
            or bool(self.bad_words)
            or self.allowed_token_ids is not None
            or self.min_tokens > 0
            or self.is_constrained
        )

    def token_ids(self) -> dict[str, tuple[int, ...]]:
        """Return every token id that the caller gave, by the field that has it."""
        words = [word for word in self.bad_words if not isinstance(word, str)]
        return {
            "logit_bias": tuple(self.logit_bias or ()),
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids,
            "bad_words": tuple(i for word in words for i in word),
        }


def _listed(values: Iterable[Any]) -> str:
    first = [str(value) for value in itertools.islice(values, 11)]
    return ", ".join(first[:10]) + (", ..." if len(first) > 10 else "")


def plain_texts(regex: str) -> tuple[str, ...] | None:
    r"""The texts that an expression of texts and ``|`` allows; None for one with any other operator.

    An escaped mark stands for itself: ``yes|no\.`` allows "yes" and "no.".
    """
    if not re.fullmatch(r"(?:[^.^$*+?{}\[\]()\\]|\\[^\w\s<>])*", regex):
        return None
    texts = [""]
    for part in re.findall(r"\\?.", regex, re.DOTALL):
        if part == "|":
            texts.append("")
        else:
            texts[-1] += part[-1]
    return tuple(texts)


def longest_match(regex: str) -> int | None:
    """The most bytes that a match of a regular expression can have; None where that is not known, or has no limit.

    Python's parser tells the width. What it does not read, or reads in another way than the grammar's library, is not
    known.
    """
    texts = plain_texts(regex)
    if texts is not None:
        return max(len(text.encode(errors="replace")) for text in texts)
    if len(regex) > LONGEST_KNOWN or "{," in regex:  # a range to Python, a text to others
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, characters = importlib.import_module("re._parser").parse(regex).getwidth()
    except (ImportError, re.error, OverflowError, RecursionError, Warning):
        return None
    if characters > LONGEST_KNOWN:
        return None
    is_ascii = regex.isascii() and not re.search(r"[.\\]|\[\^|\(\?", regex)
    return int(characters) * (1 if is_ascii else 4)


def _longest_instance(json_schema: str) -> int | None:
    """The most bytes of an instance of a schema that lists texts, booleans and null; None for any other schema."""
    try:
        schema = json.loads(json_schema)
    except (ValueError, RecursionError):
        return None  # grammar.py refuses it
    if not isinstance(schema, dict):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not values:
        values = [True, False] if schema.get("type") == "boolean" else [None] if schema.get("type") == "null" else [0]
    if not all(value is None or isinstance(value, str | bool) for value in values):
        return None
    space = 2 * LARGEST_JSON_SPACE
    return space + max(2 + 12 * len(value) if isinstance(value, str) else 5 for value in values)  # each may be \\u....


if SamplingParams.__doc__:  # absent under python -OO
    SamplingParams.__doc__ = SamplingParams.__doc__.replace("{attributes}", "\n        ".join(_attributes()))
