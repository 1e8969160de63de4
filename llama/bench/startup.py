"""How long a fresh process takes to its first token, and what a full warm-up costs, beside other versions.

Every measurement is a process of its own, run in an empty directory. The processes of all programs take turns, and one
run of each is not counted: it fills the page cache. The clock is the parent's: it starts before the process does and
stops at the first byte on the process's stdout. Every program prints one JSON line when its first token is known, so
the same clock serves all of them. The phases are what a program says of itself in that line.

This version and another one run ``llama-xla generate``. llama.cpp runs ``llama_cpp_process.py``, a full warm-up
``warm_up_process.py``. The text of these two files is handed to ``python -c``, so that ``llama`` is the package of the
version under test and nothing else is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import llama
from llama.bench import report
from llama.bench.workload import WEIGHTS_SEED, Workload
from llama.config import DEMO_DIR, ModelArgs
from llama.errors import ConfigError, FlagError, setting

PHASES = {
    "import_s": "import",
    "device_s": "device",
    "load_s": "load",
    "compile_s": "compile",
    "prefill_s": "prefill",
    "other_s": "other",
}
WORK = {"runner": "program", "model": "model", "dtype": "weights"}
COLUMNS = {
    **WORK,
    "prompt_len": "prompt",
    **{name: f"{label} s" for name, label in PHASES.items()},
    "first_s": "first token s",
    "least_s": "fastest s",
    "cpu_s": "CPU s",
    "programs": "programs",
    "peak_bytes": "peak memory",
}
WARM_UP_COLUMNS = {
    **WORK,
    "n_layers": "layers",
    "slots": "slots",
    "programs": "programs",
    "wall_s": "warm-up s",
    "least_s": "fastest s",
    "cpu_s": "CPU s",
    "peak_bytes": "peak memory",
}
NO_SUCH_FLAG = 2  # exit code
ERROR_TAIL = 500  # characters


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: exit code, negative for a signal.
        first_s: seconds from before its start to the first byte on its stdout, or to the end of stdout.
        cpu_s: CPU seconds of the process and the children that it waited for.
        peak_bytes: most resident memory.
    """

    code: int
    out: str
    err: str
    first_s: float
    cpu_s: float
    peak_bytes: int


def run_process(command: Sequence[str], import_from: Path | None = None) -> Ended:
    """Run a process in an empty directory, and time its first byte of output.

    The process is killed if this call is interrupted.

    Args:
        command: program and arguments; paths must be absolute.
        import_from: directory in which Python looks for packages first.
    """
    environment = dict(os.environ)
    if import_from is not None:
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(import_from), *([known] if known else [])])
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=empty,
            env=environment,
        )
        assert process.stdout is not None
        try:
            out = process.stdout.read(1)
            first_s = time.perf_counter() - began
            out += process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
            process.stdout.close()
        log.seek(0)
        err = log.read().decode(errors="replace")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Ended(process.returncode, out.decode(errors="replace"), err, first_s, cpu_s, usage.ru_maxrss * 1024)


def answer_of(ended: Ended, name: str) -> dict[str, Any]:
    """Return the JSON object on the last line of a process's stdout.

    Raises:
        ConfigError: the process failed, or printed something else.
    """
    if ended.code:
        raise ConfigError(f"the process of {name} ended with code {ended.code}: {ended.err.strip()[-ERROR_TAIL:]}")
    try:
        answer = json.loads((ended.out.splitlines() or [""])[-1])
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ConfigError(
            f"the process of {name} printed {ended.out[-ERROR_TAIL:]!r}, expected a JSON object as its last line"
        )
    return answer


@dataclass(frozen=True)
class Start:
    """One process from its start to its first token.

    Attributes:
        first_s: seconds to the first token, by the parent's clock.
        cpu_s, peak_bytes: see Ended.
        phases: seconds by name, of ``PHASES``; ``other_s`` is the part of ``first_s`` that no phase covers.
        programs: programs compiled; None where nothing is.
    """

    first_s: float
    cpu_s: float
    peak_bytes: int
    phases: dict[str, float]
    programs: int | None

    @classmethod
    def of(cls, ended: Ended, name: str) -> Start:
        """Read what a process printed.

        ``startup`` holds the phases. A version that does not print it has ``timing``: importing and starting the
        device are not in it.

        Raises:
            ConfigError: the process failed, or printed neither.
        """
        answer = answer_of(ended, name)
        try:
            if "startup" in answer:
                found = answer["startup"]
                phases = {phase: float(found[phase]) for phase in PHASES if phase in found}
                programs = found.get("programs")
            else:
                found = answer["timing"]
                phases = {"load_s": found["load_s"], "compile_s": found["compile_s"], "prefill_s": found["ttft_s"]}
                programs = answer["programs"]["compiled"]
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"the process of {name} printed a line without times: {ended.out[-ERROR_TAIL:]!r}; "
                "expected startup, or timing and programs, as generate --json prints them"
            ) from None
        phases["other_s"] = max(ended.first_s - sum(phases.values()), 0.0)
        return cls(ended.first_s, ended.cpu_s, ended.peak_bytes, phases, programs)


