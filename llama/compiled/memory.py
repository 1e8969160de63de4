"""What a model will need on the device, before any weight is read: weights, cache, the largest chunk's activations.

So a configuration that cannot fit is refused in a moment, with one that does, and not by the operating system after
minutes of loading. The arithmetic is that of llama/planning.py, which knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from llama import planning
from llama.compiled.cache import kept_rows
from llama.config import LONGEST_FLOAT32_CACHE, EngineConfig, ModelArgs
from llama.errors import ConfigError, setting
from llama.planning import GIB, MemoryPlan, gib, largest
from llama.sharding import Mesh
from llama.storage import Storage, WeightFormat

__all__ = [
    "GIB",
    "MemoryPlan",
    "cache_dtype_for",
    "check_fits",
    "dtypes_for",
    "gib",
    "plan_memory",
    "storage_of",
    "weight_bytes",
]


def dtypes_for(
    config: EngineConfig, *, on_cpu: bool, stored: Mapping[str, WeightFormat] | None = None
) -> tuple[Storage, torch.dtype]:
    """How the weights are stored, and the dtype of the activations; see ``planning.choose_dtypes``."""
    storage, activation = planning.choose_dtypes(config, on_cpu=on_cpu, stored=stored)
    return storage, getattr(torch, activation)


def cache_dtype_for(config: EngineConfig, activation: torch.dtype) -> torch.dtype:
    """Dtype of keys and values; see ``planning.choose_cache_dtype``."""
    found: torch.dtype = getattr(torch, planning.choose_cache_dtype(config, _name(activation)))
    return found


def weight_bytes(args: ModelArgs, storage: torch.dtype | Storage) -> int:
    """Bytes of a model's weights with their scales; what stays as it is beside quantised ones is float32 at most."""
    return planning.weight_bytes(args, storage_of(storage))


def storage_of(storage: torch.dtype | Storage) -> Storage:
    """A storage, which a dtype alone stands for, too: torch's int4 for int4."""
    return Storage(_name(storage)) if isinstance(storage, torch.dtype) else storage


def plan_memory(
    args: ModelArgs,
    config: EngineConfig,
    storage: torch.dtype | Storage,
    activation: torch.dtype,
    available: int | None,
) -> MemoryPlan:
    """Count the bytes that a model of this shape needs under this configuration, on each of its devices.

    Args:
        args: the checkpoint's shape, its vocabulary settled.
        storage: how the weights are stored.
        activation: dtype of the activations.
        available: the device's free bytes, None where it does not say.
    """
    mesh = Mesh(config.data_parallel, config.tensor_parallel or 1)
    kept = kept_rows(args, config, cache_dtype_for(config, activation))
    dtypes = storage_of(storage), _name(activation)
    return planning.plan_memory(args, config, *dtypes, available, mesh=mesh, kept_rows=kept)


def check_fits(
    args: ModelArgs,
    config: EngineConfig,
    storage: torch.dtype | Storage,
    activation: torch.dtype,
    available: int | None,
) -> MemoryPlan:
    """The plan, where it fits.

    Raises:
        ConfigError: it does not; the message names a narrower cache where that is enough, the largest ``max_seq_len``
            and the largest ``max_batch_size`` that would fit, each with the other left as it is, or both where neither
            alone is enough.
    """

    def fits(max_seq_len: int, max_batch_size: int) -> bool:
        changed = replace(config, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        try:
            return plan_memory(args, changed, storage, activation, available).fits
        except ConfigError:  # the row of a shorter cache is wider, and prefix_cache_bytes have no room for one
            return False

    plan = plan_memory(args, config, storage, activation, available)
    if plan.fits:
        return plan
    length, groups = config.max_seq_len, config.data_parallel
    rows = config.max_batch_size // groups
    shorter = _most_positions(length, lambda value: fits(value, config.max_batch_size))
    fewer = largest(1, rows, lambda value: fits(length, value * groups))
    both = _most_positions(length, lambda value: fits(value, groups))
    rest = (available or 0) - (plan.total - plan.prefixes)
    halved = plan_memory(args, replace(config, cache_dtype="bfloat16"), storage, activation, available)
    cures = [f"{setting('cache_dtype')} bfloat16"] if halved.fits else []
    cures += [_fewer_prefixes(args, config, plan.cache_dtype, rest)] if plan.prefixes and rest >= 0 else []
    cures += [f"{setting('max_seq_len')} {shorter} at most"] if shorter else []
    cures += [f"{setting('max_batch_size')} {fewer * groups} at most"] if fewer else []
    if not cures and both:
        cures = [f"{setting('max_batch_size')} {groups} with {setting('max_seq_len')} {both} at most"]
    narrower = f"a narrower {setting('dtype')}, or a device with more memory: the weights alone are too large"
    cure = ", or ".join(cures) or narrower
    raise ConfigError(f"the model does not fit: {plan}; it takes {cure}")


def _most_positions(length: int, fits: Callable[[int], bool]) -> int | None:
    """The most positions below ``length`` that fit, or None. A longer cache may be of a narrower dtype and fit where a
    shorter one does not.
    """
    edge = LONGEST_FLOAT32_CACHE + 1
    return largest(edge, length, fits) or largest(2, min(edge, length), fits)


def _fewer_prefixes(args: ModelArgs, config: EngineConfig, dtype: str, rest: int) -> str:
    """The cure that keeps as many rows as ``rest`` bytes of each device have room for; ``dtype`` of the cache."""
    rows = rest // planning.row_bytes(args, config, dtype, config.tensor_parallel or 1) * config.data_parallel
    most = rows * planning.row_bytes(args, config, dtype)
    return f"{setting('prefix_cache_bytes')} {most} at most, or 0" if most else f"{setting('prefix_cache_bytes')} 0"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
