"""`llama-xla batch`: forms of lines, what is wrong with them, resumption after any end, several processes, merges.

Most tests run the command in this process, on the device of fakes.py; a few run the demo model, or a process that is
killed.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, Outcome, Run, process, refused_at_once
from fakes import FakeRunner, expected_ids

from llama import LLaMA, SamplingParams, load_tokenizer
from llama.batch import InputLines, Merged, Parts, RunSettings, merge_parts
from llama.batch.fields import NOT_IN_LINES, TYPES
from llama.batch.requests import seed_of
from llama.config import EngineConfig
from llama.engine.engine import Engine
from llama.errors import FlagError
from llama.ranks import PAIRS, Ranks
from llama.tokenizer import Tokenizer

command = importlib.import_module("llama.cli.batch")  # the package's attribute of this name is the function
EXAMPLE = ROOT / "docs" / "examples" / "batch.jsonl"
WORDS = ("once", "upon", "a", "time", "the", "cat", "dog", "ran", "home", "green", "house", "sang")
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_batch
from llama.batch import parts
write, left = parts._write, [{records}]

def stopping(file, data, offset):
    left[0] -= 1
    if left[0] < 0:
        write(file, data[:{torn}], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, data, offset)

parts._write = stopping
test_batch.command.loaded = test_batch.fake_loaded({tokenizer!r})
from llama import cli
sys.exit(cli._exit_code(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a launcher is set."""
    for name in {name for rank, counts in PAIRS for name in (rank, *counts)}:
        monkeypatch.delenv(name, raising=False)


def fake_loaded(tokenizer_path: str | Path, fail_after: int | None = None) -> Callable[..., LLaMA]:
    """In the place of loading a model: one on the fake device."""

    def loaded(loading: Mapping[str, Any], config: EngineConfig, tokenizer: Tokenizer | None, quiet: bool) -> LLaMA:
        tokenizer = load_tokenizer(tokenizer_path)
        return LLaMA(Engine(config, FakeRunner(config, tokenizer.n_words, fail_after=fail_after)), tokenizer)

    return loaded


