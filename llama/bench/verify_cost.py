"""What it costs to check drafts: the time of a step that checks K of them, in decode steps.

This ratio says how many tokens a step must give before drafting pays. It needs no trained weights: a step takes the
same time whether its drafts are right or wrong.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence as Sequences
from typing import Any

from llama.bench.workload import WEIGHTS_SEED, Workload
from llama.config import DEFAULT_BUCKETS, EngineConfig
from llama.engine.programs import Program
from llama.engine.runner import XlaRunner
from llama.engine.scheduler import Window
from llama.engine.sequence import Draft, Sequence
from llama.generation import LLaMA
from llama.sampling_params import SamplingParams
from llama.xla import transfers

ROUNDS = 5  # of a repetition
DRAFT_LENS = (1, 2, 3, 5, 7)
PROMPT = (1, 2, 3, 4)
COLUMNS = {
    "model": "model",
    "dtype": "weights",
    "positions": "positions",
    "draft_len": "drafts",
    "decode_ms": "decode ms",
    "verify_ms": "verify ms",
    "verify_ratio": "ratio",
}


def measure(work: Workload, draft_lens: Sequences[int], repetitions: int) -> list[dict[str, Any]]:
    """Time a model's steps at one row; return a row for each draft length.

    Args:
        work: the model and its cache, all of whose positions every step reads.
        repetitions: of ``ROUNDS`` rounds each.
    """
    config = EngineConfig(
        max_seq_len=work.positions,
        dtype=work.dtype,  # type: ignore[arg-type]
        cache_dtype=work.cache_dtype,  # type: ignore[arg-type]
        buckets=work.buckets or DEFAULT_BUCKETS,
        draft_lens=tuple(draft_lens),
    )
    llm = LLaMA.build(work.directory, config=config, random_weights=work.args, seed=WEIGHTS_SEED)
    assert isinstance(llm.engine.runner, XlaRunner)
    return measure_steps(llm.engine.runner, work, repetitions)


def measure_steps(runner: XlaRunner, work: Workload, repetitions: int) -> list[dict[str, Any]]:
    """Time the steps of a model that is there; no request may be in its slots, and none is afterwards.

    Args:
        work: says the model's name and dtype.
        repetitions: of ``ROUNDS`` rounds each.

    Compiles: the decode step and the steps of each draft length at one row, where they are missing.
    """
    config = runner.config
    window = Window(0, 1, config.key_buckets[-1])
    decode = Program("decode", rows=1, key_len=window.key_len)
    verify = [Program("verify", rows=1, length=d + 1, key_len=window.key_len) for d in config.draft_lens]
    runner.compile([Program("admit"), decode, *verify])
    sequence = Sequence(PROMPT, SamplingParams(config.max_seq_len - len(PROMPT), 0.0, seed=0, ignore_eos=True))
    sequence.slot, sequence.start, sequence.ready = 0, len(PROMPT) - 1, len(PROMPT) - 1

    def step(draft_len: int) -> None:
        if draft_len:
            runner.verify(window, [Draft(sequence, [PROMPT[0]] * draft_len, [])], draft_len)
        else:
            runner.decode(window, ())
        transfers.fetch(runner.snapshot([]).report)

    def begin() -> None:
        runner.admit(sequence)  # at the position where every step begins
        transfers.fetch(runner.snapshot([]).report)  # the device is idle

    times = alternating((0, *config.draft_lens), begin, step, ROUNDS * repetitions)
    runner.reset()
    head = {"model": work.name, "dtype": work.dtype, "positions": config.max_seq_len, "rounds": ROUNDS * repetitions}
    return [head | row for row in ratios(times)]


def alternating(
    draft_lens: Sequences[int], begin: Callable[[], None], step: Callable[[int], None], rounds: int
) -> dict[int, list[float]]:
    """Seconds of each kind of step, which take turns. One round, which touches all memory, is not counted."""
    times: dict[int, list[float]] = {draft_len: [] for draft_len in draft_lens}
    for number in range(rounds + 1):
        for draft_len, found in times.items():
            begin()
            began = time.perf_counter()
            step(draft_len)
            if number:
                found.append(time.perf_counter() - began)
    return times


def ratios(times: dict[int, list[float]]) -> list[dict[str, Any]]:
    """Medians of the seconds of steps, as milliseconds and in decode steps.

    Args:
        times: by draft length; 0 is a decode step.
    """
    decode = statistics.median(times[0])
    return [
        {
            "draft_len": draft_len,
            "decode_ms": 1e3 * decode,
            "verify_ms": 1e3 * statistics.median(found),
            "verify_ratio": statistics.median(found) / decode,
        }
        for draft_len, found in times.items()
        if draft_len
    ]


def note(row: dict[str, Any]) -> str:
    """A row as a line for people."""
    return (
        f"{row['model']}, {row['dtype']}, one row: a step that checks {row['draft_len']} drafts takes "
        f"{row['verify_ratio']:.2f} decode steps ({row['verify_ms']:.2f} ms / {row['decode_ms']:.2f} ms)"
    )
