"""Lookahead decoding: the model guesses a window of later tokens from its own guesses, and n-grams of these are drafts.

A window holds ``levels`` guesses for each of ``width`` columns, one token further on each. A Jacobi iteration
(``steps.lookahead``) finds what would follow each column; the column and what follows it are an n-gram, which joins the
request's pool, and the window moves on. Drafts are n-grams of the pool that begin with the request's last token. No
second model, no training; it pays where a device computes many rows in the time of one. (Source: Fu et al., arXiv
2402.02057. There one step runs the window and checks the drafts; here they are two programs, so that the one which
checks serves every drafter.)
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from llama.engine.drafting import Drafter, Drafts
from llama.engine.programs import lookahead_program
from llama.engine.runner import XlaRunner
from llama.engine.scheduler import window_of
from llama.engine.sequence import Sequence


@dataclass
class _Row:
    """A request's window and pool.

    Attributes:
        window: [levels, width] int32; token j of level l stands ``1 + l + j`` positions behind the last token.
        pool: by token, what followed it in n-grams, newest first.
        length: ids that the sequence had when the window was made.
    """

    window: np.ndarray
    pool: dict[int, deque[tuple[int, ...]]]
    length: int


class Lookahead(Drafter):
    """Drafts n-grams of the model's own guesses.

    Args:
        runner: the engine's, whose ``config.lookahead`` says the window's width and levels; an n-gram has a token more
            than there are levels.
        guesses: n-grams that the pool keeps for each first token, the newest ones.
    """

    def __init__(self, runner: XlaRunner, guesses: int) -> None:
        self._runner, self._most = runner, guesses
        self._width, self._levels = runner.config.lookahead
        self._rows: weakref.WeakKeyDictionary[Sequence, _Row] = weakref.WeakKeyDictionary()

    def propose(self, sequences: SequenceOf[Sequence], draft_len: int) -> Drafts:
        """See Drafter. One Jacobi iteration for all of them, then a chain of n-grams from each pool."""
        rows = [self._row(sequence) for sequence in sequences]
        slots = [s.slot for s in sequences if s.slot is not None]
        config = self._runner.config
        jacobi = np.zeros((config.max_batch_size, self._levels * self._width), dtype=np.int32)
        for slot, row in zip(slots, rows, strict=True):
            jacobi[slot] = row.window.reshape(-1)
        reach = max(s.start for s in sequences) + 1 + jacobi.shape[1]
        window = window_of(slots, reach, config, config.verify_widths, self._is_ready)
        following = self._runner.lookahead(window, jacobi)
        for slot, row in zip(slots, rows, strict=True):
            self._learn(row, following[slot - window.first])
        return Drafts.of(
            [self._chain(r, s.ids[-1], draft_len) for r, s in zip(rows, sequences, strict=True)], draft_len
        )

    def finished(self, sequence: Sequence) -> None:
        """See Drafter. Its window and pool are dropped."""
        self._rows.pop(sequence, None)

    def _is_ready(self, rows: int, key_len: int) -> bool:
        return self._runner.is_ready(lookahead_program(self._runner.config, rows, key_len))

    def _row(self, sequence: Sequence) -> _Row:
        """A sequence's window, moved on by the tokens that it has got: a level's move is worth one."""
        row = self._rows.get(sequence)
        if row is None:
            shape = (self._levels, self._width)
            row = self._rows[sequence] = _Row(self._filler(sequence, shape), {}, len(sequence.ids) - 1)
        surplus = min(max(len(sequence.ids) - row.length - 1, 0), self._width)
        if surplus:
            fresh = self._filler(sequence, (self._levels, surplus))
            row.window = np.concatenate((row.window[:, surplus:], fresh), axis=1)
        row.length = len(sequence.ids)
        return row

    @staticmethod
    def _filler(sequence: Sequence, shape: tuple[int, int]) -> np.ndarray:
        """Tokens of the sequence's own text, at random but the same each time: guesses to begin with."""
        chooser = random.Random(len(sequence.ids))
        count = shape[0] * shape[1]
        return np.array(chooser.choices(sequence.ids, k=count), dtype=np.int32).reshape(shape)

    def _learn(self, row: _Row, following: np.ndarray) -> None:
        """Take an iteration's n-grams into the pool, and let its tokens be the window's last level."""
        for column in range(self._width):
            ngram: list[int] = [*row.window[:, column].tolist(), int(following[column])]
            known, rest = row.pool.setdefault(ngram[0], deque(maxlen=self._most)), tuple(ngram[1:])
            if rest in known:
                known.remove(rest)
            known.appendleft(rest)
        row.window = np.concatenate((row.window[1:], following[None, :]), axis=0)

    @staticmethod
    def _chain(row: _Row, last: int, draft_len: int) -> list[int]:
        """The newest n-gram after the last token, then the newest one after its end, and so on."""
        guess: list[int] = []
        while len(guess) < draft_len and (known := row.pool.get(guess[-1] if guess else last)):
            guess += known[0]
        return guess[:draft_len]
