"""Damaged headers, indexes, config.json and params.json: each ends in a UserError or in a correct load, never in
anything else.

A load is correct when all tensors are those of the undamaged checkpoint, bit by bit, and the settings are what the
file, as it is now, says by an independent reading of it. In our own format, whose headers carry a digest, the settings
must be the undamaged ones, too. Flips in the weights themselves cannot be seen, and a number that was changed into
another sensible one in Meta's or Hugging Face's settings cannot either.

About 3,500 cases in all; ``derandomize`` keeps them the same from run to run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import random_weights, write_meta
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from llama import ModelArgs
from llama.checkpoint import checked, names, open_checkpoint
from llama.checkpoint.reshard import convert, reshard
from llama.errors import UserError

pytestmark = pytest.mark.slow

ARGS = ModelArgs(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=24, multiple_of=8, norm_eps=2e-5, rope_theta=20000.0
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": ARGS.hidden_dim,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 2e-5,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_theta": 20000.0,
    "tie_word_embeddings": False,
    "vocab_size": 24,
}
fuzz = settings(max_examples=350, deadline=10_000, derandomize=True, database=None)


class Original:
    """An undamaged checkpoint and what it holds. No dataclass: hypothesis would print all of it with every failure."""

    def __init__(self, directory: Path) -> None:
        source = open_checkpoint(directory)
        self.directory = directory
        self.args = source.args
        self.tensors = {name: tensor.clone() for name, tensor in source.tensors()}
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()}


def write_hugging_face(directory: Path, files: int) -> Path:
    """The weights by transformers' names, in one file or several; their rotary order does not matter here."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    tensors = {
        str(names.to_hugging_face(name)): tensor for name, tensor in random_weights(ARGS, dtype=torch.bfloat16).items()
    }
    if files == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    file_of = {
        name: f"model-0000{number % files + 1}-of-0000{files}.safetensors" for number, name in enumerate(tensors)
    }
    for file in set(file_of.values()):
        save_file(
            {name: tensors[name] for name in tensors if file_of[name] == file},
            directory / file,
            metadata={"format": "pt"},
        )
    index = {"metadata": {"total_size": 1}, "weight_map": file_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Original]:
    root = tmp_path_factory.mktemp("fuzz")
    write_hugging_face(root / "hf", 1)
    write_hugging_face(root / "hf3", 3)
    write_meta(
        root / "meta", ARGS, [random_weights(ARGS)], use_scaled_rope=True, rope_scaling_factor=32.0, vocab_size=-1
    )
    reshard(root / "meta", root / "meta2", 2)
    convert(root / "meta", root / "native")
    convert(root / "hf", root / "native3", max_shard_size="3KB")
    return {path.name: Original(path) for path in root.iterdir()}


def assert_survives(original: Original, name: str, damaged: bytes, says: Callable[[bytes], ModelArgs] | None) -> None:
    """Put a damaged file in the place of a good one, load, and put the good one back.

    Args:
        original: the checkpoint.
        name: of the file.
        damaged: its content.
        says: the settings that this content says; None where they must be the undamaged ones.
    """
    path = original.directory / name
    _replace(path, damaged)
    try:
        source = open_checkpoint(original.directory)
        found = dict(checked(source, allow_nan=True))
    except UserError:
        return
    finally:
        _replace(path, original.files[name])
    assert found.keys() == original.tensors.keys()
    for each, tensor in found.items():
        assert tensor.dtype == original.tensors[each].dtype, each
        assert torch.equal(tensor, original.tensors[each]), each
    expected = original.args if says is None else says(damaged)
    assert _comparable(source.args) == _comparable(expected)
    assert source.sliding_window is None


def _replace(path: Path, content: bytes) -> None:
    path.unlink()  # a new file: tensors of the last case may still be mapped from the old one
    path.write_bytes(content)


def _comparable(args: ModelArgs) -> tuple[object, ...]:
    """Everything that the model computes with; the feed-forward width can be said in several ways."""
    derived = (args.kv_heads, args.hidden_dim, args.rope_scaling)
    return (
        args.dim,
        args.n_layers,
        args.n_heads,
        args.vocab_size,
        args.norm_eps,
        args.rope_theta,
        args.tie_word_embeddings,
        *derived,
    )


# How files are damaged


def flipped(content: bytes, last: int, most: int) -> st.SearchStrategy[bytes]:
    """Up to ``most`` bits flipped in front of ``last``."""

    def flip(places: list[tuple[int, int]]) -> bytes:
        changed = bytearray(content)
        for place, bit in places:
            changed[place] ^= 1 << bit
        return bytes(changed)

    return st.lists(st.tuples(st.integers(0, last - 1), st.integers(0, 7)), min_size=1, max_size=most).map(flip)


