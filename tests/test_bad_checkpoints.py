"""Checkpoints as people have them on disk: damaged, half downloaded, foreign, or only odd. One table of all of them.

Each one is refused by `inspect`, `generate` and `LLaMA.build` alike, with words that say what was found and how to mend
it; or it generates the tokens of the undamaged checkpoint. Nothing ends in a traceback, hangs, or gives another text.

A case is a copy of a good checkpoint and a function that changes it. To find the cases of a topic: the table is in
sections, and the names of quantised kinds are in QUANTISED.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import gguf_files
import pytest
import torch
from checkpoint_files import assert_equal, edit_json, random_weights, write_meta
from commands import Outcome, Run
from conftest import TINY
from gguf import GGMLQuantizationType as Kind
from hf_files import write_hugging_face
from safetensors.torch import load_file, save_file
from tokenizer_files import byte_level, write_ranks

from llama import EngineConfig, LLaMA, load_tokenizer
from llama.checkpoint import checked, open_checkpoint
from llama.checkpoint.reshard import convert, reshard
from llama.cli.hub import locate
from llama.loading import matched
from llama.tokenizer import find_tokenizer

NOBODY = 65534  # a user's id
LIMIT_S = 60  # far above what a case takes; a case that blocks is ended then
SHARD, SECOND = "consolidated.00.pth", "consolidated.01.pth"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, GGUF = "pytorch_model.bin", "model.gguf"

Change = Callable[[Path], "Path | str | None"]


class Bad(NamedTuple):
    """A checkpoint that is refused.

    Attributes:
        base: the good checkpoint that it begins as; empty: an empty directory.
        change: damages a copy of it; returns the path to give, if that is another one.
        words: that one of the problems says.
    """

    base: str
    change: Change
    words: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------ ways to change


def put(name: str, content: bytes | str | dict[str, Any] | list[Any]) -> Change:
    """Write a file; what is no bytes as text or JSON."""

    def change(directory: Path) -> None:
        data = content if isinstance(content, (bytes, str)) else json.dumps(content)
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))

    return change


def drop(*names: str) -> Change:
    def change(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return change


def steps(*changes: Change) -> Change:
    """Several changes, one after the other; none leaves the checkpoint as it is."""

    def change(directory: Path) -> Path | str | None:
        result = None
        for each in changes:
            result = each(directory) or result
        return result

    return change


def rename(old: str, new: str) -> Change:
    def change(directory: Path) -> None:
        (directory / old).rename(directory / new)

    return change


def says(name: str, **changes: Any) -> Change:
    """Change entries of a JSON file; None removes one."""
    return lambda directory: edit_json(directory / name, **changes)


def config(**changes: Any) -> Change:
    return says("config.json", **changes)


def params(**changes: Any) -> Change:
    return says("params.json", **changes)


def cut(name: str, keep: float | int) -> Change:
    """Keep the beginning of a file: a share of it, or all but so many bytes."""

    def change(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else len(data) - keep])

    return change


def header(edit: Callable[[dict[str, Any]], Any], name: str = WHOLE) -> Change:
    """Change the header of a safetensors file and leave its data."""

    def change(directory: Path) -> None:
        path = directory / name
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + length])
        edited = edit(content)
        text = edited if isinstance(edited, bytes) else json.dumps(content).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any], name: str = WHOLE) -> Change:
    """Change the tensors of a file and write it anew, as its own library does."""

    def change(directory: Path) -> None:
        path = directory / name
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        content = edit(content) or content
        path.unlink()
        if path.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in content.items()}, path, {"format": "pt"})
        else:
            torch.save(content, path)

    return change


def pointer(name: str) -> Change:
    """A Git LFS pointer in the place of a file."""
    return put(name, f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4976698672\n")


def fifo(name: str) -> Change:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return change


def device(name: str) -> Change:
    return linked(name, "/dev/zero")


def unix_socket(name: str) -> Change:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        before = Path.cwd()
        os.chdir(directory)  # a socket's path is short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(name)
        finally:
            os.chdir(before)

    return change


def folder(name: str) -> Change:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).mkdir()

    return change


def linked(name: str, target: str) -> Change:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)

    return change


def sparse(name: str, size: int = 2**40) -> Change:
    """A file of holes only: nothing on the disk."""

    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        with (directory / name).open("wb") as file:
            file.truncate(size)

    return change


def patched(old: bytes, new: bytes, name: str = GGUF) -> Change:
    """Other bytes of the same length in the first place of ``old``."""

    def change(directory: Path) -> None:
        (directory / name).write_bytes((directory / name).read_bytes().replace(old, new, 1))

    return change


def other(architecture: str, model_type: str, **changes: Any) -> Change:
    """The config.json of another family."""
    return config(architectures=[architecture], model_type=model_type, **changes)


def copy(directory: Path, old: str, new: str) -> None:
    shutil.copy(directory / old, directory / new)


def gguf_of(kind: Kind = Kind.F32, tokens: bool = True, **entries: Any) -> Change:
    """A GGUF file with other metadata; ``general.*`` and ``tokenizer.*`` by their whole names."""

    def change(directory: Path) -> None:
        own = gguf_files.sentencepiece_entries(directory / "tokenizer.model") if tokens else {}
        path = directory / GGUF
        path.unlink()
        gguf_files.write(path, TINY, random_weights(TINY), kind, tokenizer={**own, **entries})

    return change


def first(content: dict[str, Any], part: str) -> str:
    return next(name for name in sorted(content) if part in name)


# ---------------------------------------------------------------------------------------------------------- the table

FILES: dict[str, Bad] = {  # what is on the disk, before anything in a file is looked at
    "empty directory": Bad("empty", steps(), ("holds no checkpoint", "nothing")),
    "no such directory": Bad("hf", lambda d: d / "absent", ("no such directory",)),
    "a file of something else": Bad("hf", lambda d: d / "config.json", ("is a file",)),
    "one file of the weights": Bad("hf", lambda d: d / WHOLE, ("is a file",)),
    "a pickle itself": Bad("meta", lambda d: d / SHARD, ("is a file",)),
    "a device": Bad("empty", lambda d: "/dev/zero", ("is a device, not a directory",)),
    "a FIFO": Bad("empty", steps(fifo("x"), lambda d: d / "x"), ("is a FIFO, not a directory",)),
    "a socket": Bad("empty", steps(unix_socket("x"), lambda d: d / "x"), ("is a socket, not a directory",)),
    "a link to itself": Bad("empty", steps(linked("x", "x"), lambda d: d / "x"), ("cannot be read", "symbolic links")),
    "a name too long": Bad("hf", lambda d: d / ("x" * 300), ("too ",)),
    "hf weights missing": Bad("hf", drop(WHOLE), ("holds no checkpoint", "model.safetensors")),
    "hf config missing": Bad("hf", drop("config.json"), ("has no config.json", "download it")),
    "meta weights missing": Bad("meta", drop(SHARD), ("no .pth file and no model.safetensors beside params.json",)),
    "meta params missing": Bad("meta", drop("params.json"), ("has no params.json", "which Meta's format")),
    "weights are a broken link": Bad(
        "hf", linked(WHOLE, "../blobs/absent"), ("model.safetensors cannot be read", "No such file")
    ),
    "a pickle is a broken link": Bad("bin", linked(PICKLE, "../blobs/absent"), (PICKLE, "No such file")),
    "weights are a link to itself": Bad("hf", linked(WHOLE, WHOLE), ("model.safetensors", "symbolic links")),
    "weights are a FIFO": Bad("hf", fifo(WHOLE), ("model.safetensors", "is a FIFO, expected a regular file")),
    "pth is a FIFO": Bad("meta", fifo(SHARD), ("consolidated.00.pth", "is a FIFO, expected a regular file")),
    "bin is a FIFO": Bad("bin", fifo("pytorch_model.bin"), ("pytorch_model.bin", "is a FIFO, expected a regular file")),
    "gguf is a FIFO": Bad("gguf", fifo("model.gguf"), ("model.gguf", "is a FIFO, expected a regular file")),
    "index is a FIFO": Bad(
        "sharded", fifo(INDEX), ("model.safetensors.index.json", "is a FIFO, expected a regular file")
    ),
    "config is a FIFO": Bad("hf", fifo("config.json"), ("config.json", "is a FIFO, expected a regular file")),
    "params is a FIFO": Bad("meta", fifo("params.json"), ("params.json", "is a FIFO, expected a regular file")),
    "tokenizer.json is a FIFO": Bad(
        "hf", fifo("tokenizer.json"), ("tokenizer.json", "is a FIFO, expected a regular file")
    ),
    "tokenizer.model is a FIFO": Bad(
        "meta", fifo("tokenizer.model"), ("tokenizer.model", "is a FIFO, expected a regular file")
    ),
    "tokenizer_config is a FIFO": Bad(
        "hf", fifo("tokenizer_config.json"), ("tokenizer_config.json", "is a FIFO, expected a regular file")
    ),
    "generation_config is a FIFO": Bad(
        "hf", fifo("generation_config.json"), ("generation_config.json", "is a FIFO, expected a regular file")
    ),
    "sizes.json is a FIFO": Bad("hf", fifo("sizes.json"), ("sizes.json", "is a FIFO, expected a regular file")),
    "weights are a device": Bad("hf", device(WHOLE), ("model.safetensors", "is a device")),
    "pth is a device": Bad("meta", device(SHARD), ("consolidated.00.pth", "is a device")),
    "gguf is a device": Bad("gguf", device("model.gguf"), ("model.gguf", "is a device")),
    "config is a device": Bad("hf", device("config.json"), ("config.json", "is a device")),
    "tokenizer is a device": Bad("meta", device("tokenizer.model"), ("tokenizer.model", "is a device")),
    "weights are a socket": Bad("hf", unix_socket(WHOLE), ("model.safetensors", "is a socket")),
    "config is a socket": Bad("hf", unix_socket("config.json"), ("config.json", "is a socket")),
    "weights are a directory": Bad("hf", folder(WHOLE), ("model.safetensors", "is a directory, expected")),
    "pth is a directory": Bad("meta", folder(SHARD), ("consolidated.00.pth", "is a directory, expected")),
    "config is a directory": Bad("hf", folder("config.json"), ("config.json", "is a directory, expected")),
    "tokenizer is a directory": Bad("hf", folder("tokenizer.json"), ("tokenizer.json", "is a directory, expected")),
    "index is a directory": Bad("sharded", folder(INDEX), ("index.json", "is a directory, expected")),
    "generation_config is a directory": Bad(
        "hf", folder("generation_config.json"), ("generation_config.json", "is a directory, expected")
    ),
    "sparse safetensors": Bad("hf", sparse(WHOLE), ("model.safetensors", "download it again")),
    "sparse pth": Bad("meta", sparse(SHARD), ("got 1099511627776 bytes", "download it again")),
    "sparse gguf": Bad("gguf", sparse("model.gguf"), ("is not a GGUF file", "download it again")),
    "sparse config": Bad("hf", sparse("config.json"), ("it has 1099511627776 bytes, expected at most",)),
    "sparse tokenizer.json": Bad("hf", sparse("tokenizer.json"), ("tokenizer.json", "it has 1099511627776 bytes")),
    "sparse tokenizer.model": Bad("meta", sparse("tokenizer.model"), ("tokenizer.model", "it has 1099511627776 bytes")),
    "weights of zero bytes": Bad("hf", put(WHOLE, b""), ("model.safetensors", "download it again")),
    "pth of zero bytes": Bad("meta", put(SHARD, b""), ("got 0 bytes", "download it again")),
    "gguf of zero bytes": Bad("gguf", put("model.gguf", b""), ("is not a GGUF file", "download it again")),
    "config of zero bytes": Bad(
        "hf", put("config.json", b""), ("config.json is not readable as JSON", "download it again")
    ),
    "tokenizer of zero bytes": Bad(
        "meta", put("tokenizer.model", b""), ("tokenizer.model is not a SentencePiece model",)
    ),
    "LFS pointer for safetensors": Bad("hf", pointer(WHOLE), ("Git LFS",)),
    "LFS pointer for pth": Bad("meta", pointer(SHARD), ("Git LFS",)),
    "LFS pointer for gguf": Bad("gguf", pointer("model.gguf"), ("Git LFS",)),
    "LFS pointer for tokenizer": Bad("meta", pointer("tokenizer.model"), ("Git LFS",)),
    "LFS pointer for tokenizer.json": Bad("hf", pointer("tokenizer.json"), ("Git LFS",)),
    "LFS pointer for bin": Bad("bin", pointer("pytorch_model.bin"), ("Git LFS",)),
    "a web page for weights": Bad(
        "hf",
        put(WHOLE, b"<!DOCTYPE html><html>Access to model is restricted"),
        ("it is a web page", "download it again"),
    ),
    "a web page for config": Bad(
        "hf", put("config.json", b"<!DOCTYPE html><html>"), ("it is a web page", "download it again")
    ),
    "an error for weights": Bad("hf", put(WHOLE, b"Entry not found"), ("an answer of the Hugging Face hub", "log in")),
    "an unfinished download": Bad("hf", rename(WHOLE, WHOLE + ".incomplete"), ("incomplete",)),
    "an unfinished shard": Bad(
        "sharded",
        rename("model-00002-of-00003.safetensors", "model-00002-of-00003.safetensors.part"),
        ("model-00002-of-00003.safetensors is missing", "download the file"),
    ),
    "a zipped checkpoint": Bad("hf", rename(WHOLE, WHOLE + ".gz"), ("model.safetensors.gz is compressed", "unpack")),
    "safetensors cut in header": Bad(
        "hf", cut(WHOLE, 0.001), ("model.safetensors is not a safetensors file, or a damaged one", "download it again")
    ),
    "safetensors cut in middle": Bad(
        "hf", cut(WHOLE, 0.5), ("model.safetensors is not a safetensors file, or a damaged one", "download it again")
    ),
    "safetensors cut by a byte": Bad(
        "hf", cut(WHOLE, 1), ("model.safetensors is not a safetensors file, or a damaged one", "download it again")
    ),
    "pth cut in middle": Bad("meta", cut(SHARD, 0.5), ("consolidated.00.pth is not a checkpoint", "download it again")),
    "pth cut by a byte": Bad("meta", cut(SHARD, 1), ("consolidated.00.pth is not a checkpoint", "download it again")),
    "gguf cut in header": Bad("gguf", cut("model.gguf", 0.01), ("ends within its header", "fetch it again")),
    "gguf cut in middle": Bad("gguf", cut("model.gguf", 0.5), ("expected 567168 as its header says", "fetch it again")),
    "gguf cut by many bytes": Bad("gguf", cut("model.gguf", 64), ("expected 567168", "fetch it again")),
    "config cut": Bad("hf", cut("config.json", 0.5), ("config.json is not readable as JSON", "download it again")),
    "index cut": Bad("sharded", cut(INDEX, 0.5), ("index.json is not readable as JSON", "download it again")),
    "tokenizer.model cut": Bad("meta", cut("tokenizer.model", 0.5), ("tokenizer.model is not a SentencePiece model",)),
    "tokenizer.json cut": Bad("hf", cut("tokenizer.json", 0.5), ("tokenizer.json is not readable as JSON",)),
}


def overlap(content: dict[str, Any]) -> None:
    one, two = (first(content, part) for part in ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"))
    content[two]["data_offsets"] = content[one]["data_offsets"]


def hole(content: dict[str, Any]) -> None:
    del content[first(content, "layers.1.mlp.up_proj")]


def entry(part: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[first(content, part)].update(changes)


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        content[new] = content.pop(old)

    return edit


def twice(content: dict[str, Any]) -> bytes:
    name = first(content, "layers.0.self_attn.q_proj")
    other = content[first(content, "layers.1.self_attn.q_proj")]
    return json.dumps(content).encode()[:-1] + f",{json.dumps(name)}:{json.dumps(other)}}}".encode()


def length(value: int) -> Change:
    """Another length of the header."""

    def change(directory: Path) -> None:
        data = (directory / WHOLE).read_bytes()
        (directory / WHOLE).write_bytes(struct.pack("<Q", value) + data[8:])

    return change


HEADERS: dict[str, Bad] = {
    "header length 0": Bad(
        "hf",
        length(0),
        ("model.safetensors is not a safetensors file, or a damaged one", "invalid JSON", "download it again"),
    ),
    "header length absurd": Bad(
        "hf",
        length(2**62),
        ("model.safetensors is not a safetensors file, or a damaged one", "header too large", "download it again"),
    ),
    "header length negative": Bad(
        "hf",
        length(2**64 - 1),
        ("model.safetensors is not a safetensors file, or a damaged one", "header too large", "download it again"),
    ),
    "header not JSON": Bad(
        "hf",
        header(lambda c: b"x" * 64),
        ("model.safetensors is not a safetensors file, or a damaged one", "invalid JSON", "download it again"),
    ),
    "header a list": Bad(
        "hf",
        header(lambda c: b"[1, 2]"),
        ("model.safetensors is not a safetensors file, or a damaged one", "sequence", "download it again"),
    ),
    "header deep": Bad(
        "hf",
        header(lambda c: b"[" * 100_000),
        ("model.safetensors is not a safetensors file, or a damaged one", "sequence", "download it again"),
    ),
    "overlapping tensors": Bad(
        "hf",
        header(overlap),
        ("model.safetensors is not a safetensors file, or a damaged one", "invalid offset", "download it again"),
    ),
    "a hole": Bad(
        "hf",
        header(hole),
        ("model.safetensors is not a safetensors file, or a damaged one", "invalid offset", "download it again"),
    ),
    "a tensor twice": Bad(
        "hf",
        header(twice),
        ("model.safetensors is not a safetensors file, or a damaged one", "invalid offset", "download it again"),
    ),
    "an unknown dtype": Bad(
        "hf",
        header(entry("norm.weight", dtype="F3")),
        ("model.safetensors is not a safetensors file, or a damaged one", "unknown variant `F3`", "download it again"),
    ),
    "shape overflow": Bad(
        "hf",
        header(entry("model.norm.weight", shape=[2**33, 2**33])),
        ("model.safetensors is not a safetensors file, or a damaged one", "overflow", "download it again"),
    ),
    "shape negative": Bad(
        "hf",
        header(entry("model.norm.weight", shape=[-64])),
        ("model.safetensors is not a safetensors file, or a damaged one", "-64", "download it again"),
    ),
    "offsets backwards": Bad(
        "hf",
        header(entry("model.norm.weight", data_offsets=[256, 0])),
        ("model.safetensors is not a safetensors file, or a damaged one", "invalid offset", "download it again"),
    ),
    "offsets beyond": Bad(
        "hf",
        header(entry("model.norm.weight", data_offsets=[0, 2**63])),
        ("model.safetensors is not a safetensors file, or a damaged one", "invalid offset", "download it again"),
    ),
    "name with a newline": Bad(
        "hf",
        header(renamed("model.norm.weight", "model.norm\n.weight")),
        ("1 missing", "model.norm\\n.weight (no weight"),
    ),
    "name with escape codes": Bad(
        "hf", header(renamed("model.norm.weight", "\x1b[31mnorm\r")), ("1 missing", "\\x1b[31mnorm\\r")
    ),
    "name very long": Bad("hf", header(renamed("model.norm.weight", "x" * 100_000)), ("1 missing", "x" * 200)),
    "integers": Bad("hf", header(entry("model.norm.weight", dtype="I32")), ("1 not floating point", "I32")),
    "index names a missing file": Bad("sharded", drop("model-00002-of-00003.safetensors"), ("is missing",)),
    "a shard of zero bytes": Bad(
        "sharded",
        steps(put("model-00002-of-00003.safetensors", b"")),
        ("model-00002-of-00003.safetensors", "download it again"),
    ),
    "index without a map": Bad("sharded", put(INDEX, {"metadata": {}}), ("no usable weight_map", "expected an object")),
    "index with a path": Bad(
        "sharded", lambda d: _index(d, lambda f: f"../{d.name}/{f}"), ("is missing", "index.json says")
    ),
    "shard of another model": Bad(
        "sharded", lambda d: _mixed(d), ("7 of another shape", "instead of", "another model's or damaged")
    ),
    "shards swapped": Bad(
        "sharded",
        steps(
            rename("model-00001-of-00003.safetensors", "x"),
            rename("model-00002-of-00003.safetensors", "model-00001-of-00003.safetensors"),
            rename("x", "model-00002-of-00003.safetensors"),
        ),
        ("says that tensor lm_head.weight is in", "but it is in model-0000"),
    ),
    "shards without an index": Bad("sharded", drop(INDEX), ("no model.safetensors.index.json", "download it")),
    "whole file beside index": Bad(
        "sharded",
        lambda d: copy(d, "model-00001-of-00003.safetensors", WHOLE),
        ("has both model.safetensors and model.safetensors.index.json", "expected one of them"),
    ),
    "empty safetensors": Bad("hf", lambda d: save_file({}, d / WHOLE), ("missing from 0 tensors",)),
    "meta first of two missing": Bad(
        "split", drop(SHARD), ("consolidated.00.pth is missing", "found: consolidated.01.pth")
    ),
    "meta second of two missing": Bad(
        "split", drop(SECOND), ("one of 2 parts of 64", "expected consolidated.00.pth to consolidated.01.pth")
    ),
    "meta shard twice": Bad(
        "split", lambda d: copy(d, SHARD, SECOND), ("holds the same bytes as consolidated.00.pth", "fetch both again")
    ),
    "meta shard of other model": Bad(
        "split",
        tensors(lambda c: {k: v.half() for k, v in c.items()}, SECOND),
        ("consolidated.01.pth", "float16", "a shard of another model"),
    ),
    "meta shards with a gap": Bad("split", rename(SECOND, "consolidated.02.pth"), ("consolidated.01.pth is missing",)),
}


def _index(directory: Path, change: Callable[[str], str]) -> None:
    content = json.loads((directory / INDEX).read_text())
    content["weight_map"] = {name: change(file) for name, file in content["weight_map"].items()}
    (directory / INDEX).write_text(json.dumps(content))


def _mixed(directory: Path) -> None:
    """A shard that a wider model has in its place."""
    path = directory / "model-00002-of-00003.safetensors"
    wide = {name: torch.cat([tensor, tensor]) for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(wide, path, {"format": "pt"})


SETTINGS: dict[str, Bad] = {
    "heads do not divide": Bad("hf", config(num_attention_heads=5), ("config.json", "got 64 for 5 heads")),
    "heads 0": Bad("hf", config(num_attention_heads=0), ("n_heads: got 0",)),
    "key heads do not divide": Bad("hf", config(num_key_value_heads=3), ("n_kv_heads: got 3", "divisor of n_heads=4")),
    "vocab mismatch": Bad(
        "hf", config(vocab_size=321), ("[320, 64] instead of [321, 64]", "another model's or damaged")
    ),
    "theta 0": Bad("hf", config(rope_theta=0), ("rope_theta",)),
    "theta negative": Bad("hf", config(rope_theta=-1e4), ("rope_theta",)),
    "theta NaN": Bad("hf", config(rope_theta=float("nan")), ("rope_theta",)),
    "theta a text": Bad("hf", config(rope_theta="10000"), ("rope_theta",)),
    "eps 0": Bad("hf", config(rms_norm_eps=0), ("norm_eps",)),
    "eps negative": Bad("hf", config(rms_norm_eps=-1e-5), ("norm_eps",)),
    "layers 0": Bad("hf", config(num_hidden_layers=0), ("n_layers",)),
    "layers too many": Bad("hf", config(num_hidden_layers=3), ("9 missing", "layers.2.attention.wq.weight")),
    "layers too few": Bad("hf", config(num_hidden_layers=1), ("9 not known to this model", "layers.1.")),
    "head_dim odd": Bad("hf", config(head_dim=17), ("attn_head_dim: got 17", "even number")),
    "hidden size of another model": Bad("hf", config(hidden_size=128), ("of another shape", "instead of [128, 128]")),
    "intermediate size 0": Bad("hf", config(intermediate_size=0), ("got 0, expected a positive whole number",)),
    "huge number": Bad("hf", config(vocab_size=10**400), ("vocab_size: got 1000", "expected a positive whole number")),
    "config NaN": Bad("hf", config(rms_norm_eps=float("nan")), ("norm_eps: got nan",)),
    "config comments": Bad(
        "hf",
        put("config.json", b'{// a comment\n"hidden_size": 64}'),
        ("not readable as JSON", "line 1 column 2", "mend it"),
    ),
    "config a key twice": Bad("hf", put("config.json", b'{"hidden_size": 64, "hidden_size": 128}'), ("a key twice",)),
    "config deep": Bad("hf", put("config.json", b'{"a":' * 100_000), ("recursion", "mend it")),
    "config a list": Bad("hf", put("config.json", []), ("got a JSON list, expected an object",)),
    "config UTF-16": Bad(
        "hf", put("config.json", '{"hidden_size": 64}'.encode("utf-16")), ("not readable as JSON", "utf-8", "mend it")
    ),
    "config digits": Bad(
        "hf", put("config.json", b'{"vocab_size": ' + b"9" * 5000 + b"}"), ("not readable as JSON", "5000 digits")
    ),
    "tied although a head differs": Bad(
        "hf", config(tie_word_embeddings=True), ("the head output.weight differs from the embedding",)
    ),
    "params heads": Bad("meta", params(n_heads=5), ("params.json", "got 64 for 5 heads")),
    "params of another size": Bad(
        "meta", params(dim=128), ("of another shape", "instead of [128, 128]", "another model's or damaged")
    ),
    "params multiple_of": Bad("meta", params(multiple_of=256), ("[192, 64] instead of [256, 64]",)),
    "params unknown key": Bad("meta", params(use_moe=True), ("use_moe",)),
    "params vocab 0": Bad("meta", params(vocab_size=0), ("vocab_size: got 0", "or -1 for")),
    "params eps 0": Bad("meta", params(norm_eps=0), ("norm_eps: got 0",)),
    "params theta negative": Bad("meta", params(rope_theta=-1), ("rope_theta: got -1",)),
    "params string": Bad("meta", params(dim="64"), ("dim: got '64'",)),
    "own params changed": Bad("own", params(norm_eps=1e-6), ("belongs to another params.json",)),
    "generation_config temperature": Bad(
        "hf", put("generation_config.json", {"temperature": -1}), ("generation_config.json", "temperature: got -1")
    ),
    "generation_config text": Bad(
        "hf", put("generation_config.json", b"{"), ("generation_config.json is not readable as JSON",)
    ),
}
FAMILIES: dict[str, Bad] = {
    "GPT-2": Bad("hf", other("GPT2LMHeadModel", "gpt2"), ("GPT2LMHeadModel",)),
    "Mixtral": Bad("hf", other("MixtralForCausalLM", "mixtral", num_local_experts=8), ("MixtralForCausalLM",)),
    "Gemma": Bad("hf", other("GemmaForCausalLM", "gemma"), ("GemmaForCausalLM",)),
    "Falcon": Bad("hf", other("FalconForCausalLM", "falcon"), ("FalconForCausalLM",)),
    "DeepSeek": Bad("hf", other("DeepseekV3ForCausalLM", "deepseek_v3"), ("DeepseekV3ForCausalLM",)),
    "Llama 4": Bad("hf", other("Llama4ForConditionalGeneration", "llama4", text_config={}), ("Llama4",)),
    "Mamba": Bad("hf", other("MambaForCausalLM", "mamba"), ("MambaForCausalLM",)),
    "T5": Bad("hf", other("T5ForConditionalGeneration", "t5"), ("T5ForConditionalGeneration",)),
    "BERT": Bad("hf", other("BertForMaskedLM", "bert"), ("BertForMaskedLM",)),
    "vision": Bad("hf", other("MllamaForConditionalGeneration", "mllama", vision_config={}), ("Mllama",)),
    "Llama as classifier": Bad("hf", other("LlamaForSequenceClassification", "llama"), ("LlamaForSequence",)),
    "a bare LlamaModel": Bad("hf", other("LlamaModel", "llama"), ("LlamaModel",)),
    "no architectures": Bad("hf", config(architectures=None), ("architectures",)),
    "code of its own": Bad("hf", config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}), ("auto_map",)),
    "experts in the weights": Bad(
        "hf",
        tensors(lambda c: {**c, "model.layers.0.block_sparse_moe.gate.weight": torch.ones(8, 64)}),
        ("block_sparse_moe",),
    ),
    "biases in the weights": Bad(
        "hf", tensors(lambda c: {**c, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), ("bias",)
    ),
    "names of a vision model": Bad(
        "hf", tensors(lambda c: {f"language_model.{k}": v for k, v in c.items()}), ("language_model",)
    ),
    "names with module.": Bad("hf", tensors(lambda c: {f"module.{k}": v for k, v in c.items()}), ("module.",)),
    "names with _orig_mod.": Bad("hf", tensors(lambda c: {f"_orig_mod.{k}": v for k, v in c.items()}), ("_orig_mod.",)),
    "names without model.": Bad(
        "hf",
        tensors(lambda c: {k.removeprefix("model."): v for k, v in c.items()}),
        ("20 missing", "not known to this model"),
    ),
    "Meta's names beside config.json": Bad(
        "hf", tensors(lambda c: {"tok_embeddings.weight": c["lm_head.weight"]}), ("missing from 1 tensors",)
    ),
    "HF names in a pth": Bad(
        "meta",
        tensors(lambda c: {f"model.{k}": v for k, v in c.items()}, SHARD),
        ("21 missing", "21 not known to this model"),
    ),
    "GGUF of another architecture": Bad("gguf", patched(b"llama", b"gemma"), ("gemma",)),
    "several GGUF files": Bad("gguf", lambda d: copy(d, GGUF, "other.gguf"), ("several .gguf",)),
    "GGUF in parts": Bad("gguf", gguf_of(**{"split.count": 2}), ("--merge",)),
}


def quantised(method: str, **more: Any) -> Change:
    return config(quantization_config={"quant_method": method, "bits": 4, **more})


def packed(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPTQ's tensors in the place of a weight."""
    name = first(content, "q_proj")
    rest = {key: value for key, value in content.items() if key != name}
    stem = name.removesuffix("weight")
    return {**rest, f"{stem}qweight": torch.ones(8, 64, dtype=torch.int32), f"{stem}scales": torch.ones(1, 64)}


