"""What a model needs on each device, and what a decode step would take there: arithmetic over shapes, no tensors.

Bytes are counted as they are allocated. Times are predictions from public figures of bandwidth: nothing is measured.

Dtypes are given by their names (``float32``, ``bfloat16``, ``int8``, ``int4``), so that no torch is needed.

Names: T devices hold one model together (sharding.py), D such groups share the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from llama.config import LONGEST_FLOAT32_CACHE, EngineConfig, ModelArgs
from llama.sharding import (
    EMBEDDING,
    Collective,
    Mesh,
    collectives,
    device_axis,
    fitting,
    local_args,
    local_shape,
    padded_vocab,
    weights_of,
    whole_shape,
)
from llama.storage import ITEMSIZE, Storage, WeightFormat, choose_storage

GIB = 2**30
VALUE_BLOCK = 128  # positions whose values stand side by side in the cache (compiled/cache.py)
Part = Literal["embedding", "attention", "feed_forward", "head"]
PARTS: tuple[Part, ...] = ("embedding", "attention", "feed_forward", "head")


class Accelerator(NamedTuple):
    """Figures of a device; None where there is none.

    Attributes:
        memory: bytes of HBM.
        bandwidth: bytes that are read from HBM in a second.
        link: bytes that a chip sends to other chips in a second, all its links together, in one direction.
        flops: bfloat16 operations in a second.
        is_public: they are what the maker publishes, none is the user's own.
    """

    memory: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    flops: float | None = None
    is_public: bool = False


# From https://docs.cloud.google.com/tpu/docs/, pages v4, v5e, v5p and v6e. Google writes GB for the memory of v5e and
# v6e, GiB for that of v4 and v5p; HBM comes in powers of two, so all are GiB. The pages give the links' bandwidth of
# both directions together, 400, 1200 and 800 GB/s. That of v4 has none: six links of 50 GB/s (Jouppi et al. 2023).
ACCELERATORS = {
    "v4": Accelerator(32 * GIB, 1200e9, 300e9, 275e12, is_public=True),
    "v5e": Accelerator(16 * GIB, 819e9, 200e9, 197e12, is_public=True),
    "v5p": Accelerator(95 * GIB, 2765e9, 600e9, 459e12, is_public=True),
    "v6e": Accelerator(32 * GIB, 1638e9, 400e9, 918e12, is_public=True),
    "cpu": Accelerator(),
}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
        weights: in their storage dtype.
        cache: keys and values of every slot and position.
        prefixes: rows of the cache that keep prefixes.
        activations: an upper estimate for the largest chunk: the stream, queries, keys, the feed-forward layer's two
            inputs, the scores before and after the softmax, and the logits.
        available: what the device has free; None where it does not say.
        cache_dtype: of the cache, prefixes included.
    """

    weights: int
    cache: int
    prefixes: int
    activations: int
    available: int | None
    cache_dtype: str

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.prefixes + self.activations

    @property
    def fits(self) -> bool:
        """Whether the device has room, as far as it says."""
        return self.available is None or self.total <= self.available

    def __str__(self) -> str:
        kept = f" + prefixes {gib(self.prefixes)}" if self.prefixes else ""
        cache = f"cache {gib(self.cache)} ({self.cache_dtype})"
        parts = f"weights {gib(self.weights)} + {cache}{kept} + activations {gib(self.activations)}"
        parts = f"{parts} = {gib(self.total)}"
        return f"{parts} of {gib(self.available)} free" if self.available is not None else parts


def gib(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.1f} MiB"


def choose_dtypes(
    config: EngineConfig, *, on_cpu: bool, stored: Mapping[str, WeightFormat] | None = None
) -> tuple[Storage, str]:
    """How the weights are stored, and the dtype of the activations: float32 on the CPU device, where bfloat16
    arithmetic is slow.

    Args:
        on_cpu: the device is the CPU device.
        stored: the checkpoint's quantised weights, by numberless names (storage.py).
    """
    wide = "float32" if on_cpu else "bfloat16"
    storage = choose_storage(config.dtype, stored or {}, wide=wide, group=config.int4_group)
    return storage, wide if on_cpu or storage.is_quantised else storage.dtype


def choose_cache_dtype(config: EngineConfig, activation: str) -> str:
    """The dtype of keys and values; see ``EngineConfig.cache_dtype``.

    Args:
        activation: dtype of the activations, which ``choose_dtypes`` settles by the device.
    """
    if config.cache_dtype != "auto":
        return config.cache_dtype
    is_wide = activation == "float32" and config.max_seq_len <= LONGEST_FLOAT32_CACHE
    return "float32" if is_wide else "bfloat16"


@dataclass(frozen=True)
class WeightSplit:
    """One row of the split: a weight, or the weights of one name in all layers.

    Attributes:
        name: Meta's, ``{}`` for the layer's number.
        count: how many there are.
        axis: that they are split along; None where each device holds the whole.
        whole: shape of one, [out, in] or [dim], without padding.
        local: shape of one on a device.
        size: bytes of all of them on a device, scales included.
    """

    name: str
    count: int
    axis: int | None
    whole: tuple[int, ...]
    local: tuple[int, ...]
    size: int

    @property
    def part(self) -> Part:
        """The part of the model that it belongs to; each norm belongs to what it feeds."""
        if self.name == EMBEDDING:
            return "embedding"
        if ".{}." not in self.name:
            return "head"
        return "attention" if "attention" in self.name else "feed_forward"


