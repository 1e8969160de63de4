"""Tokenizers of all kinds: the same ids and texts as their own libraries, exact streams, control tokens, damaged
files.
"""

from __future__ import annotations

import base64
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizer_files as files

from llama import Tokenizer
from llama.errors import PromptError, TokenizerError
from llama.tokenizer import Part, StreamDecoder, find_tokenizer, load_tokenizer, special_names
from llama.tokenizer.tiktoken_kind import LONGEST_RUN, LONGEST_TEXT, SPECIAL

STRINGS = files.strings(2000)
KINDS = ["sentencepiece", "tiktoken", "byte-level", "legacy", "always", "first", "never"]


class Case(NamedTuple):
    """A tokenizer file, ours and what its own library makes of texts and ids."""

    path: Path
    ours: Tokenizer
    encode: Callable[[str], list[int]]
    encode_special: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def sentencepiece_case(path: Path) -> Case:
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(path))
    return Case(path, load_tokenizer(path), library.encode, library.encode, library.decode)


def tiktoken_case(path: Path) -> Case:
    """The library's own object, with the ranks, the pattern and the control tokens that the format says."""
    import tiktoken

    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    library = tiktoken.Encoding("test", pat_str=files.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def decode(ids: list[int]) -> str:
        return library.decode([i for i in ids if i < len(ranks)])

    return Case(
        path,
        load_tokenizer(path),
        library.encode_ordinary,
        lambda text: library.encode(text, allowed_special="all"),
        decode,
    )


def tokenizers_case(path: Path) -> Case:
    from tokenizers import Tokenizer as Library

    text_only, special = Library.from_file(str(path)), Library.from_file(str(path))
    text_only.encode_special_tokens = True

    def encoder(library: Library) -> Callable[[str], list[int]]:
        return lambda text: library.encode(text, add_special_tokens=False).ids

    return Case(path, load_tokenizer(path), encoder(text_only), encoder(special), special.decode)


@pytest.fixture(scope="module")
def cases(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """One of every kind; none of the file names says which."""
    directory = tmp_path_factory.mktemp("tokenizers")
    made = {
        "byte-level": files.byte_level(),
        **{s: files.sentencepiece_like(s) for s in ("legacy", "always", "first", "never")},
    }
    found = {name: tokenizers_case(files.write_json(library, directory / name)) for name, library in made.items()}
    found["tiktoken"] = tiktoken_case(files.write_ranks(made["byte-level"], directory / "tokenizer.model"))
    found["sentencepiece"] = sentencepiece_case(tokenizer_path)
    return found


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def is_valid(ours: Tokenizer, ids: list[int]) -> bool:
    """Whether the ids' bytes are UTF-8; libraries differ in how they show what is not."""
    try:
        b"".join(map(ours.token_bytes, ids)).decode()
    except UnicodeDecodeError:
        return False
    return True


def random_ids(chooser: random.Random, ours: Tokenizer) -> list[int]:
    """Any ids, control tokens and single bytes among them."""
    return [chooser.randrange(ours.n_words) for _ in range(chooser.randrange(1, 20))]


# ---------------------------------------------------------------------------------------------------- the libraries as
# oracles


def test_encodes_as_its_library(case: Case) -> None:
    """2,000 strings, control-token look-alikes in them kept as text."""
    wrong = [text for text in STRINGS if case.ours.encode(text, bos=False) != case.encode(text)]
    assert not wrong, f"{len(wrong)} strings, the first: {wrong[0]!r}"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sentencepiece"])  # which reads none out of a text
def test_encodes_control_tokens_as_its_library(cases: dict[str, Case], kind: str) -> None:
    """The same strings with control tokens meant as such."""
    ours, encode, encode_special = cases[kind].ours, cases[kind].encode, cases[kind].encode_special
    wrong = [text for text in STRINGS if ours.encode(text, bos=False, allow_special=True) != encode_special(text)]
    assert not wrong, f"{len(wrong)} strings, the first: {wrong[0]!r}"
    assert any(encode_special(text) != encode(text) for text in STRINGS)


@pytest.mark.slow
def test_decodes_as_its_library(case: Case) -> None:
    """The ids of all strings, and 2,000 sequences of any ids whose bytes are valid."""
    chooser = random.Random(1)
    sequences = [case.encode(text) for text in STRINGS] + [random_ids(chooser, case.ours) for _ in range(6000)]
    known = set(range(case.ours.n_words)) - {
        i for i in range(case.ours.n_words) if case.ours.token_bytes(i) == "\ufffd".encode()
    }
    valid = [ids for ids in sequences if is_valid(case.ours, ids) and known.issuperset(ids)]
    assert len(valid) >= len(STRINGS)
    wrong = [ids for ids in valid if case.ours.decode(ids) != case.decode(ids)]
    assert not wrong, f"{len(wrong)}, the first: {wrong[0]}, {case.ours.decode(wrong[0])!r}, {case.decode(wrong[0])!r}"


@pytest.mark.parametrize("kind", ["tiktoken", "byte-level"])
def test_text_survives(cases: dict[str, Case], kind: str) -> None:
    """Decoding what was encoded gives the very text, with kinds that drop nothing."""
    ours = cases[kind].ours
    wrong = [text for text in STRINGS if ours.decode(ours.encode(text)) != text]
    assert not wrong, f"{len(wrong)} strings, the first: {wrong[0]!r}"


def test_a_stream_joined_is_the_whole(case: Case) -> None:
    """Any ids, in pieces of any length, valid or not: the pieces' texts joined are the whole's."""
    chooser = random.Random(2)
    for _ in range(500):
        ids = [*random_ids(chooser, case.ours), case.ours.n_words + 5]
        decoder, begin, pieces = StreamDecoder(case.ours), 0, []
        while begin < len(ids):
            end = begin + chooser.randrange(0, 5)
            pieces.append(decoder.push(ids[begin:end]))
            begin = end
        assert "".join(pieces) + decoder.finish() == case.ours.decode(ids)


def test_a_stream_continues_its_context(case: Case) -> None:
    """What stood before counts: context and stream together are the whole, with the space between them."""
    chooser = random.Random(3)
    for _ in range(300):
        text = chooser.choice(STRINGS)
        ids = case.ours.encode(text)
        cut = chooser.randrange(len(ids) + 1)
        if not is_valid(case.ours, ids[:cut]):
            continue
        decoder = StreamDecoder(case.ours, ids[:cut])
        assert case.ours.decode(ids[:cut]) + decoder.push(ids[cut:]) + decoder.finish() == case.ours.decode(ids)


def test_half_a_character_of_the_context_stays_there(case: Case) -> None:
    """A context that ends within a character: the stream begins with its own text, without a mark for the other
    half.
    """
    ids = {case.ours.token_bytes(i): i for i in range(case.ours.n_words)}
    decoder = StreamDecoder(case.ours, [ids[b"a"], ids[b"\xe2"], ids[b"\x82"]])
    assert decoder.push([ids[b"t"]]) + decoder.finish() == "t"


def test_ranks_and_json_of_one_vocabulary_agree(cases: dict[str, Case]) -> None:
    """The same merges as a ranks file and as a tokenizer.json give the same ids: two libraries, one tokenizer."""
    ranks, made = cases["tiktoken"].ours, cases["byte-level"].ours
    assert all(ranks.encode(text, bos=False) == made.encode(text, bos=False) for text in STRINGS)


# -------------------------------------------------------------------------------------------------------------- control
# tokens


def test_ends_and_sizes(cases: dict[str, Case]) -> None:
    """BOS, EOS and everything that ends a generation, for every kind."""
    ours = {name: case.ours for name, case in cases.items()}
    base = ours["tiktoken"].n_words - 256
    assert ours["tiktoken"].kind == "tiktoken"
    assert (ours["tiktoken"].bos_id, ours["tiktoken"].eos_id) == (base, base + 1)
    assert ours["tiktoken"].stop_ids == (base + 1, base + 8, base + 9)
    assert ours["byte-level"].kind == "tokenizers"
    assert ours["byte-level"].n_words == base + len(files.LLAMA3_SPECIAL)
    assert ours["byte-level"].stop_ids == tuple(base + i for i in (1, 4, 5))
    assert ours["sentencepiece"].kind == "sentencepiece"
    for name in ("sentencepiece", "legacy", "always"):
        assert (ours[name].bos_id, ours[name].eos_id, ours[name].stop_ids) == (1, 2, (2,))


def test_llama3_control_tokens_stand_where_meta_puts_them() -> None:
    """By the ids that Meta and Hugging Face document, behind 128,000 ranks."""
    documented = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_0|>": 128002,
        "<|finetune_right_pad_id|>": 128004,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
    }
    assert {name: 128000 + SPECIAL.index(name) for name in documented} == documented
    assert len(SPECIAL) == len(set(SPECIAL)) == 256


def test_bos_once(case: Case) -> None:
    """BOS and EOS are what the caller asks for, whatever the file's post-processor adds."""
    ours = case.ours
    plain = ours.encode("Hello", bos=False)
    assert ours.bos_id not in plain
    assert ours.encode("Hello") == [ours.bos_id, *plain]
    assert ours.encode("Hello", bos=False, eos=True) == [*plain, ours.eos_id]
    assert ours.encode("") == [ours.bos_id]


def test_written_control_tokens_stay_text(case: Case) -> None:
    """Every control token, typed into a text: ordinary ids, and the same text back."""
    ours = case.ours
    for name, special_id in ours.special_ids.items():
        text = f"a{name}b {name}"
        ids = ours.encode(text, bos=False)
        assert special_id not in ids
        if ours.kind != "sentencepiece":  # that file's alphabet is too small to give every character back
            assert ours.decode(ids) == text
        assert ours.encode(text, bos=False, allow_special=True).count(special_id) == 2
        assert ours.token_bytes(special_id) == b""


def test_parts_are_one_text(case: Case) -> None:
    """Splitting a text into parts changes nothing, where none holds a control token."""
    chooser = random.Random(4)
    for text in STRINGS[:300]:
        if case.ours.special_pattern.search(text):
            continue
        cut = chooser.randrange(len(text) + 1)
        parts = [Part(text[:cut], True), Part(text[cut:], False)]
        assert case.ours.encode_parts(parts) == case.ours.encode(text, bos=False)


def test_parts_keep_a_users_control_tokens_as_text(case: Case) -> None:
    """In one text, those of the trusted parts are control tokens, those of the others are not, not even across a
    border.
    """
    ours = case.ours
    bos, eos = (next(n for n, i in ours.special_ids.items() if i == wanted) for wanted in (ours.bos_id, ours.eos_id))
    parts = [
        Part(bos, True),
        Part(f"hi {eos} there {bos}"),
        Part(eos, True),
        Part(eos[:3]),
        Part(eos[3:], True),
        Part("the end"),
    ]
    ids = ours.encode_parts(parts)
    assert [i for i in ids if i in ours.special_ids.values() and i != ours.special_ids.get("<unk>")] == [
        ours.bos_id,
        ours.eos_id,
    ]
    if ours.kind != "sentencepiece":
        assert f"{eos} there {bos}" in ours.decode(ids)
        assert eos in ours.decode(ids[ids.index(ours.eos_id) + 1 :])


@pytest.mark.parametrize("kind", ["byte-level", "legacy", "always", "first", "never"])
def test_mixed_parts_are_encoded_as_the_library_would(cases: dict[str, Case], kind: str) -> None:
    """Trusted and typed control tokens in one text: the ids of a library whose control token is written differently."""
    from tokenizers import Tokenizer as Library

    ours = cases[kind].ours
    eos = next(name for name, i in ours.special_ids.items() if i == ours.eos_id)
    content = json.loads(cases[kind].path.read_text())
    content["post_processor"] = None
    content["added_tokens"] = [
        {**token, "content": "\u27e6END\u27e7"} for token in content["added_tokens"] if token["content"] == eos
    ]
    other = Library.from_str(json.dumps(content))
    pieces = [
        (eos, True),
        (f"the {eos}", False),
        (f"cat{eos} dog", True),
        (f"{eos}é", False),
        (eos, True),
        (f" ran {eos[:2]}", False),
    ]
    written = "".join(text.replace(eos, "\u27e6END\u27e7") if trusted else text for text, trusted in pieces)
    expected = [ours.eos_id if i == other.token_to_id("\u27e6END\u27e7") else i for i in other.encode(written).ids]
    assert expected.count(ours.eos_id) == 3
    assert ours.encode_parts([Part(*piece) for piece in pieces]) == expected


def test_text_that_cannot_stay_text_is_refused(tmp_path: Path) -> None:
    """A vocabulary that spells a control token out of plain text: refused, because the model would obey it."""
    from tokenizers import Tokenizer as Library, decoders, models

    letters = [(c, -5.0) for c in "abcdefgh</>▁"]
    made = Library(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", -1.0), *letters], unk_id=0))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    made.add_special_tokens(["<s>", "</s>"])
    ours = load_tokenizer(files.write_json(made, tmp_path))
    assert ours.encode("abc", bos=False) == made.encode("abc", add_special_tokens=False).ids
    with pytest.raises(PromptError, match=r"the text holds </s>, which tokenizer\.json cannot encode as plain text"):
        ours.encode("a</s>b")
    with pytest.raises(PromptError, match="cannot encode as plain text"):
        ours.encode_parts([Part("</s>", True), Part("a</s>b")])


def test_half_a_surrogate_pair_is_refused(case: Case) -> None:
    """It is no character, and the libraries answer it each in its own way."""
    with pytest.raises(PromptError, match="not valid Unicode: character 1"):
        case.ours.encode("a\ud800b")


def test_ids_beyond_the_vocabulary(case: Case) -> None:
    """Padded embeddings have more rows than the tokenizer ids: U+FFFD, at the start and later, never a crash."""
    n_words = case.ours.n_words
    assert case.ours.decode([n_words, n_words + 1000, -1]) == "\ufffd" * 3


# --------------------------------------------------------------------------------------------------------- long texts
# (tiktoken)


def cut_as_meta_does(text: str) -> list[str]:
    """Meta's rule, one character at a time: blocks of 400,000, and a cut where more than 25,000 of a sort follow each
    other.
    """
    pieces = []
    for start in range(0, len(text), 400_000):
        block, begin, run = text[start : start + 400_000], 0, 0
        for i, char in enumerate(block):
            same = i > 0 and char.isspace() == block[i - 1].isspace()
            run = run + 1 if same else 1
            if run > 25_000:
                pieces.append(block[begin:i])
                begin, run = i, 1
        pieces.append(block[begin:])
    return pieces


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "a" * 60_001,
        " " * 120_000 + "a",
        "b " * 30 + "\n" * 50_000 + "c" * 25_001 + " d",
        "the cat " * 110_000,
        ("x" * 24_999 + " ") * 20 + "y" * 25_000 + "\u3000" * 25_001,
    ],
    ids=["run", "spaces", "mixed", "long", "edges"],
)
def test_long_texts_are_cut_where_meta_cuts(cases: dict[str, Case], text: str) -> None:
    """The library cannot take them whole; ids are those of Meta's tokenizer, and the text comes back."""
    ids = cases["tiktoken"].ours.encode(text, bos=False)
    assert ids == [i for piece in cut_as_meta_does(text) for i in cases["tiktoken"].encode(piece)]
    assert cases["tiktoken"].ours.decode(ids) == text
    assert (LONGEST_TEXT, LONGEST_RUN) == (400_000, 25_000)


