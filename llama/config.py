"""The frozen dataclasses of static settings: a checkpoint's shape and sampling defaults, and the engine's shapes.

No tensor and no device here. Values are checked when an object is made, so that a wrong number is refused before any
file is opened.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, fields, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from llama.errors import ConfigError, setting
from llama.sampling_params import controls

DType = Literal["auto", "float32", "bfloat16", "int8", "int4"]
CacheDType = Literal["auto", "float32", "bfloat16"]
BucketPolicy = Literal["greedy", "pad"]
RopeKind = Literal["llama3", "linear", "yarn", "dynamic", "longrope"]

DTYPES: tuple[DType, ...] = ("auto", "float32", "bfloat16", "int8", "int4")
INT4_GROUPS = (64, 128)
CACHE_DTYPES: tuple[CacheDType, ...] = ("auto", "float32", "bfloat16")
ACTIVATIONS = ("int16", "float32")
PREFILL_PRODUCTS = ("bfloat16", "float32")
Overflow = Literal["refuse", "drop"]
OVERFLOWS: tuple[Overflow, ...] = ("refuse", "drop")
Schedule = Literal["fcfs", "shortest"]
SCHEDULES: tuple[Schedule, ...] = ("fcfs", "shortest")
LONGEST_SCORED = (
    64  # tokens of a chunk whose positions all go through the vocabulary head: logits are length x vocabulary
)
BUCKET_POLICIES: tuple[BucketPolicy, ...] = ("greedy", "pad")
DEFAULT_BUCKETS = (512, 64, 8, 1)
SMALLEST_KEY_BUCKET = 512
FINER_KEY_BUCKETS = 2048  # from here on a bucket half-way between two saves more than its branch costs to compile
SMALLEST_COPY = 64
LONGEST_FLOAT32_CACHE = 2048  # positions; by default a longer cache is bfloat16
DRAFTERS = ("auto", "lookup", "suffix", "model", "lookahead", "medusa", "retrieval")
DRAFTER_OF = {  # which drafter a setting is for
    "draft_ckpt_dir": "model",
    "medusa_dir": "medusa",
    "datastore": "retrieval",
    "word_bank": "retrieval",
}
DEFAULT_DRAFT_LENS = (3, 7)
DEFAULT_LOOKAHEAD = (5, 4, 5)
DEFAULT_CORPUS_TOKENS = 65536
LookupOrder = Literal["first", "newest"]
LOOKUP_ORDERS: tuple[LookupOrder, ...] = ("first", "newest")
LONGEST_DRAFT = 31  # tokens that are chosen in a step go through a report of 32
MAX_STOP_IDS = 16  # a request; more would widen a tensor of every program
MAX_BAD_WORDS = 64  # a request, of two tokens and more
MAX_BAD_WORD_LEN = 16  # tokens
DEMO_DIR = Path(__file__).parent / "demo"
DEMO_HEADS = DEMO_DIR / "medusa"
DEMO_CONTEXT = 512  # positions that the demo model was trained for
ROPE_KINDS: tuple[RopeKind, ...] = ("llama3", "linear", "yarn", "dynamic", "longrope")
# Fields that params.json holds only where they are not at their defaults: files without them stay as they were
ADDED_TO_SCALING = ("attention_factor", "beta_fast", "beta_slow", "truncate", "short_factor")
ADDED_TO_ARGS = ("tie_word_embeddings", "qkv_bias", "qk_norm", "first_sliding_layer")
LARGEST_SIZE = 2**31 - 1  # of any dimension: what a damaged params.json says beyond it must not reach arithmetic


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context than the model was first trained for.

    ``linear`` divides all of them by ``factor``. ``llama3`` is Llama 3.1's (llama-models, ``apply_scaling``):
    wavelengths shorter than ``original_max_seq_len / high_freq_factor`` stay, those longer than ``original_max_seq_len
    / low_freq_factor`` are divided by ``factor``, the ones between are blended; no other kind reads ``low_freq_factor``
    and ``high_freq_factor``.

    ``yarn`` (Peng et al. 2023) blends by columns: pairs that turn more than ``beta_fast`` times within
    ``original_max_seq_len`` stay, those that turn less than ``beta_slow`` times are divided by ``factor``; with
    ``truncate`` the two borders are rounded outwards to whole pairs. ``longrope`` (Ding et al. 2024) divides each
    frequency by its own entry of ``short_factor``. Both multiply queries and keys by ``attention_factor``.

    ``dynamic`` changes nothing up to ``original_max_seq_len``. Beyond it ``dynamic`` and ``longrope`` take other
    frequencies for a whole text, also for keys that are cached already: such positions are refused
    (``ModelArgs.most_positions``).

    Raises:
        ConfigError: a number is not positive and finite, two borders are not in order, or ``short_factor`` is given for
            another kind than ``longrope``, or missing for it.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    kind: RopeKind = "llama3"
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ConfigError(f"rope_scaling: got kind {_short(self.kind)}, expected one of {', '.join(ROPE_KINDS)}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"):
            check_number(f"rope_scaling {name}", getattr(self, name))
        _check_size("rope_scaling original_max_seq_len", self.original_max_seq_len)
        for lower, upper in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, lower) >= getattr(self, upper):
                raise ConfigError(
                    f"rope_scaling: got {lower} {getattr(self, lower)} and {upper} {getattr(self, upper)}, "
                    "expected the first to be the smaller"
                )
        _check_bool("rope_scaling truncate", self.truncate)
        self._check_short_factor()

    def _check_short_factor(self) -> None:
        """Check the factors of ``longrope``, which JSON holds as a list."""
        given = self.short_factor
        if not isinstance(given, (list, tuple)) or bool(given) != (self.kind == "longrope"):
            wanted = "one number for each pair of a head's columns" if self.kind == "longrope" else "none"
            raise ConfigError(f"rope_scaling short_factor: got {_short(given)} for kind {self.kind}, expected {wanted}")
        for each in given:
            check_number("rope_scaling short_factor", each)
        object.__setattr__(self, "short_factor", tuple(given))

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> RopeScaling | None:
        """Read the scaling from the content of a params.json, and remove its keys from ``params``.

        Meta spells it ``use_scaled_rope``, with ``rope_scaling_factor`` where that is not 8. Scalings that Meta cannot
        spell are an object ``rope_scaling`` with this class's fields.

        Raises:
            ConfigError: both spellings at once, an unknown field, or a value out of its range.
        """
        scaled = params.pop("use_scaled_rope", False)
        factor = params.pop("rope_scaling_factor", None)
        spelled_out = params.pop("rope_scaling", None)
        if not isinstance(scaled, bool):
            raise ConfigError(f"use_scaled_rope: got {_short(scaled)}, expected true or false")
        if spelled_out is not None:
            if scaled or factor is not None:
                raise ConfigError(
                    "got both rope_scaling and use_scaled_rope or rope_scaling_factor, expected one spelling"
                )
            known = {f.name for f in fields(cls)}
            if not isinstance(spelled_out, dict) or not set(spelled_out) <= known:
                raise ConfigError(
                    f"rope_scaling: got {_short(spelled_out)}, "
                    f"expected an object with the keys {', '.join(sorted(known))}"
                )
            return cls(**spelled_out)
        if factor is not None:
            check_number("rope_scaling_factor", factor)
        if not scaled:
            return None
        return cls() if factor is None else cls(factor=float(factor))

    def to_params(self) -> dict[str, Any]:
        """Return the entries of a params.json that ``from_params`` reads back as this object.

        They are in Meta's spelling where there is one.
        """
        if self != RopeScaling(factor=self.factor):
            usual = {name: getattr(RopeScaling, name) for name in ADDED_TO_SCALING}
            return {"rope_scaling": {k: v for k, v in asdict(self).items() if k not in usual or v != usual[k]}}
        return {"use_scaled_rope": True} | (
            {} if self.factor == RopeScaling.factor else {"rope_scaling_factor": self.factor}
        )


@dataclass(frozen=True)
class ModelArgs:
    """A checkpoint's shape, in the names of Meta's params.json.

    Attributes:
        dim: width of the residual stream.
        n_layers: number of transformer blocks.
        n_heads: query heads; ``dim / n_heads`` is the head's size, unless ``attn_head_dim`` says another one.
        n_kv_heads: key and value heads; None means as many as query heads.
        vocab_size: rows of the embedding. -1, as LLaMA 1 and 2 ship it, means: as many as the checkpoint's embedding
            has.
        multiple_of: the feed-forward width is rounded up to a multiple of this.
        ffn_dim_multiplier: a factor on the feed-forward width before it is rounded; None means 1.
        ffn_hidden_dim: the feed-forward width itself, where the rule above does not yield it; None means the rule.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: their scaling for longer texts, or None.
        tie_word_embeddings: the vocabulary head is the embedding (Llama 3.2's small models).
        attn_head_dim: the head's size, which must be even, where it is not ``dim / n_heads`` (Mistral NeMo, Qwen3).
        qkv_bias: the query, key and value projections have a bias (Qwen2).
        qk_norm: each head's query and key go through an RMSNorm before they are turned (Qwen3).
        rotary_dim: how many of a head's columns rotary embedding turns, the first ones; None means all (Phi-3).
        sliding_window: how many positions a position attends to, itself and those before it; None means all (Mistral).
        first_sliding_layer: the layers before this one have no sliding window (Qwen2).

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
    attn_head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    rotary_dim: int | None = None
    sliding_window: int | None = None
    first_sliding_layer: int = 0

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "multiple_of"):
            _check_size(name, getattr(self, name))
        for name in ("n_kv_heads", "ffn_hidden_dim", "attn_head_dim", "rotary_dim", "sliding_window"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
        for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier"):
            value = getattr(self, name)
            if value is not None or name != "ffn_dim_multiplier":
                check_number(name, value)
        for name in ("tie_word_embeddings", "qkv_bias", "qk_norm"):
            _check_bool(name, getattr(self, name))
        if self.vocab_size != -1 or not isinstance(self.vocab_size, int):
            _check_size("vocab_size", self.vocab_size, "; or -1 for the embedding's own")
        self._check_heads()
        if not 1 <= 8 * self.dim / 3 * (self.ffn_dim_multiplier or 1.0) <= LARGEST_SIZE:
            raise ConfigError(
                f"ffn_dim_multiplier: got {self.ffn_dim_multiplier}, "
                f"which makes the feed-forward width of dim={self.dim} absurd"
            )
        if self.first_sliding_layer != 0:
            _check_size("first_sliding_layer", self.first_sliding_layer, "; or 0")

    def _check_heads(self) -> None:
        """Check the head's size, what rotary embedding turns of it, and the number of key heads."""
        if self.attn_head_dim is None and (self.dim % self.n_heads or self.head_dim % 2):
            raise ConfigError(
                f"dim: got {self.dim} for {self.n_heads} heads, "
                "expected n_heads times an even number (rotary embedding turns pairs)"
            )
        if self.head_dim % 2 or self.n_heads * self.head_dim > LARGEST_SIZE:
            raise ConfigError(
                f"attn_head_dim: got {self.head_dim} for {self.n_heads} heads, "
                "expected an even number (rotary embedding turns pairs), and no absurd one"
            )
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise ConfigError(
                f"rotary_dim: got {self.rotary_dim}, expected an even number up to the head's size, {self.head_dim}"
            )
        scaling = self.rope_scaling
        if scaling is not None and scaling.short_factor and 2 * len(scaling.short_factor) != self.turned:
            raise ConfigError(
                f"rope_scaling short_factor: got {len(scaling.short_factor)} numbers, "
                f"expected {self.turned // 2}, one for each pair of columns that is turned"
            )
        if scaling is not None and scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ConfigError(f"rope_theta: got {self.rope_theta}, expected more than 1 for the rope scaling yarn")
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"n_kv_heads: got {self.kv_heads}, expected a divisor of n_heads={self.n_heads}")

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default filled in."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        """Size of one head, with the default filled in."""
        return self.dim // self.n_heads if self.attn_head_dim is None else self.attn_head_dim

    @property
    def turned(self) -> int:
        """How many of a head's columns rotary embedding turns, with the default filled in."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def most_positions(self) -> int | None:
        """The longest text that is computed: a longer one has other rotary frequencies from its start. None: any."""
        scaling = self.rope_scaling
        return scaling.original_max_seq_len if scaling is not None and scaling.kind in ("dynamic", "longrope") else None

    def check_positions(self, max_seq_len: int, where: Path | str) -> None:
        """Check that a cache of so many positions is no longer than the model is computed for.

        Args:
            where: the checkpoint or its file, for the message.

        Raises:
            ConfigError: it is longer; the message names the number that works.
        """
        most = self.most_positions
        if most is not None and self.rope_scaling is not None and max_seq_len > most:
            raise ConfigError(
                f"max_seq_len: got {max_seq_len}, but {where} has the rope scaling {self.rope_scaling.kind}, which "
                f"changes all keys of a text of more than {most} positions; that is not computed: "
                f"{setting('max_seq_len')} {most} at most"
            )

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer: two thirds of four times ``dim``, scaled and rounded up as Meta does."""
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
            params: the parsed file. Meta's ``use_scaled_rope`` becomes ``rope_scaling`` (see RopeScaling.from_params);
                ``max_seq_len`` and ``max_batch_size``, which some releases carry, belong to the engine and are ignored.

        Raises:
            ConfigError: an unknown key, which may change the computation, or a value out of its range.
        """
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in params.items() if k not in ("max_seq_len", "max_batch_size")}
        scaling = RopeScaling.from_params(values)
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown keys {', '.join(unknown)}: they may change what the model computes, so they are not ignored; "
                f"known are {', '.join(sorted(known))}, use_scaled_rope, rope_scaling_factor"
            )
        return cls(**values, rope_scaling=scaling)

    def to_params(self) -> dict[str, Any]:
        """Return the content of a params.json that ``from_params`` reads back as this object.

        Keys that Meta's code does not know are left out at their defaults. ``rope_theta`` is always written, because
        Meta's releases differ in its default.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rope_scaling"}
        values = {k: v for k, v in values.items() if v is not None and (v or k not in ADDED_TO_ARGS)}
        return values | ({} if self.rope_scaling is None else self.rope_scaling.to_params())

    def with_vocab_size(self, vocab_size: int) -> ModelArgs:
        """Return the same shape with another number of embedding rows."""
        return replace(self, vocab_size=vocab_size)


def _check_size(name: str, value: object, also: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE:
        raise ConfigError(f"{name}: got {_short(value)}, expected a positive whole number{also}")


def check_number(name: str, value: object) -> None:
    """Check a setting.

    Raises:
        ConfigError: it is not a positive finite number.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{name}: got {_short(value)}, expected a positive finite number")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: got {_short(value)}, expected true or false")


