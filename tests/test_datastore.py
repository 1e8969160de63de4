"""Datastores and word banks: against naive searches, damaged files and other tokenizers', and the command."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence as SequenceOf
from pathlib import Path

import numpy as np
import pytest
from commands import Run, refused_at_once
from hypothesis import given, settings, strategies as st

from llama import SamplingParams
from llama.drafting import (
    Datastore,
    Fingerprint,
    Retrieval,
    WordBank,
    datastore as datastore_file,
    fingerprint,
    word_bank as bank_file,
)
from llama.drafting.datastore import build, contents
from llama.drafting.files import HEADER_BYTES, Header, read_header, write_file
from llama.drafting.suffix_array import suffix_array
from llama.engine.sequence import Sequence
from llama.errors import ConfigError, DatastoreError
from llama.tokenizer import Tokenizer, load_tokenizer

VOCABULARY = Fingerprint(1000, b"v" * 32)
OTHERS = {"another digest": Fingerprint(1000, b"w" * 32), "another size": Fingerprint(1001, b"v" * 32)}
SMALL = st.lists(st.integers(0, 3), max_size=30)


def sequence(ids: SequenceOf[int], output: SequenceOf[int] = ()) -> Sequence:
    """A sequence with a prompt and an output."""
    made = Sequence(tuple(ids), SamplingParams())
    made.ids += output
    made.token_ids += output
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for files that a test writes many times."""
    return tmp_path_factory.mktemp("datastore")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A datastore of two documents."""
    build([[1, 2, 3, 4, 5], [9, 2, 3, 6]], VOCABULARY, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """A word bank that has learned one answer."""
    made = WordBank(tmp_path / "bank", VOCABULARY)
    made.finished(sequence([1, 2], [3, 4, 5]))
    made.close()
    return tmp_path / "bank"


# --- the suffix array


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=60), st.sampled_from([0, 65_533, 2**32 - 3]))
def test_a_suffix_array_is_a_sort_of_all_suffixes(text: list[int], smallest: int) -> None:
    """Of texts with many ties, at both ends of the tokens' range."""
    dtype = np.uint16 if smallest < 2**16 else np.uint32
    array = np.array([smallest + token for token in text], dtype=dtype)
    assert suffix_array(array).tolist() == sorted(range(len(text)), key=lambda start: text[start:])


def test_a_text_of_one_token_is_sorted_in_time() -> None:
    """The worst case: every suffix ties with all longer ones."""
    count = 20_000
    assert (suffix_array(np.zeros(count, dtype=np.uint16)) == np.arange(count)[::-1]).all()


# --- guesses


def naive_guess(
    documents: SequenceOf[SequenceOf[int]], ids: SequenceOf[int], longest: int, shortest: int, draft_len: int
) -> tuple[int, list[tuple[int, ...]]]:
    """The longest match that is followed by something, and what follows at each of its places."""
    for length in range(min(longest, len(ids)), shortest - 1, -1):
        end = list(ids[len(ids) - length :])
        after = [
            tuple(document[i : i + draft_len])
            for document in documents
            for i in range(length, len(document))
            if list(document[i - length : i]) == end
        ]
        if after:
            return length, after
    return 0, []


@settings(deadline=None, max_examples=60)
@given(
    st.lists(SMALL.filter(bool), min_size=1, max_size=6),
    SMALL,
    st.integers(1, 3),
    st.integers(0, 5),
    st.sampled_from([4, 1000, 100_000]),
)
def test_a_guess_is_what_a_search_of_all_documents_finds(
    place: Path, documents: list[list[int]], ids: list[int], shortest: int, more: int, vocab_size: int
) -> None:
    """The longest end that stands in a document, and at every token one that most of the places left agree on."""
    vocabulary = Fingerprint(vocab_size, b"v" * 32)
    build(documents, vocabulary, place / "store")
    opened = Datastore(place / "store", vocabulary)
    length, guess = opened.guess(ids, shortest + more, shortest, 4, 1000)
    expected, after = naive_guess(documents, ids, shortest + more, shortest, 4)
    assert length == expected
    for depth in range(4):
        votes = Counter(each[depth] for each in after if len(each) > depth)
        assert (len(guess) > depth) == bool(votes)
        if votes:
            assert votes[guess[depth]] == max(votes.values())
            after = [each for each in after if len(each) > depth and each[depth] == guess[depth]]
    opened.close()


