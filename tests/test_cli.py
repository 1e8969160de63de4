"""The command line as a user meets it: what goes to stdout, what to stderr, which exit code, and what a refusal says.

Most tests call the commands in this process, because importing torch_xla takes seconds; the few that need a process of
their own (a signal, a closed pipe, what gets imported) start one.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PROCESS_TIMEOUT_S, Outcome, Run, exit_code, finished, process, refused, refused_at_once

from llama import __version__, cli
from llama.cli.flags import HELP_COLUMN, HELP_WIDTH, help_text, shown
from llama.cli.generate import SYNTHETIC_PROMPT_LEN
from llama.cli.output import SEPARATOR, json_line
from llama.cli.terminal import visible
from llama.compiled.memory import check_fits
from llama.config import EngineConfig, ModelArgs
from llama.errors import ConfigError, LLaMAError, PromptError, RecompileError, UserError, setting
from llama.inputs import check_fit
from llama.sampling_params import SamplingParams

FIELDS = [
    "index",
    "sample",
    "prompt",
    "generation",
    "token_ids",
    "finish_reason",
    "stop_reason",
    "usage",
    "timing",
    "programs",
    "seed",
]
USAGE_FIELDS = ["prompt_tokens", "cached_tokens", "completion_tokens"]
TIMING_FIELDS = ["load_s", "compile_s", "queue_s", "ttft_s", "prefill_s", "decode_s", "prefill_tok_s", "decode_tok_s"]
TINY_SHAPE = ("--random_weights", "--dim", "64", "--n_layers", "2", "--n_heads", "4", "--n_kv_heads", "2")


@pytest.fixture
def generate_flags(tiny_checkpoint: Path) -> Callable[..., list[str]]:
    """The arguments of a ``generate`` with the tiny checkpoint, short shapes and a seed, where a test does not say
    otherwise.
    """
    defaults = {
        "--ckpt_dir": str(tiny_checkpoint),
        "--buckets": "8,1",
        "--max_seq_len": "64",
        "--max_gen_len": "6",
        "--seed": "1",
    }

    def flags(*given: str) -> list[str]:
        rest = {name: value for name, value in defaults.items() if name not in given}
        return ["generate", *given, *(word for pair in rest.items() for word in pair)]

    return flags


@pytest.fixture
def generate(run: Run, generate_flags: Callable[..., list[str]]) -> Run:
    """``generate("--prompt", "a")``: that command in this process."""

    def call(*given: str) -> Outcome:
        return run(*generate_flags(*given))

    return call


# --- refused before loading


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("--propmt", "--prompt"),
        ("--temprature", "--temperature"),
        ("--topp", "--top_p"),
        ("--max_gen_length", "--max_gen_len"),
        ("--max-sequence-len", "--max_seq_len"),
        ("--ckptdir", "--ckpt_dir"),
    ],
)
@pytest.mark.parametrize("value", [[], ["x"]])
def test_an_unknown_flag_names_the_nearest_right_one(run: Run, written: str, meant: str, value: list[str]) -> None:
    """A misspelt flag is an error that helps; it is never dropped, with or without a value behind it."""
    refused_at_once(run("generate", written, *value), written, f"did you mean {meant}?")


def test_an_unknown_flag_like_no_other_points_to_the_help(run: Run) -> None:
    """Where no flag is near, none is suggested."""
    outcome = run("generate", "--zzzzqqqq", "1")
    refused_at_once(outcome, "--zzzzqqqq", "--help")
    assert "did you mean" not in outcome.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        # the form of the command line
        ("--max_gen_len 3 --max_gen_len 4", ["--max_gen_len", "2 times", "once"]),
        ("--max_gen_len 3 --max-gen-len=3", ["--max_gen_len", "2 times", "once"]),
        ("--quiet --quiet", ["--quiet", "2 times", "once"]),
        ("--prompt", ["--prompt", "no value"]),
        ("--quiet --seed", ["--seed", "no value"]),
        ("two words", ["unexpected argument", "'words'"]),
        ("--prompt two words", ["unexpected argument", "'words'"]),
        ("-p x", ["unexpected argument", "'-p'"]),
        ("-- x", ["unexpected argument", "'--'"]),
        # types
        ("--max_gen_len 1.5", ["--max_gen_len", "'1.5'", "whole number"]),
        ("--max_gen_len many", ["--max_gen_len", "'many'", "whole number"]),
        ("--max_gen_len=", ["--max_gen_len", "''", "whole number"]),
        ("--max_gen_len --json", ["--max_gen_len", "no value", "--max_gen_len=--json"]),
        ("--prompt --max_gen_len 3", ["--prompt", "no value", "--prompt=--max_gen_len"]),
        ("--temperature warm", ["--temperature", "'warm'", "a number"]),
        ("--seed 1e3", ["--seed", "'1e3'", "whole number"]),
        ("--json=maybe", ["--json", "'maybe'", "true or false"]),
        ("--stream maybe not", ["unexpected argument", "'not'"]),
        # values
        ("--temperature -1", ["temperature", "-1", "0 or more"]),
        ("--temperature nan", ["temperature", "nan", "finite"]),
        ("--temperature inf", ["temperature", "inf", "finite"]),
        ("--top_p 0", ["top_p", "0", "above 0"]),
        ("--top_p 1.5", ["top_p", "1.5", "at most 1"]),
        ("--top_p nan", ["top_p", "nan"]),
        ("--max_gen_len 0", ["max_gen_len", "0", "at least 1"]),
        ("--seed -1", ["seed", "-1"]),
        ("--seed 9223372036854775808", ["seed", "9223372036854775808", "2**63 - 1"]),
        ("--repeat 0", ["--repeat", "0", "at least 1"]),
        ("--max_batch_size 0", ["max_batch_size", "0", "at least 1"]),
        ("--max_seq_len 1", ["max_seq_len", "1", "at least 2"]),
        ("--max_seq_len 0", ["max_seq_len", "0", "at least 2"]),
        ("--buckets 8", ["buckets", "[8]", "1 among them"]),
        ("--buckets 8,0,1", ["buckets", "[8, 0, 1]", "positive"]),
        ("--buckets a,b", ["--buckets", "'a,b'", "512,64,8,1"]),
        ("--buckets 8,,1", ["--buckets", "'8,,1'", "512,64,8,1"]),
        ("--buckets=", ["--buckets", "''", "512,64,8,1"]),
        ("--bucket_policy lazy", ["--bucket_policy", "'lazy'", "greedy", "pad"]),
        ("--dtype fp8", ["--dtype", "'fp8'", "auto", "float32", "bfloat16"]),
        ("--prompt_len 0", ["--prompt_len", "0", "at least 1"]),
        ("--top_k -2", ["top_k", "-2", "0 or more"]),
        ("--min_p 2", ["min_p", "2.0", "0 to 1"]),
        ("--repetition_penalty 0", ["repetition_penalty", "above 0"]),
        ("--repeat_penalty 0", ["repetition_penalty", "above 0"]),
        ("--presence_penalty -3", ["presence_penalty", "-3", "-2 to 2"]),
        ("--logit_bias 5", ["--logit_bias", "'5'", "15043:-100"]),
        ("--logit_bias 5:x", ["--logit_bias", "'5:x'", "15043:-100"]),
        ("--logit_bias {5:1}", ["--logit_bias", "JSON object"]),
        ("--logit_bias 5:200", ["logit_bias", "200.0 for id 5", "-100 to 100"]),
        ("--logprobs 21", ["logprobs", "21", "0 to 20"]),
        ("--min_tokens 300", ["min_tokens", "300", "max_gen_len=256"]),
        ("--stop=", ["stop", "empty"]),
        ("--regex [0-", ["regex", "unclosed character class"]),
        ("--json_schema nowhere.json", ["--json_schema nowhere.json", "No such file"]),
        ("--max_tokens 3 --max_gen_len 3", ["--max_gen_len", "2 times"]),
        # flags that contradict each other
        ("--dim 64", ["--dim", "--random_weights", "--ckpt_dir"]),
        ("--dim 64 --ckpt_dir somewhere", ["--dim", "params.json"]),
        ("--vocab_size 9 --n_heads 2 --ckpt_dir somewhere", ["--vocab_size", "--n_heads", "params.json"]),
        ("--random_weights --ckpt_dir somewhere", ["--random_weights", "--ckpt_dir", "both"]),
        ("--random_weights", ["--random_weights", "--dim", "--n_layers", "--n_heads"]),
        ("--random_weights --dim 64 --n_heads 4", ["--random_weights", "--n_layers"]),
        ("--random_weights --dim 63 --n_layers 1 --n_heads 4", ["dim", "63", "4 heads"]),
        ("--prompt_len 5 --prompt a", ["--prompt_len", "--prompt"]),
        ("--n 2 --temperature 0", ["n: got 2", "temperature 0"]),
        ("--n 3 --best_of 2", ["best_of: got 2", "n=3"]),
        ("--n 1 --best_of 2 --stream", ["--stream", "--best_of 2"]),
        ("--regex a --ignore_eos", ["ignore_eos", "regex"]),
    ],
)
def test_flags_are_checked_before_anything_is_loaded(run: Run, flags: str, words: list[str]) -> None:
    """A wrong command line costs a line and no waiting: the message names the flag, what it got and what it takes."""
    refused_at_once(run("generate", *flags.split()), *words)


def test_a_synthetic_prompt_and_a_prompts_file_exclude_each_other(run: Run, tmp_path: Path) -> None:
    """A file's prompts are not dropped in favour of a synthetic one."""
    path = tmp_path / "prompts.txt"
    path.write_text("a\n")
    refused_at_once(run("generate", "--prompt_len", "5", "--prompts_file", str(path)), "--prompt_len", "--prompts_file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["No such file"]),
        (b"", ["no prompts", "one a line"]),
        (b"\n  \r\n\t\n", ["no prompts", "one a line"]),
        (b"\xef\xbb\xbf", ["no prompts"]),
        (b"\xff", ["not UTF-8", "line 1"]),
        (b"good\n\nstill good\ncaf\xe9\n", ["not UTF-8", "line 4", "byte 20"]),
        (b"\xef\xbb\xbfgood\n\xff\n", ["not UTF-8", "line 2", "byte 8"]),
        ("utf-16\n".encode("utf-16"), ["not UTF-8", "line 1"]),
    ],
    ids=repr,
)
def test_a_bad_prompts_file_is_refused(run: Run, tmp_path: Path, content: bytes | None, words: list[str]) -> None:
    """The message names the file, and the line that is not UTF-8 as an editor counts it."""
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    refused_at_once(run("generate", "--prompts_file", str(path)), str(path), *words)


