"""How a model is split over files and over devices: axes, shapes and communication; no tensors here.

    0      the output features of a linear layer (column parallel) and of its bias, or the rows of the vocabulary
    1      the input features of a linear layer (row parallel), or the columns of the embedding
    None   not split: every rank holds the whole weight

Megatron's scheme (Shoeybi et al. 2019), as fairscale and Meta's checkpoints have it: a column-parallel layer feeds a
row-parallel one, so attention and feed-forward each need a single sum over the ranks.

On devices the embedding is split along the vocabulary, because a tied head needs it so: each device looks up the ids
that it holds, zero elsewhere, and the sum over the devices is the embedding.

Names: T is the number of devices that hold one model together, H its query heads, K its key/value heads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isqrt
from typing import Literal, NamedTuple

from llama.config import LARGEST_SIZE, ModelArgs
from llama.errors import ConfigError, setting

# By name, ``{}`` for the layer's number. The embedding's axis is that of LLaMA 1 and 2 (fairscale's ParallelEmbedding);
# Llama 3 splits the vocabulary (VocabParallelEmbedding, axis 0).
AXES: dict[str, int | None] = {
    "tok_embeddings.weight": 1,
    "layers.{}.attention.wq.weight": 0,
    "layers.{}.attention.wk.weight": 0,
    "layers.{}.attention.wv.weight": 0,
    "layers.{}.attention.wq.bias": 0,
    "layers.{}.attention.wk.bias": 0,
    "layers.{}.attention.wv.bias": 0,
    "layers.{}.attention.q_norm.weight": None,
    "layers.{}.attention.k_norm.weight": None,
    "layers.{}.attention.wo.weight": 1,
    "layers.{}.feed_forward.w1.weight": 0,
    "layers.{}.feed_forward.w2.weight": 1,
    "layers.{}.feed_forward.w3.weight": 0,
    "layers.{}.attention_norm.weight": None,
    "layers.{}.ffn_norm.weight": None,
    "norm.weight": None,
    "output.weight": 0,
}
SHAPES: dict[
    str, tuple[str, ...]
] = {  # of whole weights, in the order of computation; sizes by the names in whole_shape
    "tok_embeddings.weight": ("vocab", "dim"),
    "layers.{}.attention.wq.weight": ("heads", "dim"),
    "layers.{}.attention.wk.weight": ("kv", "dim"),
    "layers.{}.attention.wv.weight": ("kv", "dim"),
    "layers.{}.attention.wq.bias": ("heads",),
    "layers.{}.attention.wk.bias": ("kv",),
    "layers.{}.attention.wv.bias": ("kv",),
    "layers.{}.attention.q_norm.weight": ("head",),
    "layers.{}.attention.k_norm.weight": ("head",),
    "layers.{}.attention.wo.weight": ("dim", "heads"),
    "layers.{}.feed_forward.w1.weight": ("hidden", "dim"),
    "layers.{}.feed_forward.w2.weight": ("dim", "hidden"),
    "layers.{}.feed_forward.w3.weight": ("hidden", "dim"),
    "layers.{}.attention_norm.weight": ("dim",),
    "layers.{}.ffn_norm.weight": ("dim",),
    "norm.weight": ("dim",),
    "output.weight": ("vocab", "dim"),
}
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
OPTIONAL = re.compile(r"(?P<qkv_bias>.*\.bias)|(?P<qk_norm>.*\.[qk]_norm\.weight)|(?P<head>output\.weight)")
LAYER = re.compile(r"\blayers\.(0|[1-9][0-9]*)\.")
FLOAT32_BYTES = 4

Kind = Literal["all-reduce", "all-gather"]
Where = Literal["embedding", "attention", "feed_forward", "head"]


def numberless(name: str) -> str:
    """A weight's name with ``{}`` in place of the layer's number."""
    return LAYER.sub(r"layers.{}.", name, count=1)


def weights_of(args: ModelArgs) -> list[str]:
    """The weights that a model of this shape has, by numberless names, in the order of computation."""
    has = {"qkv_bias": args.qkv_bias, "qk_norm": args.qk_norm, "head": not args.tie_word_embeddings}
    optional = {name: OPTIONAL.fullmatch(name) for name in SHAPES}
    return [name for name, found in optional.items() if found is None or has[str(found.lastgroup)]]


def axis_of(name: str) -> int | None:
    """The axis that a weight is split along in files.

    Raises:
        KeyError: ``name`` is no weight of the model.
    """
    return AXES[numberless(name)]


def device_axis(name: str) -> int | None:
    """The axis that a weight is split along on devices: that of files, but the vocabulary for the embedding.

    Raises:
        KeyError: ``name`` is no weight of the model.
    """
    return 0 if name == EMBEDDING else axis_of(name)


def head_of(rank: int, kv_heads: int, parts: int) -> int:
    """The first key/value head that a rank holds.

    With more ranks than heads, which the heads must divide, neighbouring ranks hold the same head.
    """
    return rank * kv_heads // parts


@dataclass(frozen=True)
class Mesh:
    """Devices in a grid: ``data`` groups of ``tensor`` devices.

    The devices of a group hold one copy of the model together, and every group runs requests of its own. Device d is in
    group ``d // tensor``, at place ``d % tensor`` in it.

    Raises:
        ConfigError: a number is not a positive whole number.
    """

    data: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, value in (("data_parallel", self.data), ("tensor_parallel", self.tensor)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE:
                raise ConfigError(f"{name}: got {value!r}, expected a positive whole number")

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.data * self.tensor

    @property
    def is_single(self) -> bool:
        """Whether there is one device, so that nothing is split and nothing communicated."""
        return self.devices == 1

    def groups(self) -> list[list[int]]:
        """The devices of each group: the replica groups of every collective."""
        return [[*range(first, first + self.tensor)] for first in range(0, self.devices, self.tensor)]


class LocalSizes(NamedTuple):
    """The sizes that one device computes with; ``dim`` and ``head_dim`` are those of the whole model.

    Attributes:
        n_heads: query heads, H / T, those of zeros included.
        kv_heads: key and value heads, K / T, at least 1.
        hidden_dim: of the feed-forward layer, zeros included.
        vocab: rows of the embedding and the head, zeros included.
    """

    n_heads: int
    kv_heads: int
    hidden_dim: int
    vocab: int


@dataclass(frozen=True)
class Collective:
    """One kind of communication in a run of the model.

    Attributes:
        kind: ``all-reduce`` sums, ``all-gather`` concatenates; each within the mesh's groups.
        where: whose result it is.
        count: how many there are in a run, whatever its number of tokens.
        elements: numbers of its result for a token; of the head, for a position that the head runs on.
    """

    kind: Kind
    where: Where
    count: int
    elements: int

    def token_bytes(self, activation_bytes: int) -> int:
        """Bytes of the results for a token, all ``count`` together; logits are float32.

        Args:
            activation_bytes: of a number of the residual stream.
        """
        return self.count * self.elements * (FLOAT32_BYTES if self.where == "head" else activation_bytes)


def fitting(args: ModelArgs) -> list[int]:
    """Every number of devices that one model of this shape can be split over, ascending."""
    heads, group = args.kv_heads, args.n_heads // args.kv_heads
    small = [t for t in range(1, isqrt(heads) + 1) if heads % t == 0]
    roots = range(1, isqrt(group) + 2)
    candidates = {*small, *(heads // t for t in small)}
    candidates |= {heads * shared for n in roots for shared in (n, _ceil(group, n))}
    return [t for t in sorted(candidates) if not _indivisible(args, t)]


def _indivisible(args: ModelArgs, tensor: int) -> list[str]:
    """Which sizes cannot be split over T devices, as the checkpoint calls them."""
    heads, group = args.kv_heads, args.n_heads // args.kv_heads
    wrong = []
    if heads % tensor and (tensor % heads or _leaves_some_idle(group, tensor // heads)):
        wrong.append(f"n_heads {args.n_heads} with n_kv_heads {heads}")
    if _leaves_some_idle(args.hidden_dim, tensor):
        wrong.append(f"the feed-forward width {args.hidden_dim}")
    return wrong


def _leaves_some_idle(size: int, parts: int) -> bool:
    """Whether parts of the same length, the last of which may be filled up, are more than ``size`` needs."""
    return (parts - 1) * _ceil(size, parts) >= size


def _ceil(size: int, parts: int) -> int:
    return -(-size // parts)


def check(args: ModelArgs, mesh: Mesh, device_count: int | None = None, hint: str = "") -> None:
    """Check that a model can be split over a mesh, and that the mesh has the devices that there are.

    T divides the key/value heads, or they divide T: then the query heads of one are split over several devices, and
    what does not fill the last of them is filled up with zeros. So are the feed-forward width and the vocabulary.

    Args:
        device_count: the number of devices; None does not compare it.
        hint: for the end of the message about that number.

    Raises:
        ConfigError: heads that cannot be divided so, devices that would have nothing but zeros, or another number of
            devices; the message names what works.
    """
    wrong = _indivisible(args, mesh.tensor)
    if wrong:
        raise ConfigError(
            f"tensor_parallel: got {mesh.tensor}, but {' and '.join(wrong)} cannot be divided among so many devices; "
            f"expected one of {', '.join(map(str, fitting(args)))}"
        )
    if device_count is not None and mesh.devices != device_count:
        grouped = f" with {setting('data_parallel')} "
        pairs = [f"{t}{grouped}{device_count // t}" for t in fitting(args) if device_count % t == 0]
        raise ConfigError(
            f"tensor_parallel: got {mesh.tensor}{grouped}{mesh.data}, {mesh.devices} devices together, "
            f"but there are {device_count}; expected {', or '.join(pairs)}{hint}"
        )


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """The rows of embedding and head on all devices of a group: the vocabulary, rounded up to a multiple of T."""
    return _ceil(vocab_size, tensor) * tensor


def local_args(args: ModelArgs, tensor: int) -> LocalSizes:
    """The sizes that one of T devices computes with.

    Args:
        args: the whole model's shape, its vocabulary settled.
        tensor: T, which ``check`` has accepted.
    """
    kv_heads = max(args.kv_heads // tensor, 1)
    group = args.n_heads // args.kv_heads
    return LocalSizes(
        n_heads=kv_heads * _ceil(group, max(tensor // args.kv_heads, 1)),
        kv_heads=kv_heads,
        hidden_dim=_ceil(args.hidden_dim, tensor),
        vocab=_ceil(args.vocab_size, tensor),
    )


def span(name: str, args: ModelArgs, tensor: int, rank: int) -> tuple[int, int]:
    """What one of T devices holds of a weight, or of its scales, along the axis that is split: where it begins in the
    whole, and how much that is. Up to ``local_shape`` it is filled up with zeros.

    Args:
        name: Meta's, of a weight that is split.
        args: the whole model's shape, its vocabulary settled.
        tensor: T, which ``check`` has accepted.
        rank: the device's place in its group.
    """
    weight = weight_of_scales(name)
    axis = device_axis(weight)
    assert axis is not None
    size, whole = local_shape(weight, args, tensor)[axis], whole_shape(weight, args)[axis]
    kind, end = SHAPES[numberless(weight)][axis], whole
    first = rank * size
    if kind in ("heads", "kv") and tensor > args.kv_heads:
        head = head_of(rank, args.kv_heads, tensor)
        of_head = whole // args.kv_heads  # rows of one key/value head
        shared = 0 if kind == "kv" else rank % (tensor // args.kv_heads)
        first, end = head * of_head + shared * size, (head + 1) * of_head
    first = min(first, end)
    return first, min(size, end - first)


def whole_shape(name: str, args: ModelArgs) -> tuple[int, ...]:
    """The shape of a whole weight.

    Args:
        name: Meta's, with the layer's number or ``{}``.
        args: the model's shape, its vocabulary settled.

    Raises:
        KeyError: ``name`` is no weight of the model.
    """
    sizes = {
        "dim": args.dim,
        "heads": args.n_heads * args.head_dim,
        "kv": args.kv_heads * args.head_dim,
        "head": args.head_dim,
        "hidden": args.hidden_dim,
        "vocab": args.vocab_size,
    }
    return tuple(sizes[size] for size in SHAPES[numberless(name)])


def local_shape(name: str, args: ModelArgs, tensor: int) -> tuple[int, ...]:
    """The shape of a weight, or of the scales of an int8 weight's rows, on one of T devices.

    Scales have one number for each output feature: they are split with a column-parallel weight, and whole for a
    row-parallel one.

    Args:
        name: Meta's, with the layer's number or ``{}``; scales end in ``.scale``.
        args: the whole model's shape, its vocabulary settled.
        tensor: T, which ``check`` has accepted.

    Raises:
        KeyError: ``name`` is no weight of the model, or no linear layer's scales.
    """
    weight = weight_of_scales(name)
    local = local_args(args, tensor)
    split = {
        "heads": local.n_heads * args.head_dim,
        "kv": local.kv_heads * args.head_dim,
        "hidden": local.hidden_dim,
        "vocab": local.vocab,
    }
    shape = list(whole_shape(weight, args))
    axis = device_axis(weight)
    if axis is not None:
        shape[axis] = split[SHAPES[numberless(weight)][axis]]
    if weight == name:
        return tuple(shape)
    if not has_scale(weight):
        raise KeyError(name)
    return (shape[0],)


def weight_of_scales(name: str) -> str:
    """The name of the weight that scales belong to; of a weight its own."""
    return f"{name.removesuffix('scale')}weight" if name.endswith(".scale") else name


def has_scale(name: str) -> bool:
    """Whether a weight has scales under int8: those of linear layers have, embedding, biases and norms have not.

    Raises:
        KeyError: ``name`` is no weight of the model.
    """
    return len(SHAPES[numberless(name)]) == 2 and name != EMBEDDING


def collectives(args: ModelArgs, mesh: Mesh) -> tuple[Collective, ...]:
    """What the devices of a group communicate in a run of the model; nothing where T is 1.

    Args:
        args: the whole model's shape, its vocabulary settled.
        mesh: which ``check`` has accepted.
    """
    if mesh.tensor == 1:
        return ()
    return (
        Collective("all-reduce", "embedding", 1, args.dim),
        Collective("all-reduce", "attention", args.n_layers, args.dim),
        Collective("all-reduce", "feed_forward", args.n_layers, args.dim),
        Collective("all-gather", "head", 1, padded_vocab(args.vocab_size, mesh.tensor)),
    )
