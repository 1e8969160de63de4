"""What a killed `convert` or `reshard` leaves: the next run of the same command removes it, and others name it."""

from __future__ import annotations

import errno
import fcntl
import logging
import signal
from pathlib import Path

import pytest
from checkpoint_files import TINY, assert_equal, random_weights, write_meta
from commands import process

from llama.checkpoint import open_checkpoint, writing
from llama.checkpoint.reshard import convert, reshard
from llama.errors import CheckpointError

KILLED_AT_THE_LAST_WEIGHT = """
import os, signal, sys
from llama.checkpoint import source
from llama.checkpoint.reshard import convert, reshard
read = source.Source.read
def killed(self, name):
    if name == "output.weight":
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, name)
source.Source.read = killed
src, dst = sys.argv[1:]
{call}
"""
CALLS = {"convert": "convert(src, dst)", "reshard": "reshard(src, dst, 2)"}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("llama"), "propagate", True)
    caplog.set_level(logging.WARNING, "llama")
    return caplog


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def leftover(directory: Path, name: str) -> Path:
    """What a run for the target ``name`` would have left."""
    made = directory / f".{name}.0123abcd.partial"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"half of it")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("command", ["convert", "reshard"])
def test_the_same_command_replaces_what_kill_9_left(
    tmp_path: Path, logged: pytest.LogCaptureFixture, command: str
) -> None:
    """A real SIGKILL in the middle, and the same command again; another one names what is there and leaves it."""
    source = write_meta(tmp_path / "src", TINY, [random_weights(TINY)])
    code = KILLED_AT_THE_LAST_WEIGHT.format(call=CALLS[command])
    with process(["-c", code, str(source), str(tmp_path / "out")]) as running:
        assert running.wait(120) == -signal.SIGKILL
    (left,) = names(tmp_path) - {"src"}
    assert left.startswith(".out.")
    assert left.endswith(".partial")
    assert any((tmp_path / left).iterdir())
    convert(source, tmp_path / "other")
    (message,) = logged.messages
    assert message == f"{tmp_path / left} is there, which a run that was killed has left; remove it"
    assert names(tmp_path) == {"src", "other", left}
    logged.clear()
    convert(source, tmp_path / "out") if command == "convert" else reshard(source, tmp_path / "out", 2)
    assert logged.messages == [f"Removing {tmp_path / left}, which a run that was killed has left"]
    assert names(tmp_path) == {"src", "other", "out"}
    assert_equal(open_checkpoint(tmp_path / "out").tensors(), random_weights(TINY))


def test_what_is_being_written_is_left_alone(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    """A second run for the same target is refused; one for another target says nothing."""
    with writing.new_directory(tmp_path / "out") as busy:
        with (
            pytest.raises(CheckpointError, match=f"is being written by another process, into {busy}"),
            writing.new_directory(tmp_path / "out"),
        ):
            pass
        with writing.new_directory(tmp_path / "other"):
            pass
        assert busy.is_dir()
    assert names(tmp_path) == {"out", "other"}
    assert logged.messages == []


def test_names_that_look_alike_are_left_alone(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    """Files, other endings, and targets whose name begins or ends like this one."""
    (tmp_path / ".out.0123abcd.partial").write_text("a file")
    (tmp_path / ".out.zz.partial").mkdir()
    kept = {leftover(tmp_path, name).name for name in ("out.new", "new.out", "out.01234567.partial")}
    before = names(tmp_path)
    with writing.new_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == before | {"out"}
    assert {Path(message.split()[0]).name for message in logged.messages} == kept


def test_a_file_system_without_locks_removes_nothing(
    tmp_path: Path, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine may be writing there; the new directory is written all the same."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    left = leftover(tmp_path, "out")
    with writing.new_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == {"out", left.name}
    (message,) = logged.messages
    assert message.startswith(str(left))
    assert "unless one on another machine is writing it" in message
