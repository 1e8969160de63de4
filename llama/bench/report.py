"""Results of a benchmark: one row a program and batch size, as a table, as data and as a picture."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama.bench.workload import Times, Workload
from llama.errors import ConfigError, setting

FORMATS = ("md", "csv", "json", "jsonl")
COLUMNS = {
    "runner": "program",
    "model": "model",
    "dtype": "weights",
    "cache_dtype": "cache",
    "batch": "batch",
    "prefill_tok_s": "prefill tok/s",
    "decode_tok_s": "decode tok/s",
    "first_token_ms": "first token ms",
    "step_ms": "ms/step",
    "bandwidth_share": "share of read ceiling",
    "host_ms": "host ms/step",
    "programs": "programs",
    "compile_s": "compile s",
    "import_s": "import s",
    "load_s": "load s",
    "weight_bytes": "weights",
    "peak_bytes": "peak memory",
}


def summarise(
    work: Workload, runner: str, facts: dict[str, Any], runs: Sequence[Times], ceiling: float
) -> dict[str, Any]:
    """One row: medians of the runs, and the spread of the two speeds as standard deviations.

    Args:
        facts: what the runner said of itself.
        ceiling: bytes per second that the machine reads.
    """
    prefill = [work.batch * work.prompt_len / t.prefill_s for t in runs]
    decode = [work.batch * (work.gen_len - 1) / t.decode_s for t in runs]
    step_s = statistics.median(t.decode_s / (work.gen_len - 1) for t in runs)
    row: dict[str, Any] = {
        "runner": runner,
        "model": work.name,
        "dtype": work.dtype,
        "batch": work.batch,
        "prompt_len": work.prompt_len,
        "gen_len": work.gen_len,
        "repetitions": len(runs),
        "prefill_tok_s": statistics.median(prefill),
        "prefill_mean": statistics.fmean(prefill),
        "prefill_spread": statistics.pstdev(prefill),
        "decode_tok_s": statistics.median(decode),
        "decode_mean": statistics.fmean(decode),
        "decode_spread": statistics.pstdev(decode),
        "first_token_ms": 1e3 * statistics.median(t.prefill_s for t in runs),
        "step_ms": 1e3 * step_s,
        "job_s": statistics.median(t.prefill_s + t.decode_s for t in runs),
    }
    if "read_bytes" in facts:
        row["bandwidth_share"] = facts["read_bytes"] / step_s / ceiling
    return (
        row
        | {name: value for name, value in facts.items() if name != "read_bytes"}
        | {"points": runs[len(runs) // 2].points}
    )


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over each other program's speed, in the same run: above 1 is faster."""
    found = []
    for ours in (r for r in rows if r["runner"] == "ours"):
        for peer in rows:
            if peer["runner"] != "ours" and peer["batch"] == ours["batch"]:
                speeds = {name: ours[f"{name}_tok_s"] / peer[f"{name}_tok_s"] for name in ("decode", "prefill")}
                found.append(
                    {
                        "against": peer["runner"],
                        "batch": ours["batch"],
                        **speeds,
                        "job_time": ours["job_s"] / peer["job_s"],
                    }
                )
    return found


def render(rows: Sequence[dict[str, Any]], compared: Sequence[dict[str, Any]], form: str) -> str:
    """The rows in one of ``FORMATS``, with the ratios and heads as lines after the markdown table."""
    return written(
        rows, form, COLUMNS, [*(_compared(each) for each in compared), *(_head(each) for each in heads(rows))]
    )


def written(rows: Sequence[dict[str, Any]], form: str, columns: dict[str, str], notes: Sequence[str]) -> str:
    """Rows of any benchmark in one of ``FORMATS``; a csv leaves out lists.

    Args:
        columns: of the markdown table: name and heading.
        notes: lines after it.
    """
    if form == "json":
        return json.dumps(list(rows), indent=2) + "\n"
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    if form == "csv":
        out = io.StringIO()
        plain = [{name: value for name, value in row.items() if not isinstance(value, list)} for row in rows]
        writer = csv.DictWriter(out, list(dict.fromkeys(name for row in plain for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain)
        return out.getvalue()
    return "\n".join([*table(rows, columns), *([""] if notes else []), *notes]) + "\n"


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    """The lines of a markdown table: those of the columns (name and heading) that some row has."""
    used = [name for name in columns if any(name in row for row in rows)]
    lines = ["| " + " | ".join(columns[name] for name in used) + " |", "|" + "---|" * len(used)]
    return lines + ["| " + " | ".join(_cell(row, name) for name in used) + " |" for row in rows]


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if name in ("prefill_tok_s", "decode_tok_s"):
        return f"{value:.1f} ± {row[name.replace('tok_s', 'spread')]:.1f}"
    if name.endswith("_share"):
        return f"{value:.0%}"
    if name.endswith("_bytes"):
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def heads(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way to choose a token that was timed: what a decode step takes, and how many times the first of
    its run.
    """
    found = []
    for row in rows:
        times: dict[str, float] = row.get("heads_ms", {})
        first = next(iter(times), "")
        found += [
            {**row, "head": head, "ms": ms, "first": first, "ratio": ms / times[first]} for head, ms in times.items()
        ]
    return found


def _head(each: dict[str, Any]) -> str:
    ratio = f"{each['ratio']:.3f} x {each['first']}"
    return f"batch {each['batch']}, a step with head {each['head']}: {each['ms']:.2f} ms, {ratio}"


def _compared(each: dict[str, Any]) -> str:
    return (
        f"ours / {each['against']} at batch {each['batch']}: "
        f"decode {each['decode']:.2f} x, prefill {each['prefill']:.2f} x, "
        f"whole job in {each['job_time']:.2f} of the time"
    )


def plot(rows: Sequence[dict[str, Any]], ceiling: float, path: Path) -> None:
    """Draw tokens per second and milliseconds per step over position, with what the read ceiling would allow.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    library = pyplot()
    figure, (speed, cost) = library.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for row in (r for r in rows if len(r["points"]) > 2):
        label = f"{row['model']}, {row['dtype']}, batch {row['batch']}"
        steps = [
            (b, (t - s) / (b - a))
            for (a, s), (b, t) in zip(row["points"][1:], row["points"][2:], strict=False)
            if b > a
        ]
        positions = [position for position, _ in steps]
        (line,) = speed.plot(positions, [row["batch"] / seconds for _, seconds in steps], label=label)
        cost.plot(positions, [1e3 * seconds for _, seconds in steps], label=label)
        least = row["step_ms"] * row["bandwidth_share"]  # what a step would take at the read ceiling
        cost.axhline(least, color=line.get_color(), linestyle=":", label=f"read ceiling, {ceiling / 1e9:.0f} GB/s")
        speed.axhline(1e3 * row["batch"] / least, color=line.get_color(), linestyle=":")
    speed.set(xlabel="position", ylabel="decoded tokens per second", ylim=(0, None))
    cost.set(xlabel="position", ylabel="milliseconds per step", ylim=(0, None))
    cost.legend(fontsize=8)
    save(figure, path)


def pyplot() -> Any:
    """matplotlib's pyplot, without a display.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as library
    except ImportError as error:
        raise ConfigError(f"{setting('plot')} needs matplotlib: pip install 'llama-xla[bench]'") from error
    return library


def save(figure: Any, path: Path) -> None:
    """Write a figure to a file, and close it.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"plot: {path} cannot be written: {error}") from error
    finally:
        pyplot().close(figure)