def test_a_million_spaces(cases: dict[str, Case]) -> None:
    """The library panics on them."""
    ours = cases["tiktoken"].ours
    assert ours.decode(ours.encode(" " * 1_000_000)) == " " * 1_000_000


# ------------------------------------------------------------------------------------------------------------- files
# and kinds


def test_kinds_are_recognised_by_content(cases: dict[str, Case], tmp_path: Path) -> None:
    """Each under one and the same name, from a text or a Path."""
    for name, case in cases.items():
        path = tmp_path / name / "tokenizer.model"
        path.parent.mkdir()
        path.write_bytes(case.path.read_bytes())
        assert type(load_tokenizer(str(path))) is type(load_tokenizer(path)) is type(case.ours)
        assert load_tokenizer(path).kind == case.ours.kind
        assert load_tokenizer(path).encode("the cat") == case.ours.encode("the cat")


def test_find_tokenizer(cases: dict[str, Case], tmp_path: Path) -> None:
    """The only model file, here or in the parent; tokenizer.json before it; several and none are refused."""
    inner = tmp_path / "7B"
    inner.mkdir()
    with pytest.raises(TokenizerError, match=r"no tokenizer \(tokenizer.json or \*.model\)"):
        find_tokenizer(inner)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert find_tokenizer(inner) == tmp_path / "tokenizer.model"
    (inner / "b.model").write_bytes(b"")
    assert find_tokenizer(inner) == inner / "b.model"
    (inner / "a.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"has 2 tokenizers \(a.model, b.model\), expected one"):
        find_tokenizer(inner)
    (inner / "tokenizer.json").write_bytes(b"")
    assert find_tokenizer(inner) == inner / "tokenizer.json"


BOS_EOS = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT_ENDS = {
    "bos_token": {"content": "<|begin_of_text|>", "special": True},
    "eos_token": "<|eot_id|>",
    "model_max_length": 8,
}


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"tokenizer_config": CHAT_ENDS}, ("<|begin_of_text|>", ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"])),
        ({"special_tokens_map": CHAT_ENDS}, ("<|begin_of_text|>", ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"])),
        (
            {"special_tokens_map": CHAT_ENDS, "tokenizer_config": {"eos_token": "<|eom_id|>", "bos_token": None}},
            ("<|begin_of_text|>", ["<|eom_id|>", "<|end_of_text|>", "<|eot_id|>"]),
        ),
        (
            {"generation_config": {"eos_token_id": [395, 7], "bos_token_id": 391}},
            ("<|end_of_text|>", ["<|eot_id|>", 7, "<|end_of_text|>", "<|eom_id|>"]),
        ),
    ],
    ids=["config", "map", "config before map", "generation_config"],
)
def test_ends_come_from_the_files_beside(
    tmp_path: Path, beside: dict[str, Any], expected: tuple[str, list[Any]]
) -> None:
    """BOS, EOS and stops as the checkpoint's own files give them, the well-known ends of turns behind."""
    ours = load_tokenizer(files.write_json(files.byte_level(), tmp_path, **beside))
    bos, stops = expected
    assert ours.special_ids["<|eot_id|>"] == 395
    assert ours.bos_id == ours.special_ids[bos]
    assert ours.stop_ids == tuple(ours.special_ids.get(s, s) for s in stops)
    assert ours.eos_id == ours.stop_ids[0]


def test_special_names(tmp_path: Path) -> None:
    """Names as text or as objects; anything else that ends in _token is left out."""
    config = {
        **BOS_EOS,
        "pad_token": None,
        "add_bos_token": True,
        "unk_token": {"content": "<unk>"},
        "chat_template": "x",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert special_names(tmp_path) == {**BOS_EOS, "unk_token": "<unk>"}
    assert special_names(tmp_path / "nowhere") == {}


def test_a_file_that_truncates_or_pads_does_not_here(tmp_path: Path) -> None:
    """Both are settings of training; a prompt that loses its end would be answered wrongly, and silently."""
    made = files.byte_level()
    made.enable_truncation(max_length=4)
    made.enable_padding(length=64)
    text = "once upon a time there was a cat"
    assert (
        load_tokenizer(files.write_json(made, tmp_path)).decode(
            load_tokenizer(tmp_path / "tokenizer.json").encode(text)
        )
        == text
    )


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (
            {"tokenizer_config": {"eos_token": "<|gone|>"}},
            r"name '<\|gone\|>' as eos_token, which is not in tokenizer.json",
        ),
        ({"generation_config": {"eos_token_id": 5000}}, "of which tokenizer.json has only those below 396"),
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id: got '2', expected a token id"),
        ({"generation_config": [1]}, "got a JSON list, expected an object"),
    ],
)
def test_files_beside_that_do_not_fit_are_refused(tmp_path: Path, beside: dict[str, Any], message: str) -> None:
    path = files.write_json(files.byte_level(), tmp_path, **beside)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(path)


