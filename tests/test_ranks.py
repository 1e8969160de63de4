"""Ranks from the environment: every launcher's variables, contradictions, and that rank 0 alone prints results."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from commands import Run, finished

from llama.cli.output import write
from llama.errors import ConfigError
from llama.ranks import COUNTS_OF_A_JOB, PAIRS, Ranks, current_ranks

NAMES = {name for rank, counts in PAIRS for name in (rank, *counts)}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PATH": "/bin"}, Ranks()),
        ({"RANK": "1", "WORLD_SIZE": "4"}, Ranks(1, 4)),
        ({"RANK": " 3 ", "WORLD_SIZE": "4\n"}, Ranks(3, 4)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Ranks()),
        ({"WORLD_SIZE": "1"}, Ranks()),
        ({"RANK": "", "WORLD_SIZE": ""}, Ranks()),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, Ranks(2, 3)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, Ranks(5, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Ranks()),
        ({"SLURM_PROCID": "0"}, Ranks()),
        *(({"JOB_COMPLETION_INDEX": "1", count: "2"}, Ranks(1, 2)) for count in COUNTS_OF_A_JOB),
        ({"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2", "JOB_COMPLETIONS": "2"}, Ranks(1, 2)),
        ({"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}, Ranks(3, 4)),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, Ranks()),
        ({"TPU_WORKER_ID": "0"}, Ranks()),
        # a launcher within a launcher: the inner one counts
        ({"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Ranks(5, 8)),
        ({"RANK": "5", "WORLD_SIZE": "8", "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "a,b"}, Ranks(5, 8)),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
            Ranks(1, 2),
        ),
        # a count that a script sets beside another launcher's rank
        ({"WORLD_SIZE": "8", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, Ranks(5, 8)),
        # Kubernetes sets no count; the TPU's variables have one
        ({"JOB_COMPLETION_INDEX": "1", "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, Ranks(1, 2)),
    ],
)
def test_ranks_of_an_environment(environment: dict[str, str], expected: Ranks) -> None:
    assert current_ranks(environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, ["RANK: got 'one'", "whole number of 0 or more"]),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ["RANK: got '-1'"]),
        ({"RANK": "1.0", "WORLD_SIZE": "2"}, ["RANK: got '1.0'"]),
        ({"RANK": "\u00b2", "WORLD_SIZE": "4"}, ["RANK: got"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["WORLD_SIZE: got '0'", "1 or more"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK: got 2", "0 to 1", "WORLD_SIZE gives 2"]),
        ({"RANK": "0"}, ["RANK: got 0 without WORLD_SIZE", "both or none"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE: got 2 without RANK"]),
        ({"SLURM_PROCID": "1"}, ["SLURM_PROCID: got 1 without SLURM_NTASKS"]),
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "4"}, ["SLURM_PROCID: got 4", "0 to 3"]),
        ({"JOB_COMPLETION_INDEX": "0"}, ["JOB_COMPLETION_INDEX", "WORLD_SIZE or JOB_COMPLETIONS or NNODES"]),
        ({"JOB_COMPLETION_INDEX": "0", "NNODES": "2", "JOB_COMPLETIONS": "3"}, ["JOB_COMPLETIONS=3", "NNODES=2"]),
        ({"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b"}, ["TPU_WORKER_ID: got 2", "0 to 1"]),
        ({"TPU_WORKER_ID": "2"}, ["TPU_WORKER_ID: got 2 without TPU_WORKER_HOSTNAMES"]),
        ({"WORLD_SIZE": "4", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, ["SLURM_NTASKS=2", "WORLD_SIZE=4"]),
    ],
)
def test_contradictions_are_refused(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        current_ranks(environment)
    assert [word for word in words if word not in str(found.value)] == [], found.value


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 1), (1, 1), (0, 0)])
def test_ranks_are_in_their_range(rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError):
        Ranks(rank, world_size)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "command", [("--version",), ("--help",), ("convert", "--help"), ("inspect", "llama/demo", "--json")]
)
def test_rank_0_alone_prints(run: Run, monkeypatch: pytest.MonkeyPatch, rank: int, command: tuple[str, ...]) -> None:
    """Results, help and the version; stdout itself stays what it was."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = run(*command)
    assert outcome.code == 0, outcome.err
    assert bool(outcome.out) == (rank == 0)


def test_the_door_follows_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write("alone ")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    write("second ")
    monkeypatch.setenv("RANK", "0")
    write("first")
    assert capsys.readouterr().out == "alone first"


def test_a_wrong_environment_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "one")
    outcome = run("inspect", "llama/demo")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("llama-xla: RANK: got 'one'")
    assert outcome.err.count("\n") == 1


def test_commands_print_through_one_door() -> None:
    """No command writes to stdout but by output.write."""
    from llama import cli

    for path in Path(cli.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
            name = ast.unparse(call.func)
            assert name != "sys.stdout.write" or path.name == "output.py", f"{path.name}, line {call.lineno}"
            streams = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "file"]
            assert name != "print" or streams == ["sys.stderr"], f"{path.name}, line {call.lineno}"


def test_chat_refuses_a_terminal_under_several_ranks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could say which process the keyboard belongs to."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    outcome = run("chat", "--ckpt_dir", "llama/demo")
    assert (outcome.code, outcome.out) == (2, "")
    assert "2 processes" in outcome.message
    assert "stdin" in outcome.message


@pytest.mark.slow
def test_ranks_are_known_without_torch() -> None:
    code = "import sys, llama.ranks; assert {'torch', 'numpy'}.isdisjoint(sys.modules)"
    assert finished(["-c", code]).code == 0
