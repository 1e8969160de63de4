"""Decoding far into a cache: tokens per second at given positions, with each dtype of the cache, beside llama.cpp.

Every program prefills a prompt up to a position, keeping what its cache holds of the prompt's beginning, and then
decodes a few tokens, which alone are timed. The programs take turns at each position.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from llama.bench import report
from llama.bench.child import Child
from llama.bench.workload import Times, Workload

STEPS = 32  # decode steps at a position
OWN_CACHE_DTYPES = ("float32", "bfloat16")
COLUMNS = {
    "runner": "program",
    "model": "model",
    "dtype": "weights",
    "cache_dtype": "cache",
    "position": "position",
    "decode_tok_s": "decode tok/s",
    "step_ms": "ms/step",
    "peak_bytes": "peak memory",
}


class Contestant(NamedTuple):
    """A program and its workload.

    Attributes:
        runner: a name of ``workload.RUNNERS``.
        work: what it runs.
    """

    runner: str
    work: Workload


def contestants(work: Workload, compare: Sequence[str]) -> list[Contestant]:
    """Ours with each dtype of the cache, or with the one that the workload names, and the other programs."""
    dtypes = OWN_CACHE_DTYPES if work.cache_dtype == "auto" else (work.cache_dtype,)
    ours = [Contestant("ours", replace(work, cache_dtype=dtype)) for dtype in dtypes]
    return [*ours, *(Contestant(name, replace(work, cache_dtype="auto")) for name in compare)]


def measure(
    work: Workload, compare: Sequence[str], repetitions: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure decoding at each of the workload's depths; return a row for each program, cache and position.

    Raises:
        ConfigError: a program refuses the workload, or fails.
    """
    children: list[Child] = []
    try:
        for runner, own in contestants(work, compare):
            say(f"Warming up {runner}{f', cache {own.cache_dtype}' if runner == 'ours' else ''}")
            children.append(Child(runner, own))
        runs: dict[tuple[int, int], list[Times]] = {}
        for repetition in range(repetitions):
            for position in work.depths:
                say(f"Run {repetition + 1} of {repetitions}, position {position}")
                for number, child in enumerate(children):
                    runs.setdefault((number, position), []).append(child.decode_at(position))
        return [
            summarise(work, position, child.runner, child.facts, runs[number, position])
            for number, child in enumerate(children)
            for position in work.depths
        ]
    finally:
        for child in children:
            child.close()


def summarise(
    work: Workload, position: int, runner: str, facts: dict[str, Any], runs: Sequence[Times]
) -> dict[str, Any]:
    """One row: medians of the runs at a position, and the spread of the speed as a standard deviation.

    Args:
        facts: what the runner said of itself.
    """
    steps = work.gen_len - 1
    speeds = [steps / run.decode_s for run in runs]
    return {
        "runner": runner,
        "model": work.name,
        "dtype": work.dtype,
        "cache_dtype": facts["cache_dtype"],
        "position": position,
        "steps": steps,
        "repetitions": len(runs),
        "decode_tok_s": statistics.median(speeds),
        "decode_spread": statistics.pstdev(speeds),
        "step_ms": 1e3 * statistics.median(run.decode_s / steps for run in runs),
        "peak_bytes": facts.get("peak_bytes"),
    }


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over each other program's speed at the same position: above 1 is faster."""
    found = []
    for ours in (row for row in rows if row["runner"] == "ours"):
        for peer in rows:
            if peer["runner"] != "ours" and peer["position"] == ours["position"]:
                head = {"against": peer["runner"], **{name: ours[name] for name in ("cache_dtype", "position")}}
                found.append(head | {"decode": ours["decode_tok_s"] / peer["decode_tok_s"]})
    return found


def note(each: dict[str, Any]) -> str:
    """A ratio as a line for people."""
    return (
        f"ours / {each['against']} at position {each['position']}, our cache {each['cache_dtype']}: "
        f"decode {each['decode']:.2f} x"
    )


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw tokens per second over the position, one line for each program and cache.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    figure, axes = report.pyplot().subplots(figsize=(7.5, 4.4), layout="constrained")
    lines = dict.fromkeys((row["runner"], row["cache_dtype"]) for row in rows)
    for number, line in enumerate(lines):
        own = sorted(
            (row["position"], row["decode_tok_s"]) for row in rows if (row["runner"], row["cache_dtype"]) == line
        )
        program = "llama-xla" if line[0] == "ours" else line[0]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(*zip(*own, strict=True), marker="o", color=colour, label=f"{program}, cache {line[1]}")
    axes.set(xlabel="position", ylabel="decoded tokens per second", xlim=(0, None), ylim=(0, None))
    axes.set_xticks(sorted({row["position"] for row in rows}))
    axes.set_title(f"{rows[0]['model']}, {rows[0]['dtype']} weights, one row", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    report.save(figure, path)


COLOURS = ("#4477aa", "#44aa99", "#cc6677")
