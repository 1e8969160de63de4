"""The layers as one loop of the program: the same numbers as layer by layer, from weights that stay where they are."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import dumped_program
from conftest import LLMFactory

from llama import EngineConfig, LLaMA, ModelArgs, SamplingParams, checkpoint
from llama.bench.kernels import DTYPES
from llama.compiled.model import Transformer
from llama.compiled.state import CACHE
from llama.engine.programs import Program
from llama.engine.runner import XlaRunner
from llama.engine.sequence import Sequence
from llama.xla import backend, linear, programs, reports, stacks, transfers
from llama.xla.control_flow import repeat, switch, when

pytestmark = pytest.mark.slow

# wide enough that every lowering of a linear layer and both ways of attention come up
ARGS = ModelArgs(dim=256, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=320, multiple_of=64)
LENGTHS = (256, 64, 8)


def model_of(dtype: torch.dtype, args: ModelArgs = ARGS, positions: int = 400) -> Transformer:
    """Seeded random weights on the device."""
    with torch.device("meta"):
        model = Transformer(args, positions)
    for _ in checkpoint.place(model, checkpoint.random_tensors(args, 1), dtype, backend.init()):
        pass
    return model


def state_after(model: Transformer, layers_as: str, rows: int = 1) -> dict[str, torch.Tensor]:
    """What the slots hold after chunks of every length and two decode steps."""
    model.layers_as = layers_as
    config = EngineConfig(max_batch_size=rows, max_seq_len=384, buckets=(*LENGTHS, 1), key_buckets=(64, 300))
    runner = XlaRunner(model, config, backend.init())
    ids = tuple(torch.randint(3, 320, (340,), generator=torch.Generator().manual_seed(5)).tolist())
    for slot in range(rows):
        sequence = Sequence(ids, SamplingParams(9, 0.0, seed=0))
        sequence.slot, sequence.ready = slot, sum(LENGTHS)
        runner.admit(sequence)
        begin = 0
        for length in LENGTHS:
            begin += length
            keys = next(k for k in config.key_buckets if k >= begin)
            runner._run(
                Program("chunk", length=length, key_len=384), slot=runner._number(slot), keys=runner._number(keys)
            )
    for keys in (384, 384):
        decode = Program("decode", rows=rows, key_len=384)
        runner._run(decode, slot=runner._number(0), keys=runner._number(keys))
    names = (*CACHE, "hidden", "tokens", "start")
    return {name: transfers.fetch(runner.tensor(name)) for name in names}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loop_computes_what_the_layers_do(dtype: str, rows: int) -> None:
    """The cache, the stream and the state after chunks and steps are those of unrolled layers."""
    model = model_of(DTYPES[dtype])
    assert len(model.stacks) == (16 if dtype == "int8" else 9)
    loop, unrolled = (state_after(model, each, rows) for each in ("loop", "unrolled"))
    assert loop["key_cache"].abs().amax(dim=(1, 2, 3, 4)).gt(0).all()  # every layer wrote keys and values
    assert loop["value_cache"].abs().amax(dim=(1, 2, 3, 4)).gt(0).all()
    for name in ("tokens", "start"):
        assert torch.equal(loop[name], unrolled[name])
    for name in (*CACHE, "hidden"):
        torch.testing.assert_close(loop[name], unrolled[name], rtol=1e-5, atol=1e-6)


def test_stacks_of_their_own(monkeypatch: pytest.MonkeyPatch, tokenizer_path: Path) -> None:
    """Where a device holds one tensor a stack, as a TPU does: the same text, and no tensors of single layers."""

    def build() -> LLaMA:
        config = EngineConfig(max_seq_len=96, buckets=(64, 8, 1))
        return LLaMA.build(tokenizer_path=tokenizer_path, config=config, random_weights=ARGS)

    usual = build()
    monkeypatch.setattr("llama.checkpoint.spans_layers", lambda device: False)
    other = build()
    model = other.engine.runner.model  # type: ignore[attr-defined]
    names = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    assert names == {n: (tuple(p.shape), p.dtype) for n, p in usual.engine.runner.model.named_parameters()}  # type: ignore[attr-defined]
    assert all(p.device.type == "meta" for name, p in model.named_parameters() if name.startswith("layers."))
    prompt = [1, *range(3, 80)]
    texts = [llm.generate([prompt], max_gen_len=12, temperature=0)[0].token_ids for llm in (usual, other)]
    assert texts[0] == texts[1]


def test_a_stack_is_where_the_weights_are() -> None:
    """No copy: the table of places leads to each layer's own tensor, also across separate allocations."""
    import torch_xla

    address = torch_xla._XLAC._unsafe_buffer_pointer
    model = model_of(torch.float32)
    for name, stack in model.stacks.items():
        if stack._places is None:
            assert stack._whole.dim() == 2  # norms and scales, which are small, are stacked anew
            continue
        begin = address(stack._whole)
        for layer, place in enumerate(transfers.fetch(stack._places).tolist()):
            assert begin + place * 4 == address(model.layers[layer].get_parameter(name))