def test_few_of_many_places_are_compared(tmp_path: Path) -> None:
    """Spread over all of them: what follows three times in four is found among sixteen of four thousand."""
    documents = [[1, 2, 7 if number % 4 == 0 else 8, number % 900] for number in range(4000)]
    build(documents, VOCABULARY, tmp_path / "store")
    assert Datastore(tmp_path / "store", VOCABULARY).guess([1, 2], 16, 2, 1, 16) == (2, [8])


def test_a_guess_ends_with_its_document(store: Path) -> None:
    """Neither a separator nor the next document's tokens are guessed, and ids beyond the vocabulary match nothing."""
    opened = Datastore(store, VOCABULARY)
    assert opened.guess([3, 4], 16, 2, 8, 16) == (2, [5])
    assert opened.guess([4, 5], 16, 2, 8, 16) == (0, [])
    assert opened.guess([5, 65_535, 9, 2], 16, 1, 8, 16) == (2, [3, 6])
    assert opened.guess([70_000, 2], 16, 2, 8, 16) == opened.guess([-1], 16, 1, 8, 16) == (0, [])
    assert opened.guess([], 16, 1, 8, 16) == opened.guess([3], 16, 2, 8, 16) == (0, [])


@pytest.mark.parametrize(("vocab_size", "token_bytes"), [(65_535, 2), (65_536, 4), (128_256, 4)])
def test_tokens_take_four_bytes_only_where_two_are_too_few(tmp_path: Path, vocab_size: int, token_bytes: int) -> None:
    """The largest id is found, and is not taken for the separator."""
    vocabulary, last = Fingerprint(vocab_size, b"v" * 32), vocab_size - 1
    made = build([[last, 1, last, 2], [last]], vocabulary, tmp_path / "store")
    assert (made.tokens, made.documents, made.token_bytes) == (7, 2, token_bytes)
    assert made.file_bytes == (tmp_path / "store").stat().st_size
    assert Datastore(tmp_path / "store", vocabulary).guess([1, last], 16, 2, 4, 16) == (2, [2])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_datastore_is_not_read_into_memory(tmp_path: Path) -> None:
    """A search touches a part of the file's pages only."""
    vocabulary = Fingerprint(3_000_000, b"v" * 32)
    build([range(3_000_000)], vocabulary, tmp_path / "store")
    opened = Datastore(tmp_path / "store", vocabulary)
    assert opened.guess([1_234_567, 1_234_568], 16, 2, 3, 16) == (2, [1_234_569, 1_234_570, 1_234_571])
    mapping = Path("/proc/self/smaps").read_text().partition(str(tmp_path / "store"))[2]
    resident = re.search(r"Rss:\s+(\d+) kB", mapping)
    assert resident is not None
    print(f"{resident[1]} kB of {opened.contents.file_bytes // 1024} are in memory")
    assert int(resident[1]) * 1024 < opened.contents.file_bytes / 2


def test_a_guess_takes_less_than_a_millisecond(tmp_path: Path) -> None:
    """In 300,000 tokens; each doubling adds one step to a search. The print says how long it took."""
    chooser = np.random.default_rng(0)
    text = (chooser.zipf(1.2, 300_000) % 999).tolist()
    build([text[start : start + 500] for start in range(0, len(text), 500)], VOCABULARY, tmp_path / "store")
    drafter, batches = Retrieval(Datastore(tmp_path / "store", VOCABULARY)), []
    for _ in range(5):
        rows = [sequence(text[start : start + 40]) for start in chooser.integers(0, 299_000, 50)]
        before = time.thread_time()
        for row in rows:
            drafter.propose([row], 7)
        batches.append((time.thread_time() - before) / len(rows) * 1e6)
    print(f"retrieval: {min(batches):.0f} microseconds a proposal")
    assert min(batches) < 1000


# --- building


