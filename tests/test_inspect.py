"""The commands `inspect`, `convert` and `reshard` as a user meets them; what they compute is tested in test_reshard.py
and others.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import TINY, random_weights, write_meta
from commands import PROCESS_TIMEOUT_S, ROOT, Run, refused_at_once
from tokenizer_files import byte_level, write_json, write_ranks

from llama.checkpoint import open_checkpoint
from llama.checkpoint.reshard import convert, reshard
from llama.config import DEMO_DIR

ARGS = replace(TINY, vocab_size=768)
SPECIALS = {"<|begin_of_text|>": 390, "<|end_of_text|>": 391, "<|eom_id|>": 398, "<|eot_id|>": 399}
FACTS = [
    *("directory", "format", "files", "shape", "parameters", "bytes_by_dtype", "rope", "sliding_window"),
    *("tokenizer", "stop_ids", "special_tokens", "memory_plan", "problems"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every format, by its name: meta, split, own, huggingface."""
    from transformers import LlamaConfig, LlamaForCausalLM

    top = tmp_path_factory.mktemp("inspect")
    write_ranks(byte_level(), write_meta(top / "meta", ARGS, [random_weights(ARGS)]) / "tokenizer.model")
    reshard(top / "meta", top / "split", 2)
    convert(top / "meta", top / "own", "bfloat16", "100KB")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(
        **sizes, vocab_size=768, bos_token_id=390, eos_token_id=[391, 395], rope_scaling=llama3, rope_theta=5e5
    )
    LlamaForCausalLM(config).save_pretrained(top / "huggingface")
    write_json(byte_level(), top / "huggingface")
    return top


def facts(run: Run, *arguments: str, code: int = 0) -> dict[str, Any]:
    """What `inspect --json` says."""
    outcome = run("inspect", *arguments, "--json")
    assert outcome.code == code, outcome.err
    (found,) = outcome.objects
    return found


# -------------------------------------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize(
    ("name", "format_name", "files", "dtype"),
    [("meta", "meta", 1, "float32"), ("split", "meta", 2, "float32"), ("own", "llama-xla", 4, "bfloat16")],
)
def test_inspect_tells_what_the_files_hold(
    run: Run, made: Path, name: str, format_name: str, files: int, dtype: str
) -> None:
    """Counted by hand from the shape, not by our own model: embedding, head, attention, feed-forward and norms."""
    found = facts(run, str(made / name))
    assert list(found) == FACTS
    kv, hidden = TINY.kv_heads * TINY.head_dim, TINY.hidden_dim
    expected = 2 * 768 * 64 + 64 + TINY.n_layers * (2 * 64 * 64 + 2 * 64 * kv + 3 * 64 * hidden + 2 * 64)
    assert (found["format"], len(found["files"]), found["parameters"]) == (format_name, files, expected)
    assert found["bytes_by_dtype"] == {dtype: expected * (4 if dtype == "float32" else 2)}
    assert found["shape"] | {"dim": 64, "n_layers": 2, "n_heads": 8, "kv_heads": 4, "vocab_size": 768} == found["shape"]
    assert found["tokenizer"] == {"kind": "tiktoken", "ids": 646, "bos_id": 390, "eos_id": 391}
    assert found["special_tokens"] | SPECIALS == found["special_tokens"]
    assert found["stop_ids"] == [391, 398, 399]
    assert found["problems"] == []
    assert found["memory_plan"]["weights"] == expected * 4  # float32 on a CPU device


def test_inspect_tells_of_scaled_rotary_frequencies(run: Run, made: Path) -> None:
    found = facts(run, str(made / "huggingface"))
    assert found["format"] == "huggingface"
    assert found["rope"] == {"theta": 5e5, "scaling": "llama3", "factor": 8.0}
    assert found["tokenizer"]["kind"] == "tokenizers"
    assert sorted(found["stop_ids"]) == [391, 394, 395]


def test_inspect_speaks_to_people(run: Run, made: Path) -> None:
    """One fact a line, the directory first; the flag's name may be left out or written."""
    outcome = run("inspect", str(made / "meta"))
    assert run("inspect", "--directory", str(made / "meta")).out.splitlines()[:-2] == outcome.out.splitlines()[:-2]
    first, *lines = outcome.out.splitlines()
    assert (outcome.code, outcome.err, first) == (0, "", str(made / "meta"))
    assert [line.split(":")[0].strip() for line in lines[:-1]] == [name.replace("_", " ") for name in FACTS[1:-1]]
    assert "parameters:      196,928" in outcome.out
    assert re.search(r"memory plan: +for 1 x 2048 positions: weights 0.8 MiB, cache 1.0 MiB", outcome.out)
    assert lines[-1].strip() == "no problems found"