def test_a_program_keeps_the_weights_of_its_stacks() -> None:
    """A program that outlives the model still reads them: the range of addresses owns what lies in it."""

    def compiled(x: torch.Tensor) -> programs.Program:
        host = [torch.full((64, 48), float(n + 1)) for n in range(3)]
        stack = stacks.StackedWeight.spanning([transfers.adopt(each, on("xla")) for each in host])

        def body(layer: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (total + stack.at(layer).taken(),)

        return programs.compile_program("owner", lambda x: repeat(3, body, (x,)), [x])

    x = transfers.upload(torch.zeros(64, 48), on("xla"))
    program = compiled(x)
    gc.collect()
    overwriting = [torch.full((64, 48), -1.0) for _ in range(64)]
    assert transfers.fetch(program(x)[0]).unique().tolist() == [1.0 + 2.0 + 3.0]
    assert len(overwriting) == 64


def test_layers_of_two_dtypes_are_unrolled() -> None:
    """A partly quantised checkpoint: there is no stack of two dtypes."""
    model = model_of(torch.float32)
    weight = model.layers[1].feed_forward.w1.weight
    half = transfers.upload(transfers.fetch(weight).bfloat16(), weight.device)
    model.layers[1].feed_forward.w1.weight = torch.nn.Parameter(half, requires_grad=False)
    model.stacks = {}
    model.stack_layers()
    assert model.stacks == {}
    assert state_after(model, "loop")["hidden"].isfinite().all()


DUMP = """
from llama import EngineConfig, LLaMA, ModelArgs
from llama.engine.programs import Program
args = ModelArgs(dim=256, n_layers={layers}, n_heads=4, n_kv_heads=2, vocab_size=320, multiple_of=64)
config = EngineConfig(max_batch_size={rows}, max_seq_len=384, buckets=(64, 8, 1), key_buckets=(64,), dtype="{dtype}")
llm = LLaMA.build(tokenizer_path={tokenizer!r}, config=config, random_weights=args)
llm.engine.runner.compile([{program}])
"""


@pytest.mark.parametrize(
    "program", ['Program("decode", rows=1, key_len=384)', 'Program("chunk", length=64, key_len=384)']
)
def test_depth_costs_no_kernels(tmp_path: Path, tokenizer_path: Path, program: str) -> None:
    """A program of nine layers has the fusions of one of three: that is what compiling takes time for."""
    fusions = []
    for layers in (3, 9):
        code = DUMP.format(layers=layers, rows=1, dtype="float32", tokenizer=str(tokenizer_path), program=program)
        text = dumped_program(code, tmp_path / str(layers)).read_text()
        fusions.append(text.count("kind=kLoop"))
    assert fusions[0] == fusions[1] > 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [8, 64])
def test_a_loop_holds_no_weight_twice(tmp_path: Path, tokenizer_path: Path, dtype: str, length: int) -> None:
    """A run's scratch does not grow with the layers, and what is widened or packed is so one weight at a time."""
    scratch = []
    for layers in (3, 9):
        program = f'Program("chunk", length={length}, key_len=384)'
        code = DUMP.format(layers=layers, rows=1, dtype=dtype, tokenizer=str(tokenizer_path), program=program)
        scratch.append(reports.summarise(dumped_program(code, tmp_path / str(layers))).scratch)
    assert scratch[1] <= scratch[0] * 1.02
    layer = 4 * sum(p.numel() for p in Transformer(ARGS, 2).layers[0].parameters())
    assert scratch[0] < layer + 4 * 64 * (384 * 4 + 320 + 8 * 256)  # and scores, logits and streams


# --- control flow -----------------------------------------------------------------------------------------------------


