"""Decoding at positions far into the cache: who takes part, what is counted, how it is shown. Speeds are not tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Run, finished, refused_at_once

from llama.bench import positions
from llama.bench.ours import OursRunner
from llama.bench.workload import Times, Workload
from llama.errors import ConfigError
from llama.xla.counters import counters

WORK = Workload("tiny", prompt_len=70, gen_len=5, depths=(9, 70))


class FakeChild:
    """A process whose steps take a millisecond a position, twice that for llama.cpp."""

    made: list[FakeChild]
    turns: list[tuple[str, str, int]]

    def __init__(self, runner: str, work: Workload) -> None:
        if work.batch > 1:
            raise ConfigError("batch: refused")
        self.runner, self.work, self.is_closed = runner, work, False
        cache = work.cache_dtype if runner == "ours" else "float16"
        self.facts: dict[str, Any] = {"cache_dtype": cache, "peak_bytes": 2**20}
        self.made.append(self)

    def decode_at(self, position: int) -> Times:
        self.turns.append((self.runner, self.facts["cache_dtype"], position))
        return Times(9.0, 1e-3 * position * 4 * (2 if self.runner == "llama.cpp" else 1))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeChild]:
    """Processes that measure nothing."""
    FakeChild.made, FakeChild.turns = [], []
    monkeypatch.setattr(positions, "Child", FakeChild)
    return FakeChild


def test_a_workload_with_depths_survives_the_pipe() -> None:
    assert Workload.from_json(WORK.to_json()) == WORK
    for depths in ((0, 9), (9, 71)):
        with pytest.raises(ConfigError, match=r"depths: got .* expected 1 to prompt_len 70"):
            Workload("tiny", prompt_len=70, depths=depths)


def test_programs_and_caches_take_turns_at_every_position(fake: type[FakeChild]) -> None:
    """Four steps each; the speeds of a millisecond a position; ratios at the same position."""
    rows = positions.measure(WORK, ["llama.cpp"], 2, lambda _: None)
    everyone = [("ours", "float32"), ("ours", "bfloat16"), ("llama.cpp", "float16")]
    assert fake.turns == 2 * [(*one, position) for position in (9, 70) for one in everyone]
    assert all(child.is_closed for child in fake.made)
    assert [(row["runner"], row["cache_dtype"], row["position"]) for row in rows] == [
        (*one, position) for one in everyone for position in (9, 70)
    ]
    assert [row["decode_tok_s"] for row in rows] == pytest.approx(2 * [1e3 / 9, 1e3 / 70] + [1e3 / 18, 1e3 / 140])
    assert [row["step_ms"] for row in rows[:2]] == pytest.approx([9, 70])
    compared = positions.ratios(rows)
    assert [(each["cache_dtype"], each["position"]) for each in compared] == [
        (dtype, position) for dtype in ("float32", "bfloat16") for position in (9, 70)
    ]
    assert [each["decode"] for each in compared] == pytest.approx([2.0] * 4)
    assert positions.note(compared[1]) == "ours / llama.cpp at position 70, our cache float32: decode 2.00 x"


def test_a_named_cache_is_the_only_one(fake: type[FakeChild]) -> None:
    work = Workload("tiny", prompt_len=9, gen_len=2, depths=(9,), cache_dtype="bfloat16")
    rows = positions.measure(work, [], 1, lambda _: None)
    assert [(row["runner"], row["cache_dtype"]) for row in rows] == [("ours", "bfloat16")]
    assert positions.ratios(rows) == []


def test_processes_end_where_one_of_them_fails(fake: type[FakeChild], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeChild, position: int) -> Times:
        raise ConfigError("broken")

    monkeypatch.setattr(fake, "decode_at", fail)
    with pytest.raises(ConfigError, match="broken"):
        positions.measure(WORK, ["llama.cpp"], 1, lambda _: None)
    assert len(fake.made) == 3
    assert all(child.is_closed for child in fake.made)


def test_the_picture_has_a_line_for_each_cache(
    fake: type[FakeChild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    rows = positions.measure(WORK, ["llama.cpp"], 1, lambda _: None)
    kept: list[Any] = []
    save = positions.report.save
    monkeypatch.setattr(
        positions.report, "save", lambda figure, path: (kept.extend(figure.axes[0].get_lines()), save(figure, path))
    )
    positions.plot(rows, tmp_path / "positions.png")
    assert (tmp_path / "positions.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    labels = ["llama-xla, cache float32", "llama-xla, cache bfloat16", "llama.cpp, cache float16"]
    assert [line.get_label() for line in kept] == labels
    assert [list(line.get_xdata()) for line in kept] == [[9, 70]] * 3
    assert list(kept[2].get_ydata()) == pytest.approx([1e3 / 18, 1e3 / 140])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--positions", "0,9"], ["--positions", "1 or more"]),
        (["--positions", "x"], ["--positions", "'x'", "whole number"]),
        (["--positions", "9", "--batch", "2"], ["--positions", "--batch"]),
        (["--positions", "9", "--prompt_len", "9"], ["--positions", "--prompt_len"]),
        (["--positions", "9", "--mixed", "3"], ["--mixed", "--positions"]),
        (["--positions", "9", "--startup"], ["--startup", "--positions"]),
        (["--positions", "9", "--compare", "hf"], ["--compare hf", "expected llama.cpp or none"]),
        (["--positions", "9", "-n", "1"], ["--gen_len", "got 1", "at least 2"]),
        (["--positions", "9,90", "--max_seq_len", "100"], ["--max_seq_len", "got 100", "90", "32"]),
    ],
)
def test_flags_that_do_not_go_together_are_refused(run: Run, flags: list[str], words: list[str]) -> None:
    refused_at_once(run("bench", "--shape", "tiny", *flags), *words)


def test_results_are_written_between_their_marks(fake: type[FakeChild], tmp_path: Path) -> None:
    """scripts/bench_table.py fills the section of positions, and no other."""
    rows = positions.measure(WORK, ["llama.cpp"], 1, lambda _: None)
    result = {"measured": "positions", "rows": rows, "ratios": positions.ratios(rows)}
    (tmp_path / "results.jsonl").write_text(json.dumps(result) + "\n")
    kept = "<!-- startup: begin -->\nstarts\n<!-- startup: end -->\n"
    (tmp_path / "full.md").write_text(f"{kept}<!-- positions: begin -->\nold\n<!-- positions: end -->\nz\n")
    names = ["results.jsonl", "full.md", "readme.md"]
    outcome = finished(["scripts/bench_table.py", *(str(tmp_path / name) for name in names)])
    assert outcome.code == 0, outcome.err
    written = (tmp_path / "full.md").read_text()
    assert written.startswith(f"{kept}<!-- positions: begin -->\n\n")
    assert "old" not in written
    assert "| ours | tiny | float32 | bfloat16 | 9 | 111.1 ± 0.0 |" in written
    assert "| llama.cpp | tiny | float32 | bfloat16 | 70 | 2.00 |" in written


@pytest.mark.slow
def test_nothing_is_compiled_while_positions_are_timed() -> None:
    """And the tokens at a position are those of a prompt of that length that nothing was cached of."""
    ours = OursRunner(WORK)
    compiled = counters.compiled
    found = {}
    for position in (70, 9, 70, 9, 9):
        assert ours.decode_at(position).decode_s > 0
        assert found.setdefault(position, ours.chosen) == ours.chosen
    assert counters.compiled == compiled
    for position, chosen in found.items():
        assert OursRunner(Workload("tiny", prompt_len=position, gen_len=5)).chosen == chosen


@pytest.mark.slow
def test_bench_decodes_at_positions(tmp_path: Path) -> None:
    """The whole command in processes of its own."""
    pytest.importorskip("llama_cpp")
    flags = ["--shape", "tiny", "--positions", "40,8", "-n", "3", "-r", "1", "--compare", "llama.cpp"]
    outcome = finished(["-m", "llama.cli", "bench", *flags, "--plot", str(tmp_path / "positions.png")])
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out.splitlines()[-1])
    assert found["measured"] == "positions"
    assert [(row["runner"], row["cache_dtype"], row["position"]) for row in found["rows"]] == [
        (*one, position)
        for one in (("ours", "float32"), ("ours", "bfloat16"), ("llama.cpp", "float16"))
        for position in (8, 40)
    ]
    assert all(row["decode_tok_s"] > 0 and row["peak_bytes"] > 0 for row in found["rows"])
    assert len(found["ratios"]) == 4
    assert "ours / llama.cpp at position 40, our cache bfloat16: decode" in outcome.out
    assert (tmp_path / "positions.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
