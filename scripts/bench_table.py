"""Write the results of scripts/bench.sh into documents: speeds, positions, start-up, drafting, each between its marks.

A heading says where and when they were measured; each run is one line. Where there are no results of a kind, what
stands between its marks is kept.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llama.bench import drafting, positions, report, startup, verify_cost

WORK = {"model": "model", "dtype": "weights", "tokens": "tokens", "batch": "batch"}
SPEEDS = ("prefill_tok_s", "decode_tok_s", "step_ms", "bandwidth_share", "host_ms", "peak_bytes")
RUNS = {
    "runner": "program",
    **WORK,
    **{name: report.COLUMNS[name] for name in SPEEDS},
    "job_s": "job s",
    "ready_s": "start to first token s",
}
RATIOS = {"against": "ours /", **WORK, "decode": "decode", "prefill": "prefill", "job_time": "whole job's time"}
POSITION_RATIOS = {
    "against": "ours /",
    "model": "model",
    "dtype": "weights",
    "cache_dtype": "our cache",
    "position": "position",
    "decode": "decode",
}
HEADS = {
    "model": "model",
    "dtype": "weights",
    "vocab_size": "vocabulary",
    "batch": "batch",
    "head": "a step that chooses by",
    "ms": "ms",
    "ratio": "x the first",
}
START_RATIOS = {
    "against": "ours /",
    "model": "model",
    "prompt_len": "prompt",
    "n_layers": "layers",
    "slots": "slots",
    "first_s": "first token",
    "wall_s": "warm-up",
    "least_s": "fastest",
    "cpu_s": "CPU seconds",
}


def cpu_name() -> str:
    """The processor as Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def installed(name: str) -> str:
    """A library with its version, or the news that it is absent."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def heading() -> str:
    """Hardware, versions, commit and date."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    libraries = ", ".join(map(installed, ("torch", "torch_xla", "transformers", "llama_cpp_python")))
    return (
        f"{len(os.sched_getaffinity(0))} cores of {cpu_name()}, Python {platform.python_version()}, {libraries}; "
        f"commit {commit}, {datetime.date.today()}."
    )


def write(document: Path, mark: str, lines: list[str]) -> None:
    """Replace what stands between the document's marks of this name."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"{document}: expected the lines {begin} and {end}")
    document.write_text(f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{after}", encoding="utf-8")


def speed_tables(runs: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Every row, and the ratios alone; both with a heading."""
    ceilings = [run["read_ceiling_gb_s"] for run in runs]
    where = [f"{heading()} Read ceiling while these ran: {min(ceilings):.0f} to {max(ceilings):.0f} GB/s. Medians.", ""]
    for run in runs:
        for row in run["rows"]:
            row["tokens"] = f"{row['prompt_len']} + {row['gen_len']}"
    rows = [row for run in runs for row in run["rows"]]
    timed_heads, rows = report.heads(rows), [row for row in rows if "heads_ms" not in row]
    compared = report.table([{**run["rows"][0], **each} for run in runs for each in run["ratios"]], RATIOS)
    full = [*where, *report.table(rows, RUNS), "", *compared, "", *report.table(timed_heads, HEADS)]
    return full, [*where, *compared]


def position_tables(runs: list[dict[str, Any]], picture: Path) -> list[str]:
    """Decoding at positions, with its ratios, after the picture if there is one."""
    lines = [f"![Decoded tokens per second by position and cache]({picture.name})", ""] if picture.exists() else []
    rows = [row for run in runs for row in run["rows"]]
    ratios = [{**run["rows"][0], **each} for run in runs for each in run["ratios"]]
    lines += [f"{heading()} Medians.", "", *report.table(rows, positions.COLUMNS)]
    return lines + (["", *report.table(ratios, POSITION_RATIOS)] if ratios else [])


def start_tables(runs: list[dict[str, Any]], picture: Path) -> list[str]:
    """Process starts and full warm-ups, each with its ratios, after the picture if there is one."""
    lines = [f"![Seconds from process start to first token, by phase]({picture.name})", ""] if picture.exists() else []
    lines += [f"{heading()} Medians."]
    for kind, columns in (("startup", startup.COLUMNS), ("warm_up", startup.WARM_UP_COLUMNS)):
        found = [run for run in runs if run["measured"] == kind]
        rows = [row for run in found for row in run["rows"]]
        ratios = [{"model": run["rows"][0]["model"], **each} for run in found for each in run["ratios"]]
        lines += ["", *report.table(rows, columns)] if rows else []
        lines += ["", *report.table(ratios, START_RATIOS)] if ratios else []
    return lines


def drafting_tables(runs: list[dict[str, Any]], picture: Path) -> list[str]:
    """Plain decoding beside every drafter, and what checking drafts costs, after the picture if there is one."""
    lines = [f"![Speed-up of decoding by drafter, task and batch size]({picture.name})", ""] if picture.exists() else []
    lines += [f"{heading()} Medians."]
    rows = [row for run in runs if run["measured"] == "drafting" for row in run["rows"]]
    costs = [row for run in runs for row in run["verify_cost" if run["measured"] == "drafting" else "rows"]]
    lines += ["", *report.table(rows, drafting.COLUMNS)] if rows else []
    return [*lines, "", *report.table(costs, verify_cost.COLUMNS)]


def main(results: Path, full: Path, readme: Path) -> None:
    """Everything into one document, the ratios of speeds into the other, too."""
    runs = [json.loads(text) for text in results.read_text(encoding="utf-8").splitlines()]
    speeds, places, starts, drafts = (
        [run for run in runs if run.get("measured") in kinds]
        for kinds in ((None,), ("positions",), ("startup", "warm_up"), ("drafting", "verify_cost"))
    )
    if speeds:
        everything, compared = speed_tables(speeds)
        write(full, "bench", everything)
        write(readme, "bench", compared)
    if places:
        write(full, "positions", position_tables(places, full.with_name("positions.png")))
    if starts:
        write(full, "startup", start_tables(starts, full.with_name("startup.png")))
    if drafts:
        write(full, "drafting", drafting_tables(drafts, full.with_name("drafting.png")))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
