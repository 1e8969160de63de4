"""Many requests of mixed lengths through one engine: all at once, and arriving at random.

What a server sees: prompts of 5 to 400 tokens (log-uniform), 8 to 200 tokens to generate each, a fixed seed. First all
of them are there at once, which gives the most tokens a second; then they arrive as a Poisson process at a share of
that rate, which shows whether the engine keeps up and how long a first token takes.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence as Sequences
from typing import Any

from llama.bench.workload import WEIGHTS_SEED, Workload
from llama.config import DEFAULT_BUCKETS, EngineConfig
from llama.engine.engine import Engine
from llama.engine.sequence import Sequence
from llama.errors import ConfigError
from llama.generation import LLaMA
from llama.sampling_params import SamplingParams
from llama.xla.counters import counters

PROMPT_TOKENS = (5, 400)
GENERATED_TOKENS = (8, 200)
POSITIONS = 640
ARRIVAL_SHARE = 0.8  # of the full rate
SEED = 7


def requests(count: int, vocab_size: int) -> list[tuple[tuple[int, ...], int]]:
    """Prompts as ids, and how many tokens each generates; the same for every program that is measured."""
    chooser = random.Random(SEED)
    found = []
    for _ in range(count):
        length = round(math.exp(chooser.uniform(*map(math.log, PROMPT_TOKENS))))
        prompt = (1, *(chooser.randrange(3, vocab_size) for _ in range(length - 1)))
        found.append((prompt, chooser.randint(*GENERATED_TOKENS)))
    return found


def measure(work: Workload, count: int, repetitions: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Run the requests; return rates and times.

    Args:
        work: the model, its dtype, and ``batch`` slots.
        count: requests.
        repetitions: timed runs; medians are returned.
        settings: further fields of EngineConfig.

    Raises:
        ConfigError: ``max_seq_len`` is too small for the longest request.
    """
    least = PROMPT_TOKENS[1] + GENERATED_TOKENS[1]
    if work.max_seq_len is not None and work.max_seq_len < least:
        raise ConfigError(f"max_seq_len: got {work.max_seq_len}, expected at least {least} for the longest request")
    config = EngineConfig(
        max_seq_len=work.max_seq_len or POSITIONS,
        max_batch_size=work.batch,
        dtype=work.dtype,  # type: ignore[arg-type]
        cache_dtype=work.cache_dtype,  # type: ignore[arg-type]
        buckets=work.buckets or DEFAULT_BUCKETS,
        prefix_cache=False,  # the same prompts come again and again
        **settings,
    )
    llm = LLaMA.build(work.directory, config=config, random_weights=work.args, seed=WEIGHTS_SEED)
    compile_s = llm.warm_up()
    wanted = requests(count, llm.vocab_size)
    tokens = sum(len(prompt) + generated for prompt, generated in wanted)
    _run(llm.engine, wanted[: work.batch], None)  # the first run touches all memory
    full = [_run(llm.engine, wanted, None) for _ in range(repetitions)]
    rate = statistics.median(tokens / run["seconds"] for run in full)
    arriving = [_run(llm.engine, wanted, ARRIVAL_SHARE * rate * count / tokens) for _ in range(repetitions)]
    return {
        "runner": "ours",
        "model": work.name,
        "dtype": work.dtype,
        "slots": work.batch,
        "requests": count,
        "tokens": tokens,
        "programs": counters.compiled,
        "compile_s": compile_s,
        "tok_s": rate,
        "generated_tok_s": rate * sum(generated for _, generated in wanted) / tokens,
        "padding_share": llm.engine.scheduler.counts.padding_share,
        "arriving_tok_s": statistics.median(tokens / run["seconds"] for run in arriving),
        "arriving_share": statistics.median(tokens / run["seconds"] for run in arriving) / (ARRIVAL_SHARE * rate),
        "busy_share": statistics.median(tokens / run["busy"] for run in arriving) / rate,
        "ttft_p50_s": statistics.median(run["ttft_p50_s"] for run in arriving),
        "ttft_p99_s": statistics.median(run["ttft_p99_s"] for run in arriving),
    }


def _run(engine: Engine, wanted: Sequences[tuple[tuple[int, ...], int]], rate: float | None) -> dict[str, float]:
    """Serve the requests, all at once or at ``rate`` a second.

    Returns:
        seconds in all; busy seconds, in which there was something to do; the median and the 99th percentile of the time
        from a request's arrival to its first token.
    """
    chooser = random.Random(SEED)
    sequences = [Sequence(prompt, SamplingParams(generated, 0.0, seed=0)) for prompt, generated in wanted]
    arrivals, moment = [], 0.0
    for _ in sequences:
        arrivals.append(moment)
        moment += chooser.expovariate(rate) if rate else 0.0
    began, busy, sent = time.perf_counter(), 0.0, 0
    while sent < len(sequences) or engine.has_work:
        now = time.perf_counter() - began
        while sent < len(sequences) and arrivals[sent] <= now:
            engine.submit(sequences[sent])
            sent += 1
        if engine.has_work:
            engine.step()
            busy += time.perf_counter() - began - now
        else:
            time.sleep(max(arrivals[sent] - now, 0.0))
    delays = sorted((s.first_token or 0.0) - began - arrival for s, arrival in zip(sequences, arrivals, strict=True))
    return {
        "seconds": time.perf_counter() - began,
        "busy": busy,
        "ttft_p50_s": delays[len(delays) // 2],
        "ttft_p99_s": delays[min(math.ceil(0.99 * len(delays)), len(delays)) - 1],
    }


def report(row: dict[str, Any]) -> str:
    """The lines that people read."""
    return (
        f"{row['requests']} requests of {row['tokens']} tokens in {row['slots']} slots, {row['model']} {row['dtype']}, "
        f"{row['programs']} programs compiled in {row['compile_s']:.0f} s\n"
        f"all at once: {row['tok_s']:.1f} tok/s ({row['generated_tok_s']:.1f} generated), "
        f"{row['padding_share']:.0%} of all rows and positions without a token\n"
        f"arriving at {ARRIVAL_SHARE:.0%} of that rate: {row['arriving_tok_s']:.1f} tok/s, "
        f"{row['arriving_share']:.2f} of what arrives, "
        f"and {row['busy_share']:.2f} of the full rate while there is something to do; "
        f"first token after {row['ttft_p50_s']:.2f} s (median), {row['ttft_p99_s']:.2f} s (99th percentile)\n"
    )
