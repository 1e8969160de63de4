"""Loading in Meta's format: what is in the file is what is on the device, and whatever is wrong with a checkpoint is
said.

Every refusal is an error of errors.py that names what was got and what was expected; a checkpoint that a test damages
is the ``tiny_checkpoint`` fixture's, of TINY's shape.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama import EngineConfig, LLaMA, ModelArgs, RopeScaling
from llama.checkpoint import meta_pth
from llama.compiled.model import rotary_table
from llama.errors import CheckpointError, ConfigError, LLaMAError, TokenizerError, UserError
from llama.tokenizer import find_tokenizer
from llama.xla.counters import counters

PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 320,
    "multiple_of": 32,
    "norm_eps": 1e-5,
}
PTH = "consolidated.00.pth"
POSITIONS = 16

Tensors = dict[str, torch.Tensor]


def build(directory: Path, **engine: Any) -> LLaMA:
    """Load a checkpoint; nothing is compiled."""
    return LLaMA.build(directory, config=EngineConfig(**{"max_seq_len": POSITIONS, "buckets": (1,), **engine}))


def read(directory: Path) -> Tensors:
    """The tensors of the file itself."""
    return torch.load(directory / PTH, weights_only=True)


def on_device(llm: LLaMA) -> Tensors:
    """The parameters as the device holds them, copied back."""
    return {name: parameter.cpu() for name, parameter in llm.engine.runner.model.named_parameters()}


def edit_params(directory: Path, **changes: object) -> None:
    """Change some keys of params.json."""
    (directory / "params.json").write_text(json.dumps({**PARAMS, **changes}))


def edit_tensors(directory: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of the file in place; what ``change`` returns is of no interest."""
    tensors = read(directory)
    change(tensors)
    torch.save(tensors, directory / PTH)


