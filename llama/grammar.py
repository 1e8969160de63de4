"""Constrained output: a JSON schema or a regular expression that says which tokens may come next.

The work is llguidance's (the library that vLLM, SGLang and llama.cpp use, too): it follows the grammar byte by byte and
answers with a mask over the vocabulary in well under a millisecond. This module describes our tokens to it, and keeps
one matcher a row.

The bytes of the generation are what is matched, so the first token of a continuation counts with the space that it
begins with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from llama.errors import ConfigError
from llama.sampling_params import SamplingParams
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer

DEEPEST = 124  # levels of brackets in a schema that the library reads
LONGEST = 1_000_000  # characters of a schema or an expression
MOST_PASSES = 50  # over the $refs of a schema
LONGEST_REASON = 300  # characters of what the library says about one
WORDS = (  # what the library says, and what its user knows it as
    (r"^NoExtensionBias.*", "no text can satisfy it"),
    (r"^Unsatisfiable schema: Regex is empty.*", "Unsatisfiable schema: its patterns match no text"),
    (r"^Unable to determine if regex is empty.*", "its patterns are too large together"),
    (
        r"^(?:lookarounds not supported yet; |look-around, including look-ahead and look-behind, is not supported).*",
        "look-around, word boundaries, and ^ and $ inside are not supported",
    ),
    (r"^'utf-8' codec can't encode character.*", "it is not valid Unicode"),
)
JSON_SPACE = r"( |\n {0,16})?"  # within JSON: any of it is allowed, and small models write it for ever


def compile_grammar(params: SamplingParams) -> str:
    """A request's schema or regular expression in llguidance's language, checked; no tokenizer is needed for that.

    Raises:
        ConfigError: it is not one, no text can satisfy it, it is too large, or it needs something that the library does
            not know.
    """
    name = params.constraint_name
    text = params.json_schema if name == "json_schema" else params.regex
    if not isinstance(text, str):
        raise ConfigError(f"{name}: got a {type(text).__name__}, expected a text{' or a dict' * (name != 'regex')}")
    return _compiled(name, text)


@lru_cache(maxsize=64)
def _compiled(name: str, text: str) -> str:
    from llguidance import LLMatcher

    if len(text) > LONGEST:
        raise ConfigError(f"{name}: got {len(text)} characters, expected at most {LONGEST}")
    with _in_words_of(name, text):
        text.encode()
        grammar = LLMatcher.grammar_from_regex(text) if name == "regex" else _from_schema(text)
        is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
        if is_error:
            raise ValueError(messages[0])
        _check_beginning(grammar)
    return grammar


@contextmanager
def _in_words_of(name: str, text: str) -> Iterator[None]:
    """Within: an error of the library becomes one that shows the user's schema or expression, and the reason.

    Raises:
        ConfigError: in place of plain errors, and of the library's panics, which are no Exceptions.
    """
    try:
        yield
    except (ConfigError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        got = f"got {text!r:.60}, " if name == "regex" else ""
        raise ConfigError(f"{name}: {got}{_reason(str(error), text)}") from error


def _from_schema(text: str) -> str:
    from llguidance import LLMatcher

    depth = _depth(text)
    if depth > DEEPEST:
        raise ConfigError(f"json_schema: got {depth} levels of brackets, expected at most {DEEPEST}")
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise ConfigError(f"json_schema: got what is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"json_schema: got {text[:60]}, expected an object; {{}} takes any JSON")
    if '"$ref"' in text and not _Ends(schema).of(schema):
        raise ConfigError("json_schema: Unsatisfiable schema: by its $ref an instance would hold itself, without end")
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": JSON_SPACE})


class _Ends:
    """Which parts of a schema have an instance that ends: the library also follows one that cannot.

    Args:
        schema: the whole one.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self._ending: set[str] = set()  # $refs that do
        waiting: set[str] = set()
        for ref in _refs(schema):
            target = _resolved(schema, ref)
            (self._ending if target is None else waiting).add(ref)
        for _ in range(MOST_PASSES):
            found = {ref for ref in waiting if self.of(_resolved(schema, ref))}
            self._ending |= found
            waiting -= found
            if not found:
                return
        self._ending |= waiting  # it may be

    def of(self, part: Any) -> bool:
        """Whether a part has such an instance, as far as it is known of the $refs."""
        if not isinstance(part, dict) or "const" in part or "enum" in part:
            return True
        if isinstance(part.get("$ref"), str) and part["$ref"] not in self._ending:
            return False
        if any(_listed(part.get(key)) and not any(map(self.of, part[key])) for key in ("anyOf", "oneOf")):
            return False
        return all(map(self.of, [*_listed(part.get("allOf")), *_needed(part)]))


