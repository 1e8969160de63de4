"""This package as a Runner: the engine itself, without text, so that all rows run to the end whatever they generate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator
from dataclasses import replace
from math import prod
from typing import Any

from llama.bench.workload import WEIGHTS_SEED, Times, Workload
from llama.compiled.cache import cache_shape
from llama.compiled.model import Linear
from llama.compiled.steps import Head
from llama.config import DEFAULT_BUCKETS, EngineConfig
from llama.engine.batch import BatchClock
from llama.engine.programs import keys_for
from llama.engine.request import Request
from llama.generation import LLaMA
from llama.sampling_params import SamplingParams
from llama.xla import backend
from llama.xla.counters import counters

HOST_STEPS = 20
GREEDY = SamplingParams(1, 0.0)
SAMPLED = SamplingParams(1, 0.8, 0.95, top_k=50, min_p=0.02)
FULL = replace(
    SAMPLED, typical_p=0.9, repetition_penalty=1.1, presence_penalty=0.5, logit_bias={5: 1.0}, bad_words=((6, 7),)
)
HEAD_PARAMS: dict[Head, SamplingParams] = {
    "greedy": GREEDY,
    "sample": SAMPLED,
    "full": FULL,
    "logprobs": replace(FULL, logprobs=20),
}
HEAD_ROUNDS, HEAD_STEPS = 10, 8


class OursRunner:
    """A warmed-up engine.

    Attributes:
        facts: what was true before the first run: seconds of loading and compiling, programs, bytes.
    """

    def __init__(self, work: Workload) -> None:
        config = EngineConfig(
            max_seq_len=work.positions,
            max_batch_size=work.batch,
            dtype=work.dtype,  # type: ignore[arg-type]
            buckets=work.buckets or DEFAULT_BUCKETS,
            bucket_policy=work.bucket_policy,  # type: ignore[arg-type]
        )
        shape = work.args
        llm = LLaMA.build(work.directory, config=config, random_weights=shape, seed=WEIGHTS_SEED)
        self._work, self._engine = work, llm.engine
        params = SamplingParams(work.gen_len, 0.0, seed=0)
        vocab = llm.engine.model.args.vocab_size
        self._requests = [Request(tuple(work.prompt(row, vocab)), params) for row in range(work.batch)]
        compile_s = llm.engine.warm_up(keys_for(self._requests, config))
        self.run()  # the first run touches all memory
        self.facts: dict[str, Any] = {
            "load_s": llm.load_s,
            "compile_s": compile_s,
            "programs": counters.compiled,
            "read_bytes": self._read_bytes(),
            "weight_bytes": sum(p.numel() * p.element_size() for p in llm.engine.model.parameters()),
            "host_ms": self._host_ms(),
            "vocab_size": vocab,
        }
        if work.heads:
            self.facts["heads_ms"] = self._heads_ms()

    def run(self) -> Times:
        """Prefill and decode once."""
        clock, points, known = BatchClock(), [], self._work.prompt_len
        for progress in self._engine.run(self._requests, clock):
            if progress.row == 0:
                known += len(progress.new_ids)
                points.append((known, clock.decode_s))
        return Times(clock.prefill_s, clock.decode_s, points)

    def _read_bytes(self) -> int:
        """What a decode step must read: the linear layers once, and half way through the run the keys and values of
        every row.
        """
        model = self._engine.model
        tables = [m for m in model.modules() if isinstance(m, Linear)]
        weights = sum(p.numel() * p.element_size() for m in tables for p in m.parameters())
        if model.args.tie_word_embeddings:
            weights += model.tok_embeddings.weight.numel() * model.tok_embeddings.weight.element_size()
        live = self._work.prompt_len + self._work.gen_len // 2
        cache = prod(cache_shape(model.args, self._engine.config)) * model.activation_dtype.itemsize
        return weights + cache // self._engine.config.max_seq_len * live

    def _host_ms(self) -> float:
        """Milliseconds that the host spends on handing one step to an idle device."""
        steps, spent = self._steps(GREEDY), []
        for _ in range(HOST_STEPS):
            backend.wait()
            began = time.perf_counter()
            next(steps)
            spent.append(time.perf_counter() - began)
        backend.wait()
        steps.close()
        return 1e3 * statistics.median(spent)

    def _steps(self, params: SamplingParams) -> Generator[None, None, None]:
        """Decode steps at the widest key bucket, each row with these parameters and a seed of its own."""
        requests = [Request((1,), replace(params, seed=row)) for row in range(self._work.batch)]
        return self._engine.bare_steps(requests, self._engine.config.key_buckets[-1])

    def _heads_ms(self) -> dict[Head, float]:
        """Milliseconds of a decode step with each of the heads that are wanted, the rounds of one alternating with the
        others'.
        """
        spent: dict[Head, list[float]] = {head: [] for head in self._work.heads}
        for _ in range(HEAD_ROUNDS):
            for head, times in spent.items():
                steps = self._steps(HEAD_PARAMS[head])
                next(steps)
                backend.wait()
                began = time.perf_counter()
                for _ in range(HEAD_STEPS):
                    next(steps)
                backend.wait()
                times.append((time.perf_counter() - began) / HEAD_STEPS)
                steps.close()
        return {head: 1e3 * statistics.median(times) for head, times in spent.items()}
