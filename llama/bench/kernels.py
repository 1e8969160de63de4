"""The kernel table: every lowering of a linear layer, of attention and of the layers, timed on the shapes of a model.

A chain of layers that depend on each other, as in a model, so that neither XLA nor the caches can take a short cut:
their weights together are larger than the caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from llama import checkpoint
from llama.checkpoint.quantize import quantize, quantize_int4
from llama.compiled import cache
from llama.compiled.cache import CacheView
from llama.compiled.model import Transformer, block_with
from llama.config import EngineConfig, ModelArgs
from llama.planning import VALUE_BLOCK
from llama.xla import backend, linear, programs, transfers

CHAIN_BYTES = 160 * 2**20
MOST_LAYERS = 24  # each is a few kernels to compile
RUNS = 7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
GROUP = 128  # numbers of an int4 weight that share a scale
FOR_INT4 = ("int16", "xnnpack", "loop", "onednn", "matrix", "panels")  # what an int4 weight can be multiplied by
KEYS = 512
FEW_LAYERS = 6  # of a model that is timed as a whole
MOST_SUMS = 8  # rows: it holds rows x keys x head columns
# up to how many rows a lowering is tried
TOO_SLOW = {"plain": 16, "row_by_row": 128, "one_row": 1, "loop": 16, "tiled": 16}


def measure(program: Callable[..., list[torch.Tensor]], args: Sequence[torch.Tensor]) -> float:
    """Seconds of one run, the median of a few after one that warms up."""
    spent = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        transfers.fetch(program(*args)[0])
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def linear_table(args: ModelArgs, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Every lowering x rows x dtype for a feed-forward layer of the shape.

    Returns:
        Per line: lowering, rows, dtype, milliseconds a layer, GB/s of weights, GFLOP/s, and whether the engine picks
        it.
    """
    device = backend.init()
    found = []
    for dtype_name, dtype in {**DTYPES, **({} if args.dim % GROUP else {"int4": torch.uint8})}.items():
        weights, group = _weights(args, dtype, device), GROUP if dtype_name == "int4" else None
        for count in rows:
            x = transfers.upload(torch.randn(count, args.dim), device)
            for name in linear.LOWERINGS if group is None else FOR_INT4:
                takes = linear.ROUNDING.get(name, (dtype,))
                if count > TOO_SLOW.get(name, count) or (group is None and dtype not in takes):
                    continue
                seconds = _chain(f"{name} {count} {dtype_name}", name, weights, x) / len(weights)
                size = args.dim * args.hidden_dim
                found.append(
                    {
                        "lowering": name,
                        "rows": count,
                        "dtype": dtype_name,
                        "ms": 1e3 * seconds,
                        "gb_s": sum(each.nbytes for each in weights[0] if each is not None) / seconds / 1e9,
                        "gflop_s": 2 * size * count / seconds / 1e9,
                        "picked": linear.choose_lowering(count, args.dim, dtype, device, group) == name,
                    }
                )
    return found


Weight = tuple[torch.Tensor, torch.Tensor | None]  # and its scales, of int4's groups


