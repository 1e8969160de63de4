"""The axis along which each weight is split over model-parallel ranks; no tensors here.

    0      the output features of a linear layer (column parallel), or the rows of the vocabulary
    1      the input features of a linear layer (row parallel), or the columns of the embedding
    None   not split: every rank holds the whole weight

Megatron's scheme (Shoeybi et al. 2019), as fairscale and Meta's checkpoints have it: a column-parallel layer feeds a
row-parallel one, so attention and feed-forward each need a single sum over the ranks.
"""

from __future__ import annotations

import re

# By name, ``{}`` for the layer's number. The embedding's axis is that of LLaMA 1 and 2 (fairscale's ParallelEmbedding);
# Llama 3 splits the vocabulary (VocabParallelEmbedding, axis 0).
AXES: dict[str, int | None] = {
    "tok_embeddings.weight": 1,
    "layers.{}.attention.wq.weight": 0,
    "layers.{}.attention.wk.weight": 0,
    "layers.{}.attention.wv.weight": 0,
    "layers.{}.attention.wo.weight": 1,
    "layers.{}.feed_forward.w1.weight": 0,
    "layers.{}.feed_forward.w2.weight": 1,
    "layers.{}.feed_forward.w3.weight": 0,
    "layers.{}.attention_norm.weight": None,
    "layers.{}.ffn_norm.weight": None,
    "norm.weight": None,
    "output.weight": 0,
}
LAYER = re.compile(r"\blayers\.(0|[1-9][0-9]*)\.")


def numberless(name: str) -> str:
    """A weight's name with ``{}`` in place of the layer's number."""
    return LAYER.sub(r"layers.{}.", name, count=1)


def axis_of(name: str) -> int | None:
    """The axis that a weight is split along.

    Raises:
        KeyError: ``name`` is no weight of the model.
    """
    return AXES[numberless(name)]