def rewrite_zip(directory: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Rewrite the .pth's archive member by member; None leaves one out."""
    path = directory / PTH
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            changed = change(name, content)
            if changed is not None:
                archive.writestr(name, changed)


def refusal(directory: Path, *words: str, kind: type[UserError] = CheckpointError) -> str:
    """Building must end in this kind of error, on one line, with these words, before anything is sent to the device."""
    uploads = counters.uploads
    with pytest.raises(UserError) as caught:
        build(directory)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    assert counters.uploads == uploads
    return message


# ----------------------------------------------------------------------------------------------------------- what is
# loaded


@pytest.mark.slow
def test_the_device_holds_what_the_file_holds(tiny_checkpoint: Path) -> None:
    """Every tensor arrives under its name, bit for bit, and none is made up."""
    stored, loaded = read(tiny_checkpoint), on_device(build(tiny_checkpoint))
    assert set(loaded) == set(stored)
    assert len(loaded) == 21
    for name, tensor in stored.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_file_of_another_dtype_is_converted(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    """Meta ships bfloat16 and float16; on the CPU device they become float32 without a change of value."""
    edit_tensors(tiny_checkpoint, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    stored, loaded = read(tiny_checkpoint), on_device(build(tiny_checkpoint))
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in stored.items())


def test_bfloat16_storage_takes_half_the_bytes(tiny_checkpoint: Path) -> None:
    """``dtype="bfloat16"`` rounds once, to nearest, and every parameter is stored in two bytes an element."""
    wide, narrow = (
        on_device(build(tiny_checkpoint, dtype="float32")),
        on_device(build(tiny_checkpoint, dtype="bfloat16")),
    )
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}
    assert 2 * sum(t.nbytes for t in narrow.values()) == sum(t.nbytes for t in wide.values()) > 0
    assert all(torch.equal(narrow[name], tensor.to(torch.bfloat16)) for name, tensor in read(tiny_checkpoint).items())


def test_views_and_shared_storages_are_loaded(tiny_checkpoint: Path) -> None:
    """A tensor that is a transposed or sliced view in the file has its values, not its storage's order."""

    def reshape(tensors: Tensors) -> None:
        tensors["layers.0.attention.wq.weight"] = tensors["layers.0.attention.wq.weight"].t()
        tensors["norm.weight"] = torch.arange(128.0)[::2]

    edit_tensors(tiny_checkpoint, reshape)
    stored, loaded = read(tiny_checkpoint), on_device(build(tiny_checkpoint))
    assert not stored["layers.0.attention.wq.weight"].is_contiguous()
    assert torch.equal(loaded["layers.0.attention.wq.weight"], stored["layers.0.attention.wq.weight"])
    assert loaded["norm.weight"].tolist() == list(range(0, 128, 2))


@pytest.mark.parametrize("rows", [320, 333])
def test_vocab_size_of_minus_one_takes_the_embeddings_rows(tiny_checkpoint: Path, rows: int) -> None:
    """LLaMA 1 and 2 ship -1; the embedding decides, also where it has more rows than the tokenizer has ids."""
    edit_params(tiny_checkpoint, vocab_size=-1)
    edit_tensors(
        tiny_checkpoint,
        lambda t: t.update({n: torch.randn(rows, 64) for n in ("tok_embeddings.weight", "output.weight")}),
    )
    llm = build(tiny_checkpoint)
    assert llm.engine.runner.model.args.vocab_size == rows
    assert on_device(llm)["output.weight"].shape == (rows, 64)


@pytest.mark.parametrize(
    "table", [torch.ones(8), torch.arange(5), torch.ones(2, 2, dtype=torch.complex64)], ids=["freqs", "int", "complex"]
)
def test_rope_freqs_are_ignored(tiny_checkpoint: Path, table: torch.Tensor) -> None:
    """LLaMA 1 and 2 carry a table that follows from params.json; whatever is in it, it is neither used nor refused."""
    plain = build(tiny_checkpoint).engine.runner.model.rotary.cpu()
    edit_tensors(tiny_checkpoint, lambda t: t.update({"rope.freqs": table}))
    llm = build(tiny_checkpoint)
    assert "rope.freqs" not in on_device(llm)
    assert torch.equal(llm.engine.runner.model.rotary.cpu(), plain)


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, None),
        ({"use_scaled_rope": False}, None),
        ({"use_scaled_rope": True}, RopeScaling()),
        ({"use_scaled_rope": True, "rope_scaling_factor": 32}, RopeScaling(factor=32.0)),
    ],
    ids=["absent", "false", "true", "factor"],
)
def test_scaled_rope_reaches_the_rotary_table(
    tiny_checkpoint: Path, changes: dict[str, Any], scaling: RopeScaling | None
) -> None:
    """LLaMA 3's ``use_scaled_rope`` becomes RopeScaling, and the device's table is the scaled one."""
    edit_params(tiny_checkpoint, rope_theta=500000.0, **changes)
    llm = build(tiny_checkpoint)
    args = llm.engine.runner.model.args
    assert args.rope_scaling == scaling
    assert args.rope_theta == 500000.0
    table = llm.engine.runner.model.rotary.cpu()
    assert torch.equal(table, rotary_table(args, llm.config.positions))
    unscaled = rotary_table(ModelArgs(**PARAMS, rope_theta=500000.0), llm.config.positions)
    assert torch.equal(table, unscaled) == (scaling is None)


def test_a_tied_head_needs_no_output_tensor(tiny_checkpoint: Path) -> None:
    """``tie_word_embeddings`` makes the embedding the head; without it the missing head is an error."""
    edit_tensors(tiny_checkpoint, lambda t: t.pop("output.weight"))
    refusal(tiny_checkpoint, "1 missing: output.weight")
    edit_params(tiny_checkpoint, tie_word_embeddings=True)
    assert "output.weight" not in on_device(build(tiny_checkpoint))


def test_the_engines_settings_in_params_are_ignored(tiny_checkpoint: Path) -> None:
    """Some releases carry max_seq_len and max_batch_size; they are the engine's business."""
    edit_params(tiny_checkpoint, max_seq_len=4096, max_batch_size=32)
    assert meta_pth.read_params(tiny_checkpoint) == ModelArgs(**PARAMS)
    assert build(tiny_checkpoint).config.max_seq_len == POSITIONS


def test_weights_cannot_be_both_random_and_loaded(tiny_checkpoint: Path) -> None:
    """Random weights would replace the checkpoint's in silence."""
    with pytest.raises(ConfigError, match="random_weights and ckpt_dir: got both, expected one"):
        LLaMA.build(tiny_checkpoint, random_weights=ModelArgs(**PARAMS))


