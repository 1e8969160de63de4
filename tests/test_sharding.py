"""How a model is split over devices: what each holds computes, summed and joined, what the whole model computes."""

from __future__ import annotations

import math
import time
from itertools import product

import numpy as np
import pytest
import torch

from llama import ModelArgs
from llama.checkpoint.partition import device_parts
from llama.errors import ConfigError
from llama.sharding import (
    AXES,
    SHAPES,
    Collective,
    Mesh,
    check,
    collectives,
    device_axis,
    fitting,
    local_args,
    local_shape,
    padded_vocab,
    whole_shape,
)

GROUPED = ModelArgs(dim=48, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=37, multiple_of=16)
DEMO = ModelArgs(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=37, multiple_of=16)
ODD = ModelArgs(dim=48, n_layers=1, n_heads=12, n_kv_heads=3, vocab_size=37, ffn_hidden_dim=37)
SEVENTY_B = ModelArgs(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, vocab_size=32000, ffn_hidden_dim=28672)
Weights = dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"]


def weights_of(args: ModelArgs) -> Weights:
    """Random whole weights of one layer and what is around it, by Meta's names."""
    generator = np.random.default_rng(5)
    return {name: generator.normal(size=whole_shape(name, args)) for name in SHAPES}


def part_of(whole: Weights, args: ModelArgs, tensor: int, device: int) -> Weights:
    """What one device is given."""
    held = {}
    for name, weight in whole.items():
        parts, _ = device_parts(name, torch.from_numpy(weight), args, tensor)
        held[name] = parts[device if len(parts) > 1 else 0].numpy()
    return held


def attention(x: np.ndarray, w: Weights, heads: int, kv_heads: int, head_dim: int) -> np.ndarray:
    """Attention of all positions of ``x`` [T, dim] to all, without rotary embedding: [T, dim]."""
    names = ("wq", "wk", "wv")
    q, k, v = ((x @ w[f"layers.{{}}.attention.{name}.weight"].T).reshape(len(x), -1, head_dim) for name in names)
    out = []
    for head in range(heads):
        own = head // (heads // kv_heads)
        scores = np.exp(q[:, head] @ k[:, own].T)
        out.append(scores / scores.sum(1, keepdims=True) @ v[:, own])
    return np.concatenate(out, axis=1) @ w["layers.{}.attention.wo.weight"].T


