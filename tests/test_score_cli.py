"""`llama-xla score` as a user meets it: what is refused and when, what is printed, and what Ctrl-C leaves.

Most tests run the demo model on the examples of docs/.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import PROCESS_TIMEOUT_S, ROOT, Outcome, Run, exit_code, finished, process, refused_at_once
from test_cli import CtrlCAt

from llama.cli.score import _clipped, _one_line, _unescaped
from llama.config import DEMO_CONTEXT, DEMO_DIR
from llama.multiple_choice import FewShot, fitting, make_questions, read_items
from llama.tokenizer import find_tokenizer, load_tokenizer

EXAMPLES = ROOT / "docs" / "examples"
STORIES, PRONOUNS = EXAMPLES / "stories.jsonl", EXAMPLES / "pronouns.jsonl"
TRAIN = EXAMPLES / "stories_train.jsonl"
TEMPLATE = "{context} {choice} "
FIELDS = [
    *("index", "chosen", "chosen_norm", "chosen_token", "gold", "skipped"),
    *("logprobs", "is_greedy", "tokens", "context_tokens", "cached_tokens", "truncated_tokens"),
]
SUMMARY_FIELDS = [
    *("items", "scored", "skipped", "truncated", "judged", "tokens", "cached_tokens"),
    *("accuracy", "acc_norm", "acc_token", "macro_f1", "macro_f1_norm", "macro_f1_token", "classes"),
]


def items_file(tmp_path: Path, *items: dict[str, Any]) -> Path:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def parsed(outcome: Outcome) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The answers and the summary that --json prints."""
    *answers, last = outcome.objects
    assert list(last) == ["summary"]
    return answers, last["summary"]


# --- refused before anything is loaded


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", ["--file is needed"]),
        ("absent.jsonl", ["absent.jsonl", "No such file", '"choices"']),
        ("docs", ["docs", "directory"]),
        ("README.md", ["README.md, line 1", "not JSON"]),
        ("{items} more.jsonl", ["unexpected argument", "'more.jsonl'"]),
        ("{items} --shot 4", ["unknown flag --shot", "--shots"]),
        ("{items} --shots -1", ["--shots: got -1", "0 or more"]),
        ("{items} --shots many", ["--shots", "'many'", "whole number"]),
        ("{items} --shots 40", ["item 0", "got 39 other items", "expected 40", "--shots 39 at most", "--shots_file"]),
        ("{items} --shots_file {items}", ["--shots_file", "without --shots"]),
        ("{items} --shots 1 --shots_file absent.jsonl", ["absent.jsonl", "No such file"]),
        ("{items} --shots_seed -1", ["--shots_seed: got -1", "0 or more"]),
        ("{items} --template {{context}}", ["--template: got '{context}'", "metaicl or lm-eval", "{choice}"]),
        ("{items} --limit 0", ["--limit: got 0", "at least 1"]),
        ("{items} --too_long drop", ["--too_long", "'drop'", "refuse, truncate, skip"]),
        ("{items} --dtype fp8", ["--dtype", "'fp8'", "bfloat16"]),
        ("{items} --max_batch_size 0", ["--max_batch_size: got 0", "at least 1"]),
        ("{items} --buckets 8", ["--buckets", "1 among them"]),
        ("{items} --bucket_policy lazy", ["--bucket_policy", "'lazy'"]),
        ("{items} --max_seq_len 20", ["item ", ", choice ", "does not fit", "--max_seq_len 3", "truncate or skip"]),
        ("{items} --max_seq_len 12 --too_long truncate", ["the continuation alone has", "--max_seq_len 20"]),
    ],
)
def test_a_wrong_command_line_costs_no_waiting(run: Run, flags: str, words: list[str]) -> None:
    refused_at_once(run("score", *flags.format(items=STORIES).split()), *words)


def test_demonstrations_that_do_not_fit_are_refused_at_once(run: Run) -> None:
    """They are part of the context, whose tokens the message counts."""
    outcome = run("score", str(STORIES), "--shots", "30", "--shots_file", str(TRAIN))
    refused_at_once(outcome, "does not fit", "--max_seq_len", f"at most {DEMO_CONTEXT + 1}")


