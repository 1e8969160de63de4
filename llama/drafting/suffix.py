"""Suffix decoding: the longest end of the history that occurred before, in this text or in earlier outputs, goes on.

Where prompt lookup compares a few tokens, this drafter knows the whole match: of several places where the last three
tokens stood, it follows the one that shares the most before them, and how long the match is says how far to trust it.
(Source: SAM decoding, Hu et al., arXiv 2411.10666; suffix decoding, Oliaro et al., arXiv 2411.04975.)
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence as SequenceOf

from llama.config import DEFAULT_CORPUS_TOKENS
from llama.drafting.history import continuation
from llama.drafting.suffix_automaton import Cursor, SuffixAutomaton
from llama.engine.drafting import Drafter, Drafts
from llama.engine.sequence import Sequence
from llama.errors import ConfigError

SEPARATOR = -1  # between two documents of a corpus; no token has this id
FIRST_LOOK = 64  # tokens of a history that a corpus is shown when they meet


class Suffix(Drafter):
    """Continues the longest suffix of the history that occurred before.

    Args:
        min_match: tokens that must match for a guess.
        draft_per_match: guess at most so many tokens for each token that matches. A short match is often a chance
            one, and what a step computes for it is lost.
        corpus_tokens: the most tokens of ended sequences' outputs that are kept for later ones; 0 keeps none. They
            are two halves, and when the younger one is full the older one is dropped: nothing is ever built again.
            Prompts are not kept: the answer to one belongs to it, and its last words often end other prompts, too.

    Raises:
        ConfigError: a number is out of its range.
    """

    def __init__(
        self, min_match: int = 1, draft_per_match: float = 16.0, corpus_tokens: int = DEFAULT_CORPUS_TOKENS
    ) -> None:
        if min_match < 1:
            raise ConfigError(f"min_match: got {min_match}, expected at least 1")
        if not 0 < draft_per_match < math.inf:
            raise ConfigError(f"draft_per_match: got {draft_per_match}, expected a number above 0")
        if corpus_tokens < 0:
            raise ConfigError(f"corpus_tokens: got {corpus_tokens}, expected 0 or more")
        self._min_match = min_match
        self._draft_per_match = draft_per_match
        self._half = corpus_tokens // 2
        self._corpora = [_Corpus(), _Corpus()]  # the older half, and the younger one, which grows
        self._rows: weakref.WeakKeyDictionary[Sequence, _Row] = weakref.WeakKeyDictionary()

    def propose(self, sequences: SequenceOf[Sequence], draft_len: int) -> Drafts:
        """See Drafter."""
        return Drafts.of([self._guess(sequence, draft_len) for sequence in sequences], draft_len)

    def finished(self, sequence: Sequence) -> None:
        """See Drafter. Its index is dropped, and its output enters the corpus."""
        self._rows.pop(sequence, None)
        output = sequence.ids[len(sequence.prompt_ids) :]
        if self._half and output:
            self._remember(output)

    def _remember(self, document: SequenceOf[int]) -> None:
        """Append a document to the younger half of the corpus; if it does not fit, the older half is dropped."""
        document = document[max(len(document) - self._half + 1, 0) :]
        if len(self._corpora[1].ids) + len(document) + 1 > self._half:
            self._corpora = [self._corpora[1], _Corpus()]
        self._corpora[1].add(document)

    def _guess(self, sequence: Sequence, draft_len: int) -> list[int]:
        row = self._rows.get(sequence)
        if row is None:
            row = self._rows[sequence] = _Row()
        row.follow(sequence.ids, self._corpora if self._half else [])
        match_len, guess = row.longest(sequence.ids, draft_len)
        return [] if match_len < self._min_match else guess[: math.ceil(self._draft_per_match * match_len)]


class _Corpus:
    """Outputs of ended sequences, one after the other, and their substrings."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.automaton = SuffixAutomaton()

    def add(self, document: SequenceOf[int]) -> None:
        """Append a document."""
        for token in (*document, SEPARATOR):
            self.ids.append(token)
            self.automaton.extend(token)

    def after(self, end: int, count: int) -> list[int]:
        """Up to ``count`` tokens from a position on, as far as its document goes."""
        found = self.ids[end : end + count]
        return found[: found.index(SEPARATOR)] if SEPARATOR in found else found


class _Row:
    """One history: its own substrings, and its longest suffix in each corpus."""

    def __init__(self) -> None:
        self._automaton = SuffixAutomaton()
        self._cursors: list[tuple[_Corpus, Cursor]] = []

    def follow(self, ids: SequenceOf[int], corpora: SequenceOf[_Corpus]) -> None:
        """Take the tokens that are new; a corpus that is new meets the last few tokens of the history."""
        new = ids[self._automaton.size :]
        for token in new:
            self._automaton.extend(token)
        known = dict(self._cursors)
        self._cursors = [(corpus, known.get(corpus) or Cursor(corpus.automaton)) for corpus in corpora]
        for corpus, cursor in self._cursors:
            for token in new if corpus in known else ids[-FIRST_LOOK:]:
                cursor.advance(token)

    def longest(self, ids: SequenceOf[int], draft_len: int) -> tuple[int, list[int]]:
        """The longest match of the history's end, and what came after it; of equally long ones the history's own."""
        found = self._automaton.match_len, continuation(ids, self._automaton.match_end, draft_len)
        for corpus, cursor in self._cursors:
            if cursor.match_len > found[0]:
                guess = corpus.after(cursor.match_end, draft_len)
                found = (cursor.match_len, guess) if guess else found
        return found