def split_weights(args: ModelArgs, storage: str | Storage, tensor: int = 1) -> list[WeightSplit]:
    """Every weight's split over T devices, in the order of computation.

    Args:
        args: the whole model's shape, its vocabulary settled.
        storage: how the weights are stored; scales are float32, and what stays as it is, is float32 at most.
        tensor: T.
    """
    storage, rows = Storage.of(storage), []
    for name in weights_of(args):
        count = args.n_layers if "{}" in name else 1
        local = local_shape(name, args, tensor)
        size = storage.nbytes(name, args, tensor)
        axis = device_axis(name) if tensor > 1 else None
        rows.append(WeightSplit(name, count, axis, whole_shape(name, args), local, count * size))
    return rows


def weight_bytes(args: ModelArgs, storage: str | Storage, tensor: int = 1) -> int:
    """Bytes of a model's weights on one of T devices; see ``split_weights``."""
    return sum(row.size for row in split_weights(args, storage, tensor))


def parameter_count(args: ModelArgs) -> int:
    """Numbers of the whole model, without padding."""
    return sum(row.count * prod(row.whole) for row in split_weights(args, "int8"))


def row_bytes(args: ModelArgs, config: EngineConfig, dtype: str, tensor: int = 1) -> int:
    """Bytes of one row of the cache (compiled/cache.py) on one of T devices: keys and values of a slot.

    Args:
        dtype: of the cache.
    """
    heads = local_args(args, tensor).kv_heads
    return args.n_layers * heads * cache_positions(config) * args.head_dim * ITEMSIZE[dtype]


def cache_positions(config: EngineConfig) -> int:
    """Positions of keys and those of values that a row of the cache has, together."""
    return config.positions + value_blocks(config.positions) * VALUE_BLOCK


def value_blocks(positions: int) -> int:
    """How many blocks of ``VALUE_BLOCK`` positions hold the values of a row: always one more than full ones."""
    return positions // VALUE_BLOCK + 1


def activation_bytes(args: ModelArgs, config: EngineConfig, activation: str, slots: int, tensor: int = 1) -> int:
    """The upper estimate of MemoryPlan on one of T devices.

    Args:
        slots: that the T devices run together.
    """
    local = local_args(args, tensor)
    chunk = config.buckets[0] * slots
    per_token = 3 * args.dim + 2 * args.head_dim * (local.n_heads + local.kv_heads) + 2 * local.hidden_dim
    scores = 2 * local.n_heads * config.max_seq_len
    wide = ITEMSIZE["float32"]
    logits = slots * wide * (padded_vocab(args.vocab_size, tensor) + (local.vocab if tensor > 1 else 0))
    return chunk * (per_token + scores) * max(ITEMSIZE[activation], wide) + logits


def plan_memory(
    args: ModelArgs,
    config: EngineConfig,
    storage: str | Storage,
    activation: str,
    available: int | None,
    *,
    mesh: Mesh | None = None,
    slots: int | None = None,
    kept_rows: int = 0,
) -> MemoryPlan:
    """Count the bytes that a model of this shape needs on each device.

    Args:
        args: the checkpoint's shape, its vocabulary settled.
        config: ``max_batch_size`` slots are divided among the D groups.
        storage: how the weights are stored.
        activation: dtype of the activations.
        available: the device's free bytes, None where it does not say.
        mesh: which ``sharding.check`` has accepted; None for one device.
        slots: of each group; None for its part of those of ``config``.
        kept_rows: rows of the cache that keep prefixes, of all groups.
    """
    mesh = mesh or Mesh()
    slots = _part(config.max_batch_size, mesh) if slots is None else slots
    dtype = choose_cache_dtype(config, activation)
    row = row_bytes(args, config, dtype, mesh.tensor)
    return MemoryPlan(
        weights=weight_bytes(args, storage, mesh.tensor),
        cache=row * slots,
        prefixes=row * _part(kept_rows, mesh),
        activations=activation_bytes(args, config, activation, slots, mesh.tensor),
        available=available,
        cache_dtype=dtype,
    )


