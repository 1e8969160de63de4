"""Settings that contradict each other are refused with both names, or have an order that is told; what a grammar lets
end early is told, and an error if that is asked for.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from commands import Run, refused_at_once
from conftest import TINY, LLMFactory
from hypothesis import given, strategies as st

from llama import SamplingParams, Tokenizer, inputs, load_tokenizer
from llama.cli.generate import _warn_of_cuts
from llama.engine.sequence import Sequence
from llama.errors import ConfigError, GrammarCutError
from llama.grammar import Grammars, satisfies
from llama.outputs import Generation
from llama.sampling_params import longest_match, plain_texts

PLAIN = SamplingParams(20, 0.0)
ROWS = 352  # of an embedding for the tokenizer of 320 ids


@pytest.fixture
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of a process that has told nothing yet."""
    monkeypatch.setattr(inputs, "_told", set())
    monkeypatch.setattr(logging.getLogger("llama"), "propagate", True)
    return caplog


def sequences(tokenizer: Tokenizer, params: SamplingParams) -> list[Sequence]:
    eos_ids = tokenizer.stop_ids
    return inputs.make_sequences(["a"], [params], tokenizer, eos_ids, ROWS, 128, Grammars(tokenizer))


# ------------------------------------------------------------------------------------------- refused without a model


@pytest.mark.parametrize(
    ("controls", "words"),
    [
        ({"allowed_token_ids": (5, 7), "bad_words": ((5,), (7,))}, ["allowed_token_ids", "bad_words", "(5, 7)"]),
        (
            {"allowed_token_ids": (5, 7), "stop_token_ids": (5,), "bad_words": ((7,),), "min_tokens": 2},
            ["allowed_token_ids", "stop_token_ids", "min_tokens=2"],
        ),
        ({"regex": "yes|no", "min_tokens": 4}, ["min_tokens: got 4", "regex", "3 bytes"]),
        ({"regex": "[0-9]{3}", "min_tokens": 4}, ["min_tokens: got 4", "regex", "expected 3 at most"]),
        ({"json_schema": '{"enum": ["a", null]}', "min_tokens": 20, "max_gen_len": 99}, None),
        ({"json_schema": '{"type": "boolean"}', "min_tokens": 60, "max_gen_len": 99}, ["min_tokens", "json_schema"]),
        ({"json_schema": '{"const": "a"}', "min_tokens": 60, "max_gen_len": 99}, ["min_tokens", "json_schema"]),
        ({"regex": "yes|eye", "bad_words": "ye"}, ["regex", "bad_words", "'yes', 'eye'"]),
        ({"regex": "yes|no", "stop": ["e", "o"]}, ["regex", "stop", "'yes', 'no'"]),
        ({"regex": "yes", "stop": "e", "include_stop": True}, ["regex", "stop"]),
        ({"min_tokens": 21}, ["min_tokens: got 21", "max_gen_len=20"]),
    ],
)
def test_what_can_be_decided_is_refused(controls: dict[str, Any], words: list[str] | None) -> None:
    """Before any file is opened; the message names both settings."""
    if words is None:
        SamplingParams(**{"max_gen_len": 20, "temperature": 0.0, **controls})
        return
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{"max_gen_len": 20, "temperature": 0.0, **controls})
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    "controls",
    [
        {"allowed_token_ids": (5, 7), "bad_words": ((5,),)},
        {"allowed_token_ids": (5, 7), "bad_words": ((5, 7), (7, 5))},
        {"allowed_token_ids": (5, 7), "stop_token_ids": (5, 7)},
        {"regex": "yes|no", "min_tokens": 3},
        {"regex": "[0-9]{3}|a+", "min_tokens": 20},
        {"regex": r"\w{5}", "min_tokens": 20},  # of up to four bytes each
        {"regex": "yes|no", "bad_words": "ye"},
        {"regex": "ye.", "bad_words": "ye"},
        {"regex": "yes|no", "stop": "e"},
        {"regex": "yes", "stop": "s", "include_stop": True},
        {"regex": "yes", "stop": "e", "min_tokens": 3},
        {"json_schema": '{"enum": ["no", 1]}', "min_tokens": 20},
    ],
)
def test_what_has_a_text_is_taken(controls: dict[str, Any]) -> None:
    assert replace(PLAIN, **controls) == replace(PLAIN, **controls)