def test_a_directory_is_no_prompts_file(run: Run, tmp_path: Path) -> None:
    """What cannot be read is an error of the user's, not a traceback."""
    refused_at_once(run("generate", "--prompts_file", str(tmp_path)), str(tmp_path), "directory")


def test_bad_stdin_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that are piped in are checked like a file's."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff")))
    refused_at_once(run("generate", "--prompts_file", "-"), "stdin", "not UTF-8", "line 2")


# --- refused when the model is known


@pytest.mark.slow
def test_a_prompt_that_does_not_fit_says_what_would(generate: Run) -> None:
    """The numbers of the refusal are true: the largest max_gen_len that it names runs, and one more does not."""
    sums = ["1 prompt tokens", "max_gen_len 70", "71 positions", "max_seq_len is 64"]
    refused(generate("--prompt", "", "--max_gen_len", "70"), *sums, "--max_seq_len 71", "--max_gen_len 63 at most")
    refused(generate("--prompt", "", "--max_gen_len", "64"), "--max_seq_len 65", "--max_gen_len 63 at most")
    assert generate("--prompt", "", "--max_gen_len", "63").code == 0


def test_a_prompt_longer_than_the_cache_is_refused(generate: Run) -> None:
    """Of several prompts the one that does not fit is named, before any is run, and no impossible cure is offered."""
    outcome = generate("--prompt", "a", "--prompt", "word " * 40, "--max_gen_len", "4")
    refused(outcome, "prompt 1 does not fit", "max_seq_len is 64", "a prompt of 60 tokens at most")
    assert "--max_gen_len" not in outcome.err


@pytest.mark.parametrize("prompt", ["ab\udcff", '["\\ud800"]', "\ud83d alone"], ids=["byte", "json", "half"])
def test_a_prompt_that_is_not_unicode_is_refused(generate: Run, prompt: str) -> None:
    """An argument with bytes that are not UTF-8 reaches Python as surrogates; they are refused by place, not
    encoded.
    """
    refused(
        generate("--prompt", "fine", "--prompt", prompt),
        "prompt 1",
        "not valid Unicode",
        f"character {2 if prompt[0] == 'a' else 0}",
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ckpt_dir", "{tmp}/absent"], ["no such directory", "{tmp}/absent"]),
        (["--ckpt_dir", "{tmp}"], ["{tmp} holds no checkpoint", "params.json", "config.json"]),
        (["--tokenizer_path", "{tmp}/absent.model"], ["no tokenizer at {tmp}/absent.model", "--tokenizer_path"]),
        ([*TINY_SHAPE, "--vocab_size", "100", "--tokenizer_path", "{tokenizer}"], ["320", "100", "--tokenizer_path"]),
    ],
    ids=["no directory", "no params", "no tokenizer", "small vocabulary"],
)
def test_a_model_that_cannot_be_loaded_is_refused(
    run: Run,
    generate_flags: Callable[..., list[str]],
    tmp_path: Path,
    tokenizer_path: Path,
    flags: list[str],
    words: list[str],
) -> None:
    """Errors of a checkpoint and of a tokenizer reach the user as one line too."""
    places = {"tmp": str(tmp_path), "tokenizer": str(tokenizer_path)}
    arguments = ["generate", *flags] if "--random_weights" in flags else generate_flags(*flags)
    refused(run(*(a.format(**places) for a in arguments), "--prompt", "a"), *(w.format(**places) for w in words))


