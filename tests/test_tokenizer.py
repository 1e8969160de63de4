"""Text to ids and back, held against the sentencepiece library itself, and streams held against whole texts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings, strategies as st

from llama.errors import TokenizerError
from llama.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

REPLACEMENT = "\ufffd"
FIXED = [
    "",
    " ",
    "   ",
    "a",
    " a",
    "a ",
    "  two  before and  two  behind  ",
    "once upon a time",
    "Once upon a time there was the green house.",
    "\n",
    "\n\n\t \r\n",
    "line\nline\r\nline",
    "tab\tand\vfeeds\f",
    "\0",
    "nul\0inside",
    "</s>",
    "<s>",
    "<unk>",
    "<0x0A>",
    "a</s>b<s>c<unk>d<0x0A>e",
    "\u2581",
    "\u2581\u2581the\u2581",
    "\ufeffbom",
    "\ufffd is a character too",
    "\u2047",
    "\u00e9 e\u0301 \u00df",
    "\u6f22\u5b57\u304b\u306a",
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\u200b\u00a0\u3000",
    "\U0010ffff\ue000\uffff",
    "0123456789 12.5e-3",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "x" * 500,
    "the " * 200,
]
SETTINGS = {"deadline": None, "derandomize": True, "database": None}
# words that the tokenizer knows, beside all of Unicode: hypothesis alone would hardly ever write one
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(["the", " house", "once", " ", "  ", "\n", "\u2581", "</s>", "\u6f22", "\U0001f642", "."]),
        max_size=20,
    ).map("".join),
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    """The code under test."""
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="module")
def reference(tokenizer_path: Path) -> Any:
    """The library that has the last word."""
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))


def byte_ids(data: bytes) -> list[int]:
    """The byte tokens of some bytes: in LLaMA's vocabularies, and in the fixture's, they follow <unk>, <s> and </s>."""
    return [3 + byte for byte in data]


def by_hand(reference: Any, ids: list[int]) -> str:
    """What ids mean, from the library's table and Python's UTF-8 alone; ids beyond the vocabulary are U+FFFD."""
    parts: list[bytes] = []
    for i in ids:
        if not 0 <= i < reference.vocab_size():
            parts.append(REPLACEMENT.encode())
        elif reference.is_byte(i):
            parts.append(bytes([i - 3]))
        elif reference.is_unknown(i):
            parts.append(" \u2047 ".encode())
        elif not reference.is_control(i):
            text = reference.id_to_piece(i).replace("\u2581", " ")
            parts.append((text if parts else text.removeprefix(" ")).encode())
    return b"".join(parts).decode("utf-8", errors="replace")


# ----------------------------------------------------------------------------------------------------------------------
# encode


def test_the_numbers_are_the_librarys(tokenizer: Tokenizer, reference: Any) -> None:
    """Size, BOS and EOS come from the file, and EOS is what ends a generation."""
    assert tokenizer.n_words == reference.vocab_size() == 320
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_id(), reference.eos_id()) == (1, 2)
    assert tokenizer.stop_ids == (2,)
    assert tokenizer.special_ids == {"<s>": 1, "</s>": 2}
    assert [reference.is_byte(i) for i in byte_ids(b"\x00\xff")] == [True, True]


@pytest.mark.parametrize("text", FIXED, ids=lambda text: ascii(text)[:30])
def test_fixed_texts_go_there_and_back(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    """The ids are the library's, the text that comes back is the library's, and it is the one that went in."""
    ids = tokenizer.encode(text, bos=False)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids) == text.replace("\u2581", " ")


@settings(max_examples=300, **SETTINGS)
@given(text=TEXTS)
def test_any_text_goes_there_and_back(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    """The same for texts that nobody thought of."""
    ids = tokenizer.encode(text, bos=False)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.parametrize("text", ["", "the house", "\u6f22</s>"])
@pytest.mark.parametrize(
    ("flags", "before", "behind"),
    [({}, [1], []), ({"bos": False}, [], []), ({"eos": True}, [1], [2]), ({"bos": False, "eos": True}, [], [2])],
)
def test_bos_and_eos_are_put_around(
    tokenizer: Tokenizer, reference: Any, text: str, flags: dict[str, bool], before: list[int], behind: list[int]
) -> None:
    """BOS unless it is not wanted, EOS only where it is; neither shows in the text."""
    ids = tokenizer.encode(text, **flags)
    assert ids == [*before, *reference.encode(text), *behind]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["<s>", "</s>", "a</s>b", "<s><s>", "the </s> house", "<unk>", "<0x0A>"])
def test_control_tokens_in_a_text_stay_text(tokenizer: Tokenizer, text: str) -> None:
    """A user who writes </s> does not end his prompt with it."""
    ids = tokenizer.encode(text)
    assert {0, 1, 2}.isdisjoint(ids[1:])
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("</s>", [2]),
        ("<s></s>", [1, 2]),
        ("a</s>b<s>", ["a", 2, "b", 1]),
        ("</s>the house</s> home", [2, "the house", 2, " home"]),
        ("</s", ["</s"]),
        ("<</s>>", ["<", 2, ">"]),
        ("<unk><0x0A>", ["<unk><0x0A>"]),
        ("", []),
    ],
)
def test_control_tokens_become_their_ids_where_allowed(
    tokenizer: Tokenizer, reference: Any, text: str, parts: list[str | int]
) -> None:
    """With allow_special they are the tokens, what stands between them is encoded as ever, and look-alikes stay
    text.
    """
    expected = [i for part in parts for i in ([part] if isinstance(part, int) else reference.encode(part))]
    assert tokenizer.encode(text, bos=False, allow_special=True) == expected


# ----------------------------------------------------------------------------------------------------------------------
# decode


@settings(max_examples=300, **SETTINGS)
@given(data=st.data())
def test_any_ids_of_valid_text_decode_as_the_library_does(
    tokenizer: Tokenizer, reference: Any, data: st.DataObject
) -> None:
    """Ids in an order that no text has: words, controls, <unk>, single ASCII bytes and whole characters written in
    bytes.
    """
    words = st.sampled_from([i for i in range(320) if not reference.is_byte(i)]).map(lambda i: [i])
    characters = st.one_of(st.sampled_from(" \n\0a"), st.characters(codec="utf-8", exclude_characters=REPLACEMENT)).map(
        lambda c: byte_ids(c.encode())
    )
    ids = [i for part in data.draw(st.lists(st.one_of(words, characters), max_size=12)) for i in part]
    assert tokenizer.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([0], " \u2047 "),
        ([1, 0], " \u2047 "),
        ([2, 0, 0], " \u2047  \u2047 "),
        (byte_ids(b" a"), " a"),
        ([1, *byte_ids(b"  ")], "  "),
    ],
)
def test_only_the_space_of_a_first_word_is_taken_off(
    tokenizer: Tokenizer, reference: Any, ids: list[int], text: str
) -> None:
    """The space that SentencePiece puts before a text is part of its first piece; that of <unk> or of a byte token is
    real.
    """
    assert reference.decode(ids) == text
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("ids", [[320], [-1], [10**9], [0, 320], [320, 1, 2, 320]])
def test_ids_beyond_the_vocabulary_are_shown_as_such(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Embeddings are often padded past the tokenizer; such an id is a visible character, not a crash and not
    nothing.
    """
    assert tokenizer.decode(ids).count(REPLACEMENT) == len([i for i in ids if not 0 <= i < 320])