def test_a_datastore_appears_when_it_is_complete(store: Path) -> None:
    """A build that fails leaves the old one and nothing else; one that succeeds replaces it, while it is open."""
    before, opened = store.read_bytes(), Datastore(store, VOCABULARY)

    def failing() -> Iterator[list[int]]:
        yield [1, 2]
        raise RuntimeError("the corpus is gone")

    with pytest.raises(RuntimeError, match="the corpus is gone"):
        build(failing(), VOCABULARY, store)
    assert (store.read_bytes(), os.listdir(store.parent)) == (before, ["store"])
    build([[1, 2, 7]], VOCABULARY, store)
    assert os.listdir(store.parent) == ["store"]
    assert opened.guess([1, 2], 4, 2, 1, 1) == (2, [3])
    assert Datastore(store, VOCABULARY).guess([1, 2], 4, 2, 1, 1) == (2, [7])


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the file."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DatastoreError, match="store could not be written: No space left on device"):
        build([[1]], VOCABULARY, tmp_path / "store")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([], "hold no text"),
        ([[], []], "hold no text"),
        ([[1], [2, 1000]], "document 2: got the token ids 2 to 1000, expected them below the vocabulary's size, 1000"),
        ([[-1]], "document 1: got the token ids -1 to -1"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, documents: list[list[int]], words: str) -> None:
    """With the document's number, and without a file."""
    with pytest.raises(DatastoreError, match=words):
        build(documents, VOCABULARY, tmp_path / "store")
    assert os.listdir(tmp_path) == []


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    """Nor are directories, nor are those that are not there made."""
    (tmp_path / "notes.txt").write_text("precious")
    for target, words in {
        tmp_path / "notes.txt": "is there already and is no datastore",
        tmp_path: "cannot be read",
        tmp_path / "absent" / "store": "is not a directory; make it first",
    }.items():
        with pytest.raises(DatastoreError, match=words):
            build([[1]], VOCABULARY, target)
    assert (tmp_path / "notes.txt").read_text() == "precious"


# --- files that are not what they should be


def open_store(path: Path) -> None:
    Datastore(path, VOCABULARY).close()


def open_bank(path: Path) -> None:
    WordBank(path, VOCABULARY)


FILES = pytest.mark.parametrize(
    ("kind", "opened"), [("store", open_store), ("bank", open_bank)], ids=["datastore", "word bank"]
)


@pytest.fixture
def file(kind: str, request: pytest.FixtureRequest) -> Path:
    """The file of a kind."""
    path: Path = request.getfixturevalue(kind)
    return path


@FILES
@pytest.mark.parametrize("region", ["empty", "magic", "version", "header", "no body", "body", "one byte", "longer"])
def test_a_truncated_file_is_refused(file: Path, opened: Callable[[Path], None], region: str) -> None:
    """Wherever it was cut, and what it should be is said."""
    data = file.read_bytes()
    kept = {
        "empty": 0,
        "magic": 7,
        "version": 18,
        "header": HEADER_BYTES - 1,
        "no body": HEADER_BYTES,
        "body": HEADER_BYTES + 9,
        "one byte": len(data) - 1,
        "longer": len(data),
    }[region]
    file.write_bytes(data[:kept] + (b"x" if region == "longer" else b""))
    with pytest.raises(DatastoreError, match=r"is no |ends within its header|is damaged: got \d+ bytes, expected \d+"):
        opened(file)


@FILES
def test_every_damaged_header_is_refused(file: Path, opened: Callable[[Path], None]) -> None:
    """One changed bit anywhere in it."""
    data = file.read_bytes()
    for place in range(HEADER_BYTES):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(DatastoreError):
            opened(file)


