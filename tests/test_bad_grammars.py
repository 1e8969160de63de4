"""Schemas and regular expressions that are wrong, odd, hostile or impossible: one message each, and never for long.

Everything here is found by ``compile_grammar``, which the command line calls before it loads anything.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Run, refused_at_once
from tokenizer_files import byte_level

from llama import SamplingParams, Tokenizer, load_tokenizer
from llama.errors import ConfigError
from llama.grammar import DEEPEST, LONGEST, Grammar, Grammars, Vocabulary, compile_grammar

LONGEST_S = 2.0  # on a slow core
DEEP = 100_000


def nested(levels: int) -> str:
    """A schema of objects within objects: two levels of brackets each, and one more."""
    return '{"type":"object","required":["a"],"properties":{"a":' * levels + "{}" + "}}" * levels


def doubled(levels: int) -> dict[str, Any]:
    """A schema each of whose definitions holds the next one twice: its instance has 2 ** levels numbers."""
    two = [[{"$ref": f"#/$defs/{level + 1}"}] * 2 for level in range(levels)]
    arrays = [{"type": "array", "prefixItems": each, "minItems": 2, "items": False} for each in two]
    definitions: dict[str, Any] = {str(level): each for level, each in enumerate(arrays)}
    return {"$ref": "#/$defs/0", "$defs": {**definitions, str(levels): {"type": "integer"}}}


SCHEMAS: list[tuple[Any, str]] = [  # and what the message says
    ("", "no JSON"),
    ("{", "no JSON"),
    ("{'type': 'string'}", "no JSON"),
    ('{"minimum": NaN}', "NaN is none"),
    ('{"maximum": -Infinity}', "-Infinity is none"),
    ('{"maximum": 1e999}', "number out of range"),
    ('{"type": "integer", "maximum": ' + "9" * 400 + "}", "number out of range"),
    ("3", "expected an object"),
    ("[]", "expected an object"),
    ("true", "expected an object"),
    ("null", "expected an object"),
    ("[" * DEEP, f"got {DEEP} levels of brackets, expected at most {DEEPEST}"),
    ("[" * DEEP + "]" * DEEP, f"got {DEEP} levels"),
    ('{"x":' * DEEP + "1" + "}" * DEEP, f"got {DEEP} levels"),
    ('{"a\\"[": ' + "[" * 200, "got 201 levels"),
    (nested(200), "got 401 levels"),
    (nested(62), "got 125 levels"),
    ('{"const": "' + "x" * LONGEST + '"}', f"expected at most {LONGEST}"),
    ({"const": "\ud800"}, "hex escape"),
    ('{"const": "\ud800"}', "not valid Unicode"),
    (b"{}", "got a bytes, expected a text or a dict"),
    (3, "got a int"),
    (True, "got a bool"),
    ([1], "got a list"),
    ({"type": "text"}, "Invalid type: text"),
    ({"type": 3}, "type must be"),
    ({"type": "object", "properties": []}, "properties must be an object"),
    ({"type": "object", "required": "a"}, "'required'"),
    ({"type": "string", "minLength": -1}, "'minLength', got -1"),
    ({"type": "array", "minItems": 10**20}, "'minItems'"),
    ({"type": "integer", "multipleOf": 0}, "multiple"),
    ({"type": "string", "pattern": "("}, "unclosed group"),
    ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
    ({"type": "string", "format": "colour"}, "Unknown format: colour"),
    ({"type": "array", "uniqueItems": True}, r'Unimplemented keys: \["uniqueItems"\]'),
    ({"not": {}}, r'Unimplemented keys: \["not"\]'),
    ({"type": "integer", "minimum": 5, "maximum": 2}, r"Unsatisfiable schema: minimum \(5\)"),
    ({"enum": []}, "Unsatisfiable schema"),
    ({"anyOf": []}, "Unsatisfiable schema"),
    ({"oneOf": [False]}, "Unsatisfiable schema: schema is false"),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable schema: incompatible types"),
    (
        {"allOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "^b"}]},
        "Unsatisfiable schema: its patterns match no text$",
    ),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "Unsatisfiable schema: required property"),
    ({"type": "array", "minItems": 3, "maxItems": 1}, "Unsatisfiable schema: minItems"),
    ({"$ref": "#/$defs/absent"}, "'/\\$defs/absent' does not exist"),
    ({"$ref": "http://example.com/schema.json"}, "not present in a registry"),
    ({"$ref": "#"}, r"Unsatisfiable schema: by its \$ref"),
    ({"$ref": "#/a", "a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}}, r"by its \$ref"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, r"by its \$ref"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, r"by its \$ref"),
    ({"type": "array", "prefixItems": [{}, {"anyOf": [{"$ref": "#"}]}], "minItems": 2}, r"by its \$ref"),
]
EXPRESSIONS: list[tuple[Any, str]] = [
    ("(", r"got '\(', unclosed group"),
    ("*", "repetition operator"),
    ("a{2,1}", "repetition count"),
    ("[z-a]", "character class range"),
    ("(?>a)", "unrecognized flag"),
    (r"\Qa\E", "unrecognized escape"),
    (r"\pX", "property not found"),
    (r"(a)\1", "backreferences are not supported"),
    ("(?=a)b", "look-around"),
    ("(?<!a)b", "look-around"),
    (r"a\b", "word boundaries"),
    ("a$b", "inside are not supported"),
    (r"(?-u)\xff", "invalid UTF-8"),
    (r"[^\s\S]", r"no text can satisfy it$"),
    (r"a[^\s\S]", r"no text can satisfy it$"),
    ("[a&&b]+", r"no text can satisfy it$"),
    ("(" * DEEP, "unclosed group"),
    ("(" * DEEP + "a" + ")" * DEEP, "250"),
    ("[" * DEEP, "unclosed character class"),
    ("a" * (LONGEST + 1), f"expected at most {LONGEST}"),
    ("\ud800", "not valid Unicode"),
    (b"a", "got a bytes, expected a text$"),
    (3, "got a int"),
    (["a"], "got a list"),
]
GOOD: list[dict[str, Any]] = [
    {"json_schema": {}},
    {"json_schema": nested(61)},
    {"json_schema": json.dumps({"const": '["\\"' + "[" * 500})},
    {"json_schema": {"enum": list(range(5000))}},
    {"json_schema": {"type": "string", "maxLength": 10**9}},
    {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6}},
    {"json_schema": {"anyOf": [{"anyOf": [{"type": "string"}] * 50}] * 50}},
    {"json_schema": {"type": "object", "properties": {"a": {"$ref": "#"}}}},
    {"json_schema": {"type": "array", "items": {"$ref": "#"}}},
    {
        "json_schema": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
            "required": ["next"],
        }
    },
    {"json_schema": {"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"$ref": "#/$defs/c"}, "c": {"type": "null"}}}},
    {"json_schema": doubled(30)},
    {"regex": ""},
    {"regex": "a{1000000000}"},
    {"regex": "(a?){200}a{200}"},
    {"regex": "(a|b)*a(a|b){40}"},
    {"regex": "(a*)*b"},
    {"regex": "a|[^\\s\\S]"},
    {"regex": "|".join(f"w{number}" for number in range(20_000))},
    {"regex": "x" * DEEP},
    {"regex": "\0\n\"/'"},
    {"regex": r"^[\p{L}é日本]+$"},
]


def made_tokenizer(directory: Path) -> Tokenizer:
    byte_level().save(f"{directory}/tokenizer.json")
    return load_tokenizer(directory / "tokenizer.json")


def refused_soon(params: SamplingParams, says: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=says) as raised:
        compile_grammar(params)
    assert time.perf_counter() - began < LONGEST_S
    message = str(raised.value)
    assert message.startswith(f"{params.constraint_name}: ")
    assert "\n" not in message
    assert len(message) < 450
    for inner in ("<state>", "NoExtension", "(in regex)", "error:", "(And", "compute_time"):
        assert inner not in message


@pytest.mark.parametrize(("schema", "says"), SCHEMAS, ids=[f"{str(schema)[:24]!r}" for schema, _ in SCHEMAS])
def test_a_schema_is_refused(schema: Any, says: str) -> None:
    refused_soon(SamplingParams(json_schema=schema), says)


@pytest.mark.parametrize(("expression", "says"), EXPRESSIONS, ids=[f"{str(e)[:24]!r}" for e, _ in EXPRESSIONS])
def test_an_expression_is_refused(expression: Any, says: str) -> None:
    refused_soon(SamplingParams(regex=expression), says)


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> tuple[Grammars, tuple[int, ...], int]:
    tokenizer = made_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Grammars(tokenizer), tokenizer.stop_ids, tokenizer.n_words


@pytest.mark.parametrize("wish", GOOD, ids=[f"{wish!r:.40}" for wish in GOOD])
def test_odd_ones_that_work(grammars: tuple[Grammars, tuple[int, ...], int], wish: dict[str, Any]) -> None:
    """Some text can satisfy each of these, so a token is allowed."""
    found, stop_ids, vocab_size = grammars
    began = time.perf_counter()
    grammar = found.start(SamplingParams(**wish), stop_ids)
    assert grammar is not None
    assert grammar.allowed(vocab_size).any()
    assert time.perf_counter() - began < LONGEST_S


def test_a_token_that_is_not_allowed(tmp_path: Path) -> None:
    """The library's own message holds its state, of a hundred lines."""
    tokenizer = made_tokenizer(tmp_path)
    vocabulary = Vocabulary(tokenizer, tokenizer.stop_ids)
    grammar = Grammar(compile_grammar(SamplingParams(regex="a+")), vocabulary)
    with pytest.raises(ConfigError, match=r"^the grammar cannot be followed: ") as raised:
        grammar.advance(tokenizer.encode("b", bos=False))
    assert "\n" not in str(raised.value)
    assert "<state>" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_panic_of_the_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a BaseException; Ctrl-C stays what it is."""
    import llguidance

    class Panic(BaseException):
        pass

    def raises(kind: type[BaseException]) -> Any:
        def grammar_from_regex(text: str) -> str:
            raise kind("called `Option::unwrap()` on a `None` value")

        return staticmethod(grammar_from_regex)

    monkeypatch.setattr(llguidance.LLMatcher, "grammar_from_regex", raises(Panic), raising=False)
    with pytest.raises(ConfigError, match="regex: got 'panic', called"):
        compile_grammar(SamplingParams(regex="panic"))
    monkeypatch.setattr(llguidance.LLMatcher, "grammar_from_regex", raises(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compile_grammar(SamplingParams(regex="interrupt"))


@pytest.mark.parametrize("schema", ["[" * DEEP, nested(200), '{"$ref": "#"}'])
def test_the_command_line_refuses_a_schema_before_it_loads(run: Run, tmp_path: Path, schema: str) -> None:
    (tmp_path / "schema.json").write_text(schema)
    refused_at_once(run("generate", "--prompt", "a", "--json_schema", f"{tmp_path}/schema.json"), "--json_schema: ")
