"""What XLA made of the programs: a summary of the optimised HLO that a dump directory holds. Text in, text out; it
knows no device.

``--xla_dump_to`` writes a file for each program and stage; the one called ``after_optimizations`` is what runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OPERATION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
RUN = re.compile(r"branch_computations=\{([^}]*)\}|(?:body|true_computation|false_computation)=%?([\w.-]+)")
CALL = re.compile(r" call\(.*to_apply=%?([\w.-]+)")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
SHOWN = 8


@dataclass(frozen=True)
class ProgramSummary:
    """One program.

    Attributes:
        name: of its file.
        operations: how many of each kind its computations have: the entry, loops' bodies and branches, each once.
        copies: bytes that their copy operations write.
        aliases: outputs that take over an input's memory.
        largest: bytes written by kind of operation, the most first.
        scratch: bytes that a run needs beside its inputs and outputs; 0 where XLA wrote no report of it.
    """

    name: str
    operations: Counter[str]
    copies: int
    aliases: int
    largest: list[tuple[str, int]]
    scratch: int


def summarise(path: Path) -> ProgramSummary:
    """Read one ``*after_optimizations.txt``."""
    text = path.read_text(encoding="utf-8")
    header, _, _ = text.partition("\n")
    operations: Counter[str] = Counter()
    written: Counter[str] = Counter()
    for line in run_lines(text):
        found = OPERATION.match(line)
        if found is None or found[3] in ("parameter", "constant", "bitcast", "get-tuple-element", "tuple"):
            continue
        size = BYTES.get(found[1], 4)
        for extent in filter(None, found[2].split(",")):
            size *= int(extent)
        operations[found[3]] += 1
        if "dynamic-update-slice" not in line.partition("=")[0]:  # in place: it writes its update only
            written[found[3]] += size
    aliases = len(re.findall(r"-alias\)", header))
    return ProgramSummary(
        path.name, operations, written["copy"], aliases, written.most_common(SHOWN), scratch_bytes(path)
    )


def run_lines(text: str) -> Iterator[str]:
    """The lines of the entry computation and of those that it runs: bodies, branches and calls, not the insides of
    fusions.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        header = COMPUTATION.match(line)
        if header is not None:
            lines = computations.setdefault("ENTRY" if header[1] else header[2], [])
        lines.append(line)
    waiting, seen = ["ENTRY"], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in computations:
            continue
        seen.add(name)
        for line in computations[name]:
            yield line
            for found in RUN.finditer(line):
                waiting += [each.strip(" %") for each in (found[1] or found[2]).split(",")]
            called = CALL.search(line)
            if called is not None:
                waiting.append(called[1])


def scratch_bytes(path: Path) -> int:
    """What XLA's own report beside a program's text says of its temporary buffers."""
    buffers = path.with_name(path.name.replace(".txt", "-buffer-assignment.txt"))
    if not buffers.exists():
        return 0
    return sum(
        int(size)
        for size in re.findall(r"^allocation \d+: size (\d+), preallocated-temp", buffers.read_text("utf-8"), re.M)
    )


def report(directory: Path) -> Iterator[str]:
    """A few lines a program of a dump directory, the largest programs first."""
    paths = sorted(directory.glob("*after_optimizations.txt"), key=lambda path: -path.stat().st_size)
    for summary in map(summarise, paths):
        memory = f"{summary.aliases} aliases, {summary.copies} bytes copied, {summary.scratch:,} of scratch"
        yield f"{summary.name}: {summary.operations.total()} operations, {memory}"
        counts = ", ".join(f"{kind} {count}" for kind, count in summary.operations.most_common(SHOWN))
        yield f"    operations: {counts}"
        yield "    bytes written: " + ", ".join(f"{kind} {size:,}" for kind, size in summary.largest)
