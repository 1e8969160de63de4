"""Sums of a checkpoint's files: shards that were swapped, copied over one another or changed are refused, and named."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import TINY, assert_equal, random_weights, write_meta
from commands import Run, refused
from tokenizer_files import byte_level, write_ranks

from llama import EngineConfig, LLaMA, load_tokenizer
from llama.checkpoint import check_files, checksums, open_checkpoint
from llama.checkpoint.checksums import differing_samples, read_list, recorded_sums, sample_of
from llama.checkpoint.partition import cut
from llama.checkpoint.reshard import convert, reshard
from llama.config import DraftConfig
from llama.drafting.opening import open_drafting
from llama.errors import CheckpointError, ConfigError
from llama.sharding import axis_of

ARGS = replace(TINY, vocab_size=768)
FIRST, SECOND = "consolidated.00.pth", "consolidated.01.pth"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model whole, in two shards, and in our own format."""
    top = tmp_path_factory.mktemp("sums")
    write_ranks(byte_level(), write_meta(top / "meta", ARGS, [random_weights(ARGS)]) / "tokenizer.model")
    reshard(top / "meta", top / "split", 2)
    convert(top / "meta", top / "own", max_shard_size="300KB")
    return top


@pytest.fixture
def split(made: Path, tmp_path: Path) -> Path:
    """A copy of the two shards, to damage."""
    return Path(shutil.copytree(made / "split", tmp_path / "split"))


def swap(directory: Path) -> None:
    """Swap the two shards."""
    (directory / FIRST).rename(directory / "kept")
    (directory / SECOND).rename(directory / FIRST)
    (directory / "kept").rename(directory / SECOND)


def write_sums(directory: Path, name: str, algorithm: str, mark: str = "  ") -> None:
    """Write a list of sums of the shards, as md5sum and sha256sum do."""
    sums = {each: hashlib.new(algorithm, (directory / each).read_bytes()).hexdigest() for each in (FIRST, SECOND)}
    (directory / name).write_text("".join(f"{digest}{mark}{each}\n" for each, digest in sums.items()))


def forget_sums(directory: Path) -> None:
    """Remove what convert and reshard recorded, as in a checkpoint of others."""
    (directory / "checksums.json").unlink()
    (directory / "sizes.json").unlink()


def opened(directory: Path) -> None:
    """Open a checkpoint and compare what every load compares."""
    check_files(directory, open_checkpoint(directory).files)


# -------------------------------------------------------------------------------------------------------- every load


def test_swapped_shards_are_refused_at_load(run: Run, split: Path) -> None:
    """By name, with the file whose content each of them holds; `inspect` reports both, without reading the weights."""
    opened(split)
    swap(split)
    outcome = run("generate", "--ckpt_dir", str(split), "--prompt", "a", "--max_gen_len", "1", "--max_seq_len", "16")
    refused(outcome, FIRST, SECOND, "swapped", "remove checksums.json, sizes.json")
    found = run("inspect", str(split), "--json")
    assert found.code == 2
    (facts,) = found.objects
    assert [problem.split()[0] for problem in facts["problems"]] == [FIRST, SECOND]
    assert f"that is {FIRST}'s" in facts["problems"][1]


def test_a_draft_model_with_swapped_shards_is_refused(split: Path) -> None:
    """It would guess wrong, and slow down what it should speed up."""
    settings = DraftConfig(("model",), draft_ckpt_dir=split)
    tokenizer, config = load_tokenizer(split / "tokenizer.model"), EngineConfig(max_seq_len=64)
    open_drafting(settings, ARGS, tokenizer, config, is_demo=False)
    swap(split)
    with pytest.raises(CheckpointError, match="the files were swapped"):
        open_drafting(settings, ARGS, tokenizer, config, is_demo=False)


def test_convert_and_reshard_refuse_swapped_shards(split: Path, tmp_path: Path) -> None:
    """They would write the mixture with new sums of its own."""
    swap(split)
    for rewrite in (lambda: convert(split, tmp_path / "new"), lambda: reshard(split, tmp_path / "new", 1)):
        with pytest.raises(CheckpointError, match="the files were swapped"):
            rewrite()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["split", "own"])
