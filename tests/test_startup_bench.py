"""bench --startup and --warm_up: how processes are timed and read, on small programs that stand for this project and
for llama.cpp. Speeds are not tested.
"""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run, finished, refused_at_once

from llama.bench import report, startup
from llama.bench.workload import Workload
from llama.checkpoint import open_checkpoint
from llama.errors import ConfigError, FlagError

WORK = Workload("demo", prompt_len=20, gen_len=2, max_seq_len=64)
PHASES = {"import_s": 1.5, "device_s": 0.5, "load_s": 0.25, "compile_s": 4.0, "prefill_s": 0.75}
LINE = {"index": 0, "generation": "a", "startup": {**PHASES, "total_s": 7.2, "programs": 3}}
# as commit a24bb4a printed it, without its longest texts
OLDER_LINE = json.loads(
    '{"index": 0, "sample": 0, "prompt": "", "generation": "e", "token_ids": [277], "finish_reason": "length", '
    '"stop_reason": null, "usage": {"prompt_tokens": 20, "cached_tokens": 0, "completion_tokens": 1}, "timing": '
    '{"load_s": 7.294518, "compile_s": 6.07135, "ttft_s": 0.140498, "prefill_s": 0.140441, "decode_s": 5.7e-05, '
    '"prefill_tok_s": 142.408413, "decode_tok_s": 0.0}, "programs": {"compiled": 3, "runs": 7}, "seed": 1}'
)

GENERATE = """
import json, sys
if {refuses} and "--timings" in sys.argv:
    print("llama-xla: unknown flag --timings; --help lists the flags", file=sys.stderr)
    sys.exit(2)
{before}
print(json.dumps({line} | {{"argv": sys.argv[1:]}}), flush=True)
{after}
"""
LIBRARY = """
import time
from types import SimpleNamespace

counters = SimpleNamespace(compiled=2)

class EngineConfig:
    buckets = (8, 1)
    def __init__(self, **given): self.given = given

class ModelArgs(EngineConfig): pass

class LLaMA:
    @classmethod
    def build(cls, ckpt_dir, *, config, random_weights, seed):
        assert set(config.given) == {"max_seq_len", "max_batch_size", "dtype", "bucket_policy", "buckets"}
        assert config.given["buckets"] == (8, 1)
        cls.rows, cls.layers = config.given["max_batch_size"], random_weights.given.get("n_layers")
        return cls()

    def warm_up(self):
        ends = time.process_time() + 0.1
        while time.process_time() < ends: pass
        time.sleep(0.1)
        counters.compiled += 10 * self.rows + self.layers
"""


def version(
    root: Path, line: dict[str, Any] = LINE, *, refuses: bool = False, before: str = "", after: str = ""
) -> Path:
    """A directory that looks like this project and prints ``line`` instead of generating."""
    package = root / "llama"
    (package / "cli").mkdir(parents=True)
    (package / "cli/__init__.py").touch()
    script = GENERATE.format(
        refuses=refuses, line=repr(line), before=textwrap.dedent(before), after=textwrap.dedent(after)
    )
    (package / "cli/__main__.py").write_text(script)
    (package / "__init__.py").touch()
    (package / "runtime.py").write_text(LIBRARY)
    for name in ("config", "generation"):
        (package / f"{name}.py").write_text("from llama.runtime import *\n")
    return root


def ended(line: dict[str, Any], first_s: float = 8.0) -> startup.Ended:
    return startup.Ended(0, json.dumps(line) + "\n", "", first_s, 9.0, 2**30)


def start(first_s: float, **phases: float) -> startup.Start:
    """A start whose phases take no time unless they are given."""
    return startup.Start.of(ended({"startup": {**dict.fromkeys(PHASES, 0.0), **phases, "programs": 3}}, first_s), "x")


def test_phases_are_read_from_the_line_and_add_up() -> None:
    found = startup.Start.of(ended(LINE), "ours")
    assert found.phases == {**PHASES, "other_s": 1.0}
    assert (found.first_s, found.programs, found.peak_bytes) == (8.0, 3, 2**30)