def test_the_command_line_names_the_flags(run: Run) -> None:
    """One line on stderr, before torch is imported."""
    few = ["generate", "--prompt", "a", "--min_tokens", "9", "--regex", "yes|no"]
    refused_at_once(run(*few), "--min_tokens: got 9", "regex")
    refused_at_once(run("generate", "--prompt", "a", "--regex", "a", "--bad_words", "a"), "--regex", "--bad_words")
    refused_at_once(
        run("generate", "--prompt", "a", "--strict_grammar"), "--strict_grammar", "--json_schema", "--regex"
    )


@pytest.mark.parametrize(
    ("regex", "expected"),
    [
        ("yes|no", 3),
        (r"a\.b\|c", 5),
        ("", 0),
        ("(ab|c){2,4}", 8),
        ("[^a]", 4),
        ("é", 2),
        ("a*", None),
        ("(", None),
        ("[[:alpha:]]", None),
        ("x{,3}", None),
    ],
)
def test_the_longest_match(regex: str, expected: int | None) -> None:
    assert longest_match(regex) == expected


@given(st.text(alphabet="ab.|\\*+?é(){2}[]^-", max_size=8), st.text(alphabet="ab.é|", max_size=6))
def test_no_match_is_longer_than_the_longest(regex: str, text: str) -> None:
    """By the library that follows the grammar; and plain texts are those that it allows."""
    try:
        matches = satisfies(text, replace(PLAIN, regex=regex))
    except ConfigError:
        return
    longest, texts = longest_match(regex), plain_texts(regex)
    if matches:
        assert longest is None or len(text.encode()) <= longest
    if texts is not None:
        assert matches == (text in texts)


# ------------------------------------------------------------------------------------------ refused with a tokenizer


def test_banning_every_id_is_refused(tokenizer: Tokenizer) -> None:
    """The device would choose a banned one, or a row of the embedding that is no token."""
    every = tuple((i,) for i in range(tokenizer.n_words))
    with pytest.raises(ConfigError, match="bad_words: got all 320 ids of the tokenizer"):
        sequences(tokenizer, replace(PLAIN, bad_words=every))
    with pytest.raises(ConfigError, match="bad_words: got every id but stop tokens, of which min_tokens=1"):
        sequences(tokenizer, replace(PLAIN, bad_words=every[:2] + every[3:], min_tokens=1))
    with pytest.raises(ConfigError, match="allowed_token_ids: got only ids that the tokenizer does not have"):
        sequences(tokenizer, replace(PLAIN, allowed_token_ids=(320, 351)))
    letter = tokenizer.encode_continuation("a")
    assert len(letter) == 1
    with pytest.raises(ConfigError, match="allowed_token_ids: got only ids that bad_words bans"):
        sequences(tokenizer, replace(PLAIN, allowed_token_ids=tuple(letter), bad_words="a"))
    sequences(tokenizer, replace(PLAIN, bad_words=every[:-1]))


