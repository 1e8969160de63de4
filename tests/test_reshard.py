"""Writing checkpoints: n -> m -> n is the identity, what is interrupted leaves nothing, what is written is checked,
memory stays small.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import assert_equal, edit_json, random_weights, write_meta
from safetensors import safe_open

from llama import ModelArgs, RopeScaling, checkpoint
from llama.checkpoint import names, open_checkpoint, writing
from llama.checkpoint.checksums import differing_files, read_checksums
from llama.checkpoint.reshard import companions, convert, parse_size, reshard
from llama.errors import CheckpointError, ConfigError
from llama.sharding import AXES, axis_of

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=8, vocab_size=320, multiple_of=32)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def one_file(directory: Path, args: ModelArgs = ARGS, dtype: torch.dtype = torch.float32, **params: Any) -> Path:
    return write_meta(directory, args, [random_weights(args, dtype=dtype)], **params)


def test_every_weight_has_an_axis() -> None:
    """The table of axes names the weights that the table of names does; an axis is one that the weight has."""
    assert AXES.keys() == names.TABLE.keys()
    for name, weight in names.expected_weights(ARGS):
        axis = axis_of(name)
        assert (axis is None) == (len(weight.shape) == 1), name
    assert (axis_of("layers.31.attention.wo.weight"), axis_of("layers.0.feed_forward.w1.weight")) == (1, 0)
    with pytest.raises(KeyError):
        axis_of("layers.00.attention.wq.weight")


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize(("n", "m"), [(8, 1), (1, 8), (2, 4), (4, 2), (8, 2)])
def test_there_and_back_is_the_identity(tmp_path: Path, n: int, m: int, embedding_axis: int) -> None:
    """Every file, byte by byte; and every tensor on the way."""
    weights = random_weights(ARGS, dtype=torch.bfloat16)
    reshard(
        one_file(tmp_path / "src", dtype=torch.bfloat16, vocab_size=-1),
        tmp_path / "n",
        n,
        embedding_axis=embedding_axis,
    )
    reshard(tmp_path / "n", tmp_path / "m", m)
    reshard(tmp_path / "m", tmp_path / "back", n)
    assert contents(tmp_path / "n") == contents(tmp_path / "back")
    assert json.loads((tmp_path / "m" / "params.json").read_text())["vocab_size"] == -1
    for name, count in (("n", n), ("m", m)):
        source = open_checkpoint(tmp_path / name)
        assert (len(source.files), source.args, source.embedding_axis) == (count, ARGS, embedding_axis)
        assert_equal(source.tensors(), weights)


def test_there_and_back_through_our_own_format(tmp_path: Path) -> None:
    """How the embedding was split is remembered there, too; mixed dtypes stay as they are."""
    weights = random_weights(ARGS, dtype=torch.bfloat16)
    weights |= {name: tensor.float() for name, tensor in weights.items() if tensor.dim() == 1}
    reshard(write_meta(tmp_path / "src", ARGS, [weights]), tmp_path / "n", 4, embedding_axis=0)
    convert(tmp_path / "n", tmp_path / "native", max_shard_size="30KB")
    convert(tmp_path / "native", tmp_path / "native1")
    reshard(tmp_path / "native1", tmp_path / "back", 4)
    there, back = contents(tmp_path / "n"), contents(tmp_path / "back")
    assert there.keys() == back.keys()
    assert all(there[name] == back[name] for name in there if name.endswith(".pth"))
    assert json.loads(there["params.json"]) == json.loads(back["params.json"])
    with safe_open(tmp_path / "native1" / "model.safetensors", framework="pt") as file:
        assert (file.metadata()["dtype"], file.metadata()["source"]) == ("bfloat16+float32", "llama-xla")


def test_shards_are_ordinary_files(tmp_path: Path) -> None:
    """torch.load reads them without help, any zip tool finds them sound, and no tensor drags the whole along."""
    shards = reshard(one_file(tmp_path / "src"), tmp_path / "out", 4)
    assert [path.name for path in shards] == [f"consolidated.{rank:02}.pth" for rank in range(4)]
    whole = random_weights(ARGS)
    for rank, path in enumerate(shards):
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None
        loaded = torch.load(path, weights_only=True)
        assert torch.equal(
            loaded["layers.1.feed_forward.w1.weight"], whole["layers.1.feed_forward.w1.weight"].chunk(4)[rank]
        )
        assert torch.equal(
            loaded["layers.1.feed_forward.w2.weight"], whole["layers.1.feed_forward.w2.weight"].chunk(4, 1)[rank]
        )
        assert torch.equal(loaded["norm.weight"], whole["norm.weight"])
        assert all(tensor.untyped_storage().nbytes() == tensor.numel() * 4 for tensor in loaded.values())


@pytest.mark.parametrize(
    ("changes", "axis"),
    [({}, 1), ({"rope_theta": 500000.0}, 0), ({"rope_theta": 1e6}, 1)],
    ids=["LLaMA 1 and 2", "Llama 3", "Code Llama"],
)
def test_the_embedding_is_split_as_metas_code_for_the_model_does(
    tmp_path: Path, changes: dict[str, Any], axis: int
) -> None:
    """Where nothing says how it was split."""
    reshard(one_file(tmp_path / "src", ModelArgs(**{**ARGS.to_params(), **changes})), tmp_path / "out", 2)
    assert open_checkpoint(tmp_path / "out").embedding_axis == axis


def test_more_shards_than_key_heads(tmp_path: Path) -> None:
    """Neighbours get the same head, and the way back finds each once."""
    args = ModelArgs(dim=64, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=320, multiple_of=32)
    shards = reshard(one_file(tmp_path / "src", args), tmp_path / "out", 8)
    heads = [torch.load(path, weights_only=True)["layers.0.attention.wk.weight"] for path in shards]
    whole = random_weights(args)["layers.0.attention.wk.weight"]
    assert [torch.equal(head, whole.chunk(2)[rank // 4]) for rank, head in enumerate(heads)] == [True] * 8
    reshard(tmp_path / "out", tmp_path / "back", 1)
    assert_equal(open_checkpoint(tmp_path / "back").tensors(), random_weights(args))


def test_tied_and_scaled_models_keep_their_settings(tmp_path: Path) -> None:
    """What Meta's params.json has no word for is still there after every conversion."""
    scaling = RopeScaling(factor=3.0, kind="linear")
    args = ModelArgs(**{**ARGS.to_params(), "tie_word_embeddings": True}, rope_scaling=scaling)
    convert(one_file(tmp_path / "src", args), tmp_path / "native")
    reshard(tmp_path / "native", tmp_path / "two", 2)
    for name in ("src", "native", "two"):
        assert open_checkpoint(tmp_path / name).args == args
        assert "output.weight" not in open_checkpoint(tmp_path / name).infos()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (3, "cannot be split into 3: n_heads 8, vocab_size 320, dim 64, n_kv_heads 8"),
        (16, "n_heads 8"),
        (0, "model_parallel 0"),
        (-2, "model_parallel -2"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path: Path, parts: int, message: str) -> None:
    """With the sizes, and before anything is written."""
    source = one_file(tmp_path / "src")
    with pytest.raises((CheckpointError, ConfigError), match=message):
        reshard(source, tmp_path / "out", parts)
    assert {path.name for path in tmp_path.iterdir()} == {"src"}


