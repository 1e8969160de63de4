"""Meta's format: params.json and consolidated.00.pth, .01.pth, ..., one file for each rank.

The files are split as fairscale splits weights (partition.py, llama/sharding.py). An unsplit weight stays a
view of the mapped file; a split one is joined when it is read. The split is never guessed: sizes that do not fit are
refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from llama.checkpoint import names, partition
from llama.checkpoint.duplicates import check_distinct
from llama.checkpoint.files import PickleFile
from llama.checkpoint.source import Found, Source, same_bits
from llama.config import ModelArgs
from llama.errors import CheckpointError
from llama.settings import Settings, read_json, read_params
from llama.sharding import axis_of, head_of

SHARD = re.compile(r"consolidated\.(\d+)\.pth")
NOTES = "llama-xla.json"  # settings without a key in params.json; written by reshard if there are any


class MetaSource(Source):
    """A checkpoint in Meta's format, of any number of shards.

    Args:
        directory: with params.json and the shards.

    Raises:
        CheckpointError: a missing or damaged file, shards that do not belong together, or see Source.
    """

    format = "meta"

    def __init__(self, directory: Path) -> None:
        args = read_params(directory)
        self._shards = [PickleFile(path) for path in shard_files(directory)]
        _check_alike(self._shards)
        _check_count(self._shards, args)
        self._axes = dict(_axes(self._shards[0], args, len(self._shards)))
        self._found = {
            name: self._info(name, args) for name in self._shards[0].headers if not names.DERIVED.fullmatch(name)
        }
        sliding_window, noted_axis = _read_notes(directory)
        axis = noted_axis if len(self._shards) == 1 else self._axes.get(names.EMBEDDING)
        settings = Settings(args, directory / "params.json", sliding_window, axis)
        super().__init__(directory, settings, self._found, tuple(shard.path for shard in self._shards))
        split = [name for name, axis in self._axes.items() if axis is not None and not name.endswith(".bias")]
        check_distinct(self._shards, [name for name in split if not self._replicated(name, self.args)])

    def _info(self, name: str, args: ModelArgs) -> Found:
        header, axis, count = self._shards[0].headers[name], self._axes.get(name), len(self._shards)
        shape = list(header.shape)
        if axis is not None and axis < len(shape):
            shape[axis] *= args.kv_heads if self._replicated(name, args) else count
        return Found(tuple(shape), header.dtype, self._shards[0].path)

    def _replicated(self, name: str, args: ModelArgs) -> bool:
        """Whether neighbouring shards hold the same key/value head; their sizes show it."""
        weight = names.weight_of(name)
        one_head = self._shards[0].headers[name].shape[:1] == (args.head_dim,)
        return weight is not None and one_head and partition.replicates_heads(weight, args, len(self._shards))

    def _read(self, name: str) -> torch.Tensor:
        if len(self._shards) == 1:
            return self._shards[0].read(name).contiguous()
        axis = self._axes[name]
        if axis is None:
            return self._same(name, self._shards)
        pieces: list[Sequence[PickleFile]] = [[shard] for shard in self._shards]
        if self._replicated(name, self.args):
            pieces = [self._shards_of_head(head) for head in range(self.args.kv_heads)]
        whole = self._shards[0].read(name).new_empty(self._found[name].shape)
        for rank, shards in enumerate(pieces):
            partition.cut(whole, rank, len(pieces), axis).copy_(self._same(name, shards))
            for shard in shards:
                shard.let_go()
        return whole

    def _shards_of_head(self, head: int) -> list[PickleFile]:
        count = len(self._shards)
        return [shard for rank, shard in enumerate(self._shards) if head_of(rank, self.args.kv_heads, count) == head]

    def _same(self, name: str, shards: Sequence[PickleFile]) -> torch.Tensor:
        """Return the tensor that all of ``shards`` hold; refuse copies that differ."""
        first = shards[0].read(name)
        for other in shards[1:]:
            if not same_bits(first, other.read(name)):
                raise CheckpointError(
                    f"{other.path}: tensor {name} differs from the one in {shards[0].path.name}, expected equal "
                    "copies: the files belong to two models, or one is damaged"
                )
        return first.contiguous()


def shard_files(directory: Path) -> list[Path]:
    """Return the .pth files of a checkpoint in the order of their ranks.

    They are consolidated.00.pth and on, or the only .pth file, whatever its name.

    Raises:
        CheckpointError: none, several that are not numbered, or a number that is missing.
    """
    every = sorted(directory.glob("*.pth"))
    if not every:
        raise CheckpointError(f"{directory} has no .pth file; expected consolidated.00.pth")
    ranks = {int(found.group(1)): path for path in every if (found := SHARD.fullmatch(path.name))}
    if not ranks and len(every) == 1:
        return every
    listed = ", ".join(path.name for path in every)
    missing = [rank for rank in range(len(ranks)) if rank not in ranks]
    if missing:
        raise CheckpointError(f"{directory}: consolidated.{missing[0]:02}.pth is missing (found: {listed})")
    if len(ranks) != len(every):
        raise CheckpointError(
            f"{directory} has several .pth files ({listed}), expected consolidated.00.pth and on, each number once"
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _check_alike(shards: Sequence[PickleFile]) -> None:
    """Check that every shard holds the same names, in the same shapes and dtypes."""
    first = shards[0]
    for other in shards[1:]:
        for name in sorted(first.headers.keys() ^ other.headers.keys()):
            has, lacks = (first, other) if name in first.headers else (other, first)
            raise CheckpointError(
                f"{lacks.path} has no tensor {name}, which is in {has.path.name}: a shard of another model, or damaged"
            )
        for name, header in first.headers.items():
            if other.headers[name] != header:
                raise CheckpointError(
                    f"{other.path}: tensor {name} is {_described(other, name)}, but {_described(first, name)} in "
                    f"{first.path.name}: a shard of another model, or damaged"
                )


def _described(shard: PickleFile, name: str) -> str:
    return f"{list(shard.headers[name].shape)} {shard.headers[name].dtype}"


def _check_count(shards: Sequence[PickleFile], args: ModelArgs) -> None:
    """Check the number of shards against the first layer's query weight."""
    name = names.IN_LAYER[0].meta.format(0)
    shape = shards[0].headers[name].shape if name in shards[0].headers else ()
    rows = args.n_heads * args.head_dim
    if len(shape) != 2 or shape[1] != args.dim or shape[0] < 1 or rows % shape[0]:
        return  # not a part of this weight: Source reports how it differs from the model
    count = rows // shape[0]
    if count == len(shards):
        return
    expected = f"consolidated.00.pth to consolidated.{count - 1:02}.pth" if count > 1 else "one file"
    raise CheckpointError(
        f"{shards[0].path.parent} has {len(shards)} shards, but {name} in {shards[0].path.name} is one of "
        f"{count} parts of {rows}: expected {expected}"
    )


