"""Write the results of scripts/bench.sh into a document, between its two marks: where and when it was measured, and one line a run."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

COLUMNS = ["program", "model", "weights", "tokens", "batch", "prefill tok/s", "decode tok/s", "ms/step", "job s", "of ceiling"]
COLUMNS += ["host ms/step", "start to first token s", "peak MiB"]
HEADER = f"| {' | '.join(COLUMNS)} |"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def cpu_name() -> str:
    """The processor as Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def heading(ceilings: list[float]) -> str:
    """Hardware, versions, commit and date."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "torch_xla", "transformers", "llama_cpp_python"))
    return (
        f"{len(os.sched_getaffinity(0))} cores of {cpu_name()}, Python {platform.python_version()}, {libraries}; commit {commit}, "
        f"{datetime.date.today()}. Read ceiling while these ran: {min(ceilings):.0f} to {max(ceilings):.0f} GB/s. Medians."
    )


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    share = f"{row['bandwidth_share']:.0%}" if "bandwidth_share" in row else ""
    host = f"{row['host_ms']:.2f}" if "host_ms" in row else ""
    cells = [
        row["runner"],
        row["model"],
        row["dtype"],
        f"{row['prompt_len']} + {row['gen_len']}",
        row["batch"],
        f"{row['prefill_tok_s']:.0f}",
        f"{row['decode_tok_s']:.1f} ± {row['decode_spread']:.1f}",
        f"{row['step_ms']:.1f}",
        f"{row['job_s']:.2f}",
        share,
        host,
        f"{row['ready_s']:.1f}" if "ready_s" in row else "",
        f"{row['peak_bytes'] / 2**20:.0f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def ratios(runs: list[dict[str, Any]]) -> list[str]:
    """The table of ours divided by each peer's."""
    lines = [
        "| ours / | model | weights | tokens | batch | decode | prefill | whole job's time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        first = run["rows"][0]
        for each in run["ratios"]:
            what = f"{each['against']} | {first['model']} | {first['dtype']} | {first['prompt_len']} + {first['gen_len']} | {each['batch']}"
            lines.append(f"| {what} | {each['decode']:.2f} | {each['prefill']:.2f} | {each['job_time']:.2f} |")
    return lines


def write(document: Path, lines: list[str]) -> None:
    """Replace what stands between the document's marks."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


def main(results: Path, full: Path, readme: Path) -> None:
    """Every run into one document, the ratios into the other."""
    runs = [json.loads(text) for text in results.read_text(encoding="utf-8").splitlines()]
    where = [heading([run["read_ceiling_gb_s"] for run in runs]), ""]
    table = [HEADER, "|" + "---|" * (HEADER.count("|") - 1), *(line(row) for run in runs for row in run["rows"])]
    write(full, [*where, *table, "", *ratios(runs)])
    write(readme, [*where, *ratios(runs)])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
