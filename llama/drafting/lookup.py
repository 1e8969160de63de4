"""Prompt lookup: the last few tokens stood somewhere before, and what followed then may follow now.

The longest n-gram at the history's end that occurred before is continued as it was then. (Source: Saxena's prompt
lookup decoding; transformers and vLLM have it, too. They search the whole history at every step; this one keeps an
index, so a proposal takes the same time after 50 tokens and after 50,000.)
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence as SequenceOf
from typing import Literal, get_args

from llama.drafting.history import continuation
from llama.engine.drafting import Drafter, Drafts
from llama.engine.sequence import Sequence
from llama.errors import ConfigError

Order = Literal["newest", "first"]


class Lookup(Drafter):
    """Continues the longest n-gram that occurred before in the same history, prompt and output.

    Args:
        max_ngram: the longest n-gram that is looked up. Three tokens tell most places of a text apart; longer ones
            cost a dictionary each, and finding the longest of all is what ``Suffix`` is for.
        min_ngram: the shortest one. A single token finds a place nearly always and often a wrong one. That pays where
            a step that checks several tokens costs little more than another; 2 drafts more rarely and better.
        order: which earlier occurrence is continued: the ``first`` one, as in transformers, or the ``newest``. A copy
            comes by its source's places in order, so of those that look alike the first is right at least once. The
            newest one is better where a text that was changed before is written once more.
        draft_per_match: guess at most so many tokens for each token of the n-gram that was found.

    Raises:
        ConfigError: ``min_ngram`` is below 1 or above ``max_ngram``, or there is no such order.
    """

    def __init__(
        self, max_ngram: int = 3, min_ngram: int = 1, order: Order = "first", draft_per_match: float = math.inf
    ) -> None:
        if min_ngram < 1:
            raise ConfigError(f"min_ngram: got {min_ngram}, expected at least 1")
        if max_ngram < min_ngram:
            raise ConfigError(f"max_ngram: got {max_ngram}, expected at least min_ngram={min_ngram}")
        if order not in get_args(Order):
            raise ConfigError(f"order: got {order!r}, expected one of {', '.join(get_args(Order))}")
        self._sizes = tuple(range(max_ngram, min_ngram - 1, -1))
        self._order, self._draft_per_match = order, draft_per_match
        self._indices: weakref.WeakKeyDictionary[Sequence, _Index] = weakref.WeakKeyDictionary()

    def propose(self, sequences: SequenceOf[Sequence], draft_len: int) -> Drafts:
        """See Drafter. Unless ``draft_per_match`` cuts it, a guess is ``draft_len`` long."""
        return Drafts.of([self._guess(sequence, draft_len) for sequence in sequences], draft_len)

    def finished(self, sequence: Sequence) -> None:
        """See Drafter. Its index is dropped."""
        self._indices.pop(sequence, None)

    def _guess(self, sequence: Sequence, draft_len: int) -> list[int]:
        index = self._indices.get(sequence)
        if index is None:
            index = self._indices[sequence] = _Index(self._sizes, self._order)
        index.extend(sequence.ids)
        start, match_len = index.find(sequence.ids)
        count = math.ceil(min(self._draft_per_match * match_len, draft_len)) if match_len else 0
        return continuation(sequence.ids, start, count)


class _Index:
    """Where each n-gram of a growing text was followed by something.

    An n-gram is entered when its next token is known, so the text's end never finds itself.

    Args:
        sizes: tokens of an n-gram, longest first.
        order: which of several places is kept.
    """

    def __init__(self, sizes: tuple[int, ...], order: Order) -> None:
        self._follows: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in sizes}
        self._order = order
        self._entered = 0  # n-grams that end before this position are in the index

    def extend(self, ids: SequenceOf[int]) -> None:
        """Enter what is new: a text that has the earlier one as its beginning."""
        end = max(len(ids) - 1, 0)
        for size, follows in self._follows.items():
            first = max(self._entered - size + 1, 0)  # where the first new n-gram begins
            ngrams = zip(*(ids[first + i : end] for i in range(size)), strict=False)  # the shortest slice ends it
            if self._order == "newest":
                follows.update(zip(ngrams, range(first + size, end + 1), strict=False))
            else:
                for place, ngram in enumerate(ngrams, start=first + size):
                    follows.setdefault(ngram, place)
        self._entered = end

    def find(self, ids: SequenceOf[int]) -> tuple[int, int]:
        """Where the text's last n-gram, the longest known, stood before: the position after it, and its size; or 0s."""
        for size, follows in self._follows.items():
            start = follows.get(tuple(ids[-size:]))
            if start is not None:
                return start, size
        return 0, 0