def narrow(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(torch.float8_e4m3fn) if "proj" in key else value for key, value in content.items()}


QUANTISED: dict[str, Bad] = {
    "GPTQ": Bad("hf", quantised("gptq", group_size=128), ("quantization_config", "gptq")),
    "AWQ": Bad("hf", quantised("awq", version="gemm"), ("quantization_config", "awq")),
    "bitsandbytes": Bad("hf", quantised("bitsandbytes", load_in_4bit=True), ("quantization_config", "bitsandbytes")),
    "fp8": Bad("hf", quantised("fp8"), ("quantization_config", "fp8")),
    "compressed-tensors": Bad("hf", quantised("compressed-tensors"), ("quantization_config", "compressed-tensors")),
    "MXFP4": Bad("hf", quantised("mxfp4"), ("quantization_config", "mxfp4")),
    "MLX": Bad("hf", config(quantization={"group_size": 64, "bits": 4}), ("quantization", "64")),
    "GPTQ without its settings": Bad("hf", tensors(packed), ("qweight", "not known to this model")),
    "fp8 without its settings": Bad("hf", tensors(narrow), ("F8_E4M3", "not computed with")),
    "GGUF of a type not read": Bad("gguf", gguf_of(kind=Kind.MXFP4), ("MXFP4", "quantise the original")),
}

