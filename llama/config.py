"""The three frozen dataclasses that say everything static: a checkpoint's shape, the engine's shapes, one request's wishes.

No tensor and no device here. Validation happens at construction, so that a wrong number is refused before any file is opened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from llama.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16"]
BucketPolicy = Literal["greedy", "pad"]

DTYPES: tuple[DType, ...] = ("auto", "float32", "bfloat16")
BUCKET_POLICIES: tuple[BucketPolicy, ...] = ("greedy", "pad")
DEFAULT_BUCKETS = (512, 64, 8, 1)
SMALLEST_KEY_BUCKET = 512
DEMO_CONTEXT = 512  # positions that the demo model was trained for


# Bounds that no model comes near: sizes beyond them are a damaged file, and would overflow or run for ever further on.
LARGEST_SIZE = 2**30
LARGEST_FLOAT = 1e30
_LARGEST = {
    "dim": LARGEST_SIZE,
    "n_layers": 10_000,
    "n_heads": LARGEST_SIZE,
    "n_kv_heads": LARGEST_SIZE,
    "multiple_of": LARGEST_SIZE,
    "ffn_hidden_dim": LARGEST_SIZE,
}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_whole(value)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies (llama-models, ``apply_scaling``).

    Wavelengths shorter than ``original_max_seq_len / high_freq_factor`` stay, those longer than
    ``original_max_seq_len / low_freq_factor`` are divided by ``factor``, the ones between are blended.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class ModelArgs:
    """A checkpoint's shape, in the names of Meta's params.json.

    Attributes:
        dim: width of the residual stream.
        n_layers: number of transformer blocks.
        n_heads: query heads; ``dim / n_heads`` is the head's size, and must be even.
        n_kv_heads: key and value heads; None means as many as query heads.
        vocab_size: rows of the embedding. -1, as LLaMA 1 and 2 ship it, means: as many as the checkpoint's embedding has.
        multiple_of: the feed-forward width is rounded up to a multiple of this.
        ffn_dim_multiplier: a factor on the feed-forward width before it is rounded; None means 1.
        ffn_hidden_dim: the feed-forward width itself, where the rule above does not yield it; None means the rule.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Llama 3.1's scaling of them, or None.
        tie_word_embeddings: the vocabulary head is the embedding (Llama 3.2's small models).

    Raises:
        ConfigError: a number is not positive, or does not divide what it must divide.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    ffn_hidden_dim: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            optional = name in ("n_kv_heads", "ffn_hidden_dim")
            if not (optional and value is None) and not (_is_whole(value) and 1 <= value <= largest):
                raise ConfigError(f"{name}: got {value!r}, expected a positive whole number up to {largest}")
        for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier"):
            value = getattr(self, name)
            optional = name == "ffn_dim_multiplier"
            if not (optional and value is None) and not (_is_number(value) and 0 < value < LARGEST_FLOAT):
                raise ConfigError(f"{name}: got {value!r}, expected a positive finite number")
        if not (_is_whole(self.vocab_size) and (self.vocab_size == -1 or 1 <= self.vocab_size <= LARGEST_SIZE)):
            raise ConfigError(f"vocab_size: got {self.vocab_size!r}, expected a positive whole number, or -1 for the embedding's own")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"tie_word_embeddings: got {self.tie_word_embeddings!r}, expected true or false")
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ConfigError(
                f"dim: got {self.dim} for {self.n_heads} heads, expected n_heads times an even number (rotary embedding turns pairs)"
            )
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"n_kv_heads: got {self.kv_heads}, expected a divisor of n_heads={self.n_heads}")
        if not 1 <= self.hidden_dim <= LARGEST_SIZE:
            raise ConfigError(
                f"ffn_dim_multiplier, multiple_of: got {self.ffn_dim_multiplier!r} and {self.multiple_of}, which make a feed-forward "
                f"layer of width {self.hidden_dim}, expected 1 to {LARGEST_SIZE}"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default filled in."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer: two thirds of four times ``dim``, scaled and rounded up as Meta's code does."""
        if self.ffn_hidden_dim is not None:
            return self.ffn_hidden_dim
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> ModelArgs:
        """Read the content of a params.json.

        Args:
            params: the parsed file. Meta's ``use_scaled_rope`` (with ``rope_scaling_factor``) becomes ``rope_scaling``;
                ``max_seq_len`` and ``max_batch_size``, which some releases carry, are the engine's business and are ignored.

        Raises:
            ConfigError: a key that is not known (it would change what must be computed), or a value out of its range.
        """
        known = {f.name for f in fields(cls)} - {"rope_scaling"}
        values = {k: v for k, v in params.items() if k not in ("max_seq_len", "max_batch_size")}
        scaled = values.pop("use_scaled_rope", False)
        factor = values.pop("rope_scaling_factor", None)
        if not isinstance(scaled, bool):
            raise ConfigError(f"use_scaled_rope: got {scaled!r}, expected true or false")
        if factor is not None and not (_is_number(factor) and 0 < factor < LARGEST_FLOAT):
            raise ConfigError(f"rope_scaling_factor: got {factor!r}, expected a positive finite number")
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown keys {', '.join(unknown)}: they may change what the model computes, so they are not ignored; "
                f"known are {', '.join(sorted(known))}, use_scaled_rope, rope_scaling_factor"
            )
        scaling = None
        if scaled:
            scaling = RopeScaling() if factor is None else RopeScaling(factor=float(factor))
        return cls(**values, rope_scaling=scaling)

    def with_vocab_size(self, vocab_size: int) -> ModelArgs:
        """The same shape with another number of embedding rows."""
        return replace(self, vocab_size=vocab_size)


