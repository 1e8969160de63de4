"""The flags of loading: declared once, the same in every command, and all of them reach the engine."""

from __future__ import annotations

import inspect
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Run, refused_at_once

from llama import LLaMA, cli
from llama.cli.flags import REQUIRED, help_text
from llama.cli.loading import SECTIONS, config_of, takes_loading
from llama.config import DEMO_DIR, EngineConfig
from llama.errors import CheckpointError, ConfigError

TABLE = {name: flag for section in SECTIONS.values() for name, flag in section.items()}
LOADING = ("generate", "chat", "batch", "eval", "score")
OWN_TEXTS = {  # where a flag means something else
    "generate": {"max_batch_size"},
    "chat": {"ckpt_dir", "max_seq_len"},
    "batch": {"max_batch_size"},
    "eval": {"max_batch_size"},
    "plan": {"max_seq_len", "dtype", "cache_dtype"},
    "inspect": {"max_seq_len", "max_batch_size"},
}
OWN_FLAGS = {  # of the same name, for something that is not loaded, or not by the engine
    "plan": {"tensor_parallel", "data_parallel", "ckpt_dir", "max_batch_size"},
    "inspect": {"check_sums"},
    "convert": {"dtype"},
    "datastore": {"tokenizer_path", "check_sums"},
    "bench": {"ckpt_dir", "dtype", "cache_dtype", "max_seq_len", "buckets", "bucket_policy"},
}


def own_flags(command: str) -> set[str]:
    """The flags that a command's own function declares."""
    return set(inspect.signature(inspect.unwrap(cli.COMMANDS[command])).parameters)


def described(command: str, flag: str) -> str:
    """A flag's help, on one line and without its default."""
    found = re.search(rf"^  --{flag}\b(.*(?:\n {{31}}.*)*)", help_text(command, cli.COMMANDS[command]), re.MULTILINE)
    assert found is not None, flag
    text = " ".join(found[1].split()).removeprefix("TEXT ").removeprefix("N,N,... ").removeprefix("N ")
    return re.sub(r" \[[^]]*\]$", "", text)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_no_command_declares_a_flag_of_loading_again(command: str) -> None:
    """The bug: generate and chat had copies of the table, which had to be changed with it."""
    assert own_flags(command) & TABLE.keys() == OWN_FLAGS.get(command, set())


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_a_flag_says_the_same_in_every_command(command: str) -> None:
    taken = (TABLE.keys() & inspect.signature(cli.COMMANDS[command]).parameters) - own_flags(command)
    differing = {flag for flag in taken if described(command, flag) != " ".join(TABLE[flag][2].split())}
    assert differing == OWN_TEXTS.get(command, set())


@pytest.mark.parametrize("command", LOADING)
def test_commands_that_load_have_all_of_them(command: str) -> None:
    """Chat answers one request at a time, and a longer dialog needs programs that a shorter one did not."""
    missing = {"max_batch_size", "fail_on_recompile"} if command == "chat" else set()
    assert TABLE.keys() - inspect.signature(cli.COMMANDS[command]).parameters == missing


# --- what they do -----------------------------------------------------------------------------------------------------