def truncated(content: bytes) -> st.SearchStrategy[bytes]:
    return st.integers(0, len(content) - 1).map(lambda length: content[:length])


numbers = st.sampled_from(
    [0, 1, -1, 2, 3, 4, 8, 12, 16, 17, 24, 32, 48, 2**31, 2**32, 2**63, 2**64, 10**400, 0.5, 1e-5, 1e308]
)
values = st.one_of(
    numbers,
    st.none(),
    st.booleans(),
    st.sampled_from(
        ["", "silu", "gelu", "16", "F32", "F16", "LlamaForCausalLM", "model.safetensors", "\0", "../x", "\ud800"]
    ),
    st.just([]),
    st.just({}),
    st.just([[[[{}]]]]),
    st.just(float("nan")),
    st.just(float("inf")),
    st.builds(lambda depth: json.loads("[" * depth + "]" * depth), st.integers(1, 50)),
)


def edited(content: Any) -> st.SearchStrategy[Any]:
    """A JSON value with one entry, at any depth, replaced, removed, or given another name."""
    places: list[tuple[Any, ...]] = []

    def walk(value: Any, place: tuple[Any, ...]) -> None:
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in entries:
            places.append((*place, key))
            walk(entry, (*place, key))

    walk(content, ())

    def apply(place: tuple[Any, ...], action: str, value: Any, letter: int) -> Any:
        changed = json.loads(json.dumps(content))
        target = changed
        for key in place[:-1]:
            target = target[key]
        key = place[-1]
        if action == "replace":
            target[key] = value
        elif action == "remove" or not isinstance(key, str):
            del target[key]
        else:  # one letter of a key becomes another
            at = letter % len(key)
            target[key[:at] + chr(ord(key[at]) ^ 1) + key[at + 1 :]] = target.pop(key)
        return changed

    actions = st.sampled_from(["replace", "replace", "replace", "remove", "rename"])
    return st.builds(apply, st.sampled_from(places), actions, values, st.integers(0, 99))


def dumped(content: Any) -> bytes:
    return json.dumps(content).encode("utf-8", "surrogatepass")


def damaged_json(content: bytes) -> st.SearchStrategy[bytes]:
    """Flips, truncations, edits, and a key that stands twice."""
    parsed = json.loads(content)
    twice = st.tuples(st.sampled_from(sorted(parsed)), values).map(
        lambda kv: dumped({kv[0]: kv[1]})[:-1] + b"," + content.lstrip()[1:]
    )
    return st.one_of(flipped(content, len(content), 2), truncated(content), edited(parsed).map(dumped), twice)


def split_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = dumped(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def damaged_safetensors(content: bytes, swaps: bool) -> st.SearchStrategy[bytes]:
    """Flips in the header, truncations, edits of any entry, other dtypes of the same width; and entries that change
    places.
    """
    header, data = split_header(content)
    tensors = sorted(set(header) - {"__metadata__"})

    def recast(name: str, dtype: str) -> bytes:
        return with_header({**header, name: {**header[name], "dtype": dtype}}, data)

    def swapped(one: str, other: str, field: str | None) -> bytes:
        changed = json.loads(json.dumps(header))
        if field is None:
            changed[one], changed[other] = changed[other], changed[one]
        else:
            changed[one][field], changed[other][field] = changed[other][field], changed[one][field]
        return with_header(changed, data)

    pick = st.sampled_from(tensors)
    dtypes = st.sampled_from(["F16", "BF16", "I16", "U16", "F32", "I32", "U32", "F64", "F8_E4M3", "BOOL", "X"])
    kinds = [
        flipped(content, len(content) - len(data), 4),
        truncated(content),
        edited(header).map(lambda changed: with_header(changed, data)),
        st.builds(recast, pick, dtypes),
        st.builds(lambda extra: content + bytes(extra), st.integers(1, 100)),
    ]
    if swaps:
        kinds.append(st.builds(swapped, pick, pick, st.sampled_from([None, "data_offsets", "shape", "dtype"])))
    return st.one_of(kinds)


# What the settings say, by an independent reading


def config_says(content: bytes) -> ModelArgs:
    """As transformers' LlamaConfig reads it, with its defaults; a misspelt key has no default."""
    config = json.loads(content)
    misspelt = {key for key in config if key not in CONFIG}
    assert not misspelt or set(CONFIG) <= set(config), f"{misspelt} passed as unknown, although other keys are gone"
    rope = config.get("rope_scaling") or {}
    assert rope in ({}, {**rope, "rope_type": "linear"}, {**rope, "rope_type": "default"})
    scaling = (
        {"rope_scaling": {"kind": "linear", "factor": rope["factor"]}} if rope.get("rope_type") == "linear" else {}
    )
    assert (config.get("hidden_act") or "silu") in ("silu", "swish")
    assert not config.get("attention_bias")
    return ModelArgs.from_params(
        {
            "dim": config["hidden_size"],
            "n_layers": config["num_hidden_layers"],
            "n_heads": config["num_attention_heads"],
            "n_kv_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
            "vocab_size": config["vocab_size"],
            "ffn_hidden_dim": config["intermediate_size"],
            "norm_eps": config["rms_norm_eps"],
            "rope_theta": config.get("rope_theta") or rope.get("rope_theta") or 10000.0,
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            **scaling,
        }
    )


KNOWN_PARAMS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps", "rope_theta"} | {
    *(
        "ffn_dim_multiplier",
        "ffn_hidden_dim",
        "use_scaled_rope",
        "rope_scaling_factor",
        "rope_scaling",
        "tie_word_embeddings",
    ),
    *("max_seq_len", "max_batch_size"),
}


