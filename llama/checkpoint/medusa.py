"""Medusa heads from files, as FasterDecoding/Medusa and text-generation-inference publish them.

    medusa_lm_head.safetensors   or   medusa_lm_head.pt   or   model.safetensors, and beside it perhaps a config.json

The tensors alone say how many heads and residual blocks there are: the config.json of published heads says 2 where the
file has 5. Names and shapes are compared from the header, before any weight is read.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from llama.checkpoint import stored_as
from llama.checkpoint.files import FLOATING, Header, PickleFile, SafetensorsFile, TensorFile
from llama.checkpoint.source import NAMED_AT_MOST, check_finite, dtype_name
from llama.compiled.medusa import MedusaHeads
from llama.config import ModelArgs
from llama.errors import CheckpointError
from llama.settings import read_json
from llama.storage import WeightFormat
from llama.xla import backend, transfers

log = logging.getLogger("llama")

KINDS: dict[str, type[TensorFile]] = {  # by name, the first that is there
    "medusa_lm_head.safetensors": SafetensorsFile,
    "medusa_lm_head.pt": PickleFile,
    "model.safetensors": SafetensorsFile,
}
IN_BLOCK = re.compile(r"(\d{1,9})\.(\d{1,9})\.linear\.(?:weight|bias)")  # head, residual block
VOCABULARY = re.compile(r"(\d{1,9})\.\d{1,9}\.weight")
LAYOUT = (
    "i.j.linear.weight and i.j.linear.bias of each head i and residual block j, then i.n.weight with n the number of "
    "blocks"
)


class MedusaFile:
    """An opened file of Medusa heads, of which only the header has been read; ``open_medusa`` makes one.

    Attributes:
        path: the file.
        n_heads: as its tensors say.
        n_layers: residual blocks of each head.
        dim: numbers of a hidden state that the heads read.
        vocab_size: numbers of tokens that they choose from.
        base_model: the model that they were trained for, as their config.json names it, or None.
    """

    def __init__(self, directory: Path) -> None:
        self._file = _open_weights(directory)
        self.path = self._file.path
        headers = self._file.headers
        self.n_heads, self.n_layers = _count(self.path, headers)
        self.vocab_size, self.dim = _sizes(self.path, headers, f"0.{self.n_layers}.weight")
        _check_tensors(self.path, headers, self._shapes())
        self.base_model = self._compare_config(directory / "config.json")

    def check(self, args: ModelArgs) -> None:
        """Compare the heads with the model that they are for.

        Raises:
            CheckpointError: another width, or another vocabulary.
        """
        sizes = {"dim": (self.dim, args.dim), "vocab_size": (self.vocab_size, args.vocab_size)}
        wrong = [
            f"{name} {ours}, but the model has {theirs}" for name, (ours, theirs) in sizes.items() if ours != theirs
        ]
        if wrong:
            known = f" (config.json names {self.base_model})" if self.base_model else ""
            raise CheckpointError(
                f"{self.path}: the heads have {' and '.join(wrong)}: expected heads that were trained for this model; "
                f"take those, or the model that these were trained for{known}"
            )

    def nbytes(self, dtype: torch.dtype) -> int:
        """How much memory the heads will take, stored in ``dtype``; biases and the scales of int8 are float32."""
        total = 0
        for shape in self._shapes().values():
            size = torch.Size(shape).numel()
            total += 4 * size if len(shape) == 1 else _format(dtype).nbytes(shape)
        return total

    def tensors(self, allow_nan: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of every weight, as a view of the mapped file; refuse NaN and infinity.

        Args:
            allow_nan: log a warning with the name and continue.

        Raises:
            CheckpointError: a weight that is not finite, or a file that was changed since it was opened.
        """
        for name in self._shapes():
            tensor = self._file.read(name)
            cause = "the file is damaged, or the heads' training went wrong"
            check_finite(tensor, f"{self.path}: tensor {name}", cause, allow_nan)
            yield name, tensor
            del tensor  # or it would stay in memory while the next one is read

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, in the order of computation."""
        shapes: dict[str, tuple[int, ...]] = {}
        for head in range(self.n_heads):
            for block in range(self.n_layers):
                shapes[f"{head}.{block}.linear.weight"] = (self.dim, self.dim)
                shapes[f"{head}.{block}.linear.bias"] = (self.dim,)
            shapes[f"{head}.{self.n_layers}.weight"] = (self.vocab_size, self.dim)
        return shapes

    def _compare_config(self, path: Path) -> str | None:
        """Log what a config.json says otherwise than the tensors; return the name of the base model."""
        if not os.path.lexists(path):
            return None
        config = read_json(path)
        for key, found in (("medusa_num_heads", self.n_heads), ("medusa_num_layers", self.n_layers)):
            said = config.get(key, found)
            if said != found:
                log.warning(
                    "%s: %s is %.40s, but %s holds %d; the tensors count", path, key, said, self.path.name, found
                )
        base = config.get("base_model_name_or_path")
        return base[:200] if isinstance(base, str) else None


def open_medusa(directory: str | Path) -> MedusaFile:
    """Open the Medusa heads in a directory, by their header alone.

    Raises:
        CheckpointError: no such file, a damaged one, tensors that are missing, unknown or misshapen, heads of different
            depth, or a dtype that is not computed with.
    """
    return MedusaFile(Path(directory))


def load_medusa(
    file: MedusaFile, args: ModelArgs, dtype: torch.dtype, device: torch.device, allow_nan: bool = False
) -> MedusaHeads:
    """Move heads to the device, one tensor at a time.

    Args:
        args: of the model that they are for.
        dtype: storage dtype of the weights, as of the model's linear layers; int8 quantises them, and so does int4, as
            it does vocabulary heads. Biases are float32.
        allow_nan: go on where a weight holds NaN or infinity.

    Raises:
        CheckpointError: heads for another model, before any weight is read; a weight that is not finite.
    """
    file.check(args)
    with torch.device("meta"):
        heads = MedusaHeads(file.n_heads, file.n_layers, file.dim, file.vocab_size)
    for name, tensor in file.tensors(allow_nan):
        module, _, leaf = name.rpartition(".")
        owner = heads.get_submodule(module)
        parts = stored_as(tensor, None, leaf, _format(dtype) if leaf == "weight" else WeightFormat("float32"))
        del tensor
        for part, host in parts.items():
            setattr(owner, part, nn.Parameter(transfers.adopt(host, device), requires_grad=False))
        if device.type == "xla":
            backend.wait()  # a transfer keeps its host tensor until it is done
    return heads


def _format(dtype: torch.dtype) -> WeightFormat:
    """How a weight is stored under a model's dtype."""
    name = dtype_name(dtype)
    return WeightFormat("int8" if name == "int4" else name)