def _axes(shard: PickleFile, args: ModelArgs, count: int) -> Iterator[tuple[str, int | None]]:
    """Yield (name, axis it is split along) for every known weight in a shard.

    Raises:
        CheckpointError: an embedding that is split neither as LLaMA 1 and 2 nor as Llama 3 do it.
    """
    for name, header in shard.headers.items():
        weight = names.weight_of(name)
        if weight is None:
            continue
        if count == 1:
            yield name, None
        elif weight.meta == names.EMBEDDING:
            yield name, _embedding_axis(shard.path, header.shape, args, count)
        else:
            yield name, axis_of(name)


def _embedding_axis(path: Path, shape: tuple[int, ...], args: ModelArgs, count: int) -> int:
    """Return the embedding's axis: 1 if the vectors are split, 0 if the vocabulary is.

    LLaMA 1 and 2 split the vectors, Llama 3 splits the vocabulary.
    """
    rows, width = shape if len(shape) == 2 else (0, 0)
    if width * count == args.dim and args.vocab_size in (-1, rows):
        return 1
    if width == args.dim and args.vocab_size in (-1, rows * count):
        return 0
    raise CheckpointError(
        f"{path}: tensor {names.EMBEDDING} is {list(shape)}, expected [{args.vocab_size}, {args.dim / count:g}] as "
        f"LLaMA 1 and 2 split it into {count}, or [{abs(args.vocab_size) / count:g}, {args.dim}] as Llama 3 does"
    )


def _read_notes(directory: Path) -> tuple[int | None, int | None]:
    """Return (sliding window, axis that the embedding was split along); None if not noted."""
    path = directory / NOTES
    if not os.path.lexists(path):
        return None, None
    notes = read_json(path)
    window, axis = notes.get("sliding_window"), notes.get("embedding_axis")
    valid = (window is None or (type(window) is int and window > 0)) and axis in (None, 0, 1) and type(axis) is not bool
    if not valid or set(notes) - {"sliding_window", "embedding_axis"}:
        raise CheckpointError(
            f"{path}: got {str(notes)[:100]}, expected sliding_window (a positive number) and embedding_axis (0 or 1)"
        )
    return window, axis
