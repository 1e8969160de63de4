"""int4 weights: the layout and the arithmetic against NumPy, what a model loses by them, and the way through files,
memory plans and devices.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from checkpoint_files import TINY, logits_of, random_weights, write_meta
from commands import Run
from test_quantize import demo_perplexity, same_text

from llama import DraftConfig, EngineConfig, LLaMA, ModelArgs, checkpoint, planning
from llama.checkpoint import open_checkpoint
from llama.checkpoint.native import GROUPS_VERSION
from llama.checkpoint.partition import device_parts
from llama.checkpoint.quantize import dequantize, in_format, pack, quantize, quantize_int4, regrouped, unpack
from llama.checkpoint.reshard import convert, reshard
from llama.compiled.memory import dtypes_for, weight_bytes
from llama.compiled.model import Embedding, Linear, Transformer
from llama.config import DEMO_DIR
from llama.errors import CheckpointError, ConfigError
from llama.sharding import span
from llama.storage import GROUPS, Storage, WeightFormat, choose_storage, formats_of, largest_group
from llama.xla import backend, linear, programs, transfers

WIDE = ModelArgs(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320, multiple_of=128)


def values(packed: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """The numbers of an int4 weight, byte by byte as the layout is documented."""
    bytes_, scales = packed.numpy(), scale.float().numpy()
    rows, groups = scales.shape
    group = 2 * bytes_.shape[1] // groups
    made = np.empty((rows, 2 * bytes_.shape[1]), np.float32)
    for g in range(groups):
        for j in range(group // 2):
            byte = bytes_[:, g * group // 2 + j].astype(int)
            for place, half in ((j, byte & 15), (j + group // 2, byte >> 4)):
                made[:, g * group + place] = (half - 8) * scales[:, g]
    return made


def weight_of(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("group", GROUPS)
def test_the_layout(group: int) -> None:
    """As documented, and packing is the inverse of unpacking; of 32 it is GGUF's Q4_0."""
    numbers = torch.randint(0, 16, (5, 384), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed, scale = pack(numbers, group), weight_of(5, 384 // group)
    assert torch.equal(unpack(packed, group), numbers)
    assert np.array_equal(dequantize(packed, scale).numpy(), values(packed, scale))
    assert np.array_equal(values(packed, torch.ones_like(scale)), numbers.numpy().astype(np.float32) - 8)
    if group == 32:
        halves = scale.half()
        blocks = np.concatenate(
            [halves.numpy().view(np.uint8).reshape(5, 12, 2), packed.numpy().reshape(5, 12, 16)], axis=-1
        ).reshape(5, -1)
        theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
        assert np.array_equal(dequantize(packed, halves).numpy(), theirs)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", [(1, 128), (3, 384), (700, 1152)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_better_than_q4_0s_rule(shape: tuple[int, int], group: int, dtype: torch.dtype) -> None:
    """No group is further off, in squares, than by the scale that makes its extreme -8."""
    weight = weight_of(*shape).to(dtype)
    packed, scale = quantize_int4(weight, group)
    assert packed.shape == (shape[0], shape[1] // 2)
    assert packed.dtype == torch.uint8
    assert scale.shape == (shape[0], shape[1] // group)
    assert scale.dtype == torch.float32
    groups = weight.float().numpy().reshape(-1, group)
    least, greatest = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    extreme = np.where(greatest > -least, greatest, least)
    by_rule = extreme / -8
    rounded = np.clip(np.rint(groups / by_rule), -8, 7) * by_rule
    errors = ((groups - dequantize(packed, scale).numpy().reshape(-1, group)) ** 2).sum(1)
    by_rule_errors = ((groups - rounded) ** 2).sum(1)
    assert (errors <= by_rule_errors * (1 + 1e-3)).all()
    if shape[0] > 1:
        assert errors.sum() < 0.95 * by_rule_errors.sum()


def test_rounding_odd_groups() -> None:
    """Zeros stay zero; one number, one sign, numbers at the ends of float32 stay finite and near."""
    weight = torch.zeros(6, 64)
    weight[1, 5] = -3.0
    weight[2] = 0.7
    weight[3] = torch.linspace(1e37, 3e38, 64)
    weight[4] = 1e-44
    weight[5, ::2] = 1e-30
    packed, scale = quantize_int4(weight, 64)
    found = dequantize(packed, scale)
    assert scale.isfinite().all()
    assert scale.ne(0).all()
    assert found[0].eq(0).all()
    assert torch.equal(found[1], weight[1])
    assert torch.allclose(found[2], weight[2])
    assert ((found[3] - weight[3]).abs() <= 3e38 / 14).all()
    assert found[4].abs().max() < 1e-37
    assert torch.allclose(found[5], weight[5], atol=1e-32)


def test_rounding_rows_apart_is_the_same() -> None:
    """Rows do not know of each other: a large weight, which goes in blocks, is its rows' results."""
    weight = weight_of(600, 512)
    packed, scale = quantize_int4(weight, 128)
    for row in (0, 255, 256, 599):
        one, own = quantize_int4(weight[row : row + 1], 128)
        assert torch.equal(packed[row : row + 1], one)
        assert torch.equal(scale[row : row + 1], own)


def test_smaller_groups_are_the_same_numbers() -> None:
    packed, scale = quantize_int4(weight_of(7, 384), 128)
    for group in GROUPS:
        finer, scales = regrouped(packed, scale, group)
        assert scales.shape == (7, 384 // group)
        assert np.array_equal(values(finer, scales), values(packed, scale))
    again, same = in_format(packed, scale, WeightFormat("int4", 128))
    assert again is packed
    assert same is scale


def on_device(*inputs: torch.Tensor, program: object) -> torch.Tensor:
    uploaded = [transfers.upload(each, backend.init()) for each in inputs]
    compiled = programs.compile_program("int4", lambda *given: (program(*given),), uploaded)  # type: ignore[operator]
    return transfers.fetch(compiled(*uploaded)[0])


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, 40, 200])
@pytest.mark.parametrize("kind", ["int8 rows", "int8 groups", *GROUPS])
def test_a_linear_layer_of_every_format(kind: str | int, rows: int) -> None:
    """Compiled on the device and on the host, against float64; with inputs as they are and as the rules round them."""
    weight, x = weight_of(96, 384), torch.randn(rows, 384, generator=torch.Generator().manual_seed(2))
    if kind == "int8 rows":
        made = quantize(weight)
    elif kind == "int8 groups":
        numbers = torch.randint(-127, 128, (96, 384), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
        made = numbers, weight_of(96, 12)
    else:
        made = quantize_int4(weight, int(kind))
    expected = x.double() @ dequantize(*made).double().t()
    exact = linear.Rules(activations="float32", prefill_products="float32")
    for rules, most in ((exact, 1e-5), (linear.Rules(), 1e-4 if rows < 33 else 1e-2)):
        with linear.ruled(rules):
            found = on_device(x, *made, program=linear.linear)
        assert (found.double() - expected).abs().max() <= most * expected.abs().max()
    plain = linear.linear(x, *made)
    assert (plain.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("group", [0, 32, 64])
def test_an_embedding_of_narrow_rows(group: int) -> None:
    """Looked up and multiplied by their scales; ids in any shape."""
    weight = weight_of(50, 128)
    made = quantize_int4(weight, group) if group else quantize(weight)
    table = Embedding(50, 128, 1)
    ids = torch.tensor([[0, 49, 7], [7, 1, 2]])

    def look_up(ids: torch.Tensor, numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        table.weight, table.scale = (torch.nn.Parameter(each, requires_grad=False) for each in (numbers, scale))
        found: torch.Tensor = table(ids)
        return found

    expected = dequantize(*made)[ids]
    assert torch.equal(look_up(ids, *made), expected)
    assert torch.equal(on_device(ids, *made, program=look_up), expected)


# What becomes of each weight


def test_storage_says_what_each_weight_becomes() -> None:
    """Groups as asked where they divide a row, smaller ones or int8 where not; head and embedding int8."""
    demo = open_checkpoint(DEMO_DIR).args  # dim 192, feed-forward 512
    found = {name: Storage("int4", 128).format_of(name, demo) for name, _ in checkpoint.random_tensors(demo, 1)}
    assert found["layers.0.attention.wq.weight"] == WeightFormat("int4", 64)
    assert found["layers.5.feed_forward.w2.weight"] == WeightFormat("int4", 128)
    assert found["tok_embeddings.weight"] == WeightFormat("int8")
    assert found["norm.weight"] is None
    assert found["layers.0.attention_norm.weight"] is None
    assert Storage("int4").format_of("output.weight", WIDE) == WeightFormat("int8")
    narrow = replace(WIDE, dim=48, n_heads=4, n_kv_heads=4)
    assert Storage("int4").format_of("layers.0.attention.wq.weight", narrow) == WeightFormat("int8")
    assert Storage("int8").format_of("tok_embeddings.weight", WIDE) is None
    assert Storage("float32").format_of("tok_embeddings.weight", WIDE) == WeightFormat("float32")


@pytest.mark.parametrize("tensor", [2, 3, 4, 5, 7, 8])
def test_no_group_is_cut_by_devices(tensor: int) -> None:
    """Every device's part of a row begins and ends between groups, or the weight is int8 with a scale a row."""
    args = ModelArgs(
        dim=256, n_layers=1, n_heads=40, n_kv_heads=5, vocab_size=99, attn_head_dim=24, ffn_hidden_dim=1344
    )
    for name in ("layers.{}.attention.wo.weight", "layers.{}.feed_forward.w2.weight"):
        group = largest_group(name, args, tensor, 128)
        spans = [span(name, args, tensor, rank) for rank in range(tensor)] if args.kv_heads % tensor == 0 else []
        if "w2" in name:
            spans = [span(name, args, tensor, rank) for rank in range(tensor)]
        assert group is None or not any(each % group for part in spans for each in part)
    assert largest_group("layers.{}.feed_forward.w1.weight", args, tensor, 128) == 128  # its rows stay whole


@pytest.mark.parametrize("tensor", [2, 4])
def test_parts_of_devices_make_up_the_whole(tensor: int) -> None:
    """Packed weights and scales of both kinds of layers, cut as float weights are; zeros fill up as zeros."""
    args = ModelArgs(dim=128, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=321, ffn_hidden_dim=320)
    for name, weight in random_weights(args).items():
        if weight.dim() < 2:
            continue
        wanted = Storage("int4").format_of(name, args, tensor)
        assert wanted is not None
        numbers, scale = in_format(weight, None, wanted)
        assert scale is not None
        whole, axis = device_parts(name, dequantize(numbers, scale), args, tensor)
        parts, own = device_parts(name, numbers, args, tensor)
        scales, _ = device_parts(name.replace(".weight", ".scale"), scale, args, tensor)
        assert own == axis
        for rank, expected in enumerate(whole):
            found = dequantize(parts[rank], scales[rank if len(scales) > 1 else 0])
            assert torch.equal(found, expected), name


@pytest.mark.parametrize("args", [WIDE, replace(WIDE, tie_word_embeddings=True, qkv_bias=True, qk_norm=True)])
@pytest.mark.parametrize("group", [64, 128])
def test_loading_as_int4(tmp_path: Path, args: ModelArgs, group: int) -> None:
    """Each weight is what rounding makes of it, and the plan counts what is there."""
    source = open_checkpoint(write_meta(tmp_path / "meta", args, [random_weights(args)]))
    with torch.device("meta"):
        model = Transformer(args, 8)
    storage = Storage("int4", group)
    loaded = sum(checkpoint.place(model, checkpoint.checked(source), storage, torch.device("cpu")))
    assert loaded == weight_bytes(args, storage) == planning.weight_bytes(args, storage)
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Embedding)):
            assert module.scale is not None
            weight = source.read(f"{name}.weight")
            is_layer = name.startswith("layers.")
            numbers, scale = quantize_int4(weight, group) if is_layer else quantize(weight)
            assert torch.equal(module.weight, numbers)
            assert torch.equal(module.scale, scale)
    assert torch.equal(model.norm.weight, source.read("norm.weight"))


# Files


@pytest.mark.parametrize("group", [64, 128])
def test_an_int4_checkpoint_reloads_equal(tmp_path: Path, group: int) -> None:
    """What convert writes is what loading computes, bit for bit, also in several files; it says what it holds."""
    weights = random_weights(WIDE, dtype=torch.bfloat16)
    write_meta(tmp_path / "meta", WIDE, [weights])
    convert(tmp_path / "meta", tmp_path / "int4", "int4", "50KB", int4_group=group)
    source, stored = open_checkpoint(tmp_path / "meta"), open_checkpoint(tmp_path / "int4")
    assert stored.is_quantised
    assert stored.stored["layers.{}.attention.wq.weight"] == WeightFormat("int4", group)
    assert stored.stored["tok_embeddings.weight"] == WeightFormat("int8")
    tensors = dict(stored.tensors())
    for name, tensor in source.tensors():
        made, scale = in_format(tensor, None, Storage("int4", group).format_of(name, WIDE))
        assert torch.equal(tensors.pop(name), made)
        if scale is not None:
            assert torch.equal(tensors.pop(name.replace(".weight", ".scale")), scale)
    assert not tensors
    from safetensors import safe_open

    with safe_open(sorted((tmp_path / "int4").glob("*.safetensors"))[0], "pt") as file:
        assert file.metadata()["version"] == GROUPS_VERSION
        assert "int4" in file.metadata()["dtype"]
    storage, _ = dtypes_for(EngineConfig(), on_cpu=True, stored=stored.stored)
    with torch.device("meta"):
        model = Transformer(WIDE, 8)
    sum(checkpoint.place(model, checkpoint.checked(stored), storage, torch.device("cpu")))
    wq = "layers.0.attention.wq"
    assert torch.equal(model.get_submodule(wq).weight, stored.read(f"{wq}.weight"))
    convert(tmp_path / "int4", tmp_path / "again")
    again = dict(open_checkpoint(tmp_path / "again").tensors())
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored.tensors())


def test_what_becomes_of_an_int4_checkpoint(tmp_path: Path) -> None:
    """It stays as it is, is widened exactly, or becomes int8; Meta's format refuses it."""
    write_meta(tmp_path / "meta", WIDE, [random_weights(WIDE)])
    convert(tmp_path / "meta", tmp_path / "int4", "int4")
    stored = open_checkpoint(tmp_path / "int4")
    name = "layers.1.feed_forward.w3"
    exact = dequantize(stored.read(f"{name}.weight"), stored.read(f"{name}.scale"))
    convert(tmp_path / "int4", tmp_path / "wide", "float32")
    wide = open_checkpoint(tmp_path / "wide")
    assert not wide.is_quantised
    assert torch.equal(wide.read(f"{name}.weight"), exact)
    convert(tmp_path / "int4", tmp_path / "int8", "int8")
    assert torch.equal(open_checkpoint(tmp_path / "int8").read(f"{name}.weight"), quantize(exact)[0])
    convert(tmp_path / "int4", tmp_path / "same", "int4", int4_group=128)  # quantised ones keep their groups
    assert open_checkpoint(tmp_path / "same").stored == stored.stored
    with pytest.raises(CheckpointError, match="holds int4 weights, for which Meta's format has no place"):
        reshard(tmp_path / "int4", tmp_path / "new", 1)
    ids = torch.arange(12).unsqueeze(0)
    assert torch.equal(logits_of(stored, ids), logits_of(wide, ids))


def test_losses_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rounding what was rounded is said, keeping and widening it is not."""
    write_meta(tmp_path / "meta", WIDE, [random_weights(WIDE)])
    convert(tmp_path / "meta", tmp_path / "int8", "int8")
    source = open_checkpoint(tmp_path / "int8")
    caplog.clear()  # convert's own lines, where an earlier test has raised the level
    with caplog.at_level(logging.WARNING, "llama"):
        for dtype in ("auto", "int8", "float32", "bfloat16"):
            source.log_losses(choose_storage(dtype, source.stored))
        assert not caplog.records
        source.log_losses(choose_storage("int4", source.stored))
    (record,) = caplog.records
    assert "weights in int8 are rounded again, to int4 in groups of 128" in record.getMessage()


def test_damaged_int4_checkpoints(tmp_path: Path) -> None:
    """Packed weights without scales, with scales of no group, or in a format that has none."""
    from llama.checkpoint.source import Found, match

    made = {name: Found(tuple(t.shape), t.dtype, Path("model")) for name, t in random_weights(WIDE).items()}
    name = "layers.0.attention.wq"
    packed = {**made, f"{name}.weight": Found((128, 64), torch.uint8, Path("model"))}

    def refused(found: dict[str, Found], message: str, may: bool = True) -> None:
        with pytest.raises(CheckpointError, match=message):
            match(WIDE, found, Path("params.json"), may_be_quantised=may)

    scale = Found((128, 2), torch.float32, Path("model"))
    match(WIDE, {**packed, f"{name}.scale": scale}, Path("params.json"), may_be_quantised=True)
    refused(packed, rf"1 missing: {name}\.scale")
    refused({**packed, f"{name}.scale": scale._replace(shape=(128, 3))}, r"128, 3. instead of")
    refused({**packed, f"{name}.scale": scale._replace(shape=(128,))}, r"instead of")
    refused({**packed, f"{name}.scale": scale._replace(dtype=torch.int32)}, r"not floating point: .*I32")
    refused({**packed, f"{name}.scale": scale}, r"not known to this model: .*scale", may=False)
    norm = Found((64,), torch.uint8, Path("model"))
    refused({**made, "norm.weight": norm}, "not floating point: norm.weight")


def test_layers_that_differ_are_not_kept() -> None:
    """The layers of a model are one loop, so weights of one name are stored alike."""
    tensors = {f"layers.{i}.attention.wq.weight": ((128, 64), "uint8") for i in range(2)}
    scales = {f"layers.{i}.attention.wq.scale": ((128, 2), "float32") for i in range(2)}
    name = "layers.{}.attention.wq.weight"
    assert formats_of(tensors | scales) == {name: WeightFormat("int4", 64)}
    assert formats_of(tensors | scales | {"layers.1.attention.wq.scale": ((128, 4), "float32")}) == {}
    assert formats_of(tensors | scales | {"layers.1.attention.wq.weight": ((128, 128), "float32")}) == {}


def test_groups_that_are_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="int4_group: got 32, expected 64 or 128"):
        EngineConfig(dtype="int4", int4_group=32)
    with pytest.raises(ConfigError, match="int4_group: got 64, but dtype is float32"):
        EngineConfig(dtype="float32", int4_group=64)
    with pytest.raises(ConfigError, match="int4_group: got 64, but dtype is bfloat16"):
        convert(DEMO_DIR, "/nowhere/new", "bfloat16", int4_group=64)
    outcome = run("plan", "--tensor_parallel", "1", "--int4_group", "64")
    assert outcome.code == 2
    assert "--int4_group: got 64, but --dtype is auto" in outcome.err
    with pytest.raises(ConfigError, match="int4_group: got 100"):
        convert(DEMO_DIR, "/nowhere/new", "int4", int4_group=100)


# The whole


@pytest.mark.slow
def test_what_the_demo_model_loses() -> None:
    """Perplexity within 2 % of float32's; smaller groups are nearer, int8 nearer still."""
    exact, logits = demo_perplexity(torch.float32)
    errors = []
    for storage in (Storage("int4", 64), Storage("int8")):
        rounded, near = demo_perplexity(storage)
        assert abs(rounded / exact - 1) < 0.02
        errors.append(float((near - logits).norm() / logits.norm()))
    assert all(a > b for a, b in pairwise(errors))
    assert errors[0] < 0.15


@pytest.mark.slow
def test_generating_with_int4(tmp_path: Path, run: Run) -> None:
    """The same text from an int4 checkpoint as from rounding at load, by the command line; it is a story."""
    code = run("convert", str(DEMO_DIR), str(tmp_path / "int4"), "--dtype", "int4", "--int4_group", "128", "--quiet")
    assert code.code == 0, code.err
    text = same_text(run, "--dtype=int4 --int4_group=128", f"--ckpt_dir={tmp_path / 'int4'}")
    assert "a little boy called Felix lived" in text
    inspected = run("inspect", str(tmp_path / "int4"), "--json")
    facts = json.loads(inspected.out)
    assert facts["quantised"]["int4 in groups of 128"] == 6
    assert not facts["problems"]


@pytest.mark.slow
def test_drafts_of_medusa_heads_under_int4() -> None:
    """The heads are int8 then; the text is the one without them."""
    config = EngineConfig(max_seq_len=128, dtype="int4")
    plain = LLaMA.build(config=config).generate("Once upon a time", max_gen_len=24, temperature=0)[0]
    drafted = LLaMA.build(config=config, drafting=DraftConfig(drafter=("medusa",)))
    assert drafted.generate("Once upon a time", max_gen_len=24, temperature=0)[0].token_ids == plain.token_ids


@pytest.mark.slow
def test_batches_and_chunks_of_int4_are_the_single_texts() -> None:
    """Rows of a batch and a prompt that goes in chunks: greedy texts are those of one request alone."""
    config = EngineConfig(max_seq_len=128, max_batch_size=3, buckets=(8, 1), dtype="int4", prefix_cache=False)
    llm = LLaMA.build(config=config)
    prompts = ["Once upon a time there was a dog", "The cat", "One day"]
    together = [result.token_ids for result in llm.generate(prompts, max_gen_len=12, temperature=0)]
    alone = [llm.generate(prompt, max_gen_len=12, temperature=0)[0].token_ids for prompt in prompts]
    assert together == alone


ON_DEVICES = """
import json, os, sys
tensor, directory = int(sys.argv[1]), sys.argv[2]
os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(tensor)}
from llama import EngineConfig, LLaMA
llm = LLaMA.build(directory, config=EngineConfig(max_seq_len=64, buckets=(8, 1), tensor_parallel=tensor))
(result,) = llm.generate(["Once upon a time"], max_gen_len=16, temperature=0, logprobs=1)
print(json.dumps([result.token_ids, [each.logprob for each in result.logprobs]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "Q8_0"])
def test_on_two_devices_it_is_the_same(tmp_path: Path, kind: str) -> None:
    """Groups of 64 become groups of 32 where a device has 96 numbers of a row; embedding and head go by rows."""
    if kind == "int4":
        convert(DEMO_DIR, tmp_path / "model", "int4", int4_group=64)
    else:
        demo = open_checkpoint(DEMO_DIR)
        path, entries = tmp_path / "model.gguf", gguf_files.sentencepiece_entries(DEMO_DIR / "tokenizer.model")
        gguf_files.write(path, demo.args, dict(demo.tensors()), gguf.GGMLQuantizationType[kind], entries)
        convert(path, tmp_path / "model")
    found = []
    for tensor in (1, 2):
        command = [sys.executable, "-c", ON_DEVICES, str(tensor), str(tmp_path / "model")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout))
    assert found[0][0] == found[1][0]
    assert np.allclose(found[0][1], found[1][1], atol=1e-3)


def test_tiny_models_fall_back(tmp_path: Path) -> None:
    """Rows of 64 and of 192 numbers, of which 128 divides none."""
    source = open_checkpoint(write_meta(tmp_path / "meta", TINY, [random_weights(TINY)]))
    convert(source.directory, tmp_path / "int4", "int4", int4_group=128)
    stored = open_checkpoint(tmp_path / "int4").stored
    assert {each.group for name, each in stored.items() if each.dtype == "int4"} <= {64, 32}
