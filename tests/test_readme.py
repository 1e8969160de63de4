"""What the README and docs/ show is what happens: their commands run, their flags are the commands', their outputs are
real.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from checkpoint_files import TINY, random_weights, write_meta
from commands import ROOT, Outcome, Run
from tokenizer_files import byte_level, write_ranks

import llama
from llama import EngineConfig, SamplingParams
from llama.cli import COMMANDS
from llama.cli.flags import help_text
from llama.config import DEMO_DIR
from llama.sampling_params import controls_table

pytestmark = pytest.mark.slow

PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]


def blocks(language: str, *pages: str) -> list[str]:
    """The fenced blocks of a language, in the given pages or in all of them."""
    return [
        block
        for page in pages or PAGES.values()
        for block in re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    ]


def commands() -> list[str]:
    """Every llama-xla and demo.sh line of the bash blocks; test.sh is what runs this test."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if "llama-xla" in line or "demo.sh" in line))


def needs_shell(command: str) -> bool:
    """Whether a line is more than one command of this package, or one that sets how this process would compile."""
    return not command.startswith("llama-xla ") or "--dump_hlo" in command or bool(re.search(r"[|;&$<>]", command))


def in_shell(command: str) -> Outcome:
    """Run a line as a user would; `llama-xla` is this interpreter's."""
    script = f"{shlex.quote(sys.executable)} -m llama.cli"
    line = re.sub(r"\bllama-xla\b", script, command) if "demo.sh" not in command else command
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line], input="Hello\n", capture_output=True, text=True, check=False, env=environment
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Outcome]:
    """Run a line in the project's folder, in this process where it needs no shell; answers are kept short."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))

    def call(command: str) -> Outcome:
        if "--max_gen_len" not in command:
            command = re.sub(r"(llama-xla (generate|chat)|demo.sh \"[^\"]*\")", r"\1 --max_gen_len 12", command)
        return in_shell(command) if needs_shell(command) else run(*shlex.split(command, comments=True)[1:])

    return call


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the pages' made-up paths stand for here: small checkpoints, and directories that are not there yet."""
    directory = tmp_path_factory.mktemp("readme")
    made = byte_level()
    chat = write_meta(
        directory / "chat", replace(TINY, vocab_size=768), [random_weights(replace(TINY, vocab_size=768))]
    )
    write_ranks(made, chat / "tokenizer.model")
    return {
        "path/to/Llama-3.2-1B-Instruct": chat,
        "path/to/checkpoint": DEMO_DIR,
        "path/to/new": directory / "new",
        "llama-2-70b-one": directory / "one",
        "llama-2-70b": DEMO_DIR,
        "speed.png": directory / "speed.png",
        "--profile trace": Path(f"--profile {directory / 'trace'}"),
        "--dump_hlo programs": Path(f"--dump_hlo {directory / 'programs'}"),
    }


@pytest.mark.parametrize("command", commands())
def test_commands_run(command: str, places: dict[str, Path], run_line: Callable[[str], Outcome]) -> None:
    """Each command of the pages ends well and prints something, or writes what it says."""
    if "demo.sh" in command and not (ROOT / ".venv").is_dir():
        pytest.skip("the demo would install a second environment: this one is not .venv")
    for name, path in places.items():
        command = command.replace(name, str(path))
    done = run_line(command)
    assert done.code == 0, done.err
    assert done.out.strip() or any(
        str(path) in command and (path / "params.json").is_file() for path in places.values()
    )