# -------------------------------------------------------------------------------------------------------------- the
# tokenizer


def test_a_tokenizer_in_the_parent_directory_is_found(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA 1 keeps one tokenizer beside the directories of its sizes; that holds for relative paths too."""
    parent = tiny_checkpoint.parent
    (tiny_checkpoint / "tokenizer.model").rename(parent / "tokenizer.model")
    assert find_tokenizer(tiny_checkpoint) == parent / "tokenizer.model"
    assert build(tiny_checkpoint).tokenizer.n_words == 320
    monkeypatch.chdir(tiny_checkpoint)
    assert find_tokenizer(Path(".")) == parent / "tokenizer.model"


def test_a_tokenizer_beside_the_weights_comes_first(tiny_checkpoint: Path) -> None:
    """The parent is not looked at where the directory itself has one."""
    (tiny_checkpoint.parent / "other.model").write_bytes(b"")
    (tiny_checkpoint.parent / "third.model").write_bytes(b"")
    assert find_tokenizer(tiny_checkpoint) == tiny_checkpoint / "tokenizer.model"


def test_no_tokenizer_is_refused(tiny_checkpoint: Path) -> None:
    """The message says where it was looked for and how to give one."""
    (tiny_checkpoint / "tokenizer.model").unlink()
    refusal(
        tiny_checkpoint,
        "no tokenizer",
        str(tiny_checkpoint),
        "parent",
        "its path with tokenizer_path",
        kind=TokenizerError,
    )


@pytest.mark.parametrize("where", ["beside", "parent"])
def test_several_tokenizers_are_refused_by_name(tiny_checkpoint: Path, where: str) -> None:
    """None of them is guessed."""
    directory = tiny_checkpoint if where == "beside" else tiny_checkpoint.parent
    (tiny_checkpoint / "tokenizer.model").rename(directory / "a.model")
    shutil.copy(directory / "a.model", directory / "b.model")
    refusal(
        tiny_checkpoint,
        "2 tokenizers",
        "a.model, b.model",
        "expected one",
        "choose with tokenizer_path",
        kind=TokenizerError,
    )


@pytest.mark.parametrize("vocab_size", [-1, 300])
def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny_checkpoint: Path, vocab_size: int) -> None:
    """Its last ids would have no row; both numbers are named."""
    edit_params(tiny_checkpoint, vocab_size=vocab_size)
    edit_tensors(
        tiny_checkpoint,
        lambda t: t.update({n: torch.zeros(300, 64) for n in ("tok_embeddings.weight", "output.weight")}),
    )
    refusal(tiny_checkpoint, "320 ids", "300 rows", "tokenizer_path", kind=TokenizerError)


# ----------------------------------------------------------------------------------------------------------------
# params.json


def test_a_directory_that_is_not_there_is_refused(tiny_checkpoint: Path) -> None:
    """So is a file in its place."""
    refusal(tiny_checkpoint / "absent", "no such directory", "absent", "expected one with")
    refusal(tiny_checkpoint / PTH, PTH, "expected one with")


def test_a_directory_without_params_says_what_it_found(tiny_checkpoint: Path) -> None:
    """Whoever gives a directory of another format recognises it."""
    (tiny_checkpoint / "params.json").rename(tiny_checkpoint / "config.json")
    refusal(tiny_checkpoint, "no params.json", "config.json", PTH, "Meta's format")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["not readable as JSON"]),
        (b"{'dim': 64}", ["not readable as JSON"]),
        (b'{"dim": 64', ["not readable as JSON"]),
        (b"\xff\xfe\x00", ["not readable as JSON"]),
        (b"[" * 100_000, ["not readable as JSON"]),
        (b'{"dim": ' * 100_000, ["not readable as JSON"]),
        (b'{"dim": 1' + b"0" * 5000 + b"}", ["not readable as JSON"]),
        (b"[64, 2]", ["got a JSON list", "expected an object"]),
        (b"null", ["got a JSON NoneType", "expected an object"]),
        (b'"dim"', ["got a JSON str", "expected an object"]),
        (b"4096", ["got a JSON int", "expected an object"]),
    ],
    ids=lambda value: value[:16].decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_params_that_are_no_json_object_are_refused(tiny_checkpoint: Path, content: bytes, words: list[str]) -> None:
    """The file is named, and what is in it."""
    (tiny_checkpoint / "params.json").write_bytes(content)
    refusal(tiny_checkpoint, "params.json", *words)


def test_a_directory_in_place_of_params_is_refused(tiny_checkpoint: Path) -> None:
    """What cannot be read is an error of the user's, too."""
    (tiny_checkpoint / "params.json").unlink()
    (tiny_checkpoint / "params.json").mkdir()
    refusal(tiny_checkpoint, "params.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_experts": 8}, ["n_experts", "known are", "n_kv_heads", "use_scaled_rope"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "expected an object with the keys"]),
        ({"Dim": 64, "": 1}, ["Dim", "known are"]),
        ({"dim": "64"}, ["dim", "'64'", "positive whole number"]),
        ({"dim": 64.0}, ["dim", "64.0", "positive whole number"]),
        ({"dim": True}, ["dim", "True", "positive whole number"]),
        ({"dim": 0}, ["dim", "0", "positive whole number"]),
        ({"dim": [64]}, ["dim", "[64]", "positive whole number"]),
        ({"dim": None}, ["dim", "None", "positive whole number"]),
        ({"dim": 65}, ["dim", "65", "4 heads", "even"]),
        ({"dim": 60}, ["dim", "60", "4 heads", "even"]),
        ({"n_layers": -2}, ["n_layers", "-2", "positive whole number"]),
        ({"n_layers": None}, ["n_layers", "None", "positive whole number"]),
        ({"n_heads": None}, ["n_heads", "None", "positive whole number"]),
        ({"n_heads": 0}, ["n_heads", "0", "positive whole number"]),
        ({"n_kv_heads": 3}, ["n_kv_heads", "3", "divisor of n_heads=4"]),
        ({"n_kv_heads": 8}, ["n_kv_heads", "8", "divisor of n_heads=4"]),
        ({"multiple_of": 0}, ["multiple_of", "0", "positive whole number"]),
        ({"multiple_of": None}, ["multiple_of", "None", "positive whole number"]),
        ({"vocab_size": 0}, ["vocab_size", "0", "-1"]),
        ({"vocab_size": -2}, ["vocab_size", "-2", "-1"]),
        ({"vocab_size": None}, ["vocab_size", "None", "-1"]),
        ({"norm_eps": 0}, ["norm_eps", "0", "positive finite number"]),
        ({"norm_eps": "1e-5"}, ["norm_eps", "'1e-5'", "positive finite number"]),
        ({"norm_eps": float("nan")}, ["norm_eps", "nan", "positive finite number"]),
        ({"norm_eps": None}, ["norm_eps", "None", "positive finite number"]),
        ({"rope_theta": float("inf")}, ["rope_theta", "inf", "positive finite number"]),
        ({"rope_theta": None}, ["rope_theta", "None", "positive finite number"]),
        ({"rope_theta": 10**400}, ["rope_theta"]),
        ({"ffn_dim_multiplier": -1.3}, ["ffn_dim_multiplier", "-1.3", "positive finite number"]),
        ({"ffn_dim_multiplier": 1e308}, ["ffn_dim_multiplier"]),
        ({"use_scaled_rope": "yes"}, ["use_scaled_rope", "'yes'", "true or false"]),
        ({"use_scaled_rope": True, "rope_scaling_factor": 0}, ["rope_scaling_factor", "0", "positive"]),
        ({"use_scaled_rope": True, "rope_scaling_factor": "8"}, ["rope_scaling_factor", "'8'", "positive"]),
        ({"use_scaled_rope": True, "rope_scaling_factor": float("nan")}, ["rope_scaling_factor", "nan", "positive"]),
        ({"use_scaled_rope": True, "rope_scaling_factor": float("inf")}, ["rope_scaling_factor", "inf", "positive"]),
        ({"use_scaled_rope": True, "rope_scaling_factor": 10**400}, ["rope_scaling_factor", "positive"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "'no'", "true or false"]),
        ({"tie_word_embeddings": None}, ["tie_word_embeddings", "None", "true or false"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_params_of_a_wrong_kind_are_refused(tiny_checkpoint: Path, changes: dict[str, Any], words: list[str]) -> None:
    """The key, its value and what it takes are named; a null is a wrong value wherever the key has no default of
    null.
    """
    edit_params(tiny_checkpoint, **changes)
    refusal(tiny_checkpoint, "params.json", *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 128}, ["21 of another shape", "tok_embeddings.weight [320, 64] instead of [320, 128]"]),
        ({"n_kv_heads": 4}, ["4 of another shape", "layers.1.attention.wv.weight [32, 64] instead of [64, 64]"]),
        ({"multiple_of": 256}, ["6 of another shape", "layers.0.feed_forward.w1.weight"]),
        (
            {"vocab_size": 400},
            ["2 of another shape", "tok_embeddings.weight [320, 64] instead of [400, 64]", "output.weight"],
        ),
        ({"n_layers": 3}, ["9 missing", "layers.2.attention.wq.weight"]),
        ({"n_layers": 1}, ["9 not known to this model", "layers.1.attention.wq.weight"]),
        ({"tie_word_embeddings": True}, ["output.weight differs from the embedding", "tie them"]),
        ({"vocab_size": 2**60}, [str(2**60)]),
        ({"ffn_hidden_dim": 10**30}, [str(10**30)]),
        ({"dim": 2**40, "n_heads": 4, "n_kv_heads": 4}, [str(2**40)]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_params_of_another_model_are_refused(tiny_checkpoint: Path, changes: dict[str, Any], words: list[str]) -> None:
    """A params.json that is right in itself and not this file's is noticed, however far off its numbers are."""
    edit_params(tiny_checkpoint, **changes)
    refusal(tiny_checkpoint, *words)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-4, 130),
    st.integers(),
    st.integers(10**300, 10**310),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
KEYS = [
    *PARAMS,
    "ffn_dim_multiplier",
    "ffn_hidden_dim",
    "rope_theta",
    "tie_word_embeddings",
    "use_scaled_rope",
    "rope_scaling_factor",
]
CHANGES = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=3),
    st.dictionaries(
        st.one_of(st.sampled_from(["rope_scaling", "max_seq_len", "Dim"]), st.text(max_size=4)),
        JUNK,
        min_size=1,
        max_size=2,
    ),
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(changes=CHANGES, dropped=st.sets(st.sampled_from(list(PARAMS)), max_size=2), cut=st.none() | st.integers(0, 160))
def test_any_params_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], dropped: set[str], cut: int | None
) -> None:
    """Whatever stands in params.json, the outcome is a shape that can be computed with, or an error of the user's."""
    directory = tmp_path_factory.getbasetemp() / "any_params"
    directory.mkdir(exist_ok=True)
    params = {key: value for key, value in {**PARAMS, **changes}.items() if key in changes or key not in dropped}
    (directory / "params.json").write_text(json.dumps(params)[:cut])
    outcome: ModelArgs | UserError
    try:
        outcome = meta_pth.read_params(directory)
    except UserError as error:
        outcome = error
    if isinstance(outcome, UserError):
        assert "params.json" in str(outcome)
    else:
        assert isinstance(outcome, ModelArgs)
        sizes = (outcome.head_dim, outcome.kv_heads, outcome.hidden_dim, outcome.n_layers)
        assert [size for size in sizes if type(size) is not int or size < 1] == []


