"""One batch of token ids through the compiled steps: plan, warm-up, prefill, decode, late reading.

The host's part of generation. It knows programs, states and reports, and nothing of text. What stays true throughout:

- From the upload of a batch to its last token the host sends nothing to the device.
- The host reads a report of the last few tokens once in ``read_every`` steps, and only after it has started the next step, so the
  device does not wait for it. A batch whose rows have all ended therefore computes at most ``read_every + 1`` steps in vain; one
  that runs to its length limit computes none, because the host knows the limit.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

from llama import buckets, kv_cache, runtime
from llama.config import EngineConfig, SamplingParams
from llama.errors import RecompileError
from llama.model import Transformer
from llama.steps import CACHE_ARGUMENT, HEADS, REPORT_WINDOW, Controls, Head, ProgramKey, State, make_step

log = logging.getLogger("llama")

MAX_STOP_IDS = 16  # a row; more would widen a tensor of every program

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Request:
    """One row of a batch.

    Attributes:
        prompt_ids: at least one token id.
        params: what is wanted; ``seed`` settled, and prompt plus ``max_gen_len`` within ``max_seq_len``.
        stop_ids: ids that end the row; they are not part of its tokens.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()

    @property
    def limit(self) -> int:
        """The row's length, prompt included, at which it ends."""
        return len(self.prompt_ids) + self.params.max_gen_len


class Progress(NamedTuple):
    """What became known of a row: its new tokens, without the stop token, and why it ended if it did."""

    row: int
    new_ids: list[int]
    finish_reason: FinishReason | None


@dataclass
class BatchClock:
    """Times and counts of one batch, filled in while it runs.

    Attributes:
        ttft_s: from the start of the batch, warm-up excluded, to its first tokens on the host.
        prefill_s: from the first chunk to the first tokens on the host.
        decode_s: from there to the last tokens on the host.
        generated: tokens produced, stop tokens not counted.
        decoded: those of them that decode steps produced: all but each row's first.
        runs: program runs.
    """

    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    generated: int = 0
    decoded: int = 0
    runs: int = 0
    _began: float = 0.0
    _prefill_began: float = 0.0
    _prefill_ended: float = 0.0
    _runs_before: int = 0

    def start(self) -> None:
        """The batch begins."""
        self._began, self._runs_before = time.perf_counter(), runtime.counters.runs

    def start_prefill(self) -> None:
        """The batch is on the device."""
        self._prefill_began = time.perf_counter()

    def end_prefill(self) -> None:
        """The first tokens are on the host."""
        self._prefill_ended = time.perf_counter()
        self.ttft_s = self._prefill_ended - self._began
        self.prefill_s = self._prefill_ended - self._prefill_began

    def tick(self, progress: Sequence[Progress]) -> None:
        """Some tokens are on the host."""
        new = sum(len(p.new_ids) for p in progress)
        self.decoded += new if self.generated else 0
        self.generated += new
        self.runs = runtime.counters.runs - self._runs_before
        if self._prefill_ended:
            self.decode_s = time.perf_counter() - self._prefill_ended


@dataclass
class _Row:
    """What the host knows of a row: ``ids`` are the prompt's and the generated ones, a stop token included."""

    request: Request
    ids: list[int]
    active: bool = True