def test_an_older_version_is_read_from_its_timing() -> None:
    found = startup.Start.of(ended(OLDER_LINE, 18.0), "a24bb4a")
    assert found.programs == 3
    assert found.phases == pytest.approx(
        {"load_s": 7.294518, "compile_s": 6.07135, "prefill_s": 0.140498, "other_s": 4.493634}
    )


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "printed '', expected a JSON object"),
        ("hello\n", r"printed 'hello\\n', expected a JSON object"),
        ('{"generation": "a"}\n', "without times"),
        ('{"startup": null}\n', "without times"),
        ('{"startup": {"load_s": "fast"}}\n', "without times"),
    ],
)
def test_other_output_is_an_error(out: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"process of x.*{message}"):
        startup.Start.of(startup.Ended(0, out, "", 1.0, 1.0, 1), "x")


def test_the_clock_stops_at_the_first_byte() -> None:
    """Not at the end of the process, and CPU seconds count the whole of it."""
    code = "import sys, time; time.sleep(0.2); print('x', flush=True); time.sleep(0.6); sys.exit('late')"
    began = time.perf_counter()
    found = startup.run_process([sys.executable, "-c", code])
    assert 0.2 < found.first_s < time.perf_counter() - began - 0.5
    assert (found.code, found.out, found.err) == (1, "x\n", "late\n")
    assert 0 < found.cpu_s < 0.5
    assert found.peak_bytes > 2**20


def test_a_version_is_asked_for_timings_until_it_refuses(tmp_path: Path) -> None:
    new = startup.Version(version(tmp_path / "new", after="sys.stderr.write(str(sys.argv))"))
    assert new.start(WORK, tmp_path).phases["compile_s"] == 4.0
    old = startup.Version(version(tmp_path / "old", OLDER_LINE, refuses=True))
    for _ in range(2):
        assert "import_s" not in old.start(WORK, tmp_path).phases
        assert not old._has_timings
    assert (new.name, old.name) == ("new", "old")  # no git commit: the directory's


def test_the_process_is_generate_for_one_token(tmp_path: Path) -> None:
    """The prompt's length counts BOS; paths hold in another directory."""
    flags = startup.generate_flags(Workload("tiny", None, 20, 2, 1, "int8", 64, (8, 1), "pad"), Path("somewhere"))
    assert flags[0] == "generate"
    assert {"--prompt_len=19", "--max_gen_len=1", "--temperature=0", "--json", "--dtype=int8", "--buckets=8,1"} < set(
        flags
    )
    assert {"--max_seq_len=64", "--bucket_policy=pad", f"--ckpt_dir={Path.cwd() / 'somewhere'}"} < set(flags)
    from llama import cli
    from llama.cli.flags import normalise

    assert normalise(cli.COMMANDS["generate"], flags[1:])  # flags that this version has


def test_a_version_is_named_by_its_commit(tmp_path: Path) -> None:
    root = version(tmp_path / "checkout")
    assert startup.commit_of(root) is None
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    commit = startup.Version(root).name
    assert len(commit) >= 7
    assert startup.commit_of(root / "llama") is None  # within a checkout is not a checkout
    (root / "llama/__init__.py").write_text("x = 1\n")
    assert startup.commit_of(root) == f"{commit}-dirty"
    with pytest.raises(FlagError, match=r"--other_version: got .*, expected a checkout"):
        startup.Version(root / "llama")


def test_a_full_warm_up_is_timed_by_wall_and_cpu(tmp_path: Path) -> None:
    """Of the warm-up alone; an older version's counters are found where it had them."""
    other = startup.Version(version(tmp_path / "other"))
    work = Workload("110m", prompt_len=1, gen_len=2, batch=8, max_seq_len=64, buckets=(8, 1))
    (row,) = startup.measure_warm_up([(work, 3)], [other], 1, lambda _: None)
    assert (row["programs"], row["slots"], row["n_layers"]) == (10 * 8 + 3, 8, 3)
    assert 0.05 < row["cpu_s"] < row["wall_s"]
    assert startup.shape_of(startup.ModelArgs(dim=64), None) == {"dim": 64}  # nothing that an older version may lack