def _needed(part: dict[str, Any]) -> list[Any]:
    """The schemas of what an object or array must hold."""
    if part.get("type") == "object":
        properties = part.get("properties")
        known = properties if isinstance(properties, dict) else {}
        return [known.get(name) for name in _listed(part.get("required")) if isinstance(name, str)]
    if part.get("type") == "array" and type(part.get("minItems")) is int:
        first = _listed(part.get("prefixItems"))[: part["minItems"]]
        return [*first, part.get("items")] if len(first) < part["minItems"] else first
    return []


def _refs(part: Any) -> Iterator[str]:
    """Every $ref within a part of a schema."""
    children: Iterable[Any] = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    if isinstance(part, dict) and isinstance(part.get("$ref"), str):
        yield part["$ref"]
    for child in children:
        yield from _refs(child)


def _resolved(schema: Any, ref: str) -> Any:
    """What a $ref of the form #/name/name stands for; None where it has another form, or stands for nothing."""
    if not ref.startswith("#"):
        return None
    for name in ref.removeprefix("#").split("/")[1:]:
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        schema = schema.get(name) if isinstance(schema, dict) else None
    return schema if ref == "#" or ref.startswith("#/") else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _depth(text: str) -> int:
    """How deep the brackets of a JSON text are nested; those within its strings do not count."""
    depth = deepest = 0
    for mark in re.findall(r"[\[{\]}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        depth += 1 if mark in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _no_constant(written: str) -> None:
    raise ValueError(f"{written} is none of its numbers")


def _check_beginning(grammar: str) -> None:
    """Check that some text can begin, with single bytes as tokens.

    Raises:
        ValueError: the library's reason, or that there is none.
    """
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error())


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
            raise ConfigError(f"the grammar cannot be followed: {_reason(self._matcher.get_error())}")


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


def _reason(message: str, text: str = "") -> str:
    """The library's message in one line, without its own form of the grammar, its state and where in its files it is.

    Args:
        text: the user's, which the message may repeat.
    """
    message = re.split(r"\n +1 \||<state>|\n<", message)[0]
    if text:
        message = message.replace(text, "")
    _, is_detailed, detail = message.rpartition("error: ")
    message = " ".join((detail if is_detailed else message).split())
    message = re.sub(r"^at \d+\(\d+\): invalid regex .*?\(in regex\): | in regex /.*$", "", message)
    for pattern, words in WORDS:
        message = re.sub(pattern, words, message)
    return message if len(message) <= LONGEST_REASON else f"{message[:LONGEST_REASON]} ..."


def is_cut(text: str, finish_reason: str, stop_reason: str | int | None, params: SamplingParams) -> bool:
    """Whether a generation ended before the grammar of its request was satisfied.

    The model's own stop tokens come only where it is, and an interrupted generation counts as none.
    """
    if not params.is_constrained or finish_reason == "interrupted":
        return False
    by_model = isinstance(stop_reason, int) and stop_reason not in params.stop_token_ids
    return not by_model and not satisfies(text, params)


def satisfies(text: str, params: SamplingParams) -> bool:
    """Whether a whole text is what the grammar of a request allows; its bytes are followed, no tokenizer is needed."""
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), compile_grammar(params), log_level=0)
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()
