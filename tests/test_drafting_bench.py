"""bench --drafter and --verify_cost: what is counted on a device that can be computed by hand, what is refused, and how
it is shown. Speeds are not tested.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as Sequences
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, Run as RunCommand, finished, refused_at_once
from fakes import fake_llm, next_token

from llama import DraftConfig, SamplingParams, load_tokenizer
from llama.bench import draft_prompts, drafting, report, verify_cost
from llama.bench.draft_prompts import PROMPTS_FILE, Prompt
from llama.bench.draft_runs import Contestant, Run, Timed, Way
from llama.bench.workload import Workload
from llama.cli.bench import _ways, _with_store
from llama.config import DEMO_CONTEXT, DEMO_DIR
from llama.drafting.lookup import Lookup
from llama.drafting.opening import OpenedDrafting
from llama.drafting.suffix import Suffix
from llama.engine.drafting import Drafter, Drafts
from llama.engine.sequence import DraftCounts, Sequence
from llama.errors import ConfigError, RecompileError
from llama.tokenizer import find_tokenizer

WORK = Workload("demo", prompt_len=1, gen_len=12, batch=2, max_seq_len=128)
PARAMS = SamplingParams(12, 0.0)
PLAIN = Way("plain", None)
ORACLE = Way("oracle", DraftConfig(("lookup",)))
PROMPTS = ["the cat", "once", "green house"]


class Oracle(Drafter):
    """Knows what the fake device says next: ``count`` tokens, of which the first ``right`` are right."""

    def __init__(self, vocab_size: int, count: int = 3, right: int = 3) -> None:
        self._vocab_size, self._count, self._right = vocab_size, count, right
        self.told: list[int] = []
        self.ended = 0

    def propose(self, sequences: Sequences[Sequence], draft_len: int) -> Drafts:
        return Drafts.of([self._guess(sequence) for sequence in sequences], draft_len)

    def _guess(self, sequence: Sequence) -> list[int]:
        ids = list(sequence.ids)
        for place in range(self._count):
            token = next_token(ids, self._vocab_size)
            ids.append(token if place < self._right else (token + 1) % self._vocab_size)
        return ids[len(sequence.ids) :]

    def accepted(self, counts: np.ndarray) -> None:
        self.told += counts.tolist()

    def finished(self, sequence: Sequence) -> None:
        self.ended += 1


def contestants(tokenizer_path: Path, **oracle: int) -> tuple[Contestant, Contestant, list[Oracle]]:
    """Plain decoding and the oracle, each warm on its own fake device, and every oracle that is made."""
    made: list[Oracle] = []
    plain = Contestant(PLAIN, fake_llm(tokenizer_path, max_batch_size=2, prefix_cache=False))
    llm = fake_llm(tokenizer_path, max_batch_size=2, prefix_cache=False, draft_lens=(3,))

    def make() -> Oracle:
        made.append(Oracle(llm.vocab_size, **oracle))
        return made[-1]

    drafted = Contestant(ORACLE, llm, make)
    plain.compile()
    drafted.compile()
    made.clear()
    return plain, drafted, made


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_the_prompts_fit_the_demo_model() -> None:
    """With 160 tokens behind them, as many of each task, and no held-out prompt is measured."""
    prompts = draft_prompts.read_prompts(PROMPTS_FILE)
    draft_prompts.check_fit(prompts, load_tokenizer(find_tokenizer(DEMO_DIR)), 160, DEMO_CONTEXT)
    tasks = draft_prompts.by_task(prompts)
    assert {task: len(texts) for task, texts in tasks.items()} == {"copy": 16, "edit": 16, "story": 16}
    assert {text.split(" ")[0] for text in tasks["edit"]} == {"Change", "Shorten:"}
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 3 * (16 + 32)


@pytest.mark.slow
def test_the_prompts_can_be_made_again(tmp_path: Path) -> None:
    """Otherwise run scripts/make_draft_prompts.py."""
    outcome = finished(["scripts/make_draft_prompts.py", "--out", str(tmp_path / "made")])
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "made").read_text() == PROMPTS_FILE.read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Once upon a time\n", ["line 1", "'Once upon a time'", '"task"']),
        ('\n{"task": "copy"}\n', ["line 2", '"prompt"']),
        ('{"task": "copy", "prompt": 3}\n', ["line 1", '"prompt": 3']),
        ('{"task": "", "prompt": "x"}\n', ["line 1"]),
        ('["copy", "x"]\n', ["line 1"]),
        ('{"task": "copy", "prompt": "x", "held_out": "no"}\n', ["line 1", "held_out"]),
        ('{"task": "copy", "prompt": "x", "held_out": true}\n', ["no prompt to measure"]),
        ("", ["no prompt to measure"]),
    ],
)
def test_other_lines_are_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "prompts").write_text(text)
    with pytest.raises(ConfigError, match="prompts_file: ") as refused:
        draft_prompts.read_prompts(tmp_path / "prompts")
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_prompt_without_room_is_refused(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    prompt = Prompt("copy", "once " * 20, False)
    needed = len(tokenizer.encode(prompt.text)) + 30
    draft_prompts.check_fit([prompt], tokenizer, 30, needed)
    with pytest.raises(ConfigError, match=f"got {needed - 1}, expected at least {needed}: .*gen_len 30"):
        draft_prompts.check_fit([prompt], tokenizer, 30, needed - 1)


# --- what a run counts ------------------------------------------------------------------------------------------------


def test_a_run_counts_tokens_and_steps(tokenizer_path: Path) -> None:
    """12 tokens a prompt: 4 a step with three right guesses, wherever the first of them came from."""
    plain, drafted, _ = contestants(tokenizer_path)
    one, other = plain.run(PROMPTS, PARAMS), drafted.run(PROMPTS, PARAMS)
    assert other.texts == one.texts
    assert (one.tokens, one.steps, one.asked) == (33, 33, 0)
    assert other.counts.draft_tokens == other.counts.accepted_tokens
    assert other.asked >= other.counts.drafts > 0
    assert 3 < other.tokens / other.steps <= 4
    assert 0 < other.propose_s < other.job_s
    assert 0 < one.decode_s < one.job_s
    assert (one.compiled, other.compiled) == (0, 0)


@pytest.mark.parametrize("right", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_the_tokens_of_a_step_are_one_and_the_right_guesses(tokenizer_path: Path, right: int, count: int) -> None:
    """With every guess as good as any other a step gives one token more than come true, but at the end of a text."""
    _, drafted, _ = contestants(tokenizer_path, count=count, right=right)
    params = replace(PARAMS, max_gen_len=60)
    run = drafted.run(PROMPTS, params)
    given = 1 + min(right, count)
    assert given - 0.3 < run.tokens / run.steps <= given


def test_a_stop_token_that_was_guessed_is_counted(tokenizer_path: Path) -> None:
    """It ends a step without a token behind it, so tokens cannot be counted as steps and accepted guesses."""
    plain, drafted, _ = contestants(tokenizer_path)
    whole = plain.run(PROMPTS[:1], PARAMS).texts[0]
    for place in range(2, 10):
        if whole.index(whole[place]) < place:
            continue
        params = replace(PARAMS, stop_token_ids=(whole[place],))
        one, other = plain.run(PROMPTS[:1], params), drafted.run(PROMPTS[:1], params)
        assert other.texts == one.texts == [whole[:place]]
        assert one.tokens == one.steps == place
        assert place - 3 <= other.tokens <= place
        assert other.steps == -(-other.tokens // 4)


def test_every_run_has_a_drafter_that_has_learnt_nothing(tokenizer_path: Path) -> None:
    """One drafter a run, told of its own sequences only; the engine drafts no more afterwards."""
    _, drafted, made = contestants(tokenizer_path)
    for _ in range(2):
        drafted.run(PROMPTS, PARAMS)
    assert [oracle.ended for oracle in made] == [3, 3]
    assert made[0].told == made[1].told
    assert drafted.llm.engine.drafting is None


def test_a_new_drafter_keeps_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host learns is gone; what the device holds is loaded once."""
    monkeypatch.setattr(OpenedDrafting, "_medusa", lambda *_: Oracle(9))
    opened = OpenedDrafting(DraftConfig(("suffix", "lookup", "medusa")), None, None, None, None)
    first, second = (opened.drafter(None)._drafters for _ in range(2))  # type: ignore[attr-defined, arg-type]
    assert [type(each) for each in first] == [Suffix, Lookup, Oracle]
    assert [a is b for a, b in zip(first, second, strict=True)] == [False, False, True]