@FILES
def test_another_version_is_refused(
    file: Path, kind: str, opened: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both versions, and what helps."""
    module = {"store": datastore_file, "bank": bank_file}[kind]
    monkeypatch.setattr(module, "KIND", module.KIND._replace(version=2))
    with pytest.raises(DatastoreError, match="of version 1, expected 2; "):
        opened(file)


@FILES
def test_a_file_of_another_kind_is_refused(
    file: Path, kind: str, opened: Callable[[Path], None], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A word bank for a datastore and the other way round, a text, a directory."""
    other: Path = request.getfixturevalue("bank" if kind == "store" else "store")
    (tmp_path / "notes.txt").write_text("Once upon a time")
    for path in (other, tmp_path / "notes.txt"):
        with pytest.raises(DatastoreError, match="is no "):
            opened(path)
    with pytest.raises(DatastoreError, match="Is a directory"):
        opened(tmp_path)


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_another_tokenizer_is_refused(store: Path, bank: Path, other: str) -> None:
    """Its ids would mean something else."""
    with pytest.raises(DatastoreError, match=r"belongs to another tokenizer: got vocabulary 7676.* \(1000 ids\)"):
        Datastore(store, OTHERS[other])
    with pytest.raises(DatastoreError, match="belongs to another tokenizer"):
        WordBank(bank, OTHERS[other])


def test_an_absent_datastore_is_refused_with_the_cure(tmp_path: Path) -> None:
    """Which is the command that makes one."""
    with pytest.raises(DatastoreError, match=r"No such file or directory\); make one .* llama-xla datastore build"):
        Datastore(tmp_path / "store", VOCABULARY)


def test_a_damaged_body_is_found_by_its_checksum_and_harms_nobody(tmp_path: Path) -> None:
    """A datastore is not read when it is opened. Damage may spoil guesses, but they stay ids of the vocabulary."""
    path, chooser = tmp_path / "store", random.Random(0)
    text = [chooser.randrange(4) for _ in range(300)]
    build([text], VOCABULARY, path)
    data = path.read_bytes()
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(30):
            damaged[chooser.randrange(HEADER_BYTES, len(data))] = chooser.randrange(256)
        path.write_bytes(damaged)
        with pytest.raises(DatastoreError, match="its checksum differs"):
            contents(path, check_sum=True)
        opened = Datastore(path, VOCABULARY)
        for start in range(0, 280, 20):
            length, guess = opened.guess(text[start : start + 20], 16, 1, 8, 16)
            assert length <= 16
            assert all(0 <= token < 1000 for token in guess)
        opened.close()


def test_a_damaged_word_bank_is_refused(bank: Path) -> None:
    """It is read as a whole, so its checksum is compared."""
    data = bank.read_bytes()
    bank.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DatastoreError, match="its checksum differs"):
        WordBank(bank, VOCABULARY)


# --- fingerprints


class Pieces(Tokenizer):
    """A vocabulary of given bytes."""

    kind = "tiktoken"

    def __init__(self, pieces: SequenceOf[bytes]) -> None:
        self._pieces = pieces
        self.n_words = len(pieces)

    def _encode_parts(self, parts: object) -> list[int]:
        raise NotImplementedError

    def _bytes_of(self, token_id: int) -> bytes:
        return self._pieces[token_id]


def test_equal_vocabularies_have_equal_fingerprints(tokenizer_path: Path, tmp_path: Path) -> None:
    """Whatever the file; any other order, border or piece makes another one."""
    (tmp_path / "copy.model").write_bytes(tokenizer_path.read_bytes())
    loaded = load_tokenizer(tokenizer_path)
    same = Pieces([loaded.token_bytes(i) for i in range(loaded.n_words)])
    assert fingerprint(loaded) == fingerprint(load_tokenizer(tmp_path / "copy.model")) == fingerprint(same)
    others = ([b"ab", b"c"], [b"c", b"ab"], [b"a", b"bc"], [b"ab", b"c", b""], [b"ab", b"C"])
    assert len({fingerprint(Pieces(pieces)) for pieces in others}) == len(others)


def test_a_header_is_read_as_it_was_written(tmp_path: Path) -> None:
    """All of its numbers."""
    sizes = (2**40, 3, 2, 0)
    write_file(tmp_path / "a", datastore_file.KIND, VOCABULARY, sizes, lambda body: body.write(b"abc"))
    assert read_header(tmp_path / "a", datastore_file.KIND, lambda _: 3) == Header(VOCABULARY, sizes, 0x352441C2)


# --- the word bank