def test_the_two_commands_open_the_readme() -> None:
    """The first block is the demo and the tests, and both scripts can be run."""
    demo, test = (shlex.split(line)[0] for line in blocks("bash", README)[0].splitlines())
    assert (demo, test) == ("./scripts/demo.sh", "./scripts/test.sh")
    assert all(os.access(ROOT / script, os.X_OK) for script in (demo, test))
    assert "./scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    """Two minutes' reading; the reference is in docs/."""
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_are_the_help_s(name: str) -> None:
    """Every command's flags are on one of the pages, and are --help's, to the letter; scripts/refresh_help.py writes
    them.
    """
    marked = rf"^<!-- help: llama-xla {name} -->\n```text\n(.*?)^```"
    shown = [block for page in PAGES.values() for block in re.findall(marked, page, flags=re.MULTILINE | re.DOTALL)]
    assert shown == [help_text(name, COMMANDS[name]).strip() + "\n"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_flag(name: str) -> None:
    """A parameter that its command's docstring forgets would be a secret flag."""
    shown = set(re.findall(r"^  --(\w+)", help_text(name, COMMANDS[name]), flags=re.MULTILINE))
    assert shown == set(inspect.signature(COMMANDS[name]).parameters)


def test_the_table_of_controls_is_made_from_the_fields() -> None:
    """The table is the one that the declarations of SamplingParams give, to the letter."""
    assert controls_table() in PAGES[ROOT / "docs" / "sampling.md"]


def test_the_table_of_controls_is_complete() -> None:
    """A row for every field of SamplingParams, with its default; the generate command has a flag for each, but for
    --echo's.
    """
    rows = dict(
        row
        for name in ("sampling.md", "python.md")
        for row in re.findall(r"^\| `(\w+)` \| ([\w.]+) \|", PAGES[ROOT / "docs" / name], flags=re.MULTILINE)
    )
    defaults = {f.name: f.default for f in fields(SamplingParams)}
    assert set(rows) == set(defaults)
    for name, shown in rows.items():
        assert shown == ("none" if defaults[name] in (None, ()) else str(defaults[name])), name
    flags = set(inspect.signature(COMMANDS["generate"]).parameters)
    assert set(defaults) - flags == {"prompt_logprobs", "cache_salt"}


def test_the_table_of_static_shapes_is_complete() -> None:
    """A row for every field of EngineConfig, with its default."""
    page = PAGES[ROOT / "docs" / "python.md"].partition("## Static shapes")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| ([^|]+) \|$", page, flags=re.MULTILINE))
    defaults = {f.name: f.default for f in fields(EngineConfig)}
    assert set(rows) == set(defaults)
    for name, shown in rows.items():
        default = defaults[name]
        assert shown == ((", ".join(map(str, default)) or "none") if isinstance(default, tuple) else str(default)), name


def test_links_lead_somewhere() -> None:
    """Every relative link names a file that is there, and a heading that it has."""
    for path, page in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)]*)\)", page):
            name, _, heading = target.partition("#")
            file = (path.parent / name) if name else path
            assert file.is_file(), f"{path.name}: {target}"
            if file.suffix != ".md":
                continue
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not heading or heading in anchors, f"{path.name}: {target}"


def test_console_output_is_real(run_line: Callable[[str], Outcome]) -> None:
    """The plan that the pages print is the one that the command prints."""
    (block,) = blocks("console")
    command, _, output = block.partition("\n")
    assert run_line(command.removeprefix("$ ")).out == output


def test_json_fields_are_real(run_line: Callable[[str], Outcome]) -> None:
    """The object in the pages has the fields that --json prints."""
    (block,) = blocks("json")
    shown = json.loads(block)
    printed = json.loads(run_line('llama-xla generate --prompt "Once" --max_gen_len 1 --json --quiet').out)
    assert list(printed) == list(shown)
    assert all(list(printed[key]) == list(shown[key]) for key in ("usage", "timing", "programs"))


@pytest.mark.parametrize("code", blocks("python"))
@pytest.mark.filterwarnings("default")  # as in a user's process
def test_python_runs(code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The library examples run as they stand."""
    monkeypatch.chdir(ROOT)
    exec(code, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_version_is_in_the_changelog() -> None:
    """One version, said once and listed."""
    assert f"## [{llama.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
