"""What may be typed: a text without a flag, a prompt on stdin, help by every name, a model by any of its places; and
what is refused, in one line and at once.
"""

from __future__ import annotations

import io
import os
import pty
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import PROCESS_TIMEOUT_S, ROOT, Outcome, Run, finished, process, refused_at_once
from fakes import fake_llm

from llama import LLaMA, __version__, cli
from llama.cli.flags import help_text
from llama.cli.generate import generate as command
from llama.cli.hub import hub_cache, is_gguf, locate
from llama.cli.output import counted
from llama.config import DEMO_DIR, EngineConfig
from llama.errors import CheckpointError

generate_module = sys.modules["llama.cli.generate"]
DEMO_PROMPT = "Once upon a time"
QUIET = ("--json", "--quiet", "--max_gen_len", "3", "--temperature", "0")


class Typed(io.StringIO):
    """A stdin that is a terminal at which nothing is typed."""

    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    """A stdout whose disk is full."""

    def write(self, text: str, /) -> int:
        raise OSError(28, "No space left on device")


class Unreadable(io.StringIO):
    """A stdin whose reading fails."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self._error = error

    def read(self, size: int | None = -1, /) -> str:
        raise self._error


def piped(data: bytes) -> io.TextIOWrapper:
    """A stdin with these bytes."""
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


@pytest.fixture
def typed(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """``typed("generate", "a", stdin=piped(b""))``: a command whose model is a fake device's."""

    def build(*_: Any, config: EngineConfig, **__: Any) -> LLaMA:
        return fake_llm(
            DEMO_DIR / "tokenizer.model", max_seq_len=config.max_seq_len, max_batch_size=config.max_batch_size
        )

    def call(*arguments: str, stdin: io.TextIOBase | None = None) -> Outcome:
        monkeypatch.setattr(sys, "stdin", stdin or piped(b""))
        return run(*arguments)

    monkeypatch.setattr(LLaMA, "build", staticmethod(build))
    return call


def prompts(outcome: Outcome) -> list[str]:
    """The prompts that were continued."""
    assert outcome.code == 0, outcome.err
    return [result["prompt"] for result in outcome.results]


# ----------------------------------------------------------------------------------------------- a text without a flag


@pytest.mark.parametrize(
    "arguments",
    [
        ["Once upon a time"],
        ["generate", "Once upon a time"],
        ["generate", "--prompt", "Once upon a time"],
        ["generate", "--prompt=Once upon a time"],
    ],
    ids=["alone", "generate", "flag", "equals"],
)
def test_a_text_needs_no_flag(typed: Callable[..., Outcome], arguments: list[str]) -> None:
    """However the prompt is written, its text is the same."""
    assert prompts(typed(*arguments, *QUIET)) == ["Once upon a time"]


@pytest.mark.parametrize("text", ["Hello", "1, 2", '["a", "b"]', "a=b c", "tab\there", "generate a story", "caf\u00e9"])
def test_a_first_argument_that_is_no_command_is_the_prompt(typed: Callable[..., Outcome], text: str) -> None:
    """It arrives unchanged, also where --prompt would read a list; flags may stand before and after it."""
    assert prompts(typed(text, *QUIET)) == [text]
    assert prompts(typed("generate", "--seed", "1", text, *QUIET)) == [text]
    assert prompts(typed("generate", *QUIET, text)) == [text]


def test_several_texts_are_several_prompts(typed: Callable[..., Outcome]) -> None:
    assert prompts(typed("generate", "the dog ran", "the cat ran", *QUIET)) == ["the dog ran", "the cat ran"]
    assert prompts(typed("generate", "--prompt", "dog", "--prompt", "cat", *QUIET)) == ["dog", "cat"]


def test_the_empty_text_is_a_prompt(typed: Callable[..., Outcome]) -> None:
    assert prompts(typed("generate", "", *QUIET)) == [""]