def test_odd_vocabularies(tmp_path: Path) -> None:
    """Where the head is split, the vocabulary must divide; a tied embedding may be split by its vectors instead."""
    args = ModelArgs(**{**ARGS.to_params(), "vocab_size": 321})
    with pytest.raises(CheckpointError, match="cannot be split into 2: vocab_size 321"):
        reshard(one_file(tmp_path / "src", args), tmp_path / "out", 2)
    tied = ModelArgs(**{**args.to_params(), "tie_word_embeddings": True})
    reshard(one_file(tmp_path / "tied", tied), tmp_path / "out", 2)
    assert_equal(open_checkpoint(tmp_path / "out").tensors(), random_weights(tied))


def test_companions_travel_along(tmp_path: Path) -> None:
    """The tokenizer's files and the defaults do, code and optimizer states do not; LLaMA 1 keeps the tokenizer in the
    parent.
    """
    source = one_file(tmp_path / "src")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (source / name).write_text("{}")
    for name in ("modeling.py", "optimizer.pt", "README.md"):
        (source / name).write_text("x")
    convert(source, tmp_path / "native")
    reshard(tmp_path / "native", tmp_path / "meta", 1)
    kept = {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "params.json",
        "checksums.json",
        "sizes.json",
    }
    assert set(contents(tmp_path / "native")) == kept | {"model.safetensors"}
    assert set(contents(tmp_path / "meta")) == kept | {"consolidated.00.pth"}

    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"sentences")
    assert [path.parent for path in companions(source) if path.name == "tokenizer.model"] == [tmp_path]
    (tmp_path / "other.model").write_bytes(b"sentences")
    assert [path for path in companions(source) if path.suffix == ".model"] == []