def test_a_changed_file_of_weights_is_refused_at_load(made: Path, tmp_path: Path, name: str) -> None:
    """The files here are small enough to be sampled whole; one that was cut is found by its size."""
    directory = Path(shutil.copytree(made / name, tmp_path / "copy"))
    path = open_checkpoint(directory).files[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (line,) = differing_samples(open_checkpoint(directory).files)
    assert line.startswith(f"{path.name} was changed after it had been written")
    path.write_bytes(content + b"x")
    (line,) = differing_samples([path])
    assert line == f"{path.name} has {len(content) + 1} bytes, expected {len(content)}"


def test_a_sample_is_cheap_and_sees_another_shard(tmp_path: Path) -> None:
    """Of a large file only its ends and some blocks are read; a .pth file's end tells what all of its tensors hold."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1 << 22, generator=generator)
    torch.save({"w": weight}, tmp_path / "one.pth")
    weight[1 << 18 | 1 << 11] += 1  # between two blocks: the record's CRC-32 differs all the same
    torch.save({"w": weight}, tmp_path / "two.pth")
    (tmp_path / "one.pth").replace(tmp_path / "w.pth")
    one = sample_of(tmp_path / "w.pth")
    (tmp_path / "two.pth").replace(tmp_path / "w.pth")
    two = sample_of(tmp_path / "w.pth")
    assert one["bytes"] == two["bytes"]
    assert one != two
    content = bytearray((tmp_path / "w.pth").read_bytes())
    content[checksums.END + checksums.PLACE] ^= 1  # after the first block between the ends
    (tmp_path / "w.pth").write_bytes(content)
    assert sample_of(tmp_path / "w.pth") == two  # it is left to --check_sums


def test_a_checkpoint_without_sizes_loads_as_before(made: Path, split: Path) -> None:
    """One of others, or one that an older version wrote."""
    opened(made / "meta")
    (split / "sizes.json").unlink()
    swap(split)
    opened(split)


@pytest.mark.parametrize("content", ['{"a": 1}', '{"a": {"bytes": "3", "sample_sha256": ""}}', '{"a": {}}', "["])
def test_a_damaged_sizes_file_is_refused(split: Path, content: str) -> None:
    (split / "sizes.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"sizes\.json"):
        opened(split)


def test_older_readers_find_the_new_file_in_their_list(made: Path) -> None:
    """checksums.json stays a table of names and sha256, which names sizes.json like any other file."""
    sums = json.loads((made / "split/checksums.json").read_text())
    assert sums["sizes.json"] == hashlib.sha256((made / "split/sizes.json").read_bytes()).hexdigest()
    assert all(len(each) == 64 for each in sums.values())
    assert json.loads((made / "split/sizes.json").read_text()).keys() == {FIRST, SECOND}


# ------------------------------------------------------------------------------------------------------- whole files


def test_check_sums_reads_whole_files_before_a_load(run: Run, split: Path) -> None:
    """A change that no sample sees: here of the tokenizer, which has none."""
    (split / "tokenizer.model").write_bytes((split / "tokenizer.model").read_bytes() + b"\n")
    opened(split)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model was changed"):
        LLaMA.build(split, check_sums=True)
    few = ["--ckpt_dir", str(split), "--max_seq_len", "16", "--check_sums"]
    refused(run("generate", *few, "--prompt", "a", "--max_gen_len", "1"), "tokenizer.model was changed")
    (split / "items.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "gold": 0}\n')
    refused(run("score", str(split / "items.jsonl"), *few), "tokenizer.model was changed")
    with pytest.raises(ConfigError, match="check_sums: random weights come from no files"):
        LLaMA.build(random_weights=ARGS, check_sums=True)


@pytest.mark.parametrize(
    ("name", "algorithm", "mark"),
    [("checklist.chk", "md5", "  "), ("SHA256SUMS", "sha256", " *"), ("shards.sha256", "sha256", "  ./")],
)
def test_sums_of_others_are_compared(run: Run, split: Path, name: str, algorithm: str, mark: str) -> None:
    """By --check_tensors and --check_sums, which need not be told where they are."""
    forget_sums(split)
    write_sums(split, name, algorithm, mark)
    assert run("inspect", str(split), "--check_sums").code == 0
    swap(split)
    opened(split)  # no sizes are recorded
    for flag in ("--check_tensors", "--check_sums"):
        outcome = run("inspect", str(split), flag, "--json")
        (facts,) = outcome.objects
        assert outcome.code == 2
        assert [problem.split()[0] for problem in facts["problems"]] == [FIRST, SECOND]
        assert all(f"its {algorithm} is" in problem for problem in facts["problems"])
        assert facts["files_checked"] == 2
    with pytest.raises(CheckpointError, match=f"remove {name}"):
        check_files(split, open_checkpoint(split).files, whole=True)


def test_check_tensors_needs_no_sums(run: Run, made: Path) -> None:
    """Where there are none, the weights are all that is looked at."""
    assert run("inspect", str(made / "meta"), "--check_tensors").code == 0


def test_lists_of_sums_are_read_strictly(tmp_path: Path) -> None:
    """A sum alone is about the file that the list is named after; files of other directories are left out."""
    path = tmp_path / "model.safetensors.sha256"
    path.write_text("A" * 64 + "\n")
    assert recorded_sums(tmp_path) == {path.name: {"model.safetensors": "a" * 64}}
    path.write_text(f"{'0' * 64}  a/b.pth\n\n{'1' * 64} *c d.pth\n")
    assert read_list(path) == {"c d.pth": "1" * 64}
    for damaged in ("<html>", "0" * 63 + "  a", "z" * 64 + "  a"):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match="expected an md5 or sha256 and a file's name"):
            read_list(path)
    path.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="is not a readable list of sums"):
        read_list(path)


# --------------------------------------------------------------------------------------- a shard that is there twice


def shards_of(weights: dict[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    """Cut weights as fairscale does, the embedding by its vectors."""
    axes = {name: 1 if name.startswith("tok") else axis_of(name) for name in weights}
    return [{name: cut(weights[name], rank, count, axes[name]) for name in weights} for rank in range(count)]


@pytest.mark.parametrize(("kept", "lost"), [(0, 1), (2, 3), (0, 3)])
def test_a_shard_that_is_there_twice_is_named(tmp_path: Path, kept: int, lost: int) -> None:
    """With both files, without any sums; norms, which all shards share, do not make copies of them."""
    args = replace(TINY, n_kv_heads=4)
    directory = write_meta(tmp_path / "four", args, shards_of(random_weights(args), 4))
    assert_equal(open_checkpoint(directory).tensors(), random_weights(args))
    names = [f"consolidated.{rank:02}.pth" for rank in (kept, lost)]
    shutil.copy(directory / names[0], directory / names[1])
    with pytest.raises(CheckpointError, match=rf"{names[1]} holds the same bytes as {names[0]} in all \d+ weights"):
        open_checkpoint(directory)


def test_a_copy_is_found_before_its_sums_are_compared(split: Path) -> None:
    shutil.copy(split / SECOND, split / FIRST)
    with pytest.raises(CheckpointError, match=f"{SECOND} holds the same bytes as {FIRST}"):
        opened(split)


def test_equal_parts_alone_make_no_copy(tmp_path: Path) -> None:
    """Key/value heads that two shards hold, constant weights, and shards that differ in one number."""
    one_head = replace(TINY, n_kv_heads=1)
    reshard(write_meta(tmp_path / "src", one_head, [random_weights(one_head)]), tmp_path / "replicated", 2)
    opened(tmp_path / "replicated")
    constant = {name: torch.full_like(weight, 0.5) for name, weight in random_weights(TINY).items()}
    opened(write_meta(tmp_path / "constant", TINY, shards_of(constant, 2)))
    first = shards_of(random_weights(TINY), 2)[0]
    other = {name: part.clone() for name, part in first.items()}
    other["layers.1.feed_forward.w2.weight"][7, 3] += 1  # in no row that is sampled
    opened(write_meta(tmp_path / "nearly", TINY, [first, other]))