def test_a_timed_drafter_is_the_drafter(tokenizer_path: Path) -> None:
    """Every call reaches it, and a flag that ends a compilation does."""
    inner = Oracle(320)
    timed = Timed(inner)
    sequence = Sequence((1, 2, 3), PARAMS)
    assert timed.propose([sequence, sequence], 3).counts.tolist() == [3, 3]
    timed.accepted(np.array([2, 1]))
    timed.finished(sequence)
    timed.stop_compiling = True
    assert (inner.told, inner.ended, inner.stop_compiling, timed.stop_compiling) == ([2, 1], 1, True, True)
    assert (timed.asked, timed.seconds > 0) == (2, True)


# --- turns, rows and how they are shown -------------------------------------------------------------------------------


class Recorded(Contestant):
    """A contestant whose runs are known."""

    def __init__(self, way: Way, runs: list[Run], turns: list[str]) -> None:
        self.way, self._runs, self._turns = way, runs, turns

    def run(self, prompts: Sequences[str], params: SamplingParams) -> Run:
        self._turns.append(f"{self.way.name} {prompts[0]}")
        return self._runs.pop(0)


def recorded(decode_s: float, steps: int, texts: Sequences[int] = (1, 2), **more: Any) -> Run:
    """100 tokens of two prompts; the prompts took a second."""
    return Run(decode_s, decode_s + 1, 100, steps, [[text] for text in texts], **more)