@pytest.mark.parametrize("text", ["once upon a time", "\u6f22"])
def test_control_tokens_have_no_text(tokenizer: Tokenizer, text: str) -> None:
    """BOS and EOS within a sequence leave no trace, also between the bytes of one character."""
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.decode([1, *(i for each in ids for i in (each, 2))]) == text
    assert tokenizer.token_bytes(1) == tokenizer.token_bytes(2) == b""


# ----------------------------------------------------------------------------------------------------------------------
# stream

ANY_IDS = st.lists(
    st.one_of(
        st.integers(0, 319), st.integers(3, 258), st.integers(259, 290), st.sampled_from([-1, 0, 1, 2, 320, 1000])
    ),
    max_size=40,
)


@settings(max_examples=300, **SETTINGS)
@given(ids=ANY_IDS, seed=st.integers(0, 2**16))
@example(ids=byte_ids("\U0001f642".encode()[:3]), seed=0)
@example(ids=[*byte_ids(b"\xf0\x9f"), 320, *byte_ids(b"\x99\x82\xff")], seed=0)
def test_a_stream_joins_to_the_whole(tokenizer: Tokenizer, reference: Any, ids: list[int], seed: int) -> None:
    """However a sequence is cut, and however broken its UTF-8 is, the pieces and the rest are exactly the whole
    text.
    """
    decoder, pieces, rest, chooser = StreamDecoder(tokenizer), [], list(ids), random.Random(seed)
    while rest:
        count = chooser.randint(0, 4)
        pieces.append(decoder.push(rest[:count]))
        rest = rest[count:]
    pieces.append(decoder.finish())
    assert "".join(pieces) == tokenizer.decode(ids)
    if ids and not {0, *byte_ids(b" ")} & set(ids):  # their leading space has a test of its own
        assert "".join(pieces) == by_hand(reference, ids)