def naive_bank(texts: SequenceOf[tuple[list[int], list[int]]], ids: list[int], draft_len: int) -> list[int]:
    """What followed the longest of the last 4 to 2 tokens in an answer last, token by token."""
    ids, guess = list(ids), list[int]()
    while len(guess) < draft_len:
        found = None
        for size in (4, 3, 2):
            for prompt, output in texts:
                seen = prompt[-4:] + output
                first = len(prompt[-4:])
                for i in range(max(first, size), len(seen)):
                    if seen[i - size : i] == ids[-size:] and len(ids) >= size:
                        found = seen[i]
            if found is not None:
                break
        if found is None:
            break
        guess.append(found)
        ids.append(found)
    return guess


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(SMALL.filter(bool), SMALL), max_size=5), SMALL)
def test_a_word_bank_is_a_search_of_all_answers(
    place: Path, texts: list[tuple[list[int], list[int]]], ids: list[int]
) -> None:
    """The newest of them, before and after it was a file."""
    path = place / "bank"
    path.unlink(missing_ok=True)
    made = WordBank(path, VOCABULARY)
    for prompt, output in texts:
        made.finished(sequence(prompt, output))
    expected = naive_bank(texts, ids, 5)
    assert made.guess(ids, 5)[1] == expected
    made.close()
    assert path.exists() == (len(made) > 0)
    assert WordBank(path, VOCABULARY).guess(ids, 5)[1] == expected


def test_a_word_bank_learns_answers_only(bank: Path) -> None:
    """The prompt's last tokens are what an answer follows, and are no answer."""
    kept = WordBank(bank, VOCABULARY)
    assert kept.guess([8, 1, 2], 3) == (2, [3, 4, 5])
    assert kept.guess([1, 2, 3, 4], 3) == (4, [5])
    assert kept.guess([0, 1], 3) == kept.guess([], 3) == (0, [])
    kept.finished(sequence([1, 2]))
    kept.finished(sequence([1, 2], [7]))
    assert kept.guess([1, 2], 1) == (2, [7])


def test_a_word_bank_is_bounded_and_forgets_what_is_unused(tmp_path: Path) -> None:
    """What was guessed lately stays, and what was not goes; a smaller bank keeps the newest of a larger file."""
    made = WordBank(tmp_path / "bank", VOCABULARY, max_entries=10, max_ngram=2)
    made.finished(sequence([1, 2], [3]))
    for number in range(100):
        made.finished(sequence([500, number], [number]))
        assert len(made) <= 10
        assert made.guess([1, 2], 1) == (2, [3])
    assert made.guess([500, 99], 1) == (2, [99])
    assert made.guess([500, 80], 1) == (0, [])
    made.close()
    smaller = WordBank(tmp_path / "bank", VOCABULARY, max_entries=3, max_ngram=2)
    assert (len(smaller), smaller.guess([500, 99], 1)) == (3, (2, [99]))


def test_a_word_bank_is_written_once(bank: Path) -> None:
    """Closing it twice, or without anything new, leaves the file alone."""
    kept = WordBank(bank, VOCABULARY)
    before = bank.stat()
    kept.close()
    assert bank.stat() == before or bank.stat().st_ino == before.st_ino
    kept.finished(sequence([1], [2, 3, 4]))
    kept.close()
    written = bank.stat()
    assert written.st_ino != before.st_ino
    kept.close()
    assert bank.stat().st_ino == written.st_ino
    assert os.listdir(bank.parent) == ["bank"]


def test_two_processes_keep_what_both_learned(bank: Path) -> None:
    """The one that closes last adds what the other one has written meanwhile; where they differ, its own is newer."""
    first, second = (WordBank(bank, VOCABULARY) for _ in range(2))
    first.finished(sequence([10, 11], [12, 13]))
    second.finished(sequence([20, 21], [22]))
    second.finished(sequence([10, 11], [99]))
    first.close()
    second.close()
    merged = WordBank(bank, VOCABULARY)
    found = [merged.guess(ids, 1)[1] for ids in ([10, 11], [11, 12], [20, 21], [1, 2])]
    assert found == [[99], [13], [22], [3]]


def test_a_word_bank_never_overwrites_another_file(bank: Path) -> None:
    """Not even one that took its place while it was open."""
    kept = WordBank(bank, VOCABULARY)
    kept.finished(sequence([1], [2, 3, 4]))
    bank.write_text("precious notes")
    with pytest.raises(DatastoreError, match="is no word bank"):
        kept.close()
    assert bank.read_text() == "precious notes"