class Startable(Protocol):
    """A program whose start is measured."""

    name: str

    def start(self, work: Workload, directory: Path) -> Start:
        """Run a fresh process to its first token, with the checkpoint in ``directory``."""


class Version:
    """A version of this project: a directory that holds the package ``llama``.

    Args:
        root: the directory; None means the version that is running, ``ours``.

    Attributes:
        name: how tables call it: the git commit, or the directory's name.

    Raises:
        FlagError: there is no such package.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(llama.__file__).parents[1] if root is None else root.absolute()
        if not (self.root / "llama/cli/__init__.py").is_file():
            raise FlagError(
                f"--other_version: got {root}, expected a checkout of this project, with llama/cli in it; "
                "make one by git worktree add DIR COMMIT"
            )
        self.commit = commit_of(self.root)
        self.name = "ours" if root is None else self.commit or self.root.name
        self._has_timings = True  # until it refuses the flag

    def start(self, work: Workload, directory: Path) -> Start:
        """Run ``generate`` for one token."""
        command = [sys.executable, "-m", "llama.cli", *generate_flags(work, directory)]
        if self._has_timings:
            ended = run_process([*command, "--timings"], self.root)
            self._has_timings = not (ended.code == NO_SUCH_FLAG and "unknown flag --timings" in ended.err)
        if not self._has_timings:
            ended = run_process(command, self.root)
        return Start.of(ended, self.name)

    def warm_up(self, work: Workload, n_layers: int | None) -> dict[str, Any]:
        """Compile every program in a fresh process.

        Args:
            work: ``batch`` slots of ``positions`` each.
            n_layers: of the random model; None means the shape's own.

        Returns:
            ``wall_s`` and ``cpu_s`` of the warm-up alone, ``programs`` (None if this version cannot tell), and
            ``peak_bytes`` of the process.
        """
        given = {
            "ckpt_dir": None if work.directory is None else str(work.directory.absolute()),
            "args": None if work.args is None else shape_of(work.args, n_layers),
            "seed": WEIGHTS_SEED,
            "config": {
                "max_seq_len": work.positions,
                "max_batch_size": work.batch,
                "dtype": work.dtype,
                "bucket_policy": work.bucket_policy,
                **({"buckets": work.buckets} if work.buckets else {}),
                **({} if work.cache_dtype == "auto" else {"cache_dtype": work.cache_dtype}),  # older versions lack it
            },
        }
        ended = run_process([sys.executable, "-c", script("warm_up_process"), json.dumps(given)], self.root)
        return {**answer_of(ended, self.name), "peak_bytes": ended.peak_bytes}


class LlamaCpp:
    """llama.cpp in a process that imports nothing but llama-cpp-python.

    Args:
        path: the checkpoint's weights as GGUF.
    """

    name = "llama.cpp"

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, work: Workload, directory: Path) -> Start:
        """Load the weights, evaluate the prompt, and sample one token."""
        numbers = [str(self._path), str(work.prompt_len), str(work.positions)]
        return Start.of(run_process([sys.executable, "-c", script("llama_cpp_process"), *numbers]), self.name)


def generate_flags(work: Workload, directory: Path) -> list[str]:
    """The command line of one token after a synthetic prompt; BOS is one of its tokens."""
    flags = {
        "ckpt_dir": str(directory.absolute()),
        "prompt_len": str(work.prompt_len - 1),
        "max_gen_len": "1",
        "max_seq_len": str(work.positions),
        "temperature": "0",
        "dtype": work.dtype,
        "bucket_policy": work.bucket_policy,
    }
    if work.buckets:
        flags["buckets"] = ",".join(map(str, work.buckets))
    if work.cache_dtype != "auto":  # which another version may lack
        flags["cache_dtype"] = work.cache_dtype
    return ["generate", *(f"--{name}={value}" for name, value in flags.items()), "--json", "--quiet"]


def shape_of(args: ModelArgs, n_layers: int | None) -> dict[str, Any]:
    """The fields of a shape that differ from the defaults, which another version may lack."""
    args = args if n_layers is None else replace(args, n_layers=n_layers)
    defaults = asdict(ModelArgs())
    return {name: value for name, value in asdict(args).items() if value != defaults[name]}


def script(name: str) -> str:
    """The text of a file beside this one, for ``python -c``."""
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


def commit_of(root: Path) -> str | None:
    """The git commit that a directory is the checkout of, ``-dirty`` if files were changed; None if it is none."""
    asked = (["rev-parse", "--show-toplevel"], ["describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"])
    try:
        top, commit = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit if Path(top).resolve() == root.resolve() else None


@contextmanager
def place_for_files(keep: Path | None) -> Iterator[Path]:
    """Yield ``keep``, or a temporary directory that is removed afterwards."""
    if keep is not None:
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def write_checkpoint(work: Workload, place: Path) -> Path:
    """Write a shape's random weights once, as one file in Meta's format beside the demo model's tokenizer.

    Weights are stored in bfloat16 if the workload says so, else in float32. A directory that is there is not written
    again.

    Returns:
        The checkpoint's directory; that of a workload that has one.

    Raises:
        ConfigError, CheckpointError: the vocabulary is smaller than the tokenizer's; the disk refused.
    """
    if work.directory is not None:
        return work.directory
    args = work.args
    assert args is not None  # no directory: random weights
    least = json.loads((DEMO_DIR / "params.json").read_text(encoding="utf-8"))["vocab_size"]
    if args.vocab_size < least:
        raise ConfigError(f"vocab_size: got {args.vocab_size}, expected at least {least}, the demo tokenizer's")
    stored = "bfloat16" if work.dtype == "bfloat16" else "float32"
    target = place / f"{work.shape}-{args.vocab_size}-{stored}"
    if target.is_dir():
        return target
    import torch  # takes seconds, and is not needed where the files are there

    from llama.bench.peers import weights_of
    from llama.checkpoint.writing import Scratch, json_bytes, new_directory

    with new_directory(target) as directory, Scratch(directory / "weights.scratch") as scratch:
        (directory / "params.json").write_bytes(json_bytes(args.to_params()))
        shutil.copyfile(DEMO_DIR / "tokenizer.model", directory / "tokenizer.model")
        for name, tensor in weights_of(work)[1]:
            scratch.append(name, tensor.to(getattr(torch, stored)))
        scratch.pack(directory / "consolidated.00.pth", lambda _: None)
    return target


def write_llama_cpp_file(work: Workload, directory: Path, place: Path) -> Path:
    """Write the checkpoint in ``directory`` for llama.cpp; return the file.

    A file that is there is not written again.

    Raises:
        ConfigError: llama-cpp-python or gguf is not installed.
    """
    from importlib.util import find_spec

    if find_spec("llama_cpp") is None or find_spec("gguf") is None:
        raise ConfigError(
            f"{setting('compare')} llama.cpp needs llama-cpp-python and gguf: pip install 'llama-xla[bench]'"
        )
    path = place / f"{directory.absolute().name}-{work.dtype}.gguf"
    if not path.exists():
        from llama.bench.peers import write_gguf

        partial = path.with_suffix(".partial")
        try:
            write_gguf(replace(work, ckpt_dir=str(directory), vocab_size=None), partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def measure(
    works: Sequence[Workload],
    directory: Path,
    programs: Sequence[Startable],
    repetitions: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Start every program for every workload, taking turns; return a row for each.

    Args:
        works: differ in their prompts.
        directory: the checkpoint.
        repetitions: rounds that are counted.
        say: called with a line for people before something takes long.
    """
    for program in programs:
        say(f"Filling the page cache: {program.name}")
        program.start(works[0], directory)
    rows = []
    for work in works:
        runs: list[list[Start]] = [[] for _ in programs]
        for number in range(1, repetitions + 1):
            say(f"Prompt of {work.prompt_len} tokens, round {number} of {repetitions}")
            for program, starts in zip(programs, runs, strict=True):
                starts.append(program.start(work, directory))
        rows += [summarise(work, program, starts) for program, starts in zip(programs, runs, strict=True)]
    return rows