# --- prompts as typed


HARD_TEXTS = [
    "1, 2",
    "[x",
    "[1, 2]",
    '["a", 1]',
    "{'a': 1}",
    '{"a": 1}',
    "None",
    "True",
    "0x10",
    "1e5",
    "-5",
    "-",
    "--dashes inside",
    "--max_gen_len",
    "--prompt=x",
    "a=b",
    "'quoted'",
    '"quoted"',
    "don't (stop",
    "back\\slash \\n",
    "two\nlines\r\n",
    " spaces  around ",
    "# comment",
    "$HOME ~ *",
    "tab\there",
    "caf\u00e9 \u6f22\u5b57 \U0001f642",
    "nul\0",
    "</s>",
]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["separate", "equals", "list"])
@pytest.mark.parametrize("text", HARD_TEXTS, ids=repr)
def test_a_prompt_arrives_unchanged(generate: Run, text: str, form: str) -> None:
    """fire would read such texts as tuples, numbers, flags or comments; a prompt is a text whatever it looks like."""
    arguments = {
        "separate": ["--prompt", text],
        "equals": [f"--prompt={text}"],
        "list": ["--prompt", json.dumps([text])],
    }[form]
    outcome = generate(*arguments, "--json", "--max_gen_len", "1")
    if form == "separate" and text.partition("=")[0] in ("--max_gen_len", "--prompt"):
        refused_at_once(
            outcome, "--prompt: got no value", f"--prompt={text}"
        )  # a forgotten value must not eat the next flag
        return
    assert outcome.code == 0
    assert [r["prompt"] for r in outcome.results] == [text]


@pytest.mark.slow
def test_prompt_may_be_repeated_and_be_a_list(generate: Run) -> None:
    """Repeating the flag and giving a JSON list add up, in order."""
    flags = ["--prompt", "one", "--prompt", '["two", "three, 3"]', "--prompt", "[four"]
    outcome = generate(*flags, "--max_batch_size", "2", "--max_gen_len", "1", "--json")
    assert [r["prompt"] for r in outcome.results] == ["one", "two", "three, 3", "[four"]


def test_an_empty_list_of_prompts_is_not_something_else(generate: Run) -> None:
    """A script that builds the list and has nothing to ask gets no answer to a prompt that it never gave."""
    outcome = generate("--prompt", "[]", "--json", "--max_gen_len", "1")
    assert outcome.out == ""


@pytest.mark.slow
def test_a_prompts_file_is_read_line_by_line(generate: Run, tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, blank lines and a missing last line end are no part of any prompt; spaces
    are.
    """
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  \n two, [2] \r\n\nthr\xc3\xa9e")
    outcome = generate("--prompts_file", str(path), "--max_batch_size", "2", "--max_gen_len", "1", "--json")
    assert [r["prompt"] for r in outcome.results] == ["one", " two, [2] ", "thr\u00e9e"]


def test_prompts_come_from_stdin(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """``-`` reads stdin as UTF-8 whatever the terminal's encoding is; prompts given as flags come first."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("caf\u00e9\nb\n".encode()), encoding="ascii"))
    outcome = generate(
        "--prompts_file", "-", "--prompt", "first", "--max_batch_size", "2", "--max_gen_len", "1", "--json"
    )
    assert [r["prompt"] for r in outcome.results] == ["first", "caf\u00e9", "b"]


@pytest.mark.slow
def test_the_empty_prompt_is_bos_alone(generate: Run) -> None:
    """An empty text is a prompt like any other, and not taken for a flag that is missing."""
    (result,) = generate("--prompt", "", "--json").results
    assert (result["prompt"], result["usage"]["prompt_tokens"]) == ("", 1)


@pytest.mark.slow
def test_a_synthetic_prompt_has_the_length_asked_for(generate: Run) -> None:
    """``--prompt_len 7`` is seven tokens behind BOS, in every row of the batch."""
    outcome = generate("--prompt_len", "7", "--max_batch_size", "2", "--json", "--max_gen_len", "1")
    assert [r["usage"]["prompt_tokens"] for r in outcome.results] == [8, 8]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag", [["--max_gen_len", "3"], ["--max-gen-len", "3"], ["--max-gen-len=3"], ["--max_gen-len=3"]]
)
def test_dashes_and_underscores_are_the_same_in_a_flag(run: Run, tiny_checkpoint: Path, flag: list[str]) -> None:
    """Both spellings reach the command."""
    shape = ["--ckpt_dir", str(tiny_checkpoint), "--buckets", "8,1", "--max-seq-len", "64", "--temperature", "0"]
    (result,) = run("generate", *shape, *flag, "--prompt", "a", "--json").results
    assert result["usage"]["completion_tokens"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "is_json"),
    [("--json", True), ("--json true", True), ("--json=True", True), ("--json false", False), ("--json=False", False)],
)
def test_a_switch_may_be_given_a_value(generate: Run, flags: str, is_json: bool) -> None:
    """fire's way to write a switch works in both directions, and what follows a bare switch is still a flag of its
    own.
    """
    outcome = generate(*flags.split(), "--prompt", "a", "--max_gen_len", "1")
    assert outcome.code == 0
    assert outcome.out.startswith('{"index": 0') == is_json


# --- what is printed


def test_json_is_one_object_a_prompt_with_exactly_these_fields(generate: Run) -> None:
    """The fields are an interface: none is missing, none is added unnoticed, and all have the types that scripts rely
    on.
    """
    outcome = generate("--prompt", "once", "--prompt", "upon a time", "--json")
    assert outcome.code == 0
    assert outcome.out.endswith("}\n")
    assert len(outcome.objects) == 2
    for index, result in enumerate(outcome.objects):
        assert list(result) == FIELDS
        assert list(result["usage"]) == USAGE_FIELDS
        assert list(result["timing"]) == TIMING_FIELDS
        assert list(result["programs"]) == ["compiled", "runs"]
        assert result["index"] == index
        assert result["seed"] == 1
        assert result["finish_reason"] in ("length", "stop")
        assert result["usage"]["completion_tokens"] == len(result["token_ids"]) > 0
        assert all(isinstance(i, int) for i in result["token_ids"])
        assert all(isinstance(s, float) and s >= 0 for s in result["timing"].values())
        assert result["programs"]["compiled"] > 0