def test_a_sliding_window_is_remembered(tmp_path: Path) -> None:
    """It limits how the model may be used; Meta's params.json has no key for it."""
    source = one_file(tmp_path / "src")
    (source / "llama-xla.json").write_text('{"sliding_window": 4096}')
    convert(source, tmp_path / "native")
    reshard(tmp_path / "native", tmp_path / "two", 2)
    reshard(tmp_path / "two", tmp_path / "one", 1)
    for name in ("src", "native", "two", "one"):
        assert open_checkpoint(tmp_path / name).sliding_window == 4096
    for wrong in ('{"sliding_window": 0}', '{"embedding_axis": 2}', '{"embedding_axis": true}', '{"other": 1}', "[]"):
        (source / "llama-xla.json").write_text(wrong)
        with pytest.raises(CheckpointError, match=r"llama-xla\.json: got"):
            open_checkpoint(source)


# dtype and size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_convert_changes_the_dtype(tmp_path: Path, dtype: str) -> None:
    """As torch rounds."""
    convert(one_file(tmp_path / "src"), tmp_path / "native", dtype=dtype)
    wanted = getattr(torch, dtype)
    assert_equal(
        open_checkpoint(tmp_path / "native").tensors(), {n: t.to(wanted) for n, t in random_weights(ARGS).items()}
    )


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    """They would become infinite; an infinity that is there already is kept."""
    weights = random_weights(ARGS)
    weights["norm.weight"][5] = 1e5
    source = write_meta(tmp_path / "src", ARGS, [weights])
    with pytest.raises(CheckpointError, match=r"tensor norm\.weight holds numbers that torch\.float16 cannot"):
        convert(source, tmp_path / "native", dtype="float16")
    weights["norm.weight"][5] = float("inf")
    convert(write_meta(tmp_path / "infinite", ARGS, [weights]), tmp_path / "native", dtype="float16")
    assert open_checkpoint(tmp_path / "native").read("norm.weight")[5] == float("inf")


def test_files_stay_below_the_size_that_is_asked_for(tmp_path: Path) -> None:
    """Except where one weight is larger than that."""
    files = convert(one_file(tmp_path / "src"), tmp_path / "native", max_shard_size="60KB")
    sizes = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            sizes.append([file.get_tensor(name).numel() * 4 for name in file.keys()])  # noqa: SIM118 (it is no dict)
    assert all(sum(each) <= 60_000 or len(each) == 1 for each in sizes)
    assert len(files) > 5


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5GiB", 3 * 2**29), ("500 MB", 5 * 10**8), ("7", 7), (12, 12), ("1kb", 1000)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 XB", "-1", "0", 0, "1e9", "0.1"])
def test_no_sizes(text: str | int) -> None:
    with pytest.raises(ConfigError, match="max_shard_size: got"):
        parse_size(text)


def test_unknown_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype: got 'int3', expected one of float32"):
        convert(one_file(tmp_path / "src"), tmp_path / "native", dtype="int3")


