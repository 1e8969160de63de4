"""A file of texts in which the places of any few tokens are found at once, without reading it into memory.

    header      files.py; its sizes: tokens, documents, bytes of a token (2 or 4), 0
    tokens      the documents, each with a separator after it; big-endian, so that bytes compare as the tokens do
    0 to 7      zero bytes, so that what follows is aligned
    places      u32 for each token, little-endian: the suffix array of the tokens

The file is mapped: a search touches the pages of some twenty places and tokens, whatever the file's size. (Source of
the idea: REST, He et al., arXiv 2311.08252. Its files have no header and tokens of 16 bits, and are read as a whole.)
"""

from __future__ import annotations

import itertools
import mmap
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama.drafting.files import (
    HEADER_BYTES,
    Body,
    Fingerprint,
    Kind,
    body_checksum,
    check_fingerprint,
    check_target,
    read_header,
    write_file,
)
from llama.drafting.suffix_array import MOST_TOKENS, suffix_array
from llama.errors import DatastoreError

KIND = Kind(
    "datastore", b"llama-xla store\n", 1, "make one from your texts with llama-xla datastore build CORPUS -o PATH"
)
PLACE_BYTES = 4
ALIGNMENT = 8
_CODES = {2: "H", 4: "I"}  # of a token in struct's language
_CHUNK = 2**20  # tokens that are turned into bytes at a time


@dataclass(frozen=True)
class Contents:
    """What a datastore holds.

    Attributes:
        tokens: number of tokens, separators included.
        documents: number of texts.
        token_bytes: 2 or 4.
        file_bytes: the file's size.
        fingerprint: the vocabulary of its tokens.
    """

    tokens: int
    documents: int
    token_bytes: int
    file_bytes: int
    fingerprint: Fingerprint


def build(documents: Iterable[SequenceOf[int]], vocabulary: Fingerprint, path: Path) -> Contents:
    """Write a datastore.

    The file appears when it is complete; a datastore that was there is replaced. Needs about 60 bytes of memory a
    token.

    Args:
        documents: token ids; empty ones are left out.
        vocabulary: whose ids they are.
        path: the file.

    Raises:
        DatastoreError: there is no text or too much, an id is not in the vocabulary, ``path`` is something else or
            cannot be written.
    """
    check_target(path, KIND)
    dtype = token_dtype(vocabulary.vocab_size)
    text, count = _joined(documents, vocabulary.vocab_size, dtype)
    places = suffix_array(text)
    sizes = (len(text), count, dtype.itemsize, 0)

    def fill(body: Body) -> None:
        for start in range(0, len(text), _CHUNK):
            body.write(text[start : start + _CHUNK].astype(dtype.newbyteorder(">")).tobytes())
        body.write(bytes(_padding(len(text) * dtype.itemsize)))
        for start in range(0, len(places), _CHUNK):
            body.write(places[start : start + _CHUNK].astype("<u4").tobytes())

    write_file(path, KIND, vocabulary, sizes, fill)
    return contents(path)


def contents(path: Path, *, check_sum: bool = False) -> Contents:
    """What a datastore holds, from its header.

    Args:
        path: the file.
        check_sum: read all of it and compare it with its checksum.

    Raises:
        DatastoreError: it is absent, no datastore, or damaged.
    """
    header = read_header(path, KIND, _body_bytes)
    if check_sum and body_checksum(path) != header.checksum:
        raise DatastoreError(f"{path} is damaged: its checksum differs; {KIND.cure}")
    tokens, documents, token_bytes, _ = header.sizes
    return Contents(tokens, documents, token_bytes, HEADER_BYTES + _body_bytes(header.sizes), header.fingerprint)


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of a vocabulary's tokens: its largest number is the separator and no token."""
    return np.dtype(np.uint16 if vocab_size <= np.iinfo(np.uint16).max else np.uint32)


