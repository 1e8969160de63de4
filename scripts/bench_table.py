"""Write the results of scripts/bench.sh into documents, between two marks.

A heading says where and when they were measured; each run is one line.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from llama.bench import report

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
HEADS = {
    "model": "model",
    "dtype": "weights",
    "vocab_size": "vocabulary",
    "batch": "batch",
    "head": "a step that chooses by",
    "ms": "ms",
    "ratio": "x the first",
}
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def cpu_name() -> str:
    """The processor as Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def heading(ceilings: list[float]) -> str:
    """Hardware, versions, commit and date."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torch_xla", "transformers", "llama_cpp_python")
    )
    return (
        f"{len(os.sched_getaffinity(0))} cores of {cpu_name()}, Python {platform.python_version()}, {libraries}; "
        f"commit {commit}, {datetime.date.today()}. Read ceiling while these ran: "
        f"{min(ceilings):.0f} to {max(ceilings):.0f} GB/s. Medians."
    )


def write(document: Path, lines: list[str]) -> None:
    """Replace what stands between the document's marks."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


def main(results: Path, full: Path, readme: Path) -> None:
    """Every run into one document, the ratios into the other."""
    runs = [json.loads(text) for text in results.read_text(encoding="utf-8").splitlines()]
    where = [heading([run["read_ceiling_gb_s"] for run in runs]), ""]
    for run in runs:
        for row in run["rows"]:
            row["tokens"] = f"{row['prompt_len']} + {row['gen_len']}"
    rows = [row for run in runs for row in run["rows"]]
    timed_heads, rows = report.heads(rows), [row for row in rows if "heads_ms" not in row]
    compared = report.table([{**run["rows"][0], **each} for run in runs for each in run["ratios"]], RATIOS)
    write(full, [*where, *report.table(rows, RUNS), "", *compared, "", *report.table(timed_heads, HEADS)])
    write(readme, [*where, *compared])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
