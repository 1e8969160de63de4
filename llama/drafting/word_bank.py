"""The word bank: what followed a few tokens in earlier answers, shared by all requests and kept in a file.

An entry is an n-gram and the token that came after it last. A draft goes from entry to entry: the token found joins the
n-gram that is looked up next. (Source of the idea: the n-gram pools of lookahead decoding, Fu et al., arXiv 2402.02057,
and llama.cpp's lookup cache.)

    header      files.py; its sizes: entries, tokens of the longest n-gram, 0, 0
    entries     u32 each: the n-gram, filled up on the left; the token after it. The longest unused comes first.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import numpy as np

from llama.drafting.files import (
    HEADER_BYTES,
    Fingerprint,
    Kind,
    check_fingerprint,
    check_target,
    read_header,
    write_file,
)
from llama.engine.sequence import Sequence
from llama.errors import ConfigError, DatastoreError

KIND = Kind("word bank", b"llama-xla words\n", 1, "choose another path, and a new one is begun there")
FILLER = 2**32 - 1  # where an n-gram is shorter; no token has this id

Entries = OrderedDict[tuple[int, ...], int]


class WordBank:
    """N-grams of earlier answers and the token after each.

    Several processes may have the same file. ``close`` reads what others have written meanwhile, adds its own and
    renames a new file into place; so the file is whole at any time, and only what another process writes between that
    reading and that renaming is lost.

    Args:
        path: the file; read if it is there, written by ``close``.
        vocabulary: of the tokenizer whose ids it holds.
        max_entries: the most entries; the longest unused one makes room for a new one. An answer's token makes as many
            entries as there are lengths of n-grams.
        max_ngram: tokens of the longest n-gram.
        min_ngram: tokens of the shortest one.

    Raises:
        ConfigError: a number is out of its range.
        DatastoreError: the file is something else, of another version, damaged, or of another tokenizer; or its
            directory is absent.
    """

    def __init__(
        self,
        path: Path,
        vocabulary: Fingerprint,
        *,
        max_entries: int = 100_000,
        max_ngram: int = 4,
        min_ngram: int = 2,
    ) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ConfigError(f"min_ngram: got {min_ngram}, expected 1 to max_ngram={max_ngram}")
        if max_entries < 1:
            raise ConfigError(f"max_entries: got {max_entries}, expected at least 1")
        check_target(path, KIND)
        self.max_ngram = max_ngram
        self._path, self._vocabulary = path, vocabulary
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._max_entries = max_entries
        self._next: Entries = OrderedDict()
        self._changed = False
        self._read = self._state()
        self._merge(self._stored())

    def __len__(self) -> int:
        return len(self._next)

    def finished(self, sequence: Sequence) -> None:
        """Learn an answer: its tokens, and the last few of the prompt as what came before them."""
        before = list(sequence.prompt_ids[-self.max_ngram :])
        ids = before + sequence.token_ids
        for place in range(len(before), len(ids)):
            for size in self._sizes:
                if size <= place:
                    self._enter(tuple(ids[place - size : place]), ids[place])
                    self._changed = True

    def guess(self, ids: SequenceOf[int], draft_len: int) -> tuple[int, list[int]]:
        """What followed the end of a history, in earlier answers.

        Returns:
            How many tokens of the end were found, and the guess; 0 and an empty one where none were.
        """
        tail = list(ids[-self.max_ngram :])
        matched, guess = 0, list[int]()
        while len(guess) < draft_len and (ngram := self._known(tail)):
            self._next.move_to_end(ngram)
            matched = matched or len(ngram)
            guess.append(self._next[ngram])
            tail.append(guess[-1])
        return matched, guess

    def close(self) -> None:
        """Write the file, if anything was learned since it was read or written.

        Raises:
            DatastoreError: it cannot be written, or another program has put something else in its place.
        """
        if not self._changed:
            return
        if self._state() != self._read:
            check_target(self._path, KIND)
            ours, self._next = self._next, self._stored()
            self._merge(ours)
        self._write()
        self._read, self._changed = self._state(), False

    def _known(self, tail: SequenceOf[int]) -> tuple[int, ...] | None:
        """The longest n-gram at the end of a history that has an entry."""
        for size in self._sizes:
            ngram = tuple(tail[-size:])
            if ngram in self._next:
                return ngram
        return None

    def _enter(self, ngram: tuple[int, ...], token: int) -> None:
        """Make or renew an entry; the longest unused one is dropped where there are too many."""
        self._next[ngram] = token
        self._next.move_to_end(ngram)
        if len(self._next) > self._max_entries:
            self._next.popitem(last=False)

    def _merge(self, newer: Entries) -> None:
        for ngram, token in newer.items():
            self._enter(ngram, token)

    def _state(self) -> tuple[int, ...]:
        """What tells whether the file is still the one that was read; empty where there is none."""
        if not self._path.exists():
            return ()
        found = self._path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _stored(self) -> Entries:
        """The entries in the file."""
        if not self._path.exists():
            return OrderedDict()
        header = read_header(self._path, KIND, _body_bytes)
        check_fingerprint(self._path, KIND, header.fingerprint, self._vocabulary)
        with self._path.open("rb") as file:
            file.seek(HEADER_BYTES)
            data = file.read()
        if zlib.crc32(data) != header.checksum:
            raise DatastoreError(f"{self._path} is damaged: its checksum differs; {KIND.cure}")
        table = np.frombuffer(data, dtype="<u4").reshape(-1, header.sizes[1] + 1)
        fillers = (table[:, :-1] == FILLER).sum(axis=1)
        return OrderedDict(
            (tuple(row[filler:-1]), row[-1]) for row, filler in zip(table.tolist(), fillers.tolist(), strict=True)
        )

    def _write(self) -> None:
        """Put the entries into a new file in the old one's place."""
        widest = max(map(len, self._next))
        rows = [(FILLER,) * (widest - len(ngram)) + ngram + (token,) for ngram, token in self._next.items()]
        data = np.array(rows, dtype="<u4").tobytes()
        write_file(self._path, KIND, self._vocabulary, (len(rows), widest, 0, 0), lambda body: body.write(data))


def _body_bytes(sizes: tuple[int, int, int, int]) -> int:
    """The bytes after a header with these sizes."""
    entries, widest, _, _ = sizes
    return entries * (widest + 1) * 4