def params_say(content: bytes) -> ModelArgs:
    """As Meta's code takes a params.json: every key by its name, nothing else."""
    params = json.loads(content)
    assert set(params) <= KNOWN_PARAMS
    if params.get("vocab_size", -1) == -1:
        params["vocab_size"] = ARGS.vocab_size
    scaled = params.pop("use_scaled_rope", False)
    factor = params.pop("rope_scaling_factor", None)
    scaling = params.pop("rope_scaling", None)
    args = ModelArgs(**{name: value for name, value in params.items() if name not in ("max_seq_len", "max_batch_size")})
    if scaling is not None:
        return ModelArgs.from_params({**args.to_params(), "rope_scaling": scaling})
    factor = {"rope_scaling_factor": factor} if factor is not None else {}
    return ModelArgs.from_params({**args.to_params(), **({"use_scaled_rope": True, **factor} if scaled else {})})


@pytest.mark.parametrize("checkpoint", ["hf", "hf3", "native", "native3"])
@fuzz
@given(data=st.data())
def test_damaged_headers(originals: dict[str, Original], checkpoint: str, data: st.DataObject) -> None:
    """Of whole and sharded safetensors. Only our own, with its digest, notices entries that change places."""
    original = originals[checkpoint]
    name = sorted(name for name in original.files if name.endswith(".safetensors"))[-1]
    damaged = data.draw(damaged_safetensors(original.files[name], swaps=checkpoint.startswith("native")))
    assert_survives(original, name, damaged, None)


@pytest.mark.parametrize("checkpoint", ["hf3", "native3"])
@fuzz
@given(data=st.data())
def test_damaged_indexes(originals: dict[str, Original], checkpoint: str, data: st.DataObject) -> None:
    """Which file holds what."""
    original, name = originals[checkpoint], "model.safetensors.index.json"
    assert_survives(original, name, data.draw(damaged_json(original.files[name])), None)


@fuzz
@given(data=st.data())
def test_damaged_config(originals: dict[str, Original], data: st.DataObject) -> None:
    """Hugging Face's settings."""
    original = originals["hf"]
    damaged = data.draw(damaged_json(original.files["config.json"]))
    assert_survives(original, "config.json", damaged, config_says)


@pytest.mark.parametrize(("checkpoint", "digest"), [("meta", False), ("meta2", False), ("native", True)])
@fuzz
@given(data=st.data())
def test_damaged_params(originals: dict[str, Original], checkpoint: str, digest: bool, data: st.DataObject) -> None:
    """Meta's settings, whole and sharded, and our own, which the headers repeat."""
    original = originals[checkpoint]
    damaged = data.draw(damaged_json(original.files["params.json"]))
    assert_survives(original, "params.json", damaged, None if digest else params_say)


def test_the_fuzz_can_fail(originals: dict[str, Original], tmp_path: Path) -> None:
    """Undamaged files pass, entries that change places do not: the comparison sees what it must see."""
    for original in originals.values():
        for name, content in original.files.items():
            says = {"params.json": params_say, "config.json": config_says}.get(name)
            assert_survives(original, name, content, says)
    shutil.copytree(originals["hf"].directory, tmp_path / "hf")
    copy = Original(tmp_path / "hf")
    header, rest = split_header(copy.files["model.safetensors"])
    one, other = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    header[one], header[other] = header[other], header[one]
    with pytest.raises(AssertionError):
        assert_survives(copy, "model.safetensors", with_header(header, rest), None)
    text = copy.files["config.json"].replace(b"20000.0", b"30000.0")
    with pytest.raises(AssertionError):
        assert_survives(copy, "config.json", text, None)
