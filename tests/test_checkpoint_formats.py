"""Every format is read right, by transformers' own logits, and what is damaged, mismatched or not computed is refused
with its name.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import TINY, assert_equal, edit_json, logits_of, random_weights, write_meta
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llama import ModelArgs, RopeScaling
from llama.checkpoint import checked, names, open_checkpoint
from llama.checkpoint.meta_pth import MetaSource
from llama.checkpoint.reshard import convert, reshard
from llama.checkpoint.source import is_finite
from llama.compiled.model import Transformer
from llama.config import GenerationDefaults
from llama.errors import CheckpointError, ConfigError

SEQUENCE = 160
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
KINDS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "narrow": {"intermediate_size": 32},
    "mistral": {"sliding_window": 256, "num_key_value_heads": 1},
}


def hf_model(kind: str) -> Any:
    """A random model of transformers', weights large enough for every part to show in the logits."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(11)
    chosen = {**SHAPE, **KINDS[kind]}
    model = (
        MistralForCausalLM(MistralConfig(**chosen)) if kind == "mistral" else LlamaForCausalLM(LlamaConfig(**chosen))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                1 + 0.1 * torch.randn_like(parameter) if "norm" in name else 0.2 * torch.randn_like(parameter)
            )
    return model.eval()


def save_hf(directory: Path, kind: str = "gqa", shards: int = 1) -> Path:
    """Saved by transformers in exactly so many files."""
    model = hf_model(kind)
    size = sum(p.numel() * 4 for p in model.parameters())
    for most in range(size // shards, size + 1, 5000):
        model.save_pretrained(directory, max_shard_size=most)
        if len(list(directory.glob("*.safetensors"))) == shards:
            return directory
        shutil.rmtree(directory)
    raise AssertionError(f"no shard size makes {shards} files")


def ids() -> torch.Tensor:
    return torch.randint(0, 320, (2, SEQUENCE), generator=torch.Generator().manual_seed(5))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_in_every_format(tmp_path: Path, kind: str, shards: int) -> None:
    """Hugging Face's files, our own and Meta's layout with 1 and 2 shards, and all the way back: the same tensors, the
    same logits.
    """
    model = hf_model(kind)
    with torch.no_grad():
        expected = model(ids()).logits
    source = open_checkpoint(save_hf(tmp_path / "hf", kind, shards))
    assert (source.format, source.args.tie_word_embeddings) == ("huggingface", kind == "tied")
    torch.testing.assert_close(logits_of(source, ids()), expected, atol=1e-4, rtol=1e-4)

    weights = dict(source.tensors())
    convert(tmp_path / "hf", tmp_path / "native", max_shard_size="100KB")
    reshard(tmp_path / "native", tmp_path / "one", 1)
    reshard(tmp_path / "hf", tmp_path / "two", 2)  # one key/value head (mistral here) is written twice
    reshard(tmp_path / "two", tmp_path / "back", 1)
    convert(tmp_path / "two", tmp_path / "native2")
    for name in ("native", "one", "two", "back", "native2"):
        opened = open_checkpoint(tmp_path / name)
        assert opened.format == ("llama-xla" if name.startswith("native") else "meta")
        assert (opened.args, opened.sliding_window) == (source.args, source.sliding_window)
        assert_equal(opened.tensors(), weights)
    torch.testing.assert_close(logits_of(open_checkpoint(tmp_path / "two"), ids()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gqa", "llama3", "linear"])
def test_rotary_settings_are_read_in_both_spellings(tmp_path: Path, kind: str) -> None:
    """transformers 5 writes rope_parameters; all before it rope_theta and rope_scaling, whose type was once called
    type.
    """
    directory = save_hf(tmp_path / "hf", kind)
    expected = open_checkpoint(directory).args
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    for key in ("rope_type", "type"):
        old = {key: rope["rope_type"], **{name: value for name, value in rope.items() if name != "rope_type"}}
        edit_json(
            directory / "config.json",
            rope_parameters=None,
            rope_theta=theta,
            rope_scaling=None if kind == "gqa" else old,
        )
        assert open_checkpoint(directory).args == expected


def test_scaled_rotary_frequencies_are_those_of_transformers() -> None:
    """The values themselves, beside the logits."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from llama.compiled.model import rotary_frequencies

    config = LlamaConfig(**{**SHAPE, **KINDS["linear"]})
    theirs, _ = ROPE_INIT_FUNCTIONS["linear"](config, torch.device("cpu"))
    torch.testing.assert_close(rotary_frequencies(16, 10000.0, RopeScaling(factor=4.0, kind="linear")), theirs)


def test_the_table_of_names_is_the_model() -> None:
    """Names, shapes and order, tied and not."""
    for args in (
        TINY,
        ModelArgs(dim=32, n_layers=3, n_heads=2, vocab_size=40, multiple_of=8, tie_word_embeddings=True),
    ):
        with torch.device("meta"):
            parameters = {name: tuple(p.shape) for name, p in Transformer(args, 8).named_parameters()}
        table = {name: names.shape_of(weight, args) for name, weight in names.expected_weights(args)}
        assert table == parameters
        for name in table:
            assert names.to_meta(str(names.to_hugging_face(name))) == name


REFUSED_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"hidden_act": "gelu"}, "hidden_act is gelu.*'silu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: quant_method is .None."),
    ({"head_dim": 32}, r"of another shape: layers\.0\.attention\.wq\.weight .* \[64, 64\] instead of \[128, 64\]"),
    ({"head_dim": 15}, "attn_head_dim: got 15 for 4 heads, expected an even number"),
    ({"head_dim": "16"}, "attn_head_dim: got '16'"),
    ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'ntk' is not computed"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "missing: factor"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}}, "rope_theta: got 1.0"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}}, "beta_slow 2 and beta"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "short_factor": [1.0]}}, "missing: short_factor"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": None}, "got None"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "got 1 numbers, expected 8"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": 2}}, "short_factor: got 2 for kind longrope"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [0.0] * 8}}, "short_factor: got 0.0"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters, got"),
    ({"rope_theta": 5.0}, "two different values of rope_theta"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "missing: factor"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "2"}}, "rope_scaling factor: got '2'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ({"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 4.0}}, "expected the first to be the smaller"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"architectures": ["MixtralForCausalLM"]}, "architectures is .*MixtralForCausalLM.*LlamaForCausalLM"),
    ({"architectures": ["Qwen3MoeForCausalLM"]}, "architectures is .*Qwen3MoeForCausalLM.*Qwen3ForCausalLM"),
    ({"architectures": ["Qwen2ForCausalLM"]}, r"6 missing: layers\.0\.attention\.wq\.bias"),
    ({"architectures": ["Qwen3ForCausalLM"]}, r"4 missing: layers\.0\.attention\.q_norm\.weight"),
    ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias is True"),
    ({"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.2}, "factor is 0.2, expected a number up to 1"),
    ({"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": "x"}, "factor is x, expected a number up to 1"),
    ({"architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoModelForCausalLM": "a.B"}}, "auto_map names code"),
    ({"architectures": None}, "architectures is None"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map names code"),
    ({"rms_norm_eps": None}, "has no rms_norm_eps"),
    ({"rms_norm_epz": 1e-3}, "unknown key 'rms_norm_epz'; if rms_norm_eps is meant"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types is"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    ({"layer_types": "full_attention"}, "layer_types is"),
    ({"sliding_window": "many"}, "sliding_window is many"),
    ({"sliding_window": 64}, "sliding_window is 64, which LlamaForCausalLM does not have"),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": True}, "sliding_window is True"),
    ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": "yes"}, "use_sliding_window is yes"),
    ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": -1}, "layers is -1"),
    (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "layer_types is .*full_attention for the first layers",
    ),
    ({"hidden_size": 63, "head_dim": None}, "dim: got 63 for 4 heads"),
    ({"hidden_size": 63}, r"of another shape"),
    ({"num_hidden_layers": 10**12}, "n_layers: got 1000000000000"),
    ({"num_hidden_layers": 10**9}, "n_layers is 1000000000, but layers.999999999"),
    ({"vocab_size": 10**400}, "vocab_size: got 1000"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: got 'yes'"),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED_SETTINGS, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_settings_that_are_not_computed_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Each would make another model of the same weights, silently."""
    directory = save_hf(tmp_path / "hf")
    edit_json(directory / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(directory)
    assert "config.json" in str(error.value)


def test_settings_that_change_nothing_are_passed_over(tmp_path: Path) -> None:
    """What other exporters add, and the neutral values of what is refused otherwise."""
    directory = save_hf(tmp_path / "hf")
    expected = open_checkpoint(directory).args
    harmless = {
        "attention_dropout": 0.1,
        "use_cache": False,
        "use_sliding_window": False,
        "pretraining_tp": 2,
        "head_dim": 16,
    }
    neutral = {
        "partial_rotary_factor": 1,
        "hidden_act": "silu",
        "mlp_bias": False,
        "layer_types": ["full_attention"] * 2,
    }
    edit_json(
        directory / "config.json", **harmless, **neutral, unsloth_version="1", bos_token_id=[1], initializer_range=None
    )
    assert open_checkpoint(directory).args == expected


def test_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    """An equal copy of the embedding is passed over; another tensor contradicts the settings."""
    directory = save_hf(tmp_path / "hf", "tied")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert "output.weight" not in dict(open_checkpoint(directory).tensors())
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the head output\.weight differs"):
        dict(open_checkpoint(directory).tensors())


def test_pickled_hugging_face_files_are_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """pytorch_model.bin, whole and by its index; safetensors come first where both are there."""
    directory = save_hf(tmp_path / "hf")
    expected = dict(open_checkpoint(directory).tensors())
    tensors = {**hf_model("gqa").state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    torch.save(tensors, directory / "pytorch_model.bin")
    with caplog.at_level(logging.WARNING, "llama"):
        assert_equal(open_checkpoint(directory).tensors(), expected)
        assert not caplog.messages
        (directory / "model.safetensors").unlink()
        assert_equal(open_checkpoint(directory).tensors(), expected)
        assert "pytorch_model.bin is a pickle" in caplog.text

    (directory / "pytorch_model.bin").unlink()
    halves = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {name: halves[i % 2] for i, name in enumerate(tensors)}
    for half in halves:
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == half}, directory / half)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(open_checkpoint(directory).tensors(), expected)


# Meta's format


def cut(weights: dict[str, torch.Tensor], parts: int, embedding_axis: int) -> list[dict[str, torch.Tensor]]:
    """The shards of a model, by torch.chunk and Meta's lists of layers; not by the code under test."""
    columns = ("wq", "wk", "wv", "w1", "w3", "output")
    rows = ("wo", "w2")

    def axis(name: str) -> int | None:
        if "tok_embeddings" in name:
            return embedding_axis
        return (
            0
            if any(f"{c}.weight" in name for c in columns)
            else 1
            if any(f"{r}.weight" in name for r in rows)
            else None
        )

    def part(name: str, rank: int) -> torch.Tensor:
        along = axis(name)
        return weights[name] if along is None else weights[name].chunk(parts, along)[rank]

    return [{name: part(name, rank) for name in weights} for rank in range(parts)]


@pytest.mark.parametrize("said", [320, -1], ids=["vocab said", "vocab -1"])
@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shards_are_merged(tmp_path: Path, parts: int, embedding_axis: int, said: int) -> None:
    """Both ways of splitting the embedding are known by their sizes; rope.freqs are left out; the vocabulary is
    settled.
    """
    weights = random_weights(TINY, dtype=torch.bfloat16)
    derived = {"rope.freqs": torch.zeros(4), "layers.0.attention.inner_attention.rope.freqs": torch.zeros(4)}
    directory = write_meta(
        tmp_path / "m", TINY, [shard | derived for shard in cut(weights, parts, embedding_axis)], vocab_size=said
    )
    source = open_checkpoint(directory)
    assert (source.format, source.args, len(source.files)) == ("meta", TINY, parts)
    assert source.embedding_axis == (embedding_axis if parts > 1 else None)
    assert {name: (info.shape, info.dtype) for name, info in source.infos().items()} == {
        name: (tuple(tensor.shape), torch.bfloat16) for name, tensor in weights.items()
    }
    assert_equal(source.tensors(), weights)


def test_more_shards_than_key_heads(tmp_path: Path) -> None:
    """Neighbours hold the same head; copies that differ are refused."""
    args = ModelArgs(dim=64, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=64, multiple_of=32)
    weights = random_weights(args)
    shards = cut(weights, 4, 1)
    for name in ("layers.0.attention.wk.weight", "layers.0.attention.wv.weight"):
        for rank, shard in enumerate(shards):
            shard[name] = weights[name].chunk(2)[rank // 2]
    assert_equal(open_checkpoint(write_meta(tmp_path / "good", args, shards)).tensors(), weights)
    shards[3]["layers.0.attention.wv.weight"] = shards[0]["layers.0.attention.wv.weight"]
    bad = open_checkpoint(write_meta(tmp_path / "bad", args, shards))
    with pytest.raises(
        CheckpointError, match=r"consolidated\.03\.pth: tensor layers\.0\.attention\.wv\.weight differs"
    ):
        dict(bad.tensors())


def test_unsplit_weights_stay_mapped(tmp_path: Path) -> None:
    """A weight that is read is a piece of the file, not a copy; checked by the addresses that the kernel says the file
    has.
    """
    source = open_checkpoint(write_meta(tmp_path / "m", TINY, [random_weights(TINY)]))
    tensor = source.read("output.weight")
    mapped = [
        line.split()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("consolidated.00.pth")
    ]
    spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in mapped]
    assert any(start <= tensor.data_ptr() < end for start, end in spans)


def test_a_file_is_mapped_anew_after_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that touched pages do not pile up; tensors read before stay what they are. A file that was exchanged meanwhile
    is noticed.
    """
    from llama.checkpoint import files

    monkeypatch.setattr(files, "SMALLEST_REMAP", 1)
    weights = random_weights(TINY)
    directory = write_meta(tmp_path / "m", TINY, [weights])
    source = open_checkpoint(directory)
    assert_equal(list(source.tensors()), weights)
    torch.save({name: tensor.half() for name, tensor in weights.items()}, directory / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="was changed while it was being read"):
        dict(source.tensors())


Damage = Callable[[list[dict[str, torch.Tensor]]], None]


def _another_dtype(shards: list[dict[str, torch.Tensor]]) -> None:
    shards[1]["output.weight"] = shards[1]["output.weight"].half()


def _another_shape(shards: list[dict[str, torch.Tensor]]) -> None:
    shards[1]["output.weight"] = shards[1]["output.weight"][:-1]


def _another_norm(shards: list[dict[str, torch.Tensor]]) -> None:
    shards[1]["layers.1.ffn_norm.weight"] = shards[1]["layers.1.ffn_norm.weight"] + 1e-6


def _lacking(shards: list[dict[str, torch.Tensor]]) -> None:
    del shards[1]["layers.1.feed_forward.w2.weight"]


def _odd_embedding(shards: list[dict[str, torch.Tensor]]) -> None:
    for shard in shards:
        shard["tok_embeddings.weight"] = shard["tok_embeddings.weight"][:, :20]


def _both_halves(shards: list[dict[str, torch.Tensor]]) -> None:
    for shard in shards:
        for name in shard:
            shard[name] = shard[name].bfloat16()
        shard["output.weight"] = shard["output.weight"].half()


def _integers(shards: list[dict[str, torch.Tensor]]) -> None:
    for shard in shards:
        shard["output.weight"] = shard["output.weight"].int()


def _extra(shards: list[dict[str, torch.Tensor]]) -> None:
    for shard in shards:
        shard["layers.0.attention.wq.bias"] = torch.zeros(8)


def _swapped_norms(shards: list[dict[str, torch.Tensor]]) -> None:
    for shard in shards:
        shard["layers.2.ffn_norm.weight"] = shard.pop("layers.1.ffn_norm.weight")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_another_dtype, r"consolidated\.01\.pth: tensor output\.weight is \[160, 64\] torch\.float16, but .*float32"),
        (_another_shape, r"consolidated\.01\.pth: tensor output\.weight is \[159, 64\]"),
        (_another_norm, r"consolidated\.01\.pth: tensor layers\.1\.ffn_norm\.weight differs"),
        (_lacking, r"consolidated\.01\.pth has no tensor layers\.1\.feed_forward\.w2\.weight"),
        (
            _odd_embedding,
            r"consolidated\.00\.pth: tensor tok_embeddings\.weight is \[320, 20\], expected \[320, 32\].*\[160, 64\]",
        ),
        (_both_halves, r"consolidated\.00\.pth.*; 1 of the other 16-bit type: output\.weight torch\.float16"),
        (_integers, r"consolidated\.00\.pth.*; 1 not floating point: output\.weight torch\.int32"),
        (_extra, r"consolidated\.00\.pth.*; 1 not known to this model: layers\.0\.attention\.wq\.bias"),
        (
            _swapped_norms,
            r"1 missing: layers\.1\.ffn_norm\.weight; 1 not known to this model: layers\.2\.ffn_norm\.weight$",
        ),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path, damage: Damage, message: str) -> None:
    """By file and tensor, when the checkpoint is opened, or for replicated weights when they are read."""
    shards = cut(random_weights(TINY), 2, 1)
    damage(shards)
    directory = write_meta(tmp_path / "m", TINY, shards)
    with pytest.raises(CheckpointError, match=message):
        dict(open_checkpoint(directory).tensors())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([0, 1, 2], r"has 3 shards.*one of 4 parts of 64: expected consolidated\.00\.pth to consolidated\.03\.pth"),
        ([0, 1, 3], r"consolidated\.02\.pth is missing"),
        ([1, 2, 3], r"consolidated\.00\.pth is missing"),
        ([0], r"has 1 shards.*one of 4 parts"),
        ([], "holds no checkpoint"),
    ],
)
def test_missing_shards_are_refused(tmp_path: Path, files: list[int], message: str) -> None:
    """Also the last, which leaves no gap in the numbers: its absence shows in the sizes."""
    directory = write_meta(tmp_path / "m", TINY, cut(random_weights(TINY), 4, 1))
    for rank in {0, 1, 2, 3} - set(files):
        (directory / f"consolidated.{rank:02}.pth").unlink()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(directory)


def test_pickles_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    """Truncated, empty, text, code, the wrong kind of object, sparse: the file is named, and no code runs."""
    directory = write_meta(tmp_path / "m", TINY, [random_weights(TINY)])
    path = directory / "consolidated.00.pth"
    whole = path.read_bytes()
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (ran,))

    contents = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"weights",
        "pickle": pickle.dumps(Code()),
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    objects = {
        "list": [1],
        "nested": {"model": {"a": torch.zeros(1)}},
        "sparse": {"a": torch.eye(2).to_sparse()},
        "code": {"a": Code()},
    }
    for name, made in objects.items():
        torch.save(made, tmp_path / name)
        contents[name] = (tmp_path / name).read_bytes()
    for name, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth") as error:
            open_checkpoint(directory)
        assert ("git lfs pull" in str(error.value)) == (name == "lfs")
    assert not ran.exists()


def test_params_json_is_read_strictly(tmp_path: Path) -> None:
    """What is not known, not a number, absurd, or said twice is refused with the file's name."""
    directory = write_meta(tmp_path / "m", TINY, [random_weights(TINY)])
    path = directory / "params.json"
    good = json.loads(path.read_text())
    wrong = [
        *({**good, "dim": value} for value in (None, "64", 64.0, True, -64, 10**300, [64])),
        *({**good, "norm_eps": value} for value in (0, float("nan"), float("inf"), 10**400, "x", None)),
        *({**good, "ffn_dim_multiplier": value} for value in (1e300, 1e-300)),
        {**good, "use_scaled_rope": 1},
        {**good, "rope_scaling_factor": -1},
        {**good, "rope_scaling": {"factor": 2.0, "extra": 1}},
        {**good, "rope_scaling": [1]},
        {**good, "rope_scaling": {"kind": "ntk"}},
        {**good, "rope_scaling": {"kind": "longrope"}},
        {**good, "rope_scaling": {"kind": "longrope", "short_factor": [1.0, 1.0]}},
        {**good, "rope_scaling": {"kind": "yarn", "truncate": 1}},
        {**good, "rope_scaling": {"kind": "linear", "attention_factor": 0}},
        *({**good, "attn_head_dim": value} for value in (7, 0, 8.0, 2**31, "8")),
        *({**good, "rotary_dim": value} for value in (3, 10**6, 0)),
        *({**good, "sliding_window": value} for value in (0, -1, True, "8")),
        *({**good, "first_sliding_layer": value} for value in (-1, 1.0, None)),
        {**good, "qkv_bias": 1},
        {**good, "qk_norm": "yes"},
        {**good, "rope_scaling": {"factor": 2.0}, "use_scaled_rope": True},
        {**good, "lora_args": {}},
        {**good, "tie_word_embeddings": 1},
        {**good, "vocab_size": 0},
        {**good, "vocab_size": -1.0},
        {**good, "n_kv_heads": 3},
    ]
    texts = [*map(json.dumps, wrong), "[]", "", "{", "[" * 100000, '{"dim": 1, "dim": 1}', '"\ud800"', "1" * 5000]
    for text in texts:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        with pytest.raises(CheckpointError, match=r"params\.json"):
            open_checkpoint(directory)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"params\.json is not readable"):
        open_checkpoint(directory)


# Safetensors and indexes


def _break_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 0x40
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _transpose(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if "mlp" in name or "feed_forward" in name)
    save_file({**tensors, name: tensors[name].t().contiguous()}, path, metadata=metadata)


def _drop(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_header, "is not a safetensors file, or a damaged one"),
        (_truncate, "is not a safetensors file, or a damaged one"),
        (_transpose, r"1 of another shape: layers\.\d\.feed_forward\.w\d\.weight \(model\.layers\..*instead of"),
        (_drop, r"1 missing: .*\(model\.|says that tensor model\..* is in no file"),
        (Path.unlink, r"holds no checkpoint|is missing: model\.safetensors\.index\.json says"),
    ],
)
def test_damaged_safetensors_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str, shards: int
) -> None:
    """Whole and sharded; the file is named."""
    directory = save_hf(tmp_path / "hf", shards=shards)
    path = sorted(directory.glob("*.safetensors"))[-1]
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(directory)
    assert path.name in str(error.value) or damage is Path.unlink