STRANGERS: dict[str, Bad] = {
    "LoRA alone": Bad(
        "empty",
        steps(put("adapter_config.json", {"peft_type": "LORA"}), put("adapter_model.safetensors", b"")),
        ("adapter", "merge_and_unload"),
    ),
    "LoRA as a pickle": Bad("empty", put("adapter_model.bin", b"x"), ("adapter", "merge_and_unload")),
    "ONNX": Bad("hf", steps(drop(WHOLE), put("model.onnx", b"x")), ("model.onnx", "ONNX")),
    "TensorFlow": Bad("hf", steps(drop(WHOLE), put("tf_model.h5", b"x")), ("tf_model.h5", "TensorFlow")),
    "Flax": Bad("hf", steps(drop(WHOLE), put("flax_model.msgpack", b"x")), ("flax_model.msgpack", "Flax")),
    "DeepSpeed": Bad(
        "empty", put("mp_rank_00_model_states.pt", b"x"), ("mp_rank_00_model_states.pt", "zero_to_fp32.py")
    ),
    "DeepSpeed's directory": Bad("hf", steps(drop(WHOLE), folder("global_step9")), ("zero_to_fp32.py",)),
    "FSDP": Bad("empty", steps(put("__0_0.distcp", b"x"), put(".metadata", b"x")), ("__0_0.distcp", "dcp_to_torch")),
    "Mistral's own format": Bad(
        "meta", steps(rename(SHARD, "consolidated.safetensors")), ("Mistral's own format", "config.json")
    ),
    "MLX's or numpy's": Bad("hf", steps(drop(WHOLE), put("weights.npz", b"x")), ("weights.npz",)),
    "GGML before GGUF": Bad("empty", put("ggml-model-q4_0.bin", b"lmgg"), ("before GGUF", "convert the original")),
    "diffusers": Bad("empty", put("model_index.json", {"_class_name": "FluxPipeline"}), ("diffusion",)),
    "a training's directory": Bad("empty", folder("checkpoint-500"), ("checkpoint-500", "give its directory")),
    "the optimiser alone": Bad("hf", steps(drop(WHOLE), put("optimizer.pt", b"x")), ("optimizer.pt", "optimiser")),
    "an archive": Bad("empty", put("llama.tar.gz", b"x"), ("llama.tar.gz", "unpack")),
    "safetensors by another name": Bad("hf", rename(WHOLE, "weights.safetensors"), ("weights.safetensors", WHOLE)),
    "a pickle by another name": Bad("bin", rename(PICKLE, "weights.bin"), ("weights.bin", PICKLE)),
    "weights with the optimiser": Bad(
        "bin", tensors(lambda c: {"model": dict(c), "optimizer": {}}, PICKLE), ("got a dict under 'model'",)
    ),
    "a pickled list": Bad("bin", tensors(lambda c: list(c.values()), PICKLE), ("got a list",)),
    "a pickled module": Bad(
        "bin",
        lambda d: torch.save(torch.nn.Linear(2, 2), d / PICKLE),
        ("it holds more than tensors", "torch.nn.modules.linear.Linear"),
    ),
    "two formats": Bad("hf", lambda d: copy(d, WHOLE, SHARD), ("several formats", "move the others")),
}