@pytest.mark.slow
def test_more_prompts_than_slots_wait_for_one_and_keep_their_order(generate: Run) -> None:
    """Three prompts in two slots: the third one waits until another has ended, and nothing else of it differs."""
    prompts = ["a", "b c d e f", "the house"]
    flags = [word for prompt in prompts for word in ("--prompt", prompt)]
    waiting = generate(*flags, "--json", "--max_batch_size", "2")
    together = generate(*flags, "--json", "--max_batch_size", "4")
    assert [(r["index"], r["prompt"]) for r in waiting.results] == list(enumerate(prompts))
    assert [r["token_ids"] for r in waiting.results] == [r["token_ids"] for r in together.results]
    queued = [r["timing"]["queue_s"] for r in waiting.results]
    assert queued[2] > max(queued[:2])
    assert queued[2] >= min(r["timing"]["ttft_s"] for r in waiting.results)
    assert waiting.err.count("3 prompts in all: ") == together.err.count("3 prompts in all: ") == 1


def test_text_output_is_the_generations_with_a_line_between(generate: Run) -> None:
    """Without --json stdout is the text alone: no log, no prompt, a separator between two results."""
    flags = ["--prompt", "once", "--prompt", "the"]
    expected = [r["generation"] for r in generate(*flags, "--json").results]
    assert generate(*flags).out == SEPARATOR.join(f"{text}\n" for text in expected)


def test_echo_puts_the_prompt_before_its_generation(generate: Run) -> None:
    """Prompt and generation join without a character between them, since a space there belongs to the generation."""
    flags = ["--prompt", "once upon", "--prompt", "the cat"]
    expected = [r["prompt"] + r["generation"] + "\n" for r in generate(*flags, "--json").results]
    assert generate(*flags, "--echo").out == SEPARATOR.join(expected)
    assert generate(*flags, "--echo", "--stream").out == SEPARATOR.join(expected)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["1", "2", "4"])
@pytest.mark.parametrize("prompts", [["once"], ["once upon a time there was", "", "the", "a b c"]], ids=["one", "four"])
def test_streaming_prints_the_same_text(generate: Run, prompts: list[str], rows: str) -> None:
    """Rows advance together, but their text appears whole and in order, as without --stream."""
    flags = [word for prompt in prompts for word in ("--prompt", prompt)] + [
        "--max_batch_size",
        rows,
        "--max_gen_len",
        "24",
    ]
    whole = generate(*flags)
    assert whole.code == 0
    assert len(whole.out) > len(prompts)
    assert generate(*flags, "--stream").out == whole.out


def test_streamed_json_pieces_join_to_the_generation(generate: Run) -> None:
    """Each prompt's pieces stand before its result, in order of the prompts, and lose and add nothing."""
    outcome = generate(
        "--prompt",
        "once",
        "--prompt",
        "the house",
        "--prompt",
        "",
        "--max_batch_size",
        "2",
        "--max_gen_len",
        "24",
        "--json",
        "--stream",
    )
    assert outcome.code == 0
    joined, ended = "", []
    for piece in outcome.objects:
        assert piece["index"] == len(ended)
        if "piece" in piece:
            assert list(piece) == ["index", "sample", "piece"]
            assert piece["piece"] != ""
            joined += piece["piece"]
        else:
            assert list(piece) == FIELDS
            assert piece["generation"] == joined
            ended.append(joined)
            joined = ""
    assert len(ended) == 3
    assert len(outcome.objects) > 2 * 3


@pytest.mark.slow
def test_the_log_speaks_the_originals_words(generate: Run) -> None:
    """Scripts that grep pytorch-tpu/llama's log find its lines on stderr, with true numbers, and nothing of them on
    stdout; without --verbose there are none of them. test_log.py has more of the numbers.
    """
    flags = ["--prompt_len", "7", "--temperature", "0", "--json"]
    outcome = generate(*flags, "--verbose")
    (result,) = outcome.results
    generated = len(result["token_ids"])
    assert "Processing prompt pos [0, 8), section length 8\n" in outcome.err
    assert f"Processed prompts with 8 to 8 tokens, and generated {generated} tokens\n" in outcome.err
    assert re.search(rf"^Totally decoded {8 + generated} tokens in \d+\.\d+ seconds$", outcome.err, re.MULTILINE)
    loading, compiling, speeds = generate(*flags).err.splitlines()
    assert loading.startswith("Loading ")
    assert compiling.startswith("Compiling ")
    assert speeds.startswith("8 prompt tokens at ")


def test_the_log_names_every_section(generate: Run) -> None:
    """A prompt of nineteen tokens in buckets of 8 and 1 is five sections, logged as they run."""
    outcome = generate("--prompt_len", "18", "--max_gen_len", "1", "--verbose")
    found = re.findall(r"^Processing prompt pos \[(\d+), (\d+)\), section length (\d+)$", outcome.err, re.MULTILINE)
    assert found == [("0", "8", "8"), ("8", "16", "8"), ("16", "17", "1"), ("17", "18", "1"), ("18", "19", "1")]


