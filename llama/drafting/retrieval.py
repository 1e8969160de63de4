"""Retrieval: what followed the end of the history in earlier answers, or in a datastore of texts.

(Source: REST, He et al., arXiv 2311.08252, which drafts from a datastore alone.)
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from llama.drafting.datastore import Datastore
from llama.drafting.word_bank import WordBank
from llama.engine.drafting import Drafter, Drafts
from llama.engine.sequence import Sequence
from llama.errors import ConfigError


class Retrieval(Drafter):
    """Drafts from a word bank and a datastore; the longer match wins.

    The bank is asked first, because it has what this model said. A match of its longest n-gram may be longer in truth,
    so it wins at once, and of equally long matches the bank's does.

    Args:
        datastore: closed by ``close``.
        bank: learns every answer; saved by ``close``.
        max_match: the most tokens of the history that are compared with the datastore.
        min_match: the fewest that must match there.
        most_matches: the most places of the datastore that are compared for a guess.

    Raises:
        ConfigError: there is neither datastore nor bank, or a number is out of its range.
    """

    def __init__(
        self,
        datastore: Datastore | None = None,
        bank: WordBank | None = None,
        *,
        max_match: int = 16,
        min_match: int = 2,
        most_matches: int = 16,
    ) -> None:
        if datastore is None and bank is None:
            raise ConfigError("datastore: got neither a datastore nor a word bank, expected at least one")
        if not 1 <= min_match <= max_match:
            raise ConfigError(f"min_match: got {min_match}, expected 1 to max_match={max_match}")
        if most_matches < 1:
            raise ConfigError(f"most_matches: got {most_matches}, expected at least 1")
        self._datastore, self._bank = datastore, bank
        self._max_match, self._min_match, self._most_matches = max_match, min_match, most_matches

    def propose(self, sequences: SequenceOf[Sequence], draft_len: int) -> Drafts:
        """See Drafter."""
        return Drafts.of([self._guess(sequence.ids, draft_len) for sequence in sequences], draft_len)

    def finished(self, sequence: Sequence) -> None:
        """See Drafter. The bank learns the answer."""
        if self._bank is not None:
            self._bank.finished(sequence)

    def close(self) -> None:
        """See Drafter. The bank is saved."""
        if self._datastore is not None:
            self._datastore.close()
        if self._bank is not None:
            self._bank.close()

    def _guess(self, ids: SequenceOf[int], draft_len: int) -> list[int]:
        banked: tuple[int, list[int]] = (0, [])
        if self._bank is not None:
            banked = self._bank.guess(ids, draft_len)
            if banked[0] == self._bank.max_ngram:
                return banked[1]
        if self._datastore is None:
            return banked[1]
        shortest = max(self._min_match, banked[0] + 1)  # shorter matches would lose
        stored = self._datastore.guess(ids, self._max_match, shortest, draft_len, self._most_matches)
        return stored[1] or banked[1]