def filled(part: str, value: float, dtype: torch.dtype | None = None) -> Callable[[dict[str, torch.Tensor]], None]:
    """Put a number into one place of a weight, and all of the file into another dtype."""

    def edit(content: dict[str, torch.Tensor]) -> None:
        for name in content:
            content[name] = content[name].to(dtype or content[name].dtype)
        content[first(content, part)].view(-1)[-1] = value

    return edit


def zeros(share: float, name: str = WHOLE) -> Change:
    """The end of a file as a download leaves it that reserved the whole length."""

    def change(directory: Path) -> None:
        data = (directory / name).read_bytes()
        kept = int(len(data) * (1 - share))
        (directory / name).write_bytes(data[:kept] + bytes(len(data) - kept))

    return change


def transposed(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(content: dict[str, torch.Tensor]) -> None:
        content[first(content, part)] = content[first(content, part)].t()

    return edit


WEIGHTS: dict[str, Bad] = {
    "NaN": Bad("hf", tensors(filled("up_proj", math.nan)), ("up_proj", "holds NaN or infinity")),
    "infinity": Bad("hf", tensors(filled("embed", math.inf)), ("embed_tokens", "holds NaN or infinity")),
    "NaN in bfloat16": Bad("hf", tensors(filled("norm", math.nan, torch.bfloat16)), ("holds NaN or infinity",)),
    "minus infinity in float16": Bad("hf", tensors(filled("lm_head", -math.inf, torch.float16)), ("lm_head",)),
    "NaN in a pth": Bad("meta", tensors(filled("wq", math.nan), SHARD), ("wq", "holds NaN or infinity")),
    "NaN in the second shard": Bad(
        "split",
        steps(drop("sizes.json", "checksums.json"), tensors(filled("wv", math.nan), SECOND)),
        ("wv", "holds NaN"),
    ),
    "all zeros": Bad("hf", tensors(lambda c: {k: v * 0 for k, v in c.items()}), ("is zero throughout", "again")),
    "zeros from the middle": Bad("hf", zeros(0.5), ("is zero throughout", "download the file again")),
    "zeros at the end": Bad("hf", zeros(0.1), ("is zero throughout",)),
    "zeros at the end of a GGUF file": Bad("gguf", zeros(0.3, GGUF), ("is zero throughout",)),
    "a transposed weight": Bad("hf", tensors(transposed("up_proj")), ("up_proj", "[64, 192] instead of [192, 64]")),
    "a weight less": Bad("hf", tensors(lambda c: {k: v for k, v in c.items() if "0.mlp.up" not in k}), ("1 missing",)),
    "a weight of integers": Bad("hf", tensors(lambda c: {**c, "model.norm.weight": torch.ones(64).int()}), ("I32",)),
    "complex numbers": Bad(
        "bin", tensors(lambda c: {**c, "model.norm.weight": torch.ones(64) * 1j}, PICKLE), ("complex",)
    ),
    "a sparse tensor": Bad(
        "bin", tensors(lambda c: {**c, "model.norm.weight": torch.ones(64).to_sparse()}, PICKLE), ("not a plain one",)
    ),
    "both 16-bit types": Bad(
        "hf",
        tensors(lambda c: {k: v.to(torch.half if "norm" in k else torch.bfloat16) for k, v in c.items()}),
        ("of the other 16-bit type",),
    ),
}


def larger(directory: Path) -> None:
    """Llama 3's kind of tokenizer, with more ids than the embedding has rows."""
    (directory / "tokenizer.json").unlink()
    write_ranks(byte_level(), directory / "tokenizer.model")


def tokenizer(edit: Callable[[dict[str, Any]], None]) -> Change:
    def change(directory: Path) -> None:
        path = directory / "tokenizer.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change


TOKENIZERS: dict[str, Bad] = {
    "generation_config is a broken link": Bad(
        "hf", linked("generation_config.json", "absent"), ("generation_config.json", "No such file")
    ),
    "none": Bad("meta", drop("tokenizer.model"), ("no tokenizer", "--tokenizer_path")),
    "settings without a tokenizer": Bad("hf", drop("tokenizer.json"), ("no tokenizer", "--tokenizer_path")),
    "two of them": Bad("meta", lambda d: copy(d, "tokenizer.model", "other.model"), ("2 tokenizers", "choose with")),
    "more ids than rows": Bad("hf", larger, ("646 ids", "320 rows")),
    "BOS by a name that is not there": Bad(
        "hf", says("tokenizer_config.json", bos_token="<|begin|>"), ("<|begin|>", "bos_token")
    ),
    "EOS outside the vocabulary": Bad(
        "hf", put("generation_config.json", {"eos_token_id": 99999}), ("99999", "belong to different models")
    ),
    "EOS of another kind": Bad("hf", put("generation_config.json", {"eos_token_id": "</s>"}), ("eos_token_id", "</s>")),
    "no EOS": Bad(
        "hf",
        steps(
            says("tokenizer_config.json", eos_token=None),
            tokenizer(lambda c: c["added_tokens"][2].update(content="<end>")),
            tokenizer(lambda c: c["model"]["vocab"].update({"<end>": c["model"]["vocab"].pop("</s>")})),
        ),
        ("has no EOS token", "tokenizer_config.json"),
    ),
    "pieces of BERT": Bad(
        "hf", tokenizer(lambda c: c["model"].update(continuing_subword_prefix="##")), ("marks pieces within words",)
    ),
    "a decoder of another kind": Bad(
        "hf",
        tokenizer(lambda c: c.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})),
        ("decoder",),
    ),
    "text": Bad("meta", put("tokenizer.model", b"hello"), ("is not a SentencePiece model",)),
    "ranks cut short": Bad("meta", put("tokenizer.model", b"IQ== 0\nIg== 1\n"), ("cut short",)),
    "tokenizer_config a list": Bad("hf", put("tokenizer_config.json", []), ("tokenizer_config.json", "object")),
    "BOS outside a GGUF vocabulary": Bad(
        "gguf", gguf_of(**{"tokenizer.ggml.bos_token_id": 9999}), ("9999", "below 320")
    ),
    "GGUF without a tokenizer": Bad("gguf", gguf_of(tokens=False), ("tokenizer.ggml",)),
}