def test_quiet_leaves_stderr_empty(generate_flags: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing at all, neither from this package nor from torch_xla beneath it; stdout is the same."""
    loud_code = exit_code(generate_flags("--prompt", "a"))
    loud = capfd.readouterr()
    quiet_code = exit_code(generate_flags("--prompt", "a", "--quiet"))
    quiet = capfd.readouterr()
    assert (loud_code, quiet_code) == (0, 0)
    assert (quiet.out, quiet.err) == (loud.out, "")
    assert loud.err != ""


def test_errors_are_shown_although_quiet(run: Run, tmp_path: Path) -> None:
    """--quiet silences the log, not the reason of a failure."""
    refused_at_once(run("generate", "--quiet", "--ckpt_dir", str(tmp_path / "absent")), "no such directory")


def test_a_seed_repeats_its_text(generate: Run) -> None:
    """The same seed gives the same text, another one another, and without one the seed that is shown repeats it."""
    flags = ["--prompt", "once", "--json", "--max_gen_len", "24", "--temperature", "1"]
    first, again, other = (generate(*flags, "--seed", seed).results[0] for seed in ("5", "5", "6"))
    assert first["token_ids"] == again["token_ids"]
    assert first["token_ids"] != other["token_ids"]
    assert (first["seed"], other["seed"]) == (5, 6)


def test_without_a_seed_the_one_that_was_drawn_is_shown(run: Run, tiny_checkpoint: Path) -> None:
    """Each prompt draws its own seed, and giving it as --seed repeats the text."""
    flags = [
        "generate",
        "--ckpt_dir",
        str(tiny_checkpoint),
        "--buckets",
        "8,1",
        "--max_seq_len",
        "64",
        "--max_gen_len",
        "12",
        "--json",
    ]
    drawn = run(*flags, "--prompt", "once", "--prompt", "once").results
    assert drawn[0]["seed"] != drawn[1]["seed"]
    for result in drawn:
        (repeated,) = run(*flags, "--prompt", "once", "--seed", str(result["seed"])).results
        assert repeated["token_ids"] == result["token_ids"]


@pytest.mark.parametrize("extra", [[], ["--fail_on_recompile"]], ids=["", "fail_on_recompile"])
def test_the_second_pass_compiles_nothing(generate: Run, extra: list[str]) -> None:
    """--repeat 2 prints both passes; all programs of the second are there already, so that its times are times of
    running.
    """
    outcome = generate("--prompt", "once", "--prompt", "the cat", "--repeat", "2", "--json", *extra)
    assert outcome.code == 0
    assert [r["index"] for r in outcome.results] == [0, 1, 0, 1]
    assert [r["programs"]["compiled"] > 0 for r in outcome.results] == [True, True, False, False]
    first, second = outcome.results[:2], outcome.results[2:]
    assert [r["generation"] for r in first] == [r["generation"] for r in second]
    assert "Pass 2 of 2" in outcome.err


def test_text_of_two_passes_is_printed_twice(generate: Run) -> None:
    """Passes are separated like prompts."""
    once = generate("--prompt", "once").out
    assert generate("--prompt", "once", "--repeat", "2").out == once + SEPARATOR + once


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--dtype bfloat16", "--bucket_policy pad", "--top_p 1", "--temperature 0"])
def test_other_settings_run(generate: Run, flags: str) -> None:
    """Every documented value of a setting reaches the engine and generates."""
    outcome = generate("--prompt", "once upon a time", "--json", *flags.split())
    assert outcome.code == 0
    assert outcome.results[0]["usage"]["completion_tokens"] > 0


@pytest.mark.slow
def test_random_weights_need_no_checkpoint(run: Run, tokenizer_path: Path) -> None:
    """A shape and a tokenizer are enough, with or without a text."""
    flags = [
        "generate",
        *TINY_SHAPE,
        "--tokenizer_path",
        str(tokenizer_path),
        "--buckets",
        "8,1",
        "--max_seq_len",
        "64",
        "--max_gen_len",
        "2",
    ]
    assert run(*flags, "--prompt", "a", "--json").results[0]["prompt"] == "a"
    assert run(*flags, "--json").results[0]["usage"]["prompt_tokens"] == SYNTHETIC_PROMPT_LEN + 1


@pytest.mark.parametrize("flags", ["--echo", "--json", "--echo --stream"])
def test_a_terminal_that_cannot_show_a_character_is_no_crash(
    generate_flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    """Models write any character; under an ASCII locale the result is still printed, somehow, instead of lost in a
    traceback.
    """
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    assert exit_code(generate_flags("--prompt", "caf\u00e9 noir", "--quiet", *flags.split())) == 0
    sys.stdout.flush()
    assert b" noir" in buffer.getvalue()


class Terminal(io.StringIO):
    """A stdout that is a terminal."""

    def isatty(self) -> bool:
        return True


OBEYED = "a\x1b[31mb\rc\x7fd\x9be\u202ef\u2028g\t\u00e9"


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_terminal_obeys_no_text(
    generate_flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, stream: list[str]
) -> None:
    """Control characters of a model are written out there, those of an echoed prompt, too; a pipe gets them exactly."""
    flags = generate_flags("--prompt", OBEYED, "--echo", "--regex", "x\x1b\\[2Jy", "--max_gen_len", "20", *stream)
    shown, exact = Terminal(), io.StringIO()
    for stdout in (shown, exact):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert exit_code([*flags, "--quiet"]) == 0
    assert exact.getvalue() == f"{OBEYED}x\x1b[2Jy\n"
    assert shown.getvalue() == "a\\x1b[31mb\\x0dc\\x7fd\\x9be\\u202ef\u2028g\t\u00e9x\\x1b[2Jy\n"


def test_a_line_of_json_is_one_line_of_harmless_text() -> None:
    """Also for Python's splitlines and at a terminal; the values are the same, and letters stay as they are."""
    line = json_line({"text": OBEYED + "\x85\u2029\u2066"})
    assert json.loads(line) == {"text": OBEYED + "\x85\u2029\u2066"}
    assert line.splitlines() == [line.removesuffix("\n")]
    assert visible(line) == line
    assert "\u00e9" in line


# --- commands and the help


@pytest.mark.parametrize("arguments", [["--version"], ["version"]])
def test_version(run: Run, arguments: list[str]) -> None:
    """The version is the package's."""
    outcome = run(*arguments)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"llama-xla {__version__}\n", "")


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["-h"], 0), (["help"], 0)])
def test_usage_names_every_command(run: Run, arguments: list[str], code: int) -> None:
    """No command at all shows what there is, and is an error; asking for it is none."""
    outcome = run(*arguments)
    assert outcome.code == code
    assert [name for name in cli.COMMANDS if f"llama-xla {name}" not in outcome.out + outcome.err] == []


@pytest.mark.parametrize(
    ("command", "hint"), [("genrate", "did you mean generate?"), ("zzz", "generate, chat"), ("--prompt", "generate")]
)
def test_an_unknown_command_is_refused(run: Run, command: str, hint: str) -> None:
    """A misspelt command names the nearest one, any other the ones that there are."""
    refused_at_once(run(command, "--prompt", "x"), "unknown command", command, hint)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_lists_every_parameter(run: Run, command: str, flag: str) -> None:
    """The help is written by hand; a parameter that is added without a line in it is noticed here."""
    outcome = run(command, flag)
    assert (outcome.code, outcome.err) == (0, "")
    listed = re.findall(r"^\s+--(\w+)", outcome.out, re.MULTILINE)
    assert sorted(listed) == sorted(inspect.signature(cli.COMMANDS[command]).parameters)


def test_help_shows_the_defaults(run: Run) -> None:
    """Defaults in the help are the signature's."""
    out = run("generate", "--help").out
    for name in ("max_gen_len", "dtype", "bucket_policy", "repeat"):
        default = inspect.signature(cli.generate).parameters[name].default
        described = out.partition(f"\n  --{name} ")[2].partition("\n  --")[0]
        assert described.split("\n\n")[0].endswith(f"[{default}]"), name


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_is_wrapped_within_its_column(command: str) -> None:
    """No line of a flag is wider than the help, and a text that goes on does so below its beginning."""
    lines = help_text(command, cli.COMMANDS[command]).splitlines()
    within = False
    for line in lines:
        within = line.startswith("  --") or (within and line.startswith(" "))
        if within:
            assert len(line) <= HELP_WIDTH, line
            assert line[HELP_COLUMN - 1] == " ", line
            assert line.startswith("  --") or line[:HELP_COLUMN].isspace(), line


def test_help_joins_the_lines_of_a_docstring() -> None:
    """A flag's text may go on over several lines, one of which begins like another flag's; sections stay apart."""

    def command(*, size: int = 3, color: str = "red") -> None:
        """Summary.

        Flags:
            size: One
                color: two
            three.
            color: Four words that are so many that they cannot stand on one line of the help, as they are too
                long.

        Other:
            text
        """

    assert help_text("x", command) == (
        "llama-xla x: Summary.\n\nFlags:\n"
        "  --size N                     One color: two three. [3]\n"
        "  --color TEXT                 Four words that are so many that they cannot stand on one line of the help, "
        "as\n"
        "                               they are too long. [red]\n"
        "\nOther:\n    text"
    )