def test_llama_cpp_runs_beside_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process imports llama_cpp only, and evaluates as many tokens as the others."""
    (tmp_path / "llama_cpp.py").write_text(
        textwrap.dedent(
            """
            import sys
            class Llama:
                def __init__(self, path, **given): assert (path, given["n_ctx"]) == ("/w.gguf", 64)
                def eval(self, ids): assert ids == [1] + [8] * 19
                def sample(self, **given): assert not {"torch", "llama"} & set(sys.modules)
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = startup.LlamaCpp(Path("/w.gguf")).start(WORK, tmp_path)
    assert set(found.phases) == {"import_s", "load_s", "prefill_s", "other_s"}
    assert found.programs is None


class Named:
    """A program whose starts are known."""

    def __init__(self, name: str, starts: list[startup.Start], turns: list[str]) -> None:
        self.name, self._starts, self._turns = name, starts, turns

    def start(self, work: Workload, directory: Path) -> startup.Start:
        self._turns.append(self.name)
        return self._starts.pop(0)


def measured() -> list[dict[str, Any]]:
    """Rows of two programs in three rounds; the first start of each is not counted."""
    turns: list[str] = []
    ours = Named("ours", [start(99.0), start(4.0, compile_s=2.0), start(3.0, compile_s=1.0), start(5.0)], turns)
    other = Named("a24bb4a", [start(99.0), start(8.0, compile_s=6.0), start(9.0), start(7.0)], turns)
    rows = startup.measure([WORK], Path(), [ours, other], 3, lambda _: None)
    assert turns == ["ours", "a24bb4a"] * 4
    return rows


def test_rows_are_median_runs_and_ratios_are_of_them() -> None:
    ours, other = measured()
    assert (ours["first_s"], ours["least_s"], ours["compile_s"], ours["other_s"]) == (4.0, 3.0, 2.0, 2.0)
    assert (other["first_s"], other["least_s"], other["runs_s"]) == (8.0, 7.0, [8.0, 9.0, 7.0])
    (ratio,) = startup.ratios([ours, other])
    assert ratio == {"against": "a24bb4a", "prompt_len": 20, "first_s": 0.5, "least_s": 3 / 7, "cpu_s": 1.0}
    (line,) = startup.notes([ratio])
    assert line == (
        "ours / a24bb4a, prompt of 20: first token in 0.50 of the time (0.43 of the fastest), 1.00 of the CPU seconds"
    )


def test_every_format_holds_the_rows(tmp_path: Path) -> None:
    rows = measured()
    for form in ("json", "jsonl"):
        text = report.written(rows, form, startup.COLUMNS, ["note"])
        assert (json.loads(text) if form == "json" else [json.loads(line) for line in text.splitlines()]) == rows
    table = list(csv.DictReader(io.StringIO(report.written(rows, "csv", startup.COLUMNS, ["note"]))))
    assert [row["first_s"] for row in table] == ["4.0", "8.0"]
    head, _, ours, *_, last = report.written(rows, "md", startup.COLUMNS, ["note"]).splitlines()
    assert head.startswith(
        "| program | model | weights | prompt | import s | device s | load s | compile s | prefill s |"
    )
    assert ours.startswith("| ours | demo | float32 | 20 | 0.00 | 0.00 | 0.00 | 2.00 | 0.00 | 2.00 | 4.00 | 3.00 |")
    assert last == "note"
    pytest.importorskip("matplotlib")
    startup.plot(rows, tmp_path / "startup.png")
    assert (tmp_path / "startup.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_checkpoint_is_written_once(tmp_path: Path) -> None:
    """Seeded random weights in Meta's format, in one file, beside a tokenizer; they are what peers get."""
    from llama.bench.peers import weights_of

    work = Workload("tiny")
    directory = startup.write_checkpoint(work, tmp_path)
    assert {p.name for p in directory.iterdir()} == {"params.json", "consolidated.00.pth", "tokenizer.model"}
    written = dict(open_checkpoint(directory).tensors())
    for name, tensor in weights_of(work)[1]:
        assert torch.equal(written[name], tensor)
    (directory / "params.json").touch(mode=0o600)
    before = (directory / "consolidated.00.pth").stat().st_mtime_ns
    assert startup.write_checkpoint(work, tmp_path) == directory
    assert (directory / "consolidated.00.pth").stat().st_mtime_ns == before
    narrow = startup.write_checkpoint(Workload("tiny", dtype="bfloat16"), tmp_path)
    assert dict(open_checkpoint(narrow).tensors())["output.weight"].dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="vocab_size: got 1000, expected at least 1024"):
        startup.write_checkpoint(Workload("tiny", vocab_size=1000), tmp_path)