def test_a_checkpoint_s_errors_come_as_one_line(run: Run, tmp_path: Path) -> None:
    outcome = run("score", str(STORIES), "--ckpt_dir", str(tmp_path / "absent"), "--quiet")
    refused_at_once(outcome, "no such directory")


@pytest.mark.slow
def test_torch_is_not_imported_for_a_refusal() -> None:
    """Neither for a wrong file nor for one that does not fit."""
    program = (
        "import sys; from llama import cli; c = cli._exit_code(sys.argv[1:]); "
        "print(*sys.modules, sep='\\n'); sys.exit(c)"
    )
    outcome = finished(["-c", program, "score", str(STORIES), "--max_seq_len", "20"])
    assert outcome.code == 2, outcome.err
    assert "llama.multiple_choice" in outcome.out.splitlines()
    assert {"torch", "torch_xla"}.isdisjoint(outcome.out.splitlines())


# --- texts


def test_a_template_s_line_breaks_may_be_typed() -> None:
    r"""\n and \t in a shell's argument; a backslash before anything else stays."""
    assert _unescaped(r"Q: {context}\nA:\t{choice}\\n\x") == "Q: {context}\nA:\t{choice}\\n\\x"


def test_texts_in_the_table_stay_on_their_line() -> None:
    """Whatever a file holds: line breaks, and what would move the cursor, color the terminal or turn the writing."""
    assert _one_line("a\n\n b\tc\x1b[31m\u2028d\r\x07") == "a b c\\x1b[31m d \\x07"
    assert _one_line("a\u202eb\x9bc\x7f\u200bd\ue000 ") == "a\\u202eb\\x9bc\\x7f d"
    assert _one_line("caf\u00e9 \u6f22") == "caf\u00e9 \u6f22"
    assert [_clipped("abcdefgh", room) for room in (8, 7)] == ["abcdefgh", "abcd..."]


@pytest.mark.slow
def test_the_examples_are_the_script_s(tmp_path: Path) -> None:
    """One seed makes them, byte for byte."""
    script = ROOT / "scripts" / "make_score_examples.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    names = ("pronouns.jsonl", "pronouns_train.jsonl", "stories.jsonl", "stories_train.jsonl")
    assert made == {name: (EXAMPLES / name).read_bytes() for name in names}


@pytest.mark.parametrize("template", ["metaicl", "lm-eval", TEMPLATE])
@pytest.mark.parametrize("name", ["stories", "pronouns"])
def test_sixteen_demonstrations_fit_the_demo_model(name: str, template: str) -> None:
    """The longest ones, whatever the seed draws, with every item."""
    tokenizer = load_tokenizer(find_tokenizer(DEMO_DIR))
    items, pool = read_items(EXAMPLES / f"{name}.jsonl"), read_items(EXAMPLES / f"{name}_train.jsonl")
    few_shot = FewShot(16, 0, template)
    longest = sorted(pool, key=lambda item: len(tokenizer.encode(few_shot.demonstration(item))))[-16:]
    questions = make_questions(tokenizer, items, few_shot, longest)
    assert fitting(questions, DEMO_CONTEXT + 1, "refuse") == questions


# --- the demo model


