"""One table: each weight's name in Meta's and in Hugging Face's checkpoints.

Its shape, and the axis that it is split along, are in llama/sharding.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from llama import sharding
from llama.config import ModelArgs
from llama.sharding import (
    LAYER,
    SHAPES,
    has_scale,
    numberless as numberless,
    weight_of_scales as weight_of_scales,
    weights_of as weights_of,
    whole_shape,
)
from llama.storage import scale_of as scale_of


class Weight(NamedTuple):
    """One row of the table. ``{}`` stands for the layer's number, sizes are those of SHAPES."""

    meta: str
    hugging_face: str
    shape: tuple[str, ...]


def _row(meta: str, hugging_face: str) -> Weight:
    return Weight(meta, hugging_face, SHAPES[meta])


EMBEDDING, HEAD = sharding.EMBEDDING, sharding.HEAD
BEFORE_LAYERS = (_row(EMBEDDING, "model.embed_tokens.weight"),)
IN_LAYER = (
    _row("layers.{}.attention.wq.weight", "model.layers.{}.self_attn.q_proj.weight"),
    _row("layers.{}.attention.wk.weight", "model.layers.{}.self_attn.k_proj.weight"),
    _row("layers.{}.attention.wv.weight", "model.layers.{}.self_attn.v_proj.weight"),
    _row("layers.{}.attention.wq.bias", "model.layers.{}.self_attn.q_proj.bias"),
    _row("layers.{}.attention.wk.bias", "model.layers.{}.self_attn.k_proj.bias"),
    _row("layers.{}.attention.wv.bias", "model.layers.{}.self_attn.v_proj.bias"),
    _row("layers.{}.attention.q_norm.weight", "model.layers.{}.self_attn.q_norm.weight"),
    _row("layers.{}.attention.k_norm.weight", "model.layers.{}.self_attn.k_norm.weight"),
    _row("layers.{}.attention.wo.weight", "model.layers.{}.self_attn.o_proj.weight"),
    _row("layers.{}.feed_forward.w1.weight", "model.layers.{}.mlp.gate_proj.weight"),
    _row("layers.{}.feed_forward.w2.weight", "model.layers.{}.mlp.down_proj.weight"),
    _row("layers.{}.feed_forward.w3.weight", "model.layers.{}.mlp.up_proj.weight"),
    _row("layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight"),
    _row("layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
)
AFTER_LAYERS = (
    _row("norm.weight", "model.norm.weight"),
    _row(HEAD, "lm_head.weight"),
)
TABLE = {weight.meta: weight for weight in (*BEFORE_LAYERS, *IN_LAYER, *AFTER_LAYERS)}
FROM_HUGGING_FACE = {weight.hugging_face: weight for weight in TABLE.values()}

# Phi-3's fused weights, by Hugging Face's name, and the weights that their rows are, in this order
FUSED = {
    "model.layers.{}.self_attn.qkv_proj.weight": tuple(weight.meta for weight in IN_LAYER[:3]),
    "model.layers.{}.mlp.gate_up_proj.weight": ("layers.{}.feed_forward.w1.weight", "layers.{}.feed_forward.w3.weight"),
}

# Tables of rotary frequencies, which are computed from the settings and not read
DERIVED = re.compile(
    r"rope\.freqs|layers\.[0-9]+\.attention\.inner_attention\.rope\.freqs|model\.(layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq"
)


def weight_of(name: str) -> Weight | None:
    """Return the table's row for one of Meta's names, or None."""
    return TABLE.get(numberless(name))


def to_hugging_face(name: str) -> str | None:
    """Hugging Face's name for one of Meta's, or None for a name that is not in the table."""
    weight, layer = weight_of(name), LAYER.search(name)
    return weight and weight.hugging_face.format(layer and layer.group(1))


def to_meta(name: str) -> str | None:
    """Meta's name for one of Hugging Face's, or None for a name that is not in the table."""
    weight, layer = FROM_HUGGING_FACE.get(numberless(name)), LAYER.search(name)
    return weight and weight.meta.format(layer and layer.group(1))


def fused_in(name: str) -> list[str]:
    """Meta's names of the weights that one of Hugging Face's fused weights holds, row after row; else none."""
    layer = LAYER.search(name)
    return [meta.format(layer and layer.group(1)) for meta in FUSED.get(numberless(name), ())]


def is_key_or_value(weight: Weight) -> bool:
    """Whether a weight has one block of rows for each key/value head.

    If there are more shards than heads, several shards hold the same block.
    """
    return weight.shape[0] == "kv"


def expected_weights(args: ModelArgs) -> Iterator[tuple[str, Weight]]:
    """Yield (Meta's name, row of the table) for every weight of a model, in the order of computation."""
    has = set(weights_of(args))
    in_layer = [weight for weight in IN_LAYER if weight.meta in has]
    for weight in BEFORE_LAYERS:
        yield weight.meta, weight
    for layer in range(args.n_layers):
        for weight in in_layer:
            yield weight.meta.format(layer), weight
    for weight in AFTER_LAYERS:
        if weight.meta in has:
            yield weight.meta, weight


def is_quantised(name: str) -> bool:
    """Whether a weight becomes int8 under that dtype: a linear layer's does, embedding, biases and norms do not."""
    return weight_of(name) is not None and has_scale(name)


def is_scale(name: str) -> bool:
    """Whether a name is that of a quantised weight's scales."""
    return name.endswith(".scale")


def shape_of(weight: Weight, args: ModelArgs) -> tuple[int, ...]:
    """The shape of a whole weight in a model whose vocabulary size is settled."""
    return whole_shape(weight.meta, args)