# Whole or not at all


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Neither a directory nor a file nor a dangling link; and the parent must be there."""
    source = one_file(tmp_path / "src")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name in ("src", "file", "link", "empty"):
        with pytest.raises(CheckpointError, match="is there already and is not overwritten"):
            convert(source, tmp_path / name)
        with pytest.raises(CheckpointError, match="is there already and is not overwritten"):
            reshard(source, tmp_path / name, 2)
    with pytest.raises(CheckpointError, match="is not a directory; make it first"):
        convert(source, tmp_path / "absent" / "native")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device"), SystemExit(143)]
)
@pytest.mark.parametrize("after", [0, 1, 7, 30, 44])
def test_a_run_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, failure: BaseException | type[BaseException]
) -> None:
    """Whichever write it is that fails: of a weight, of a shard that torch.save packs, of params.json."""
    source = one_file(tmp_path / "src")
    write, count = writing.HashedFile.write, 0

    def fail(file: writing.HashedFile, data: bytes | memoryview) -> int:
        nonlocal count
        count += 1
        if count > after:
            raise failure
        return write(file, data)

    monkeypatch.setattr(writing.HashedFile, "write", fail)
    expected = (
        CheckpointError if isinstance(failure, OSError) else failure if isinstance(failure, type) else type(failure)
    )
    for run in (
        lambda: convert(source, tmp_path / "out", max_shard_size="50KB"),
        lambda: reshard(source, tmp_path / "out", 2),
    ):
        count = 0
        with pytest.raises(expected):
            run()
        assert {path.name for path in tmp_path.iterdir()} == {"src"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number"), [("convert", signal.SIGINT), ("reshard", signal.SIGTERM), ("reshard", signal.SIGKILL)]
)
def test_a_signal_in_the_middle(tmp_path: Path, command: str, number: signal.Signals) -> None:
    """In a process of its own: Ctrl-C and SIGTERM clean up; what SIGKILL leaves is hidden, and nothing loads it."""
    source = one_file(
        tmp_path / "src", ModelArgs(dim=64, n_layers=40, n_heads=8, n_kv_heads=8, vocab_size=320, multiple_of=32)
    )
    call = "convert(src, dst)" if command == "convert" else "reshard(src, dst, 8)"
    code = f"""
import sys, time
from llama.checkpoint import source, reshard as module
from llama.checkpoint.checksums import differing_files, read_checksums
from llama.checkpoint.reshard import convert, reshard
read = source.Source.read
def slow(self, name):
    print(name, flush=True)
    time.sleep(0.02)
    return read(self, name)