def test_all_shards_missing(tmp_path: Path) -> None:
    """An index without any of its files is still Hugging Face's format, and says what is missing."""
    directory = save_hf(tmp_path / "hf", shards=3)
    for path in directory.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(
        CheckpointError, match=r"model-0000\d-of-00003\.safetensors is missing: model\.safetensors\.index\.json says"
    ):
        open_checkpoint(directory)


def test_an_index_must_tell_the_truth(tmp_path: Path) -> None:
    """Files that are not there or lie elsewhere, tensors that are in no file, in another or in two, and what is no
    index at all.
    """
    directory = save_hf(tmp_path / "hf", shards=3)
    path = directory / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    weight_map = good["weight_map"]
    first = next(iter(weight_map))
    last = next(name for name in weight_map if weight_map[name] != weight_map[first])
    cases = [
        (
            {**weight_map, first: "model-00009-of-00003.safetensors"},
            r"model-00009-of-00003\.safetensors is missing: .*holds " + first,
        ),
        ({**weight_map, first: f"../hf/{weight_map[first]}"}, "is missing"),
        ({**weight_map, first: "\0"}, "is missing"),
        (
            {**weight_map, first: weight_map[last]},
            f"says that tensor {first} is in {weight_map[last]}, but it is in {weight_map[first]}",
        ),
        (
            {**weight_map, "model.extra": weight_map[last]},
            "says that tensor model.extra is in .*, but it is in no file",
        ),
        ({name: file for name, file in weight_map.items() if name != first}, f"{first} is in no file, but it is in"),
        ({**weight_map, first: 3}, "no usable weight_map"),
        ({}, "no usable weight_map"),
        ([], "no usable weight_map"),
    ]
    for changed, message in cases:
        path.write_text(json.dumps({**good, "weight_map": changed}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(directory)
    path.write_text(json.dumps(good))
    twice = load_file(directory / weight_map[last]) | {first: load_file(directory / weight_map[first])[first]}
    save_file(twice, directory / weight_map[last])
    with pytest.raises(CheckpointError, match=f"tensor {first} is in .*, too, expected every tensor once"):
        open_checkpoint(directory)


def test_tensors_by_foreign_names_are_not_taken(tmp_path: Path) -> None:
    """Meta's names have no meaning in Hugging Face's files."""
    directory = save_hf(tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors")
    tensors["norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"1 missing: norm\.weight \(model\.norm\.weight\); 1 not known to this model: norm\.weight",
    ):
        open_checkpoint(directory)


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    """By name and dtype, also where a type is not torch's."""
    directory = save_hf(tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors")
    for dtype, said in (
        (torch.int8, r"1 not floating point: norm\.weight \(model\.norm\.weight\) I8"),
        (torch.float8_e4m3fn, r"1 of a type that is not computed with: norm\.weight \(model\.norm\.weight\) F8_E4M3"),
    ):
        save_file(
            {**tensors, "model.norm.weight": tensors["model.norm.weight"].to(dtype)}, directory / "model.safetensors"
        )
        with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{said}"):
            open_checkpoint(directory)


# Our own format


@pytest.fixture
def native(tmp_path: Path) -> Path:
    write_meta(tmp_path / "src", TINY, [random_weights(TINY)])
    convert(tmp_path / "src", tmp_path / "native", max_shard_size="200KB")
    return tmp_path / "native"


def test_our_format_says_what_it_is(native: Path) -> None:
    """The metadata header, Meta's names, and Hugging Face's index."""
    files = sorted(native.glob("*.safetensors"))
    assert len(files) > 1
    with safe_open(files[0], framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) <= set(random_weights(TINY))
    assert {name: metadata[name] for name in ("format", "version", "source", "dtype")} == {
        "format": "llama-xla",
        "version": "1",
        "source": "meta",
        "dtype": "float32",
    }
    index = json.loads((native / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in random_weights(TINY).values())
    assert_equal(open_checkpoint(native).tensors(), random_weights(TINY))


def test_our_format_refuses_what_was_changed(native: Path, tmp_path: Path) -> None:
    """params.json, a header that still makes sense, a shard of another model, a newer version, a shard that is not
    ours.
    """
    shutil.copytree(native, tmp_path / "copy")
    edit_json(native / "params.json", norm_eps=2e-5)
    with pytest.raises(CheckpointError, match=r"belongs to another params\.json"):
        open_checkpoint(native)
    shutil.rmtree(native)

    def changed(edit: Callable[[Path], None], message: str) -> None:
        shutil.copytree(tmp_path / "copy", native)
        path = sorted(native.glob("*.safetensors"))[1]
        edit(path)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(native)
        shutil.rmtree(native)

    def swap_names(path: Path) -> None:
        content = path.read_bytes()
        one, other = re.findall(rb'"(layers\.\d\.feed_forward\.w[13]\.weight)"', content)[:2]
        path.write_bytes(content.replace(one, b"?" * len(one)).replace(other, one).replace(b"?" * len(one), other))

    def another_model(path: Path) -> None:
        args = ModelArgs(**{**TINY.to_params(), "norm_eps": 1e-6})
        write_meta(tmp_path / "src2", args, [random_weights(args, seed=4)])
        convert(tmp_path / "src2", tmp_path / "native2", max_shard_size="200KB")
        shutil.copy(tmp_path / "native2" / path.name, path)

    changed(swap_names, "the header does not match its digest")
    changed(another_model, "belongs to another params.json")
    changed(
        lambda path: path.write_bytes(path.read_bytes().replace(b'"version": "1"', b'"version": "3"')),
        "got format version 3",
    )
    changed(lambda path: save_file(load_file(path), path), "holds several formats")


# Recognition, values, defaults, settings


def test_a_directory_must_hold_one_format(tmp_path: Path, native: Path) -> None:
    """None, several, and no directory at all; what was found is said. Files that transformers' trainer leaves are no
    second format.
    """
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint \(found: nothing\)"):
        open_checkpoint(empty)
    (empty / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"found: params\.json"):
        open_checkpoint(empty)
    directory = save_hf(tmp_path / "hf")
    torch.save({"state": torch.zeros(1)}, directory / "rng_state.pth")
    assert open_checkpoint(directory).format == "huggingface"
    shutil.copy(tmp_path / "src" / "consolidated.00.pth", directory)
    with pytest.raises(
        CheckpointError, match=r"several formats \(meta: consolidated\.00\.pth; huggingface: model\.safetensors\)"
    ):
        open_checkpoint(directory)
    shutil.copy(tmp_path / "src" / "consolidated.00.pth", native)
    with pytest.raises(CheckpointError, match=r"several formats \(meta: .*; llama-xla: .*model-00001"):
        open_checkpoint(native)


def test_a_whole_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    """Which of the two is meant cannot be known."""
    directory = save_hf(tmp_path / "hf", shards=3)
    save_file({"a": torch.zeros(1)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        open_checkpoint(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, dtype: torch.dtype, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    """With file and tensor, unless they are allowed; then the log says it."""
    weights = random_weights(TINY, dtype=dtype)
    weights["layers.1.attention.wo.weight"][63, 63] = value
    source = open_checkpoint(write_meta(tmp_path / "m", TINY, [weights]))
    where = r"consolidated\.00\.pth: tensor layers\.1\.attention\.wo\.weight holds NaN or infinity"
    with pytest.raises(CheckpointError, match=where):
        dict(checked(source))
    with caplog.at_level(logging.WARNING, "llama"):
        assert len(dict(checked(source, allow_nan=True))) == len(weights)
    assert re.search(where, caplog.text)


@pytest.mark.slow
@given(st.integers(1, 300), st.data())
@settings(deadline=None, max_examples=200)
def test_one_number_that_is_not_finite_is_found_anywhere(length: int, data: st.DataObject) -> None:
    """In every dtype, at every place of vectorised loops and their ends."""
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    tensor = torch.linspace(-1, 1, length).to(dtype)
    assert is_finite(tensor)
    tensor[data.draw(st.integers(0, length - 1))] = data.draw(
        st.sampled_from([float("nan"), float("inf"), -float("inf")])
    )
    assert not is_finite(tensor)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5], "do_sample": True},
            GenerationDefaults(0.6, 0.9, (2, 5)),
        ),
        ({"eos_token_id": 2, "max_length": 4096}, GenerationDefaults(stop_ids=(2,))),
        ({"temperature": None, "eos_token_id": None, "top_p": 1}, GenerationDefaults(top_p=1)),
        ({"do_sample": False, "temperature": 0.7}, GenerationDefaults(temperature=0.0)),
        ({}, GenerationDefaults()),
        (None, GenerationDefaults()),
    ],
)
def test_defaults_come_from_generation_config(
    tmp_path: Path, content: dict[str, Any] | None, expected: GenerationDefaults
) -> None:
    """In every format; convert and reshard carry the file along."""
    directory = write_meta(tmp_path / "m", TINY, [random_weights(TINY)])
    if content is not None:
        (directory / "generation_config.json").write_text(json.dumps(content))
    convert(directory, tmp_path / "native")
    for each in (directory, tmp_path / "native"):
        assert open_checkpoint(each).defaults == expected


@pytest.mark.parametrize(
    "content", [{"temperature": -1}, {"top_p": 1.5}, {"top_p": "x"}, {"eos_token_id": [-1]}, {"temperature": True}]
)
def test_impossible_defaults_are_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    """The file is named."""
    directory = write_meta(tmp_path / "m", TINY, [random_weights(TINY)])
    (directory / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: "):
        open_checkpoint(directory)


positive = st.floats(1e-9, 1e9)
ropes = st.none() | st.builds(
    RopeScaling,
    factor=st.sampled_from([8.0, 32.0]) | positive,
    low_freq_factor=st.sampled_from([1.0]) | st.floats(0.1, 2),
    high_freq_factor=st.sampled_from([4.0]) | st.floats(3, 9),
    original_max_seq_len=st.sampled_from([8192]) | st.integers(1, 10**6),
    kind=st.sampled_from(["llama3", "linear"]),
)


@given(
    heads=st.integers(1, 8),
    groups=st.integers(1, 4),
    layers=st.integers(1, 100),
    vocab=st.just(-1) | st.integers(1, 200000),
    numbers=st.tuples(positive, positive),
    optional=st.fixed_dictionaries(
        {},
        optional={
            "ffn_dim_multiplier": st.floats(0.5, 4),
            "ffn_hidden_dim": st.integers(1, 9999),
            "rope_scaling": ropes,
        },
    ),
    tied=st.booleans(),
    grouped=st.booleans(),
)
def test_params_round_trip(
    heads: int,
    groups: int,
    layers: int,
    vocab: int,
    numbers: tuple[float, float],
    optional: dict[str, Any],
    tied: bool,
    grouped: bool,
) -> None:
    """from_params reads what to_params writes, through JSON; and Meta's own keys suffice for Meta's own shapes."""
    n_heads = heads * groups
    args = ModelArgs(
        dim=n_heads * 2,
        n_layers=layers,
        n_heads=n_heads,
        n_kv_heads=heads if grouped else None,
        vocab_size=vocab,
        norm_eps=numbers[0],
        rope_theta=numbers[1],
        tie_word_embeddings=tied,
        **optional,
    )
    params = args.to_params()
    assert ModelArgs.from_params(json.loads(json.dumps(params))) == args


def test_metas_own_params_come_back_as_they_were() -> None:
    """The params.json of Llama 2 70B, 3.1 8B and 3.2 1B: to_params says the same in the same words."""
    shipped: list[dict[str, Any]] = [
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80}
        | {"norm_eps": 1e-05, "vocab_size": -1, "rope_theta": 10000.0},
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024}
        | {"ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True},
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256}
        | {
            "ffn_dim_multiplier": 1.5,
            "norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "use_scaled_rope": True,
            "rope_scaling_factor": 32.0,
        },
    ]
    for params in shipped:
        assert ModelArgs.from_params(params).to_params() == params
    assert [ModelArgs.from_params(params).hidden_dim for params in shipped] == [28672, 14336, 8192]


def test_hugging_face_widths_are_said_in_metas_words(tmp_path: Path) -> None:
    """Any feed-forward width survives in keys that Meta's code knows, so that a resharded checkpoint is one for it,
    too.
    """
    directory = save_hf(tmp_path / "hf")
    for width in (1, 31, 64, 170, 171, 172, 11008):
        edit_json(directory / "config.json", intermediate_size=width)
        try:
            args = open_checkpoint(directory).args
        except CheckpointError as error:
            shape = re.search(r"w1\.weight .*? instead of \[(\d+), 64\]", str(error))
            assert shape is not None
            assert int(shape.group(1)) == width
        else:
            assert width == 144
            assert args.ffn_hidden_dim is None


def test_scaling_out_of_its_range_is_refused() -> None:
    """Where a RopeScaling is made, not when the model runs."""
    for wrong in (
        {"factor": 0.0},
        {"low_freq_factor": 4.0},
        {"original_max_seq_len": 0},
        {"kind": "ntk"},
        {"kind": "longrope"},
        {"kind": "yarn", "short_factor": (1.0,)},
        {"kind": "yarn", "beta_fast": 1.0},
        {"factor": float("nan")},
    ):
        with pytest.raises(ConfigError, match="rope_scaling"):
            RopeScaling(**wrong)  # type: ignore[arg-type]


def test_shards_in_metas_names_are_numbered(tmp_path: Path) -> None:
    """One file of any name is a checkpoint of one file; several need their numbers."""
    directory = write_meta(tmp_path / "m", TINY, [random_weights(TINY)])
    (directory / "consolidated.00.pth").rename(directory / "demo.pth")
    assert_equal(MetaSource(directory).tensors(), random_weights(TINY))
    shutil.copy(directory / "demo.pth", directory / "other.pth")
    with pytest.raises(CheckpointError, match=r"several \.pth files \(demo\.pth, other\.pth\)"):
        open_checkpoint(directory)
