"""What a benchmark runs: the shapes by name, and everything that must be equal between the programs compared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llama.config import DEMO_DIR, ModelArgs
from llama.errors import ConfigError

SHAPES: dict[str, ModelArgs] = {
    "tiny": ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=1024, multiple_of=32),
    "110m": ModelArgs(dim=768, n_layers=12, n_heads=12, vocab_size=32000),
    "1.1b": ModelArgs(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000),
    "7b": ModelArgs(vocab_size=32000),
}
RUNNERS = ("ours", "hf", "llama.cpp")
HEADS = ("greedy", "sample", "full", "logprobs")
WEIGHTS_SEED = 1


@dataclass(frozen=True)
class Workload:
    """One measurement.

    Attributes:
        shape: a name of ``SHAPES`` with seeded random weights, or ``demo``, the shipped model.
        ckpt_dir: a checkpoint instead of a shape.
        prompt_len: tokens of each prompt, BOS included.
        gen_len: tokens generated a row; the first comes from the prompt.
        batch: rows.
        dtype: float32, bfloat16, int8 or int4, of the weights.
        cache_dtype: auto, float32 or bfloat16, of our cache; other programs have their own default.
        max_seq_len: positions of the cache; None means as many as are needed.
        buckets: chunk lengths; None means the engine's.
        bucket_policy: ``greedy`` or ``pad``.
        vocab_size: of the random weights; None means the shape's own.
        slots: slots of our engine; None means as many as rows.
        heads: ways to choose a token (``HEADS``) whose decode steps are timed side by side, every control in use.
        depths: positions at which decoding is timed alone (``decode_at``), up to ``prompt_len``.

    Raises:
        ConfigError: a value out of its range.
    """

    shape: str = "110m"
    ckpt_dir: str | None = None
    prompt_len: int = 512
    gen_len: int = 128
    batch: int = 1
    dtype: str = "float32"
    max_seq_len: int | None = None
    buckets: tuple[int, ...] | None = None
    bucket_policy: str = "greedy"
    vocab_size: int | None = None
    heads: tuple[str, ...] = ()
    slots: int | None = None
    depths: tuple[int, ...] = ()
    cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.shape not in (*SHAPES, "demo"):
            raise ConfigError(f"shape: got {self.shape!r}, expected one of {', '.join((*SHAPES, 'demo'))}")
        if self.vocab_size is not None and self.directory is not None:
            raise ConfigError("vocab_size: a checkpoint has its own; leave it out")
        if self.vocab_size is not None and self.vocab_size < 3:
            raise ConfigError(
                f"vocab_size: got {self.vocab_size}, expected at least 3: prompts hold neither 0 nor the last"
            )
        for name, least in (("prompt_len", 1), ("gen_len", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if self.depths and not 1 <= min(self.depths) <= max(self.depths) <= self.prompt_len:
            raise ConfigError(f"depths: got {list(self.depths)}, expected 1 to prompt_len {self.prompt_len}")
        if self.positions < self.prompt_len + self.gen_len:
            raise ConfigError(
                f"max_seq_len: got {self.positions}, expected at least "
                f"prompt_len {self.prompt_len} + gen_len {self.gen_len}"
            )

    @property
    def positions(self) -> int:
        """The cache's length."""
        return self.prompt_len + self.gen_len if self.max_seq_len is None else self.max_seq_len

    @property
    def directory(self) -> Path | None:
        """Where the weights are; None for random ones."""
        if self.ckpt_dir is not None:
            return Path(self.ckpt_dir)
        return DEMO_DIR if self.shape == "demo" else None

    @property
    def args(self) -> ModelArgs | None:
        """The shape of the random weights; None for a checkpoint's."""
        if self.directory is not None:
            return None
        shape = SHAPES[self.shape]
        return shape if self.vocab_size is None else shape.with_vocab_size(self.vocab_size)

    @property
    def name(self) -> str:
        """How tables call the model."""
        return self.shape if self.ckpt_dir is None else Path(self.ckpt_dir).name

    def prompt(self, row: int, vocab_size: int) -> list[int]:
        """The token ids of a row's prompt: the same for every program, other ones in every row."""
        return [1 + (7 * i + 31 * row + i * i) % (vocab_size - 2) for i in range(self.prompt_len)]

    def to_json(self) -> str:
        """One line that ``from_json`` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """The workload that ``to_json`` wrote."""
        found = cls(**json.loads(text))
        buckets = tuple(found.buckets) if found.buckets else None
        return replace(found, buckets=buckets, heads=tuple(found.heads), depths=tuple(found.depths))


@dataclass
class Times:
    """One run.

    Attributes:
        prefill_s: until the first token of every row is known.
        decode_s: from there until the last.
        points: (position, seconds since the first token), where the program says them.
    """

    prefill_s: float
    decode_s: float
    points: list[tuple[int, float]] = field(default_factory=list)