# ---------------------------------------------------------------------------------------------------------------- the
# tensors


def test_all_that_is_wrong_with_the_tensors_is_said_at_once(tiny_checkpoint: Path) -> None:
    """Missing, extra, misshapen and non-float tensors are named in one error, so that nobody mends them one by one."""

    def damage(tensors: Tensors) -> None:
        del tensors["norm.weight"], tensors["layers.1.ffn_norm.weight"]
        tensors |= {"lora.a": torch.zeros(2), "lora.b": torch.zeros(2)}
        tensors["output.weight"] = torch.zeros(64, 320)
        tensors["layers.0.ffn_norm.weight"] = torch.tensor(1.0)
        tensors["layers.0.attention_norm.weight"] = torch.ones(64, dtype=torch.int32)

    edit_tensors(tiny_checkpoint, damage)
    message = refusal(
        tiny_checkpoint,
        "2 missing: layers.1.ffn_norm.weight, norm.weight",
        "2 not known to this model: lora.a, lora.b",
        "2 of another shape: layers.0.ffn_norm.weight [] instead of [64], output.weight [64, 320] instead of [320, 64]",
        "1 not floating point: layers.0.attention_norm.weight torch.int32",
        str(tiny_checkpoint),
    )
    assert "..." not in message


@pytest.mark.parametrize(("count", "shown", "dots"), [(10, 10, False), (11, 10, True), (18, 10, True)])
def test_at_most_ten_names_of_a_kind_are_shown(tiny_checkpoint: Path, count: int, shown: int, dots: bool) -> None:
    """A checkpoint of another model does not fill the screen; the number is still the true one."""
    missing = [
        f"layers.{layer}.{part}"
        for layer in (0, 1)
        for part in ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
    ]
    missing += [
        f"layers.{layer}.{part}"
        for layer in (0, 1)
        for part in ("attention_norm", "ffn_norm", *(f"feed_forward.w{i}" for i in (1, 2, 3)))
    ]

    def damage(tensors: Tensors) -> None:
        for name in missing[:count]:
            del tensors[f"{name}.weight"]
        tensors |= {f"extra.{i}": torch.zeros(1) for i in range(count)}

    edit_tensors(tiny_checkpoint, damage)
    message = refusal(tiny_checkpoint, f"{count} missing: ", f"{count} not known to this model: ")
    parts = [part.split(": ", 1)[1] for part in message.split("; ")[1:]]
    assert len(parts) == 2
    for part in parts:
        names = part.split(", ")
        assert ("..." in names, len([n for n in names if n != "..."])) == (dots, shown)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_tensors_that_are_not_floating_point_are_refused(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    """Quantised weights of another tool would be read as numbers that they are not."""
    edit_tensors(tiny_checkpoint, lambda t: t.update({"norm.weight": torch.ones(64).to(dtype)}))
    refusal(tiny_checkpoint, f"1 not floating point: norm.weight {dtype}")


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_plain_values_are_refused(tiny_checkpoint: Path, kind: str) -> None:
    """torch saves sparse tensors, and ones without any values; neither can be sent to the device."""
    tensor = torch.ones(64).to_sparse() if kind == "sparse" else torch.ones(64, device="meta")
    edit_tensors(tiny_checkpoint, lambda t: t.update({"norm.weight": tensor}))
    refusal(tiny_checkpoint, "norm.weight")


@pytest.mark.parametrize(
    "embedding",
    [None, torch.tensor(1.0), torch.zeros(0, 64), torch.zeros(320)],
    ids=["none", "scalar", "empty", "vector"],
)
def test_an_embedding_that_cannot_say_the_vocabulary_is_refused(
    tiny_checkpoint: Path, embedding: torch.Tensor | None
) -> None:
    """With vocab_size -1 the embedding is looked at before all tensors are checked; a bad one is an error there too."""
    edit_params(tiny_checkpoint, vocab_size=-1)
    edit_tensors(
        tiny_checkpoint,
        lambda t: (
            t.pop("tok_embeddings.weight") if embedding is None else t.update({"tok_embeddings.weight": embedding})
        ),
    )
    with pytest.raises(UserError, match=r"vocab_size|tok_embeddings\.weight"):
        build(tiny_checkpoint)


# ------------------------------------------------------------------------------------------------------------- the .pth
# file


def test_no_pth_is_refused(tiny_checkpoint: Path) -> None:
    """params.json alone is no checkpoint."""
    (tiny_checkpoint / PTH).unlink()
    refusal(tiny_checkpoint, "no .pth file", PTH)


def test_a_pth_too_many_is_refused(tiny_checkpoint: Path) -> None:
    """A file too many is no part of a split checkpoint."""
    shutil.copy(tiny_checkpoint / PTH, tiny_checkpoint / "consolidated.01.pth")
    refusal(tiny_checkpoint, "2 shards", PTH, "expected one file")


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {"model": {"norm.weight": torch.ones(2)}}, {1: torch.ones(2)}, {"a": 1}, torch.ones(2), None],
)
def test_a_pth_of_something_else_is_refused(tiny_checkpoint: Path, content: object) -> None:
    """Training states and lists are readable, and not what is expected."""
    torch.save(content, tiny_checkpoint / PTH)
    refusal(tiny_checkpoint, PTH, "got a", "expected a dict of tensors by name")