def feed_forward(x: np.ndarray, w: Weights) -> np.ndarray:
    w1, w2, w3 = (w[f"layers.{{}}.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
    gate = x @ w1.T
    return (gate / (1 + np.exp(-gate)) * (x @ w3.T)) @ w2.T


def look_up(ids: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    """The vectors of the ids in [first, first + rows), zero for others."""
    inside = (ids >= first) & (ids < first + len(table))
    return np.where(inside[:, None], table[np.where(inside, ids - first, 0)], 0.0)


@pytest.mark.parametrize(
    ("args", "tensor"),
    [(GROUPED, 1), (GROUPED, 2), (GROUPED, 4), (GROUPED, 8), (DEMO, 2), (DEMO, 4), (ODD, 3), (ODD, 6)],
)
def test_the_parts_compute_what_the_whole_computes(args: ModelArgs, tensor: int) -> None:
    """Embedding, attention and feed-forward are sums over the devices, the head is joined and its padding cut off.

    T = 4 and 8 are more than the two key heads; T does not divide the vocabulary; three query heads of a key head are
    divided among two devices, and columns that no T divides.
    """
    whole = weights_of(args)
    check(args, Mesh(tensor=tensor))
    parts = [part_of(whole, args, tensor, device) for device in range(tensor)]
    sizes = local_args(args, tensor)
    ids = np.array([0, 5, 36, 18, 19])
    x = 0.1 * whole["tok_embeddings.weight"][ids]
    rows = sizes.vocab
    embedded = sum(look_up(ids, part["tok_embeddings.weight"], d * rows) for d, part in enumerate(parts))
    assert np.array_equal(embedded, whole["tok_embeddings.weight"][ids])
    split = sum(attention(x, part, sizes.n_heads, sizes.kv_heads, args.head_dim) for part in parts)
    assert np.allclose(split, attention(x, whole, args.n_heads, args.kv_heads, args.head_dim))
    assert np.allclose(sum(feed_forward(x, part) for part in parts), feed_forward(x, whole))
    logits = np.concatenate([x @ part["output.weight"].T for part in parts], axis=1)
    assert logits.shape == (len(ids), padded_vocab(args.vocab_size, tensor))
    assert np.allclose(logits[:, : args.vocab_size], x @ whole["output.weight"].T)


def test_shapes_are_those_of_what_a_device_holds() -> None:
    """Every part has the shape that local_shape says; norms are whole, and one device holds everything."""
    whole = weights_of(GROUPED)
    for tensor in (1, 2, 4, 8):
        for device in range(tensor):
            held = part_of(whole, GROUPED, tensor, device)
            assert {name: part.shape for name, part in held.items()} == {
                name: local_shape(name, GROUPED, tensor) for name in SHAPES
            }
    assert all(local_shape(name, GROUPED, 1) == whole_shape(name, GROUPED) for name in SHAPES)


def test_llama_2_70b_on_16_devices() -> None:
    """By hand: 4 heads of 128, one key head of 8 for each pair of devices, 1,792 hidden columns, 2,000 rows."""
    assert local_args(SEVENTY_B, 16) == (4, 1, 1792, 2000)
    shapes = {
        "tok_embeddings.weight": (2000, 8192),
        "layers.79.attention.wq.weight": (512, 8192),
        "layers.0.attention.wk.weight": (128, 8192),
        "layers.{}.attention.wv.weight": (128, 8192),
        "layers.3.attention.wo.weight": (8192, 512),
        "layers.3.feed_forward.w1.weight": (1792, 8192),
        "layers.3.feed_forward.w2.weight": (8192, 1792),
        "layers.3.ffn_norm.weight": (8192,),
        "output.weight": (2000, 8192),
    }
    assert {name: local_shape(name, SEVENTY_B, 16) for name in shapes} == shapes


def test_scales_go_with_the_output_features() -> None:
    """Split with a column-parallel weight, whole for a row-parallel one; embedding and norms have none."""
    scales = {
        "layers.7.attention.wq.scale": (512,),
        "layers.7.attention.wk.scale": (128,),
        "layers.7.attention.wo.scale": (8192,),
        "layers.{}.feed_forward.w1.scale": (1792,),
        "layers.7.feed_forward.w2.scale": (8192,),
        "output.scale": (2000,),
    }
    assert {name: local_shape(name, SEVENTY_B, 16) for name in scales} == scales
    for name in ("tok_embeddings.scale", "norm.scale", "layers.0.ffn_norm.scale", "layers.0.x.weight", "x"):
        with pytest.raises(KeyError):
            local_shape(name, SEVENTY_B, 16)


def test_every_weight_has_a_shape_and_an_axis_within_it() -> None:
    """Only the embedding is split otherwise than in LLaMA 2's files."""
    assert AXES.keys() == SHAPES.keys()
    assert all(axis is None or axis < len(SHAPES[name]) for name, axis in AXES.items())
    assert [name for name in AXES if device_axis(name) != AXES[name]] == ["tok_embeddings.weight"]


# ------------------------------------------------------------------------------------------------- meshes


def test_groups_are_neighbours() -> None:
    """Device d is in group d // T, at place d % T."""
    assert Mesh(data=2, tensor=3).groups() == [[0, 1, 2], [3, 4, 5]]
    assert Mesh(data=3).groups() == [[0], [1], [2]]
    assert Mesh(tensor=4).groups() == [[0, 1, 2, 3]]
    assert (Mesh().is_single, Mesh().devices, Mesh(2, 3).devices) == (True, 1, 6)
    assert not Mesh(data=2).is_single


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True, None, 2**31])
def test_what_is_no_number_of_devices_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel: got .*, expected a positive whole number"):
        Mesh(tensor=value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data_parallel: got .*, expected a positive whole number"):
        Mesh(data=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (SEVENTY_B, [1, 2, 4, 8, 16, 24, 32, 64]),
        (ModelArgs(dim=96, n_heads=12, n_kv_heads=6, ffn_hidden_dim=48, vocab_size=7), [1, 2, 3, 6, 12]),
        (ModelArgs(dim=96, n_heads=12, n_kv_heads=4, ffn_hidden_dim=36, vocab_size=7), [1, 2, 4, 8, 12]),
        (ModelArgs(dim=96, n_heads=12, n_kv_heads=1, ffn_hidden_dim=37, vocab_size=7), [1, 2, 3, 4, 6]),
    ],
)
def test_numbers_that_fit_are_those_that_pass(args: ModelArgs, expected: list[int]) -> None:
    """Against a trial of every number: 3 and 6 are refused where the four key heads cannot be divided among them, and 5
    where its last device would get none of 12 query heads; 12 where it would get none of 37 columns.
    """
    for tensor in range(1, args.n_heads + 1):
        if tensor in expected:
            check(args, Mesh(tensor=tensor))
        else:
            with pytest.raises(ConfigError, match=rf"expected one of {', '.join(map(str, expected))}$"):
                check(args, Mesh(tensor=tensor))
    assert fitting(args) == expected


def test_what_does_not_divide_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        check(SEVENTY_B, Mesh(tensor=48))
    assert str(error.value) == (
        "tensor_parallel: got 48, but n_heads 64 with n_kv_heads 8 cannot be divided among so many devices; "
        "expected one of 1, 2, 4, 8, 16, 24, 32, 64"
    )


def test_the_mesh_has_the_devices_that_there_are() -> None:
    """The pairs that work are those of the numbers that fit and divide the devices."""
    check(SEVENTY_B, Mesh(3, 4), 12)
    with pytest.raises(ConfigError) as error:
        check(SEVENTY_B, Mesh(1, 4), 12)
    assert str(error.value) == (
        "tensor_parallel: got 4 with data_parallel 1, 4 devices together, but there are 12; expected "
        "1 with data_parallel 12, or 2 with data_parallel 6, or 4 with data_parallel 3"
    )
    with pytest.raises(ConfigError, match=r"but there are 7; expected 1 with data_parallel 7$"):
        check(SEVENTY_B, Mesh(2, 8), 7)


def test_damaged_sizes_do_not_take_long() -> None:
    """A shape with the largest sizes that ModelArgs takes is answered at once."""
    begin = time.perf_counter()
    heads = 2**28
    assert fitting(ModelArgs(dim=2 * heads, n_heads=heads, n_layers=1, ffn_hidden_dim=heads))[-1] == heads
    assert time.perf_counter() - begin < 1.0


@pytest.mark.parametrize(("vocab_size", "tensor"), list(product([1, 31, 32, 33, 32000, 128256], [1, 2, 3, 32, 256])))
def test_the_vocabulary_is_padded_to_the_next_multiple(vocab_size: int, tensor: int) -> None:
    padded = padded_vocab(vocab_size, tensor)
    assert padded % tensor == 0
    assert vocab_size <= padded < vocab_size + tensor
    assert math.ceil(vocab_size / tensor) * tensor == padded


# ------------------------------------------------------------------------------------------------- communication


def test_what_llama_2_70b_communicates() -> None:
    """Two sums a layer and one for the embedding, each of 8,192 numbers, and 32,000 logits in float32."""
    found = collectives(SEVENTY_B, Mesh(tensor=8))
    assert found == (
        Collective("all-reduce", "embedding", 1, 8192),
        Collective("all-reduce", "attention", 80, 8192),
        Collective("all-reduce", "feed_forward", 80, 8192),
        Collective("all-gather", "head", 1, 32000),
    )
    assert [each.token_bytes(2) for each in found] == [16384, 80 * 16384, 80 * 16384, 128000]
    assert [each.token_bytes(4) for each in found] == [32768, 80 * 32768, 80 * 32768, 128000]


def test_copies_of_a_model_communicate_nothing() -> None:
    assert collectives(SEVENTY_B, Mesh(data=4)) == ()
    assert collectives(GROUPED, Mesh(tensor=2))[-1].elements == 38  # 37 ids, padded