def test_a_word_bank_that_could_not_be_written_is_refused_at_once(tmp_path: Path) -> None:
    """And not after hours, when it is closed."""
    with pytest.raises(DatastoreError, match="absent is not a directory; make it first"):
        WordBank(tmp_path / "absent" / "bank", VOCABULARY)


# --- the drafter


def test_the_longer_match_wins_and_of_equal_ones_the_banks(tmp_path: Path, store: Path) -> None:
    """A match of the bank's longest n-gram wins at once, however long the datastore's is."""
    build([[1, 2, 3, 4, 5, 6], [7, 2, 3, 60]], VOCABULARY, store)
    kept = WordBank(tmp_path / "bank", VOCABULARY, max_ngram=3)
    kept.finished(sequence([2, 3], [70, 71]))
    drafter = Retrieval(Datastore(store, VOCABULARY), kept)
    rows = [sequence(ids) for ids in ([9, 2, 3], [7, 2, 3], [4, 5], [2, 3, 70], [8])]
    tokens, counts = drafter.propose(rows, 2)
    found = [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]
    assert found == [[70, 71], [60], [6], [71], []]
    kept.finished(sequence([7, 2, 3], [80]))
    assert drafter.propose(rows[1:2], 1).tokens.tolist() == [[80]]


def test_retrieval_has_a_datastore_or_a_bank_and_closes_both(store: Path, tmp_path: Path) -> None:
    """One is enough. Closing twice does nothing."""
    kept = WordBank(tmp_path / "bank", VOCABULARY)
    for drafter in (Retrieval(Datastore(store, VOCABULARY)), Retrieval(bank=kept)):
        drafter.finished(sequence([1, 2], [3]))
        assert drafter.propose([sequence([1, 2])], 1).tokens.tolist() == [[3]]
        drafter.close()
        drafter.close()
    assert len(WordBank(tmp_path / "bank", VOCABULARY)) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "neither a datastore nor a word bank"),
        ({"min_match": 0}, "min_match: got 0, expected 1 to max_match=16"),
        ({"min_match": 5, "max_match": 4}, "min_match: got 5"),
        ({"most_matches": 0}, "most_matches: got 0"),
    ],
)
def test_settings_of_retrieval_out_of_range_are_refused(store: Path, settings: dict[str, int], words: str) -> None:
    """With the value and the range."""
    opened = Datastore(store, VOCABULARY) if settings else None
    with pytest.raises(ConfigError, match=words):
        Retrieval(opened, **settings)


@pytest.mark.parametrize("settings", [{"min_ngram": 0}, {"max_ngram": 1}, {"max_entries": 0}])
def test_settings_of_a_word_bank_out_of_range_are_refused(tmp_path: Path, settings: dict[str, int]) -> None:
    """With the value and the range."""
    with pytest.raises(ConfigError, match=r"got -?[0-9]+, expected"):
        WordBank(tmp_path / "bank", VOCABULARY, **settings)


# --- the command


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus of every sort of line."""
    lines = [
        {"text": "once upon a time"},
        {"token_ids": [1, 30, 31]},
        {"prompt": "the cat", "generation": " ran home"},
        {"index": 0, "prompt": "the cat", "generation": " sang", "token_ids": [40, 41]},
        {"index": 0, "sample": 0, "piece": " sang"},
    ]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    return path


def test_the_command_builds_and_inspects(run: Run, corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """What was made is in the log, what it holds on stdout; the results' own tokens are kept."""
    store = str(tmp_path / "store")
    built = run("datastore", "build", str(corpus), "--tokenizer_path", str(tokenizer_path), "-o", store)
    assert (built.code, built.out) == (0, "")
    assert re.search(r"store: \d+ tokens, 4 documents, \d+ bytes, made in [\d.]+ seconds\n", built.err)
    tokenizer = load_tokenizer(tokenizer_path)
    opened = Datastore(tmp_path / "store", fingerprint(tokenizer))
    assert opened.guess([*tokenizer.encode("the cat"), 40], 16, 2, 4, 16)[1] == [41]
    assert opened.guess([1, 30], 16, 2, 4, 16) == (2, [31])
    whole = tokenizer.encode("the cat ran home")
    assert opened.guess(whole[:-2], 16, 2, 4, 16)[1] == whole[-2:]
    shown = run("datastore", "inspect", store, "--json", "--check_sums", "--tokenizer_path", str(tokenizer_path))
    assert shown.objects == [
        {
            "path": store,
            "tokens": opened.contents.tokens - 4,
            "documents": 4,
            "bytes": opened.contents.file_bytes,
            "token_bytes": 2,
            "vocab_size": 320,
            "fingerprint": fingerprint(tokenizer).digest.hex(),
        }
    ]
    assert re.fullmatch(
        rf"tokens +\d+\ndocuments +4\nfile +{opened.contents.file_bytes} bytes\na token +2 bytes\n"
        r"vocabulary +[0-9a-f]{12} \(320 ids\)\n",
        run("datastore", "inspect", store).out,
    )