def measured() -> list[dict[str, Any]]:
    """Rows of two tasks, two rounds each."""
    counts = DraftCounts(drafts=20, draft_tokens=100, accepted_tokens=60)
    more = {"counts": counts, "propose_s": 0.001, "asked": 25}
    plain = [recorded(s, 100) for s in (4.0, 8.0, 4.0, 4.0)]
    drafted = [
        recorded(2.0, 40, **more),
        recorded(2.0, 40, (1, 3), **more),
        recorded(8.0, 100),
        recorded(8.0, 100),
    ]
    turns: list[str] = []
    pair = [Recorded(PLAIN, plain, turns), Recorded(ORACLE, drafted, turns)]
    rows = drafting.compete(pair, WORK, {"copy": ["a"], "story": ["b"]}, 2, PARAMS, lambda _: None)
    assert turns == ["plain a", "oracle a"] * 2 + ["plain b", "oracle b"] * 2
    return rows


COSTS = [
    {
        "model": "demo",
        "dtype": "float32",
        "positions": 512,
        "draft_len": 3,
        "decode_ms": 2.0,
        "verify_ms": 3.0,
        "verify_ratio": 1.5,
    }
]


def test_rows_are_medians_of_ratios_of_one_round() -> None:
    plain, copy, _, story = measured()
    assert [row["task"] for row in (plain, copy, story)] == ["copy", "copy", "story"]
    assert (plain["speedup"], plain["job_speedup"], plain["tokens_per_step"], plain["differ"]) == (1, 1, 1, 0)
    assert copy["speedup"] == pytest.approx((2 + 4) / 2)
    assert (copy["least_speedup"], copy["most_speedup"]) == pytest.approx((2, 4))
    assert copy["job_speedup"] == pytest.approx((5 / 3 + 9 / 3) / 2)
    assert copy["tokens_per_step"] == pytest.approx(2.5)
    assert copy["decode_tok_s"] == pytest.approx(50)
    assert copy["accepted_share"] == pytest.approx(0.6)
    assert copy["accepted_len"] == pytest.approx(1 + 60 / 20)
    assert copy["propose_us"] == pytest.approx(40)
    assert (copy["differ"], copy["compiled_after_warm_up"], copy["batch"]) == (1, 0, 2)
    assert story["speedup"] == pytest.approx(0.5)
    assert story["accepted_share"] is story["accepted_len"] is story["propose_us"] is None  # nothing was drafted


def test_runs_that_say_nothing_are_errors() -> None:
    with pytest.raises(RecompileError, match="copy, plain: 2 programs were compiled"):
        drafting._check_runs("copy, plain", [recorded(1.0, 100, compiled=2)])
    with pytest.raises(ConfigError, match=r"copy, plain: .*one token at most"):
        drafting._check_runs("copy, plain", [replace(recorded(1.0, 100), tokens=0)])