def test_a_text_beside_a_prompts_file_comes_first(typed: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the cat\n")
    assert prompts(typed("the dog", "--prompts_file", str(tmp_path / "prompts.txt"), *QUIET)) == ["the dog", "the cat"]


def test_settings_of_a_refused_text_are_flags(run: Run) -> None:
    """A refusal after ``llama-xla TEXT`` names flags, as generate's does."""
    refused_at_once(run("Once upon a time", "--top_p", "2"), "--top_p: got 2.0")


# ------------------------------------------------------------------------------------------------- a prompt from stdin


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"The cat\n", "The cat"),
        (b"The cat", "The cat"),
        (b"The cat\r\n", "The cat"),
        (b"The\n\n cat \n\n", "The\n\n cat \n"),
        (b"\xef\xbb\xbfThe cat\n", "The cat"),
        ("Caf\u00e9".encode(), "Caf\u00e9"),
        (b"", DEMO_PROMPT),
        (b" \n\n", DEMO_PROMPT),
    ],
    ids=repr,
)
def test_a_prompt_comes_from_a_pipe(typed: Callable[..., Outcome], data: bytes, prompt: str) -> None:
    """All of stdin is one prompt, without its last line break; nothing on stdin is no prompt."""
    assert prompts(typed("generate", *QUIET, stdin=piped(data))) == [prompt]


@pytest.mark.parametrize("flags", [["the dog"], ["--prompt", "the dog"]], ids=["text", "flag"])
def test_a_given_prompt_leaves_stdin_alone(typed: Callable[..., Outcome], flags: list[str]) -> None:
    stdin = piped(b"the cat")
    assert prompts(typed("generate", *flags, *QUIET, stdin=stdin)) == ["the dog"]
    assert stdin.read() == "the cat"


@pytest.mark.parametrize("error", [OSError(9, "Bad file descriptor"), OSError("not to be read")], ids=str)
def test_a_stdin_that_cannot_be_read_is_no_prompt(typed: Callable[..., Outcome], error: OSError) -> None:
    assert prompts(typed("generate", *QUIET, stdin=Unreadable(error))) == [DEMO_PROMPT]


def test_a_piped_prompt_is_utf_8(typed: Callable[..., Outcome]) -> None:
    refused_at_once(typed("generate", stdin=piped(b"a\n\xff")), "stdin is not UTF-8", "line 2")


def test_one_of_several_processes_does_not_wait_for_stdin(
    typed: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share one stdin, of which one would get all."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prompts(typed("generate", *QUIET, stdin=piped(b"the cat"))) == [DEMO_PROMPT]


def test_a_silent_pipe_is_told(typed: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe on which nothing comes is waited for, and the log says so; the prompt is what comes at last."""
    stdin_fd, writing = os.pipe()
    waited: list[float] = []

    def select(reading: list[Any], *rest: Any) -> tuple[list[Any], ...]:
        waited.append(rest[-1])
        os.write(writing, b"the cat")
        os.close(writing)
        return [], [], []

    monkeypatch.setattr(generate_module.select, "select", select)
    with open(stdin_fd, encoding="utf-8") as stdin:
        outcome = typed("generate", "--json", "--max_gen_len", "3", stdin=stdin)
    assert "Reading the prompt from stdin" in outcome.err
    assert (prompts(outcome), waited) == (["the cat"], [generate_module.SILENCE_S])


# -------------------------------------------------------------------------------------------------------- at a terminal


@pytest.mark.parametrize("flags", [[], ["--ckpt_dir", str(DEMO_DIR)], ["--json"], ["--temperature", "0"]], ids=str)
def test_no_prompt_at_a_terminal_shows_how_to_give_one(typed: Callable[..., Outcome], flags: list[str]) -> None:
    """The help's first lines and exit code 2, not a story that nobody asked for."""
    outcome = typed("generate", *flags, stdin=Typed())
    shown, _, message = outcome.err.rstrip("\n").rpartition("\n")
    assert (outcome.code, outcome.out) == (2, "")
    assert help_text("generate", command).startswith(shown.rstrip())
    assert "--prompt TEXT" in shown
    assert "Model:" not in shown
    assert message.startswith("llama-xla: --prompt: got none")


def test_at_a_terminal_a_prompt_is_continued(typed: Callable[..., Outcome]) -> None:
    assert prompts(typed("Once upon", *QUIET, stdin=Typed())) == ["Once upon"]
    assert typed("generate", "--prompt_len", "4", *QUIET, stdin=Typed()).code == 0


@pytest.mark.slow
def test_the_classic_entry_continues_the_demo_prompt_at_a_terminal() -> None:
    """pytorch-tpu/llama's example prints a story without being asked for one."""
    ours, terminal = pty.openpty()
    try:
        with process(["example_xla.py", *QUIET], stdin=terminal) as running:
            out, err = running.communicate(timeout=PROCESS_TIMEOUT_S)
    finally:
        os.close(ours)
        os.close(terminal)
    assert prompts(Outcome(running.returncode, out, err)) == [DEMO_PROMPT]


@pytest.mark.skipif(shutil.which("bash") is None, reason="the script is bash's")
def test_the_demo_continues_the_demo_prompt_at_a_terminal(tmp_path: Path) -> None:
    """scripts/demo.sh hands generate an empty stdin; here both setup and generate are stand-ins."""
    scripts, programs = tmp_path / "scripts", tmp_path / ".venv/bin"
    scripts.mkdir()
    programs.mkdir(parents=True)
    shutil.copy(ROOT / "scripts/demo.sh", scripts)
    for path, line in ((scripts / "setup.sh", "true"), (programs / "llama-xla", 'echo "$@"; test -t 0 || wc -c')):
        path.write_text(f"#!/usr/bin/env bash\n{line}\n")
        path.chmod(0o755)
    ours, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [scripts / "demo.sh", "--seed", "1"], stdin=terminal, capture_output=True, text=True, timeout=60, check=True
        )
    finally:
        os.close(ours)
        os.close(terminal)
    assert done.stdout.split() == ["generate", "--echo", "--stream", "--seed", "1", "0"]


# ---------------------------------------------------------------------------------------------------- help and versions


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_takes_a_command(run: Run, name: str) -> None:
    """``llama-xla help NAME`` is ``llama-xla NAME --help``."""
    outcome = run("help", name)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome == run(name, "--help") == run("--help", name)


@pytest.mark.parametrize("flag", ["-V", "--version", "version"])
def test_the_version_has_three_names(run: Run, flag: str) -> None:
    outcome = run(flag)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"llama-xla {__version__}\n", "")