@dataclass
class _Batch:
    """One batch on its way: the device's state, and what the host knows of the rows."""

    state: State
    controls: Controls
    head: Head
    rows: list[_Row]
    cached: int = 0  # leading positions of every row whose keys and values are in the cache already

    @property
    def active(self) -> list[Request]:
        """The requests that the host has not seen end."""
        return [row.request for row in self.rows if row.active]

    def read(self, report: torch.Tensor) -> list[Progress]:
        """Fetch a report and tell what is new in it. Host sync: yes."""
        progress = []
        for i, (row, values) in enumerate(zip(self.rows, runtime.fetch(report).tolist(), strict=False)):
            if not row.active:
                continue
            *recent, length, done = values
            reason: FinishReason | None = None
            new_ids = recent[REPORT_WINDOW - (length - len(row.ids)) :]
            row.ids += new_ids
            row.active = not done
            if done:
                reason = "stop" if new_ids[-1] in row.request.stop_ids else "length"
            progress.append(Progress(i, new_ids[:-1] if reason == "stop" else new_ids, reason))
        return progress

    def forget_from(self, position: int) -> None:
        """Drop what the prefill has not reached from the rows' ids; one more id stays, as one that was chosen but not run."""
        for row in self.rows:
            del row.ids[position + 1 :]

    def end_interrupted(self) -> list[Progress]:
        """End the rows that are still active."""
        ended = [i for i, row in enumerate(self.rows) if row.active]
        for i in ended:
            self.rows[i].active = False
        return [Progress(i, [], "interrupted") for i in ended]