@pytest.fixture
def built(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``built("chat", "--dtype", "int8")``: what the command gives to LLaMA.build."""
    (tmp_path / "items").write_text(json.dumps({"context": "It rained.", "choices": ["We ran.", "It grew."]}))
    (tmp_path / "lines").write_text(json.dumps({"prompt": "The cat"}))
    needed = {
        "generate": ["--prompt", "The cat", "--max_gen_len", "5"],
        "chat": ["--max_gen_len", "5"],
        "score": [str(tmp_path / "items")],
        "batch": ["--input", str(tmp_path / "lines"), "--output", str(tmp_path / "results")],
    }

    def call(command: str, *flags: str) -> dict[str, Any]:
        given: dict[str, Any] = {}

        def build(ckpt_dir: Any, tokenizer_path: Any, **rest: Any) -> LLaMA:
            given.update(rest, ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path)
            raise CheckpointError("that is all")

        monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
        monkeypatch.setattr(LLaMA, "build", staticmethod(build))
        outcome = run(command, *needed[command], *flags)
        assert outcome.message == "llama-xla: that is all", outcome.err
        return given

    return call


@pytest.mark.parametrize("command", ["generate", "chat", "score", "batch"])
def test_every_flag_reaches_the_engine(built: Callable[..., dict[str, Any]], command: str, tmp_path: Path) -> None:
    values = {
        "ckpt_dir": DEMO_DIR,
        "tokenizer_path": DEMO_DIR / "tokenizer.model",
        "allow_nan": "true",
        "check_sums": "true",
        "dtype": "int4",
        "int4_group": 64,
        "cache_dtype": "bfloat16",
        "activations": "float32",
        "prefill_products": "float32",
        "max_seq_len": 300,
        "max_batch_size": 6,
        "buckets": "32,4,1",
        "bucket_policy": "pad",
        "prefix_cache_bytes": 4096,
        "batch_invariant": "true",
        "fail_on_recompile": "true",
        "tensor_parallel": 3,
        "data_parallel": 2,
    }
    assert values.keys() | {"mp"} == TABLE.keys()
    is_chat = command == "chat"
    for absent in ("max_batch_size", "fail_on_recompile") if is_chat else ():
        del values[absent]
    given = built(command, *(f"--{name}={value}" for name, value in values.items()))
    assert given["config"] == EngineConfig(
        dtype="int4",
        int4_group=64,
        cache_dtype="bfloat16",
        activations="float32",
        prefill_products="float32",
        max_seq_len=300,
        max_batch_size=2 if is_chat else 6,
        buckets=(32, 4, 1),
        bucket_policy="pad",
        prefix_cache_bytes=4096,
        batch_invariant=True,
        fail_on_recompile=not is_chat,
        tensor_parallel=3,
        data_parallel=2,
    )
    assert (given["ckpt_dir"], given["tokenizer_path"]) == (str(DEMO_DIR), str(DEMO_DIR / "tokenizer.model"))
    assert (given["allow_nan"], given["check_sums"]) == (True, True)


@pytest.mark.parametrize(
    ("command", "flags", "slots", "positions"),
    [
        ("generate", [], 1, 512),
        ("generate", ["--n", "3"], 3, 512),
        ("generate", ["--n", "40"], 32, 512),
        ("generate", ["--n", "3", "--data_parallel", "2"], 4, 512),
        ("generate", ["--n", "3", "--max_batch_size", "2", "--ckpt_dir", str(DEMO_DIR)], 2, 2048),
        ("chat", ["--ckpt_dir", str(DEMO_DIR)], 1, 2048),
        ("chat", ["--ckpt_dir", str(DEMO_DIR), "--data_parallel", "3"], 3, 2048),
        ("score", [], 1, 512),
        ("batch", [], 8, 512),
        ("batch", ["--ckpt_dir", str(DEMO_DIR)], 8, 2048),
    ],
)
def test_slots_and_positions_by_default(
    built: Callable[..., dict[str, Any]], command: str, flags: list[str], slots: int, positions: int
) -> None:
    """The demo model has its own context; devices divide the slots."""
    config = built(command, *flags)["config"]
    assert config == EngineConfig(
        max_batch_size=slots, max_seq_len=positions, data_parallel=int(flags[-1]) if "--data_parallel" in flags else 1
    )


def test_random_weights_have_the_positions_of_a_checkpoint() -> None:
    without = {"ckpt_dir": None, "max_seq_len": None, "max_batch_size": 1}
    assert config_of(without).max_seq_len == 512
    assert config_of(without, has_random_weights=True).max_seq_len == 2048
    assert config_of({**without, "max_seq_len": 64}, schedule="shortest") == EngineConfig(
        max_seq_len=64, schedule="shortest"
    )


@pytest.mark.parametrize("command", ["generate x", f"chat --ckpt_dir {DEMO_DIR}", "score x", "batch --input x"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--activations int8", ["--activations: got 'int8'", "int16, float32"]),
        ("--prefill_products x", ["--prefill_products: got 'x'", "bfloat16, float32"]),
        ("--int4_group 64", ["--int4_group: got 64", "--dtype is auto"]),
        ("--bucket_policy x", ["--bucket_policy: got 'x'", "greedy, pad"]),
        ("--buckets 8", ["--buckets: got [8]", "1 among them"]),
        ("--prefix_cache_bytes -1", ["--prefix_cache_bytes: got -1"]),
        ("--data_parallel 0", ["--data_parallel: got 0"]),
        ("--mp --tensor_parallel 2", ["--tensor_parallel and --mp"]),
        ("--max_seq_len 1", ["--max_seq_len: got 1"]),
    ],
)
def test_wrong_values_are_refused_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, flags: str, words: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    refused_at_once(run(*command.split(), *flags.split()), *words)


# --- the declaration --------------------------------------------------------------------------------------------------


def test_a_command_chooses_its_flags() -> None:
    """Which ones, their defaults, their help, and where that stands."""
    seen: dict[str, Any] = {}

    @takes_loading(only=("dtype", "buckets", "mp"), without=("mp",), dtype=(REQUIRED, "Own text."))
    def command(*, loading: dict[str, Any], other: int = 1) -> None:
        """Summary.

        {model}
            other: More.

        Flags:
            {buckets}
        """
        seen.update(loading, other=other)

    assert list(inspect.signature(command).parameters) == ["other", "dtype", "buckets"]
    lines = help_text("x", command).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  --")] == ["--dtype", "--other", "--buckets"]
    assert "Own text. Required." in lines[3]
    command(dtype="int8", other=2)
    assert seen == {"dtype": "int8", "buckets": None, "other": 2}
    with pytest.raises(TypeError, match="dtype"):
        command()
    with pytest.raises(TypeError, match="mp"):
        command(dtype="int8", mp=True)


def test_an_own_text_is_for_a_flag_that_there_is() -> None:
    with pytest.raises(KeyError, match="dtype"):
        takes_loading(without=("dtype",), dtype=("int8", "Own text."))


def test_other_settings_are_the_engine_s_own() -> None:
    """A subset of the flags is a subset of the settings; a wrong one is refused by the engine's own rule."""
    assert config_of({"max_seq_len": 100, "dtype": "int8"}) == EngineConfig(max_seq_len=100, dtype="int8")
    with pytest.raises(ConfigError, match="schedule: got 'x'"):
        config_of({"max_seq_len": 100}, schedule="x")