def _part(rows: int, mesh: Mesh) -> int:
    """The most rows that one of the D groups has of ``rows``."""
    return -(-rows // mesh.data)


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest value in [low, high) that fits, by bisection; None where not even ``low`` does."""
    if low >= high or not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Prediction:
    """Seconds of a decode step in which every slot of a group chooses a token, its cache full.

        step = max(read, compute) + communicate

    The terms are lower bounds from public figures: kernels that reach the full bandwidth, links that are all busy, no
    latency. Nothing overlaps with communication.

    Attributes:
        read_bytes: weights (but of the embedding only the head that is tied to it) and cache, on a device.
        read_s: at HBM's bandwidth.
        compute_s: two operations for each number in linear layers and each slot; None where no figure is known.
        communicate_s: collectives as rings: an all-reduce of n bytes sends 2 (T - 1) / T n from each device, an
            all-gather whose result is n bytes (T - 1) / T n.
        collectives: how many there are; each microsecond of latency of one adds so many to a step.
        slots: that choose a token in a step, of all groups.
    """

    read_bytes: int
    read_s: float
    compute_s: float | None
    communicate_s: float
    collectives: int
    slots: int

    @property
    def step_s(self) -> float:
        """Seconds of the step, which is the time between two tokens of one text."""
        return max(self.read_s, self.compute_s or 0.0) + self.communicate_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all slots in a second."""
        return self.slots / self.step_s


@dataclass(frozen=True)
class DevicePlan:
    """A model on a mesh of devices: what each holds, and what a decode step would take.

    Rows of the cache that keep prefixes are not counted.

    Args:
        args: the whole model's shape, its vocabulary settled.
        mesh: which ``sharding.check`` has accepted.
        config: the engine's shapes; ``max_batch_size`` slots on all devices together, which D divides.
        storage: how the weights are stored.
        activation: dtype of stream and cache.
        accelerator: the figures of each device.
    """

    args: ModelArgs
    mesh: Mesh
    config: EngineConfig
    storage: str | Storage
    activation: str
    accelerator: Accelerator

    @property
    def weights_as(self) -> str:
        """The dtype of the weights, the narrowest of several."""
        return Storage.of(self.storage).label

    @property
    def is_quantised(self) -> bool:
        """Whether some weights are quantised."""
        return Storage.of(self.storage).is_quantised

    def storage_of(self, name: str) -> WeightFormat:
        """How a weight is stored; what the checkpoint decides is taken for float32."""
        return Storage.of(self.storage).format_of(name, self.args, self.mesh.tensor) or WeightFormat("float32")

    @property
    def weights(self) -> list[WeightSplit]:
        """Every weight's split."""
        return split_weights(self.args, self.storage, self.mesh.tensor)

    @property
    def memory(self) -> MemoryPlan:
        """Bytes on each device."""
        return self._memory(self.mesh, self.slots)

    @property
    def slots(self) -> int:
        """Slots of each group."""
        return self.config.max_batch_size // self.mesh.data

    @property
    def held(self) -> dict[str, int]:
        """Bytes on each device by what they are for: each part's weights, then cache and activations."""
        rows, memory = self.weights, self.memory
        parts = {str(part): sum(row.size for row in rows if row.part == part) for part in PARTS}
        return {**parts, "cache": memory.cache, "activations": memory.activations}

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """What the devices of a group communicate in a run."""
        return collectives(self.args, self.mesh)

    @property
    def largest_batch(self) -> int | None:
        """The most slots, on all devices together, that fit; None where the memory is not known, 0 where none does."""
        if self.accelerator.memory is None:
            return None
        row = row_bytes(self.args, self.config, self.memory.cache_dtype, self.mesh.tensor)
        most = int(self.accelerator.memory) // row + 2
        found = largest(1, most, lambda slots: self._memory(self.mesh, slots).fits)
        return (found or 0) * self.mesh.data

    @property
    def smallest_split(self) -> int | None:
        """The smallest T whose devices have room; None where the memory is not known, or no T is enough."""
        if self.accelerator.memory is None:
            return None
        meshes = (Mesh(self.mesh.data, tensor) for tensor in fitting(self.args))
        return next((mesh.tensor for mesh in meshes if self._memory(mesh, self.slots).fits), None)

    @property
    def prediction(self) -> Prediction | None:
        """Seconds of a decode step; None where a figure is not known."""
        figures, tensor = self.accelerator, self.mesh.tensor
        if figures.bandwidth is None or (tensor > 1 and figures.link is None):
            return None
        rows = [row for row in self.weights if row.name != EMBEDDING or self.args.tie_word_embeddings]
        numbers = sum(row.count * prod(row.local) for row in rows)
        live = 2 * self.config.max_seq_len / cache_positions(self.config)
        read_bytes = sum(row.size for row in rows) + int(self.memory.cache * live)
        return Prediction(
            read_bytes=read_bytes,
            read_s=read_bytes / figures.bandwidth,
            compute_s=None if figures.flops is None else 2 * numbers * self.slots / figures.flops,
            communicate_s=self.slots * self._sent_bytes() / (figures.link or 1.0),
            collectives=sum(each.count for each in self.collectives),
            slots=self.config.max_batch_size,
        )

    def _sent_bytes(self) -> float:
        """Bytes that a device sends for each token that a slot of its group chooses."""
        turns = {"all-reduce": 2, "all-gather": 1}
        share = (self.mesh.tensor - 1) / self.mesh.tensor
        itemsize = ITEMSIZE[self.activation]
        return sum(turns[each.kind] * share * each.token_bytes(itemsize) for each in self.collectives)

    def _memory(self, mesh: Mesh, slots: int) -> MemoryPlan:
        available = None if self.accelerator.memory is None else int(self.accelerator.memory)
        return plan_memory(self.args, self.config, self.storage, self.activation, available, mesh=mesh, slots=slots)