# ----------------------------------------------------------------------------------------------------- odd, but sound


class Odd(NamedTuple):
    """A checkpoint that is fine: it generates what the undamaged one does; fields as of Bad."""

    base: str
    change: Change


def moved(name: str) -> Change:
    """Another name of the directory."""

    def change(directory: Path) -> Path:
        directory.rename(directory.parent / name)
        return directory.parent / name

    return change


def marked(*names: str) -> Change:
    """A byte order mark at the beginning of files."""

    def change(directory: Path) -> None:
        for name in names:
            (directory / name).write_bytes(b"\xef\xbb\xbf" + (directory / name).read_bytes())

    return change


def hub(directory: Path) -> Path:
    """The layout of huggingface_hub's cache: a snapshot of links to blobs."""
    model = directory.parent / "models--some--model"
    blobs, snapshot = model / "blobs", model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    directory.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return model


def read_only(directory: Path) -> None:
    for path in (*directory.iterdir(), directory):
        path.chmod(0o555)


def turned(content: dict[str, Any]) -> bytes:
    """The entries of a header in another order, without the metadata."""
    content.pop("__metadata__", None)
    return json.dumps(dict(reversed(content.items()))).encode()


EXTRA = ("README.md", ".gitattributes", "training_args.bin", "rng_state_0.pth", "optimizer.pt", "model.onnx", "LICENSE")
SOUND: dict[str, Odd] = {
    **{f"as it is: {base}": Odd(base, steps()) for base in ("hf", "sharded", "bin", "meta", "split", "own", "gguf")},
    "bfloat16": Odd("hf", tensors(lambda c: {k: v.bfloat16() for k, v in c.items()})),
    "bfloat16 with float32 norms": Odd(
        "hf", tensors(lambda c: {k: v if "norm" in k else v.bfloat16() for k, v in c.items()})
    ),
    "float64": Odd("hf", tensors(lambda c: {k: v.double() for k, v in c.items()})),
    "other files": Odd("hf", steps(*(put(name, b"x") for name in EXTRA))),
    "an unfinished download of another file": Odd("hf", put(".cache/huggingface/download/x.incomplete", b"x")),
    "a FIFO and a socket beside it": Odd("hf", steps(fifo("pipe"), unix_socket("socket"))),
    "a directory beside it": Odd("hf", put("original/consolidated.00.pth", b"x")),
    "Mistral's own files beside it": Odd(
        "hf", steps(put("params.json", {"dim": 64}), put("consolidated.safetensors", b"x"))
    ),
    "an adapter beside it": Odd("hf", put("adapter_model.safetensors", b"x")),
    "entries in another order": Odd("hf", header(turned)),
    "other keys": Odd("hf", config(transformers_version="4.31.0", pretraining_tp=1, attention_dropout=0.0, bos_id=7)),
    "rotary tables": Odd("hf", tensors(lambda c: {**c, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})),
    "rotary tables in a pth": Odd("meta", tensors(lambda c: {**c, "rope.freqs": torch.ones(8)}, SHARD)),
    "total_size wrong": Odd("sharded", says(INDEX, metadata={"total_size": 1})),
    "an index without metadata": Odd("sharded", says(INDEX, metadata=None)),
    "an index of one file": Odd(
        "hf",
        lambda d: steps(
            put(INDEX, {"weight_map": dict.fromkeys(load_file(d / WHOLE), "model-00001-of-00001.safetensors")}),
            rename(WHOLE, "model-00001-of-00001.safetensors"),
        )(d),
    ),
    "byte order marks": Odd("hf", marked("config.json", "tokenizer.json", "tokenizer_config.json")),
    "a byte order mark in params": Odd("meta", marked("params.json")),
    "vocab_size -1": Odd("meta", params(vocab_size=-1)),
    "the engine's settings in params": Odd("meta", params(max_seq_len=4096, max_batch_size=32)),
    "a pth by another name": Odd("meta", rename(SHARD, "llama.pth")),
    "a GGUF file beside its original": Odd("hf", put("model-q4.gguf", b"x")),
    "a GGUF file by another name": Odd("gguf", steps(rename(GGUF, "model.bin"), lambda d: d / "model.bin")),
    "an unknown class of tokenizer": Odd("hf", says("tokenizer_config.json", tokenizer_class="OwnTokenizer")),
    "the tokenizer in the parent": Odd(
        "meta", lambda d: shutil.move(d / "tokenizer.model", d.parent / "tokenizer.model") and None
    ),
    "the hub's cache": Odd("hf", hub),
    "links to files": Odd("hf", steps(rename(WHOLE, "blob"), linked(WHOLE, "blob"))),
    "a link to the directory": Odd(
        "hf", steps(lambda d: (d.parent / "link").symlink_to(d), lambda d: d.parent / "link")
    ),
    "read only": Odd("hf", read_only),
    "a name with spaces": Odd("hf", moved("my model  7b")),
    "a name of Unicode": Odd("hf", moved("modèle-日本-😀")),
    "a name with a line break": Odd("hf", moved("a\nb")),
    "a name with %20": Odd("hf", moved("a%20b")),
    "a name with a leading dash": Odd("hf", moved("-model")),
    "a name with brackets": Odd("hf", moved("[1-2]*?{a}")),
    "a name that ends in .gguf": Odd("hf", moved("model.gguf")),
    "a slash at the end": Odd("hf", lambda d: f"{d}/"),
}


