"""The engine: submit, step, cancel. One step is a round in which every live request gets its share.

A round: take what was submitted and cancelled, give free slots to waiting requests, run prompt chunks within the token
budget, run one decode step of all running requests, and read what became known. Where nobody runs, a chunk is a round.
What stays true throughout:

- One thread at a time calls ``step``; ``submit`` and ``cancel`` may be called from any thread at any time.
- The host counts positions and never waits for the device to know what to run next. It reads a report of the last few
  tokens once in ``read_every`` steps, after it has started the next step. A request that reaches its limit leaves its
  slot at once; one that meets a stop token does so when the host reads it. A request that follows a grammar is read at
  every step, because its next mask needs it, and every request after its first token.
- A step that checks drafts is read at once: only the device knows how many came true.
- A round that fails ends the requests that were live with the error, and the next one starts from empty slots.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence as Sequences

from llama.config import EngineConfig
from llama.engine import chunks
from llama.engine.drafting import Drafting
from llama.engine.programs import Program, programs_for
from llama.engine.runner import Runner, Snapshot
from llama.engine.scheduler import Scheduler, Window
from llama.engine.sequence import FinishReason, Sequence, Status, Update

log = logging.getLogger("llama.classic")  # the original's lines, see docs/cli.md

COLLECT_SLEEP_S = 0.001


class Engine:
    """Runs sequences in the slots of one device.

    Args:
        config: every static shape and every rule.
        runner: the device.
        drafting: guesses tokens, several of which are checked in a step; None for one token a step.
    """

    def __init__(self, config: EngineConfig, runner: Runner, drafting: Drafting | None = None) -> None:
        self.config, self.runner, self.drafting = config, runner, drafting
        self.scheduler = Scheduler(config, kept_rows=runner.kept_rows)
        self._inbox: deque[tuple[Sequence, FinishReason | None]] = deque()
        self._pending: list[Snapshot] = []
        self._ending: list[Sequence] = []  # they need no more steps; their last tokens are not in a snapshot yet
        self._to_end: set[int] = set()  # slots whose request ended for the host alone
        self._unread_steps = 0

    # --- for any thread -----------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Hand in a sequence; it waits for a slot from the next step on."""
        sequence.submitted = time.perf_counter()
        self._inbox.append((sequence, None))

    def cancel(self, sequence: Sequence, reason: FinishReason = "interrupted") -> None:
        """End a sequence at the next step, waiting or live; what was generated until then is kept."""
        if sequence.submitted is not None:
            self._inbox.append((sequence, reason))

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._inbox or self.scheduler.waiting or self.scheduler.live or self._ending or self._pending)

    # --- for the one thread that runs it ------------------------------------------------------------------------------

    def prepare(self, sequences: Sequences[Sequence]) -> float:
        """Compile the programs that these sequences can need beside the live and waiting ones; return the seconds.

        Raises:
            RecompileError: see ``Runner.compile``.
        """
        began = time.perf_counter()
        waiting = [s for s, reason in tuple(self._inbox) if reason is None]
        together = [*self.scheduler.live, *self.scheduler.waiting, *waiting, *sequences]
        self.runner.compile(programs_for(together, self.config, self.scheduler.possibly_cached(together)))
        if self.drafting is not None:
            self.drafting.drafter.prepare([s for s in together if s.generates])
        return time.perf_counter() - began

    def warm_up(self) -> None:
        """Compile every program that any request can need.

        Raises:
            RecompileError, InterruptedRunError: see ``Runner.compile``.
        """
        self.runner.compile()
        if self.drafting is not None:
            self.drafting.drafter.prepare(None)

    def stop_compiling(self, stop: bool = True) -> None:
        """End a compilation before its next program; safe from a signal handler."""
        self.runner.stop_compiling = stop
        if self.drafting is not None:
            self.drafting.drafter.stop_compiling = stop

    def step(self) -> list[Update]:
        """Run one round; return what became known. A step without work returns at once."""
        updates: list[Update] = []
        try:
            self._take_inbox(updates)
            self._admit()
            if not self._prefill(updates):
                self._decode(updates)
        except Exception as error:
            self._fail(error, updates)
        if self.scheduler.waiting and not self.scheduler.live and not self._pending:
            time.sleep(COLLECT_SLEEP_S)  # requests are being collected
        return updates

    def _take_inbox(self, updates: list[Update]) -> None:
        """Queue what was submitted, and end what was cancelled with all tokens that it has."""
        cancelled: list[tuple[Sequence, FinishReason]] = []
        while self._inbox:
            sequence, reason = self._inbox.popleft()
            if reason is not None:
                cancelled.append((sequence, reason))
                continue
            try:
                self.scheduler.submit(sequence)
            except Exception as error:
                self._end_with(sequence, error, updates)
        if any(s.status in (Status.PREFILLING, Status.RUNNING, Status.ENDING) for s, _ in cancelled):
            self._read_all(updates)
        for sequence, reason in cancelled:
            if sequence.status is Status.FINISHED:
                continue
            if sequence.status is Status.WAITING:
                self.scheduler.drop(sequence)
            else:
                self._to_end.add(self._slot(sequence))
            self._finish(sequence, sequence.finish(reason), updates)

    def _admit(self) -> None:
        """Give free slots to waiting sequences."""
        scheduler = self.scheduler
        while (admission := scheduler.next_admission()) is not None:
            sequence, place = admission
            if place.keep_in is not None:
                self.runner.copy(place.slot, place.keep_in, scheduler.prefixes.held[place.slot].length)
            if place.source is not None and place.source != place.slot:
                self.runner.copy(place.source, place.slot, place.cached)
            scheduler.admit(sequence, place)
            self._to_end.discard(place.slot)
            self.runner.admit(sequence)
        if self._to_end:
            self.runner.end(self._to_end)
            self._to_end = set()

    def _prefill(self, updates: list[Update]) -> bool:
        """Run prompt chunks: one where nobody runs, else as many as the budget allows, and one at least.

        Returns:
            Whether that was the whole round: nobody waits for a decode step, and an interrupt may come between chunks.
        """
        spent, scheduler = 0, self.scheduler
        alone = not scheduler.running
        while together := scheduler.next_prefilling():
            length = together[0].chunks[0].length
            if spent and spent + length > self.config.prefill_budget:
                break
            spent += length
            runs = [(sequence, sequence.chunks[0]) for sequence in together]
            for _, chunk in runs:
                _log_chunk(chunk.start, chunk.end, chunk.length)
            self.runner.chunk(runs)
            ended = [sequence for sequence, chunk in runs if self._has_run(sequence, chunk)]
            if ended:
                self._choose_first(ended, updates)
            if any(chunks.is_scored(chunk, sequence.scored_from) for sequence, chunk in runs):
                self._read_pending(updates)  # while this chunk runs, those of the one before
                self._pending.append(self._snapshot())
            if alone:
                return True
        return False

    def _has_run(self, sequence: Sequence, chunk: chunks.Chunk) -> bool:
        """Take notice of a chunk that runs; return whether a prompt's first token can be chosen after it."""
        del sequence.chunks[0]
        sequence.runs += 2 if chunks.is_scored(chunk, sequence.scored_from) else 1
        sequence.start = chunk.end
        self.scheduler.counts.chunk_positions += chunk.length
        self.scheduler.counts.padding += chunk.length - chunk.valid
        if sequence.chunks:
            return False
        if not sequence.generates:
            self._leave(sequence)
            return False
        sequence.status = Status.RUNNING
        return sequence.start == len(sequence.prompt_ids)

    def _choose_first(self, sequences: Sequences[Sequence], updates: list[Update]) -> None:
        """Choose the tokens after prompts that chunks ran to their ends, and read them."""
        self.runner.choose(sequences)
        for sequence in sequences:
            sequence.runs += 1
            sequence.length += 1
            self._leave_if_ended(sequence)
        self._read_all(updates)

    def _decode(self, updates: list[Update]) -> None:
        """Run one step of the running sequences, and read what an earlier round left to read."""
        drafting = self.drafting
        if drafting is not None and drafting.is_due and (self._unread_steps or self._pending):
            self._read_all(updates)
        running = self.scheduler.running
        if running:
            self._narrow()
            if drafting is not None and drafting.is_due and self._verify_step(running, drafting, updates):
                return
        began = time.perf_counter()
        if running:
            self._decode_step(running)
            self._unread_steps += 1
        self._read_pending(updates)
        urgent = any((s.first_token is None and s.length > len(s.prompt_ids)) or s.grammar is not None for s in running)
        is_asked_next = drafting is not None and drafting.waits_for_one_step
        if urgent or is_asked_next or not self.scheduler.running:
            self._read_all(updates)
        elif self._ending or self._unread_steps >= self.config.read_every:
            self._pending.append(self._snapshot())
        if drafting is not None and running:
            drafting.stepped(time.perf_counter() - began)

    def _narrow(self) -> None:
        """Move sequences together where the steps that follow become narrower."""

        def is_ready(rows: int, positions: int) -> bool:
            key_len = chunks.key_bucket(positions, self.config)
            needed = (Program("decode", rows=rows, key_len=key_len), Program("copy", key_len=key_len), Program("move"))
            return all(map(self.runner.is_ready, needed))

        for sequence, target in self.scheduler.moves(is_ready):
            self._to_end.discard(target)  # the slot's last request ended in this round
            self.runner.move(self._slot(sequence), target, sequence.start)
            self.scheduler.move(sequence, target)

    def _decode_step(self, running: Sequences[Sequence]) -> None:
        """The next token of every running sequence: one of its prompt, or one that the last step chose."""
        window = self.scheduler.window(
            lambda rows, key_len: self.runner.is_ready(Program("decode", rows=rows, key_len=key_len)),
            self.config.widths,
        )
        chooses = [s for s in running if s.start + 1 == s.length]
        for sequence in running:
            if sequence.start < len(sequence.prompt_ids):
                _log_chunk(sequence.start, sequence.start + 1, 1)
        full = tuple(s for s in chooses if s.needs_full)
        self.runner.decode(window, full)
        for sequence in running:
            sequence.start += 1
            sequence.runs += 2 if sequence in full else 1
        for sequence in chooses:
            sequence.length += 1
            self._leave_if_ended(sequence)
        self.scheduler.counts.decode_rows += window.rows
        self.scheduler.counts.idle_rows += window.rows - len(running)

    def _verify_step(self, running: Sequences[Sequence], drafting: Drafting, updates: list[Update]) -> bool:
        """Check drafts of the running sequences, if there are any that are worth it, and read what came of them.

        Returns:
            Whether that was this round's step.
        """
        longest = self.config.draft_lens[-1] + 1
        chooses = [s for s in running if s.length - s.start <= longest]
        plan = drafting.plan(chooses, self._verify_window(longest).rows)
        if not plan.draft_len:
            return False
        began, length = time.perf_counter(), plan.draft_len + 1
        plan = plan._replace(drafts=[d for d in plan.drafts if d.sequence.length - d.sequence.start <= length])
        window = self._verify_window(length)
        known = [len(draft.sequence.ids) for draft in plan.drafts]
        self.runner.verify(window, plan.drafts, plan.draft_len)
        for sequence in running:
            end = min(sequence.start + length, sequence.length)
            if sequence.start < len(sequence.prompt_ids):
                _log_chunk(sequence.start, end, end - sequence.start)
            sequence.start = end
            sequence.runs += 1
        self._read_all(updates)
        self.scheduler.counts.decode_rows += window.rows
        self.scheduler.counts.idle_rows += window.rows - len(running)
        drafting.checked(plan, known, window.rows, time.perf_counter() - began)
        return True

    def _verify_window(self, length: int) -> Window:
        """The slots that a step runs which takes so many tokens of each."""
        return self.scheduler.window(
            lambda rows, key_len: self.runner.is_ready(Program("verify", rows=rows, length=length, key_len=key_len)),
            self.config.verify_widths,
            length,
        )

    def _leave_if_ended(self, sequence: Sequence) -> None:
        """Free the slot of a sequence that reached its limit: its last tokens are read later."""
        if sequence.length >= sequence.limit:
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Free the slot of a sequence that needs no more steps."""
        sequence.status = Status.ENDING
        self.scheduler.release(sequence)
        self._ending.append(sequence)

    # --- reading ------------------------------------------------------------------------------------------------------

    def _snapshot(self) -> Snapshot:
        self._unread_steps = 0
        ending, self._ending = self._ending, []
        return self.runner.snapshot([*self.scheduler.live, *ending])

    def _read_all(self, updates: list[Update]) -> None:
        """Read everything that has been generated. Waits for the device."""
        if self._unread_steps or self._ending or self.scheduler.running:
            self._pending.append(self._snapshot())
        self._read_pending(updates)

    def _read_pending(self, updates: list[Update]) -> None:
        """Read the snapshots that were taken and not read yet. Waits for the device."""
        pending, self._pending = self._pending, []
        for snapshot in pending:
            self._take(snapshot, updates)

    def _take(self, snapshot: Snapshot, updates: list[Update]) -> None:
        """Hand the tokens of a snapshot to their sequences, and let those that have ended leave."""
        for sequence, new_ids, ended, details in self.runner.read(snapshot):
            if sequence.status is Status.FINISHED:
                continue
            self.scheduler.counts.generated_tokens += len(new_ids)
            if not sequence.generates:
                if sequence.is_scored:
                    sequence.finish("length")
                    self._finish(sequence, "", updates)
                continue
            try:
                text = sequence.take(new_ids, ended, details)
            except Exception as error:  # its grammar: the others go on
                self._end_with(sequence, error, updates)
                continue
            if len(sequence.ids) > sequence.length:  # drafts came true, which nobody could count before
                sequence.length, sequence.start = len(sequence.ids), len(sequence.ids) - 1
            if sequence.finish_reason is not None:
                if sequence.is_live and not ended:
                    self._to_end.add(self._slot(sequence))
                self._finish(sequence, text, updates)
            elif text or new_ids:
                updates.append(Update(sequence, text))

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, text: str, updates: list[Update]) -> None:
        """Let a sequence leave whose reason is set."""
        if sequence.is_live:
            self.scheduler.release(sequence)
        sequence.status = Status.FINISHED
        if self.drafting is not None and sequence.generates:
            self.drafting.finished(sequence)
        self.scheduler.keep(sequence)
        self.scheduler.counts.finished += 1
        updates.append(Update(sequence, text, is_last=True))

    def _end_with(self, sequence: Sequence, error: Exception, updates: list[Update]) -> None:
        """Let a sequence leave that an error ended."""
        sequence.error, sequence.finished = error, time.perf_counter()
        if sequence.is_live:
            self._to_end.add(self._slot(sequence))
        self._finish(sequence, "", updates)

    def _fail(self, error: Exception, updates: list[Update]) -> None:
        """A round failed: what the device holds is unknown. End what was live and begin with empty slots."""
        in_snapshots = [s for snapshot in self._pending for s in snapshot.slots.values()]
        lost = dict.fromkeys([*self.scheduler.live, *self._ending, *in_snapshots])
        for sequence in lost:
            if sequence.status is not Status.FINISHED:
                self._end_with(sequence, error, updates)
        self._pending, self._ending, self._to_end, self._unread_steps = [], [], set(), 0
        self.scheduler.forget()
        if self.drafting is not None:
            self.drafting.reset()
        self.runner.reset()

    def _slot(self, sequence: Sequence) -> int:
        assert sequence.slot is not None
        return sequence.slot


def _log_chunk(start: int, end: int, length: int) -> None:
    """The line that pytorch-tpu/llama prints for a chunk, in its words."""
    log.debug("Processing prompt pos [%d, %d), section length %d", start, end, length)
