"""Weight-only int8: the arithmetic against NumPy, every lowering of a linear layer against torch, and what the model
loses by it.
"""

from __future__ import annotations

import math
import platform
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import TINY, random_weights, write_meta
from commands import ROOT, Run, dumped_program

from llama import EngineConfig, LLaMA, checkpoint
from llama.checkpoint import open_checkpoint, stored_as
from llama.checkpoint.quantize import dequantize, quantize
from llama.checkpoint.reshard import convert, reshard
from llama.compiled.memory import weight_bytes
from llama.compiled.model import Linear, Transformer
from llama.config import DEMO_DIR
from llama.errors import CheckpointError
from llama.storage import Storage, WeightFormat
from llama.tokenizer import load_tokenizer
from llama.xla import backend, linear, programs, reports as hlo, transfers
from llama.xla.tiled import MOST_STRIPS, strips

pytestmark = pytest.mark.slow

sys.path.insert(0, str(ROOT / "scripts"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (300, 5000)])
def test_quantize_is_row_wise_absmax(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """As plain NumPy computes it; the largest number of a row becomes 127, and nothing is off by more than half a
    scale.
    """
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, 0] = 9
    numbers, scales = quantize(weight)
    plain = weight.float().numpy()
    expected = np.abs(plain).max(axis=1) / np.float32(127)
    assert np.array_equal(scales.numpy(), expected.astype(np.float32))
    assert np.array_equal(numbers.numpy(), np.rint(plain / expected[:, None]).astype(np.int8))
    assert numbers.abs().amax(dim=1).eq(127).all()
    assert ((numbers * scales.unsqueeze(1) - weight.float()).abs() <= scales.unsqueeze(1) * 0.5001).all()


def test_a_row_of_zeros_stays_zero() -> None:
    numbers, scales = quantize(torch.zeros(3, 4))
    assert numbers.eq(0).all()
    assert scales.eq(1).all()