def test_a_message_names_settings_in_python_and_flags_on_the_command_line() -> None:
    """Marked names, and a ConfigError's leading name, become flags if the command has them; other words stay."""
    marked = PromptError(f"prompt 0: the seed of stop; give {setting('max_gen_len')} 3 or {setting('max_turns')} 4")
    assert str(marked) == "prompt 0: the seed of stop; give max_gen_len 3 or max_turns 4"
    assert marked.args == (str(marked),)
    assert shown(marked, cli.generate) == "prompt 0: the seed of stop; give --max_gen_len 3 or max_turns 4"
    assert shown(marked, cli.plan) == str(marked)
    leading = ConfigError("top_p: got 2, expected a number; top_p: 1")
    assert str(leading) == "top_p: got 2, expected a number; top_p: 1"
    assert shown(leading, cli.generate) == "--top_p: got 2, expected a number; top_p: 1"
    assert shown(leading, cli.plan) == str(leading)
    assert shown(PromptError("prompt: x"), cli.generate) == "prompt: x"


@pytest.mark.parametrize(
    ("refuse", "python", "flags"),
    [
        (
            lambda: check_fit(0, 9, 4, 10),
            "it takes max_seq_len 13, or max_gen_len 1 at most",
            ["--max_seq_len 13", "--max_gen_len 1 at"],
        ),
        (
            lambda: check_fits(ModelArgs(vocab_size=320), EngineConfig(), torch.float32, torch.float32, 2**30),
            "a narrower dtype, or",
            ["narrower --dtype"],
        ),
        (lambda: SamplingParams(top_p=2), "top_p: got 2", ["--top_p: got 2"]),
        (
            lambda: SamplingParams(regex="a", json_schema="{}"),
            "both json_schema and regex,",
            ["--json_schema and --regex,"],
        ),
    ],
    ids=["fit", "memory", "range", "two"],
)
def test_library_messages_have_no_flags(refuse: Callable[[], object], python: str, flags: list[str]) -> None:
    """The same refusal, as Python reads it and as the command line shows it."""
    with pytest.raises(LLaMAError) as caught:
        refuse()
    assert python in str(caught.value)
    assert "--" not in str(caught.value)
    assert [word for word in flags if word not in shown(caught.value, cli.generate)] == []


def test_a_refusal_on_the_command_line_begins_with_the_flag(run: Run) -> None:
    """Whether the value or its type is wrong, the message names the flag; another command's message does not."""
    assert run("generate", "--top_p", "2").message.startswith("llama-xla: --top_p: got 2.0, ")
    assert run("generate", "--top_p", "x").message.startswith("llama-xla: --top_p: got 'x', ")
    assert run("plan", "--prompt_len", "5", "--max_seq_len", "1").message.startswith(
        "llama-xla: --max_seq_len: got 1, "
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LLaMAError("broken"), 1),
        (UserError("mend it"), 2),
        (PromptError("too long"), 2),
        (RecompileError("again"), 3),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_set_the_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    """Each branch of the tree in errors.py has its own code, and none of them shows a traceback."""

    def fail(arguments: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "run", fail)
    outcome = run("generate")
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err == f"llama-xla: {error}\n" if str(error) else "interrupted" in outcome.err


def test_main_exits_with_the_code_and_reads_the_process_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The console script is ``main()``."""
    monkeypatch.setattr(sys, "argv", ["llama-xla", "generate", "--propmt", "x"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "--prompt?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0


# --- plan


def test_plan_prints_the_sections_of_the_original(run: Run) -> None:
    """1501 tokens in 2048 positions are the seventeen sections of pytorch-tpu/llama's example."""
    outcome = run("plan", "--prompt_len", "1501", "--max_seq_len", "2048")
    assert (outcome.code, outcome.err) == (0, "")
    found = re.findall(
        r"^prompt pos \[(\d+), (\d+)\), section length (\d+), reads keys \[0, (\d+)\)$", outcome.out, re.MULTILINE
    )
    assert [int(length) for _, _, length, _ in found] == [512] * 2 + [64] * 7 + [8] * 3 + [1] * 5
    assert [start for start, _, _, _ in found] == ["0", *(end for _, end, _, _ in found[:-1])]
    assert found[-1][1] == "1501"
    assert all(int(end) <= int(keys) for _, end, _, keys in found)
    assert outcome.out.splitlines()[-1].startswith("17 sections, ")


def test_plan_json_is_one_chunk_a_line(run: Run) -> None:
    """The chunks of --json tile the prompt, and nothing else is printed."""
    outcome = run("plan", "--prompt_len", "1501", "--json")
    assert len(outcome.objects) == 17
    assert all(list(chunk) == ["start", "length", "valid", "key_len"] for chunk in outcome.objects)
    starts = [chunk["start"] for chunk in outcome.objects]
    assert [*starts[1:], 1501] == [chunk["start"] + chunk["valid"] for chunk in outcome.objects]


def test_plan_shows_padding(run: Run) -> None:
    """The pad policy's plan is shorter, and says which part of its last section is padding."""
    flags = ["plan", "--prompt_len", "63", "--max_seq_len", "128", "--buckets", "64,8,1"]
    greedy, padded = run(*flags), run(*flags, "--bucket_policy", "pad")
    assert "of it padding" not in greedy.out
    assert padded.out.startswith(
        "prompt pos [0, 63), section length 64, 1 of it padding, reads keys [0, 128)\n1 section, "
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--prompt_len 2049", ["prompt_len", "2049", "max_seq_len=2048"]),
        ("--prompt_len 65 --max_seq_len 64", ["prompt_len", "65", "max_seq_len=64"]),
        ("--prompt_len 0", ["prompt_len", "0", "expected 1"]),
        ("", ["--prompt_len", "needed", "plan --help"]),
        ("--prompt_len 5 --buckets 8", ["buckets", "1 among them"]),
        ("--prompt_len 5 --bucket_policy x", ["--bucket_policy", "'x'", "greedy", "pad"]),
        ("--prompt 5", ["--prompt", "did you mean --prompt_len?"]),
    ],
)
def test_plan_refuses_what_cannot_be_planned(run: Run, flags: str, words: list[str]) -> None:
    """The same checks as generate's, with the numbers."""
    refused_at_once(run("plan", *flags.split()), *words)


# --- in their own process


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["plan", "--prompt_len", "1501"], 0), (["generate", "--help"], 0), (["generate", "--propmt", "x"], 2)],
    ids=["plan", "help", "refusal"],
)
def test_torch_is_not_imported_for_it(arguments: list[str], code: int) -> None:
    """Planning, helping and refusing flags take a moment, not the seconds that importing torch takes."""
    program = (
        "import sys; from llama import cli; c = cli._exit_code(sys.argv[1:]); "
        "print(*sys.modules, sep='\\n'); sys.exit(c)"
    )
    outcome = finished(["-c", program, *arguments])
    assert outcome.code == code, outcome.err
    assert "llama.engine.chunks" in outcome.out.splitlines()
    assert {"torch", "torch_xla", "sentencepiece"}.isdisjoint(outcome.out.splitlines())