class Batch:
    """Runs the command in a directory of its own, on the fake device.

    Attributes:
        models: how many were loaded.
    """

    def __init__(self, run: Run, directory: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._run, self._monkeypatch, self.tokenizer_path = run, monkeypatch, tokenizer_path
        self.input, self.output = directory / "in.jsonl", directory / "out.jsonl"
        self.parts = directory / "out.jsonl.parts"
        self.models: list[LLaMA] = []
        self.on_device(None)

    def on_device(self, fail_after: int | None) -> None:
        make = fake_loaded(self.tokenizer_path, fail_after)

        def loaded(*given: Any) -> LLaMA:
            self.models.append(make(*given))
            return self.models[-1]

        self._monkeypatch.setattr(command, "loaded", loaded)

    def lines(self, *lines: dict[str, Any] | str | bytes) -> None:
        """Write the input."""
        texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
        self.input.write_bytes(b"".join((t if isinstance(t, bytes) else t.encode()) + b"\n" for t in texts))

    def __call__(self, *flags: str, rank: int = 0, world_size: int = 1, output: Path | None = None) -> Outcome:
        self._monkeypatch.setenv("RANK", str(rank))
        self._monkeypatch.setenv("WORLD_SIZE", str(world_size))
        common = ["--input", str(self.input), "--output", str(output or self.output), "--max_seq_len", "128"]
        shapes = ["--buckets", "16,4,1", "--tokenizer_path", str(self.tokenizer_path), "--max_gen_len", "20"]
        given = [*common, *shapes]
        for flag in [f for f in flags if f.startswith("--")]:  # one that is given replaces the common one
            if flag in given:
                del given[given.index(flag) : given.index(flag) + 2]
        return self._run("batch", *given, *flags)

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def batch(run: Run, tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    return Batch(run, tmp_path, tokenizer_path, monkeypatch)


def stories(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Lines of all lengths, every seventh of which is wrong."""
    chooser = random.Random(seed)
    made: list[dict[str, Any]] = []
    for number in range(count):
        prompt = " ".join(chooser.choice(WORDS) for _ in range(chooser.randrange(1, 20)))
        line = {"custom_id": f"n{number}", "prompt": prompt, "max_gen_len": chooser.randrange(1, 20)}
        made.append({**line, "temperature": -1} if number % 7 == 6 else line)
    return made


# --- forms of lines


def test_every_form_of_a_line(batch: Batch) -> None:
    """A text, ids and a dialog; results are those of LLaMA.generate, and come in the order of the input."""
    batch.lines(
        {"prompt": "the cat ran home", "max_gen_len": 30},
        {"prompt_ids": [1, 5, 9], "temperature": 0, "max_tokens": 4, "custom_id": "ids"},
        {"messages": [{"role": "user", "content": "sing"}], "max_gen_len": 3},
        {"prompt": "a", "seed": 5, "n": 3, "max_gen_len": 2},
        {"prompt": "", "max_gen_len": 1},
    )
    outcome = batch("--seed", "11")
    assert (outcome.code, outcome.out) == (0, "")
    found = batch.results()
    assert [each["index"] for each in found] == [0, 1, 2, 3, 4]
    assert [each["custom_id"] for each in found] == [None, "ids", None, None, None]
    (llm,) = batch.models
    text, ids, dialog, three, empty = (each["results"] for each in found)
    (expected,) = llm.generate("the cat ran home", 30, seed=seed_of(11, 0))
    assert (text[0]["generation"], text[0]["token_ids"]) == (expected.generation, expected.token_ids)
    assert text[0]["seed"] == seed_of(11, 0)
    assert ids[0]["token_ids"] == expected_ids((1, 5, 9), SamplingParams(4, 0.0), 320, llm.tokenizer.stop_ids)
    assert found[1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert dialog[0]["prompt"] == "[INST] sing [/INST]"
    samples = llm.generate("a", 2, seed=5, n=3)
    assert [each["token_ids"] for each in three] == [each.token_ids for each in samples]
    assert [each["sample"] for each in three] == [0, 1, 2]
    assert [each["seed"] for each in three] == [5, 6, 7]
    assert empty[0]["finish_reason"] in ("stop", "length")
    assert not batch.parts.exists()


def test_openai_s_form(batch: Batch) -> None:
    body = {"model": "m", "max_tokens": 6, "user": "me", "stream": False, "top_p": None}
    batch.lines(
        openai("a", {**body, "prompt": "the dog", "seed": 3, "echo": True}),
        openai("b", {**body, "prompt": ["once", "upon"], "n": 2}),
        openai("c", {**body, "prompt": [[1, 4], [1, 5, 6]], "temperature": 0}),
        openai("d", {**body, "messages": [{"role": "user", "content": [{"type": "text", "text": "sing"}]}]}, chat=True),
        openai("e", {**body, "prompt": "x", "best_of": 3, "n": 2}),
    )
    assert batch().code == 0
    found = batch.results()
    assert all(list(each) == ["id", "custom_id", "response", "error"] for each in found)
    assert [each["custom_id"] for each in found] == ["a", "b", "c", "d", "e"]
    assert all(each["response"]["status_code"] == 200 and each["error"] is None for each in found)
    one, two, ids, chat, best = (each["response"]["body"] for each in found)
    assert (one["object"], one["model"], one["id"][:5]) == ("text_completion", "m", "cmpl-")
    (expected,) = batch.models[0].generate("the dog", 6, seed=3)
    assert one["choices"][0]["text"] == "the dog" + expected.generation
    assert [choice["index"] for choice in two["choices"]] == [0, 1, 2, 3]
    lengths = [len(batch.models[0].tokenizer.encode(text)) for text in ("once", "upon")]
    assert two["usage"]["prompt_tokens"] == sum(lengths)  # once, whatever n is
    assert ids["usage"]["prompt_tokens"] == 5
    assert (chat["object"], chat["choices"][0]["message"]["role"]) == ("chat.completion", "assistant")
    assert len(best["choices"]) == 2
    assert len({each["id"] for each in found}) == 5


def openai(name: str, body: dict[str, Any], *, chat: bool = False) -> dict[str, Any]:
    url = "/v1/chat/completions" if chat else "/v1/completions"
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ('{"prompt": ', "invalid_prompt", ["not JSON", '{"prompt": "..."}']),
        ('["prompt"]', "invalid_prompt", ["JSON list"]),
        ('{"prompt": NaN}', "invalid_prompt", ["not JSON", "NaN"]),
        ("[" * 100_000, "invalid_prompt", ["not JSON"]),
        (b'{"prompt": "caf\xe9"}', "invalid_prompt", ["not UTF-8", "byte 15", "iconv"]),
        ('{"prompt": "\\ud800"}', "invalid_prompt", ["surrogate"]),
        ("{}", "invalid_prompt", ["got no prompt", "prompt_ids, messages"]),
        ('{"prompt": "a", "messages": []}', "invalid_prompt", ["got prompt and messages", "expected one"]),
        ('{"prompt": 3}', "invalid_prompt", ["prompt: got 3", "text"]),
        ('{"prompt": [1, 2]}', "invalid_prompt", ["prompt_ids"]),
        ('{"prompt_ids": []}', "invalid_prompt", ["no ids"]),
        ('{"prompt_ids": [1, 320]}', "invalid_prompt", ["id 320", "0 to 319"]),
        ('{"prompt_ids": [1, -1]}', "invalid_prompt", ["id -1"]),
        ('{"prompt_ids": [true]}', "invalid_prompt", ["prompt_ids: got [true]"]),
        ('{"prompt_ids": [1' + "0" * 400 + "]}", "invalid_prompt", ["expected at least one id"]),
        ('{"prompt": "a", "custom_id": 7}', "invalid_prompt", ["custom_id: got 7", "text"]),
        ('{"prompt": "a", "custom_id": "twice"}', "invalid_prompt", ["custom_id: got 'twice'", "earlier line"]),
        ('{"prompt": "a", "temprature": 1}', "invalid_prompt", ["unknown key 'temprature'"]),
        ('{"prompt": "a", "hidden_states": true}', "invalid_prompt", ["unknown key 'hidden_states'"]),
        ('{"prompt": "a", "max_tokens": 3, "max_gen_len": 3}', "invalid_prompt", ["max_gen_len under two names"]),
        ('{"prompt": "a", "temperature": "0"}', "invalid_setting", ['temperature: got "0"', "a number"]),
        ('{"prompt": "a", "temperature": true}', "invalid_setting", ["temperature: got true"]),
        ('{"prompt": "a", "temperature": -1}', "invalid_setting", ["temperature: got -1", "0 or more"]),
        ('{"prompt": "a", "temperature": 1e999}', "invalid_setting", ["temperature", "finite"]),
        ('{"prompt": "a", "temperature": 1' + "0" * 400 + "}", "invalid_setting", ["temperature: got 1"]),
        ('{"prompt": "a", "logit_bias": {"5": 1' + "0" * 400 + "}}", "invalid_setting", ["logit_bias"]),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "invalid_setting", ["logit_bias", "each token id"]),
        ('{"prompt": "a", "logit_bias": {"5": 200}}', "invalid_setting", ["200.0 for id 5"]),
        ('{"prompt": "a", "logit_bias": {"999": 1}}', "invalid_setting", ["id 999", "0 to 319"]),
        ('{"prompt": "a", "logit_bias": [5]}', "invalid_setting", ["logit_bias: got [5]"]),
        ('{"prompt": "a", "max_gen_len": 2.5}', "invalid_setting", ["max_gen_len: got 2.5", "whole number"]),
        ('{"prompt": "a", "max_gen_len": 0}', "invalid_setting", ["max_gen_len: got 0", "at least 1"]),
        ('{"prompt": "a", "n": 2000, "temperature": 1}', "invalid_setting", ["got 2000 samples", "at most 1024"]),
        ('{"prompt": "a", "n": 2, "temperature": 0}', "invalid_setting", ["at temperature 0"]),
        ('{"prompt": "a", "stop": [3]}', "invalid_setting", ["stop: got [3]", "list of texts"]),
        ('{"prompt": "a", "stop": ""}', "invalid_setting", ["stop"]),
        ('{"prompt": "a", "seed": -1}', "invalid_setting", ["seed: got -1"]),
        ('{"prompt": "a", "json_schema": "{"}', "invalid_setting", ["json_schema"]),
        ('{"prompt": "a", "json_schema": {}, "regex": "a"}', "invalid_setting", ["json_schema and regex"]),
        ('{"prompt": "a", "max_gen_len": 500}', "invalid_prompt", ["does not fit", "max_seq_len is 128"]),
        ('{"messages": "hello"}', "invalid_prompt", ["messages: got", "list"]),
        ('{"messages": []}', "invalid_prompt", ["messages: got []"]),
        ('{"messages": [3]}', "invalid_prompt", ["message 0: got 3"]),
        ('{"messages": [{"role": "user"}]}', "invalid_prompt", ["role and content, both text"]),
        ('{"messages": [{"role": "user", "content": "a", "tool_calls": 1}]}', "invalid_prompt", ["tool_calls"]),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "invalid_prompt", ["image_url"]),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "invalid_dialog", ["expected 'user'"]),
        ('{"messages": [{"role": "user", "content": "[INST]"}]}', "invalid_dialog", ["[INST]"]),
    ],
)
def test_a_wrong_line_is_an_error_in_its_place(
    batch: Batch, line: str | bytes, code: str, words: Sequence[str]
) -> None:
    """The others are answered, and the exit code is that of an error which the caller can mend."""
    batch.lines({"prompt": "the cat", "custom_id": "twice"}, line, {"prompt": "the dog"})
    outcome = batch()
    assert outcome.code == 2
    assert "1 of 3 lines could not be answered" in outcome.message
    assert "Traceback" not in outcome.err
    first, wrong, last = batch.results()
    assert all(each["error"] is None and each["results"] for each in (first, last))
    assert (wrong["index"], wrong["results"], wrong["error"]["code"]) == (1, [], code)
    assert [word for word in words if word not in wrong["error"]["message"]] == [], wrong["error"]["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "GET"}, ["method", "POST"]),
        ({"url": "/v1/embeddings"}, ["url", "/v1/chat/completions"]),
        ({"body": None}, ["body: got null"]),
        ({"extra": 1}, ["unknown key 'extra'"]),
        ({"custom_id": None}, ["custom_id: got none"]),
        ({"body": {}}, ["prompt: got none"]),
        ({"body": {"prompt": "a", "stream": True}}, ["stream: got true"]),
        ({"body": {"prompt": "a", "model": 3}}, ["model: got 3"]),
        ({"body": {"prompt": "a", "echo": 1}}, ["echo: got 1"]),
        ({"body": {"prompt": []}}, ["prompt: got []"]),
        ({"body": {"prompt": ["a", 3]}}, ["prompt: got"]),
        ({"body": {"prompt": "a", "tools": [1]}}, ["tools: got [1]"]),
        ({"body": {"prompt": ["a"] * 2000}}, ["2000 samples"]),
        ({"url": "/v1/chat/completions"}, ["messages: got none"]),
        (
            {"url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "a"}], "logprobs": 3}},
            ["logprobs: got 3", "top_logprobs"],
        ),
        (
            {
                "url": "/v1/chat/completions",
                "body": {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3},
            },
            ["top_logprobs: got it without logprobs"],
        ),
        (
            {
                "url": "/v1/chat/completions",
                "body": {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "xml"}},
            },
            ["response_format", "json_schema"],
        ),
    ],
)
def test_a_wrong_request_in_openai_s_form(batch: Batch, change: dict[str, Any], words: Sequence[str]) -> None:
    batch.lines({**openai("a", {"prompt": "the cat"}), **change}, openai("b", {"prompt": "the dog"}))
    assert batch().code == 2
    wrong, right = batch.results()
    assert right["response"]["status_code"] == 200
    assert wrong["response"]["status_code"] == 400
    assert wrong["custom_id"] == ("a" if "custom_id" not in change else None)
    message = wrong["error"]["message"]
    assert wrong["response"]["body"]["error"]["message"] == message
    assert [word for word in words if word not in message] == [], message


def test_an_unreadable_line_takes_the_form_of_the_file(batch: Batch) -> None:
    batch.lines(openai("a", {"prompt": "the cat"}), "{")
    assert batch().code == 2
    assert batch.results()[1]["response"]["status_code"] == 400


def test_response_formats_become_grammars(batch: Batch) -> None:
    """The fake device ignores masks, so the controls are compared."""
    from llama.batch.openai import request_of_body

    messages = [{"role": "user", "content": "a"}]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    declared = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    found = request_of_body(openai("a", {"messages": messages, "response_format": declared}, chat=True))
    assert found.controls == {"json_schema": schema}
    plain = request_of_body(openai("a", {"messages": messages, "response_format": {"type": "text"}}, chat=True))
    assert plain.controls == {}
    limit = request_of_body(openai("a", {"messages": messages, "max_completion_tokens": 4}, chat=True))
    assert limit.controls == {"max_gen_len": 4}


def test_seeds_are_drawn_from_the_batch_s_seed_and_the_place(batch: Batch) -> None:
    """So the same prompt on two lines gives two texts, and the same command the same file."""
    batch.lines(*({"prompt": "the cat", "max_gen_len": 8} for _ in range(30)))
    outcomes = [batch("--output", "-", *flags) for flags in ([], [], ["--seed", "1"])]
    seeds = [[each["results"][0]["seed"] for each in outcome.objects] for outcome in outcomes]
    assert outcomes[0].out == outcomes[1].out
    assert all(0 <= seed < 2**63 for seed in seeds[0])
    assert len({*seeds[0], *seeds[2]}) == 60


def test_every_control_has_a_type() -> None:
    assert set(TYPES) == {f.name for f in fields(SamplingParams)} - set(NOT_IN_LINES)


def test_marks_and_blank_lines(batch: Batch) -> None:
    """A byte order mark, Windows' line ends, blank lines and a last line without an end change nothing."""
    batch.input.write_bytes(b'\xef\xbb\xbf{"prompt": "the cat"}\r\n\r\n  \n{"prompt": "the dog"}')
    assert batch().code == 0
    plain = batch.output.read_bytes()
    batch.lines({"prompt": "the cat"}, {"prompt": "the dog"})
    assert batch("--restart").code == 0
    assert batch.output.read_bytes() == plain


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(batch: Batch, content: bytes) -> None:
    batch.input.write_bytes(content)
    refused_at_once(batch(), "got no lines", '{"prompt": "..."}')
    assert not batch.parts.exists()


# --- refused before anything is loaded


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input", "absent.jsonl"], ["absent.jsonl", "No such file"]),
        (["--input", "absent.jsonl", "--output", "README.md"], ["absent.jsonl", "No such file"]),
        (["--input", "docs"], ["docs"]),
        (["--input", "/dev/null"], ["regular file"]),
        (["--output", "absent/out.jsonl"], ["absent", "not a directory"]),
        (["--output", "docs"], ["docs", "regular"]),
        (["--output", "/dev/null"], ["/dev/null", "regular"]),
        (["--output", "-", "--restart"], ["--restart", "--output"]),
        (["--seed", "-1"], ["--seed: got -1"]),
        (["--n", "2", "--temperature", "0"], ["--n: got 2", "temperature 0"]),
        (["--max_gen_len", "0"], ["--max_gen_len: got 0"]),
        (["--chat_format", "llama9"], ["llama9", "llama2"]),
        (["--ckpt_dir", "absent"], ["absent", "no such"]),
        (["--promt", "x"], ["unknown flag --promt"]),
        (["--merge"], ["no such directory", "part-*.jsonl"]),
        (["--merge", "--restart"], ["--merge with --restart"]),
        (["--merge", "--output", "-"], ["--merge needs --output"]),
    ],
)
def test_a_wrong_command_line_costs_no_waiting(batch: Batch, flags: list[str], words: list[str]) -> None:
    batch.lines({"prompt": "the cat"})
    refused_at_once(batch(*flags), *words)
    assert not batch.models
    assert not batch.parts.exists()


def test_the_input_is_needed(run: Run) -> None:
    refused_at_once(run("batch"), "--input is needed", "--help")


def test_the_input_is_not_the_output(batch: Batch) -> None:
    batch.lines({"prompt": "the cat"})
    data = batch.input.read_bytes()
    for flags in ([], ["--restart"]):
        refused_at_once(batch(*flags, output=batch.input), "--output", "it is the input")
    assert batch.input.read_bytes() == data


def test_stdout_takes_one_process(batch: Batch) -> None:
    batch.lines({"prompt": "the cat"})
    refused_at_once(batch("--output", "-", rank=0, world_size=2), "--output -", "2 processes")


# --- stdout


def test_results_on_stdout_come_in_order(batch: Batch) -> None:
    """Also where later lines end first."""
    batch.lines({"prompt": "a", "max_gen_len": 60}, *stories(20))
    outcome = batch("--output", "-", "--quiet")
    assert outcome.code == 2  # some lines are wrong
    assert [each["index"] for each in outcome.objects] == list(range(21))
    assert batch().code == 2
    assert outcome.objects == batch.results()


def test_few_results_are_held_back(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long line does not have all others wait in memory for their turn."""
    monkeypatch.setattr(command, "MOST_HELD", 5)
    held = 0
    taken: list[int] = []
    take = command._Progress.take

    def counted(self: Any, answer: Any) -> None:
        nonlocal held
        taken.append(answer.line.index)
        held = max(held, len(taken) if 0 not in taken else 0)
        take(self, answer)

    monkeypatch.setattr(command._Progress, "take", counted)
    short = [{"prompt": "b", "max_gen_len": 1} if number % 2 else {} for number in range(40)]  # half of them are wrong
    batch.lines({"prompt": "a", "max_gen_len": 60}, *short)
    outcome = batch("--output", "-", "--max_batch_size", "4")
    assert [each["index"] for each in outcome.objects] == list(range(41))
    assert 1 <= held < 5


@pytest.mark.slow
def test_a_closed_pipe_ends_it_quietly(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "Once", "max_gen_len": 1}\n')
    flags = ["--input", str(path), "--max_batch_size", "1", "--quiet"]
    with process(["-m", "llama.cli", "batch", *flags]) as running:
        assert running.stdout is not None
        running.stdout.close()
        assert running.stderr is not None
        err = running.stderr.read()
    assert (running.returncode, err) == (141, "")


# --- the stream


def test_slots_stay_full(batch: Batch) -> None:
    """Slots are given to further lines as soon as they are free: about as many decode rows as when all are submitted at
    once; and never more lines are in the engine than twice the slots.
    """
    lines = [line for line in stories(60) if "temperature" not in line]
    batch.lines(*lines)
    most = 0
    step = Engine.step

    def watched(engine: Engine) -> Any:
        nonlocal most
        most = max(most, len(engine.scheduler.waiting) + len(engine.scheduler.live) + len(engine._inbox))
        return step(engine)

    batch._monkeypatch.setattr(Engine, "step", watched)
    assert batch("--max_batch_size", "4").code == 0
    assert most <= 8
    streamed = batch.models[0].engine.scheduler.counts
    together = fake_loaded(batch.tokenizer_path)({}, batch.models[0].config, None, True)
    params = [SamplingParams(line["max_gen_len"], seed=seed_of(0, i)) for i, line in enumerate(lines)]
    together.generate([line["prompt"] for line in lines], params=params)
    assert streamed.decode_rows <= together.engine.scheduler.counts.decode_rows * 1.05 + 8


def test_every_program_is_compiled_before_the_first_line(batch: Batch) -> None:
    """Under --fail_on_recompile: lines of other lengths come later."""
    batch.lines(*({"prompt": "a " * number, "max_gen_len": number} for number in range(1, 20)))
    assert batch("--fail_on_recompile", "--max_batch_size", "3").code == 0


def test_the_engine_s_failure_ends_the_run_and_keeps_what_was_done(batch: Batch) -> None:
    """It is no line's fault: nothing is written for those that were lost."""
    batch.lines(*stories(20))
    assert batch("--max_batch_size", "2", output=batch.output.with_name("whole.jsonl")).code == 2
    batch.on_device(fail_after=60)
    outcome = batch("--max_batch_size", "2")
    assert (outcome.code, outcome.out) == (1, "")
    assert "the device failed" in outcome.message
    assert "which stay in" in outcome.err
    assert len((batch.parts / "part-00000.jsonl").read_bytes().splitlines()) > 1
    batch.on_device(None)
    assert batch("--max_batch_size", "2").code == 2
    assert batch.output.read_bytes() == batch.output.with_name("whole.jsonl").read_bytes()


# --- several processes, and resumption


@pytest.fixture
def whole(batch: Batch) -> bytes:
    """The results of 23 lines by one process that nobody interrupts."""
    batch.lines(*stories(23))
    assert batch().code == 2
    data = batch.output.read_bytes()
    batch.output.unlink()
    return data


@pytest.mark.parametrize("world_size", [1, 2, 3, 23, 30])
def test_any_number_of_processes_writes_the_same(batch: Batch, whole: bytes, world_size: int) -> None:
    """In any order; the last one merges and alone tells of wrong lines."""
    ranks = list(range(world_size))
    random.Random(world_size).shuffle(ranks)
    lines = [rank for rank in ranks if rank < 23]
    for rank in ranks:
        is_last = rank == lines[-1]
        outcome = batch(rank=rank, world_size=world_size)
        assert outcome.code == (2 if is_last else 0), outcome.err
        assert ("lines could not be answered" in outcome.message) == is_last
        if rank < 23 and not is_last:
            assert "lines are missing" in outcome.message or rank in lines
    assert batch.output.read_bytes() == whole
    assert not batch.parts.exists()


def test_what_is_missing_is_named(batch: Batch, whole: bytes) -> None:
    outcome = batch(rank=1, world_size=3)
    assert outcome.code == 0
    assert "15 lines are missing" in outcome.message
    assert "0, 2, 3, 5, 6, ..." in outcome.message
    assert "of rank 0, 2" in outcome.message
    assert "--merge --output out.jsonl" in outcome.message


def test_a_part_may_be_torn_anywhere(batch: Batch, whole: bytes) -> None:
    """As a kill -9 or a full disk leaves it: whole records count, the others are run again."""
    assert batch(rank=0, world_size=2).code == 0
    data = (batch.parts / "part-00000.jsonl").read_bytes()
    ends = [place for place, byte in enumerate(data) if byte == 10]
    chooser = random.Random(0)
    places = {0, 1, ends[0], ends[0] + 1, ends[1], ends[1] + 1, len(data) - 1, *chooser.sample(range(len(data)), 12)}
    for place in sorted(places):
        shutil.rmtree(batch.parts)
        batch.parts.mkdir()
        (batch.parts / "part-00000.jsonl").write_bytes(data[:place])
        before = len(batch.models)
        assert batch().code == 2
        assert batch.output.read_bytes() == whole, place
        assert len(batch.models) == before + 1
        batch.output.unlink()
        batch.parts.mkdir()


@pytest.mark.parametrize(
    "damage",
    [b'{"line": 3\n', b"\0" * 40 + b"\n", b"[]\n", b'{"line": 99, "output": {}}\n', b"\xff\n"],
    ids=["cut", "zeros", "list", "line", "bytes"],
)
def test_damaged_records_do_not_count(batch: Batch, whole: bytes, damage: bytes) -> None:
    assert batch(rank=0, world_size=2).code == 0
    part = batch.parts / "part-00000.jsonl"
    header, _, *others = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([header, damage, *others]))
    outcome = batch(rank=1, world_size=2)
    assert outcome.code == 0
    assert "1 records are damaged" in outcome.err
    assert "1 lines are missing" in outcome.message
    assert batch().code == 2
    assert batch.output.read_bytes() == whole


def interrupting(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Press Ctrl-C when so many records are written."""
    add, count = Parts.add, 0

    def pressed(self: Parts, *given: Any, **named: Any) -> None:
        nonlocal count
        add(self, *given, **named)
        count += 1
        if count == after:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Parts, "add", pressed)


@pytest.mark.parametrize("after", [1, 7, 22])
def test_ctrl_c_keeps_what_is_finished(batch: Batch, whole: bytes, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """And any number of processes goes on from there."""
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as pressing:
        interrupting(pressing, after)
        outcome = batch()
    assert (outcome.code, outcome.out) == (130, "")
    done = re.search(r"interrupted after (\d+) of 23 lines", outcome.message)
    assert done is not None
    assert int(done[1]) >= after  # those that ended in the same step are kept, too
    assert str(batch.parts) in outcome.message
    assert signal.getsignal(signal.SIGINT) is before
    assert not batch.output.exists()
    for rank in (2, 0, 1):
        batch(rank=rank, world_size=3)
    assert batch.output.read_bytes() == whole
    run_again = sum(model.engine.scheduler.counts.finished for model in batch.models[2:])
    assert run_again <= 23 - int(done[1])


def test_ctrl_c_on_stdout_says_what_is_printed(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    batch.lines(*stories(20))
    take = command._Progress.take

    def pressed(self: Any, answer: Any) -> None:
        take(self, answer)
        if self.lines == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command._Progress, "take", pressed)
    outcome = batch("--output", "-")
    assert outcome.code == 130
    assert f"the first {len(outcome.out.splitlines())} lines are printed" in outcome.message


@pytest.mark.slow
@pytest.mark.parametrize(("records", "torn"), [(0, 10), (4, 0), (9, 25)])
def test_a_killed_process_is_resumed(batch: Batch, whole: bytes, records: int, torn: int) -> None:
    """kill -9 within the header, between two records, and within one."""
    names = {"tests": str(Path(__file__).parent), "tokenizer": str(batch.tokenizer_path)}
    code = KILLED.format(records=records, torn=torn, **names)
    flags = ["--max_seq_len", "128", "--buckets", "16,4,1", "--tokenizer_path", names["tokenizer"]]
    flags += ["--max_gen_len", "20", "--input", str(batch.input), "--output", str(batch.output)]
    with process(["-c", code, "batch", *flags]) as killed:
        _, err = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, err
    assert not batch.output.exists()
    assert batch(rank=1, world_size=2).code == 0
    assert batch(rank=0, world_size=2).code == 2
    assert batch.output.read_bytes() == whole


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "0.7"], ["temperature was nothing and is 0.7"]),
        (["--seed", "1"], ["seed was 0 and is 1"]),
        (["--dtype", "bfloat16"], ['dtype was "float32" and is "bfloat16"']),
        (["--cache_dtype", "bfloat16"], ['cache_dtype was "auto" and is "bfloat16"']),
        (["--max_gen_len", "19"], ["max_gen_len was 20 and is 19"]),
        (["--max_seq_len", "100"], ["max_seq_len was 128 and is 100"]),
        (["--batch_invariant"], ["batch_invariant was false and is true"]),
        (["--stop", "x"], ["stop was nothing"]),
        (["--chat_format", "llama2"], ["chat_format was nothing"]),
    ],
)
def test_other_settings_are_refused(batch: Batch, whole: bytes, flags: list[str], words: list[str]) -> None:
    """They would mix two kinds of results; --restart begins anew."""
    assert batch("--dtype", "float32", rank=0, world_size=2).code == 0
    flags = flags if "--dtype" in flags else [*flags, "--dtype", "float32"]
    refused_at_once(batch(*flags), "part-00000.jsonl", *words, "--restart")
    assert batch("--restart", *flags).code == 2
    assert len(batch.results()) == 23


def test_speed_settings_may_change(batch: Batch, whole: bytes) -> None:
    assert batch(rank=0, world_size=2).code == 0
    assert batch("--max_batch_size", "3", "--buckets", "8,1").code == 2
    assert batch.output.read_bytes() == whole


def test_another_input_or_model_is_refused(batch: Batch, whole: bytes, tmp_path: Path) -> None:
    assert batch(rank=0, world_size=2).code == 0
    data = batch.input.read_bytes()
    batch.lines(*stories(23, seed=1))
    refused_at_once(batch(), "input has other content", "--restart")
    batch.input.write_bytes(data)
    shutil.copytree(ROOT / "llama" / "demo", tmp_path / "other")
    (tmp_path / "other" / "params.json").write_text("{}")
    refused_at_once(batch("--ckpt_dir", str(tmp_path / "other")), "ckpt_dir has other content", "--restart")


def test_an_input_that_changes_meanwhile_ends_the_run(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines would be read from their old places."""
    batch.lines(*stories(40))
    add = Parts.add

    def changing(self: Parts, *given: Any, **named: Any) -> None:
        add(self, *given, **named)
        with batch.input.open("ab") as file:
            file.write(b"\n")

    monkeypatch.setattr(Parts, "add", changing)
    outcome = batch("--max_batch_size", "2")
    assert outcome.code == 2
    assert "was changed while its lines were run" in outcome.message
    assert not batch.output.exists()


def test_results_are_not_overwritten(batch: Batch, whole: bytes) -> None:
    batch.output.write_bytes(b"precious\n")
    refused_at_once(batch(), "is there already", "--restart")
    assert batch.output.read_bytes() == b"precious\n"
    assert batch("--restart").code == 2
    assert batch.output.read_bytes() == whole


def test_restart_is_for_one_process(batch: Batch, whole: bytes) -> None:
    assert batch(rank=0, world_size=2).code == 0
    refused_at_once(batch("--restart", rank=1, world_size=2), "--restart with 2 processes", str(batch.parts))
    assert (batch.parts / "part-00000.jsonl").exists()


def test_a_rank_runs_once(batch: Batch, whole: bytes) -> None:
    """A second process of the same rank, and one that would forget the parts, are refused while the first one runs."""
    assert batch(rank=0, world_size=2).code == 0
    with (batch.parts / "part-00000.jsonl").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused_at_once(batch(rank=0, world_size=2), "another process with rank 0")
        refused_at_once(batch("--restart"), "a process writes it")
        refused_at_once(batch("--merge"), "a process writes it")
        assert batch(rank=1, world_size=2).code == 2  # the other rank ends, and merges
    assert batch.output.read_bytes() == whole


def test_a_foreign_file_is_not_taken_for_a_part(batch: Batch, whole: bytes) -> None:
    batch.parts.mkdir()
    (batch.parts / "part-00003.jsonl").write_text('{"text": "mine"}\n')
    refused_at_once(batch(), "part-00003.jsonl", "is no part of a batch")


def test_files_of_others_stay(batch: Batch, whole: bytes) -> None:
    """Removing parts removes nothing else, however often."""
    for kept in (batch.parts.with_name("out.jsonl.parts.removed"), batch.parts):
        assert batch(rank=0, world_size=2).code == 0
        (batch.parts / "notes.txt").write_text("mine")
        assert batch().code == 2
        assert batch.output.read_bytes() == whole
        assert [path.name for path in kept.iterdir()] == ["notes.txt"]
        batch.output.unlink()


def test_ends_within_the_merge(batch: Batch, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the rename, after it, and while parts are removed: the same command mends each without a model."""
    for name in ("replace", "unlink", "rmdir"):
        with monkeypatch.context() as killing:
            killing.setattr(Path, name, killed)
            with pytest.raises(KeyboardInterrupt):
                batch_raising(batch)
        loads = len(batch.models)
        outcome = batch()
        if outcome.code != 2 or "is there already" not in outcome.message:
            assert len(batch.models) == loads
        assert batch.output.read_bytes() == whole
        assert not batch.parts.exists()
        batch.output.unlink()


def killed(self: Path, *given: Any, **named: Any) -> None:
    """As if the process had been ended here."""
    raise KeyboardInterrupt


def batch_raising(batch: Batch) -> None:
    """Run it; a KeyboardInterrupt gets out instead of an exit code."""
    outcome = batch()
    if outcome.code == 130:
        raise KeyboardInterrupt


# --- merging


def parts_of(output: Path, rank: int, world_size: int, lines: int) -> Parts:
    return Parts(output, Ranks(rank, world_size), lines, RunSettings({"input": "x"}), 0)


def test_exactly_one_process_merges(tmp_path: Path) -> None:
    """However close together they end."""
    for number in range(20):
        output = tmp_path / f"{number}.jsonl"
        opened = [parts_of(output, rank, 4, 8) for rank in range(4)]
        for index in range(8):
            opened[index % 4].add(index, {"index": index}, failed=index == 3)
        found: list[Merged | None] = []
        barrier = threading.Barrier(4)

        def end(parts: Parts, barrier: threading.Barrier = barrier, found: list[Merged | None] = found) -> None:
            with parts:
                barrier.wait()
                found.append(parts.merge())

        threads = [threading.Thread(target=end, args=(parts,)) for parts in opened]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found, key=bool) == [None, None, None, Merged(8, 1)]
        assert [json.loads(line)["index"] for line in output.read_text().splitlines()] == list(range(8))
        assert not output.with_name(f"{number}.jsonl.parts").exists()


def test_hosts_without_a_common_file_system(batch: Batch, whole: bytes, tmp_path: Path) -> None:
    """Each has parts of its own; put in one directory they are merged without a model."""
    for rank in range(3):
        host = tmp_path / f"host{rank}"
        host.mkdir()
        outcome = batch(rank=rank, world_size=3, output=host / "out.jsonl")
        assert outcome.code == 0
        assert "--merge" in outcome.message
    batch.parts.mkdir()
    loads = len(batch.models)
    for rank in (2, 0):
        shutil.copy(tmp_path / f"host{rank}" / "out.jsonl.parts" / f"part-{rank:05}.jsonl", batch.parts)
    refused_at_once(batch("--merge"), "8 lines are missing", "1, 4, 7")
    shutil.copy(tmp_path / "host1" / "out.jsonl.parts" / "part-00001.jsonl", batch.parts)
    outcome = batch("--merge")
    assert outcome.code == 2  # some lines are wrong
    assert "3 of 23 lines could not be answered" in outcome.message
    assert batch.output.read_bytes() == whole
    assert len(batch.models) == loads


def test_parts_of_two_runs_are_not_merged(batch: Batch, whole: bytes, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    assert batch(rank=0, world_size=2).code == 0
    assert batch("--seed", "5", rank=1, world_size=2, output=other).code == 0
    shutil.copy(tmp_path / "other.jsonl.parts" / "part-00001.jsonl", batch.parts)
    refused_at_once(batch("--merge"), "part-00001.jsonl", "seed was 5 and is 0")
    (batch.parts / "part-00001.jsonl").unlink()
    batch.lines(*stories(5))
    refused_at_once(batch("--merge"), "--input", "not the input")


def test_a_line_counts_once(tmp_path: Path) -> None:
    """Two processes may have done the same line, where their numbers were not of one run."""
    output = tmp_path / "out.jsonl"
    for rank in (1, 0):
        with parts_of(output, rank, 2, 2) as parts:
            parts.add(0, {"index": 0}, failed=True)
    with parts_of(output, 1, 2, 2) as parts:
        parts.add(1, {"index": 1}, failed=False)
        assert parts.merge() == Merged(2, 1)


def test_a_torn_record_is_cut_off(tmp_path: Path) -> None:
    """Also one that is longer than what follows."""
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts" / "part-00000.jsonl"
    with parts_of(output, 0, 1, 2) as parts:
        parts.add(0, {"index": 0}, failed=False)
    before = part.read_bytes()
    part.write_bytes(before + b'{"line": 1, "output": ' + b"x" * 10_000)
    with parts_of(output, 0, 1, 2):
        assert part.read_bytes() == before


def test_parts_alone_are_enough(tmp_path: Path) -> None:
    """Without the input."""
    output = tmp_path / "out.jsonl"
    with parts_of(output, 1, 2, 2) as parts:
        parts.add(1, {"index": 1}, failed=False)
    with pytest.raises(FlagError, match="1 lines are missing"):
        merge_parts(output)
    with parts_of(output, 0, 2, 2) as parts:
        parts.add(0, {"index": 0}, failed=False)
    assert merge_parts(output) == Merged(2, 0)
    assert output.read_text() == '{"index": 0}\n{"index": 1}\n'


# --- the disk


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Set the largest size that a file of this process may have."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [100, 1500, 3000])
def test_a_full_disk_loses_nothing(
    batch: Batch, whole: bytes, file_size_limit: Callable[[int], None], room: int
) -> None:
    """Within the header, and within a record: it is cut off, the message says what to do, and the next run goes on."""
    file_size_limit(room)
    outcome = batch()
    file_size_limit(resource.RLIM_INFINITY)
    assert (outcome.code, outcome.out) == (2, "")
    assert "make room, and run the same command again" in outcome.message
    data = (batch.parts / "part-00000.jsonl").read_bytes()
    assert room == 100 or (data.endswith(b"\n") and 1 < data.count(b"\n") < 24)
    assert batch().code == 2
    assert batch.output.read_bytes() == whole


def test_a_full_disk_within_the_merge(
    batch: Batch, whole: bytes, file_size_limit: Callable[[int], None], tmp_path: Path
) -> None:
    for rank in (0, 1):
        file_size_limit(len(whole) - 10 if rank else resource.RLIM_INFINITY)
        outcome = batch(rank=rank, world_size=2)
    file_size_limit(resource.RLIM_INFINITY)
    assert outcome.code == 2
    assert "make room" in outcome.message
    assert not batch.output.exists()
    loads = len(batch.models)
    assert batch().code == 2
    assert batch.output.read_bytes() == whole
    assert len(batch.models) == loads


# --- what a run says


def test_the_last_lines_of_the_log(batch: Batch) -> None:
    batch.lines({"prompt": "the cat", "max_gen_len": 5, "ignore_eos": True}, {"prompt": "the dog", "max_gen_len": 0})
    outcome = batch()
    answered, wrote, failed = outcome.err.splitlines()[-3:]
    assert answered.startswith("Answered 2 of 2 lines (1 errors), ")
    assert answered.endswith(" tok/s")
    assert wrote == f"Wrote {batch.output}: 2 lines"
    assert failed.startswith("llama-xla: 1 of 2 lines")
    batch.output.unlink()
    assert batch("--quiet").err == failed + "\n"


CAT = {"prompt": "the cat", "max_gen_len": 5, "ignore_eos": True, "temperature": 0}
DOG = {**CAT, "prompt": "the dog"}


@pytest.fixture
def cats_are_cut(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of a cat's line counts as cut: the fake device follows no grammar."""
    batch.lines(CAT)
    assert batch().code == 0
    (text,) = (each["generation"] for each in batch.results()[0]["results"])
    batch.output.unlink()
    monkeypatch.setattr("llama.batch.stream.is_cut", lambda found, *_: found == text)


@pytest.mark.parametrize("to_stdout", [False, True])
@pytest.mark.parametrize(
    ("lines", "flags", "code", "message"),
    [
        ([CAT, DOG, CAT], [], 0, ""),
        ([CAT, DOG, CAT], ["--strict_grammar"], 4, "2 of 3 lines hold a text that ended before"),
        ([DOG], ["--strict_grammar"], 0, ""),
        ([CAT, {"prompt": 1}], ["--strict_grammar"], 2, "; 1 of 2 lines hold a text that ended before"),
        ([CAT, {"prompt": 1}], [], 2, "says why"),
    ],
)
def test_texts_that_were_cut_within_a_grammar(
    batch: Batch,
    cats_are_cut: None,
    to_stdout: bool,
    lines: list[dict[str, Any]],
    flags: list[str],
    code: int,
    message: str,
) -> None:
    """They are counted, and written all the same; an error of another line has the louder exit code."""
    batch.lines(*lines)
    outcome = batch(*flags, *(["--output", "-"] if to_stdout else []))
    assert (outcome.code, message in outcome.message) == (code, True), outcome.err
    cut, failed = lines.count(CAT), len(lines) - lines.count(CAT) - lines.count(DOG)
    told = f", {cut} cut within a grammar" if cut else ""
    assert f"Answered {len(lines)} of {len(lines)} lines ({failed} errors{told}), " in outcome.err
    written = outcome.objects if to_stdout else batch.results()
    assert [len(each["results"]) for each in written] == [int(line in (CAT, DOG)) for line in lines]


def test_the_process_that_merges_counts_what_was_cut(batch: Batch, cats_are_cut: None) -> None:
    """As wrong lines: those of other processes and of earlier runs, too."""
    batch.lines(CAT, DOG, CAT, DOG, CAT)
    assert batch("--strict_grammar", rank=0, world_size=2).code == 0
    kept = shutil.copytree(batch.parts, batch.parts.with_name("kept"))
    outcome = batch("--strict_grammar", rank=1, world_size=2)
    assert (outcome.code, "3 of 5 lines hold" in outcome.message) == (4, True)
    batch.output.unlink()
    shutil.copytree(kept, batch.parts)
    outcome = batch("--strict_grammar")
    assert "Answered 2 of 2 lines (0 errors), " in outcome.err
    assert (outcome.code, "3 of 5 lines hold" in outcome.message) == (4, True)


def test_a_merge_without_a_model_counts_what_was_cut(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for rank in (0, 1):
        with parts_of(output, rank, 2, 2) as parts:
            parts.add(rank, {"index": rank}, failed=False, cut=rank == 1)
    part = tmp_path / "out.jsonl.parts" / "part-00000.jsonl"
    part.write_text(part.read_text().replace('"cut": false, ', ""))  # as an earlier version wrote it
    assert merge_parts(output) == Merged(2, 0, 1)


def test_a_long_run_says_how_far_it_is(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SECONDS_BETWEEN_LINES", 0)
    batch.lines({"prompt": "the cat"}, {"prompt": "the dog"})
    assert "So far 1 of 2 lines (0 errors), " in batch().err


def test_the_input_is_not_held_in_memory(tmp_path: Path) -> None:
    """Of a line its place is kept; it is read when its turn comes."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"prompt": "{"x" * 1000}{i}"}}\n' for i in range(3000)))
    with InputLines(path) as lines:
        assert len(lines) == 3000
        assert lines._offsets.itemsize * len(lines) < 100_000
        assert lines.read(2999).value["prompt"].endswith("x2999")
        assert lines.read(0).value["prompt"].endswith("x0")


# --- the demo model


@pytest.mark.slow
def test_the_demo_model_answers_the_example(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes write what one writes, to the last bit under --batch_invariant; log-probabilities are there."""
    flags = ["--input", str(EXAMPLE), "--max_gen_len", "16", "--batch_invariant", "--max_batch_size", "2"]
    flags += ["--buckets", "8,1"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert run("batch", *flags, "--output", str(one)).code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert run("batch", *flags, "--output", str(two)).code == 0
    found = [[json.loads(line) for line in path.read_text().splitlines()] for path in (one, two)]
    for results in found:
        assert results[-1]["response"]["body"].pop("created") > 0
    assert found[0] == found[1]
    assert len(found[0][3]["results"][0]["logprobs"][0]["top_logprobs"]) == 2
    assert all(result["stop_reason"] in (".", 2, None) for result in found[0][2]["results"])


@pytest.mark.slow
def test_a_grammar_that_was_cut(run: Run, tmp_path: Path) -> None:
    """A line with too few tokens for its grammar beside one that satisfies it, and one without any."""
    path = tmp_path / "in.jsonl"
    regexes = [{"regex": " [a-z]{40}"}, {"regex": " [0-9]{2}"}, {}]
    path.write_text("".join(json.dumps({"prompt": "Once", "max_gen_len": 8, **each}) + "\n" for each in regexes))
    outcome = run("batch", "--input", str(path), "--buckets", "8,1", "--strict_grammar", "--verbose")
    assert outcome.code == 4
    assert "(0 errors, 1 cut within a grammar)" in outcome.err
    assert "Index 0: a text ended before its grammar was satisfied\n" in outcome.err
    assert outcome.message.startswith("llama-xla: 1 of 3 lines hold a text")
    assert len(outcome.objects) == 3


@pytest.mark.slow
def test_openai_s_logprobs(run: Run, tmp_path: Path) -> None:
    """The demo model's, in both forms of OpenAI; with echo the prompt's, too."""
    body = {"max_tokens": 3, "temperature": 0}
    dialog = {**body, "messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}
    lines = [
        openai("a", {**body, "prompt": "Once upon", "logprobs": 2, "echo": True}),
        openai("b", dialog, chat=True),
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = run("batch", "--input", str(path), "--buckets", "8,1", "--max_batch_size", "1")
    assert outcome.code == 0, outcome.err
    completion, chat = (each["response"]["body"]["choices"][0] for each in outcome.objects)
    told = completion["logprobs"]
    assert "".join(told["tokens"]).strip() == completion["text"].strip()
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(told["text_offset"])
    assert told["text_offset"][:2] == [0, len(told["tokens"][0])]
    assert [len(each["top_logprobs"]) for each in chat["logprobs"]["content"]] == [2, 2, 2]
    assert all(each["rank"] == 1 for each in chat["logprobs"]["content"])


@pytest.mark.slow
def test_ctrl_c_in_a_real_run(tmp_path: Path) -> None:
    """The first one ends the run after its step, with a hint; the same command ends it."""
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "Once", "max_gen_len": 2 if i < 3 else 400}) + "\n" for i in range(9))
    )
    flags = ["batch", "--input", str(path), "--output", str(output), "--max_batch_size", "2", "--ignore_eos"]
    part = output.with_name("out.jsonl.parts") / "part-00000.jsonl"
    with process(["-m", "llama.cli", *flags]) as running:
        while running.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 3):
            threading.Event().wait(0.02)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, ""), err
    assert "the same command does the others" in err
    assert not output.exists()


@pytest.mark.slow
def test_torch_is_not_imported_for_a_refusal(tmp_path: Path) -> None:
    for name in ("in.jsonl", "out.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a"}\n')
    program = (
        "import sys; from llama import cli; c = cli._exit_code(sys.argv[1:]); "
        "assert {'torch', 'torch_xla'}.isdisjoint(sys.modules); sys.exit(c)"
    )
    arguments = [sys.executable, "-c", program, "batch", "--input", "in.jsonl", "--output", "out.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "is there already" in done.stderr