# ----------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """One model in every format, and one whose embedding has four times as many rows as its tokenizer has ids."""
    top = tmp_path_factory.mktemp("good")
    weights = random_weights(TINY, dtype=torch.bfloat16)
    weights = {name: weight.float() for name, weight in weights.items()}  # so that bfloat16 files hold equal numbers
    write_meta(top / "meta", TINY, [weights])
    shutil.copy(tokenizer_path, top / "meta")
    reshard(top / "meta", top / "split", 2)
    convert(top / "meta", top / "own")
    write_hugging_face(top / "meta", top / "hf", 2048)
    own = load_file(top / "hf" / WHOLE)
    for name in ("bin", "sharded"):
        shutil.copytree(top / "hf", top / name, ignore=shutil.ignore_patterns(WHOLE))
    torch.save(own, top / "bin" / PICKLE)
    files = {name: f"model-0000{place % 3 + 1}-of-00003.safetensors" for place, name in enumerate(sorted(own))}
    for file in set(files.values()):
        part = {name: own[name] for name in own if files[name] == file}
        save_file(part, top / "sharded" / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in own.values())
    (top / "sharded" / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}))
    (top / "gguf").mkdir()
    shutil.copy(tokenizer_path, top / "gguf")
    gguf_files.write(top / "gguf" / GGUF, TINY, weights, tokenizer=gguf_files.sentencepiece_entries(tokenizer_path))
    (top / "empty").mkdir()
    wide = replace(TINY, vocab_size=1280)
    write_meta(top / "wide", wide, [random_weights(wide)])
    shutil.copy(tokenizer_path, top / "wide")
    return top


