"""Several drafters, tried in order: a request is guessed by the first that has a guess for it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np

from llama.engine.drafting import Drafter, Drafts
from llama.engine.sequence import Sequence
from llama.errors import ConfigError


class _Asked(NamedTuple):
    """What one drafter was asked in the last proposal, and answered.

    Attributes:
        rows: [n] which of the proposal's sequences it was shown.
        has_guess: [n] bool, for which of them it had a guess.
    """

    drafter: Drafter
    rows: np.ndarray
    has_guess: np.ndarray


class Chain(Drafter):
    """Tries several drafters in order, for each sequence until one has a guess.

    A drafter is shown the sequences for which those before it had none, so it must learn from a sequence's ids what it
    missed.

    Args:
        drafters: at least one, the best first.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, drafters: SequenceOf[Drafter]) -> None:
        if not drafters:
            raise ConfigError("drafters: got none, expected at least one")
        self._drafters = tuple(drafters)
        self._asked: list[_Asked] = []

    def propose(self, sequences: SequenceOf[Sequence], draft_len: int) -> Drafts:
        """See Drafter."""
        found = Drafts.of([()] * len(sequences), draft_len)
        waiting = np.arange(len(sequences))
        self._asked = []
        for drafter in self._drafters:
            if not waiting.size:
                break
            tokens, counts = drafter.propose([sequences[row] for row in waiting.tolist()], draft_len)
            found.tokens[waiting], found.counts[waiting] = tokens, counts
            self._asked.append(_Asked(drafter, waiting, counts > 0))
            waiting = waiting[counts == 0]
        return found

    @property
    def stop_compiling(self) -> bool:
        """See Drafter."""
        return any(drafter.stop_compiling for drafter in self._drafters)

    @stop_compiling.setter
    def stop_compiling(self, stop: bool) -> None:
        for drafter in self._drafters:
            drafter.stop_compiling = stop

    def prepare(self, sequences: SequenceOf[Sequence] | None) -> None:
        """See Drafter."""
        for drafter in self._drafters:
            drafter.prepare(sequences)

    def accepted(self, counts: np.ndarray) -> None:
        """See Drafter. Each drafter learns of the sequences that it was shown: 0 where it had no guess."""
        for drafter, rows, has_guess in self._asked:
            drafter.accepted(counts[rows] * has_guess)

    def finished(self, sequence: Sequence) -> None:
        """See Drafter."""
        for drafter in self._drafters:
            drafter.finished(sequence)

    def close(self) -> None:
        """See Drafter. All are closed, also after one that fails."""
        with contextlib.ExitStack() as stack:
            for drafter in reversed(self._drafters):
                stack.callback(drafter.close)
