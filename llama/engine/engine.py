"""One batch of token ids through the compiled steps: plan, warm-up, prefill, decode, late reading.

The host's part of generation. It knows programs, states and reports, and nothing of text. What stays true throughout:

- From the upload of a batch to its last token the host sends nothing to the device, but the masks of rows that follow a
  grammar.
- The host reads a report of the last few tokens once in ``read_every`` steps, and only after it has started the next
  step, so the device does not wait for it. A batch whose rows have all ended therefore computes at most ``read_every +
  1`` steps in vain; one that runs to its length limit computes none, because the host knows the limit. A row that
  follows a grammar is read at every step, because the next one needs its mask.
- Several samples of one prompt are prefilled once, in a state of one row, which is then copied to theirs (``fan_out``).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from tqdm import tqdm

from llama.compiled import cache as kv_cache
from llama.compiled.model import Transformer
from llama.compiled.steps import (
    CACHE_ARGUMENT,
    CHOOSING,
    REPORT_WINDOW,
    SHAPING,
    Head,
    Known,
    ProgramKey,
    State,
    make_step,
)
from llama.config import EngineConfig
from llama.engine import chunks as buckets
from llama.engine.batch import Batch, BatchClock, Details, Progress, Row, wanted_kinds
from llama.engine.chunks import Chunk
from llama.engine.programs import FAN_OUT, all_keys, decode_keys, head_for, prefill_runs, rows_by_prompt, runs_by_row
from llama.engine.request import Controls, Request, Shaping, allowed_of, controls_of, shaping_of
from llama.errors import RecompileError
from llama.xla import programs, transfers
from llama.xla.counters import counters, xla_compilations

log = logging.getLogger("llama")

TensorsT = TypeVar("TensorsT", Controls, Shaping)


@dataclass
class Engine:
    """Holds a model's compiled programs and its cache, and runs batches through them, one at a time.

    Args:
        model: with its weights on ``device``.
        config: every static shape.
        device: from ``backend.init``.
        progress: show a bar on stderr while programs are compiled.

    Attributes:
        interrupted: set it, from a signal handler or another thread, to end the running batch after its current step;
            the caller of ``run`` clears it.
    """

    model: Transformer
    config: EngineConfig
    device: torch.device
    progress: bool = False
    interrupted: bool = False
    _programs: dict[ProgramKey, programs.Program] = field(default_factory=dict)
    _cache: torch.Tensor | None = None
    _resident: list[list[int]] = field(
        default_factory=list
    )  # per row of the cache: the ids whose keys and values it holds
    _running: Batch | None = None
    _warm: bool = False

    def reusable(self, requests: Sequence[Request]) -> int:
        """How many leading positions of every row the cache still holds from the last batch, for prompts that begin
        alike.

        The smallest of the rows' common prefixes, because the rows run through one plan; at least one token of each
        prompt is left to run, for its hidden state. None where something is to be known of a prompt's tokens: they must
        all be run.
        """
        if len(requests) > len(self._resident) or any(r.params.prompt_logprobs for r in requests):
            return 0
        shared = (common_prefix(ids, r.prompt_ids) for ids, r in zip(self._resident, requests, strict=False))
        return min(min(count, len(r.prompt_ids) - 1) for count, r in zip(shared, requests, strict=True))

    # --- compiling
    # --------------------------------------------------------------------------------------------------------------

    def warm_up(self, keys: Sequence[ProgramKey] | None = None) -> float:
        """Compile programs ahead of their first use; run none of them.

        Args:
            keys: which ones; None means all, after which no request can compile anything.

        Returns:
            Seconds that it took.

        Raises:
            RecompileError: ``fail_on_recompile`` is set, a warm-up has been done before, and something is left to
                compile.
        """
        began = time.perf_counter()
        missing = [key for key in (all_keys(self.config) if keys is None else keys) if key not in self._programs]
        if missing:
            self._refuse_recompile(missing)
            resident = self._resident
            batch = self._begin([], head="full")
            one = self._one_row_state([]) if any(key.one_row or key == FAN_OUT for key in missing) else None
            log.info("Compiling %d programs", len(missing))
            for key in tqdm(missing, "Compiling", unit="program", disable=not self.progress, leave=False):
                if self.interrupted:
                    break
                self._compile(
                    key, self._fan_out_arguments(batch, one, ()) if key == FAN_OUT else self._arguments(key, batch, one)
                )
            self._cache, self._resident = batch.state.kv_cache, resident  # compiling runs nothing
        self._warm = True
        return time.perf_counter() - began

    def _refuse_recompile(self, keys: Sequence[ProgramKey]) -> None:
        if self._warm and self.config.fail_on_recompile:
            raise RecompileError(
                f"{len(keys)} programs would be compiled after warm-up: {', '.join(map(str, keys[:4]))}; warm up with prompts of this "
                "length, or with all programs (LLaMA.warm_up()), or run without --fail_on_recompile"
            )

    def _compile(self, key: ProgramKey, arguments: tuple[torch.Tensor, ...]) -> None:
        """Compile a program for tensors like these, which keep their values."""
        before = counters.compile_s
        donated = (CACHE_ARGUMENT,) if key.length or key == FAN_OUT else ()
        self._programs[key] = programs.compile_program(str(key), make_step(self.model, key), arguments, donated)
        log.debug("Compiled %s in %.2f seconds", key, counters.compile_s - before)

    def _arguments(self, key: ProgramKey, batch: Batch, one: State | None = None) -> tuple[torch.Tensor, ...]:
        """What a program takes; see ``steps.make_step``."""
        if key.one_row:
            assert one is not None
            return tuple(one)
        if key.head not in CHOOSING:
            return tuple(batch.state)
        shaping = batch.shaping if key.head in SHAPING else None
        return (*batch.state, *batch.controls, *(shaping or ()))

    def _fan_out_arguments(self, batch: Batch, one: State | None, rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """What ``steps.fan_out`` takes to copy one row's prefill to these rows."""
        assert one is not None
        chosen = torch.zeros(self.config.max_batch_size, dtype=torch.bool)
        chosen[list(rows)] = True
        return (*batch.state, one.kv_cache, one.hidden, transfers.upload(chosen, self.device))

    def _run(self, key: ProgramKey, arguments: tuple[torch.Tensor, ...]) -> tuple[State, Known | None]:
        """Run one program; compile it first where warm-up did not foresee it."""
        if key not in self._programs:
            self._refuse_recompile([key])
            log.info("Compiling 1 programs")
            self._compile(key, arguments)
        outputs = self._programs[key](*arguments)
        known = outputs[len(State._fields) :]
        return State(*outputs[: len(State._fields)]), Known(*known) if known else None

    # --- running
    # ----------------------------------------------------------------------------------------------------------------

    def run(self, requests: Sequence[Request], clock: BatchClock, cached: int = 0) -> Iterator[Progress]:
        """Generate for up to ``max_batch_size`` requests.

        Args:
            requests: one a row. A program that they need and that no warm-up compiled is compiled on the way, on the
                clock.
            clock: filled in on the way.
            cached: how many leading tokens of every row are not run again; at most ``reusable(requests)``.

        Yields:
            Progress of the rows as their tokens become known; each row's last one carries a finish reason, unless the
            caller has ended it by ``end_row``.
        """
        assert cached <= (self.reusable(requests) if cached else 0)
        clock.start()
        compilations = xla_compilations()
        batch = self._running = self._begin(requests, cached)
        try:
            for progress in itertools.chain(self._prefill(batch, clock), self._decode(batch)):
                clock.tick(progress)
                yield from progress
        except GeneratorExit:  # the caller stopped listening, between two steps: the cache is whole
            self._keep(batch)
            raise
        self._keep(batch)
        self._check_no_compile(compilations)

    def end_row(self, row: int) -> None:
        """The caller of ``run`` wants no more of this row: the batch ends when its other rows have."""
        assert self._running is not None
        self._running.end(row)

    def _keep(self, batch: Batch) -> None:
        """Take the cache back; the last token of each row was chosen but not run, so its keys are not in it."""
        self._cache, self._running = batch.state.kv_cache, None
        self._resident = [row.ids[:-1] for row in batch.rows]

    def _prefill(self, batch: Batch, clock: BatchClock) -> Iterator[list[Progress]]:
        """Run the prompts' chunks, and choose the first token of every row."""
        clock.start_prefill()
        requests = batch.active
        if runs_by_row(requests, self.config, batch.cached):
            groups = rows_by_prompt(requests)
            clock.prefilled = sum(map(len, groups))
            if not all(self._prefill_once(batch, rows) for rows in groups.values()):
                batch.forget_from(-1)  # interrupted: some rows have nothing in the cache
            runs: list[tuple[Chunk | None, ProgramKey]] = [(None, ProgramKey(0, 0, batch.head))]
        else:
            clock.prefilled = sum(len(r.prompt_ids) - batch.cached for r in requests)
            runs = prefill_runs(requests, self.config, batch.cached, batch.head)
        scores: list[Details] = []
        for chunk, key in runs:
            if self.interrupted:
                if chunk is not None:
                    batch.forget_from(chunk.start)
                yield batch.end_interrupted()
                return
            if chunk is None:
                self._choose(batch)
            else:
                batch.state = self._run_chunk(chunk, key, self._arguments(key, batch), requests, scores)
        batch.tell_prompts(scores, [0])
        progress = batch.read(batch.snapshot())
        clock.end_prefill()
        yield progress

    def _prefill_once(self, batch: Batch, rows: Sequence[int]) -> bool:
        """Prefill the prompt that some rows share in a state of one row, and copy that to theirs; False when
        interrupted.
        """
        requests = [batch.rows[i].request for i in rows]
        one = self._one_row_state(requests[:1])
        scores: list[Details] = []
        for chunk, key in prefill_runs(requests, self.config, 0, None, one_row=True):
            if self.interrupted:
                return False
            assert chunk is not None
            one = self._run_chunk(chunk, key, self._arguments(key, batch, one), requests, scores)
        batch.state, _ = self._run(FAN_OUT, self._fan_out_arguments(batch, one, rows))
        batch.tell_prompts(scores, rows)
        return True

    def _run_chunk(
        self,
        chunk: Chunk,
        key: ProgramKey,
        arguments: tuple[torch.Tensor, ...],
        requests: Sequence[Request],
        scores: list[Details],
    ) -> State:
        """Run one chunk of a prompt; where it is scored, fetch what these requests want of it, before the next chunk
        makes more.

        Host sync: where it is scored, and then it runs one row.
        """
        log.info("Processing prompt pos [%d, %d), section length %d", chunk.start, chunk.end, chunk.length)
        state, known = self._run(key, arguments)
        if known is not None:
            scores.append(Details.fetched(known, wanted_kinds(requests)).of_row(0).first(chunk.valid))
        return state

    def _decode(self, batch: Batch) -> Iterator[list[Progress]]:
        """One token a row and step, until every row has ended; yields what the late reads bring."""
        step, unread = 0, None
        while batch.active and not self.interrupted:
            step += 1
            end = max(len(r.prompt_ids) for r in batch.active) + step
            self._decode_step(batch, buckets.key_bucket(min(end, self.config.max_seq_len), self.config))
            if unread is not None:
                yield batch.read(unread)
                unread = None
            if batch.active and (batch.is_constrained or step + 1 >= max(r.params.max_gen_len for r in batch.active)):
                yield batch.read(
                    batch.snapshot()
                )  # the next mask waits for it; or no row can want more, and nothing runs beyond the limit
            elif step % self.config.read_every == 0:
                unread = batch.snapshot()
        if batch.active:
            yield batch.read(batch.snapshot())
            yield batch.end_interrupted()

    def _decode_step(self, batch: Batch, key_len: int) -> None:
        """One more token of every row."""
        for key in decode_keys(key_len, batch.head):
            if key.length:
                batch.state, _ = self._run(key, self._arguments(key, batch))
            else:
                self._choose(batch)

    def _choose(self, batch: Batch) -> None:
        """Run the head alone, behind a chunk that had none."""
        if batch.masks_stale:
            assert batch.shaping is not None
            rows = [row.request if row.active else None for row in batch.rows]
            allowed = allowed_of(rows, self.config.max_batch_size, self.model.args.vocab_size)
            batch.shaping = batch.shaping._replace(allowed=transfers.upload(allowed, self.device))
            batch.masks_stale = False
        key = ProgramKey(0, 0, batch.head)
        batch.state, known = self._run(key, self._arguments(key, batch))
        if known is not None:
            batch.add_known(known)

    def bare_steps(self, requests: Sequence[Request], key_len: int) -> Generator[None, None, None]:
        """Decode steps without a prefill, handed to the device one each time that the caller asks for the next; for
        measurements.
        """
        self.warm_up(decode_keys(key_len, head_for(requests)))
        batch = self._begin(requests)
        try:
            while True:
                self._decode_step(batch, key_len)
                batch.snapshot()  # nobody reads what is known of the tokens
                yield
        finally:
            self._cache = batch.state.kv_cache

    def _check_no_compile(self, compilations: int) -> None:
        """After a run under ``fail_on_recompile``: XLA itself has compiled nothing, by its own counter."""
        surplus = xla_compilations() - compilations
        if surplus and self.config.fail_on_recompile:
            raise RecompileError(
                f"XLA compiled {surplus} computations while a warmed-up batch ran, outside the engine's programs; "
                f"its shapes: batch {self.config.max_batch_size}, positions {self.config.max_seq_len}, "
                f"buckets {list(self.config.buckets)}, key buckets {list(self.config.key_buckets)}"
            )

    # --- what goes onto the device
    # ----------------------------------------------------------------------------------------------

    def _begin(self, requests: Sequence[Request], cached: int = 0, head: Head | None = None) -> Batch:
        """A batch before its first chunk; ``head`` says which controls it has where the requests do not."""
        rows, head = self.config.max_batch_size, head or head_for(requests)
        controls = self._uploaded(controls_of(requests, rows))
        shaping = self._uploaded(shaping_of(requests, rows, self.model.args.vocab_size)) if head in SHAPING else None
        state = self._fresh_state(requests, self._take_cache(), cached)
        return Batch(state, controls, shaping, head, [Row(r, list(r.prompt_ids)) for r in requests], cached)

    def _uploaded(self, tensors: TensorsT) -> TensorsT:
        """The same named tuple of tensors, on the device."""
        return type(tensors)(*(transfers.upload(t, self.device) for t in tensors))

    def _take_cache(self) -> torch.Tensor:
        """The cache, out of the engine's hands while a batch owns it: what an abandoned batch donated is never used
        again.
        """
        cache, self._cache, self._resident = self._cache, None, []
        return self._new_cache(self.config.max_batch_size) if cache is None else cache

    def _new_cache(self, rows: int) -> torch.Tensor:
        return kv_cache.allocate(
            self.model.args, replace(self.config, max_batch_size=rows), self.model.activation_dtype, self.device
        )

    def _one_row_state(self, requests: Sequence[Request]) -> State:
        """A state of one row, with a cache of its own, which lives as long as it."""
        return self._fresh_state(requests, self._new_cache(1))

    def _fresh_state(self, requests: Sequence[Request], cache: torch.Tensor, cached: int = 0) -> State:
        """The state before the first chunk at position ``cached``; rows without a request are marked done and hold one
        token.
        """
        rows, positions = cache.shape[1], self.config.max_seq_len
        tokens = torch.zeros(rows, positions, dtype=torch.int32)
        length = torch.ones(rows, dtype=torch.int32)
        done = torch.ones(rows, dtype=torch.bool)
        for i, request in enumerate(requests):
            tokens[i, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids, dtype=torch.int32)
            length[i], done[i] = len(request.prompt_ids), False
        hidden = torch.zeros(rows, self.model.args.dim, dtype=self.model.activation_dtype)
        report = torch.zeros(rows, REPORT_WINDOW + 2, dtype=torch.int32)
        host = (tokens, torch.full((rows,), cached, dtype=torch.int32), length, hidden, done, report)
        return State(cache, *(transfers.upload(t, self.device) for t in host))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