@pytest.mark.slow
def test_json_is_one_object_an_item_and_the_summary(run: Run) -> None:
    """In the order of the items; chosen is the place of the highest log-probability, and the summary adds up. The demo
    model is far above chance, with demonstrations that are computed once.
    """
    flags = ["--shots", "4", "--shots_file", str(TRAIN), "--template", TEMPLATE]
    outcome = run("score", str(STORIES), *flags, "--json")
    assert outcome.code == 0, outcome.err
    answers, summary = parsed(outcome)
    items = read_items(STORIES)
    assert [answer["index"] for answer in answers] == list(range(len(items)))
    for answer, item in zip(answers, items, strict=True):
        assert list(answer) == FIELDS
        logprobs = answer["logprobs"]
        assert len(logprobs) == len(item.choices)
        assert answer["chosen"] == logprobs.index(max(logprobs))
        rates = [logprob / len(choice) for logprob, choice in zip(logprobs, item.choices, strict=True)]
        assert answer["chosen_norm"] == rates.index(max(rates))
        rates = [logprob / tokens for logprob, tokens in zip(logprobs, answer["tokens"], strict=True)]
        assert answer["chosen_token"] == rates.index(max(rates))
        assert (answer["gold"], answer["skipped"], answer["truncated_tokens"]) == (item.gold, False, [0] * 4)
    assert list(summary) == SUMMARY_FIELDS
    assert (summary["items"], summary["scored"], summary["judged"]) == (40, 40, 40)
    for figure, rule in (("accuracy", "chosen"), ("acc_norm", "chosen_norm"), ("acc_token", "chosen_token")):
        right = sum(answer[rule] == answer["gold"] for answer in answers)
        assert summary[figure] == right / 40
    assert summary["accuracy"] > 0.6  # of four choices
    assert sum(each["items"] for each in summary["classes"]) == 40
    assert summary["tokens"] == sum(sum(answer["tokens"]) + sum(answer["context_tokens"]) for answer in answers)
    assert summary["cached_tokens"] == sum(sum(answer["cached_tokens"]) for answer in answers)
    assert summary["cached_tokens"] > 0.7 * summary["tokens"]


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_library(run: Run, tmp_path: Path) -> None:
    """Of the texts that a reader would write down: a demonstration, then context and choice, joined by line breaks."""
    from llama import EngineConfig, LLaMA

    shot = {"context": "One day it rained.", "choices": ["They ran home.", "It grew."], "gold": "They ran home."}
    begun = "One day it rained.\nThey ran home.\n\n\n"
    asked = [(f"{begun}{item.context}", f"\n{choice}") for item in read_items(STORIES)[:3] for choice in item.choices]
    llm = LLaMA.build(config=EngineConfig(max_seq_len=DEMO_CONTEXT, max_batch_size=4))
    contexts, continuations = [pair[0] for pair in asked], [pair[1] for pair in asked]
    expected = [score.logprob for score in llm.score(contexts, continuations) if score is not None]
    flags = ["--shots", "1", "--shots_file", str(items_file(tmp_path, shot)), "--limit", "3", "--max_batch_size", "2"]
    answers, _ = parsed(run("score", str(STORIES), *flags, "--json", "--quiet"))
    assert [logprob for answer in answers for logprob in answer["logprobs"]] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_a_reader_s_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line an item, as wide as the terminal; the figures are those of --json; the log is short."""
    monkeypatch.setenv("COLUMNS", "80")
    flags = ["--template", TEMPLATE, "--limit", "12", "--max_batch_size", "2"]
    outcome = run("score", str(PRONOUNS), *flags)
    answers, summary = parsed(run("score", str(PRONOUNS), *flags, "--json", "--quiet"))
    assert outcome.code == 0
    header, *lines = outcome.out.split("\n\n")[0].splitlines()
    assert header.split() == ["item", "sum", "norm", "token", "gold", "context", ">", "choice"]
    assert len(lines) == 12
    assert max(map(len, lines)) <= 80
    for row, answer, item in zip(lines, answers, read_items(PRONOUNS), strict=False):
        places = [answer["chosen"], answer["chosen_norm"], answer["chosen_token"], answer["gold"]]
        mark = "+" if answer["chosen"] == answer["gold"] else "-"
        assert row.split()[:6] == [str(answer["index"]), mark, *map(str, places)]
        assert row.endswith(f"{item.context[-20:]} > {item.choices[answer['chosen']]}")
    assert "12 of 12 items scored, 0 skipped, 0 truncated" in outcome.out
    figures = [line.split()[-2:] for line in outcome.out.split("\n\n")[2].splitlines()[1:]]
    assert [float(accuracy) for accuracy, _ in figures] == pytest.approx(
        [summary["accuracy"], summary["acc_norm"], summary["acc_token"]], abs=5e-4
    )
    assert [float(f1) for _, f1 in figures] == pytest.approx(
        [summary["macro_f1"], summary["macro_f1_norm"], summary["macro_f1_token"]], abs=5e-4
    )
    classes = outcome.out.split("\n\n")[3].splitlines()
    assert classes[0].split() == ["class", "precision", "recall", "F1", "items"]
    assert [line.split()[0] for line in classes[1:]] == ["She", "He", "They", "It"]
    assert [line.split()[0] for line in outcome.err.splitlines()] == [
        "Importing",
        "Loading",
        "Scoring",
        "Compiling",
        "Done",
    ][-len(outcome.err.splitlines()) :]


@pytest.mark.slow
def test_items_that_are_hard_to_print(run: Run, tmp_path: Path) -> None:
    """One item, no right choice, an empty context, and characters that the model never saw."""
    path = items_file(tmp_path, {"context": "", "choices": ["\u6f22\u5b57\n\x1b[31m", "\U0001f642 b"]})
    outcome = run("score", str(path), "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert "\x1b" not in outcome.out
    assert "\\x1b[31m" in outcome.out or " > \U0001f642 b" in outcome.out  # the chosen one
    assert outcome.out.splitlines()[1].split()[:2] in (["0", "0"], ["0", "1"])
    assert outcome.out.endswith("from the cache\n")  # no figures follow
    assert "0 with a right choice" in outcome.out


@pytest.mark.slow
@pytest.mark.parametrize("too_long", ["skip", "truncate"])
def test_items_that_are_too_long(run: Run, tmp_path: Path, too_long: str) -> None:
    """They are counted on stdout and named in the log; an item that is left out has its line, too."""
    short = {"context": "It rained.", "choices": ["They ran home.", "It grew."], "gold": 0}
    path = items_file(tmp_path, short, {**short, "context": "It rained and rained. " * 12}, short)
    flags = ["--max_seq_len", "64", "--max_batch_size", "2", "--too_long", too_long]
    outcome = run("score", str(path), *flags, "--json")
    answers, summary = parsed(outcome)
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    skips = too_long == "skip"
    assert [answer["skipped"] for answer in answers] == [False, skips, False]
    assert [max(answer["truncated_tokens"], default=0) > 0 for answer in answers] == [False, not skips, False]
    assert (summary["scored"], summary["skipped"], summary["truncated"]) == ((2, 1, 0) if skips else (3, 0, 1))
    assert ("Skipped 1 of 3 items" if skips else "Cut 2 of 6 contexts") in outcome.err
    if skips:
        table = run("score", str(path), *flags, "--quiet").out
        assert "     1    skipped: too long\n" in table
        assert "2 of 3 items scored, 1 skipped, 0 truncated" in table


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The answers so far and their figures are printed, and the old handler is back."""
    stdout = CtrlCAt('"index": 0')
    monkeypatch.setattr(sys, "stdout", stdout)
    before = signal.getsignal(signal.SIGINT)
    outcome = Outcome(exit_code(["score", str(STORIES), "--json"]), stdout.getvalue(), capsys.readouterr().err)
    assert outcome.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert outcome.message == "llama-xla: interrupted; what was known is printed"
    answers, summary = parsed(outcome)
    assert 0 < len(answers) == summary["scored"] < summary["items"] == 40
    assert [answer["index"] for answer in answers] == sorted(answer["index"] for answer in answers)
    assert all(len(answer["logprobs"]) == 4 for answer in answers)


@pytest.mark.slow
def test_ctrl_c_before_the_first_answer_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stderr = CtrlCAt("Scoring")
    monkeypatch.setattr(sys, "stderr", stderr)
    assert exit_code(["score", str(STORIES)]) == 130
    assert capsys.readouterr().out == ""
    assert "interrupted" in stderr.getvalue().splitlines()[-1]


@pytest.mark.slow
def test_a_pipe_closed_in_the_middle_is_no_crash() -> None:
    """``| head -1``: the process ends at its next line, in silence."""
    with process(["-m", "llama.cli", "score", str(STORIES), "--quiet"]) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline().split()[0] == "item"
        running.stdout.close()
        err = running.stderr.read()
        running.wait(timeout=PROCESS_TIMEOUT_S)
    assert err == ""
    assert running.returncode == 141