@settings(max_examples=200, **SETTINGS)
@given(ids=ANY_IDS)
def test_a_stream_never_takes_back_what_it_has_shown(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Text so far is always the beginning of the text of the whole: what has been printed stays right."""
    whole, decoder, shown = tokenizer.decode(ids), StreamDecoder(tokenizer), ""
    for i in ids:
        shown += decoder.push([i])
        assert whole.startswith(shown)


@pytest.mark.parametrize("character", ["\u00e9", "\u6f22", "\U0001f642"])
@pytest.mark.parametrize("before", ["", "the", " "])
def test_a_character_is_shown_when_its_last_byte_is_there(tokenizer: Tokenizer, character: str, before: str) -> None:
    """A character spread over byte tokens is held back until it is whole; no U+FFFD flashes up in between."""
    decoder = StreamDecoder(tokenizer, tokenizer.encode("the"))
    *first, last = byte_ids(character.encode())
    assert decoder.push(tokenizer.encode(before, bos=False)).strip() == before.strip()
    assert [decoder.push([i]) for i in first] == [""] * len(first)
    assert decoder.push([2]) == ""
    assert decoder.push([last]) == character
    assert decoder.finish() == ""


@pytest.mark.parametrize("data", ["\u00e9".encode()[:1], "\u6f22".encode()[:2], "\U0001f642".encode()[:3]])
def test_half_a_character_is_told_at_the_end_or_when_it_is_broken_off(tokenizer: Tokenizer, data: bytes) -> None:
    """Bytes that never become a character are one U+FFFD, and what follows them is not swallowed."""
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(byte_ids(data)) == ""
    assert decoder.finish() == REPLACEMENT
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(byte_ids(data)) == ""
    assert decoder.push(byte_ids(b"a")) == f"{REPLACEMENT}a"
    assert decoder.finish() == ""


def test_a_continuation_keeps_its_leading_space(tokenizer: Tokenizer) -> None:
    """The space before the first generated word stands between prompt and generation; a text that begins has none."""
    house = tokenizer.encode("house", bos=False)
    assert StreamDecoder(tokenizer, tokenizer.encode("the")).push(house) == " house"
    assert StreamDecoder(tokenizer).push(house) == "house"
    assert StreamDecoder(tokenizer, [1]).push(house) == "house"
    assert StreamDecoder(tokenizer, [1, *byte_ids(b"\n")]).push(house) == " house"


@settings(max_examples=200, **SETTINGS)
@given(
    words=st.lists(st.sampled_from(["the", "house", "once", "upon", " ", "\n", "."]), min_size=1, max_size=12),
    at=st.integers(0, 40),
)
def test_prompt_and_continuation_join_to_the_whole(tokenizer: Tokenizer, words: list[str], at: int) -> None:
    """Wherever a sequence is cut into a prompt and what follows, the two texts are those of the whole."""
    ids = tokenizer.encode(" ".join(words))
    prompt, rest = ids[:at], ids[at:]
    decoder = StreamDecoder(tokenizer, prompt)
    assert tokenizer.decode(prompt) + decoder.push(rest) + decoder.finish() == tokenizer.decode(ids)


def test_half_a_character_of_the_prompt_stays_the_prompts(tokenizer: Tokenizer) -> None:
    """A prompt of ids may end within a character; that is no part of the generation."""
    decoder = StreamDecoder(tokenizer, byte_ids("\U0001f642".encode()[:2]))
    assert decoder.push(tokenizer.encode("the", bos=False)) == " the"
    assert decoder.finish() == ""


# ------------------------------------------------------------------------------------------------------------------ bad
# files


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """The path and the flag that gives another are named; a directory is no file."""
    for path in (tmp_path / "absent.model", tmp_path):
        with pytest.raises(
            TokenizerError,
            match=r"no tokenizer at .*expected a SentencePiece model, a tiktoken ranks file or a tokenizer\.json"
            r".*with tokenizer_path$",
        ) as caught:
            load_tokenizer(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world", b"{}", b"\0" * 100, random.Random(0).randbytes(1000)],
    ids=["empty", "text", "json", "zeros", "random"],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    """Other tokenizer formats and broken downloads are told by name."""
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    kind = r"tokenizer\.json" if content == b"{}" else "SentencePiece model"
    with pytest.raises(TokenizerError, match=f"is not a {kind}") as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_model_is_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    """Wherever a download was cut off, what is left of the vocabulary is not used."""
    data, path = tokenizer_path.read_bytes(), tmp_path / "cut.model"
    for kept in [*range(1, len(data) - 300, 97), len(data) // 2]:
        path.write_bytes(data[:kept])
        with pytest.raises(TokenizerError, match="is not a SentencePiece model"):
            load_tokenizer(path)


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        ({"bos_id": -1, "eos_id": 1}, "-1, 1"),
        ({"bos_id": 1, "eos_id": -1}, "1, -1"),
        ({"bos_id": -1, "eos_id": -1}, "-1, -1"),
    ],
)
def test_a_model_without_bos_or_eos_is_refused(tmp_path: Path, ids: dict[str, int], shown: str) -> None:
    """LLaMA begins every sequence with the one and ends it with the other."""
    sentences = iter(["the green house and the dog"] * 20)
    prefix = str(tmp_path / "other")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_prefix=prefix,
        vocab_size=20,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    with pytest.raises(TokenizerError, match="no BOS or no EOS") as caught:
        load_tokenizer(f"{prefix}.model")
    assert shown in str(caught.value)