@pytest.mark.parametrize("kept", [0, 1, 4, 100, 0.5, 0.99, -1])
def test_a_truncated_pth_is_refused(tiny_checkpoint: Path, kept: float) -> None:
    """A download that was cut off, wherever."""
    path = tiny_checkpoint / PTH
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if 0 < kept < 1 else int(kept)])
    assert path.stat().st_size < len(data)
    refusal(tiny_checkpoint, PTH, "not a checkpoint")


@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", b"\x80\x02", b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("size", [10, 5000])
def test_random_bytes_are_refused(tiny_checkpoint: Path, head: bytes, size: int) -> None:
    """Anything named .pth that is none, also where it begins like a zip or a pickle."""
    (tiny_checkpoint / PTH).write_bytes(head + random.Random(size).randbytes(size))
    refusal(tiny_checkpoint, PTH, "not a checkpoint", *(["Git LFS pointer"] if b"git-lfs" in head else []))


def test_a_directory_in_place_of_the_pth_is_refused(tiny_checkpoint: Path) -> None:
    """So is one that cannot be opened at all."""
    (tiny_checkpoint / PTH).unlink()
    (tiny_checkpoint / PTH).mkdir()
    refusal(tiny_checkpoint, PTH)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"\x80\x02.",
        b"\x80\x02J\x01\x00.",
        b"\x80\x02h\x05.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        b"\x80\x02K\x00K\x01K\x02s.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    ],
    ids=["empty", "text", "empty stack", "cut short", "no such memo", "not utf-8", "item of a number", "no arguments"],
)
def test_a_damaged_pickle_in_a_sound_archive_is_refused(tiny_checkpoint: Path, content: bytes) -> None:
    """torch's restricted unpickler fails in many ways on bytes that it does not expect; all of them are one error
    here.
    """
    rewrite_zip(tiny_checkpoint, lambda name, old: content if name.endswith("data.pkl") else old)
    refusal(tiny_checkpoint, PTH, "not a checkpoint")


