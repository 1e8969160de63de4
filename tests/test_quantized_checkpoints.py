"""Weights that other programs quantised, in tiny checkpoints written here by the formats' own descriptions: what is
kept is kept to the last bit, what is widened is exact, and everything else is refused by name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from checkpoint_files import edit_json, logits_of, random_weights
from commands import Run
from gguf import GGMLQuantizationType as Kind
from hf_files import halves_apart
from safetensors.torch import load_file, save_file

from llama import EngineConfig, ModelArgs, checkpoint, planning
from llama.checkpoint import open_checkpoint
from llama.checkpoint.names import to_hugging_face
from llama.checkpoint.quantize import dequantize, in_format
from llama.checkpoint.reshard import convert, reshard
from llama.compiled.memory import dtypes_for, weight_bytes
from llama.compiled.model import Transformer
from llama.errors import CheckpointError
from llama.quantization import REFUSED
from llama.settings import read_planned
from llama.storage import Storage, WeightFormat, choose_storage

ARGS = ModelArgs(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320, multiple_of=256)
IDS = torch.arange(14).unsqueeze(0)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": ARGS.vocab_size,
    "hidden_size": ARGS.dim,
    "intermediate_size": ARGS.hidden_dim,
    "num_hidden_layers": ARGS.n_layers,
    "num_attention_heads": ARGS.n_heads,
    "num_key_value_heads": ARGS.kv_heads,
    "rms_norm_eps": ARGS.norm_eps,
    "rope_theta": ARGS.rope_theta,
    "max_position_embeddings": 512,
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
}
CONFIGS: dict[str, dict[str, Any]] = {"gptq": GPTQ, "awq": AWQ, "compressed-tensors": COMPRESSED}


class Layer:
    """A quantised linear layer: integers 0 to 15 [out, in], zero points [out, groups] and float16 scales, at random."""

    def __init__(self, seed: int, out: int, width: int, group: int, zeros: bool) -> None:
        chooser = np.random.default_rng(seed)
        self.group = width if group == -1 else group
        groups = width // self.group
        self.numbers = chooser.integers(0, 16, (out, width))
        self.scales = chooser.uniform(0.002, 0.02, (out, groups)).astype(np.float16)
        self.zeros = chooser.integers(1, 16, (out, groups)) if zeros else np.full((out, groups), 8)

    def exact(self) -> torch.Tensor:
        """The numbers that it stands for, in float64 and without any packing."""
        spread = [np.repeat(each, self.group, axis=1).astype(np.float64) for each in (self.zeros, self.scales)]
        return torch.from_numpy((self.numbers - spread[0]) * spread[1])


def words(eights: np.ndarray, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> torch.Tensor:
    """Integers [..., 8] into int32 words, by Python's own arithmetic: number ``order[i]`` into bits 4 i and on."""
    flat = eights.reshape(-1, 8).tolist()
    made = [sum((row[place] & 15) << (4 * i) for i, place in enumerate(order)) for row in flat]
    signed = [word - (1 << 32) if word >= 1 << 31 else word for word in made]
    return torch.tensor(signed, dtype=torch.int32).reshape(eights.shape[:-1])