def test_inspect_reads_no_weights_unless_asked(run: Run, made: Path, tmp_path: Path) -> None:
    """NaN is found by --check_tensors alone, and named."""
    shutil.copytree(made / "meta", tmp_path / "nan")
    weights = torch.load(tmp_path / "nan/consolidated.00.pth")
    weights["layers.1.attention.wq.weight"][3, 5] = float("nan")
    torch.save(weights, tmp_path / "nan/consolidated.00.pth")
    assert facts(run, str(tmp_path / "nan"))["problems"] == []
    found = facts(run, str(tmp_path / "nan"), "--check_tensors", code=2)
    assert found["problems"] == ["consolidated.00.pth: tensor layers.1.attention.wq.weight holds NaN or infinity"]
    assert found["tensors_checked"] == len(weights)


def test_inspect_tells_every_problem_and_what_is_right_nevertheless(run: Run, made: Path, tmp_path: Path) -> None:
    """A weight file cut short: the tokenizer is still described. A tokenizer too large: the weights are."""
    shutil.copytree(made / "meta", tmp_path / "cut")
    with (tmp_path / "cut/consolidated.00.pth").open("r+b") as file:
        file.truncate(300_000)
    outcome = run("inspect", str(tmp_path / "cut"))
    assert outcome.code == 2
    assert "kind tiktoken" in outcome.out
    assert "consolidated.00.pth is not a checkpoint" in outcome.out
    assert outcome.err == f"llama-xla: {tmp_path / 'cut'}: 1 problem found\n"
    small = write_meta(tmp_path / "small", TINY, [random_weights(TINY)])
    found = facts(run, str(small), "--tokenizer_path", str(made / "meta/tokenizer.model"), code=2)
    assert found["problems"] == ["the tokenizer has 646 ids but the embedding only 320 rows"]
    assert found["shape"]["vocab_size"] == 320
    assert "no tokenizer (tokenizer.json or *.model) in" in facts(run, str(small), code=2)["problems"][0]


def test_inspect_compares_files_with_their_checksums(run: Run, made: Path, tmp_path: Path) -> None:
    """A changed, a missing and an added file are problems, and only with --check_sums."""
    shutil.copytree(made / "own", tmp_path / "own")
    found = facts(run, str(tmp_path / "own"), "--check_sums")
    sums = json.loads((tmp_path / "own/checksums.json").read_text())
    assert (found["problems"], found["files_checked"]) == ([], len(sums))
    params = tmp_path / "own/params.json"
    params.write_bytes(params.read_bytes() + b"\n")
    (tmp_path / "own/notes.txt").write_text("added")
    assert facts(run, str(tmp_path / "own"))["problems"] == []
    (tmp_path / "own/tokenizer.model").unlink()
    outcome = run("inspect", str(tmp_path / "own"), "--check_sums")
    assert (outcome.code, outcome.err) == (2, f"llama-xla: {tmp_path / 'own'}: 4 problems found\n")
    problems = facts(run, str(tmp_path / "own"), "--check_sums", code=2)["problems"]
    assert all(f"- {problem}" in outcome.out for problem in problems)
    no_tokenizer, added, changed, missing = problems
    assert no_tokenizer.startswith("no tokenizer")
    assert added == "notes.txt has no sum in checksums.json: it was added after the checkpoint had been written"
    assert re.fullmatch(r"params\.json was changed .*: its sha256 is \w{64}, expected " + sums["params.json"], changed)
    assert missing == "tokenizer.model is missing: checksums.json names it"


def test_inspect_needs_checksums_to_compare_with(run: Run, made: Path) -> None:
    (problem,) = facts(run, str(made / "meta"), "--check_sums", code=2)["problems"]
    assert problem.startswith(f"{made / 'meta'} has no checksums.json")
    (problem,) = facts(run, "nowhere", "--tokenizer_path", str(made / "meta/tokenizer.model"), "--check_sums", code=2)[
        "problems"
    ]
    assert "no such directory" in problem


def test_inspect_says_what_would_fit(run: Run, made: Path) -> None:
    found = facts(run, str(made / "meta"), "--max_seq_len", str(1 << 22), "--max_batch_size", "2", code=2)
    assert re.search(r"the model does not fit: .*; it takes --max_seq_len \d+ at most", found["problems"][0])