def test_bans_reach_beyond_the_tokenizer(tokenizer: Tokenizer) -> None:
    """With few tokens left, a row of the embedding that is no token could be the likeliest."""
    every = tuple((i,) for i in range(tokenizer.n_words))
    (sequence,) = sequences(tokenizer, replace(PLAIN, bad_words=every[:40] + every[41:]))
    words = sequence.allowed(ROWS)
    assert [i for i in range(ROWS) if words[i // 32] >> i % 32 & 1] == [40]
    (plain,) = sequences(tokenizer, replace(PLAIN, bad_words=((4, 5),)))
    assert plain.bad_words == ((4, 5),)


@pytest.mark.parametrize(
    ("controls", "words"),
    [
        ({"regex": "[a-z]+", "bad_words": "ab"}, "bad_words with regex"),
        ({"json_schema": "{}", "min_tokens": 5}, "min_tokens with json_schema"),
        ({"regex": "[a-z]+", "stop": "x"}, "stop or stop_token_ids with regex"),
        ({"regex": "[a-z]+", "stop_token_ids": (5,)}, "stop or stop_token_ids with regex"),
        ({"allowed_token_ids": (5, 7), "bad_words": ((5, 7),)}, "bad_words with allowed_token_ids"),
    ],
)
def test_what_cannot_be_decided_is_told_once(
    untold: pytest.LogCaptureFixture, tokenizer: Tokenizer, controls: dict[str, Any], words: str
) -> None:
    for _ in range(3):
        sequences(tokenizer, replace(PLAIN, **controls))
    (record,) = [each for each in untold.records if each.levelno == logging.WARNING]
    assert record.getMessage().startswith(words)


def test_the_order_of_settings_that_contradict_each_other(make_llm: LLMFactory) -> None:
    """As the log tells it: allowed ids before bad words of several tokens, the grammar before min_tokens."""
    llm = make_llm(replace(TINY, vocab_size=ROWS))
    every = tuple((i,) for i in range(llm.tokenizer.n_words))
    (result,) = llm.generate(["x"], 6, 1.0, bad_words=(*every[:40], *every[41:], (40, 40)), seed=1)
    assert result.token_ids == [40] * 6
    (short,) = llm.generate(["x"], 9, 1.0, regex="a{2}|é+b", min_tokens=9, seed=1, logit_bias={97 + 3: 100})
    assert (short.generation, short.finish_reason) == ("aa", "stop")


# -------------------------------------------------------------------------------------------- a text that is cut short


def ended(text: str, finish: str, stop: str | int | None = None) -> Generation:
    """A result as far as the check looks at it."""
    return cast(Generation, SimpleNamespace(index=3, generation=text, finish_reason=finish, stop_reason=stop))


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (ended("ab", "stop", 2), None),
        (ended("ab</s>", "stop", 2), None),  # include_stop
        (ended("ab", "length"), None),  # complete with its last token
        (ended("a", "length"), "prompt 3: cut at --max_gen_len before the regex was satisfied"),
        (ended("a", "stop", "b"), "prompt 3: ended by 'b' before the regex was satisfied"),
        (ended("a", "stop", 7), "prompt 3: ended by 7 before the regex was satisfied"),
        (ended("a", "interrupted"), None),
    ],
)
def test_what_was_cut_is_told(untold: pytest.LogCaptureFixture, result: Generation, told: str | None) -> None:
    """By --max_gen_len, by a stop text or by a stop token of the caller's, unless the text is complete."""
    params = replace(PLAIN, regex="ab+", stop="b", stop_token_ids=(7,))
    assert _warn_of_cuts([result], params) == (told is not None)
    assert [record.getMessage() for record in untold.records] == ([] if told is None else [told])


@pytest.mark.slow
def test_strict_grammar_has_an_exit_code_of_its_own(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What was generated is printed; without the flag the log alone tells it."""
    (tmp_path / "schema.json").write_text(json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 40}))
    few = ["--ckpt_dir", str(tiny_checkpoint), "--max_seq_len", "32", "--max_gen_len", "4", "--prompt", "a", "--json"]
    cut = run("generate", *few, "--json_schema", str(tmp_path / "schema.json"), "--strict_grammar")
    assert cut.code == GrammarCutError.exit_code == 4
    assert cut.results[0]["finish_reason"] == "length"
    assert "prompt 0: cut at --max_gen_len before the json_schema was satisfied" in cut.err
    assert cut.message.startswith("llama-xla: 1 generation ended before the json_schema was satisfied")
    assert run("generate", *few, "--regex", "[ab]{3}", "--strict_grammar").code == 0