@dataclass
class Engine:
    """Holds a model's compiled programs and its cache, and runs batches through them, one at a time.

    Args:
        model: with its weights on ``device``.
        config: every static shape.
        device: from ``runtime.init``.
        progress: show a bar on stderr while programs are compiled.

    Attributes:
        interrupted: set it, from a signal handler or another thread, to end the running batch after its current step; the caller
            of ``run`` clears it.
    """

    model: Transformer
    config: EngineConfig
    device: torch.device
    progress: bool = False
    interrupted: bool = False
    _programs: dict[ProgramKey, runtime.Program] = field(default_factory=dict)
    _cache: torch.Tensor | None = None
    _resident: list[list[int]] = field(default_factory=list)  # per row of the cache: the ids whose keys and values it holds
    _warm: bool = False

    def all_keys(self) -> list[ProgramKey]:
        """Every program that any prompt, sampling parameter and length can need under this configuration."""
        shapes = buckets.program_shapes(self.config)
        return [ProgramKey(length, key_len, head) for length, key_len in shapes for head in HEADS]

    def reusable(self, requests: Sequence[Request]) -> int:
        """How many leading positions of every row the cache still holds from the last batch, for prompts that begin alike.

        The smallest of the rows' common prefixes, because the rows run through one plan; at least one token of each prompt is
        left to run, for its hidden state.
        """
        if len(requests) > len(self._resident):
            return 0
        shared = (common_prefix(ids, r.prompt_ids) for ids, r in zip(self._resident, requests, strict=False))
        return min(min(count, len(r.prompt_ids) - 1) for count, r in zip(shared, requests, strict=True))

    def keys_for(self, requests: Sequence[Request], cached: int = 0) -> list[ProgramKey]:
        """The programs that a batch of these requests can need, in the order of their first use."""
        chunks = buckets.plan(max(len(r.prompt_ids) for r in requests), self.config, cached)
        head = _head_for(requests)
        keys = [ProgramKey(c.length, c.key_len, "none") for c in chunks[:-1]]
        keys.append(ProgramKey(chunks[-1].length, chunks[-1].key_len, head))
        decoding = [r for r in requests if r.params.max_gen_len > 1]
        if decoding:
            # from the shortest prompt on: where the longest rows end early, the batch goes on at the others' positions
            first = buckets.key_bucket(min(len(r.prompt_ids) for r in decoding) + 1, self.config)
            last = buckets.key_bucket(max(r.limit for r in decoding) - 1, self.config)
            keys += [ProgramKey(1, k, head) for k in self.config.key_buckets if first <= k <= last]
        return list(dict.fromkeys(keys))

    def warm_up(self, keys: Sequence[ProgramKey] | None = None) -> float:
        """Compile programs ahead of their first use; run none of them.

        Args:
            keys: which ones; None means all, after which no request can compile anything.

        Returns:
            Seconds that it took.

        Raises:
            RecompileError: ``fail_on_recompile`` is set, a warm-up has been done before, and something is left to compile.
        """
        began = time.perf_counter()
        missing = [key for key in (self.all_keys() if keys is None else keys) if key not in self._programs]
        if missing:
            resident = self._resident
            state = self._fresh_state([])
            self._compile(missing, state, self._controls([]))
            self._cache, self._resident = state.kv_cache, resident  # compiling runs nothing
        self._warm = True
        return time.perf_counter() - began

    def _compile(self, keys: Sequence[ProgramKey], state: State, controls: Controls) -> None:
        """Compile ``keys`` for tensors like these, which keep their values."""
        if self._warm and self.config.fail_on_recompile:
            raise RecompileError(
                f"{len(keys)} programs would be compiled after warm-up: {', '.join(map(str, keys[:4]))}; warm up with prompts of this "
                "length, or with all programs (LLaMA.warm_up()), or run without --fail_on_recompile"
            )
        log.info("Compiling %d programs", len(keys))
        for key in tqdm(keys, "Compiling", unit="program", disable=not self.progress, leave=False):
            if self.interrupted:
                return
            step = make_step(self.model, key)
            before = runtime.counters.compile_s
            self._programs[key] = runtime.compile_program(str(key), step, (*state, *controls), donated=(CACHE_ARGUMENT,))
            log.debug("Compiled %s in %.2f seconds", key, runtime.counters.compile_s - before)

    def run(self, requests: Sequence[Request], clock: BatchClock, cached: int = 0) -> Iterator[Progress]:
        """Generate for up to ``max_batch_size`` requests.

        Args:
            requests: one a row. A program that they need and that no warm-up compiled is compiled on the way, on the clock.
            clock: filled in on the way.
            cached: how many leading tokens of every row are not run again; at most ``reusable(requests)``.

        Yields:
            Progress of the rows as their tokens become known; each row's last one carries a finish reason.
        """
        assert cached <= (self.reusable(requests) if cached else 0)
        clock.start()
        compilations = runtime.xla_compilations()
        rows = [_Row(r, list(r.prompt_ids)) for r in requests]
        batch = _Batch(self._fresh_state(requests, cached), self._controls(requests), _head_for(requests), rows, cached)
        try:
            for progress in itertools.chain(self._prefill(batch, clock), self._decode(batch)):
                clock.tick(progress)
                yield from progress
        except GeneratorExit:  # the caller stopped listening, between two steps: the cache is whole
            self._keep(batch)
            raise
        self._keep(batch)
        self._check_no_compile(compilations)

    def _keep(self, batch: _Batch) -> None:
        """Take the cache back; the last token of each row was chosen but not run, so its keys are not in it."""
        self._cache = batch.state.kv_cache
        self._resident = [row.ids[:-1] for row in batch.rows]

    def _prefill(self, batch: _Batch, clock: BatchClock) -> Iterator[list[Progress]]:
        """Run the chunks of the longest prompt; the last one chooses the first token of every row."""
        clock.start_prefill()
        chunks = buckets.plan(max(len(r.prompt_ids) for r in batch.active), self.config, batch.cached)
        for chunk in chunks:
            if self.interrupted:
                batch.forget_from(chunk.start)
                yield batch.end_interrupted()
                return
            log.info("Processing prompt pos [%d, %d), section length %d", chunk.start, chunk.end, chunk.length)
            self._step(batch, ProgramKey(chunk.length, chunk.key_len, batch.head if chunk is chunks[-1] else "none"))
        progress = batch.read(batch.state.report)
        clock.end_prefill()
        yield progress

    def _decode(self, batch: _Batch) -> Iterator[list[Progress]]:
        """One token a row and step, until every row has ended; yields what the late reads bring."""
        step, unread = 0, None
        while batch.active and not self.interrupted:
            step += 1
            end = max(len(r.prompt_ids) for r in batch.active) + step
            self._step(batch, ProgramKey(1, buckets.key_bucket(min(end, self.config.max_seq_len), self.config), batch.head))
            if unread is not None:
                yield batch.read(unread)
                unread = None
            if batch.active and step + 1 >= max(r.params.max_gen_len for r in batch.active):
                yield batch.read(batch.state.report)  # no row can want more: nothing runs beyond the limit
            elif step % self.config.read_every == 0:
                unread = batch.state.report
        if batch.active:
            yield batch.read(batch.state.report)
            yield batch.end_interrupted()

    def _step(self, batch: _Batch, key: ProgramKey) -> None:
        """Run one program on the batch; compile it first where warm-up did not foresee it."""
        if key not in self._programs:
            self._compile([key], batch.state, batch.controls)
        batch.state = State(*self._programs[key](*batch.state, *batch.controls))

    def _check_no_compile(self, compilations: int) -> None:
        """After a run under ``fail_on_recompile``: XLA itself has compiled nothing, by its own counter."""
        surplus = runtime.xla_compilations() - compilations
        if surplus and self.config.fail_on_recompile:
            raise RecompileError(
                f"XLA compiled {surplus} computations while a warmed-up batch ran, outside the engine's programs; "
                f"its shapes: batch {self.config.max_batch_size}, positions {self.config.max_seq_len}, "
                f"buckets {list(self.config.buckets)}, key buckets {list(self.config.key_buckets)}"
            )

    def _take_cache(self) -> torch.Tensor:
        """The cache, out of the engine's hands while a batch owns it: what an abandoned batch donated is never used again."""
        cache, self._cache, self._resident = self._cache, None, []
        if cache is None:
            cache = kv_cache.allocate(self.model.args, self.config, self.model.activation_dtype, self.device)
        return cache

    def _fresh_state(self, requests: Sequence[Request], cached: int = 0) -> State:
        """The state before the first chunk at position ``cached``; rows without a request are marked done and hold one token."""
        rows, positions = self.config.max_batch_size, self.config.max_seq_len
        tokens = torch.zeros(rows, positions, dtype=torch.int32)
        length = torch.ones(rows, dtype=torch.int32)
        done = torch.ones(rows, dtype=torch.bool)
        for i, request in enumerate(requests):
            tokens[i, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids, dtype=torch.int32)
            length[i], done[i] = len(request.prompt_ids), False
        hidden = torch.zeros(rows, self.model.args.dim, dtype=self.model.activation_dtype)
        report = torch.zeros(rows, REPORT_WINDOW + 2, dtype=torch.int32)
        host = (tokens, torch.full((rows,), cached, dtype=torch.int32), length, hidden, done, report)
        return State(self._take_cache(), *(runtime.upload(t, self.device) for t in host))

    def _controls(self, requests: Sequence[Request]) -> Controls:
        """The rows' wishes as tensors."""
        rows = self.config.max_batch_size
        temperature, top_p = torch.zeros(rows), torch.ones(rows)
        seed = torch.zeros(rows, 2, dtype=torch.int32)
        limit = torch.ones(rows, dtype=torch.int32)
        stop_ids = torch.full((rows, MAX_STOP_IDS), -1, dtype=torch.int32)
        for i, request in enumerate(requests):
            temperature[i], top_p[i] = request.params.temperature, request.params.top_p
            seed[i] = _seed_words(request.params.seed or 0)
            limit[i] = request.limit
            stop_ids[i, : len(request.stop_ids)] = torch.tensor(request.stop_ids, dtype=torch.int32)
        return Controls(*(runtime.upload(t, self.device) for t in (temperature, top_p, seed, limit, stop_ids)))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _head_for(requests: Sequence[Request]) -> Head:
    """All-greedy batches skip the sampler; one sampled row brings it in for the batch, where the others keep temperature 0."""
    return "greedy" if all(r.params.temperature == 0 for r in requests) else "sample"


def _seed_words(seed: int) -> torch.Tensor:
    """A 63-bit seed as two int32 words, low first."""
    return torch.tensor([seed & 0xFFFFFFFF, seed >> 32], dtype=torch.int64).to(torch.int32)