def test_the_demo_models_tokenizer_is_the_default(run: Run, corpus: Path, tmp_path: Path) -> None:
    """And inspect says if another one was meant."""
    store = str(tmp_path / "store")
    built = run("datastore", "build", str(corpus), "-o", store, "--json", "--quiet")
    assert (built.objects[0]["vocab_size"], built.err) == (1024, "")


def test_inspect_compares_the_tokenizer(run: Run, store: Path, tokenizer_path: Path) -> None:
    """Where one is given."""
    refused_at_once(
        run("datastore", "inspect", str(store), "--tokenizer_path", str(tokenizer_path)), "another tokenizer"
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", ["not JSON"]),
        (b"\xff\xfe\xfd", ["not JSON"]),
        (b"[" * 100_000, ["not JSON"]),
        (b"[1, 2]", ["got a JSON list"]),
        (b"{}", ["got the keys none"]),
        (b'{"txt": "a", "a": 1}', ["got the keys a, txt", '{"text": "..."}']),
        (b'{"text": 3}', ["got the keys text"]),
        (b'{"prompt": "a"}', ["got the keys prompt"]),
        (b'{"token_ids": 3}', ["got a JSON int, expected a list of token ids"]),
        (b'{"token_ids": [1, 320]}', ["got 320, expected whole numbers below 320"]),
        (b'{"token_ids": [1, true]}', ["got True"]),
        (b'{"token_ids": [-1]}', ["got -1"]),
        (b'{"text": "\\ud800"}', ["not valid Unicode"]),
    ],
)
def test_a_bad_line_is_refused_with_its_number(
    run: Run, tmp_path: Path, tokenizer_path: Path, line: bytes, words: list[str]
) -> None:
    """And nothing is written."""
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    target = tmp_path / "store"
    outcome = run("datastore", "build", str(path), "--tokenizer_path", str(tokenizer_path), "-o", str(target))
    refused_at_once(outcome, "corpus.jsonl, line 3: ", *words)
    assert not target.exists()


def test_bad_arguments_are_refused(run: Run, corpus: Path, tmp_path: Path) -> None:
    """With what was expected instead."""
    refused_at_once(run("datastore", "make", "x"), "--action: got 'make', expected one of build, inspect")
    refused_at_once(run("datastore", "build", str(corpus)), "--output is needed")
    refused_at_once(run("datastore", "inspect", "x", "-o", "y"), "--output: got 'y'")
    refused_at_once(run("datastore", "inspect"), "--path is needed")
    refused_at_once(run("datastore", "inspect", str(tmp_path / "x")), "No such file or directory", "datastore build")
    refused_at_once(run("datastore", "inspect", str(corpus)), "is no datastore")
    refused_at_once(run("datastore", "build", str(tmp_path / "x"), "-o", str(tmp_path / "s")), "no corpus at")
    refused_at_once(run("datastore", "build", str(corpus), "-o", str(corpus)), "is no datastore: not overwritten")
    (tmp_path / "empty").write_text("\n")
    refused_at_once(run("datastore", "build", str(tmp_path / "empty"), "-o", str(tmp_path / "s")), "hold no text")