def test_a_count_of_one_is_singular(run: Run) -> None:
    """The plan of a single chunk."""
    for length, told in ((8, "1 section, 3 programs"), (9, "2 sections, 3 programs")):
        out = run("plan", "--prompt_len", str(length), "--max_seq_len", "64", "--buckets", "8,1").out
        assert out.splitlines()[-1] == f"{told}, {length} of 64 positions"
    assert [counted(number, "file") for number in range(3)] == ["0 files", "1 file", "2 files"]


@pytest.mark.parametrize("arguments", [["plan", "--prompt_len", "9"], ["help", "chat"], ["Once upon", *QUIET]], ids=str)
def test_a_full_disk_is_told(
    typed: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """What cannot be written to stdout is an error of one line; test_streams.py has the real streams."""
    monkeypatch.setattr(sys, "stdout", Full())
    refused_at_once(typed(*arguments), "cannot write to stdout", "No space left on device")


# ------------------------------------------------------------------------------------------------- where a model can be


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hugging Face's cache with the demo model as org/demo, its files being links as they are there."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    model = tmp_path / "hub" / "models--org--demo"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text("c0ffee")
    (model / "blobs").mkdir()
    (model / "snapshots/c0ffee").mkdir(parents=True)
    for number, file in enumerate(sorted(DEMO_DIR.iterdir())):
        if file.is_file():
            shutil.copy(file, model / f"blobs/{number}")
            (model / "snapshots/c0ffee" / file.name).symlink_to(f"../../blobs/{number}")
    return tmp_path / "hub"


@pytest.mark.parametrize("place", ["org/demo", "{hub}/models--org--demo", "{hub}/models--org--demo/snapshots"])
def test_a_model_in_the_cache_is_found(run: Run, cache: Path, place: str) -> None:
    """By its name on the hub, and by directories on the way to its files; another snapshot does not disturb."""
    (cache / "models--org--demo/snapshots/0ld").mkdir()
    snapshot = cache / "models--org--demo/snapshots/c0ffee"
    assert locate(place.format(hub=cache)) == str(snapshot)
    outcome = run("inspect", place.format(hub=cache))
    assert (outcome.code, outcome.out.splitlines()[0]) == (0, str(snapshot))
    assert "no problems found" in outcome.out


def test_every_command_takes_a_models_name(run: Run, cache: Path, tmp_path: Path) -> None:
    """Flags of other commands that name a checkpoint, and a draft model."""
    target = tmp_path / "converted"
    assert run("convert", "org/demo", str(target), "--quiet").code == 0
    assert (target / "params.json").is_file()
    for name, parameter in (("generate", "ckpt_dir"), ("generate", "draft_ckpt_dir"), ("bench", "ckpt_dir")):
        refused_at_once(run(name, f"--{parameter}", "org/none"), "no such directory: org/none", "hf download org/none")


@pytest.mark.slow
def test_the_model_and_its_tokenizer_come_from_the_cache(run: Run, cache: Path) -> None:
    """The text is the demo model's."""
    flags = ("--max_seq_len", "512", "--buckets", "8,1", *QUIET)
    found = run("generate", "Once", "--ckpt_dir", "org/demo", *flags)
    assert [r["generation"] for r in found.results] == [r["generation"] for r in run("Once", *flags).results]


def test_a_directory_is_taken_before_the_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is a directory here is that directory; a place that is nowhere is left to the checkpoint's reader."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/demo").mkdir(parents=True)
    assert locate("org/demo") == "org/demo"
    assert [locate(name) for name in ("nowhere", "/no/where", "./no/where", "")] == [
        "nowhere",
        "/no/where",
        "./no/where",
        "",
    ]


def test_the_only_snapshot_needs_no_reference(cache: Path) -> None:
    """A model that was downloaded by another revision has no refs/main; of several, one must be named."""
    model = cache / "models--org--demo"
    (model / "refs/main").unlink()
    assert locate("org/demo") == str(model / "snapshots/c0ffee")
    (model / "snapshots/0ld").mkdir()
    with pytest.raises(CheckpointError, match=r"holds 2 snapshots \(0ld, c0ffee\)"):
        locate("org/demo")
    shutil.rmtree(model / "snapshots")
    with pytest.raises(CheckpointError, match=r"holds no snapshot; download the model again: hf download org/demo "):
        locate(str(model))


def test_a_cache_names_its_models(run: Run, cache: Path) -> None:
    (cache / "models--org--other--one").mkdir()
    refused_at_once(run("inspect", str(cache)), "a cache of models", "org/demo, org/other--one")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c", "HOME": "/d"}, "/c/huggingface/hub"),
        ({"HOME": "/d", "HF_HOME": ""}, "/d/.cache/huggingface/hub"),
        ({"HF_HOME": "~/e", "HOME": "/d"}, "/d/e/hub"),
    ],
    ids=str,
)
def test_the_cache_is_where_huggingface_hub_looks(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    """The variables of huggingface_hub, the most exact one first."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(hub_cache()) == expected


@pytest.mark.slow
def test_huggingface_hub_agrees(cache: Path) -> None:
    """The library itself finds the model at the same place."""
    pytest.importorskip("huggingface_hub")
    code = "import huggingface_hub as h; print(h.snapshot_download('org/demo', local_files_only=True))"
    environment = {**os.environ, "HF_HOME": str(cache.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == locate("org/demo")


def test_a_file_given_as_a_directory_names_the_directory(run: Run, tmp_path: Path) -> None:
    weights = tmp_path / "consolidated.00.pth"
    weights.write_bytes(b"PK")
    refused_at_once(run("inspect", str(weights)), f"{weights} is a file", f"the checkpoint: {tmp_path}")


def test_a_gguf_file_is_left_to_its_reader(tmp_path: Path) -> None:
    """By its name or by its first bytes."""
    for name, content, expected in (("a.gguf", b"", True), ("b", b"GGUF\3", True), ("c", b"GG", False)):
        (tmp_path / name).write_bytes(content)
        assert is_gguf(tmp_path / name) is expected
    assert locate(str(tmp_path / "b")) == str(tmp_path / "b")
    assert not is_gguf(tmp_path / "absent.gguf")


# -------------------------------------------------------------------------------------------------------- refused lines

MALFORMED: list[tuple[str, list[str]]] = [
    # commands
    ("genrate", ["unknown command 'genrate'", "did you mean generate?"]),
    ("chatt --ckpt_dir x", ["unknown command 'chatt'", "did you mean chat?"]),
    ("inspct llama/demo", ["unknown command 'inspct'", "did you mean inspect?"]),
    ("completions --prompt x", ["unknown command 'completions'", "generate, chat"]),
    ("help zzz", ["unknown command 'zzz'", "generate, chat"]),
    ("help genrate", ["unknown command 'genrate'", "did you mean generate?"]),
    ("--prompt x", ["unknown command '--prompt'", "llama-xla generate --prompt"]),
    ("--ckpt_dir llama/demo", ["unknown command '--ckpt_dir'", "llama-xla generate --ckpt_dir"]),
    ("--versoin", ["did you mean --version?"]),
    ("-x", ["unknown command '-x'"]),
    ("-V now", ["unexpected argument 'now'", "after -V"]),
    ("''", ["unknown command ''", "generate, chat"]),
    # texts
    ("once upon a time", ["unexpected argument 'upon' after 'once'", "quotes"]),
    ("generate once upon", ["unexpected argument 'upon' after 'once'", "quotes"]),
    ("generate 'once upon' time", ["unexpected argument 'time'", "quotes"]),
    ("generate 'once upon' --prompt x", ["unexpected argument 'once upon' beside --prompt", "quotes"]),
    ("generate --prompt once upon", ["unexpected argument 'upon' beside --prompt", "quotes"]),
    ("generate 'once upon' --prompt_len 5", ["--prompt_len", "synthetic"]),
    ("generate llama/demo", ["'llama/demo'", "a directory", "--ckpt_dir llama/demo", "--prompt llama/demo"]),
    ("generate llama/demo/consolidated.00.pth", ["a file of weights", "--ckpt_dir llama/demo,"]),
    ("generate README.md", ["'README.md'", "a file", "--prompts_file README.md"]),
    ("generate org/model", ["'org/model'", "the name of a model", "--ckpt_dir org/model"]),
    ("generate '- item'", ["unexpected argument '- item'", "--prompt '- item'"]),
    ("generate - x", ["unexpected argument '-'"]),
    ("generate -- x", ["unexpected argument '--'"]),
    # the form of flags
    ("generate ---prompt x", ["unknown flag ---prompt", "did you mean --prompt?"]),
    ("generate --=x", ["unknown flag --", "--help"]),
    ("generate --prompt", ["--prompt: got no value"]),
    ("generate --prompt '' --max_gen_len", ["--max_gen_len: got no value"]),
    ("generate --prompt []", ["--prompt: got an empty list"]),
    ("generate --max_gen_len 1,5", ["--max_gen_len: got '1,5'", "whole number"]),
    ("generate --max_gen_len 0x10", ["--max_gen_len: got '0x10'", "whole number"]),
    ("generate --max_gen_len -1", ["--max_gen_len: got -1", "at least 1"]),
    ("generate --max_gen_len 99999999999999999999 --prompt x", ["does not fit", "--max_gen_len 509"]),
    ("generate --temperature 1,0", ["--temperature: got '1,0'", "a number"]),
    ("generate --temperature", ["--temperature: got no value"]),
    ("generate --top_p --json", ["--top_p: got no value", "--top_p=--json"]),
    ("generate --seed 1.0", ["--seed: got '1.0'", "whole number"]),
    ("generate --buckets '8;1'", ["--buckets: got '8;1'", "512,64,8,1"]),
    ("generate --logit_bias {}x", ["--logit_bias: got '{}x'"]),
    ("generate --logit_bias 1:2:3", ["--logit_bias: got '1:2:3'"]),
    ("generate --quiet=1", ["--quiet: got '1'", "true or false"]),
    ("generate --json --json", ["--json: got it 2 times"]),
    ("generate --dtype ''", ["--dtype: got ''", "bfloat16"]),
    ("generate --schedule random --prompt x", ["--schedule: got 'random'", "fcfs"]),
    ("generate --drafter magic --prompt x", ["--drafter: got magic", "lookup"]),
    ("generate --n 0 --prompt x", ["--n: got 0", "at least 1"]),
    ("generate --n 99999999 --prompt x", ["--n: got 99999999", "at most 65536"]),
    ("generate --best_of 99999999 --prompt x", ["--best_of: got 99999999", "at most 65536"]),
    ("generate --tensor_parallel 0 --prompt x", ["--tensor_parallel: got 0", "at least 1"]),
    # files
    ("generate --ckpt_dir", ["--ckpt_dir: got no value"]),
    ("generate --ckpt_dir ''", ["--ckpt_dir: got an empty text", "directory"]),
    ("generate --ckpt_dir README.md --prompt x", ["README.md is a file", "directory"]),
    ("generate --ckpt_dir no-such/model --prompt x", ["no such directory: no-such/model", "hf download no-such/model"]),
    ("generate --prompts_file /dev/null", ["--prompts_file /dev/null: got no prompts"]),
    ("generate --prompts_file llama", ["--prompts_file llama: Is a directory"]),
    ("generate --prompts_file nowhere.txt", ["--prompts_file nowhere.txt: No such file"]),
    ("generate --hidden_states /dev/null/x --prompt x", ["--hidden_states /dev/null/x: Not a directory"]),
    ("generate --profile README.md --prompt x", ["--profile README.md: File exists"]),
    ("generate --json_schema README.md --prompt x", ["json_schema"]),
    # other commands
    ("chat", ["--ckpt_dir is needed"]),
    ("chat hello", ["unexpected argument 'hello'", "--help"]),
    ("chat --ckpt_dir llama/demo --prompt x", ["unknown flag --prompt"]),
    ("chat --ckpt_dir no-such/model", ["no such directory: no-such/model", "hf download no-such/model"]),
    ("chat --ckpt_dir llama/demo", ["stdin: got nothing"]),
    ("plan --prompt_len x", ["--prompt_len: got 'x'"]),
    ("plan 9", ["unexpected argument '9'", "--help"]),
    ("inspect", ["--directory is needed"]),
    ("inspect a b", ["unexpected argument 'b'", "--help"]),
    ("inspect README.md", ["README.md is a file"]),
    ("inspect --dtype x llama/demo", ["--dtype: got 'x'"]),
    ("convert llama/demo", ["--dst is needed"]),
    ("convert nowhere x", ["no such directory: nowhere"]),
    ("convert llama/demo llama/demo", ["llama/demo is there already"]),
    ("convert llama/demo x --max_shard_size big", ["--max_shard_size: got 'big'"]),
    ("reshard llama/demo x", ["--model_parallel is needed"]),
    ("reshard llama/demo x --model_parallel two", ["--model_parallel: got 'two'"]),
    ("batch", ["--input is needed"]),
    ("batch --input nowhere --output x", ["nowhere: No such file"]),
    ("score --input nowhere", ["unknown flag --input"]),
    ("eval", ["--tasks is needed"]),
    ("datastore", ["--action is needed"]),
    ("bench --shape huge", ["--shape: got 'huge'", "demo"]),
    ("kernels --rows x", ["--rows: got 'x'"]),
]


def test_the_table_is_long_enough() -> None:
    assert len({line for line, _ in MALFORMED}) == len(MALFORMED) >= 70


@pytest.mark.parametrize(("line", "words"), MALFORMED, ids=[line for line, _ in MALFORMED])
def test_a_malformed_line_is_refused_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, line: str, words: list[str]
) -> None:
    """Exit code 2, nothing on stdout, one line that names what was wrong, and no model is loaded for it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "stdin", piped(b""))
    monkeypatch.setattr(LLaMA, "build", None)
    refused_at_once(run(*shlex.split(line)), *words)


@pytest.mark.parametrize(
    "line",
    [
        "generate --max_gen_len x",
        "generate --ckpt_dir no-such/model --prompt x",
        "once upon a time",
        "chat --ckpt_dir README.md",
        "inspect no-such/model",
    ],
)
def test_a_refusal_takes_a_moment(line: str) -> None:
    """As a process it takes less than half a second of the processor, and imports no torch."""
    program = (
        "import atexit, sys; from llama.cli import main; atexit.register(lambda: print('torch' in sys.modules)); main()"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    outcome = finished(["-c", program, *shlex.split(line)])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (outcome.code, outcome.out) == (2, "False\n")
    assert outcome.err.startswith("llama-xla: ")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
