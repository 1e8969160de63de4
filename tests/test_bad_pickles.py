"""Pickles that would run something: nothing is run, and the message names what it would have been. torch's own message
advises to load such a file with ``weights_only=False``; ours never does.
"""

from __future__ import annotations

import collections
import functools
import importlib
import io
import os
import pickle
import runpy
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.checkpoint.files import PickleFile
from llama.checkpoint.pickles import would_run
from llama.errors import CheckpointError

RAN: list[str] = []


def note(text: str) -> str:
    """What a hostile pickle would call."""
    RAN.append(text)
    return text


class Own:
    """A class that is unpickled by a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return note, ("Own",)


class Plain:
    """A class whose attributes are set without a call."""

    def __init__(self) -> None:
        self.text = "a"


class Runs:
    """Pickled as a call of any function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


HOSTILE: dict[str, tuple[object, str]] = {
    "os.system": (Runs(os.system, "touch ran"), "posix.system"),
    "eval": (Runs(eval, "note('eval')"), "builtins.eval"),
    "exec": (Runs(exec, "note('exec')"), "builtins.exec"),
    "import": (Runs(__import__, "os"), "builtins.__import__"),
    "getattr": (Runs(getattr, (), "count"), "builtins.getattr"),
    "open": (Runs(open, "ran", "w"), "io.open"),
    "Popen": (Runs(subprocess.Popen, ["touch", "ran"]), "subprocess.Popen"),
    "rmtree": (Runs(shutil.rmtree, "absent"), "shutil.rmtree"),
    "run_path": (Runs(runpy.run_path, "absent.py"), "runpy.run_path"),
    "import_module": (Runs(importlib.import_module, "os"), "importlib.import_module"),
    "partial": (Runs(functools.partial, note, "a"), "functools.partial, test_bad_pickles.note"),
    "torch.load": (Runs(torch.load, "absent.pth"), "torch.serialization.load"),
    "torch.hub": (Runs(torch.hub.load, "absent", "absent"), "torch.hub.load"),
    "torch.compile": (Runs(torch.compile, 1), "torch.compile"),
    "own function": (Runs(note, "a"), "test_bad_pickles.note"),
    "own class": (Own(), "test_bad_pickles.note"),
    "own attributes": (Plain(), "test_bad_pickles.Plain"),
    "beside a tensor": ({"a": collections.OrderedDict(), "b": [Runs(os.system, "touch ran")]}, "posix.system"),
    "many": ([Runs(f, "absent") for f in (os.system, os.remove, os.rmdir, os.stat, eval)], "and 2 more"),
}
WRITTEN: dict[str, tuple[bytes, str]] = {  # instructions that pickle itself does not write
    "GLOBAL": (b"cos\nsystem\n(S'touch ran'\ntR.", "os.system"),
    "INST": (b"(S'touch ran'\nios\nsystem\n.", "os.system"),
    "GLOBAL alone": (b"\x80\x02cos\nenviron\n.", "os.environ"),
    "Python 2": (b"\x80\x02c__builtin__\neval\n(U\x011tR.", "builtins.eval"),
    "memo": (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93.", "os.system"),
    "behind harmless ones": (b"\x80\x02ccollections\nOrderedDict\n)Rcos\nsystem\n.", "os.system"),
    "escape codes": (b"\x80\x02cos\n\x1b[31m\n.", "os.?[31m"),
}
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "cut": b"\x80\x02",
    "text": b"hello",
    "memo": b"\x80\x02r\xff\xff\xff\xff.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x02Pfoo\n.",
    "old protocol": pickle.dumps({"a": 1}, 0),
    "new protocol": pickle.dumps({"a": 1}, 4),
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "stack": b"\x80\x02aaaa.",
}


def archive(directory: Path, pickled: bytes) -> Path:
    """A file as torch.save writes it, with another pickle in it."""
    made, path = io.BytesIO(), directory / "consolidated.00.pth"
    torch.save({"a": torch.ones(2)}, made)
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            target.writestr(info, pickled if info.filename.endswith("data.pkl") else source.read(info))
    return path


def message(path: Path) -> str:
    """Of the refusal of a file, which is one line and gives no advice to load it."""
    with pytest.raises(CheckpointError) as raised:
        PickleFile(path)
    text = str(raised.value)
    assert "\n" not in text
    assert text.isprintable()
    assert "weights_only" not in text
    assert "torch.load" not in text.replace("run torch.load", "")
    assert len(text) < 700
    return text


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_it_would_have_run_is_named(
    name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile, says = HOSTILE[name]
    path = archive(tmp_path, pickle.dumps(hostile, protocol))
    said = message(path)
    assert "it holds more than tensors: pickle would run " in said
    assert says in said
    assert RAN == []
    assert not (tmp_path / "ran").exists()


def test_a_name_without_end(tmp_path: Path) -> None:
    """torch would search its own message for hours: the time grows with the square of a name's length."""
    path = archive(tmp_path, b"\x80\x02cos\n" + b"a" * 1_000_000 + b"\n.")
    began = time.perf_counter()
    assert "pickle would run os.aaaa" in message(path)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("name", WRITTEN)
def test_other_instructions(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickled, says = WRITTEN[name]
    assert f"pickle would run {says}" in message(archive(tmp_path, pickled))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["os.system", "own class"])
def test_a_bare_pickle(name: str, tmp_path: Path) -> None:
    """Without an archive around it."""
    hostile, says = HOSTILE[name]
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(pickle.dumps(hostile))
    said = message(path)
    assert "expected the zip archive that torch.save writes since 1.6; it may be cut short; it holds more" in said
    assert f"pickle would run {says}" in said
    assert RAN == []


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pickle(name: str, tmp_path: Path) -> None:
    said = message(archive(tmp_path, DAMAGED[name]))
    assert "would run" not in said
    assert (
        "is not a checkpoint, or a damaged one: its pickle is damaged" in said or "expected a dict of tensors" in said
    )


def test_a_checkpoint_names_nothing(tmp_path: Path) -> None:
    """Tensors of all dtypes, parameters and their order are harmless."""
    tensors = {str(dtype): torch.ones(2, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.int8)}
    path = tmp_path / "consolidated.00.pth"
    torch.save(collections.OrderedDict(**tensors, p=torch.nn.Parameter(torch.ones(1))), path)
    assert would_run(path) == ""
    assert set(PickleFile(path).headers) == {*tensors, "p"}


@pytest.mark.parametrize("length", [0, 10, 200, 500])
def test_a_file_that_is_cut_short(length: int, tmp_path: Path) -> None:
    path = archive(tmp_path, b"")
    path.write_bytes(path.read_bytes()[:length])
    assert would_run(path) == ""
    assert "is not a checkpoint" in message(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert would_run(tmp_path / "absent.pth") == ""
    assert "No such file" in message(tmp_path / "absent.pth")