@pytest.mark.slow
def test_the_module_runs_as_a_command() -> None:
    """``python -m llama.cli`` is the console script."""
    refused_at_once(finished(["-m", "llama.cli", "generate", "--propmt", "x"]), "--propmt", "did you mean --prompt?")


@pytest.mark.slow
def test_the_classic_entry_runs_generate(generate: Run, generate_flags: Callable[..., list[str]]) -> None:
    """``python example_xla.py`` takes the flags behind ``generate``, prints the same text, and is silent on stderr with
    --quiet.
    """
    flags = ["--prompt", "once upon, a time", "--temperature", "0"]
    outcome = finished(["example_xla.py", *generate_flags(*flags, "--quiet")[1:]])
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == generate(*flags).out


@pytest.mark.slow
def test_the_classic_entry_logs_the_originals_lines(generate_flags: Callable[..., list[str]]) -> None:
    """They come by themselves, without what else --verbose tells."""
    outcome = finished(["example_xla.py", *generate_flags("--prompt", "once upon, a time", "--max_gen_len", "2")[1:]])
    kinds = [line.split()[0] for line in outcome.err.splitlines()]
    assert kinds[:3] == ["Importing", "Loading", "Compiling"]
    assert kinds[-3:-1] == ["Processed", "Totally"]
    assert set(kinds[3:-3]) == {"Processing"}
    assert "generated at" in outcome.err.splitlines()[-1] or "generated," in outcome.err.splitlines()[-1]


class CtrlCAt(io.StringIO):
    """A stdout or stderr whose reader presses Ctrl-C as soon as he sees ``text``."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text, self._pressed = text, False

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._text in text and not self._pressed:
            self._pressed = True
            signal.raise_signal(signal.SIGINT)
        return written


def test_ctrl_c_ends_the_row_and_those_behind_it(
    generate_flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was generated is kept, the batches that wait are not run, every prompt has its result, and the old handler
    is back.
    """
    stdout = CtrlCAt('"piece"')
    monkeypatch.setattr(sys, "stdout", stdout)
    before = signal.getsignal(signal.SIGINT)
    flags = [
        "--prompt",
        "a",
        "--prompt",
        "b",
        "--prompt",
        "c",
        "--max_batch_size",
        "1",
        "--max_gen_len",
        "50",
        "--stream",
        "--json",
    ]
    outcome = Outcome(exit_code(generate_flags(*flags)), stdout.getvalue(), "")
    assert outcome.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert [(r["index"], r["finish_reason"]) for r in outcome.results] == [(i, "interrupted") for i in range(3)]
    first, *rest = outcome.results
    assert 0 < len(first["token_ids"]) < 50
    assert first["generation"] == "".join(o["piece"] for o in outcome.objects if "piece" in o)
    assert all(r["token_ids"] == [] and r["generation"] == "" for r in rest)


@pytest.mark.parametrize("moment", ["Processing prompt pos [0, 8)", "Processing prompt pos [8, 9)"])
def test_ctrl_c_before_the_first_token_is_a_result_too(
    generate_flags: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
) -> None:
    """Between two sections of a prompt there is no text yet; the result is empty and says why."""
    stderr = CtrlCAt(moment)
    monkeypatch.setattr(sys, "stderr", stderr)
    code = exit_code(generate_flags("--prompt_len", "8", "--max_gen_len", "50", "--json", "--verbose"))
    outcome = Outcome(code, capsys.readouterr().out, stderr.getvalue())
    assert outcome.code == 130
    assert "interrupted" in outcome.message.lower()
    (result,) = outcome.results
    assert result["finish_reason"] == "interrupted"
    assert len(result["token_ids"]) == (1 if moment.endswith("[8, 9)") else 0)


