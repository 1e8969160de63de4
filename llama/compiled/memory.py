"""What a model will need on the device, before any weight is read: weights, cache, the largest chunk's activations.

Pure arithmetic over shapes, so that a configuration that cannot fit is refused in a moment, with one that does, and not
by the operating system after minutes of loading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from llama.compiled.cache import kept_rows, row_bytes
from llama.compiled.model import Linear, Transformer
from llama.config import EngineConfig, ModelArgs
from llama.errors import ConfigError, setting

GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device.

    Attributes:
        weights: in their storage dtype.
        cache: keys and values of every slot and position.
        prefixes: rows of the cache that keep prefixes.
        activations: an upper estimate for the largest chunk: the stream, queries, keys, the feed-forward layer's two
            inputs, the scores before and after the softmax, and the logits.
        available: what the device has free; None where it does not say.
    """

    weights: int
    cache: int
    prefixes: int
    activations: int
    available: int | None

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
        parts = f"weights {gib(self.weights)} + cache {gib(self.cache)}{kept} + activations {gib(self.activations)}"
        parts = f"{parts} = {gib(self.total)}"
        return f"{parts} of {gib(self.available)} free" if self.available is not None else parts


def gib(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.1f} MiB"


def dtypes_for(config: EngineConfig, *, on_cpu: bool, int8_stored: bool) -> tuple[torch.dtype, torch.dtype]:
    """Storage dtype of the weights, and dtype of the activations: float32 on the CPU device, where bfloat16
    arithmetic is slow.

    Args:
        on_cpu: the device is the CPU device.
        int8_stored: the checkpoint's weights are int8 already.

    Raises:
        ConfigError: another dtype than int8 is asked of an int8 checkpoint.
    """
    if int8_stored and config.dtype not in ("auto", "int8"):
        raise ConfigError(
            f"dtype: got {config.dtype}, but the checkpoint's weights are int8 already; "
            f"leave {setting('dtype')} out, or take the original"
        )
    wide = torch.float32 if on_cpu else torch.bfloat16
    chosen = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "int8": torch.int8,
        "auto": torch.int8 if int8_stored else wide,
    }
    storage = chosen[config.dtype]
    return storage, wide if on_cpu or storage == torch.int8 else storage


def weight_bytes(args: ModelArgs, storage: torch.dtype) -> int:
    """Bytes of a model's weights; under int8 those of the linear layers with their scales, the rest in float32 at
    most.
    """
    with torch.device("meta"):
        model = Transformer(args, 2)
    total = sum(p.numel() for p in model.parameters())
    if storage != torch.int8:
        return total * storage.itemsize
    linear = [m.weight for m in model.modules() if isinstance(m, Linear)]
    in_linear = sum(weight.numel() for weight in linear)
    return in_linear + 4 * sum(weight.shape[0] for weight in linear) + 4 * (total - in_linear)


def plan_memory(
    args: ModelArgs, config: EngineConfig, storage: torch.dtype, activation: torch.dtype, available: int | None
) -> MemoryPlan:
    """Count the bytes that a model of this shape needs under this configuration.

    Args:
        args: the checkpoint's shape, its vocabulary settled.
        storage: dtype that the weights are kept in.
        activation: dtype of stream and cache.
        available: the device's free bytes, None where it does not say.
    """
    chunk = config.buckets[0] * config.max_batch_size
    per_token = 3 * args.dim + 2 * args.head_dim * (args.n_heads + args.kv_heads) + 2 * args.hidden_dim
    scores = 2 * args.n_heads * config.max_seq_len
    logits = config.max_batch_size * args.vocab_size * torch.float32.itemsize
    activations = chunk * (per_token + scores) * max(activation.itemsize, torch.float32.itemsize) + logits
    row = row_bytes(args, config, activation)
    kept = kept_rows(args, config, activation)
    return MemoryPlan(weight_bytes(args, storage), row * config.max_batch_size, row * kept, activations, available)


def check_fits(
    args: ModelArgs, config: EngineConfig, storage: torch.dtype, activation: torch.dtype, available: int | None
) -> MemoryPlan:
    """The plan, where it fits.

    Raises:
        ConfigError: it does not; the message names the largest ``max_seq_len`` and the largest ``max_batch_size`` that
            would, each with the other left as it is, or both where neither alone is enough.
    """

    def fits(max_seq_len: int, max_batch_size: int) -> bool:
        changed = replace(config, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        return plan_memory(args, changed, storage, activation, available).fits

    plan = plan_memory(args, config, storage, activation, available)
    if plan.fits:
        return plan
    length, rows = config.max_seq_len, config.max_batch_size
    shorter = _largest(2, length, lambda value: fits(value, rows))
    fewer = _largest(1, rows, lambda value: fits(length, value))
    both = _largest(2, length, lambda value: fits(value, 1))
    rest = (available or 0) - (plan.total - plan.prefixes)
    cures = [f"{setting('prefix_cache_bytes')} {rest} at most, or 0"] if plan.prefixes and rest >= 0 else []
    cures += [f"{setting('max_seq_len')} {shorter} at most"] if shorter else []
    cures += [f"{setting('max_batch_size')} {fewer} at most"] if fewer else []
    if not cures and both:
        cures = [f"{setting('max_batch_size')} 1 with {setting('max_seq_len')} {both} at most"]
    narrower = f"a narrower {setting('dtype')}, or a device with more memory: the weights alone are too large"
    cure = ", or ".join(cures) or narrower
    raise ConfigError(f"the model does not fit: {plan}; it takes {cure}")


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest value in [low, high) that fits, by bisection; None where not even ``low`` does."""
    if low >= high or not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