source.Source.read = slow
src, dst = sys.argv[1:]
{call}
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("layers.3."):
            break
    partial = [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    assert len(partial) == 1
    process.send_signal(number)
    process.stdout.read()
    process.stdout.close()
    assert process.wait(60) != 0
    left = {path.name for path in tmp_path.iterdir()} - {"src"}
    if number != signal.SIGKILL:
        assert left == set()
        return
    assert left == {partial[0].name}
    assert left.pop().startswith(".out.")
    with pytest.raises(CheckpointError):
        open_checkpoint(partial[0])


def test_too_little_room_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both numbers."""
    source = one_file(tmp_path / "src")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    for run in (lambda: convert(source, tmp_path / "out"), lambda: reshard(source, tmp_path / "out", 2)):
        with pytest.raises(CheckpointError, match=r"has 1000 bytes free, \d+ are needed"):
            run()
    assert {path.name for path in tmp_path.iterdir()} == {"src"}


def test_a_disk_that_lies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read back is compared with what was written."""
    source = one_file(tmp_path / "src")
    advise = os.posix_fadvise

    def flip(descriptor: int, *rest: int) -> None:
        advise(descriptor, *rest)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.suffix in (".safetensors", ".pth"):
            content = bytearray(path.read_bytes())
            content[-100] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(os, "posix_fadvise", flip)
    for run in (lambda: convert(source, tmp_path / "out"), lambda: reshard(source, tmp_path / "out", 2)):
        with pytest.raises(CheckpointError, match="what was read back is not what was written"):
            run()
    assert {path.name for path in tmp_path.iterdir()} == {"src"}


def test_checksums(tmp_path: Path) -> None:
    """Every file but checksums.json has one, as sha256sum computes it.

    A changed, a missing and an added file are named. Opening a checkpoint does not read the sums.
    """
    source = one_file(tmp_path / "src")
    (source / "tokenizer.model").write_bytes(b"sentences")
    convert(source, tmp_path / "out", max_shard_size="100KB")
    directory = tmp_path / "out"
    sums = json.loads((directory / "checksums.json").read_text())
    assert set(sums) == set(contents(directory)) - {"checksums.json"}
    said = subprocess.run(
        ["sha256sum", "tokenizer.model"], cwd=directory, capture_output=True, text=True, check=True
    ).stdout
    assert sums["tokenizer.model"] == said.split()[0]
    assert read_checksums(directory) == sums
    assert list(differing_files(directory, sums)) == []
    path = sorted(directory.glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    open_checkpoint(directory)
    (changed,) = differing_files(directory, sums)
    assert changed.startswith(f"{path.name} was changed after it had been written")
    path.unlink()
    (directory / "notes.txt").write_text("added")
    (directory / ".hidden").write_text("hidden")
    missing, added = sorted(differing_files(directory, sums))
    assert missing == f"{path.name} is missing: checksums.json names it"
    assert added.startswith("notes.txt has no sum in checksums.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"has no checksums\.json"),
        ("{", r"checksums\.json is not readable"),
        ('{"../params.json": "00"}', r"got '\.\./params\.json'"),
        ('{"params.json": 1}', r"got 'params\.json': '1'"),
    ],
)
def test_checksums_that_cannot_be_used(tmp_path: Path, content: str | None, words: str) -> None:
    """Absent, not JSON, with a path out of the directory, with a sum that is no text."""
    if content is not None:
        (tmp_path / "checksums.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        read_checksums(tmp_path)


def test_a_bar_shows_the_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On stderr, by bytes, and only when it is asked for."""
    source = one_file(tmp_path / "src")
    for number, progress in enumerate((False, True)):
        convert(source, tmp_path / f"native{number}", progress=progress)
        reshard(source, tmp_path / f"meta{number}", 2, progress=progress)
        out, err = capfd.readouterr()
        assert not out
        assert ("Converting:" in err) == progress
        assert ("Resharding:" in err) == progress


def test_what_stands_in_the_way_is_found_before_writing(tmp_path: Path) -> None:
    """A damaged source leaves no directory behind; norms that differ are found on the way and leave none either."""
    reshard(one_file(tmp_path / "src"), tmp_path / "two", 2)
    shard = torch.load(tmp_path / "two" / "consolidated.01.pth", weights_only=True)
    shard["norm.weight"][0] += 1
    torch.save(shard, tmp_path / "two" / "consolidated.01.pth")
    (tmp_path / "two" / "sizes.json").unlink()  # or the file would be refused before it is read
    for run in (
        lambda: convert(tmp_path / "two", tmp_path / "out"),
        lambda: reshard(tmp_path / "two", tmp_path / "out", 1),
    ):
        with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: tensor norm\.weight differs"):
            run()
    edit_json(tmp_path / "two" / "params.json", dim=128)
    with pytest.raises(CheckpointError):
        convert(tmp_path / "two", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"src", "two"}


MEASURE = """
import sys
from pathlib import Path
from llama.checkpoint import checked, open_checkpoint
from llama.checkpoint.reshard import convert, reshard

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def read(name):
    for _ in checked(open_checkpoint(root / name)):
        pass

root = Path(sys.argv[1])
runs = {
    "read 1": lambda: read("one"),
    "1 -> native": lambda: convert(root / "one", root / "native"),
    "native -> 2": lambda: reshard(root / "native", root / "two", 2),
    "2 -> 1": lambda: reshard(root / "two", root / "back", 1),
    "read 2": lambda: read("two"),
}
for name, run in runs.items():
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
    before = status("VmRSS")
    run()
    print(name, (status("VmHWM") - before) / 2**20, sep="=")
"""


@pytest.mark.slow
def test_peak_memory_is_a_few_tensors(tmp_path: Path) -> None:
    """Of a model of 151 MiB whose largest tensor has 4 MiB: what every run adds to a process that has imported
    everything.

    Mapped pages count: 32 MiB of a file are touched before it is mapped anew, and 16 MiB are written before they are
        let go of.
    """
    args = ModelArgs(dim=512, n_layers=12, n_heads=8, n_kv_heads=8, vocab_size=2048, multiple_of=32)
    size = sum(t.numel() * 4 for t in random_weights(args).values())
    assert size > 150 * 2**20
    one_file(tmp_path / "one", args)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    peaks = {name: float(value) for name, _, value in (line.partition("=") for line in lines if line)}
    limits = {"read 1": 70, "1 -> native": 70, "native -> 2": 100, "2 -> 1": 110, "read 2": 110}
    assert all(peaks[name] < limits[name] for name in limits), peaks


def test_random_tensors_are_no_part_of_a_source() -> None:
    """What the package exports of this room."""
    assert set(checkpoint.__all__) >= {"Source", "TensorInfo", "checked", "open_checkpoint", "place", "random_tensors"}
    assert all(hasattr(checkpoint, name) for name in checkpoint.__all__)
