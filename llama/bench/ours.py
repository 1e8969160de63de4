"""This package as a Runner: the engine itself, without text, so that all rows run to the end whatever they generate."""

from __future__ import annotations

import statistics
import time
from math import prod
from typing import Any

from llama import runtime
from llama.bench.workload import SHAPES, WEIGHTS_SEED, Times, Workload
from llama.config import DEFAULT_BUCKETS, EngineConfig, SamplingParams
from llama.engine import BatchClock, Request
from llama.generation import LLaMA
from llama.kv_cache import cache_shape
from llama.model import Linear
from llama.steps import ProgramKey

HOST_STEPS = 20


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
        shape = None if work.directory is not None else SHAPES[work.shape]
        llm = LLaMA.build(work.directory, config=config, random_weights=shape, seed=WEIGHTS_SEED)
        self._work, self._engine = work, llm.engine
        params = SamplingParams(work.gen_len, 0.0, 1.0, 0)
        vocab = llm.engine.model.args.vocab_size
        self._requests = [Request(tuple(work.prompt(row, vocab)), params) for row in range(work.batch)]
        compile_s = llm.engine.warm_up(llm.engine.keys_for(self._requests))
        self.run()  # the first run touches all memory
        self.facts: dict[str, Any] = {
            "load_s": llm.load_s,
            "compile_s": compile_s,
            "programs": runtime.counters.compiled,
            "read_bytes": self._read_bytes(),
            "weight_bytes": sum(p.numel() * p.element_size() for p in llm.engine.model.parameters()),
            "host_ms": self._host_ms(),
        }

    def run(self) -> Times:
        """Prefill and decode once."""
        clock, points, known = BatchClock(), [], self._work.prompt_len
        for progress in self._engine.run(self._requests, clock):
            if progress.row == 0:
                known += len(progress.new_ids)
                points.append((known, clock.decode_s))
        return Times(clock.prefill_s, clock.decode_s, points)

    def _read_bytes(self) -> int:
        """What a decode step must read: the linear layers once, and half way through the run the keys and values of every row."""
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
        engine = self._engine
        key = ProgramKey(1, engine.config.key_buckets[-1], "greedy")
        engine.warm_up([key])
        state, controls = engine._fresh_state([]), engine._controls([])
        program, spent = engine._programs[key], []
        for _ in range(HOST_STEPS):
            runtime.wait()
            began = time.perf_counter()
            outputs = program(*state, *controls)
            spent.append(time.perf_counter() - began)
            state = type(state)(*outputs)
        runtime.wait()
        engine._cache = state.kv_cache
        return 1e3 * statistics.median(spent)
