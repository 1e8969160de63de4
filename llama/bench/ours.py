"""This package as a Runner: the engine itself, without text, so that all rows run to the end whatever they generate."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

from llama.bench.workload import WEIGHTS_SEED, Times, Workload
from llama.compiled.cache import row_bytes
from llama.compiled.memory import cache_dtype_for
from llama.compiled.model import Linear
from llama.config import DEFAULT_BUCKETS, EngineConfig
from llama.engine.programs import Program
from llama.engine.runner import XlaRunner
from llama.engine.scheduler import Window
from llama.engine.sequence import Sequence
from llama.generation import LLaMA
from llama.planning import cache_positions
from llama.sampling_params import SamplingParams
from llama.xla import backend
from llama.xla.counters import counters

HOST_STEPS = 20
GREEDY = SamplingParams(1, 0.0)
SAMPLED = SamplingParams(1, 0.8, 0.95, top_k=50, min_p=0.02)
FULL = replace(
    SAMPLED, typical_p=0.9, repetition_penalty=1.1, presence_penalty=0.5, logit_bias={5: 1.0}, bad_words=((6, 7),)
)
HEAD_PARAMS = {"greedy": GREEDY, "sample": SAMPLED, "full": FULL, "logprobs": replace(FULL, logprobs=20)}
HEAD_ROUNDS, HEAD_STEPS = 10, 8


class OursRunner:
    """A warmed-up engine.

    Attributes:
        facts: what was true before the first run: seconds of loading and compiling, programs, bytes.
        chosen: [rows][gen_len], the token ids of the last run.
    """

    def __init__(self, work: Workload) -> None:
        config = EngineConfig(
            max_seq_len=work.positions,
            max_batch_size=work.slots or work.batch,
            dtype=work.dtype,  # type: ignore[arg-type]
            cache_dtype=work.cache_dtype,  # type: ignore[arg-type]
            buckets=work.buckets or DEFAULT_BUCKETS,
            prefix_cache=bool(work.depths),  # the same prompts come again and again
            bucket_policy=work.bucket_policy,  # type: ignore[arg-type]
        )
        llm = LLaMA.build(work.directory, config=config, random_weights=work.args, seed=WEIGHTS_SEED)
        self._work, self._engine = work, llm.engine
        assert isinstance(llm.engine.runner, XlaRunner)
        self._runner = llm.engine.runner
        self._vocab = llm.vocab_size
        self._cache_dtype = cache_dtype_for(config, self._runner.model.activation_dtype)
        self.chosen: list[list[int]] = []
        compile_s = self._engine.prepare(self._sequences(work.prompt_len))
        self.run()  # the first run touches all memory
        for position in work.depths:
            self.decode_at(position)  # compiles what a prompt needs whose beginning is cached
        self.facts: dict[str, Any] = {
            "load_s": llm.load_s,
            "compile_s": compile_s,
            "programs": counters.compiled,
            "read_bytes": self._read_bytes(),
            "weight_bytes": sum(p.numel() * p.element_size() for p in self._runner.model.parameters()),
            "vocab_size": self._vocab,
            "cache_dtype": str(self._cache_dtype).removeprefix("torch."),
        }
        if not work.depths:  # its steps overwrite what the scheduler takes for the prompts' beginnings
            self.facts["host_ms"] = self._host_ms()
        if work.heads:
            self.facts["heads_ms"] = self._heads_ms()

    def _sequences(self, position: int) -> list[Sequence]:
        params, work = SamplingParams(self._work.gen_len, 0.0, seed=0), self._work
        return [Sequence(tuple(work.prompt(row, self._vocab)[:position]), params) for row in range(work.batch)]

    def run(self) -> Times:
        """Prefill and decode once."""
        return self.decode_at(self._work.prompt_len)

    def decode_at(self, position: int) -> Times:
        """Prefill the first tokens of the prompts up to a position, and decode from there.

        With ``Workload.depths`` what the cache holds of the prompts stays.
        """
        sequences = self._sequences(position)
        for sequence in sequences:
            self._engine.submit(sequence)
        points, watched = [], sequences[0]
        while self._engine.has_work:
            for update in self._engine.step():
                if update.sequence is watched and watched.first_token is not None:
                    points.append((len(watched.ids), time.perf_counter() - watched.first_token))
        self.chosen = [s.ids[position:] for s in sequences]
        began = min(s.submitted or 0.0 for s in sequences)
        first = max(s.first_token or 0.0 for s in sequences)
        return Times(first - began, max(s.finished or 0.0 for s in sequences) - first, points)

    def _read_bytes(self) -> int:
        """What a decode step must read: the linear layers once, and half way through the run the keys and values."""
        model, config = self._runner.model, self._engine.config
        tables = [m for m in model.modules() if isinstance(m, Linear)]
        weights = sum(p.numel() * p.element_size() for m in tables for p in m.parameters())
        if model.args.tie_word_embeddings:
            weights += model.tok_embeddings.weight.numel() * model.tok_embeddings.weight.element_size()
        live = self._work.prompt_len + self._work.gen_len // 2
        cache = row_bytes(model.args, config, self._cache_dtype) * self._work.batch
        return weights + 2 * cache // cache_positions(config) * live

    def _host_ms(self) -> float:
        """Milliseconds that the host spends on handing one step to an idle device."""
        steps, spent = _Steps(self._runner, self._work.batch, GREEDY), []
        for _ in range(HOST_STEPS):
            backend.wait()
            began = time.perf_counter()
            steps.run()
            spent.append(time.perf_counter() - began)
        backend.wait()
        return 1e3 * statistics.median(spent)

    def _heads_ms(self) -> dict[str, float]:
        """Milliseconds of a decode step with each head, the rounds of one alternating with the others'."""
        spent: dict[str, list[float]] = {head: [] for head in self._work.heads}
        for _ in range(HEAD_ROUNDS):
            for head, times in spent.items():
                steps = _Steps(self._runner, self._work.batch, HEAD_PARAMS[head])
                steps.run()
                backend.wait()
                began = time.perf_counter()
                for _ in range(HEAD_STEPS):
                    steps.run()
                backend.wait()
                times.append((time.perf_counter() - began) / HEAD_STEPS)
        return {head: 1e3 * statistics.median(times) for head, times in spent.items()}


class _Steps:
    """Decode steps at the widest key bucket without a prefill, each row with these parameters and a seed of its own."""

    def __init__(self, runner: XlaRunner, rows: int, params: SamplingParams) -> None:
        self._runner = runner
        room = runner.config.max_seq_len - 1
        wanted = replace(params, max_gen_len=room, ignore_eos=True)
        self._sequences = [Sequence((1,), replace(wanted, seed=row)) for row in range(rows)]
        self._window = Window(0, rows, runner.config.key_buckets[-1])
        programs = [Program("admit"), Program("decode", rows=rows, key_len=self._window.key_len)]
        runner.compile([*programs, Program("full", rows=rows)] if self._sequences[0].needs_full else programs)
        for slot, sequence in enumerate(self._sequences):
            sequence.slot = slot
            runner.admit(sequence)

    def run(self) -> None:
        """Hand one step to the device."""
        full = tuple(s for s in self._sequences if s.needs_full)
        self._runner.decode(self._window, full)
        self._runner.snapshot(self._sequences)  # nobody reads the details
