"""Constrained output: a JSON schema or a regular expression that says which tokens may come next.

The work is llguidance's (the library that vLLM, SGLang and llama.cpp use, too): it follows the grammar byte by byte and
answers with a mask over the vocabulary in well under a millisecond. This module describes our tokens to it, and keeps
one matcher a row.

The bytes of the generation are what is matched, so the first token of a continuation counts with the space that it
begins with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from llama.errors import ConfigError
from llama.sampling_params import SamplingParams
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer

JSON_SPACE = r"( |\n {0,16})?"  # within JSON: any of it is allowed, and small models write it for ever


def compile_grammar(params: SamplingParams) -> str:
    """A request's schema or regular expression in llguidance's language, checked; no tokenizer is needed for that.

    Raises:
        ConfigError: it is not one, or needs something that the library does not know.
    """
    return _compiled(None if params.json_schema is None else str(params.json_schema), params.regex)


@lru_cache(maxsize=64)
def _compiled(json_schema: str | None, regex: str | None) -> str:
    from llguidance import LLMatcher

    if json_schema is not None:
        name, grammar = "json_schema", _from_schema(json_schema)
    else:
        name, grammar = "regex", LLMatcher.grammar_from_regex(regex or "")
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise ConfigError(f"{name}: {_one_line(messages[0])}")
    return grammar


def _from_schema(text: str) -> str:
    from llguidance import LLMatcher

    try:
        schema = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"json_schema: got what is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"json_schema: got {text[:60]}, expected an object; {{}} takes any JSON")
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": JSON_SPACE})


class Vocabulary:
    """A tokenizer as llguidance needs it: the bytes of every token, which of them are control tokens, and how a text
    is cut.

    Args:
        tokenizer: ours.
        stop_ids: the tokens that may end a generation once the grammar is satisfied; at least one.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = tuple(stop_ids)
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted({*tokenizer.special_ids.values(), *stop_ids})
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.n_words)]

    @cached_property
    def compiled(self) -> LLTokenizer:
        """llguidance's own form of it, a trie of all tokens."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(self), eos_token=list(self.stop_ids))

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids of a text that continues another one: without the space that some kinds put before a beginning."""
        return self._tokenizer.encode_continuation(text if isinstance(text, str) else text.decode())


class Grammar:
    """One row's way through a grammar.

    Args:
        grammar: from ``compile_grammar``.
        vocabulary: of the tokenizer.

    Raises:
        ConfigError: the grammar is too large for the library's limits.
    """

    def __init__(self, grammar: str, vocabulary: Vocabulary) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(vocabulary.compiled, grammar, log_level=0)
        self._check()

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Which tokens may come next: ceil(vocab_size / 32) int32 words of bits, the lowest bit first.

        Stop tokens only where the grammar is satisfied; ids beyond the tokenizer never.
        """
        words = _mask(self._matcher, vocab_size)
        self._check()
        return words

    def ahead(self, token_ids: Sequence[int], vocab_size: int) -> list[np.ndarray]:
        """What ``allowed`` would say after each of these tokens, as far as they are allowed; nothing is followed."""
        matcher = self._matcher.deep_copy()
        masks = []
        for token_id in token_ids:
            if matcher.is_stopped() or not matcher.try_consume_tokens([token_id]):
                break
            masks.append(_mask(matcher, vocab_size))
        return masks

    def advance(self, token_ids: Sequence[int]) -> None:
        """Follow what was chosen."""
        self._matcher.consume_tokens(list(token_ids))
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"the grammar cannot be followed: {_one_line(self._matcher.get_error())}")


def _mask(matcher: LLMatcher, vocab_size: int) -> np.ndarray:
    """A matcher's mask: ceil(vocab_size / 32) int32 words of bits, the lowest bit first."""
    import numpy as np

    words = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    found = np.frombuffer(matcher.compute_bitmask(), dtype=np.int32)
    words[: len(found)] = found[: len(words)]  # a word more than the tokenizer needs
    return words


class Grammars:
    """Starts grammars for one tokenizer, whose vocabulary is prepared once: half a second for 128,256 tokens.

    Args:
        tokenizer: ours.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabularies: dict[tuple[int, ...], Vocabulary] = {}

    def start(self, params: SamplingParams, eos_ids: tuple[int, ...]) -> Grammar | None:
        """A fresh way through the grammar of a request; None where it has none.

        Args:
            eos_ids: the model's own stop tokens; one that the caller added is a token of the text like others.

        Raises:
            ConfigError: see ``compile_grammar`` and ``Grammar``.
        """
        if not params.is_constrained:
            return None
        if eos_ids not in self._vocabularies:
            self._vocabularies[eos_ids] = Vocabulary(self._tokenizer, eos_ids)
        return Grammar(compile_grammar(params), self._vocabularies[eos_ids])


def _one_line(message: str) -> str:
    """The library's message without the pictures of the place, which are of its own form of the grammar."""
    lines = [line.strip() for line in message.split("\n   1 |")[0].splitlines()]
    return " ".join(line for line in lines if line.strip("^ "))
