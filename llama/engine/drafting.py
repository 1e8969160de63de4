"""What a drafter is: it guesses the next tokens of requests, and the model checks several guesses in one step.

A guess never changes a text. Every token of a verify step is chosen by the same head and from the same noise of (seed,
position) as a decode step's, and a draft counts while it equals the token that was chosen (``steps.verify``); so a
wrong guess costs time and nothing else. (Source: sample-and-compare with common noise, Daliri, Musco and Suresh, arXiv
2408.07978. For a drafter that is certain of its guess d it accepts with probability p(d), which no lossless rule
beats.)

A drafter holds what it needs by sequence, in a ``weakref.WeakKeyDictionary``, and so forgets those that nobody has any
more. It is called by the one thread that runs the engine, between two steps, when every token that the device has is in
``Sequence.ids``.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence as Sequences
from typing import NamedTuple

import numpy as np

from llama.config import EngineConfig
from llama.engine.pace import AdaptivePace, Offer, Pace
from llama.engine.sequence import Draft, DraftCounts, Sequence, common_prefix

log = logging.getLogger("llama")


class Drafts(NamedTuple):
    """Guesses for B sequences.

    Attributes:
        tokens: [B, K] int32, the tokens that may follow ``Sequence.ids``, in order; what stands behind ``counts`` is
            read by nobody.
        counts: [B] int32, how many of them are guesses; 0 where there is none.
    """

    tokens: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, guesses: Sequences[Sequences[int]], draft_len: int) -> Drafts:
        """Lists of different lengths as arrays; what is longer than ``draft_len`` is cut."""
        tokens = np.zeros((len(guesses), draft_len), dtype=np.int32)
        counts = np.zeros(len(guesses), dtype=np.int32)
        for row, guess in enumerate(guesses):
            counts[row] = min(len(guess), draft_len)
            tokens[row, : counts[row]] = guess[: counts[row]]
        return cls(tokens, counts)


class Drafter(ABC):
    """Guesses the next tokens of requests. Only ``propose`` is needed.

    Attributes:
        stop_compiling: set it from a signal handler to end a compilation before its next program.
    """

    stop_compiling: bool = False

    @abstractmethod
    def propose(self, sequences: Sequences[Sequence], draft_len: int) -> Drafts:
        """Guess what follows.

        Args:
            sequences: B live sequences; their last token has not been run yet.
            draft_len: K, the most guesses for each.
        """

    def prepare(self, sequences: Sequences[Sequence] | None) -> None:  # noqa: B027
        """Compile what proposals for these sequences need, or for any: after that a proposal compiles nothing.

        Raises:
            RecompileError, InterruptedRunError: as ``Runner.compile``.
        """

    def accepted(self, counts: np.ndarray) -> None:  # noqa: B027
        """Learn how many of the last proposal's guesses came true: [B] int32, in the order of its sequences."""

    def finished(self, sequence: Sequence) -> None:  # noqa: B027
        """Learn that a sequence has ended, however it ended; its ids are complete."""

    def close(self) -> None:  # noqa: B027
        """Keep what is to be kept, for instance in a file. Called once, at the end."""


class Plan(NamedTuple):
    """What the next step is to check.

    Attributes:
        drafts: one for each sequence that gets a token; some may be empty.
        draft_len: how many drafts of each the step can check; 0 for a decode step.
    """

    drafts: list[Draft]
    draft_len: int