def _open_weights(directory: Path) -> TensorFile:
    """Open the file that holds the heads: safetensors before a pickle."""
    for name, kind in KINDS.items():
        path = directory / name
        if not os.path.lexists(path):
            continue
        if kind is PickleFile:
            log.warning("%s is a pickle; load it from people you trust only, or take safetensors", path)
        return kind(path)
    there = sorted(path.name for path in directory.iterdir()) if os.path.isdir(directory) else ["no such directory"]
    found = ", ".join(there[:10])
    raise CheckpointError(
        f"{directory} has no Medusa heads (found: {found or 'nothing'}), expected one of {', '.join(KINDS)}"
    )


def _count(path: Path, headers: Mapping[str, Header]) -> tuple[int, int]:
    """Return the numbers of heads and of residual blocks in each.

    Raises:
        CheckpointError: no heads, or heads of different depth.
    """
    blocks: dict[int, set[int]] = {}
    for name in headers:
        if in_block := IN_BLOCK.fullmatch(name):
            blocks.setdefault(int(in_block[1]), set()).add(int(in_block[2]))
        elif vocabulary := VOCABULARY.fullmatch(name):
            blocks.setdefault(int(vocabulary[1]), set())
    if not blocks:
        raise CheckpointError(
            f"{path} holds no Medusa head (found: {_first_of(list(headers)) or 'no tensor'}), expected {LAYOUT}"
        )
    depths = {head: len(found) for head, found in sorted(blocks.items())}
    if len(set(depths.values())) > 1:
        first = min(depths)
        other = next(head for head in depths if depths[head] != depths[first])
        raise CheckpointError(
            f"{path}: head {first} has {depths[first]} residual blocks and head {other} has {depths[other]}, expected "
            "as many in every head: the file is incomplete, or of another kind of heads"
        )
    return len(depths), depths[min(depths)]


def _sizes(path: Path, headers: Mapping[str, Header], name: str) -> tuple[int, int]:
    """Return the sizes of the vocabulary and of a hidden state, which the first head's vocabulary layer shows.

    Raises:
        CheckpointError: it is missing, or no matrix.
    """
    if name not in headers:
        raise CheckpointError(f"{path}: tensor {name}, the vocabulary layer of head 0, is missing, expected {LAYOUT}")
    shape = headers[name].shape
    if len(shape) != 2:
        raise CheckpointError(f"{path}: tensor {name} is {list(shape)}, expected [vocab_size, dim]")
    return shape[0], shape[1]


def _check_tensors(path: Path, headers: Mapping[str, Header], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors that were found with those of heads of this size."""
    supported = set(FLOATING.values())
    problems = {
        "missing": [name for name in shapes if name not in headers],
        "not known": [name for name in headers if name not in shapes],
        "of another shape": [
            f"{name} {list(headers[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in headers and headers[name].shape != shape
        ],
        "of a type that is not computed with": [
            f"{name} {header.dtype}" for name, header in headers.items() if header.dtype not in supported
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(each)} {kind}: {_first_of(each)}" for kind, each in problems.items() if each)
        raise CheckpointError(f"{path}: the tensors are not those of Medusa heads; {listed}; expected {LAYOUT}")


def _first_of(items: list[str]) -> str:
    return ", ".join(items[:NAMED_AT_MOST]) + (", ..." if len(items) > NAMED_AT_MOST else "")
