"""Tokenizer files that are damaged or hostile: a TokenizerError when they are loaded or when they encode, never a panic
of a library, which is no Exception.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import byte_level, sentencepiece_like, write_ranks

from llama.config import DEMO_DIR
from llama.errors import LLaMAError, TokenizerError
from llama.tokenizer import load_tokenizer
from llama.tokenizer.base import library_errors
from llama.tokenizer.tokenizers_kind import MOST_WORDS

TEXT = "a" * 40 + " b 日本語 😀\n"
Content = dict[str, Any]
Damage = Callable[[Content], object]


def model(**fields: Any) -> Damage:
    return lambda content: content["model"].update(fields)


def whole(**fields: Any) -> Damage:
    return lambda content: content.update(fields)


def split_at(expression: str) -> Damage:
    return whole(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    )


def replacing(expression: str) -> Damage:
    return whole(normalizer={"type": "Replace", "pattern": {"Regex": expression}, "content": "x"})


def added(**fields: Any) -> Damage:
    return lambda content: content["added_tokens"].append({**content["added_tokens"][0], **fields})


DAMAGES: list[tuple[str, Damage]] = [
    ("backtracking", split_at("(a+)+$")),
    ("backtracking alternatives", split_at("^(a|aa)+$")),
    ("backtracking normalizer", replacing("(a+)+$")),
    ("backreference", replacing(r"(a*)*\1b")),
    ("empty match", replacing("")),
    ("unclosed group", split_at("(")),
    ("escape", split_at("\\")),
    ("chunks of no length", whole(pre_tokenizer={"type": "FixedLength", "length": 0})),
    ("character map", whole(normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAAEAAAAB"})),
    ("normalizer", whole(normalizer=[])),
    ("pre-tokenizer", whole(pre_tokenizer="x")),
    ("post-processor", whole(post_processor={})),
    ("version", whole(version="x")),
    ("no model", whole(model=None)),
    ("other model", whole(model={"type": "x"})),
    ("no vocabulary", model(vocab=None)),
    ("list of vocabulary", model(vocab=[])),
    ("negative id", lambda content: content["model"]["vocab"].update(zzz=-1)),
    ("huge id", lambda content: content["model"]["vocab"].update(zzz=4_000_000_000)),
    ("id beyond 32 bits", lambda content: content["model"]["vocab"].update(zzz=2**40)),
    ("empty vocabulary", model(vocab={}, merges=[])),
    ("merges of one", model(merges=["a"])),
    ("merges of unknown pieces", model(merges=[["q\0", "zz"]])),
    ("piece within a word", model(continuing_subword_prefix="##")),
    ("dropout", model(dropout=-5)),
    ("no decoder", whole(decoder=None)),
    ("other decoder", whole(decoder={"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True})),
    ("strip decoder", whole(decoder={"type": "Strip", "content": " ", "start": 10**18, "stop": 10**18})),
    ("no BOS", whole(added_tokens=[])),
    ("added tokens", whole(added_tokens={})),
    ("no id", lambda content: content["added_tokens"][0].pop("id")),
    ("unigram without pieces", whole(model={"type": "Unigram", "vocab": [], "unk_id": 99})),
]


@pytest.fixture(scope="module")
def content() -> str:
    return byte_level().to_str()


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=[name for name, _ in DAMAGES])
def test_a_damaged_tokenizer_json(content: str, tmp_path: Path, name: str, damage: Damage) -> None:
    damaged = json.loads(content)
    damage(damaged)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(damaged))
    began = time.perf_counter()
    with pytest.raises(TokenizerError) as raised:
        load_tokenizer(path).encode(TEXT)
    assert time.perf_counter() - began < 30  # it would take minutes; other tests run beside it
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value).replace(str(path), "")) < 400


def test_a_huge_id_is_named(content: str, tmp_path: Path) -> None:
    damaged = json.loads(content)
    damaged["model"]["vocab"]["zzz"] = MOST_WORDS
    (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
    with pytest.raises(TokenizerError, match=f"got the token id {MOST_WORDS}, expected at most {MOST_WORDS - 1}"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_the_reason_names_what_the_library_says(content: str, tmp_path: Path) -> None:
    damaged = json.loads(content)
    split_at("(a+)+$")(damaged)
    (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match=r"cannot encode a text, so it is damaged: .*retry-limit"):
        tokenizer.encode(TEXT)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, TokenizerError])
def test_what_is_no_error_of_the_library_passes(kind: type[BaseException]) -> None:
    with pytest.raises(kind, match=r"^as it is$"), library_errors("x"):
        raise kind("as it is")


FILES = {
    "sentencepiece": lambda directory: (DEMO_DIR / "tokenizer.model").read_bytes(),
    "ranks": lambda directory: write_ranks(byte_level(), directory / "ranks").read_bytes(),
    "byte-level": lambda directory: byte_level().to_str().encode(),
    "sentencepiece-like": lambda directory: sentencepiece_like().to_str().encode(),
    "of random bytes": lambda directory: random.Random(0).randbytes(3000),
}


def mutated(data: bytes, chooser: random.Random) -> bytes:
    """The file cut short, with other bytes, without some, or with some of it twice."""
    changed, place = bytearray(data), chooser.randrange(len(data))
    kind = chooser.randrange(4)
    if kind == 0:
        return data[:place]
    if kind == 1:
        for _ in range(chooser.randrange(1, 6)):
            changed[chooser.randrange(len(data))] = chooser.randrange(256)
    elif kind == 2:
        del changed[place : place + chooser.randrange(1, 64)]
    else:
        changed[place:place] = changed[(begin := chooser.randrange(len(data))) : begin + chooser.randrange(1, 400)]
    return bytes(changed)


@pytest.mark.parametrize("kind", FILES)
def test_mutated_files(kind: str, tmp_path: Path) -> None:
    """Each is refused, or works."""
    data, path, refused = FILES[kind](tmp_path), tmp_path / "mutated", 0
    chooser = random.Random(kind)
    for _ in range(60):
        path.write_bytes(mutated(data, chooser))
        try:
            tokenizer = load_tokenizer(path)
            tokenizer.decode(tokenizer.encode(TEXT))
        except LLaMAError:
            refused += 1
    assert refused > 10
