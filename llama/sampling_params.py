"""What one request wants of its tokens: the dataclass SamplingParams, and whether its wishes go together.

No tensor and no device here: a value out of its range is refused before any file is opened. Names, ranges and meanings
    are those
of OpenAI's API where it has them, else of vLLM and transformers; the README's table says which.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from llama.errors import ConfigError, setting

MAX_BIASED_IDS = 300
MAX_LOGPROBS = 20
LARGEST_BIAS = 100
LARGEST_PENALTY = 2  # of presence and frequency
LARGEST_REPETITION_PENALTY = 1e6  # and the least is its inverse: float32 must be able to multiply a logit by it


@dataclass(frozen=True)
class SamplingParams:
    """What one request wants. Every field reaches the device as data, so that no value compiles a program for itself.

    Attributes:
        max_gen_len: most tokens to generate, at least 1.
        temperature: 0 takes the likeliest token; above, logits are divided by it before sampling.
        top_p: sample from the smallest set of likeliest tokens whose probabilities sum to at least this, in (0, 1].
        seed: 0 to 2**63 - 1. The same seed gives the same text whatever the batch size and the row; None draws a new
            one. The samples of one prompt take the seeds that follow.
        top_k: sample from so many of the likeliest tokens; 0 or -1 for all of them.
        min_p: sample from tokens of at least this share of the likeliest one's probability, in [0, 1].
        typical_p: sample from the smallest set of the tokens nearest to the entropy whose probabilities sum to at least
            this, in (0, 1].
        repetition_penalty: 1e-6 to 1e6; logits of tokens in the prompt or the output are divided by it where positive,
            else multiplied.
        presence_penalty: -2 to 2, subtracted from the logit of every token in the output.
        frequency_penalty: -2 to 2, subtracted for each time that the token is in the output.
        logit_bias: token id to a number from -100 to 100 that is added to its logit; at most 300 ids.
        bad_words: texts, or lists of token ids, that are never completed, in the prompt's continuation.
        allowed_token_ids: nothing else is chosen; None allows all.
        min_tokens: no stop token is chosen, and no stop string looked for, in the first so many tokens.
        ignore_eos: the tokenizer's and the checkpoint's own stop tokens do not stop.
        stop_token_ids: tokens that stop, besides those.
        stop: texts that stop wherever they appear in the generation, also across tokens.
        include_stop: what stopped the generation stays a part of it.
        n: samples of the prompt; it is prefilled once.
        best_of: samples to generate; the ``n`` of them whose tokens have the highest mean log-probability are returned,
            best first.
        logprobs: log-probabilities of the chosen tokens and of so many likeliest ones, 0 to 20: the log-softmax of the
            raw logits, before any of the above. None computes nothing.
        prompt_logprobs: of the prompt's tokens, too. Needs ``logprobs``, or one of the next two.
        hidden_states: return the last layer's hidden states, behind its norm, from which each token was chosen.
        logits: return the raw logits from which each token was chosen.
        json_schema: a JSON schema, as an object or as text; the generation is an instance of it.
        regex: the generation matches this regular expression as a whole.

    Raises:
        ConfigError: a value is out of its range, or two contradict each other.
    """

    max_gen_len: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int | None = None
    _: KW_ONLY
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    hidden_states: bool = False
    logits: bool = False
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        self._settle()
        self._check_numbers()
        self._check_collections()
        self._check_together()

    def _settle(self) -> None:
        """Bring what may be written in several ways into one."""
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            texts = (value,) if isinstance(value, str) else tuple(value or ())
            object.__setattr__(self, name, tuple(t if isinstance(t, str) else tuple(t) for t in texts))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if self.logit_bias is not None:
            try:
                object.__setattr__(
                    self, "logit_bias", {int(name): float(value) for name, value in self.logit_bias.items()}
                )
            except (TypeError, ValueError) as error:
                raise ConfigError(f"logit_bias: got {self.logit_bias}, expected a number for each token id") from error
        if isinstance(self.json_schema, Mapping):
            object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)

    def _check_numbers(self) -> None:
        if self.max_gen_len < 1:
            raise ConfigError(f"max_gen_len: got {self.max_gen_len}, expected at least 1")
        if not (0 <= self.temperature < math.inf):
            raise ConfigError(f"temperature: got {self.temperature}, expected a finite number of 0 or more")
        for name in ("top_p", "typical_p"):
            if not (0 < getattr(self, name) <= 1):
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected a number above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p: got {self.min_p}, expected a number from 0 to 1")
        if not 1 / LARGEST_REPETITION_PENALTY <= self.repetition_penalty <= LARGEST_REPETITION_PENALTY:
            raise ConfigError(
                f"repetition_penalty: got {self.repetition_penalty}, expected a number above 0, from 1e-6 to 1e6"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= LARGEST_PENALTY:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected a number from -2 to 2")
        if not 0 <= self.top_k < 2**31:
            raise ConfigError(
                f"top_k: got {self.top_k}, expected a whole number of 0 or more (0 and -1 keep all tokens)"
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: got {self.seed}, expected 0 to 2**63 - 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ConfigError(f"logprobs: got {self.logprobs}, expected 0 to {MAX_LOGPROBS}")
        if self.n < 1:
            raise ConfigError(f"n: got {self.n}, expected at least 1")

    def _check_collections(self) -> None:
        bias = self.logit_bias or {}
        if len(bias) > MAX_BIASED_IDS:
            raise ConfigError(f"logit_bias: got {len(bias)} ids, expected at most {MAX_BIASED_IDS}")
        for token_id, value in bias.items():
            if not abs(value) <= LARGEST_BIAS:
                raise ConfigError(f"logit_bias: got {value} for id {token_id}, expected a number from -100 to 100")
        if self.allowed_token_ids == ():
            raise ConfigError("allowed_token_ids: got no ids, expected at least one; leave it out to allow all")
        for name in ("stop", "bad_words"):
            if not all(getattr(self, name)):
                raise ConfigError(f"{name}: got an empty one, expected at least one character in each")

    def _check_together(self) -> None:
        if not 0 <= self.min_tokens <= self.max_gen_len:
            raise ConfigError(f"min_tokens: got {self.min_tokens}, expected 0 to max_gen_len={self.max_gen_len}")
        if self.best_of is not None and self.best_of < self.n:
            raise ConfigError(
                f"best_of: got {self.best_of}, expected at least n={self.n}, because n of them are returned"
            )
        if self.temperature == 0 and self.samples > 1:
            name = "n" if self.n > 1 else "best_of"
            raise ConfigError(
                f"{name}: got {self.samples} at temperature 0, where all samples are the same; expected 1, or a temperature above 0"
            )
        if self.prompt_logprobs and not self.wants_details:
            raise ConfigError(
                "prompt_logprobs: needs logprobs (0 is enough), hidden_states or logits, which say what is wanted of the prompt"
            )
        if self.json_schema is not None and self.regex is not None:
            raise ConfigError(f"got both {setting('json_schema')} and {setting('regex')}, expected one of them")
        if self.is_constrained and self.ignore_eos:
            raise ConfigError(f"ignore_eos: with a {self.constraint_name} the generation must be able to end")
        if self.is_constrained and self.allowed_token_ids is not None:
            raise ConfigError(
                f"allowed_token_ids: the {self.constraint_name} says which tokens are allowed; leave one of them out"
            )

    @property
    def samples(self) -> int:
        """How many generations are run for the prompt."""
        return self.n if self.best_of is None else self.best_of

    @property
    def is_ranked(self) -> bool:
        """More samples are generated than are returned."""
        return self.samples > self.n

    @property
    def is_constrained(self) -> bool:
        """A grammar says what may come next."""
        return self.json_schema is not None or self.regex is not None

    @property
    def constraint_name(self) -> str:
        """What the grammar is called."""
        return "json_schema" if self.json_schema is not None else "regex"

    @property
    def wants_details(self) -> bool:
        """Something is to be known about each token."""
        return self.logprobs is not None or self.hidden_states or self.logits

    @property
    def reshapes_logits(self) -> bool:
        """Something is asked that greedy choice and plain sampling do not read."""
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
        """Every token id that the caller gave, by the field that has it."""
        words = [word for word in self.bad_words if not isinstance(word, str)]
        return {
            "logit_bias": tuple(self.logit_bias or ()),
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids,
            "bad_words": tuple(i for word in words for i in word),
        }