def test_no_well_known_end(tmp_path: Path) -> None:
    """A vocabulary without any BOS, and nothing beside it that names one."""
    made = files.byte_level()
    content = json.loads(made.to_str())
    content["added_tokens"] = []
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="has no BOS token"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_decoders_of_other_families_are_refused_by_name(tmp_path: Path) -> None:
    from tokenizers import decoders

    strip_first = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0), decoders.Fuse()]
    )  # strips every word
    for number, (decoder, name) in enumerate(
        [
            (decoders.WordPiece(), "WordPiece"),
            (decoders.Sequence([decoders.ByteFallback(), decoders.CTC()]), r"ByteFallback \+ CTC"),
            (strip_first, r"Replace \+ Strip \+ Fuse"),
            (decoders.Metaspace(replacement="_"), "Metaspace"),
        ]
    ):
        made = files.sentencepiece_like()
        made.decoder = decoder
        path = files.write_json(made, tmp_path / str(number))
        with pytest.raises(TokenizerError, match=f"its decoder is {name}, expected ByteLevel"):
            load_tokenizer(path)
    content = json.loads(files.sentencepiece_like().to_str())
    path.write_text(json.dumps({**content, "decoder": None}))
    with pytest.raises(TokenizerError, match="its decoder is absent"):
        load_tokenizer(path)
    content["model"]["continuing_subword_prefix"] = "##"
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="marks pieces within words"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a SentencePiece model"),
        (b"hello", "is not a SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (b'{"version": "1.0"', "is not readable as JSON"),
        (b'{"version": "1.0"}', "is not a tokenizer.json that the library tokenizers reads"),
        (b'{"a": "\xff"}', "is not readable as JSON"),
        (b"IQ== 0\nIg== 2\n", r"its 2 ranks are not 0 to 1, each once"),
        (b"IQ== 0\nIQ== 1\n", "line 2: got b'IQ== 1'"),
        (b"IQ== 0\nI=Q= 1\n", "line 2: got b'I=Q= 1'"),
        (b"IQ== 0\nIg== x\n", "line 2: got b'Ig== x'"),
        (b"IQ== 0\nIg== 1\n", "254 of the 256 single bytes are missing, the first is 0"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path / "tokenizer")


def test_absent_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(
            TokenizerError, match=r"no tokenizer at .*expected a SentencePiece model, a tiktoken ranks file or"
        ):
            load_tokenizer(path)


def test_another_models_ranks_are_refused(tmp_path: Path) -> None:
    """Llama 4's file has the same form, and another pattern: reading it with Llama 3's would be wrong without a
    word.
    """
    tokens = [bytes([b]) for b in range(256)] + [b"x" + i.to_bytes(3, "big") for i in range(128_000 - 256)]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer").write_text("\n".join(lines))
    assert load_tokenizer(tmp_path / "tokenizer").special_ids["<|eot_id|>"] == 128009
    (tmp_path / "tokenizer").write_text("\n".join([*lines, "eHh4eHg= 128000"]))
    with pytest.raises(TokenizerError, match="got 128001 ranks, expected at most Llama 3's 128000"):
        load_tokenizer(tmp_path / "tokenizer")


def test_mutated_files_load_or_are_refused(case: Case, tmp_path: Path) -> None:
    """Cut, overwritten and shortened at random: a typed error or a tokenizer that works, nothing else."""
    chooser = random.Random(5)
    data, refused = case.path.read_bytes(), 0
    for _ in range(60):
        begin, flips = chooser.randrange(len(data)), bytearray(data)
        flips[begin] ^= 1 << chooser.randrange(8)
        cut = data[:begin] + data[begin + chooser.randrange(1, 100) :]
        (tmp_path / case.path.name).write_bytes(chooser.choice([data[:begin], bytes(flips), cut]))
        try:
            ours = load_tokenizer(tmp_path / case.path.name)
            ours.decode(ours.encode("hello </s> wörld <|eot_id|>"))
        except (TokenizerError, PromptError):
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("kind", "library"), [("legacy", "tokenizers"), ("tiktoken", "tiktoken"), ("sentencepiece", "sentencepiece")]
)
def test_a_missing_library_is_named(
    cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch, kind: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(TokenizerError, match=f"needs the library {library}: pip install {library}"):
        load_tokenizer(cases[kind].path)