@contextmanager
def bounded() -> Iterator[None]:
    """Within: what blocks is interrupted after LIMIT_S, and the test fails."""

    def late(*_: object) -> None:
        raise TimeoutError(f"it took more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def changed(case: Bad | Odd, good: Path, tmp_path: Path) -> str:
    """Make a case's checkpoint; return its path."""
    directory = tmp_path / "checkpoint"
    tmp_path.mkdir(exist_ok=True)
    shutil.copytree(good / case.base, directory)
    return str(case.change(directory) or directory)


def problems(outcome: Outcome) -> list[str]:
    """What `inspect` found; where the path itself is refused, that message."""
    if not outcome.out:
        return [outcome.message]
    lines = outcome.out.partition("  problems:\n")[2].splitlines()
    assert lines, outcome.out
    assert all(line.startswith("    - ") for line in lines), lines
    return lines


TABLE = {
    f"{topic}: {name}": case
    for topic, cases in (
        ("files", FILES),
        ("headers", HEADERS),
        ("settings", SETTINGS),
        ("families", FAMILIES),
        ("quantised", QUANTISED),
        ("strangers", STRANGERS),
        ("weights", WEIGHTS),
        ("tokenizers", TOKENIZERS),
    )
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", TABLE)
def test_refused(name: str, good: Path, tmp_path: Path, run: Run) -> None:
    """`inspect` lists the problem, `generate` ends with it: exit code 2, one line each, no traceback."""
    case = TABLE[name]
    path = changed(case, good, tmp_path)
    with bounded():
        inspected = run("inspect", path, "--check_tensors")
        generated = run("generate", "--ckpt_dir", path, "--prompt", "a", "--max_gen_len", "2", "--quiet")
    assert (inspected.code, generated.code, generated.out) == (2, 2, ""), (inspected, generated)
    for outcome in (inspected, generated):
        assert "Traceback" not in outcome.err
        assert outcome.message.startswith("llama-xla: ")
        assert len(outcome.message) < 4000
    said = problems(inspected)
    assert any(all(word in line for word in case.words) for line in said), said
    assert any(all(word in line for word in case.words) for line in [generated.message]), generated.err


def test_names_cannot_command_a_terminal(good: Path, tmp_path: Path, run: Run) -> None:
    """`inspect` writes control characters of a tokenizer's tokens as escapes, one fact a line."""
    shutil.copytree(good / "hf", tmp_path / "checkpoint")
    tokenizer(lambda c: c["added_tokens"][0].update(content="\x1b[31m\n</>"))(tmp_path / "checkpoint")
    outcome = run("inspect", str(tmp_path / "checkpoint"))
    assert "\\x1b[31m\\n</>" in outcome.out
    assert "\x1b" not in outcome.out


def test_the_table_is_large() -> None:
    """The bar is 80 damaged or foreign checkpoints; each one says what must be said of it."""
    assert len(TABLE) >= 80
    assert [name for name, case in TABLE.items() if not all(case.words)] == []


class Held(NamedTuple):
    """What a checkpoint computes with: its shape, its weights in float32, and the ids of a text."""

    shape: tuple[object, ...]
    weights: dict[str, torch.Tensor]
    ids: list[int]
    stop_ids: tuple[int, ...]


def held(path: Path) -> Held:
    source, tokenizer = open_checkpoint(path), load_tokenizer(find_tokenizer(path))
    args = source.args
    shape = (args.dim, args.n_layers, args.n_heads, args.kv_heads, args.head_dim, args.hidden_dim, args.vocab_size)
    numbers = (
        float32(args.norm_eps),
        args.rope_theta,
        args.rope_scaling,
        args.tie_word_embeddings,
        args.sliding_window,
    )
    weights = {name: weight.float().clone() for name, weight in checked(source)}
    return Held((*shape, *numbers), weights, tokenizer.encode("Once upon a time"), tokenizer.stop_ids)


def float32(number: float) -> float:
    """A number as GGUF files hold it."""
    return struct.unpack("f", struct.pack("f", number))[0]


@pytest.mark.parametrize("name", SOUND)
def test_sound(name: str, good: Path, tmp_path: Path, run: Run) -> None:
    """The same shape, weights and ids as of the undamaged one, so the same text; and `inspect` finds nothing."""
    path = changed(SOUND[name], good, tmp_path)
    with bounded():
        outcome = run("inspect", path, "--check_tensors")
        found, wanted = held(Path(locate(path))), held(good / "meta")
    assert (outcome.code, outcome.out.splitlines()[-1].strip()) == (0, "no problems found"), outcome
    assert found._replace(weights={}) == wanted._replace(weights={})
    assert_equal(found.weights.items(), wanted.weights)


def generated(path: Path) -> tuple[list[int], str]:
    """Greedy tokens after a text, and the text of them."""
    llm = LLaMA.build(path, config=EngineConfig(max_seq_len=32, buckets=(1,), prefix_cache=False))
    (result,) = llm.generate("Once upon a time", max_gen_len=8, temperature=0)
    return result.token_ids, result.generation


@pytest.mark.slow
def test_sound_ones_generate_the_same(good: Path, tmp_path: Path) -> None:
    """Every format, and narrow weights: the greedy tokens and the text are the same."""
    wanted = generated(good / "meta")
    for base in ("hf", "sharded", "bin", "split", "own", "gguf"):
        assert generated(good / base) == wanted, base
    for name in ("bfloat16", "the hub's cache", "byte order marks"):
        path = changed(SOUND[name], good, tmp_path / name.replace(" ", "-"))
        assert generated(Path(locate(path))) == wanted, name


def test_a_tokenizer_of_a_far_smaller_vocabulary(good: Path, run: Run) -> None:
    """`inspect` counts it as a problem."""
    outcome = run("inspect", str(good / "wide"))
    (line,) = problems(outcome)
    for word in ("320 ids", "1280 rows", "another model", "--tokenizer_path"):
        assert word in line


def test_loading_warns_of_a_far_smaller_vocabulary(good: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It does not refuse: embeddings may have more rows than there are ids."""
    source, tokenizer = open_checkpoint(good / "wide"), load_tokenizer(good / "wide" / "tokenizer.model")
    with caplog.at_level("WARNING", "llama"):
        matched(None, source, tokenizer, EngineConfig(max_seq_len=32))
        matched(None, open_checkpoint(good / "meta"), tokenizer, EngineConfig(max_seq_len=32))
    (warned,) = caplog.messages
    assert "320 ids, but the model's embedding 1280 rows" in warned


@contextmanager
def not_root() -> Iterator[None]:
    """Within: without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("", 0), ("", 0o444), *((name, 0) for name in (WHOLE, "config.json", "tokenizer.json", "tokenizer_config.json"))],
)
def test_without_permission(name: str, mode: int, good: Path, run: Run) -> None:
    """A directory, or one of its files, that the user may not read; root reads everything, so it becomes nobody."""
    with TemporaryDirectory() as top:  # pytest's own directories are closed to nobody
        path = Path(top) / "checkpoint"
        shutil.copytree(good / "hf", path)
        for each in (Path(top), path, *path.iterdir()):
            each.chmod(0o755)
        (path / name).chmod(mode)
        run("inspect", str(good / "hf"))  # nobody may not be allowed to import what is still missing
        try:
            with not_root():
                outcomes = [
                    run("inspect", str(path), "--check_tensors"),
                    run("generate", "--ckpt_dir", str(path), "--prompt", "a", "--quiet"),
                ]
        finally:
            (path / name).chmod(0o755)
    for outcome, said in zip(outcomes, (problems(outcomes[0]), [outcomes[1].message]), strict=True):
        assert (outcome.code, "Traceback" in outcome.err) == (2, False)
        assert any(name in line and "Permission denied" in line for line in said), said
