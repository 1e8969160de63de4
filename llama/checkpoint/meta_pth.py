"""Meta's own format: a directory with params.json and consolidated.00.pth.

Tensors are read one at a time from the memory-mapped file. ``weights_only`` keeps pickled code out; what it does not guard
against on torch 2.9 is said in the README (CVE-2026-24747): load a stranger's .pth file in a sandbox only.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
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
        params = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in ckpt_dir.iterdir())[:10]) or "nothing"
        raise CheckpointError(f"{ckpt_dir} has no params.json (found: {found}); only Meta's format is read") from None
    except (OSError, ValueError, RecursionError) as error:
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
    loaded = _load(files[0])
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{files[0]}: got a {type(loaded).__name__}, expected a dict of tensors by name")
    odd = next((name for name, value in loaded.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)), None)
    if odd is not None:
        raise CheckpointError(f"{files[0]}: got a {type(loaded[odd]).__name__} under {odd!r}, expected a dict of tensors by name")
    _check_records(files[0], loaded)
    return {name: tensor for name, tensor in loaded.items() if name not in DERIVED_TENSORS}


def _load(path: Path) -> Any:
    """What torch.load finds in a file that it maps, without running any code of it."""
    if not zipfile.is_zipfile(path):
        start = path.read_bytes()[:40] if path.is_file() else b""
        guess = "; it is a Git LFS pointer: fetch the file itself" if start.startswith(b"version https://git-lfs") else ""
        raise CheckpointError(
            f"{path} is not a checkpoint: got {path.stat().st_size} bytes that begin with {start[:16]!r}, expected the zip archive that "
            f"torch.save writes since 1.6; it may be cut short{guess}"
        )
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the restricted unpickler fails in many ways on damaged input, all of them harmless
        found = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class) ([\w.]+)", str(error))
        message = (str(error) or "no more is known").splitlines()[0][:200]
        code = f"it holds more than tensors ({found.group(1)}), which is never loaded" if found else None
        reason = code or f"{type(error).__name__}: {message}"
        raise CheckpointError(f"{path} is not a checkpoint, or a damaged one: {reason}") from error


def _check_records(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Every tensor's bytes are in the archive: from a record that is too short, mapping would read its neighbour's without a word."""
    odd = [name for name, t in tensors.items() if t.layout is not torch.strided or t.device.type != "cpu"]
    if odd:
        raise CheckpointError(f"{path}: got sparse tensors or ones without values ({', '.join(odd[:10])}), expected plain ones")
    storages = [t.untyped_storage() for t in tensors.values()]
    wanted = Counter({s.data_ptr(): s.nbytes() for s in storages}.values())
    with zipfile.ZipFile(path) as archive:
        short = wanted - Counter(info.file_size for info in archive.infolist() if "/data/" in info.filename)
    if short:
        missing = f"{short.total()} tensors have no record of their size in it, for instance one of {min(short)} bytes"
        raise CheckpointError(f"{path} is not a checkpoint, or a damaged one: {missing}")


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
