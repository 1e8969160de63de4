"""Constrained output: whatever the weights, the generation is an instance of the schema or matches the expression."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LLMFactory
from tokenizer_files import byte_level, write_ranks

from llama import SamplingParams, Tokenizer, load_tokenizer
from llama.errors import ConfigError
from llama.grammar import Grammar, Vocabulary, compile_grammar, is_cut

WISH = SamplingParams(80, 1.2, 1.0)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "dog": {"type": "boolean"},
    },
    "required": ["name", "age", "dog"],
    "additionalProperties": False,
}


@pytest.mark.slow
def test_json_is_an_instance_of_its_schema(make_llm: LLMFactory) -> None:
    """Random weights choose bytes at random: without the mask none of these would be JSON."""
    llm = make_llm(max_batch_size=4)
    results = llm.generate(["a", "the cat", "", "b"], params=replace(WISH, json_schema=PERSON, seed=1, n=2))
    complete = [r for r in results if r.finish_reason == "stop"]
    assert len(complete) >= 6
    for result in complete:
        found = json.loads(result.generation)
        assert list(found) == ["name", "age", "dog"]
        assert isinstance(found["name"], str)
        assert len(found["name"]) <= 4
        assert 0 <= found["age"] <= 99
        assert isinstance(found["dog"], bool)
    for result in results:  # what was cut is at least the beginning of one
        assert result.generation.startswith("{")


@pytest.mark.parametrize(
    "regex",
    [r"[0-9]{3}-[a-f]{2,4}", r" ?(yes|no|maybe)", r"(ab)+c", r"é{2}|日本", r"\{\"x\": -?[0-9]+\}", r" [a-z]+\."],
)
def test_the_whole_generation_matches_the_expression(make_llm: LLMFactory, regex: str) -> None:
    """Also behind an empty prompt, where a tokenizer may drop the space before the first word, and with bytes of half a
    character.
    """
    llm = make_llm(max_batch_size=2)
    results = llm.generate(["the", ""], params=replace(WISH, max_gen_len=40, regex=regex, n=4, seed=7))
    complete = [r.generation for r in results if r.finish_reason == "stop"]
    assert complete
    for text in complete:
        assert re.fullmatch(regex, text), text


def test_a_constrained_row_beside_others(make_llm: LLMFactory) -> None:
    """Rows without a grammar are untouched by one that has it, and the other way round; the host reads each step of
    such a batch.
    """
    llm, single = make_llm(max_batch_size=3), make_llm()
    wishes = [
        replace(WISH, max_gen_len=30, seed=1),
        replace(WISH, max_gen_len=30, seed=2, regex="[ab]{4,9}"),
        SamplingParams(30, 0.0),
    ]
    together = llm.generate(["x", "y", "z"], params=wishes)
    alone = [single.generate([p], params=w)[0] for p, w in zip("xyz", wishes, strict=True)]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert re.fullmatch("[ab]{4,9}", together[1].generation)


def test_bad_words_and_bias_within_a_grammar(make_llm: LLMFactory) -> None:
    llm = make_llm()
    with_a, with_b = (
        [i for i in range(llm.tokenizer.n_words) if c in llm.tokenizer.token_bytes(i)] for c in (b"a", b"b")
    )
    wish = replace(WISH, temperature=0.0, regex="[ab]{6}", max_gen_len=10)
    assert llm.generate(["x"], params=replace(wish, bad_words=tuple((i,) for i in with_a)))[0].generation == "bbbbbb"
    assert llm.generate(["x"], params=replace(wish, logit_bias=dict.fromkeys(with_b, -50.0)))[0].generation == "aaaaaa"


def test_compiles_nothing_of_its_own(make_llm: LLMFactory) -> None:
    llm = make_llm(fail_on_recompile=True)
    llm.warm_up()
    results = [llm.generate(["x"], params=replace(WISH, max_gen_len=9, regex=r))[0] for r in ("a+", "[0-9]{4}")]
    assert all(r.programs.compiled == 0 for r in results)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"regex": "[0-9"}, "regex: "),
        ({"json_schema": '{"type": '}, "json_schema: got what is no JSON"),
        ({"json_schema": {"type": "foo"}}, "json_schema: Invalid type: foo"),
        ({"json_schema": "false"}, "json_schema: got false, expected an object"),
        ({"json_schema": {"allOf": [False]}}, "json_schema: Unsatisfiable"),
        ({"json_schema": {"type": "array", "contains": {"type": "string"}}}, "json_schema: Unimplemented keys"),
    ],
)
def test_what_is_no_grammar_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        compile_grammar(replace(WISH, **fields))  # type: ignore[arg-type]


# --- every kind of tokenizer ------------------------------------------------------------------------------------------

TEXTS = ["{", ' {"a": 1}', "the cat", " the", "\n\nx", "12345", "é日本😀", "a", ".", "{\n  }", "  two", "\t"]


@pytest.fixture(scope="module", params=["sentencepiece", "tiktoken", "tokenizers"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path
) -> Tokenizer:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "sentencepiece":
        return load_tokenizer(tokenizer_path)
    if request.param == "tiktoken":
        write_ranks(byte_level(), directory / "tokenizer.model")
        return load_tokenizer(directory / "tokenizer.model")
    byte_level().save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory / "tokenizer.json")


@pytest.mark.parametrize("text", TEXTS)
def test_a_continuation_is_exactly_its_text(tokenizer: Tokenizer, text: str) -> None:
    """Its tokens' bytes are the text's: no space is put before it, and no character around it takes part."""
    ids = tokenizer.encode_continuation(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()


@pytest.mark.parametrize("text", TEXTS)
def test_a_grammar_follows_every_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    """A text's own tokens are allowed one after the other by an expression that is the text, and then nothing but a
    stop token.
    """
    vocabulary = Vocabulary(tokenizer, tokenizer.stop_ids)
    grammar = Grammar(compile_grammar(replace(WISH, regex=re.escape(text))), vocabulary)
    vocab_size = tokenizer.n_words + 13
    for token_id in tokenizer.encode_continuation(text):
        member = np.unpackbits(grammar.allowed(vocab_size).view(np.uint8), bitorder="little")
        assert member[token_id]
        assert not member[tokenizer.n_words :].any()
        assert not member[list(tokenizer.stop_ids)].any()
        grammar.advance([token_id])
    member = np.unpackbits(grammar.allowed(vocab_size).view(np.uint8), bitorder="little")
    assert set(np.flatnonzero(member)) == set(tokenizer.stop_ids)


def test_a_stop_token_of_the_callers_is_a_token_of_the_text(make_llm: LLMFactory) -> None:
    """It may come where the grammar allows its text, and ends the generation there; the model's own end it where the
    grammar does.
    """
    llm = make_llm()
    with_x = tuple(i for i in range(llm.tokenizer.n_words) if llm.tokenizer.token_bytes(i) == b"x")
    wish = replace(WISH, regex="[ab]{3}x[ab]{3}", max_gen_len=12, seed=1)
    (whole,) = llm.generate(["x"], params=wish)
    assert re.fullmatch("[ab]{3}x[ab]{3}", whole.generation)
    (cut,) = llm.generate(["x"], params=replace(wish, stop_token_ids=with_x))
    assert cut.generation == whole.generation[:3]
    assert cut.stop_reason in with_x


@pytest.mark.parametrize(
    ("text", "finish_reason", "stop_reason", "wish", "expected"),
    [
        ("12", "length", None, {"regex": "[0-9]{3}"}, True),
        ("123", "length", None, {"regex": "[0-9]{3}"}, False),
        ("日", "length", None, {"regex": "日本?"}, False),
        ('{"name": "a', "length", None, {"json_schema": PERSON}, True),
        ('{"name": "a", "age": 1, "dog": true}', "length", None, {"json_schema": PERSON}, False),
        ("12", "stop", ".", {"regex": "[0-9]{3}", "stop": (".",)}, True),
        ("123", "stop", ".", {"regex": "[0-9]+[.]?", "stop": (".",)}, False),
        ("12", "stop", 7, {"regex": "[0-9]{3}", "stop_token_ids": (7,)}, True),
        ("12", "stop", 2, {"regex": "[0-9]{3}", "stop_token_ids": (7,)}, False),  # the model's own, at an end only
        ("12", "interrupted", None, {"regex": "[0-9]{3}"}, False),
        ("12", "length", None, {}, False),
    ],
)
def test_what_is_cut(
    text: str, finish_reason: str, stop_reason: str | int | None, wish: dict[str, Any], expected: bool
) -> None:
    """A text that ended before its grammar was satisfied, whatever ended it but the model itself or the user."""
    assert is_cut(text, finish_reason, stop_reason, SamplingParams(**wish)) is expected
