"""Meta's own format: a directory with params.json and consolidated.00.pth.

Tensors are read one at a time from the memory-mapped file. ``weights_only`` keeps pickled code out; what it does not guard
against on torch 2.9 is said in the README (CVE-2026-24747): load a stranger's .pth file in a sandbox only.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llama.config import ModelArgs
from llama.errors import CheckpointError, ConfigError

# LLaMA 1 and 2 checkpoints carry a table of rotary frequencies, which follows from params.json
DERIVED_TENSORS = frozenset({"rope.freqs"})


def read_params(ckpt_dir: Path) -> ModelArgs:
    """The shape that a checkpoint's params.json declares.

    Raises:
        CheckpointError: no such directory or file, not JSON, an unknown key, or a value out of its range.
    """
    if not ckpt_dir.is_dir():
        raise CheckpointError(f"no such directory: {ckpt_dir} (--ckpt_dir expects one with params.json and consolidated.00.pth)")
    path = ckpt_dir / "params.json"
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in ckpt_dir.iterdir())[:10]) or "nothing"
        raise CheckpointError(f"{ckpt_dir} has no params.json (found: {found}); only Meta's format is read") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(params, dict):
        raise CheckpointError(f"{path}: got a JSON {type(params).__name__}, expected an object such as {{'dim': 4096, ...}}")
    try:
        return ModelArgs.from_params(params)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def open_tensors(ckpt_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by Meta's names, mapped from the file and not read yet; derived ones are left out.

    Raises:
        CheckpointError: no .pth file, several (a checkpoint split over devices), or one that torch cannot read safely.
    """
    files = sorted(ckpt_dir.glob("*.pth"))
    if not files:
        raise CheckpointError(f"{ckpt_dir} has no .pth file; expected consolidated.00.pth")
    if len(files) > 1:
        names = ", ".join(f.name for f in files)
        raise CheckpointError(f"{ckpt_dir} is split into {len(files)} files ({names}); this version reads unsplit checkpoints only")
    try:
        loaded: Any = torch.load(files[0], map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{files[0]} is not a checkpoint that torch.load reads with weights_only: {reason}") from error
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()):
        raise CheckpointError(f"{files[0]}: got a {type(loaded).__name__}, expected a dict of tensors by name")
    return {name: tensor for name, tensor in loaded.items() if name not in DERIVED_TENSORS}


def match_tensors(
    expected: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor], where: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pair every tensor that the model expects with the checkpoint's, after checking all of them.

    Args:
        expected: name to shape, as the model built from params.json has them.
        tensors: what the checkpoint holds.
        where: the checkpoint, for the error.

    Yields:
        (name, tensor), in the model's order.

    Raises:
        CheckpointError: missing, extra or misshapen tensors; the first ten of each are named.
    """
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    integers = [f"{name} {tensors[name].dtype}" for name in expected if name in tensors and not tensors[name].is_floating_point()]
    kinds = (("missing", missing), ("not known to this model", extra), ("of another shape", misshapen), ("not floating point", integers))
    problems = [f"{len(names)} {kind}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" for kind, names in kinds if names]
    if problems:
        raise CheckpointError(f"{where}: the tensors do not match params.json; " + "; ".join(problems))
    return ((name, tensors[name]) for name in expected)