def test_a_missing_storage_is_refused(tiny_checkpoint: Path) -> None:
    """An archive without the bytes of one of its tensors."""
    rewrite_zip(tiny_checkpoint, lambda name, old: None if name.endswith("/data/3") else old)
    refusal(tiny_checkpoint, PTH, "data/3")


def test_a_storage_that_is_cut_short_is_refused(tiny_checkpoint: Path) -> None:
    """Mapping would read the bytes of the neighbouring record: all tensors load, one of them with garbage in it."""
    rewrite_zip(tiny_checkpoint, lambda name, old: old[:100] if name.endswith("/data/3") else old)
    refusal(tiny_checkpoint, PTH, "no record of their size")


class MakesADirectory:
    """What a hostile checkpoint would hold: unpickling it runs code."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("form", ["saved by torch", "bare pickle", "legacy"])
def test_code_in_a_pickle_is_refused_and_not_run(tiny_checkpoint: Path, tmp_path: Path, form: str) -> None:
    """Loading a checkpoint never runs what somebody has put into it."""
    marker = tmp_path / "executed"
    content = {"norm.weight": MakesADirectory(marker)}
    pickle.loads(pickle.dumps(content))
    assert marker.is_dir(), "the pickle of this test is harmless, it proves nothing"
    marker.rmdir()
    path = tiny_checkpoint / PTH
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    refusal(tiny_checkpoint, PTH, "not a checkpoint")
    assert not marker.exists()


def test_a_legacy_pth_is_loaded_or_refused(tiny_checkpoint: Path) -> None:
    """Files of torch before 1.6 are no zip archives: they are read right or refused, but never read wrong."""
    stored = read(tiny_checkpoint)
    torch.save(stored, tiny_checkpoint / PTH, _use_new_zipfile_serialization=False)
    try:
        loaded = on_device(build(tiny_checkpoint))
    except LLaMAError:
        refusal(tiny_checkpoint, PTH)
    else:
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