def test_the_command_prints_a_table_and_one_object(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = version(tmp_path / "ours")
    monkeypatch.setattr("llama.__file__", str(ours / "llama/__init__.py"))
    other = version(tmp_path / "other", OLDER_LINE, refuses=True)
    outcome = run("bench", "--startup", "--shape", "demo", "-p", "20,30", "-r", "1", "--other_version", str(other))
    assert outcome.code == 0, outcome.err
    *table, last = outcome.out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:6]] == ["ours", "other"] * 2
    assert sum(line.startswith("ours / other, prompt of") for line in table) == 2
    found = json.loads(last)
    assert (found["measured"], [row["prompt_len"] for row in found["rows"]]) == ("startup", [20, 20, 30, 30])
    assert all(row["max_seq_len"] == 512 for row in found["rows"])  # the demo model's
    outcome = run(
        "bench", "--warm_up", "-r", "1", "--buckets", "8,1", "--n_layers", "3,4", "--other_version", str(other)
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out.splitlines()[-1])
    assert [(row["n_layers"], row["slots"], row["programs"]) for row in found["rows"][::2]] == [
        (3, 1, 13),
        (3, 8, 83),
        (4, 1, 14),
        (4, 8, 84),
    ]
    assert len(found["ratios"]) == 4


def test_a_process_that_fails_shows_its_error(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = version(tmp_path / "ours")
    monkeypatch.setattr("llama.__file__", str(ours / "llama/__init__.py"))
    other = version(tmp_path / "other", before="sys.exit('llama-xla: no such luck')")
    outcome = run("bench", "--startup", "--shape", "demo", "-p", "20", "--other_version", str(other))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.message == "llama-xla: the process of other ended with code 1: llama-xla: no such luck"


@pytest.mark.slow
def test_an_interrupt_ends_the_process_that_runs(tmp_path: Path) -> None:
    """Ctrl-C at the parent alone, too, as kill sends it; the process would run for a minute."""
    before = f"""
        import os, pathlib, time
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
        time.sleep(60)
    """
    root = version(tmp_path / "ours", before=before)
    code = (
        f"import llama; llama.__file__ = {str(root / 'llama/__init__.py')!r}; from llama.cli import main; "
        "main(['bench', '--startup', '--shape', 'demo', '-p', '20'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as parent:
        for _ in range(300):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                break
            time.sleep(0.1)
        parent.send_signal(signal.SIGINT)
        _, err = parent.communicate(timeout=10)
    assert parent.returncode == 130
    assert err.splitlines()[-1] == "llama-xla: interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--startup", "--warm_up"], ["--startup", "--warm_up", "leave one of them out"]),
        (["--startup", "--batch", "8"], ["--startup", "--batch"]),
        (["--startup", "--heads", "greedy"], ["--startup", "--heads"]),
        (["--startup", "--mixed", "8"], ["--startup", "--mixed"]),
        (["--startup", "-n", "8"], ["--startup", "--gen_len"]),
        (["--startup", "--n_layers", "8"], ["--startup", "--n_layers"]),
        (["--startup", "--compare", "hf"], ["--startup", "--compare hf", "llama.cpp"]),
        (["--startup", "-p", "1"], ["--prompt_len", "got 1", "at least 2"]),
        (["--startup", "-p", "512", "--max_seq_len", "100"], ["--max_seq_len", "got 100"]),
        (["--startup", "--other_version", "/nowhere"], ["--other_version", "/nowhere", "git worktree add"]),
        (["--startup", "--keep", "/nowhere"], ["--keep", "/nowhere", "make it first"]),
        (["--startup", "--plot", "/nowhere/at/all.png"], ["--plot", "no such directory"]),
        (["--startup", "--dtype", "fp8"], ["--dtype", "'fp8'", "bfloat16"]),
        (["--warm_up", "-p", "8"], ["--warm_up", "--prompt_len"]),
        (["--warm_up", "--compare", "llama.cpp"], ["--warm_up", "--compare"]),
        (["--warm_up", "--keep", "/tmp"], ["--warm_up", "--keep"]),
        (["--warm_up", "--shape", "demo", "--n_layers", "2"], ["--n_layers", "--shape"]),
        (["--warm_up", "--n_layers", "0"], ["--n_layers", "got 0"]),
        (["--keep", "/tmp"], ["--keep", "--startup"]),
        (["--n_layers", "3"], ["--n_layers", "--warm_up"]),
        (["-p", "8,9"], ["--prompt_len", "--startup"]),
    ],
)
def test_flags_that_do_not_go_together_are_refused(run: Run, flags: list[str], words: list[str]) -> None:
    refused_at_once(run("bench", "--shape", "110m", *flags) if "demo" not in flags else run("bench", *flags), *words)