def multiplied(lowering: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product that a lowering computes on the device."""
    inputs = [transfers.upload(tensor, backend.init()) for tensor in (x, weight)]
    program = programs.compile_program(lowering, lambda x, w: (linear.LOWERINGS[lowering](x, w),), inputs)
    return transfers.fetch(program(*inputs)[0])


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("lowering", sorted(linear.LOWERINGS))
def test_every_lowering_is_the_same_product(lowering: str, dtype: torch.dtype, rows: int) -> None:
    """Compiled on the device, against torch on the host in float64, of x as XNNPACK rounds it; int16 is less."""
    if dtype not in linear.ROUNDING.get(lowering, (dtype,)):
        pytest.skip("not for this dtype")
    x, weight = torch.randn(rows, 96), torch.randn(160, 96)
    weight = (20 * weight).clamp(-127, 127).to(dtype) if dtype == torch.int8 else weight.to(dtype)
    found = multiplied(lowering, x, weight)
    if lowering == "xnnpack":
        x = x.bfloat16().float()
    expected = x.double() @ weight.double().t()
    assert found.shape == (rows, 160)
    most = 1e-4 if lowering == "int16" else 1e-5
    assert (found.double() - expected).abs().max() <= most * expected.abs().max()


@pytest.mark.parametrize(
    ("lowering", "rows"), [("one_row", 1), ("row_by_row", 3), ("loop", 3), ("tiled", 3), ("onednn", 3)]
)
def test_long_rows_go_in_parts(lowering: str, rows: int) -> None:
    """Feed-forward layers of large models: the parts cover every column once, and their products add up."""
    for width in (1, 4080, 4081, 8160, 14336):
        covered = [column for a, b in linear.parts_of(width) for column in range(a, b)]
        assert covered == list(range(width))
        assert all(0 < b - a <= linear.WIDEST_ROW for a, b in linear.parts_of(width))
    x, weight = torch.randn(rows, 9001), torch.randn(40, 9001)
    expected = x.double() @ weight.double().t()
    assert (multiplied(lowering, x, weight).double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 96])
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 33, 768, 32003])
def test_strips_cover_every_channel_once(channels: int, cores: int) -> None:
    """Tiles are whole, and the strips of the cores equal."""
    cut = strips(channels, cores)
    assert [i for strip in cut for i in range(strip.start, strip.stop)] == list(range(channels))
    assert all((strip.stop - strip.start) % strip.channels == 0 for strip in cut)
    assert len({strip.stop - strip.start for strip in cut if strip.channels > 1}) <= 1
    assert max(strip.core for strip in cut) < min(cores, MOST_STRIPS)


@pytest.mark.parametrize("cores", [1, 2, 5])
@pytest.mark.parametrize("channels", [3, 40, 45])
def test_tiles_of_any_number_of_cores(monkeypatch: pytest.MonkeyPatch, channels: int, cores: int) -> None:
    """Strips that are equal, uneven or left out, against torch on the host."""
    monkeypatch.setattr("llama.xla.tiled.cores", lambda: cores)
    x, weight = torch.randn(5, 64 + cores), torch.randn(channels, 64 + cores)
    expected = x.double() @ weight.double().t()
    assert (multiplied("tiled", x, weight).double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_is_picked_depends_on_rows_and_dtype_and_device() -> None:
    """One row, a few, many; other devices keep the plain form."""
    device = backend.init()
    few = "onednn" if platform.machine() == "x86_64" else "matrix"
    picked = [linear.choose_lowering(rows, 768, torch.float32, device) for rows in (1, 4, 5, 8, 9, 128, 129, 512)]
    assert picked == ["one_row", "loop", "tiled", "tiled", few, few, "matrix", "matrix"]
    picked = [linear.choose_lowering(rows, 768, torch.bfloat16, device) for rows in (1, 2, 8, 9, 32, 33, 512)]
    assert picked == ["one_row", "tiled", "tiled", "row_by_row", "row_by_row", "xnnpack", "xnnpack"]
    assert {linear.choose_lowering(rows, 768, torch.int8, device) for rows in (1, 64, 512)} == {"int16"}
    picked = [linear.choose_lowering(rows, 768, torch.uint8, device, 128) for rows in (1, 64, 65, 512)]
    assert picked == ["int16", "int16", "xnnpack", "xnnpack"]
    picked = [linear.choose_lowering(rows, 768, torch.int8, device, 32) for rows in (16, 17, 33)]
    assert picked == ["int16", few, "xnnpack"]
    assert [linear.choose_lowering(rows, 2048, torch.float32, device) for rows in (2, 3, 8, 9, 512)] == [
        "loop",
        "tiled",
        "tiled",
        few,
        "panels",
    ]
    with linear.ruled(linear.Rules(rows_alike=True)):
        picked = [linear.choose_lowering(rows, 768, torch.float32, device) for rows in (1, 2, 8, 9)]
        assert picked == ["one_row", "row_by_row", "row_by_row", few]
        picked = [linear.choose_lowering(rows, 2048, torch.bfloat16, device) for rows in (1, 2, 8, 9)]
        assert picked == ["one_row", "row_by_row", "row_by_row", "row_by_row"]
    with linear.ruled(linear.Rules(activations="float32", prefill_products="float32")):
        for dtype in (torch.int8, torch.bfloat16):
            picked = [linear.choose_lowering(rows, 768, dtype, device) for rows in (1, 8, 64, 512)]
            assert picked == ["one_row", "tiled", "row_by_row", "matrix"]
        picked = [linear.choose_lowering(rows, 768, torch.uint8, device, 64) for rows in (1, 8, 512)]
        assert picked == ["one_row", "loop", "matrix"]
    assert {linear.choose_lowering(rows, 768, torch.int8, torch.device("cpu")) for rows in (1, 8, 512)} == {"plain"}


@pytest.mark.parametrize("tied", [False, True])
def test_loading_as_int8_quantises_the_linear_layers_only(tmp_path: Path, tied: bool) -> None:
    """Norms and the embedding are the checkpoint's, and the memory plan counts what is there."""
    args = TINY.__class__(**{**TINY.__dict__, "tie_word_embeddings": tied})
    source = open_checkpoint(write_meta(tmp_path / "meta", args, [random_weights(args)]))
    with torch.device("meta"):
        model = Transformer(args, 8)
    loaded = sum(checkpoint.place(model, checkpoint.checked(source), torch.int8, torch.device("cpu")))
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            assert module.scale is not None
            assert torch.equal(module.weight, quantize(source.read(f"{name}.weight"))[0])
    assert torch.equal(model.tok_embeddings.weight, source.read("tok_embeddings.weight"))
    assert loaded == weight_bytes(args, torch.int8)


def test_an_int8_checkpoint_reloads_equal(tmp_path: Path) -> None:
    """What convert writes is what loading computes, bit for bit; sharded, too."""
    write_meta(tmp_path / "meta", TINY, [random_weights(TINY)])
    convert(tmp_path / "meta", tmp_path / "int8", "int8", "50KB")
    source, stored = open_checkpoint(tmp_path / "meta"), dict(open_checkpoint(tmp_path / "int8").tensors())
    assert open_checkpoint(tmp_path / "int8").is_quantised
    for name, tensor in source.tensors():
        is_linear = "norm" not in name and name != "tok_embeddings.weight"
        parts = stored_as(tensor, None, "weight", WeightFormat("int8") if is_linear else None)
        for part, expected in parts.items():
            assert torch.equal(stored.pop(name.removesuffix("weight") + part), expected)
    assert not stored
    convert(tmp_path / "int8", tmp_path / "again")
    assert all(
        torch.equal(a, b)
        for (_, a), (_, b) in zip(*(open_checkpoint(tmp_path / n).tensors() for n in ("int8", "again")), strict=True)
    )


def test_what_becomes_of_int8(tmp_path: Path) -> None:
    """It is widened exactly; Meta's format, which cannot hold it, is refused."""
    write_meta(tmp_path / "meta", TINY, [random_weights(TINY)])
    convert(tmp_path / "meta", tmp_path / "int8", "int8")
    convert(tmp_path / "int8", tmp_path / "wide", "float32")
    stored, wide = (dict(open_checkpoint(tmp_path / name).tensors()) for name in ("int8", "wide"))
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    for name, tensor in wide.items():
        scale = stored.get(name.replace(".weight", ".scale"))
        assert torch.equal(tensor, stored[name] if scale is None else dequantize(stored[name], scale))
    with pytest.raises(CheckpointError, match="Meta's format has no place; reshard the original"):
        reshard(tmp_path / "int8", tmp_path / "new", 1)
    assert not (tmp_path / "new").exists()


def test_int8_in_other_formats_is_refused(tmp_path: Path) -> None:
    """A Meta file with int8 tensors has no scales: its numbers mean nothing."""
    weights = random_weights(TINY)
    weights["layers.0.attention.wq.weight"] = weights["layers.0.attention.wq.weight"].to(torch.int8)
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wq\.weight"):
        open_checkpoint(write_meta(tmp_path / "meta", TINY, [weights]))


LAYERS = """
import torch
from llama.xla import backend, linear, programs, transfers
device = backend.init()
x = transfers.upload(torch.randn({rows}, 1024), device)
weights = [transfers.upload(torch.ones(1024, 1024, dtype=torch.{dtype}), device) for _ in range(12)]

def chain(x):
    for weight in weights:
        x = linear.linear(x, weight) * 1e-3
    return (x,)

programs.compile_program("chain", chain, (x,))
"""


@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, "int8"), (8, "int8"), (200, "int8"), (200, "bfloat16"), (8, "float32"), (200, "float32")]
)
def test_no_weight_is_held_twice(tmp_path: Path, rows: int, dtype: str) -> None:
    """What is widened or packed for a product is widened when its turn comes: a chain needs the scratch of two layers,
    not of all.
    """
    program = dumped_program(LAYERS.format(rows=rows, dtype=dtype), tmp_path)
    assert 0 < hlo.summarise(program).scratch < 4 * 1024 * 1024 * 4