def _short(value: object) -> str:
    """Shorten a value for an error; a damaged file can hold one of any length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


@dataclass(frozen=True)
class GenerationDefaults:
    """The sampling defaults of a checkpoint's generation_config.json; the caller's values override them.

    Attributes:
        temperature, top_p, top_k, min_p, typical_p, repetition_penalty: as in SamplingParams, or None where the file
        has no value.
        stop_ids: ids that end a generation besides the tokenizer's own; empty where the file has none.

    Raises:
        ConfigError: a value is out of its range.
    """

    temperature: float | None = None
    top_p: float | None = None
    stop_ids: tuple[int, ...] = ()
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        for name, control in controls().items():
            if getattr(self, name, None) is not None:
                control.range.check(name, getattr(self, name))
        for stop_id in self.stop_ids:
            if not isinstance(stop_id, int) or isinstance(stop_id, bool) or not 0 <= stop_id <= LARGEST_SIZE:
                raise ConfigError(f"eos_token_id: got {_short(stop_id)}, expected token ids")


@dataclass(frozen=True)
class EngineConfig:
    """Every static shape of the compiled programs, and the rules by which requests share the slots.

    Attributes:
        max_batch_size: slots: requests that run at once. Others wait until a slot is free.
        max_seq_len: positions of a slot: a prompt and its generated tokens together.
        buckets: chunk lengths that a prompt is cut into, any order; 1 must be among them. Those longer than
            ``max_seq_len`` are dropped.
        bucket_policy: ``greedy`` covers a prompt exactly, ``pad`` may fill the last chunk up with padding to run fewer
            programs.
        key_buckets: how many leading cache positions a program may read; empty means doublings from 512 up to
            ``max_seq_len``, and from 2,048 on one half-way between them, too.
        widths: row counts that decode programs exist for, up to ``max_batch_size``, which is always one of them; empty
            means powers of two.
        batch_invariant: a request's bits depend on nothing but the request itself: every decode step runs all slots and
            reads all positions. By default neighbours may change them by rounding.
        dtype: how the weights are stored. ``auto`` keeps what the checkpoint has quantised, and is float32 on the CPU
            device and bfloat16 elsewhere for the rest. ``int8`` stores the linear layers with one scale per output
            channel, ``int4`` those within layers with one per group of numbers, and embedding and head as int8.
        int4_group: how many numbers of an int4 weight share a scale, 64 or 128, where that divides a row; else the next
            smaller of 64 and 32, or int8 where none does. Quantised checkpoints keep their own groups.
        cache_dtype: how keys and values are stored, in half the memory as ``bfloat16``. ``auto`` is float32 up to
            ``LONGEST_FLOAT32_CACHE`` positions where activations are float32, as on the CPU device, else bfloat16.
        activations: what the input of a linear layer is rounded to before it meets an int8 or int4 weight, on the CPU
            device: ``int16``, each row by a scale of its own, or ``float32`` for not at all, which is slower.
        prefill_products: what the inputs of linear layers are rounded to where many positions of a prompt meet a
            bfloat16 or int4 weight, on the CPU device: ``bfloat16``, or ``float32`` for not at all, which is slower.
        fail_on_recompile: a program compiled after warm-up is an error.
        read_every: the host reads generated tokens back once in so many decode steps (1 to 16). After a stop token at
            most this many steps, and the one in flight, are computed before the host learns of it.
        prefill_budget: prompt tokens that may run before the running requests get their next step. One chunk always
            may, so that no prompt waits for ever.
        schedule: which waiting request gets a free slot: ``fcfs``, the one that came first, or ``shortest``, the one
            with the shortest prompt; no request is passed over more than ``MOST_PASSED_OVER`` times.
        max_waiting: requests that may wait; more are refused. 0 means any number.
        collect_s: how long requests may be collected, while no other request runs, before the first of them starts, in
            seconds.
        collect_tokens: end the collection when the waiting prompts hold so many tokens. 0 means any number.
        prefix_cache: prompts that begin like earlier ones go on where those end; see ``SamplingParams.prefix_cache``.
        prefix_cache_bytes: bytes of rows of the cache that keep prefixes when their slots are needed; 0 keeps them in
            free slots only. What does not fill a row is not used.
        draft_lens: how many drafted tokens a step can check: one program for each and for each of ``verify_widths``.
            Empty without drafts.
        lookahead: width and number of levels of a Jacobi window, for the drafter of that name; empty without it.
        tensor_parallel: devices that hold the model together, each a part of every layer. 0 means all that are left.
        data_parallel: groups of such devices, among which the slots are divided; it divides ``max_batch_size``. Both
            numbers together make up all devices.

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
    widths: tuple[int, ...] = field(default=())
    batch_invariant: bool = False
    prefill_budget: int = 512
    schedule: Schedule = "fcfs"
    max_waiting: int = 0
    collect_s: float = 0.0
    collect_tokens: int = 0
    prefix_cache: bool = True
    prefix_cache_bytes: int = 0
    draft_lens: tuple[int, ...] = field(default=())
    lookahead: tuple[int, ...] = ()
    tensor_parallel: int = 1
    data_parallel: int = 1
    cache_dtype: CacheDType = "auto"
    activations: str = "int16"
    prefill_products: str = "bfloat16"
    int4_group: int = 128

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise ConfigError(f"max_batch_size: got {self.max_batch_size}, expected at least 1")
        if self.max_seq_len < 2:
            raise ConfigError(
                f"max_seq_len: got {self.max_seq_len}, expected at least 2 (one prompt token and one generated)"
            )
        if 1 not in self.buckets or any(b < 1 for b in self.buckets):
            raise ConfigError(f"buckets: got {list(self.buckets)}, expected positive chunk lengths with 1 among them")
        named = {
            "bucket_policy": BUCKET_POLICIES,
            "dtype": DTYPES,
            "schedule": SCHEDULES,
            "cache_dtype": CACHE_DTYPES,
            "activations": ACTIVATIONS,
            "prefill_products": PREFILL_PRODUCTS,
        }
        for name, allowed in named.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if self.int4_group not in INT4_GROUPS:
            raise ConfigError(f"int4_group: got {self.int4_group}, expected {' or '.join(map(str, INT4_GROUPS))}")
        if self.int4_group != EngineConfig.int4_group and self.dtype != "int4":
            raise ConfigError(
                f"int4_group: got {self.int4_group}, but {setting('dtype')} is {self.dtype}, not int4; leave one "
                "of them out"
            )
        if not 1 <= self.read_every <= 16:
            raise ConfigError(f"read_every: got {self.read_every}, expected 1 to 16")
        if any(k < 1 for k in self.key_buckets):
            raise ConfigError(f"key_buckets: got {list(self.key_buckets)}, expected positive lengths")
        if any(w < 1 for w in self.widths):
            raise ConfigError(f"widths: got {list(self.widths)}, expected positive numbers of rows")
        if self.prefill_budget < 1:
            raise ConfigError(f"prefill_budget: got {self.prefill_budget}, expected at least 1")
        if self.prefix_cache_bytes and not self.prefix_cache:
            raise ConfigError(
                f"prefix_cache_bytes: got {self.prefix_cache_bytes}, but {setting('prefix_cache')} is off; "
                "leave one of them out"
            )
        for name in ("max_waiting", "collect_s", "collect_tokens", "prefix_cache_bytes"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected 0 or more")
        if any(not 1 <= d <= LONGEST_DRAFT for d in self.draft_lens):
            raise ConfigError(
                f"draft_lens: got {list(self.draft_lens)}, expected 1 to {LONGEST_DRAFT}: "
                f"a step reports {LONGEST_DRAFT + 1} tokens at most"
            )
        if self.draft_lens and max(self.draft_lens) + 2 > self.max_seq_len:
            raise ConfigError(
                f"draft_lens: got {max(self.draft_lens)} for a cache of {self.max_seq_len} positions, expected at most "
                f"{self.max_seq_len - 2}: the drafts come after a prompt's token and before a chosen one; "
                f"a longer {setting('max_seq_len')}, or shorter drafts"
            )
        if self.lookahead and (len(self.lookahead) != 2 or min(self.lookahead) < 1):
            raise ConfigError(f"lookahead: got {list(self.lookahead)}, expected a width and a number of levels")
        self._check_devices()
        object.__setattr__(self, "draft_lens", tuple(sorted(set(self.draft_lens))))
        buckets = sorted({b for b in self.buckets if b <= self.max_seq_len}, reverse=True)
        object.__setattr__(self, "buckets", tuple(buckets))
        object.__setattr__(self, "key_buckets", self._complete_key_buckets())
        object.__setattr__(self, "widths", self._complete_widths())

    def _check_devices(self) -> None:
        """Refuse numbers of devices that no mesh has, and slots that cannot be divided among its groups."""
        for name, least in (("tensor_parallel", 0), ("data_parallel", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST_SIZE:
                raise ConfigError(f"{name}: got {_short(value)}, expected a whole number, {least} or more")
        groups = self.data_parallel
        if self.max_batch_size % groups:
            raise ConfigError(
                f"max_batch_size: got {self.max_batch_size}, which {setting('data_parallel')} {groups} does not "
                f"divide; expected a multiple, so that each group has as many slots, such as "
                f"{-(-self.max_batch_size // groups) * groups}"
            )
        if any(width % groups for width in self.widths if width < self.max_batch_size):
            raise ConfigError(
                f"widths: got {list(self.widths)}, expected multiples of {setting('data_parallel')} {groups}"
            )

    @property
    def shortest_chunk(self) -> int:
        """The chunk of more than one token that may be padded at the end of a prompt; 1 where there is none."""
        return min((b for b in self.buckets if 1 < b <= LONGEST_SCORED), default=1)

    @property
    def positions(self) -> int:
        """Positions of the cache and of the tokens: ``max_seq_len``, and room for a token that is scored and not run,
        for the padding of a last chunk, for a step that checks drafts at the very end, and for a Jacobi window there.

        XLA clamps a write that does not fit, and would overwrite the last positions.
        """
        return self.max_seq_len + max(1, self.shortest_chunk - 1, *self.draft_lens, prod(self.lookahead or (0,)))

    @property
    def verify_widths(self) -> tuple[int, ...]:
        """Row counts that programs which check drafts exist for: a slot of each group, and all; under
        ``batch_invariant`` all.
        """
        fewest = self.max_batch_size if self.batch_invariant else self.data_parallel
        return tuple(dict.fromkeys((fewest, self.max_batch_size)))

    @property
    def copies_rows(self) -> bool:
        """Whether there is more than one row of the cache, so that prefixes can be copied."""
        return self.max_batch_size > self.data_parallel or self.prefix_cache_bytes > 0

    @property
    def copy_lens(self) -> tuple[int, ...]:
        """How many leading positions a copy takes, ascending, one program for each: powers of two, and all."""
        sizes = (SMALLEST_COPY << n for n in range(self.max_seq_len.bit_length()))
        return (*(size for size in sizes if size < self.max_seq_len), self.max_seq_len)

    def _complete_widths(self) -> tuple[int, ...]:
        """Ascending widths; all slots are one of them, and under ``batch_invariant`` the only one."""
        if self.batch_invariant:
            return (self.max_batch_size,)
        chosen = set(self.widths) or {self.data_parallel << n for n in range(self.max_batch_size.bit_length())}
        return (*sorted(w for w in chosen if w < self.max_batch_size), self.max_batch_size)

    def _complete_key_buckets(self) -> tuple[int, ...]:
        """Return ascending key buckets that end with max_seq_len, so that every position falls into one."""
        chosen = set(self.key_buckets)
        if not chosen:
            size = SMALLEST_KEY_BUCKET
            while size < self.max_seq_len:
                chosen |= {size, size + size // 2} if size >= FINER_KEY_BUCKETS else {size}
                size *= 2
        return (*sorted(k for k in chosen if k < self.max_seq_len), self.max_seq_len)


@dataclass(frozen=True)
class DraftConfig:
    """How tokens are drafted, several of which are checked in a step. It never changes a text.

    Attributes:
        drafter: names, tried in order for each request until one has a guess. ``auto`` is ``suffix`` and ``lookup``,
            and has all named drafters used where they pay only; without it every guess is checked.
        draft_lens: how many drafted tokens a step can check, one program for each.
        draft_ckpt_dir: of ``model``: a smaller model with the same vocabulary.
        medusa_dir: of ``medusa``: the heads.
        datastore: of ``retrieval``: a file that ``llama-xla datastore build`` made.
        word_bank: of ``retrieval``: a file of n-grams of earlier answers, made where there is none.
        lookup_order: of ``lookup``: which of several earlier places is continued.
        corpus_tokens: of ``suffix``: tokens of earlier requests' outputs that are kept to draft from; 0 keeps none.
        lookahead: of ``lookahead``: the window's width, an n-gram's tokens, and n-grams that are kept for each token.

    Raises:
        ConfigError: an unknown name, a setting of a drafter that is not named, or one that is missing or out of range.
    """

    drafter: tuple[str, ...] = ("auto",)
    draft_lens: tuple[int, ...] = DEFAULT_DRAFT_LENS
    draft_ckpt_dir: str | Path | None = None
    medusa_dir: str | Path | None = None
    datastore: str | Path | None = None
    word_bank: str | Path | None = None
    lookup_order: LookupOrder = "first"
    corpus_tokens: int = DEFAULT_CORPUS_TOKENS
    lookahead: tuple[int, ...] = DEFAULT_LOOKAHEAD

    def __post_init__(self) -> None:
        names = self.drafter
        if not names or len(set(names)) < len(names) or not set(names) <= set(DRAFTERS):
            raise ConfigError(
                f"drafter: got {', '.join(names) or 'none'}, expected one or several of {', '.join(DRAFTERS)}, "
                "each once"
            )
        if not self.draft_lens:
            raise ConfigError("draft_lens: got none, expected at least one length")
        EngineConfig(draft_lens=self.draft_lens)  # refuses lengths that no engine takes
        for name, owner in DRAFTER_OF.items():
            if getattr(self, name) is not None and owner not in names:
                raise ConfigError(
                    f"{name}: got {getattr(self, name)}, but {setting('drafter')} {','.join(names)} does not use it; "
                    f"add {owner} to {setting('drafter')}, or leave it out"
                )
        if "model" in names and self.draft_ckpt_dir is None:
            raise ConfigError(f"drafter: model needs {setting('draft_ckpt_dir')}, the smaller model's directory")
        if "retrieval" in names and self.datastore is None and self.word_bank is None:
            raise ConfigError(
                f"drafter: retrieval needs {setting('datastore')} (llama-xla datastore build makes one) "
                f"or {setting('word_bank')}"
            )
        if self.lookup_order not in LOOKUP_ORDERS:
            raise ConfigError(
                f"lookup_order: got {self.lookup_order!r}, expected one of {', '.join(map(str, LOOKUP_ORDERS))}"
            )
        if self.corpus_tokens < 0:
            raise ConfigError(f"corpus_tokens: got {self.corpus_tokens}, expected 0 or more")
        if len(self.lookahead) != 3 or self.lookahead[1] < 2 or min(self.lookahead) < 1:
            raise ConfigError(
                f"lookahead: got {','.join(map(str, self.lookahead))}, expected three numbers: the window's width, "
                "an n-gram's tokens (2 or more), and how many n-grams are kept for each token"
            )

    @property
    def is_adaptive(self) -> bool:
        """Whether guesses are checked where that pays only."""
        return "auto" in self.drafter

    @property
    def names(self) -> tuple[str, ...]:
        """The drafters, in order, with those that ``auto`` stands for."""
        spelled = (each for name in self.drafter for each in (("suffix", "lookup") if name == "auto" else (name,)))
        return tuple(dict.fromkeys(spelled))

    def settled(self, config: EngineConfig) -> EngineConfig:
        """An engine's shapes with those that drafting needs."""
        window = (self.lookahead[0], self.lookahead[1] - 1) if "lookahead" in self.names else ()
        return replace(config, draft_lens=self.draft_lens, lookahead=window)


def word_count(vocab_size: int) -> int:
    """Words of 32 bits that hold one bit per token."""
    return -(-vocab_size // 32)