def test_the_table_and_its_notes(tmp_path: Path) -> None:
    rows = measured()
    lines = report.written(rows, "md", drafting.COLUMNS, drafting.notes(rows, COSTS)).splitlines()
    assert lines[0].startswith("| drafter | model | weights | batch | task | tokens/step | accepted | mean length |")
    assert lines[3] == (
        "| oracle | demo | float32 | 2 | copy | 2.50 | 60% | 4.00 | 50.0 ± 0.0 | 3.00 | 2.33 | 40.00 | 1 |"
    )
    assert lines[-2:] == [
        "demo, float32, one row: a step that checks 3 drafts takes 1.50 decode steps (3.00 ms / 2.00 ms)",
        "texts that differ from plain decoding: oracle, batch 2: 1; nothing was compiled after the warm-up",
    ]
    assert "all texts are equal" in drafting.notes(rows[:1], [])[0]
    pytest.importorskip("matplotlib")
    drafting.plot(rows, tmp_path / "drafting.png")
    assert (tmp_path / "drafting.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_results_are_written_between_their_marks(tmp_path: Path) -> None:
    """scripts/bench_table.py fills the section of drafting, and no other."""
    results = [
        {"measured": "drafting", "rows": measured(), "verify_cost": COSTS},
        {"measured": "verify_cost", "rows": [{**COSTS[0], "model": "110m"}]},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in results))
    kept = "<!-- startup: begin -->\nstarts\n<!-- startup: end -->\n"
    (tmp_path / "full.md").write_text(f"{kept}<!-- drafting: begin -->\nold\n<!-- drafting: end -->\nz\n")
    names = ["results.jsonl", "full.md", "readme.md"]
    outcome = finished(["scripts/bench_table.py", *(str(tmp_path / name) for name in names)])
    assert outcome.code == 0, outcome.err
    written = (tmp_path / "full.md").read_text()
    assert written.startswith(f"{kept}<!-- drafting: begin -->\n\n")
    assert written.endswith("\n\n<!-- drafting: end -->\nz\n")
    assert "old" not in written
    assert "| oracle | demo | float32 | 2 | story | 1.00 |" in written
    assert "| demo | float32 | 512 | 3 | 2.00 | 3.00 | 1.50 |\n| 110m |" in written


# --- the cost of checking ---------------------------------------------------------------------------------------------


def test_kinds_of_steps_take_turns() -> None:
    """From the same state each, and the first round does not count."""
    calls: list[str] = []
    times = verify_cost.alternating((0, 3), lambda: calls.append("begin"), lambda k: calls.append(f"step {k}"), 2)
    assert calls == ["begin", "step 0", "begin", "step 3"] * 3
    assert {draft_len: len(found) for draft_len, found in times.items()} == {0: 2, 3: 2}


def test_costs_are_medians_in_decode_steps() -> None:
    (three, seven) = verify_cost.ratios({0: [0.002, 0.009, 0.001], 3: [0.003, 0.003, 0.008], 7: [0.005]})
    assert three == pytest.approx({"draft_len": 3, "decode_ms": 2.0, "verify_ms": 3.0, "verify_ratio": 1.5})
    assert seven["verify_ratio"] == pytest.approx(2.5)


# --- flags ------------------------------------------------------------------------------------------------------------

UNSET: dict[str, Any] = dict.fromkeys(
    ("drafter", "draft_lens", "draft_ckpt_dir", "medusa_dir", "datastore", "word_bank", "lookup_order", "lookahead")
)


def test_each_drafter_gets_the_settings_that_are_its_own() -> None:
    given = {**UNSET, "drafter": "auto,medusa, model", "medusa_dir": "m", "draft_ckpt_dir": "d", "draft_lens": [5]}
    settings, store = _with_store(given, Path("store"))
    assert store is None
    assert _ways(settings, each=False) == [Way("auto,medusa,model", settings)]
    assert _ways(settings, each=True) == [
        Way("auto", DraftConfig(("auto",), (5,))),
        Way("medusa", DraftConfig(("medusa",), (5,), medusa_dir="m")),
        Way("model", DraftConfig(("model",), (5,), draft_ckpt_dir="d")),
    ]