def summarise(work: Workload, program: Startable, starts: Sequence[Start]) -> dict[str, Any]:
    """One row: the run with the median time (the lower of two), whose phases add up, and the fastest time."""
    ranked = sorted(starts, key=lambda start: start.first_s)
    median = ranked[(len(ranked) - 1) // 2]
    return {
        "runner": program.name,
        "commit": program.commit if isinstance(program, Version) else None,
        "model": work.name,
        "dtype": work.dtype,
        "prompt_len": work.prompt_len,
        "max_seq_len": work.positions,
        "repetitions": len(starts),
        **median.phases,
        "first_s": median.first_s,
        "least_s": ranked[0].first_s,
        "cpu_s": median.cpu_s,
        "programs": median.programs,
        "peak_bytes": median.peak_bytes,
        "runs_s": [start.first_s for start in starts],
    }


def measure_warm_up(
    works: Sequence[tuple[Workload, int | None]],
    versions: Sequence[Version],
    repetitions: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Warm every version up for every workload, taking turns; return a row for each.

    Args:
        works: with the layers of the random model; None means the shape's own.
        repetitions: rounds; all of them count.
        say: as for ``measure``.
    """
    rows = []
    for work, n_layers in works:
        runs: list[list[dict[str, Any]]] = [[] for _ in versions]
        for number in range(1, repetitions + 1):
            for version, found in zip(versions, runs, strict=True):
                layers = "" if n_layers is None else f"{n_layers} layers, "
                say(f"Warming up {version.name}: {layers}{work.batch} slots, round {number} of {repetitions}")
                found.append(version.warm_up(work, n_layers))
        for version, found in zip(versions, runs, strict=True):
            ranked = sorted(found, key=lambda each: float(each["wall_s"]))
            head = {"runner": version.name, "commit": version.commit, "model": work.name, "dtype": work.dtype}
            depth = n_layers or (None if work.args is None else work.args.n_layers)
            size = {"n_layers": depth, "slots": work.batch, "max_seq_len": work.positions, "repetitions": repetitions}
            median = ranked[(len(ranked) - 1) // 2]
            runs_s = [each["wall_s"] for each in found]
            rows.append({**head, **size, **median, "least_s": ranked[0]["wall_s"], "runs_s": runs_s})
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our seconds over every other program's for the same work: below 1 is faster."""
    same = ("prompt_len", "n_layers", "slots")
    times = ("first_s", "wall_s", "least_s", "cpu_s")
    found = []
    for ours in (row for row in rows if row["runner"] == "ours"):
        for other in rows:
            if other["runner"] != "ours" and all(other.get(name) == ours.get(name) for name in same):
                head = {"against": other["runner"], **{name: ours[name] for name in same if name in ours}}
                found.append(head | {name: ours[name] / other[name] for name in times if name in ours})
    return found


def notes(compared: Sequence[dict[str, Any]]) -> list[str]:
    """The ratios as lines for people."""
    lines = []
    for each in compared:
        if "first_s" in each:
            what = f"prompt of {each['prompt_len']}: first token in {each['first_s']:.2f} of the time"
        else:
            layers = "" if each["n_layers"] is None else f"{each['n_layers']} layers, "
            what = f"{layers}{each['slots']} slots: warm-up in {each['wall_s']:.2f} of the time"
        what += f" ({each['least_s']:.2f} of the fastest), {each['cpu_s']:.2f} of the CPU seconds"
        lines.append(f"ours / {each['against']}, {what}")
    return lines


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw one bar per row from process start to first token, in phases.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    figure, axes = report.pyplot().subplots(figsize=(10, 1.6 + 0.5 * len(rows)), layout="constrained")
    labels = [f"{row['runner']}, prompt of {row['prompt_len']}" for row in rows]
    starts = [0.0] * len(rows)
    # interpreter start and imports that a program does not time come first, so they are drawn first
    for phase in ("other_s", *(name for name in PHASES if name != "other_s")):
        lengths = [row.get(phase) or 0.0 for row in rows]
        if any(lengths):
            label = "interpreter, not itemised" if phase == "other_s" else PHASES[phase]
            axes.barh(range(len(rows)), lengths, left=starts, height=0.65, label=label, color=COLOURS[phase])
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    for place, (end, row) in enumerate(zip(starts, rows, strict=True)):
        axes.annotate(f"{row['first_s']:.1f} s", (end, place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(starts))
    axes.set_xlabel("seconds from process start to first token")
    axes.set_title(f"{rows[0]['model']}, {rows[0]['dtype']}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PHASES), frameon=False)
    report.save(figure, path)


COLOURS = {
    "other_s": "#bbbbbb",
    "import_s": "#8877bb",
    "device_s": "#44aa99",
    "load_s": "#4477aa",
    "compile_s": "#cc6677",
    "prefill_s": "#ddaa33",
}
