"""What a model will need on the device, before any weight is read: weights, cache, the largest chunk's activations.

So a configuration that cannot fit is refused in a moment, with one that does, and not by the operating system after
minutes of loading. The arithmetic is that of llama/planning.py, which knows no torch.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llama import planning
from llama.compiled.cache import kept_rows
from llama.config import EngineConfig, ModelArgs
from llama.errors import ConfigError, setting
from llama.planning import GIB, MemoryPlan, gib, largest
from llama.sharding import Mesh

__all__ = ["GIB", "MemoryPlan", "check_fits", "dtypes_for", "gib", "plan_memory", "weight_bytes"]


def dtypes_for(config: EngineConfig, *, on_cpu: bool, int8_stored: bool) -> tuple[torch.dtype, torch.dtype]:
    """Storage dtype of the weights, and dtype of the activations; see ``planning.choose_dtypes``.

    Raises:
        ConfigError: another dtype than int8 is asked of an int8 checkpoint.
    """
    storage, activation = planning.choose_dtypes(config, on_cpu=on_cpu, int8_stored=int8_stored)
    return getattr(torch, storage), getattr(torch, activation)


def weight_bytes(args: ModelArgs, storage: torch.dtype) -> int:
    """Bytes of a model's weights; under int8 those of the linear layers with their scales, the rest in float32 at
    most.
    """
    return planning.weight_bytes(args, _name(storage))


def plan_memory(
    args: ModelArgs, config: EngineConfig, storage: torch.dtype, activation: torch.dtype, available: int | None
) -> MemoryPlan:
    """Count the bytes that a model of this shape needs under this configuration, on each of its devices.

    Args:
        args: the checkpoint's shape, its vocabulary settled.
        storage: dtype that the weights are kept in.
        activation: dtype of stream and cache.
        available: the device's free bytes, None where it does not say.
    """
    mesh, kept = Mesh(config.data_parallel, config.tensor_parallel or 1), kept_rows(args, config, activation)
    dtypes = _name(storage), _name(activation)
    return planning.plan_memory(args, config, *dtypes, available, mesh=mesh, kept_rows=kept)


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
    length, groups = config.max_seq_len, config.data_parallel
    rows = config.max_batch_size // groups
    shorter = largest(2, length, lambda value: fits(value, config.max_batch_size))
    fewer = largest(1, rows, lambda value: fits(length, value * groups))
    both = largest(2, length, lambda value: fits(value, groups))
    rest = (available or 0) - (plan.total - plan.prefixes)
    cures = [_fewer_prefixes(args, config, activation, rest)] if plan.prefixes and rest >= 0 else []
    cures += [f"{setting('max_seq_len')} {shorter} at most"] if shorter else []
    cures += [f"{setting('max_batch_size')} {fewer * groups} at most"] if fewer else []
    if not cures and both:
        cures = [f"{setting('max_batch_size')} {groups} with {setting('max_seq_len')} {both} at most"]
    narrower = f"a narrower {setting('dtype')}, or a device with more memory: the weights alone are too large"
    cure = ", or ".join(cures) or narrower
    raise ConfigError(f"the model does not fit: {plan}; it takes {cure}")


def _fewer_prefixes(args: ModelArgs, config: EngineConfig, activation: torch.dtype, rest: int) -> str:
    """The cure that keeps as many rows as ``rest`` bytes of each device have room for."""
    name, tensor = _name(activation), config.tensor_parallel or 1
    rows = rest // planning.row_bytes(args, config, name, tensor) * config.data_parallel
    most = rows * planning.row_bytes(args, config, name)
    return f"{setting('prefix_cache_bytes')} {most} at most, or 0" if most else f"{setting('prefix_cache_bytes')} 0"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