def demo_perplexity(dtype: torch.dtype | Storage) -> tuple[float, torch.Tensor]:
    """Perplexity of the demo model on 40 texts of its kind, and the logits of the first, computed on the host without a
    cache.
    """
    from demo_text import TextMaker

    source, tokenizer = open_checkpoint(DEMO_DIR), load_tokenizer(DEMO_DIR / "tokenizer.model")
    with torch.device("meta"):
        model = Transformer(source.args, 256)
    for _ in checkpoint.place(model, checkpoint.checked(source), dtype, torch.device("cpu")):
        pass
    losses, count, first = 0.0, 0, None
    maker = TextMaker(5)
    for _ in range(40):
        ids = torch.tensor([tokenizer.encode(maker.story().text)[:200]])
        with torch.no_grad():
            logits = model.head(model(ids, torch.arange(ids.shape[1]).unsqueeze(0)))[0]
        first = logits if first is None else first
        losses += float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert first is not None
    return math.exp(losses / count), first


def test_the_demo_model_loses_less_than_one_percent() -> None:
    """Perplexity within 1 % of float32's; the logits' relative error is what int8 makes of it."""
    exact, logits = demo_perplexity(torch.float32)
    rounded, near = demo_perplexity(torch.int8)
    assert exact < 12  # the texts are of the kind that the model knows
    assert abs(rounded / exact - 1) < 0.01
    assert float((near - logits).norm() / logits.norm()) < 0.02


def same_text(run: Run, *sources: str) -> str:
    """The text that the command line generates with the flags of each source, which must be the same."""
    common = '--prompt "Once upon a time" --max_gen_len 24 --temperature 0 --max_seq_len 64 --json'
    outcomes = [run("generate", *source.split(), *shlex.split(common)) for source in sources]
    assert [outcome.code for outcome in outcomes] == [0] * len(sources), outcomes
    (text,) = {outcome.objects[0]["generation"] for outcome in outcomes}
    return str(text)


def test_generating_with_int8(tmp_path: Path, run: Run) -> None:
    """The same text from an int8 checkpoint as from quantising at load, by the command line."""
    convert(DEMO_DIR, tmp_path / "int8", "int8")
    same_text(run, "--dtype=int8", f"--ckpt_dir={tmp_path / 'int8'}")
    llm = LLaMA.build(tmp_path / "int8", config=EngineConfig(max_seq_len=64))
    assert len(llm.generate("The cat", max_gen_len=3)[0].token_ids) <= 3