def as_gptq(layer: Layer, added: int = 1) -> dict[str, torch.Tensor]:
    """AutoGPTQ's layout: eight rows of the transposed weight in a word; zero points less ``added``."""
    width = layer.numbers.shape[1]
    columns = layer.numbers.T.reshape(width // 8, 8, -1).transpose(0, 2, 1)  # [in / 8, out, 8]
    zeros = layer.zeros.T.reshape(layer.zeros.shape[1], -1, 8) - added
    return {
        "qweight": words(columns),
        "qzeros": words(zeros),
        "scales": torch.from_numpy(layer.scales.T.copy()),
        "g_idx": torch.arange(width, dtype=torch.int32) // layer.group,
    }


def as_awq(layer: Layer) -> dict[str, torch.Tensor]:
    """AutoAWQ's gemm layout: eight output channels in a word, in its order."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    width = layer.numbers.shape[1]
    return {
        "qweight": words(layer.numbers.T.reshape(width, -1, 8), order),
        "qzeros": words(layer.zeros.T.reshape(layer.zeros.shape[1], -1, 8), order),
        "scales": torch.from_numpy(layer.scales.T.copy()),
    }


def as_compressed(layer: Layer) -> dict[str, torch.Tensor]:
    """compressed-tensors' pack-quantized layout: eight of a row in a word."""
    out, width = layer.numbers.shape
    return {
        "weight_packed": words(layer.numbers.reshape(out, -1, 8)),
        "weight_scale": torch.from_numpy(layer.scales),
        "weight_shape": torch.tensor([out, width]),
    }


WRITERS: dict[str, Callable[[Layer], dict[str, torch.Tensor]]] = {
    "gptq": as_gptq,
    "gptq_v2": lambda layer: as_gptq(layer, added=0),
    "awq": as_awq,
    "compressed-tensors": as_compressed,
}


def write(
    directory: Path, method: str, group: int = 64, zeros: bool = False, args: ModelArgs = ARGS, **changes: Any
) -> dict[str, Layer]:
    """Write a model whose layers are quantised, and return them by Meta's names; the rest is float16.

    Args:
        group: -1 for one a row.
        zeros: zero points at random.
        changes: of the quantization_config.
    """
    directory.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, Layer] = {}
    for number, (name, weight) in enumerate(random_weights(args, dtype=torch.float16).items()):
        theirs = str(to_hugging_face(name))
        if weight.dim() < 2 or not name.startswith("layers."):
            tensors[theirs] = weight
            continue
        layer = layers[name] = Layer(number, *weight.shape, group, zeros)
        stored = layer
        heads = {"wq": args.n_heads, "wk": args.kv_heads}.get(name.split(".")[3])
        if heads is not None:  # Hugging Face's order of rows
            stored = Layer(number, *weight.shape, group, zeros)
            for part in ("numbers", "scales", "zeros"):
                rows = torch.from_numpy(getattr(layer, part).astype(np.float64))
                turned = halves_apart(rows, heads).numpy()
                setattr(stored, part, turned.astype(getattr(layer, part).dtype))
        packed = WRITERS[method](stored)
        tensors |= {f"{theirs.removesuffix('.weight')}.{suffix}": part for suffix, part in packed.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    quantization = {**CONFIGS[method.removesuffix("_v2")], "group_size": group, **changes}
    if method == "compressed-tensors":
        scheme = (
            {**WEIGHTS, "group_size": group} if group > 0 else {**WEIGHTS, "strategy": "channel", "group_size": None}
        )
        quantization = {
            **COMPRESSED,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
            **changes,
        }
    (directory / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": quantization}))
    return layers


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "compressed-tensors"])
def test_symmetric_weights_are_kept(tmp_path: Path, method: str, group: int) -> None:
    """Every integer and every scale is the one that was written; a row's scale becomes that of each of its groups."""
    more = {"checkpoint_format": "gptq_v2"} if method == "gptq_v2" else {}
    layers = write(tmp_path / "model", method, group, **more)
    source = open_checkpoint(tmp_path / "model")
    assert source.is_quantised
    for name, layer in layers.items():
        ours = 128 if group == -1 else group
        assert source.infos()[name].dtype == torch.uint8
        scale = source.read(name.replace(".weight", ".scale"))
        assert scale.dtype == torch.float16
        assert scale.shape == (layer.numbers.shape[0], layer.numbers.shape[1] // ours)
        assert torch.equal(dequantize(source.read(name), scale).double(), layer.exact()), name
    stored = source.stored
    assert set(stored.values()) == {WeightFormat("int4", 128 if group == -1 else group)}
    assert "output.weight" not in stored
    assert read_planned(tmp_path / "model").stored == stored


@pytest.mark.parametrize(("method", "zeros"), [("awq", True), ("awq", False), ("gptq", True), ("gptq_v2", True)])
@pytest.mark.parametrize("group", [64, -1])
def test_weights_with_zero_points_are_widened_exactly(
    tmp_path: Path, method: str, zeros: bool, group: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In float32 nothing is lost; rounding them to int4 is said."""
    more: dict[str, Any] = {} if method == "awq" else {"sym": False}
    more |= {"checkpoint_format": "gptq_v2"} if method == "gptq_v2" else {}
    layers = write(tmp_path / "model", method, group, zeros, **more)
    source = open_checkpoint(tmp_path / "model")
    assert not source.is_quantised
    assert not read_planned(tmp_path / "model").stored
    for name, layer in layers.items():
        assert torch.equal(source.read(name).double(), layer.exact()), name
    with caplog.at_level(logging.WARNING, "llama"):
        for dtype in ("auto", "float32"):
            source.log_losses(choose_storage(dtype, source.stored))
        assert not caplog.records
        convert(tmp_path / "model", tmp_path / "int4", "int4")
    label = "AWQ" if method == "awq" else "asymmetric GPTQ"
    assert f"weights in {label} are rounded again, to int4 in groups of 128" in caplog.text
    assert open_checkpoint(tmp_path / "int4").stored["layers.{}.attention.wo.weight"] == WeightFormat("int4", 128)


def test_the_first_format_of_gptq_lacks_one() -> None:
    """Its zero points are stored less 1, so symmetric ones are 7: read as the second format's, every number would be
    off by a scale.
    """
    layer = Layer(0, 8, 64, 64, zeros=False)
    first, second = (as_gptq(layer, added)["qzeros"] for added in (1, 0))
    assert first.flatten().tolist() == [0x77777777]
    assert second.flatten().tolist() == [0x88888888 - (1 << 32)]


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "awq"])
def test_the_model_computes_with_them(tmp_path: Path, method: str) -> None:
    """Kept, widened, converted: the logits are those of the numbers that the file stands for."""
    layers = write(tmp_path / "model", method, zeros=method == "awq")
    source = open_checkpoint(tmp_path / "model")
    weights = {
        name: layers[name].exact().float() if name in layers else source.read(name) for name in random_weights(ARGS)
    }
    with torch.device("meta"):
        model = Transformer(ARGS, 14)
    for _ in checkpoint.place(model, weights.items(), torch.float32, torch.device("cpu")):
        pass
    expected = model.head(model(IDS, torch.arange(14).unsqueeze(0)))
    assert torch.equal(logits_of(source, IDS), expected)
    storage, _ = dtypes_for(EngineConfig(), on_cpu=True, stored=source.stored)
    with torch.device("meta"):
        kept = Transformer(ARGS, 14)
    loaded = sum(checkpoint.place(kept, checkpoint.checked(source), storage, torch.device("cpu")))
    found = kept.head(kept(IDS, torch.arange(14).unsqueeze(0)))
    assert (found - expected).abs().max() < 1e-4
    if method != "awq":
        assert kept.layers[0].attention.wq.weight.dtype == torch.uint8
        assert storage.label == "int4"
        assert loaded <= weight_bytes(ARGS, storage)  # which takes the embedding for float32
    convert(tmp_path / "model", tmp_path / "native")
    assert torch.equal(logits_of(open_checkpoint(tmp_path / "native"), IDS), expected)
    reshard(tmp_path / "model", tmp_path / "meta", 2)
    assert torch.equal(logits_of(open_checkpoint(tmp_path / "meta"), IDS), expected)


def test_some_layers_may_be_wide(tmp_path: Path) -> None:
    """modules_to_not_convert and ignore leave layers in floating point: then all layers' weights of that name are
    widened, because the layers are one loop.
    """
    layers = write(tmp_path / "model", "gptq")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    layer = "model.layers.1.mlp.down_proj"
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        tensors.pop(f"{layer}.{suffix}")
    tensors[f"{layer}.weight"] = random_weights(ARGS, dtype=torch.float16)["layers.1.feed_forward.w2.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_checkpoint(tmp_path / "model")
    assert "layers.{}.feed_forward.w2.weight" not in source.stored
    with torch.device("meta"):
        model = Transformer(ARGS, 14)
    storage = choose_storage("auto", source.stored)
    for _ in checkpoint.place(model, checkpoint.checked(source), storage, torch.device("cpu")):
        pass
    assert [block.feed_forward.w2.weight.dtype for block in model.layers] == [torch.float32] * 2
    exact = layers["layers.0.feed_forward.w2.weight"].exact()
    assert torch.equal(model.layers[0].feed_forward.w2.weight.double(), exact)


def test_fused_layers_of_phi_3(tmp_path: Path) -> None:
    """The rows of a packed qkv_proj and gate_up_proj are those of the weights in them."""
    layers = write(tmp_path / "model", "gptq")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    fused = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
    for number in range(ARGS.n_layers):
        for name, parts in fused.items():
            room = f"model.layers.{number}.{name.split('.')[0]}"
            for suffix in ("qweight", "qzeros", "scales"):
                joined = [tensors.pop(f"{room}.{part}.{suffix}") for part in parts]
                tensors[f"model.layers.{number}.{name}.{suffix}"] = torch.cat(joined, dim=1)
            for part in parts:
                order = tensors.pop(f"{room}.{part}.g_idx")
            tensors[f"model.layers.{number}.{name}.g_idx"] = order
    save_file(tensors, path, metadata={"format": "pt"})
    edit_json(tmp_path / "model" / "config.json", architectures=["Phi3ForCausalLM"], sliding_window=512)
    source = open_checkpoint(tmp_path / "model")
    for name, layer in layers.items():
        scale = source.read(name.replace(".weight", ".scale"))
        assert torch.equal(dequantize(source.read(name), scale).double(), layer.exact()), name


def test_compressed_by_its_own_package(tmp_path: Path) -> None:
    """What compressed-tensors packs is what we unpack."""
    package = pytest.importorskip("compressed_tensors.compressors")
    layers = write(tmp_path / "model", "compressed-tensors")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name, layer in layers.items():
        if ".wq." in name or ".wk." in name:  # whose rows are turned
            continue
        theirs = str(to_hugging_face(name)).removesuffix(".weight")
        packed = package.pack_to_int32(torch.from_numpy(layer.numbers - 8).to(torch.int8), 4)
        assert torch.equal(tensors[f"{theirs}.weight_packed"], packed)


def test_older_gptq_checkpoints(tmp_path: Path) -> None:
    """AutoGPTQ kept its settings in a file of their own, and wrote a bias of zeros for every layer."""
    layers = write(tmp_path / "model", "gptq")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    settings = config.pop("quantization_config")
    settings.pop("quant_method")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "quantize_config.json").write_text(json.dumps(settings))
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    for name, layer in layers.items():
        theirs = str(to_hugging_face(name)).replace(".weight", ".bias")
        tensors[theirs] = torch.zeros(layer.numbers.shape[0], dtype=torch.float16)
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_checkpoint(tmp_path / "model")
    for name, layer in layers.items():
        scale = source.read(name.replace(".weight", ".scale"))
        assert torch.equal(dequantize(source.read(name), scale).double(), layer.exact()), name
    tensors["model.layers.1.mlp.up_proj.bias"][3] = 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"up_proj .gptq.: it has a bias that is not zero"):
        source.read("layers.1.feed_forward.w3.weight")
    tensors["model.spice.bias"] = torch.zeros(3)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not known to this model: model\.spice\.bias"):
        open_checkpoint(tmp_path / "model")


# What is refused


def changed(given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**given, **changes}.items() if value != "gone"}


def scheme(**changes: Any) -> dict[str, Any]:
    return {**COMPRESSED, "config_groups": {"group_0": {"targets": ["Linear"], "weights": changed(WEIGHTS, **changes)}}}


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    **{method: ({"quant_method": method}, f"quant_method is '{method}'") for method in REFUSED},
    "an unknown method": ({"quant_method": "spice"}, "quant_method is 'spice'"),
    "no method": ({"bits": 4}, "quant_method is 'None'"),
    "a text": ("gptq", "quantization_config is gptq, expected an object"),  # type: ignore[dict-item]
    "GPTQ in 8 bits": (changed(GPTQ, bits=8), "bits of gptq is '8'"),
    "GPTQ in 3 bits": (changed(GPTQ, bits=3), "bits of gptq is '3'"),
    "GPTQ in text": (changed(GPTQ, bits="4"), "bits of gptq is '4'"),
    "GPTQ with act-order": (changed(GPTQ, desc_act=True), "desc_act of gptq is 'True'"),
    "Marlin": (changed(GPTQ, checkpoint_format="marlin"), "checkpoint_format of gptq is 'marlin'"),
    "Marlin, older": (changed(GPTQ, is_marlin_format=True), "is_marlin_format of gptq is 'True'"),
    "GPTQ in bytes": (changed(GPTQ, pack_dtype="int8"), "pack_dtype of gptq is 'int8'"),
    "GPTQ of unknown zeros": (changed(GPTQ, sym="maybe"), "sym of gptq is 'maybe'"),
    "AWQ in 8 bits": (changed(AWQ, bits=8), "bits of awq is '8'"),
    "AWQ gemv": (changed(AWQ, version="gemv"), "version of awq is 'gemv'"),
    "AWQ without zero points": (changed(AWQ, zero_point=False), "zero_point of awq is 'False'"),
    "int-quantized": (changed(COMPRESSED, format="int-quantized"), "format of compressed-tensors is 'int-quantized'"),
    "float-quantized": (changed(COMPRESSED, format="float-quantized"), "format of compressed-tensors is 'float-"),
    "nvfp4": (changed(COMPRESSED, format="nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
    "sparse": (changed(COMPRESSED, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    "a narrow cache": (changed(COMPRESSED, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "rotations": (changed(COMPRESSED, transform_config={"config_groups": {}}), "transform_config"),
    "no groups": (changed(COMPRESSED, config_groups={}), "config_groups"),
    "groups without weights": (changed(COMPRESSED, config_groups={"group_0": {}}), "config_groups group_0: weights"),
    "8 bits": (scheme(num_bits=8), "num_bits is '8'"),
    "zero points": (scheme(symmetric=False), "symmetric is 'False'"),
    "float4": (scheme(type="float"), "type is 'float'"),
    "blocks": (scheme(strategy="block"), "strategy is 'block'"),
    "act-order": (scheme(actorder="group"), "actorder is 'group'"),
    "activations": (
        changed(COMPRESSED, config_groups={"g": {"weights": WEIGHTS, "input_activations": {"num_bits": 8}}}),
        "input_activations is",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_other_quantisation_is_refused_by_name(tmp_path: Path, case: str) -> None:
    """The message names what was found, what is read, and the cure."""
    write(tmp_path / "model", "gptq")
    config, message = REFUSALS[case]
    edit_json(tmp_path / "model" / "config.json", quantization_config=config)
    for read in (open_checkpoint, read_planned):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path / "model")
        assert message in str(caught.value)
        assert case == "a text" or "expected GPTQ in 4 bits without act-order, AWQ in 4 bits" in str(caught.value)


def test_two_declarations_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model", "compressed-tensors")
    edit_json(tmp_path / "model" / "config.json", compression_config=COMPRESSED)
    with pytest.raises(CheckpointError, match="got both quantization_config and compression_config"):
        open_checkpoint(tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", quantization_config=None)
    assert open_checkpoint(tmp_path / "model").is_quantised


Damage = Callable[[dict[str, torch.Tensor]], Any]
QKV = "model.layers.0.self_attn.v_proj"
DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "no scales": (
        "gptq",
        lambda t: t.pop(f"{QKV}.scales"),
        "tensor scales is missing, expected qweight, qzeros",
    ),
    "no zero points": ("awq", lambda t: t.pop(f"{QKV}.qzeros"), "tensor qzeros is missing"),
    "no shape": ("compressed-tensors", lambda t: t.pop(f"{QKV}.weight_shape"), "tensor weight_shape is missing"),
    "no weight at all": (
        "gptq",
        lambda t: [t.pop(f"{QKV}.{suffix}") for suffix in ("qweight", "qzeros", "scales", "g_idx")],
        "1 missing: layers.0.attention.wv.weight",
    ),
    "scales of another width": (
        "gptq",
        lambda t: t.update({f"{QKV}.scales": t[f"{QKV}.scales"][:, :-8].contiguous()}),
        "the shapes contradict each other: scales",
    ),
    "three groups": (
        "gptq",
        lambda t: t.update({f"{QKV}.{s}": t[f"{QKV}.{s}"][:1].repeat(3, 1) for s in ("scales", "qzeros")}),
        "3 groups in rows of 128",
    ),
    "groups of 16": (
        "gptq",
        lambda t: t.update({f"{QKV}.{s}": t[f"{QKV}.{s}"][:1].repeat(8, 1) for s in ("scales", "qzeros")}),
        "groups of 16 are not read, expected a multiple of 32",
    ),
    "scales of integers": (
        "gptq",
        lambda t: t.update({f"{QKV}.scales": t[f"{QKV}.scales"].to(torch.int32)}),
        "scales is torch.int32",
    ),
    "words of 64 bits": (
        "gptq",
        lambda t: t.update({f"{QKV}.qweight": t[f"{QKV}.qweight"].long()}),
        "qweight is torch.int64",
    ),
    "another shape": (
        "compressed-tensors",
        lambda t: t.update({f"{QKV}.weight_shape": torch.tensor([64, 120])}),
        "weight_shape is [64, 120]",
    ),
    "zero points beside": (
        "compressed-tensors",
        lambda t: t.update({f"{QKV}.weight_zero_point": torch.zeros(8, 2, dtype=torch.int32)}),
        "not known to this model",
    ),
    "columns in another order": (
        "compressed-tensors",
        lambda t: t.update({f"{QKV}.weight_g_idx": torch.zeros(128, dtype=torch.int32)}),
        "not known to this model",
    ),
    "a layer of another model": (
        "gptq",
        lambda t: t.update({f"model.spice.{s}": t[f"{QKV}.{s}"].clone() for s in ("qweight", "qzeros", "scales")}),
        "model.spice.weight (no weight of LLaMA's)",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_layers_are_refused(tmp_path: Path, case: str) -> None:
    """When it is opened, by the headers."""
    method, damage, message = DAMAGES[case]
    write(tmp_path / "model", method)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "model")
    assert message in str(caught.value)


def test_what_only_the_weights_show(tmp_path: Path) -> None:
    """Zero points under sym true, and scattered columns under desc_act false, are refused when they are read."""
    write(tmp_path / "zeros", "gptq", zeros=True)
    source = open_checkpoint(tmp_path / "zeros")
    with pytest.raises(CheckpointError, match="says sym true, but there are zero points"):
        source.read("layers.0.attention.wv.weight")
    write(tmp_path / "order", "gptq")
    path = tmp_path / "order" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{QKV}.g_idx"] = tensors[f"{QKV}.g_idx"].flip(0)
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_checkpoint(tmp_path / "order")
    source.read("layers.1.attention.wv.weight")
    with pytest.raises(CheckpointError, match=r"v_proj \(gptq\): g_idx says .*act-order"):
        source.read("layers.0.attention.wv.weight")
    write(tmp_path / "nan", "compressed-tensors")
    path = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{QKV}.weight_scale"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"wv\.scale \(.*v_proj\) holds NaN or infinity"):
        list(checkpoint.checked(open_checkpoint(tmp_path / "nan")))


def test_a_declaration_without_packed_layers(tmp_path: Path) -> None:
    """Plain weights under a quantization_config: they are not read as if nothing had been said."""
    write(tmp_path / "model", "gptq")
    tensors = {str(to_hugging_face(name)): weight for name, weight in random_weights(ARGS, dtype=torch.float16).items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="quantization_config says gptq, but no layer has its tensors"):
        open_checkpoint(tmp_path / "model")


# GGUF

KEPT = [(Kind.Q4_0, WeightFormat("int4", 32)), (Kind.Q8_0, WeightFormat("int8", 32))]
GGUF_ARGS = replace(ARGS, tie_word_embeddings=True)


@pytest.mark.parametrize(("kind", "wanted"), KEPT)
@pytest.mark.parametrize("args", [ARGS, GGUF_ARGS])
def test_gguf_blocks_are_kept(
    tmp_path: Path, kind: Kind, wanted: WeightFormat, args: ModelArgs, tokenizer_path: Path
) -> None:
    """Numbers and scales are those that gguf's own reader finds, embedding and head included; the plan knows it."""
    weights = random_weights(args)
    path = gguf_files.write(
        tmp_path / "model.gguf", args, weights, kind, gguf_files.sentencepiece_entries(tokenizer_path)
    )
    source = open_checkpoint(path)
    assert set(source.stored.values()) == {wanted}
    assert len(source.stored) == 8 + (not args.tie_word_embeddings)
    for name, weight in weights.items():
        if weight.dim() == 2:
            exact = gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)
            read = dequantize(source.read(name), source.read(name.replace(".weight", ".scale")))
            assert np.array_equal(read.numpy(), exact), name
    storage, activation = planning.choose_dtypes(EngineConfig(), on_cpu=True, stored=source.stored)
    assert activation == "float32"
    with torch.device("meta"):
        model = Transformer(args, 14)
    loaded = sum(checkpoint.place(model, checkpoint.checked(source), storage, torch.device("cpu")))
    assert loaded == weight_bytes(args, storage)
    found = model.head(model(IDS, torch.arange(14).unsqueeze(0)))
    assert (found - logits_of(source, IDS)).abs().max() < 1e-4
    convert(path, tmp_path / "native")
    native = open_checkpoint(tmp_path / "native")
    assert native.stored == source.stored
    assert all(torch.equal(tensor, native.read(name)) for name, tensor in source.tensors())


def test_zeros_of_added_layers_are_not_taken_for_a_cut_download(tmp_path: Path) -> None:
    """A w2 of zeros has scales of zeros, too; a wq has not."""
    weights = random_weights(ARGS)
    for name, may in (("layers.1.feed_forward.w2.weight", True), ("layers.1.attention.wq.weight", False)):
        path = tmp_path / f"{name}.gguf"
        gguf_files.write(path, ARGS, weights | {name: torch.zeros_like(weights[name])}, Kind.Q8_0)
        if may:
            assert not dict(checkpoint.checked(open_checkpoint(path)))[name].any()
        else:
            with pytest.raises(CheckpointError, match=r"wq\.\w+ .*is zero throughout"):
                list(checkpoint.checked(open_checkpoint(path)))


def test_k_quants_become_int4_with_a_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are widened unless int4 is asked for; that they are rounded again is said."""
    weights = random_weights(gguf_files.ARGS)
    source = open_checkpoint(gguf_files.write(tmp_path / "model.gguf", gguf_files.ARGS, weights, Kind.Q4_K))
    assert not source.stored
    with caplog.at_level(logging.WARNING, "llama"):
        source.log_losses(choose_storage("auto", source.stored))
        assert not caplog.records
        source.log_losses(choose_storage("int4", source.stored))
    assert "weights in Q4_K are rounded again, to int4 in groups of 128" in caplog.text
    name = "layers.0.attention.wq.weight"
    made, scale = in_format(source.read(name), None, Storage("int4").format_of(name, source.args))
    assert scale is not None
    exact = source.read(name)
    assert (dequantize(made, scale) - exact).norm() < 0.12 * exact.norm()


def test_blocks_of_several_types(tmp_path: Path, tokenizer_path: Path) -> None:
    """Q4_0 in one layer and Q4_1 in another: that weight is widened in both, the others stay."""
    weights = random_weights(ARGS)
    with pytest.MonkeyPatch.context() as patch:
        add = gguf.GGUFWriter.add_tensor

        def mixed(self: Any, name: str, data: Any, raw_dtype: Kind) -> None:
            if name == "blk.1.ffn_down.weight":
                data, raw_dtype = (
                    gguf.quantize(weights["layers.1.feed_forward.w2.weight"].numpy(), Kind.Q4_1),
                    Kind.Q4_1,
                )
            add(self, name, data, raw_dtype=raw_dtype)

        patch.setattr(gguf.GGUFWriter, "add_tensor", mixed)
        path = gguf_files.write(
            tmp_path / "model.gguf", ARGS, weights, Kind.Q4_0, gguf_files.sentencepiece_entries(tokenizer_path)
        )
    source = open_checkpoint(path)
    assert "layers.{}.feed_forward.w2.weight" not in source.stored
    assert source.stored["layers.{}.feed_forward.w1.weight"] == WeightFormat("int4", 32)
    reshard(path, tmp_path / "meta", 2)
    assert torch.equal(logits_of(open_checkpoint(tmp_path / "meta"), IDS), logits_of(source, IDS))


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, run: Run, tokenizer_path: Path) -> None:
    """A GPTQ checkpoint by its directory: inspect, plan, convert and generate; a refusal ends without a traceback."""
    write(tmp_path / "model", "gptq")
    (tmp_path / "model" / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    model = str(tmp_path / "model")
    facts = json.loads(run("inspect", model, "--max_seq_len=64", "--check_tensors", "--json").out)
    assert facts["quantised"] == {"int4 in groups of 64": 14}
    assert not facts["problems"]
    plan = run("plan", "--tensor_parallel=2", "--ckpt_dir", model, "--max_seq_len=64", "--accelerator=cpu", "--json")
    assert json.loads(plan.out)["dtype"] == "int4"
    common = ("--prompt=the cat", "--max_gen_len=8", "--temperature=0", "--max_seq_len=64", "--json")
    texts = []
    for flags in (("--ckpt_dir", model), ("--ckpt_dir", model, "--dtype=float32"), ("--ckpt_dir", f"{model}-native")):
        if flags[1] != model:
            assert run("convert", model, flags[1], "--quiet").code == 0
        outcome = run("generate", *flags, *common)
        assert outcome.code == 0, outcome.err
        texts.append(json.loads(outcome.out)["generation"])
    assert texts[0] == texts[2]
    edit_json(tmp_path / "model" / "config.json", quantization_config={"quant_method": "hqq"})
    outcome = run("generate", "--ckpt_dir", model, *common)
    assert outcome.code == 2
    assert "quantization_config: quant_method is 'hqq'" in outcome.err
    assert "with --dtype int4 or int8" in outcome.err
    assert "Traceback" not in outcome.err