@dataclass(frozen=True)
class EngineConfig:
    """Every static shape of the compiled programs; nothing in here may differ from request to request.

    Attributes:
        max_batch_size: rows of every program. Fewer prompts leave rows empty, more are run in several batches.
        max_seq_len: positions of the cache: a prompt and its generated tokens together.
        buckets: chunk lengths that a prompt is cut into, any order; 1 must be among them. Those longer than ``max_seq_len`` are dropped.
        bucket_policy: ``greedy`` covers a prompt exactly, ``pad`` may fill the last chunk up with padding to run fewer programs.
        key_buckets: how many leading cache positions a program may read; empty means doublings from 512 up to ``max_seq_len``.
        dtype: how the weights are stored. ``auto`` is float32 on the CPU device and bfloat16 elsewhere.
        fail_on_recompile: a program compiled after warm-up is an error.
        read_every: the host reads finished tokens back once in so many decode steps (1 to 16). A batch whose rows have all ended
            computes at most this many steps, and the one in flight, before the host learns of it.

    Raises:
        ConfigError: a number is out of its range.
    """

    max_batch_size: int = 1
    max_seq_len: int = 2048
    buckets: tuple[int, ...] = DEFAULT_BUCKETS
    bucket_policy: BucketPolicy = "greedy"
    key_buckets: tuple[int, ...] = field(default=())
    dtype: DType = "auto"
    fail_on_recompile: bool = False
    read_every: int = 8

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise ConfigError(f"max_batch_size: got {self.max_batch_size}, expected at least 1")
        if self.max_seq_len < 2:
            raise ConfigError(f"max_seq_len: got {self.max_seq_len}, expected at least 2 (one prompt token and one generated)")
        if 1 not in self.buckets or any(b < 1 for b in self.buckets):
            raise ConfigError(f"buckets: got {list(self.buckets)}, expected positive chunk lengths with 1 among them")
        if self.bucket_policy not in BUCKET_POLICIES:
            raise ConfigError(f"bucket_policy: got {self.bucket_policy!r}, expected one of {', '.join(BUCKET_POLICIES)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if not 1 <= self.read_every <= 16:
            raise ConfigError(f"read_every: got {self.read_every}, expected 1 to 16")
        if any(k < 1 for k in self.key_buckets):
            raise ConfigError(f"key_buckets: got {list(self.key_buckets)}, expected positive lengths")
        object.__setattr__(self, "buckets", tuple(sorted({b for b in self.buckets if b <= self.max_seq_len}, reverse=True)))
        object.__setattr__(self, "key_buckets", self._complete_key_buckets())

    def _complete_key_buckets(self) -> tuple[int, ...]:
        """Ascending key buckets below max_seq_len, and max_seq_len itself, so that every position falls into one."""
        chosen = set(self.key_buckets)
        if not chosen:
            size = SMALLEST_KEY_BUCKET
            while size < self.max_seq_len:
                chosen.add(size)
                size *= 2
        return (*sorted(k for k in chosen if k < self.max_seq_len), self.max_seq_len)


@dataclass(frozen=True)
class SamplingParams:
    """What one request wants. Every field reaches the device as data, so that no value compiles a program.

    Attributes:
        max_gen_len: most tokens to generate, at least 1.
        temperature: 0 takes the likeliest token; above, logits are divided by it before sampling.
        top_p: sample from the smallest set of likeliest tokens whose probabilities sum to at least this, in (0, 1].
        seed: 0 to 2**63 - 1. The same seed gives the same text whatever the batch size and the row; None draws a new one.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_gen_len: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_gen_len < 1:
            raise ConfigError(f"max_gen_len: got {self.max_gen_len}, expected at least 1")
        if not (0 <= self.temperature < math.inf):
            raise ConfigError(f"temperature: got {self.temperature}, expected a finite number of 0 or more")
        if not (0 < self.top_p <= 1):
            raise ConfigError(f"top_p: got {self.top_p}, expected a number above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: got {self.seed}, expected 0 to 2**63 - 1")