def on(device: str) -> torch.device:
    """The XLA device or torch's own."""
    return backend.init() if device == "xla" else torch.device("cpu")


def run(fn: Any, *inputs: torch.Tensor, device: str) -> list[torch.Tensor]:
    """A function's outputs, as a program where that is the device."""
    if device == "cpu":
        return list(fn(*inputs))
    given = [transfers.upload(each, on(device)) for each in inputs]
    return [transfers.fetch(each) for each in programs.compile_program("test", fn, given)(*given)]


@pytest.mark.parametrize("device", ["xla", "cpu"])
def test_switch_takes_the_branch_of_its_index(device: str) -> None:
    """Each branch with the weights that it closes over; an index past the last takes the last."""
    weights = [transfers.upload(torch.full((2,), float(n)), on(device)) for n in (1, 2, 3)]

    def fn(index: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def branch(number: int) -> Any:
            return lambda x: (x * weights[number] + number, x + number)

        return switch(index.sum(), [branch(n) for n in range(3)], (x,))

    x = torch.tensor([5.0, 7.0])
    for index, taken in ((0, 0), (1, 1), (2, 2), (9, 2)):
        product, shifted = run(fn, torch.tensor([index], dtype=torch.int32), x, device=device)
        assert product.tolist() == (x * (taken + 1) + taken).tolist()
        assert shifted.tolist() == (x + taken).tolist()


@pytest.mark.parametrize("device", ["xla", "cpu"])
def test_when_gives_zeros_where_nothing_is_taken(device: str) -> None:
    """The function's outputs, or zeros of their shapes."""

    def fn(asked: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return when(asked.any(), lambda x: (x + 1, x.sum(dim=0, keepdim=True)), (x,))

    x = torch.tensor([5.0, 7.0])
    for asked in (False, True):
        plus, total = run(fn, torch.tensor([asked]), x, device=device)
        assert plus.tolist() == ([6, 8] if asked else [0, 0])
        assert total.tolist() == ([12] if asked else [0])


def test_repeat_counts_and_carries() -> None:
    """The sum of (layer + constant) x weight over its runs, with a carry that it passes on unchanged."""
    weight = transfers.upload(torch.tensor([2.0]), on("xla"))

    def fn(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def body(number: torch.Tensor, total: torch.Tensor, y: torch.Tensor, shift: torch.Tensor) -> Any:
            return total + (number + shift) * weight, y

        return repeat(5, body, (x, y), (x * 0 + 1,))

    total, same = run(fn, torch.tensor([0.5]), torch.tensor([3, 4]), device="xla")
    assert total.tolist() == [0.5 + 2 * (1 + 2 + 3 + 4 + 5)]
    assert same.tolist() == [3, 4]


def test_onednn_multiplies_with_the_layers_own_weight() -> None:
    """The product by a branch for each layer is that of the layer that is asked for."""
    host = [torch.randn(24, 16, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    stack = stacks.StackedWeight.spanning([transfers.adopt(each, on("xla")) for each in host])
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(9))

    def fn(x: torch.Tensor, layer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (linear._layer_onednn(x, stack.at(layer.sum().int())),)

    given = [transfers.upload(x, on("xla")), transfers.upload(torch.tensor([0], dtype=torch.int32), on("xla"))]
    program = programs.compile_program("products", fn, given)
    for layer, weight in enumerate(host):
        given[1] = transfers.upload(torch.tensor([layer], dtype=torch.int32), on("xla"))
        torch.testing.assert_close(transfers.fetch(program(*given)[0]), x @ weight.t())


def test_one_program_for_every_key_bucket(make_llm: LLMFactory) -> None:
    """Prompts whose keys fill one bucket, two and three run without another compile, and alike."""
    llm = make_llm(max_seq_len=96, key_buckets=(16, 32), buckets=(8, 1))
    llm.warm_up()
    compiled = [p for p in llm.engine.runner._programs if p.kind in ("chunk", "decode")]  # type: ignore[attr-defined]
    assert sorted(p.key_len for p in compiled) == [96, 96]
    wide = make_llm(max_seq_len=96, key_buckets=(96,), buckets=(8, 1))
    for count in (9, 25, 60):
        prompt = [1, *range(3, 2 + count)]
        ids = [each.generate([prompt], max_gen_len=20, temperature=0)[0].token_ids for each in (llm, wide)]
        assert ids[0] == ids[1]
