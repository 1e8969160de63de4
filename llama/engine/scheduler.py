"""Who runs when, and in which slot: queue, slots, token budget. Integers only; it holds no tensor.

A free slot goes to a waiting request, the lowest slot first, so that the live ones stay side by side: a decode step
runs slots [first, first + width) for the narrowest width that covers them. Requests are admitted in the order of their
arrival, or the shortest prompt first; one that has been passed over ``MOST_PASSED_OVER`` times goes before all others,
so none waits for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence as Sequences
from dataclasses import dataclass
from typing import NamedTuple

from llama.config import EngineConfig
from llama.engine import chunks
from llama.engine.sequence import Sequence, Status, common_prefix
from llama.errors import QueueFullError

MOST_PASSED_OVER = 16
MOVE_PAYS = 16  # steps for which a narrower width pays for moving a slot


class Window(NamedTuple):
    """The slots and positions of one decode step.

    Attributes:
        first: the first slot.
        rows: how many slots.
        key_len: leading cache positions that it reads.
    """

    first: int
    rows: int
    key_len: int


@dataclass
class Counts:
    """What the scheduler has seen.

    Attributes:
        requests: submitted in all.
        finished: of them, those that have ended.
        prompt_tokens: tokens of admitted prompts, those that were cached included.
        cached_tokens: of them, those that need not be run.
        generated_tokens: tokens that the host has read.
        chunk_positions: positions that prompt chunks filled.
        padding: of them, those without a token.
        decode_rows: rows that decode steps ran.
        idle_rows: of them, those without a live request.
    """

    requests: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    chunk_positions: int = 0
    padding: int = 0
    decode_rows: int = 0
    idle_rows: int = 0

    @property
    def padding_share(self) -> float:
        """The share of all rows and positions that ran without a token."""
        return (self.padding + self.idle_rows) / max(self.chunk_positions + self.decode_rows, 1)


class Scheduler:
    """The queue and the slots.

    Args:
        config: every rule.
        clock: seconds, for the collection of a batch.

    Attributes:
        waiting: sequences without a slot, in the order of their arrival.
        slots: the live sequence of each slot, or None.
        held: per slot, the ids whose keys and values it holds, where no live sequence is in it.
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.perf_counter) -> None:
        self._config, self._clock = config, clock
        self.waiting: list[Sequence] = []
        self.slots: list[Sequence | None] = [None] * config.max_batch_size
        self.held: list[list[int]] = [[] for _ in self.slots]
        self.counts = Counts()
        self._passed_over: dict[int, int] = {}  # by sequence id

    # --- the queue ----------------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Let a sequence wait for a slot.

        Raises:
            QueueFullError: ``max_waiting`` sequences wait already.
        """
        most = self._config.max_waiting
        if most and len(self.waiting) >= most:
            raise QueueFullError(f"{len(self.waiting)} requests wait already, max_waiting is {most}; try again later")
        self.waiting.append(sequence)
        self.counts.requests += 1

    def next_waiting(self) -> Sequence | None:
        """The sequence that gets the next free slot now; None where none waits, no slot is free, or it has to wait."""
        if not self.waiting or None not in self.slots or self._collects():
            return None
        overdue = (s for s in self.waiting if self._passed_over.get(s.id, 0) >= MOST_PASSED_OVER)
        chosen = next(overdue, None)
        if chosen is None:
            by_length = self._config.schedule == "shortest"
            chosen = min(self.waiting, key=lambda s: len(s.prompt_ids)) if by_length else self.waiting[0]
        leader = chosen.leader
        if leader is not None and leader.status is Status.WAITING:
            return leader  # it runs their prompt, whatever the rule is
        if leader is not None and leader.is_live and leader.start < len(leader.prompt_ids) - 1:
            return None  # its prompt is on its way; those after it wait with it
        return chosen

    def _collects(self) -> bool:
        """Whether the first requests wait for others to start with."""
        config = self._config
        if not config.collect_s or any(self.slots) or len(self.waiting) >= len(self.slots):
            return False
        tokens = sum(len(s.prompt_ids) for s in self.waiting)
        first = min(s.submitted if s.submitted is not None else 0.0 for s in self.waiting)
        is_late = self._clock() - first >= config.collect_s
        return not is_late and not (config.collect_tokens and tokens >= config.collect_tokens)

    def admit(self, sequence: Sequence, slot: int, cached: int) -> None:
        """Give a waiting sequence a slot, in which its first ``cached`` positions are held, and plan its prompt."""
        self.waiting.remove(sequence)
        for other in self.waiting:
            if other.id < sequence.id:
                self._passed_over[other.id] = self._passed_over.get(other.id, 0) + 1
        self._passed_over.pop(sequence.id, None)
        scored = sequence.params.prompt_logprobs
        prompt_len = len(sequence.prompt_ids)
        sequence.chunks, sequence.ready = chunks.prefill(prompt_len, self._config, cached, scored=scored)
        sequence.slot, sequence.start, sequence.cached = slot, cached, cached
        sequence.status = Status.PREFILLING if sequence.chunks else Status.RUNNING
        sequence.admitted = self._clock()
        self.slots[slot], self.held[slot] = sequence, []
        self.counts.prompt_tokens += prompt_len
        self.counts.cached_tokens += cached

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue."""
        self.waiting.remove(sequence)
        self._passed_over.pop(sequence.id, None)

    # --- the slots ----------------------------------------------------------------------------------------------------

    def best_source(self, sequence: Sequence) -> tuple[int, int | None]:
        """How many leading positions of a prompt some slot holds, and which; (0, None) where it may not use any.

        At least one token of the prompt is left to run: its hidden state is needed.
        """
        shares = sequence.leader is not None or sequence.reuse
        if not shares or sequence.params.prompt_logprobs:
            return 0, None
        found = [(common_prefix(self.ids_in(slot), sequence.prompt_ids), slot) for slot in range(len(self.slots))]
        # of equal ones a slot that is free, in which the request itself can go on
        count, slot = max(found, key=lambda pair: (pair[0], self.slots[pair[1]] is None, -pair[1]))
        count = min(count, len(sequence.prompt_ids) - 1)
        if self._config.batch_invariant:  # bits must be those of a cold start: go on where one of its own chunks begins
            plan, _ = chunks.prefill(len(sequence.prompt_ids), self._config)
            count = max((c.start for c in plan if c.start <= count), default=0)
        return (count, slot) if count else (0, None)

    def ids_in(self, slot: int) -> list[int]:
        """The ids whose keys and values a slot holds."""
        sequence = self.slots[slot]
        return self.held[slot] if sequence is None else sequence.held_ids

    def free_slot(self, source: int | None = None) -> int:
        """The slot for the next request: ``source`` if it is free, else the lowest free one."""
        if source is not None and self.slots[source] is None:
            return source
        return self.slots.index(None)

    def release(self, sequence: Sequence) -> None:
        """Take a live sequence out of its slot; what the slot holds stays known."""
        assert sequence.slot is not None
        assert self.slots[sequence.slot] is sequence
        self.slots[sequence.slot] = None

    def keep(self, sequence: Sequence) -> None:
        """Remember what the slot of a sequence that has ended holds, unless another one has taken it."""
        slot = sequence.slot
        if slot is not None and self.slots[slot] is None:
            self.held[slot] = sequence.held_ids

    def move(self, sequence: Sequence, target: int) -> None:
        """Give a live sequence another, free slot."""
        self.release(sequence)
        assert sequence.slot is not None
        self.held[sequence.slot] = []
        sequence.slot, self.slots[target], self.held[target] = target, sequence, []

    # --- rounds -------------------------------------------------------------------------------------------------------

    @property
    def live(self) -> list[Sequence]:
        """The sequences in slots, by slot."""
        return [s for s in self.slots if s is not None]

    @property
    def running(self) -> list[Sequence]:
        """The sequences that a decode step runs."""
        return [s for s in self.live if s.status is Status.RUNNING]

    def next_prefilling(self) -> Sequence | None:
        """The sequence whose next chunk runs first: the one that was admitted first."""
        prefilling = [s for s in self.live if s.status is Status.PREFILLING]
        return min(prefilling, key=lambda s: (s.admitted, s.id), default=None)

    def window(self, is_ready: Callable[[int, int], bool], widths: Sequences[int], length: int = 1) -> Window:
        """The slots and positions of the next step of all running sequences; there is one.

        Args:
            is_ready: whether the program of (rows, key_len) is compiled. The narrowest compiled one that covers the
                running slots is taken, or the narrowest of all where none is.
            widths: rows that there are programs for, ascending.
            length: tokens of each sequence that the step runs.
        """
        slots = [s.slot for s in self.running if s.slot is not None]
        return window_of(slots, max(s.start for s in self.running) + length, self._config, widths, is_ready)

    def moves(self, is_ready: Callable[[int, int], bool]) -> list[tuple[Sequence, int]]:
        """Sequences to move, with their new slots, so that the next steps are narrower; none where that does not pay.

        It pays while nobody waits for a slot and those that move run for some more steps.

        Args:
            is_ready: whether what steps of so many rows, up to a position, need is compiled.
        """
        config, live = self._config, self.live
        if config.batch_invariant or self.waiting or not live or any(s.status is Status.PREFILLING for s in live):
            return []
        slots = [s.slot for s in live if s.slot is not None]
        span = max(slots) + 1 - min(slots)
        now = next(w for w in config.widths if w >= span)
        narrow = next(w for w in config.widths if w >= len(live))
        if narrow >= now or not is_ready(narrow, max(s.start for s in live) + 1):
            return []
        # the window of that width that holds the most of them
        first = max(range(config.max_batch_size - narrow + 1), key=lambda f: sum(f <= s < f + narrow for s in slots))
        outside = [s for s in live if not first <= (s.slot or 0) < first + narrow]
        if any(s.limit - s.length < MOVE_PAYS for s in outside):
            return []
        free = (slot for slot in range(first, first + narrow) if self.slots[slot] is None)
        return list(zip(outside, free, strict=False))

    def stats(self) -> dict[str, float]:
        """Counters for logs and metrics: requests running and waiting, shares in use, tokens in all."""
        live = self.live
        counts = self.counts
        return {
            "running": len(live),
            "waiting": len(self.waiting),
            "slot_share": len(live) / len(self.slots),
            "cache_share": sum(s.start for s in live) / (len(self.slots) * self._config.max_seq_len),
            "padding_share": counts.padding_share,
            "requests": counts.requests,
            "finished": counts.finished,
            "prompt_tokens": counts.prompt_tokens,
            "cached_tokens": counts.cached_tokens,
            "generated_tokens": counts.generated_tokens,
        }


def window_of(
    slots: Sequences[int],
    reach: int,
    config: EngineConfig,
    widths: Sequences[int],
    is_ready: Callable[[int, int], bool],
) -> Window:
    """The narrowest window that covers some slots and the first ``reach`` positions; see ``Scheduler.window``."""
    if config.batch_invariant:
        return Window(0, config.max_batch_size, config.max_seq_len)
    key_len = chunks.key_bucket(min(reach, config.max_seq_len), config)
    lowest, end = min(slots), max(slots) + 1
    covering = [
        Window(min(lowest, config.max_batch_size - rows), rows, key_len)
        for rows in widths
        if min(lowest, config.max_batch_size - rows) + rows >= end
    ]
    return next((w for w in covering if is_ready(w.rows, w.key_len)), covering[0])