def test_retrieval_gets_a_datastore_where_it_has_no_texts() -> None:
    path = Path("store")
    settings, store = _with_store({**UNSET, "drafter": "retrieval"}, path)
    assert (settings.datastore, store) == (path, path)
    for name in ("datastore", "word_bank"):
        settings, store = _with_store({**UNSET, "drafter": "retrieval", name: "x"}, path)
        assert (getattr(settings, name), store) == ("x", None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--drafter", "lookup", "--startup"], ["--startup", "--drafter"]),
        (["--drafter", "lookup", "--warm_up"], ["--warm_up", "--drafter"]),
        (["--drafter", "lookup", "--mixed", "4"], ["--mixed", "--drafter"]),
        (["--drafter", "lookup", "--verify_cost"], ["--verify_cost", "--drafter"]),
        (["--drafter", "lookup", "--compare", "hf"], ["--drafter", "--compare"]),
        (["--drafter", "lookup", "--heads", "greedy"], ["--drafter", "--heads"]),
        (["--drafter", "lookup", "--slots", "4"], ["--drafter", "--slots"]),
        (["--drafter", "lookup", "-p", "9"], ["--drafter", "--prompt_len"]),
        (["--drafter", "lookup", "--vocab_size", "900"], ["--vocab_size"]),
        (["--drafter", "lookup", "--shape", "110m"], ["--drafter", "random weights", "--ckpt_dir", "--verify_cost"]),
        (["--drafter", "guess"], ["--drafter", "guess", "lookup"]),
        (["--drafter", "lookup", "--medusa_dir", "x"], ["--medusa_dir", "does not use it"]),
        (["--drafter", "model", "--each"], ["--drafter", "--draft_ckpt_dir"]),
        (["--drafter", "lookup", "-n", "1"], ["--gen_len", "got 1"]),
        (["--drafter", "lookup", "-n", "500"], ["--max_seq_len", "got 512", "--gen_len 500"]),
        (["--drafter", "lookup", "--temperature", "-1"], ["--temperature", "-1"]),
        (["--drafter", "lookup", "--prompts_file", "/nowhere"], ["--prompts_file", "/nowhere", '"task"']),
        (["--drafter", "lookup", "--plot", "/nowhere/at/all.png"], ["--plot", "no such directory"]),
        (["--drafter", "medusa", "--medusa_dir", "/nowhere"], ["/nowhere"]),
        (["--each"], ["--each", "--drafter"]),
        (["--prompts_file", "x"], ["--prompts_file", "--drafter"]),
        (["--temperature", "0"], ["--temperature", "--drafter"]),
        (["--draft_lens", "3"], ["--draft_lens", "--drafter"]),
        (["--verify_cost", "--batch", "8"], ["--verify_cost", "--batch"]),
        (["--verify_cost", "--plot", "x.png"], ["--verify_cost", "--plot"]),
        (["--verify_cost", "--draft_lens", "99"], ["--draft_lens", "99"]),
    ],
)
def test_flags_that_do_not_go_together_are_refused(run: RunCommand, flags: list[str], words: list[str]) -> None:
    refused_at_once(run("bench", *flags), *words)


def test_retrieval_without_texts_is_refused(run: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text('{"task": "copy", "prompt": "x"}\n')
    flags = ["--drafter", "retrieval", "--prompts_file", str(tmp_path / "prompts")]
    refused_at_once(run("bench", *flags), "--drafter", "held_out", "--datastore")


# --- on the device ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    """A prompt of each task; a drafter whose datastore is made on the way, one with a window, and the cost of both."""
    prompts = draft_prompts.read_prompts(PROMPTS_FILE)
    few = {(prompt.task, prompt.held_out): prompt for prompt in prompts}.values()
    lines = [json.dumps({"task": p.task, "prompt": p.text, "held_out": p.held_out}) for p in few]
    (tmp_path / "prompts").write_text("\n".join(lines))
    flags = ["--drafter", "retrieval,lookahead", "--each", "-n", "16", "-r", "1", "--draft_lens", "3"]
    outcome = finished(["-m", "llama.cli", "bench", *flags, "--prompts_file", str(tmp_path / "prompts")])
    assert outcome.code == 0, outcome.err
    assert "nothing was compiled after the warm-up" in outcome.out
    found = json.loads(outcome.out.splitlines()[-1])
    rows = {(row["runner"], row["task"]): row for row in found["rows"]}
    assert set(rows) == {(n, t) for n in ("plain", "retrieval", "lookahead") for t in ("copy", "edit", "story")}
    assert all(row["compiled_after_warm_up"] == 0 and row["decode_tok_s"] > 0 for row in rows.values())
    assert all(1 <= row["tokens_per_step"] <= 4 for row in rows.values())
    assert all(rows["lookahead", task]["draft_tokens"] > 0 for task in ("copy", "edit", "story"))
    (cost,) = found["verify_cost"]
    assert (cost["draft_len"], cost["model"]) == (3, "demo")
    assert cost["verify_ms"] > 0


@pytest.mark.slow
def test_the_cost_of_checking_needs_no_trained_weights(run: RunCommand) -> None:
    outcome = run("bench", "--verify_cost", "--shape", "tiny", "--draft_lens", "2", "--max_seq_len", "64", "-r", "1")
    assert outcome.code == 0, outcome.err
    (row,) = json.loads(outcome.out.splitlines()[-1])["rows"]
    assert (row["model"], row["draft_len"], row["positions"], row["rounds"]) == ("tiny", 2, 64, 5)
    assert row["verify_ratio"] == pytest.approx(row["verify_ms"] / row["decode_ms"])


def test_the_file_of_prompts_is_in_the_package() -> None:
    """setup.py names it; an editable install would not miss it."""
    assert f'"{PROMPTS_FILE.relative_to(ROOT / "llama")}"' in (ROOT / "setup.py").read_text()