def test_inspect_refuses_positions_that_are_not_computed(run: Run, made: Path, tmp_path: Path) -> None:
    """A Mistral checkpoint is described whole, its window, too; the problem names the flag that cures it."""
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    limits = {"sliding_window": 256, "max_position_embeddings": 512, "rope_parameters": rope}
    MistralForCausalLM(MistralConfig(**sizes, **limits, vocab_size=768)).save_pretrained(tmp_path / "mistral")
    write_json(byte_level(), tmp_path / "mistral")
    found = facts(run, str(tmp_path / "mistral"), code=2)
    assert found["sliding_window"] == 256
    assert found["rope"]["scaling"] == "dynamic"
    assert "--max_seq_len 512 at most" in found["problems"][0]
    assert facts(run, str(tmp_path / "mistral"), "--max_seq_len", "512")["problems"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect"], ["--directory is needed"]),
        (["inspect", "x", "y"], ["unexpected argument", "'y'"]),
        (["inspect", "x", "--max_seq_len", "0"], ["max_seq_len"]),
        (["inspect", "x", "--check_tensor"], ["did you mean --check_tensors?"]),
        (["convert", "x"], ["--dst is needed"]),
        (["convert", "nowhere", "out"], ["nowhere", "no such directory"]),
        (["convert", "x", "y", "--dtype", "int3"], ["dtype", "'int3'"]),
        (["convert", "x", "y", "--max_shard_size", "5XB"], ["max_shard_size", "'5XB'", "5GB"]),
        (["reshard", "x", "y"], ["--model_parallel is needed"]),
        (["reshard", "x", "y", "--model_parallel", "0"], ["model_parallel"]),
    ],
)
def test_bad_flags_are_refused(run: Run, arguments: list[str], words: list[str]) -> None:
    refused_at_once(run(*arguments), *words)


@pytest.mark.slow
def test_inspect_starts_no_device(made: Path) -> None:
    """torch_xla is not imported: the command answers in the time that importing torch takes."""
    code = (
        f"import sys; from llama import cli; cli._exit_code(['inspect', {str(made / 'meta')!r}]); "
        "print('torch_xla' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_TIMEOUT_S, check=True
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr


# -------------------------------------------------------------------------------------------------- convert and reshard


@pytest.mark.slow
def test_the_demo_model_there_and_back(run: Run, tmp_path: Path) -> None:
    """Own safetensors, then two shards, then one: the tensors are what the shipped file holds, bit by bit."""
    assert run("convert", str(DEMO_DIR), str(tmp_path / "own"), "--quiet").code == 0
    assert run("reshard", str(tmp_path / "own"), str(tmp_path / "two"), "--model_parallel", "2", "--quiet").code == 0
    assert run("reshard", str(tmp_path / "two"), str(tmp_path / "one"), "--model_parallel", "1", "--quiet").code == 0
    shipped = dict(open_checkpoint(DEMO_DIR).tensors())
    for name in ("own", "two", "one"):
        written = dict(open_checkpoint(tmp_path / name).tensors())
        assert written.keys() == shipped.keys()
        assert all(torch.equal(written[tensor], shipped[tensor]) for tensor in shipped)
        assert (tmp_path / name / "tokenizer.model").read_bytes() == (DEMO_DIR / "tokenizer.model").read_bytes()


def test_the_log_says_what_was_written(run: Run, made: Path, tmp_path: Path) -> None:
    outcome = run(
        "convert", str(made / "split"), str(tmp_path / "own"), "--dtype", "bfloat16", "--max_shard_size", "100KB"
    )
    assert (outcome.code, outcome.out) == (0, "")
    assert re.fullmatch(rf"Wrote {tmp_path}/own: 4 files, \d+ bytes of weights\n", outcome.err)
    outcome = run("reshard", str(tmp_path / "own"), str(tmp_path / "two"), "--model_parallel", "2")
    assert re.fullmatch(rf"Wrote {tmp_path}/two: 2 shards, \d+ bytes of weights\n", outcome.err)
    assert json.loads((tmp_path / "own/checksums.json").read_text()).keys() >= {"params.json", "tokenizer.model"}


@pytest.mark.parametrize("command", [["convert"], ["reshard", "--model_parallel", "2"]])
def test_nothing_is_overwritten(run: Run, made: Path, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "there").mkdir()
    refused_at_once(run(command[0], str(made / "meta"), str(tmp_path / "there"), *command[1:]), "is not overwritten")
    assert list((tmp_path / "there").iterdir()) == []