def _weights(args: ModelArgs, dtype: torch.dtype, device: torch.device) -> list[Weight]:
    size = args.dim * args.hidden_dim * dtype.itemsize // (2 if dtype == torch.uint8 else 1)
    made: list[Weight] = []
    for _ in range(min(max(CHAIN_BYTES // size, 2), MOST_LAYERS)):
        weight = torch.randn(args.hidden_dim, args.dim) * 0.02
        if dtype == torch.uint8:
            packed, scale = quantize_int4(weight, GROUP)
            made.append((transfers.adopt(packed, device), transfers.upload(scale.float(), device)))
        else:
            made.append(
                (transfers.adopt(quantize(weight)[0] if dtype == torch.int8 else weight.to(dtype), device), None)
            )
    return made


def _chain(name: str, lowering: str, weights: list[Weight], x: torch.Tensor) -> float:
    def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        if scale is None:
            return linear.LOWERINGS[lowering](x, weight)
        return linear.quantized_product(x, weight, scale, lowering)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = x.sum(-1, keepdim=True) * 0
        for weight in weights:
            total = total + product(x + total * 1e-9, *weight).sum(-1, keepdim=True)
        return (total,)

    return measure(programs.compile_program(name, run, (x,)), (x,))


def attend_einsum(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """As model.py writes it for many queries."""
    probs = torch.softmax(torch.einsum("bktd,bksd->bkts", q, keys), dim=-1)
    return torch.einsum("bkts,bksd->bktd", probs, values)


def attend_matmul(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """With torch's matrix product."""
    return torch.softmax(q @ keys.transpose(-1, -2), dim=-1) @ values


def attend_sums(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """With products and sums, which XLA can fuse with the reading of the cache."""
    probs = torch.softmax(linear.scores_by_sums(q, keys), dim=-1)
    return (probs.unsqueeze(-1) * values.unsqueeze(2)).sum(3)


def attend_mixed(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Scores as sums, which read the keys where they are, and values by einsum."""
    probs = torch.softmax(linear.scores_by_sums(q, keys), dim=-1)
    return torch.einsum("bkts,bksd->bktd", probs, values)


def attend_blocks(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """As the model does, with its values in blocks [B, K, N, D, W] (xla/kv_cache.py)."""
    return linear.attention_values(torch.softmax(linear.attention_scores(q, keys), dim=-1), values)


ATTENTION = {
    "einsum": attend_einsum,
    "matmul": attend_matmul,
    "sums": attend_sums,
    "mixed": attend_mixed,
    "blocks": attend_blocks,
}


def attention_table(args: ModelArgs, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Every formulation of attention over ``KEYS`` of twice as many cached positions, x rows; lines as
    ``linear_table``'s.
    """
    device = backend.init()
    layers = min(args.n_layers, MOST_LAYERS)
    keys, values = torch.randn(2, layers, 1, args.kv_heads, 2 * KEYS, args.head_dim)
    in_blocks = values.unflatten(3, (-1, VALUE_BLOCK)).transpose(4, 5).contiguous()
    caches = [transfers.upload(each, device) for each in (keys, values, in_blocks)]
    group = args.n_heads // args.kv_heads
    size = 2 * args.kv_heads * KEYS * args.head_dim * keys.element_size()
    found = []
    for count in rows:
        q = transfers.upload(torch.randn(1, args.kv_heads, group * count, args.head_dim), device)
        for name in ATTENTION:
            if name in ("sums", "mixed") and count > MOST_SUMS:
                continue

            def run(q: torch.Tensor, *caches: torch.Tensor, name: str = name) -> tuple[torch.Tensor, ...]:
                keys, values, in_blocks = caches
                for layer in range(layers):
                    of_layer = (
                        in_blocks[layer, :, :, : KEYS // VALUE_BLOCK]
                        if name == "blocks"
                        else values[layer, :, :, :KEYS]
                    )
                    q = q + ATTENTION[name](q, keys[layer, :, :, :KEYS], of_layer)
                return (q,)

            seconds = measure(programs.compile_program(name, run, (q, *caches)), (q, *caches)) / layers
            flops = 4 * args.n_heads * count * KEYS * args.head_dim
            numbers = {"ms": 1e3 * seconds, "gb_s": size / seconds / 1e9, "gflop_s": flops / seconds / 1e9}
            found.append(
                {
                    "lowering": f"attention: {name}",
                    "rows": count,
                    "dtype": "float32",
                    **numbers,
                    "picked": name == "blocks",
                }
            )
    return found


def layers_table(args: ModelArgs, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Every way to run the layers x rows of a chunk x dtype; lines as ``linear_table``'s, a layer each.

    A **layer program** is compiled for one layer and run once for each by the host, with that layer's weights.
    """
    device, found = backend.init(), []
    shape = replace(args, n_layers=min(args.n_layers, FEW_LAYERS))
    for dtype_name, dtype in DTYPES.items():
        with torch.device("meta"):
            model = Transformer(shape, 2 * KEYS)
        for _ in checkpoint.place(model, checkpoint.random_tensors(shape, 1), dtype, device):
            pass
        size = sum(parameter.nbytes for parameter in model.layers.parameters())
        numbers = sum(parameter.numel() for parameter in model.layers.parameters())
        for count in rows:
            if count > KEYS:
                continue
            for name, way in {"loop": _loop, "unrolled": _loop, "layer program": _layer_program}.items():
                model.layers_as = name
                seconds = way(model, count, device) / shape.n_layers
                found.append(
                    {
                        "lowering": f"layers: {name}",
                        "rows": count,
                        "dtype": dtype_name,
                        "ms": 1e3 * seconds,
                        "gb_s": size / shape.n_layers / seconds / 1e9,
                        "gflop_s": 2 * numbers / shape.n_layers * count / seconds / 1e9,
                        "picked": linear.choose_layers(device) == name,
                    }
                )
        del model
    return found


def _inputs(model: Transformer, count: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Slot, start, keys, positions and an empty cache for a chunk of so many rows at the end of KEYS positions."""
    config = EngineConfig(max_seq_len=2 * KEYS)
    start = KEYS - count
    numbers = ([0], [start], [KEYS], [list(range(start, KEYS))])
    uploaded = (transfers.upload(torch.tensor(each, dtype=torch.int32), device) for each in numbers)
    return (*uploaded, *cache.allocate(model.args, config, model.activation_dtype, device))


def _loop(model: Transformer, count: int, device: torch.device) -> float:
    """Seconds of all layers in one program, in a loop or unrolled as the model says."""
    slot, start, keys, positions, *held = _inputs(model, count, device)
    ids = transfers.upload(torch.zeros(1, count, dtype=torch.int32), device)

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        key_cache, value_cache, slot, start, keys, positions = given
        view = CacheView(key_cache, value_cache, slot, start, keys, (KEYS,))
        stream = model(ids, positions, view)
        return *view.cache, stream

    program = programs.compile_program("layers", run, (*held, slot, start, keys, positions), donated=(0, 1))

    def once() -> list[torch.Tensor]:
        *held[:], stream = program(*held, slot, start, keys, positions)
        return [stream]

    return measure(once, ())


def _layer_program(model: Transformer, count: int, device: torch.device) -> float:
    """Seconds of all layers, each a run of one program."""
    slot, start, keys, positions, *held = _inputs(model, count, device)
    stream = transfers.upload(torch.zeros(1, count, model.args.dim), device)
    rotary = transfers.upload(torch.zeros(1, count, model.args.head_dim), device)
    names = [name for name, _ in model.layers[0].named_parameters()]
    weights = [[layer.get_parameter(name) for name in names] for layer in model.layers]
    numbers = [transfers.upload(torch.tensor([n], dtype=torch.int32), device) for n in range(len(weights))]

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        key_cache, value_cache, stream, slot, start, keys, positions, rotary, number, *own = given
        view = CacheView(key_cache, value_cache, slot, start, keys, (KEYS,))
        block = block_with(model.args, number.sum().int(), dict(zip(names, own, strict=True)))
        out = block(stream, positions, rotary, view)
        return *view.cache, out

    common = (slot, start, keys, positions, rotary)
    program = programs.compile_program("layer", run, (*held, stream, *common, numbers[0], *weights[0]), donated=(0, 1))

    def once() -> list[torch.Tensor]:
        passed = stream
        for number, own in zip(numbers, weights, strict=True):
            *held[:], passed = program(*held, passed, *common, number, *own)
        return [passed]

    return measure(once, ())


def table(found: Sequence[dict[str, Any]]) -> str:
    """The lines as markdown; what the engine picks is marked."""
    lines = ["| dtype | rows | lowering | ms | GB/s | GFLOP/s | picked |", "|---|---|---|---|---|---|---|"]
    for each in found:
        mark = "yes" if each["picked"] else ""
        numbers = f"{each['ms']:.3f} | {each['gb_s']:.1f} | {each['gflop_s']:.1f}"
        lines.append(f"| {each['dtype']} | {each['rows']} | {each['lowering']} | {numbers} | {mark} |")
    return "\n".join(lines) + "\n"