class Datastore:
    """An open datastore.

    Args:
        path: the file.
        vocabulary: of the tokenizer that made the histories that it will be asked about.

    Attributes:
        contents: what it holds.

    Raises:
        DatastoreError: the file is absent, no datastore, of another version, truncated, or of another tokenizer.
    """

    def __init__(self, path: Path, vocabulary: Fingerprint) -> None:
        self.contents = contents(path)
        check_fingerprint(path, KIND, self.contents.fingerprint, vocabulary)
        self._width = self.contents.token_bytes
        self._code = _CODES[self._width]
        self._separator = b"\xff" * self._width
        self._vocab_size = vocabulary.vocab_size
        with path.open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._mapped.madvise(mmap.MADV_RANDOM)  # a search jumps: what is beside a place need not be read from the disk
        self._places = memoryview(self._mapped)[-self.contents.tokens * PLACE_BYTES :].cast("I")

    def guess(
        self, ids: SequenceOf[int], longest: int, shortest: int, draft_len: int, most_matches: int
    ) -> tuple[int, list[int]]:
        """What most often follows the longest end of a history that stands here.

        Of the places where it stands, up to ``most_matches`` are compared, spread evenly over the suffix array's order,
        which is the order of what follows. At each token those places vote, and those that lose are left out.

        Args:
            ids: the history.
            longest: the most tokens that are compared.
            shortest: the fewest that must match.
            draft_len: the most tokens of the guess.
            most_matches: the most places that are compared.

        Returns:
            How many tokens match, and the guess; 0 and an empty one where fewer than ``shortest`` match. Where a
            document ends after every place, a shorter match is taken.
        """
        pattern = self._encoded(ids[-longest:])
        lengths = range(shortest, len(pattern) // self._width + 1)
        # where so many tokens stand, fewer do: so the longest is found by halving
        found = bisect_left(lengths, True, key=lambda length: self._first(pattern[-length * self._width :]) is None)
        for length in reversed(lengths[:found]):
            after = self._after(pattern[-length * self._width :], draft_len, most_matches)
            if guess := self._voted(after, draft_len):
                return length, guess
        return 0, []

    def close(self) -> None:
        """Unmap the file. Closing twice does nothing."""
        self._places.release()
        self._mapped.close()

    def _encoded(self, ids: SequenceOf[int]) -> bytes:
        """Tokens as they stand in the file, from the last id on that is not in the vocabulary."""
        known = itertools.takewhile(lambda token_id: 0 <= token_id < self._vocab_size, reversed(ids))
        tokens = list(known)[::-1]
        return struct.pack(f">{len(tokens)}{self._code}", *tokens)

    def _begins(self, length: int) -> Callable[[int], bytes]:
        """The function from a place to the first ``length`` bytes of its suffix.

        They may reach past the last token. What they hold there does not matter: a separator is before it, which
        equals no token of a pattern.
        """
        mapped, width = self._mapped, self._width
        return lambda place: mapped[HEADER_BYTES + place * width : HEADER_BYTES + place * width + length]

    def _first(self, pattern: bytes) -> int | None:
        """The first of the suffixes that begin with a pattern; None if there is none."""
        begins = self._begins(len(pattern))
        first = bisect_left(self._places, pattern, key=begins)
        found = first < len(self._places) and begins(self._places[first]) == pattern
        return first if found else None

    def _after(self, pattern: bytes, draft_len: int, most: int) -> list[bytes]:
        """What follows a pattern at up to ``most`` of its places."""
        first = self._first(pattern)
        if first is None:
            return []
        last = bisect_right(self._places, pattern, first, key=self._begins(len(pattern)))
        count = min(last - first, most)
        begins = self._begins(len(pattern) + draft_len * self._width)
        return [begins(self._places[first + i * (last - first) // count])[len(pattern) :] for i in range(count)]

    def _voted(self, after: list[bytes], draft_len: int) -> list[int]:
        """The continuation that at each token most of the remaining ones have."""
        width, voted = self._width, b""
        for start in range(0, draft_len * width, width):
            votes = Counter(each[start : start + width] for each in after)
            del votes[self._separator]
            if not votes:
                break
            token = max(votes, key=votes.__getitem__)
            voted += token
            after = [each for each in after if each.startswith(token, start)]
        tokens = struct.unpack(f">{len(voted) // width}{self._code}", voted)
        return list(itertools.takewhile(lambda token_id: token_id < self._vocab_size, tokens))


def _joined(documents: Iterable[SequenceOf[int]], vocab_size: int, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """All documents, a separator after each, and how many they are."""
    separator = np.iinfo(dtype).max
    text = array(dtype.char)
    count = 0
    for document in documents:
        if not document:
            continue
        if not 0 <= min(document) <= max(document) < vocab_size:
            raise DatastoreError(
                f"document {count + 1}: got the token ids {min(document)} to {max(document)}, expected them below the "
                f"vocabulary's size, {vocab_size}; was it made with another tokenizer?"
            )
        count += 1
        text.extend(document)
        text.append(separator)
        if len(text) > MOST_TOKENS:
            raise DatastoreError(f"got more than {MOST_TOKENS} tokens; make several datastores, or take less text")
    if not count:
        raise DatastoreError("the documents hold no text; a datastore needs some")
    return np.frombuffer(text, dtype=dtype), count


def _padding(token_bytes: int) -> int:
    """Zero bytes between the tokens and their places."""
    return -(HEADER_BYTES + token_bytes) % ALIGNMENT


def _body_bytes(sizes: tuple[int, int, int, int]) -> int:
    """The bytes after a header with these sizes."""
    tokens, _, width, _ = sizes
    return tokens * width + _padding(tokens * width) + tokens * PLACE_BYTES