def test_ctrl_c_while_compiling_ends_the_command(
    generate_flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the current program, without a result: nothing has been generated."""
    stderr = CtrlCAt("Compiling")
    monkeypatch.setattr(sys, "stderr", stderr)
    before = signal.getsignal(signal.SIGINT)
    assert exit_code(generate_flags("--prompt_len", "8", "--max_gen_len", "50", "--json")) == 130
    assert capsys.readouterr().out == ""
    assert stderr.getvalue().endswith("llama-xla: interrupted while compiling\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_between_two_passes_is_not_lost(
    generate_flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pressed while a pass's last result is printed, it ends the command before the passes that are left."""
    stdout = CtrlCAt('"finish_reason"')
    monkeypatch.setattr(sys, "stdout", stdout)
    outcome = Outcome(exit_code(generate_flags("--prompt", "a", "--json", "--repeat", "4")), stdout.getvalue(), "")
    assert outcome.code == 130
    assert len([r for r in outcome.results if r["finish_reason"] != "interrupted"]) == 1


@pytest.mark.slow
def test_ctrl_c_prints_the_text_so_far(tokenizer_path: Path) -> None:
    """A real SIGINT to a real process in the middle of a long generation: a result that says so, exit code 130, no
    traceback.
    """
    shape = [
        "--random_weights",
        "--dim",
        "256",
        "--n_layers",
        "4",
        "--n_heads",
        "8",
        "--tokenizer_path",
        str(tokenizer_path),
    ]
    flags = ["--prompt", "", "--temperature", "0", "--buckets", "8,1", "--max_seq_len", "1024", "--max_gen_len", "1000"]
    with process(["-m", "llama.cli", "generate", *shape, *flags, "--stream", "--json"]) as running:
        assert running.stdout is not None
        first = running.stdout.readline()
        running.send_signal(signal.SIGINT)
        rest, err = running.communicate(timeout=PROCESS_TIMEOUT_S)
    outcome = Outcome(running.returncode, first + rest, err)
    assert "Traceback" not in err
    assert outcome.code == 130, err
    *pieces, result = outcome.objects
    assert result["finish_reason"] == "interrupted"
    assert result["generation"] == "".join(piece["piece"] for piece in pieces) != ""
    assert 0 < len(result["token_ids"]) < 1000


@pytest.mark.slow
def test_a_pipe_closed_in_the_middle_is_no_crash(generate_flags: Callable[..., list[str]]) -> None:
    """``| head -1``: the process ends at its next line, in silence, with the exit code that a shell gives such an
    end.
    """
    with process(["-m", "llama.cli", *generate_flags("--prompt", "a", "--json", "--repeat", "100000")]) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline().startswith('{"index": 0')
        running.stdout.close()
        err = running.stderr.read()
        running.wait(timeout=PROCESS_TIMEOUT_S)
    assert "BrokenPipe" not in err
    assert "Traceback" not in err
    assert running.returncode == 141


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["plan --prompt_len 1501", "plan --help", "--help"])
def test_a_pipe_closed_from_the_start_is_no_crash(arguments: str) -> None:
    """Commands whose output is short enough to be written at the process's very end behave the same."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        with process(["-m", "llama.cli", *arguments.split()], stdout=writing) as running:
            _, err = running.communicate(timeout=PROCESS_TIMEOUT_S)
    finally:
        os.close(writing)
    assert err == ""
    assert running.returncode == 141


def test_verbose_tells_memory_and_programs(run: Run, generate_flags: Callable[..., list[str]]) -> None:
    """And without it neither is told."""
    flags = generate_flags("--prompt", "a", "--max_gen_len", "1")
    assert re.search(
        r"^Memory: weights .* \+ cache .* \+ activations .* of .* free$", run(*flags, "--verbose").err, re.MULTILINE
    )
    assert "Memory" not in run(*flags).err


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_loaded(run: Run) -> None:
    """Weights can take minutes."""
    outcome = run("generate", "--prompt", "a", "--max_gen_len", "600")
    assert "Loading" not in outcome.err
    refused(outcome, "prompt 0 does not fit", "--max_seq_len")


# --- how tokens are chosen


@pytest.mark.parametrize("flag", ["--max_tokens", "--max-tokens", "--max_new_tokens"])
def test_other_systems_names_are_understood(run: Run, tiny_checkpoint: Path, flag: str) -> None:
    shape = [
        "--ckpt_dir",
        str(tiny_checkpoint),
        "--buckets",
        "8,1",
        "--max-seq-len",
        "64",
        "--temperature",
        "0",
        "--ignore_eos",
    ]
    (result,) = run("generate", *shape, flag, "3", "--prompt", "a", "--json").results
    assert result["usage"]["completion_tokens"] == 3


@pytest.mark.slow
def test_controls_reach_the_model(generate: Run) -> None:
    """Each flag by what it does: allowed ids and bias in the tokens, a stop string in the text, min_tokens in the
    count.
    """
    (only,) = generate("--prompt", "a", "--allowed_token_ids", "40,50", "--json").results
    assert set(only["token_ids"]) <= {40, 50}
    (biased,) = generate("--prompt", "a", "--logit_bias", '{"77": 100}', "--temperature", "0", "--json").results
    assert biased["token_ids"] == [77] * 6
    (stopped,) = generate(
        "--prompt", "a", "--logit_bias", "77:100", "--temperature", "0", "--stop_token_ids", "77", "--json"
    ).results
    assert (stopped["token_ids"], stopped["stop_reason"]) == ([], 77)
    (late,) = generate(
        "--prompt", "a", "--logit_bias", "2:100", "--min_tokens", "4", "--temperature", "0", "--json"
    ).results
    assert len(late["token_ids"]) == 4
    (shaped,) = generate("--prompt", "a", "--regex", "[0-9]{2}", "--json").results
    assert shaped["generation"].isdigit()
    stops = generate(
        "--prompt", "a", "--regex", "[0-9]{2}:x", "--stop", ":", "--stop", "q", "--include_stop", "--json"
    ).results
    assert (stops[0]["generation"][2:], stops[0]["stop_reason"]) == (":", ":")


@pytest.mark.slow
def test_samples_are_printed_one_after_the_other(generate: Run) -> None:
    """With --n, prompt by prompt, with the same line between them; streamed or not, as text and as JSON."""
    flags = ["--prompt", "once", "--prompt", "the", "--n", "3", "--temperature", "1"]
    results = generate(*flags, "--json").results
    assert [(r["index"], r["sample"], r["seed"]) for r in results] == [
        (i, k, 1 + k) for i in range(2) for k in range(3)
    ]
    texts = [r["generation"] for r in results]
    assert generate(*flags).out == (SEPARATOR.join(text + "\n" for text in texts))
    assert generate(*flags, "--stream", "--max_batch_size", "2").out == generate(*flags).out
    pieces = generate(*flags, "--stream", "--json").objects
    for i in range(2):
        for k in range(3):
            own = [p for p in pieces if (p["index"], p["sample"]) == (i, k)]
            assert "".join(p["piece"] for p in own[:-1]) == own[-1]["generation"]
    best = generate(*flags, "--best_of", "5", "--json").results
    assert len(best) == 6
    assert all(0 <= r["seed"] - 1 < 5 for r in best)


@pytest.mark.slow
def test_log_probabilities_are_a_table_behind_the_text(generate: Run) -> None:
    """A line a token; with --echo the prompt's, too, but for its first."""
    plain = generate("--prompt", "once", "--temperature", "0").out
    told = generate("--prompt", "once", "--temperature", "0", "--logprobs", "2").out
    assert told.startswith(plain)
    lines = told[len(plain) :].strip("\n").split("\n")
    assert lines[0].split() == ["logprob", "rank", "token", "likeliest"]
    assert len(lines) == 1 + 6
    assert all(line.split()[1] == "1" for line in lines[1:])  # greedy takes the likeliest
    echoed = generate("--prompt", "once", "--temperature", "0", "--logprobs", "2", "--echo")
    (result,) = generate("--prompt", "once", "--temperature", "0", "--logprobs", "2", "--echo", "--json").results
    assert len(result["prompt_logprobs"]) == result["usage"]["prompt_tokens"]
    assert result["prompt_logprobs"][0] is None
    assert echoed.out.count("\n") == plain.count("\n") + 2 + 6 + result["usage"]["prompt_tokens"] - 1


@pytest.mark.slow
def test_arrays_are_written_to_files(generate: Run, tmp_path: Path) -> None:
    """One .npy a generation, of one row a token; a directory that cannot be made is refused at once."""
    hidden, logits = tmp_path / "hidden", tmp_path / "deep" / "logits"
    outcome = generate(
        "--prompt",
        "once",
        "--prompt",
        "a",
        "--n",
        "2",
        "--hidden_states",
        str(hidden),
        "--logits",
        str(logits),
        "--json",
    )
    for result in outcome.results:
        count = len(result["token_ids"])
        name = f"{result['index']}-{result['sample']}.npy"
        assert np.load(hidden / name).shape == (count, 64)
        assert np.load(logits / name).shape == (count, 320)
    (tmp_path / "file").write_text("")
    refused_at_once(generate("--prompt", "a", "--logits", str(tmp_path / "file")), "--logits", "File exists")


@pytest.mark.slow
def test_a_grammar_that_was_cut_short_is_told(generate: Run, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"type": "integer"}, "minItems": 40}')
    outcome = generate("--prompt", "a", "--json_schema", str(tmp_path / "schema.json"))
    assert outcome.code == 0
    assert "prompt 0: cut at --max_gen_len before the json_schema was satisfied" in outcome.err


def test_a_schema_that_is_none_is_refused(generate: Run, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "nonsense"}')
    refused_at_once(
        generate("--prompt", "a", "--json_schema", str(tmp_path / "schema.json")), "json_schema", "nonsense"
    )