class Drafting:
    """The engine's use of a drafter: when it is asked, what of its guesses is checked, and what comes of them.

    Args:
        drafter: guesses.
        pace: says how many guesses a step checks.
        vocab_size: rows of the embedding.
    """

    def __init__(self, drafter: Drafter, pace: Pace, vocab_size: int) -> None:
        self.drafter, self.pace = drafter, pace
        self.counts = DraftCounts()
        self._vocab_size = vocab_size
        self._wait = 0
        self._asked: list[tuple[Draft, int]] = []  # the last proposal, with the ids that each sequence had then
        self._spent, self._steps = 0.0, 0

    @classmethod
    def of(cls, drafter: Drafter, config: EngineConfig, vocab_size: int, *, adaptive: bool = False) -> Drafting:
        """A drafter at the pace that suits the engine.

        Args:
            adaptive: check guesses where that pays only. Under ``batch_invariant`` every step is one that checks, so
                that a text does not depend on what was drafted, to the last bit.
        """
        if adaptive and not config.batch_invariant:
            return cls(drafter, AdaptivePace(config.draft_lens, config.read_every), vocab_size)
        return cls(drafter, Pace(config.draft_lens, always=config.batch_invariant), vocab_size)

    @property
    def is_due(self) -> bool:
        """Whether the drafter is asked before the next step, so that all tokens have to be read by then."""
        return self._wait <= 0

    @property
    def waits_for_one_step(self) -> bool:
        """Whether the drafter is asked after the next decode step, whose tokens have to be read at once."""
        return self._wait <= 1

    def plan(self, sequences: Sequences[Sequence], rows: int) -> Plan:
        """Ask the drafter.

        Args:
            sequences: get a token in the next step; those whose last known token is still to be run are asked for.
            rows: that a step with drafts would run.
        """
        began = time.perf_counter()
        self._close(rows)
        asked = [s for s in sequences if s.start + 1 == s.length]
        proposal = self.drafter.propose(asked, self.pace.longest) if asked else Drafts.of((), self.pace.longest)
        guesses = {s: row[:count].tolist() for s, row, count in zip(asked, *proposal, strict=True)}
        drafts = [s.draft(guesses.get(s, ()), self._vocab_size) for s in sequences]
        self._asked = [(draft, len(draft.sequence.ids)) for draft in drafts if draft.sequence in guesses]
        self.pace.asked(time.perf_counter() - began)
        draft_len = self.pace.choose([Offer(d.sequence, len(d.token_ids)) for d in drafts], rows)
        if draft_len:
            drafts = [d._replace(token_ids=d.token_ids[:draft_len], masks=d.masks[:draft_len]) for d in drafts]
        self._wait = 0 if draft_len else self.pace.wait
        return Plan(drafts, draft_len)

    def _close(self, rows: int) -> None:
        """Tell the drafter and the pace what came of the last proposal."""
        if self._steps:
            self.pace.took(0, rows, self._spent / self._steps)
            self._spent, self._steps = 0.0, 0
        if not self._asked:
            return
        accepted = []
        for draft, known in self._asked:
            right = common_prefix(draft.token_ids, draft.sequence.ids[known : known + len(draft.token_ids)])
            came = len(draft.sequence.ids) - known
            compared = min(len(draft.token_ids), came)
            if compared:
                self.pace.learn(Offer(draft.sequence, compared), right)
            accepted.append(right)
        self.drafter.accepted(np.array(accepted, dtype=np.int32))
        self._asked = []

    def stepped(self, seconds: float) -> None:
        """Take notice of a decode step."""
        self._wait -= 1
        self._spent += seconds
        self._steps += 1

    def checked(self, plan: Plan, known: Sequences[int], rows: int, seconds: float) -> None:
        """Take notice of a step with drafts, whose tokens have been read.

        Args:
            known: how many ids each sequence had before.
        """
        self.pace.took(plan.draft_len, rows, seconds)
        for draft, before in zip(plan.drafts, known, strict=True):
            new = draft.sequence.ids[before : before + len(draft.token_ids)]
            accepted = common_prefix(draft.token_ids, new)
            draft.sequence.drafting.add(len(draft.token_ids), accepted)
            self.counts.add(len(draft.token_ids), accepted)

    def finished(self, sequence: Sequence) -> None:
        """Tell the drafter that a sequence has ended. If that fails, the log has the error, and nothing else ends."""
        try:
            self.drafter.finished(sequence)
        except Exception:
            log.exception("the drafter failed when it was told that a request had ended")

    def reset(self) -> None:
        """Forget the last proposal, after an error."""
        self._asked, self._wait, self._spent, self._steps = [], 0, 0.0, 0