def test_results_are_written_between_their_marks(tmp_path: Path) -> None:
    """scripts/bench_table.py fills the section of start-up, and keeps the table of speeds, which has no results."""
    rows = measured()
    result = {"measured": "startup", "rows": rows, "ratios": startup.ratios(rows)}
    (tmp_path / "results.jsonl").write_text(json.dumps(result) + "\n")
    text = (
        "a\n<!-- bench: begin -->\nspeeds\n<!-- bench: end -->\n"
        "<!-- startup: begin -->\nold\n<!-- startup: end -->\nz\n"
    )
    (tmp_path / "full.md").write_text(text)
    names = ["results.jsonl", "full.md", "readme.md"]
    outcome = finished(["scripts/bench_table.py", *(str(tmp_path / name) for name in names)])
    assert outcome.code == 0, outcome.err
    written = (tmp_path / "full.md").read_text()
    assert written.startswith(text.partition("\nold")[0])
    assert written.endswith("<!-- startup: end -->\nz\n")
    assert "old" not in written
    assert "| a24bb4a | demo | 20 | 0.50 | 0.43 | 1.00 |" in written
    assert not (tmp_path / "readme.md").exists()


@pytest.mark.slow
def test_the_start_of_this_version() -> None:
    """Real processes of the demo model to a first token."""
    outcome = finished(["-m", "llama.cli", "bench", "--startup", "--shape", "demo", "-p", "9", "-r", "1"])
    assert outcome.code == 0, outcome.err
    (row,) = json.loads(outcome.out.splitlines()[-1])["rows"]
    assert row["programs"] >= 2
    assert 0 < row["prefill_s"] < row["first_s"]
    assert row["compile_s"] > 0


@pytest.mark.slow
def test_the_warm_up_of_this_version() -> None:
    """A real process through a full warm-up of few programs."""
    flags = ["--warm_up", "--shape", "tiny", "--batch", "1", "-r", "1", "--max_seq_len", "64", "--buckets", "8,1"]
    outcome = finished(["-m", "llama.cli", "bench", *flags])
    assert outcome.code == 0, outcome.err
    (row,) = json.loads(outcome.out.splitlines()[-1])["rows"]
    assert row["programs"] >= 5
    assert row["cpu_s"] > 0
