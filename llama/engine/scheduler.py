"""Who runs when, and in which slot: queue, slots, token budget. Integers only; it holds no tensor.

A free slot goes to a waiting request, such that the live ones stay side by side: a decode step runs slots [first, first
+ width) for the narrowest width that covers them. Requests are admitted in the order of their
arrival, or the shortest prompt first; one that has been passed over ``MOST_PASSED_OVER`` times goes before all others,
so none waits for ever.

On a mesh whose groups divide the slots among them (``EngineConfig.data_parallel``), row r is in group ``r % M``:
windows begin and end at multiples of M, and nothing is copied from one group to another.

What rows of the cache hold stays known after a request has ended (``prefixes.py``), so that the next one with the same
beginning goes on there, or gets a copy. A request whose beginning is just being computed waits for it.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence as Sequences
from dataclasses import dataclass
from typing import NamedTuple

from llama.config import EngineConfig
from llama.engine import chunks
from llama.engine.chunks import Chunk
from llama.engine.prefixes import Prefixes, key_of, shared_with_others
from llama.engine.sequence import Sequence, Status
from llama.errors import QueueFullError

MOST_PASSED_OVER = 16
MOVE_PAYS = 16  # steps for which a narrower width pays for moving a slot
LOOK_AHEAD = 8  # waiting requests that are looked at for one that need not wait for a prefix
# prompt tokens that a prefix must save: to be waited for, to be copied, and to be kept when its row is needed
WAIT_PAYS = 8
COPY_PAYS = 16
KEEP_PAYS = 32


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


class Placement(NamedTuple):
    """Where a request is put.

    Attributes:
        slot: a free one.
        cached: leading positions that it need not run.
        source: the row that holds them; None where there are none.
        keep_in: the kept row to which what the slot holds is copied first; None where it is not kept.
    """

    slot: int
    cached: int = 0
    source: int | None = None
    keep_in: int | None = None


@dataclass
class Counts:
    """What the scheduler has seen.

    Attributes:
        requests: submitted in all.
        finished: of them, those that have ended.
        prompt_tokens: tokens of admitted prompts, those that were cached included.
        cached_tokens: of them, those that need not be run.
        prefix_queries: tokens of prompts that were looked up in the prefix cache.
        prefix_hits: of them, those that were found.
        evictions: prefixes that were overwritten and are in no other row.
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
    prefix_queries: int = 0
    prefix_hits: int = 0
    evictions: int = 0
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
        kept_rows: rows of the cache behind the slots, which keep prefixes.

    Attributes:
        waiting: sequences without a slot, in the order of their arrival.
        slots: the live sequence of each slot, or None.
        prefixes: what each row of the cache holds: slots first, then kept rows. Of a live sequence the prompt, of which
            ``start`` positions have been run.
    """

    def __init__(
        self, config: EngineConfig, clock: Callable[[], float] = time.perf_counter, kept_rows: int = 0
    ) -> None:
        self._config, self._clock = config, clock
        self.waiting: list[Sequence] = []
        self.slots: list[Sequence | None] = [None] * config.max_batch_size
        self._kept = range(len(self.slots), len(self.slots) + kept_rows)
        self.prefixes = Prefixes()
        self._last: list[int | None] = [None] * config.max_batch_size  # the id of who was in a slot last
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

    def next_admission(self) -> tuple[Sequence, Placement] | None:
        """The sequence that gets a slot now, and where; None where no slot is free or nobody can run yet.

        Of those that need not wait for a prefix the first one, or one soon after it for which nothing has to be
        overwritten that others wait to go on from.
        """
        if not self.waiting or None not in self.slots or self._collects():
            return None
        wishes: list[tuple[Sequence, int, int]] | None = None
        first: tuple[Sequence, Placement] | None = None
        for candidate in self._candidates():
            leader = candidate.leader
            # whatever the rule is, the leader runs their prompt
            sequence = leader if leader is not None and leader.status is Status.WAITING else candidate
            if self._waits_for_prefix(sequence):
                continue
            cached, source = self.best_source(sequence)
            if source is not None and self._is_continued(source, cached):
                return sequence, Placement(source, cached, source)
            wishes = self._wishes() if wishes is None else wishes
            wanted = {row: length for other, row, length in reversed(wishes) if other is not sequence}
            placement = self.place(cached, source, wanted)
            kept = placement.cached if placement.source == placement.slot else 0
            first = first or (sequence, placement)
            if wanted.get(placement.slot, 0) < kept + COPY_PAYS:
                return sequence, placement
            if self._passed_over.get(candidate.id, 0) >= MOST_PASSED_OVER:
                break
        return first

    def _is_continued(self, source: int, cached: int) -> bool:
        """Whether a request goes on where a free slot ends, so that nothing of it is lost."""
        is_free = source < len(self.slots) and self.slots[source] is None
        return is_free and self.prefixes.held[source].length < cached + COPY_PAYS

    def _wishes(self) -> list[tuple[Sequence, int, int]]:
        """The next waiting sequences whose beginnings rows hold: the row, and how many leading positions."""
        found = []
        for sequence in itertools.islice(self.waiting, LOOK_AHEAD):
            row, length = next(self.prefixes.matches(sequence.prompt_key, self._salt(sequence)), (None, 0))
            length = min(length, sequence.most_cached)
            if row is not None and length >= WAIT_PAYS:
                found.append((sequence, row, length))
        return sorted(found, key=lambda wish: -wish[2])

    def _candidates(self) -> Iterator[Sequence]:
        """The first waiting sequences, in the order in which they should run."""
        overdue = {number for number, times in self._passed_over.items() if times >= MOST_PASSED_OVER}
        yield from itertools.islice((s for s in self.waiting if s.id in overdue), LOOK_AHEAD if overdue else 0)
        others = (s for s in self.waiting if s.id not in overdue) if overdue else self.waiting
        if self._config.schedule == "shortest":
            yield from heapq.nsmallest(LOOK_AHEAD, others, key=lambda s: len(s.prompt_ids))
        else:
            yield from itertools.islice(others, LOOK_AHEAD)

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether much of a prompt is just being computed in some slot.

        Chunks run one after the other, so nothing is lost by waiting for another prompt's; a tail that rides with
        decode steps is not waited for, except by the samples of one prompt.
        """
        now, later = 0, 0
        leads = sequence.leader is not None and sequence.leader.is_live
        groups = self._free_groups()
        for row, length in self.prefixes.matches(sequence.prompt_key, self._salt(sequence)):
            if min(length, sequence.most_cached) <= max(now, later):
                break  # no row that comes after holds more
            if row % self._groups not in groups:
                continue
            live = self._live_in(row)
            now = max(now, self._usable(sequence, row, min(length, live.start) if live else length))
            if live is not None and (live.status is Status.PREFILLING or leads):
                later = max(later, self._usable(sequence, row, length))
        return later - now >= (1 if leads else WAIT_PAYS)

    def _collects(self) -> bool:
        """Whether the first requests wait for others to start with."""
        config = self._config
        if not config.collect_s or any(self.slots) or len(self.waiting) >= len(self.slots):
            return False
        tokens = sum(len(s.prompt_ids) for s in self.waiting)
        first = min(s.submitted if s.submitted is not None else 0.0 for s in self.waiting)
        is_late = self._clock() - first >= config.collect_s
        return not is_late and not (config.collect_tokens and tokens >= config.collect_tokens)

    def admit(self, sequence: Sequence, placement: Placement) -> None:
        """Give a waiting sequence a slot, and plan its prompt."""
        place = self.waiting.index(sequence)
        for other in itertools.islice(self.waiting, place):
            self._passed_over[other.id] = self._passed_over.get(other.id, 0) + 1
        self.drop(sequence)
        slot, cached, source, keep_in = placement
        prompt_run, scored_from = sequence.prompt_run, sequence.scored_from
        sequence.chunks, sequence.ready = chunks.prefill(prompt_run, self._config, cached, scored_from=scored_from)
        if not sequence.generates:
            sequence.ready = self._config.positions  # no decode step runs it
        sequence.slot, sequence.start, sequence.cached = slot, cached, cached
        sequence.status = Status.PREFILLING if sequence.chunks else Status.RUNNING
        sequence.admitted = self._clock()
        self._count(sequence, placement)
        if source is not None:
            self.prefixes.use(source)
        if keep_in is not None:
            self.prefixes.copy(slot, keep_in)
        self.slots[slot], self._last[slot] = sequence, sequence.id
        self._hold(sequence, sequence.prompt_key)

    def _hold(self, sequence: Sequence, key: bytes) -> None:
        """Remember what a sequence's slot holds."""
        assert sequence.slot is not None
        plan = self._cold_plan(sequence) if self._config.batch_invariant else ()
        is_kept = sequence.generates and self._shares(sequence)
        self.prefixes.hold(sequence.slot, key, self._salt(sequence), plan, is_kept=is_kept)

    def _count(self, sequence: Sequence, placement: Placement) -> None:
        """Count what an admission finds, and what it overwrites."""
        counts = self.counts
        counts.prompt_tokens += len(sequence.prompt_ids)
        counts.cached_tokens += placement.cached
        if self._shares(sequence):
            counts.prefix_queries += len(sequence.prompt_ids)
            counts.prefix_hits += placement.cached
        overwritten = placement.slot if placement.keep_in is None else placement.keep_in
        kept = placement.cached if placement.source == overwritten else 0
        counts.evictions += self._is_lost(overwritten, kept)

    def _is_lost(self, row: int, kept: int = 0) -> bool:
        """Whether a prefix worth keeping is lost if a row keeps its first ``kept`` positions only."""
        held = self.prefixes.held.get(row)
        return held is not None and held.is_kept and min(self.prefixes.alone(row), held.length - kept) >= KEEP_PAYS

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue."""
        self.waiting.remove(sequence)
        self._passed_over.pop(sequence.id, None)

    # --- the slots ----------------------------------------------------------------------------------------------------

    def place(self, cached: int, source: int | None, wanted: Mapping[int, int]) -> Placement:
        """Where to put a sequence, for which there is a free slot: where most of its prompt is held, if that slot is
        free and nothing is lost that is worth keeping; else in the slot whose content was last used longest ago.

        Args:
            cached, source: see ``best_source``.
            wanted: how many leading positions of which rows others wait to go on from.
        """
        free = [slot for slot, live in enumerate(self.slots) if live is None]
        if source is not None:
            free = [slot for slot in free if slot % self._groups == source % self._groups]
        is_lost = source is not None and (wanted.get(source, 0) >= cached + COPY_PAYS or self._is_lost(source, cached))
        if source in free and (len(free) == 1 or not is_lost):
            slot = source
        else:
            slot = self._slot_to_overwrite([slot for slot in free if slot not in wanted] or free)
        assert slot is not None
        return Placement(slot, cached, source, self._row_to_keep(slot, cached if slot == source else 0, source))

    @property
    def _groups(self) -> int:
        """M, among how many groups of devices the rows are divided."""
        return self._config.data_parallel

    def _free_groups(self) -> set[int]:
        """Groups that have a free slot."""
        return {slot % self._groups for slot, live in enumerate(self.slots) if live is None}

    def best_source(self, sequence: Sequence, anywhere: bool = False) -> tuple[int, int | None]:
        """How many leading positions of a prompt need not be run, and which row holds them; (0, None) for none.

        Args:
            anywhere: also in groups of devices that have no free slot now.
        """
        groups = range(self._groups) if anywhere or self._groups == 1 else self._free_groups()
        count, most, source = 0, 0, None
        rides, reached = bool(self.running), 0
        resumed: dict[int, tuple[int, int]] = {}
        for row, length in self.prefixes.matches(sequence.prompt_key, self._salt(sequence)):
            if min(length, sequence.most_cached) < reached:
                break  # no row that comes after holds more
            if row % self._groups not in groups:
                continue
            live = self._live_in(row)
            usable = self._usable(sequence, row, min(length, live.start) if live else length)
            if usable < max(reached, 1):
                continue
            if usable not in resumed:
                resumed[usable] = self._resumed(sequence, usable, rides)
            start, saved = resumed[usable]
            saved -= 0 if live is None and row < len(self.slots) else COPY_PAYS
            if saved > most:
                count, most, source, reached = start, saved, row, usable
        return count, source

    def possibly_cached(self, sequences: Sequences[Sequence]) -> list[tuple[int, ...]]:
        """For each of some sequences, live, waiting or about to be, the leading positions that it may not need to run:
        what rows hold now, and what they would if others of them had run.
        """
        found = []
        shared = shared_with_others([s.prompt_key for s in sequences])
        for sequence, length in zip(sequences, shared, strict=True):
            counts = {sequence.cached if sequence.is_live else self.best_source(sequence, anywhere=True)[0]}
            counts |= {0} if self._groups > 1 else set()  # where another group has the free slot
            usable = min(length, sequence.most_cached)
            if not sequence.is_live and self._shares(sequence) and usable >= COPY_PAYS:
                starts = {self._resumed(sequence, usable, rides)[0] for rides in (False, True)}
                counts |= starts if not self._config.batch_invariant else {0}
            found.append(tuple(sorted(counts)))
        return found

    def _resumed(self, sequence: Sequence, usable: int, rides: bool) -> tuple[int, int]:
        """The position to go on from, and what that saves in prompt tokens."""
        count, config, scored_from = sequence.prompt_run, self._config, sequence.scored_from
        if not config.batch_invariant:
            return chunks.resumed(count, config, usable, scored_from=scored_from, rides=rides)
        return usable, usable + COPY_PAYS  # bits matter, the price does not

    def _usable(self, sequence: Sequence, row: int, length: int) -> int:
        """How many of the first ``length`` positions of a row a prompt can use.

        Where bits must be those of a cold start, those that chunks of the same plan have computed.
        """
        length = min(length, sequence.most_cached)
        if not self._config.batch_invariant:
            return length
        usable = 0
        own, others = self._cold_plan(sequence), self.prefixes.held[row].plan
        for chunk, other, following in zip(own, others, own[1:], strict=False):
            same = (chunk.start, chunk.length) == (other.start, other.length)
            if not same or following.start > min(length, other.end):
                break
            usable = following.start
        return usable

    def _cold_plan(self, sequence: Sequence) -> tuple[Chunk, ...]:
        """The chunks by which a prompt is run from its start."""
        plan, _ = chunks.prefill(sequence.prompt_run, self._config, scored_from=sequence.scored_from)
        return tuple(plan)

    def _slot_to_overwrite(self, free: Sequences[int]) -> int:
        """The free slot for a request that needs none in particular.

        Live slots stay side by side, because a step runs all slots between the first and the last; where that leaves a
        choice, the slot whose content was last used longest ago.
        """
        slots = [s.slot for s in self.live if s.slot is not None and s.generates]
        widths = self._config.widths

        def width(slot: int) -> int:
            first, end = _span((*slots, slot), self._groups)
            return next(w for w in widths if w >= end - first)

        narrowest = min(map(width, free))
        return self.prefixes.least_used([slot for slot in free if width(slot) == narrowest])

    def _row_to_keep(self, slot: int, kept: int, source: int | None) -> int | None:
        """The kept row for what a slot holds, of which ``kept`` positions stay; None where it is not worth one."""
        if not self._kept or not self._is_lost(slot, kept):
            return None
        others = [row for row in self._kept if row != source and row % self._groups == slot % self._groups]
        twice = [row for row in others if not self._is_lost(row)]
        return self.prefixes.least_used(twice or others) if others else None

    def _live_in(self, row: int) -> Sequence | None:
        """The live sequence in a row, if it is a slot that has one."""
        return self.slots[row] if row < len(self.slots) else None

    def _shares(self, sequence: Sequence) -> bool:
        """Whether a sequence takes part in the prefix cache."""
        return self._config.prefix_cache and sequence.params.prefix_cache

    def _salt(self, sequence: Sequence) -> Hashable:
        """Who may share a sequence's prefixes: those of the same salt, or the samples of its own prompt alone."""
        if self._shares(sequence):
            return sequence.params.cache_salt
        return ("alone", (sequence.leader or sequence).id)

    def release(self, sequence: Sequence) -> None:
        """Take a live sequence out of its slot; what the slot holds stays known."""
        assert sequence.slot is not None
        assert self.slots[sequence.slot] is sequence
        self.slots[sequence.slot] = None

    def keep(self, sequence: Sequence) -> None:
        """Remember what the slot of a sequence that has ended holds, unless another one has taken it."""
        if sequence.slot is not None and self._last[sequence.slot] == sequence.id:
            self._hold(sequence, key_of(sequence.held_ids))

    def move(self, sequence: Sequence, target: int) -> None:
        """Give a live sequence another, free slot."""
        self.release(sequence)
        assert sequence.slot is not None
        self.prefixes.copy(sequence.slot, target)
        self.prefixes.forget(sequence.slot)
        self._last[sequence.slot] = None
        sequence.slot, self.slots[target], self._last[target] = target, sequence, sequence.id

    def forget(self) -> None:
        """No row holds anything any more."""
        self.prefixes.clear()

    # --- rounds -------------------------------------------------------------------------------------------------------

    @property
    def live(self) -> list[Sequence]:
        """The sequences in slots, by slot."""
        return [s for s in self.slots if s is not None]

    @property
    def running(self) -> list[Sequence]:
        """The sequences that a decode step runs."""
        return [s for s in self.live if s.status is Status.RUNNING]

    def next_prefilling(self) -> list[Sequence]:
        """The sequences whose next chunks run first: the one that was admitted first, and on a mesh one of each other
        group, where its next chunk is as long. Empty where there is none.
        """
        first_of: dict[int, Sequence] = {}  # by group
        for sequence in sorted(self.live, key=lambda s: (s.admitted, s.id)):
            if sequence.status is Status.PREFILLING and sequence.slot is not None:
                first_of.setdefault(sequence.slot % self._groups, sequence)
        found = list(first_of.values())
        return [s for s in found if s.chunks[0].length == found[0].chunks[0].length]

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
        groups = self._groups
        first, end = _span(slots, groups)
        now = next(w for w in config.widths if w >= end - first)
        fullest = max(sum(slot % groups == group for slot in slots) for group in range(groups))
        narrow = next(w for w in config.widths if w >= fullest * groups)
        if narrow >= now or not is_ready(narrow, max(s.start for s in live) + 1):
            return []
        # the window of that width that holds the most of them
        firsts = range(0, config.max_batch_size - narrow + 1, groups)
        first = max(firsts, key=lambda f: sum(f <= s < f + narrow for s in slots))
        outside = [s for s in live if not first <= (s.slot or 0) < first + narrow]
        if any(s.limit - s.length < MOVE_PAYS for s in outside):
            return []
        free = [slot for slot in range(first, first + narrow) if self.slots[slot] is None]
        found = []
        for sequence in outside:
            target = next(slot for slot in free if slot % groups == (sequence.slot or 0) % groups)
            free.remove(target)
            found.append((sequence, target))
        return found

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
            "prefix_cache_queries": counts.prefix_queries,
            "prefix_cache_hits": counts.prefix_hits,
            "prefix_cache_evictions": counts.evictions,
            "prefixes": len(self.prefixes.held),
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
    lowest, end = _span(slots, config.data_parallel)
    covering = [
        Window(min(lowest, config.max_batch_size - rows), rows, key_len)
        for rows in widths
        if min(lowest, config.max_batch_size - rows) + rows >= end
    ]
    return next((w for w in covering if is_ready(w.rows, w.key_len)), covering[0])


def _span(slots: Sequences[int], groups: int) -> tuple[int, int]:
    """The first slot and the end of the narrowest window that covers some slots; both are multiples of ``groups``."""
    return min(slots) // groups * groups, -(-(max(slots) + 1) // groups) * groups
