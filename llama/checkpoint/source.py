"""An opened checkpoint of any format, of which only headers have been read.

Every source uses Meta's names, shapes and layout: shards are merged, Hugging Face's rotary order is undone. Opening one
checks that its tensors are exactly those of the model that its settings describe. Problems that only the weights show
(replicated norms that differ, NaN) are found when they are read.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from llama.checkpoint import names
from llama.checkpoint.files import INTEGERS
from llama.config import GenerationDefaults, ModelArgs
from llama.errors import CheckpointError, ConfigError, setting
from llama.settings import Settings, read_json
from llama.storage import GROUPS, INT8_GROUP, QUANTISED, Storage, WeightFormat, formats_of, group_of

log = logging.getLogger("llama")

NAMED_AT_MOST = 10
LONGEST_NAME = 200  # characters of a tensor's name in a message
MAY_BE_ZERO = (".wo.weight", ".w2.weight", ".bias")
BLANK = "is zero throughout: the download stopped before it, or nothing was trained; download the file again"
CHUNK = 2**22  # numbers compared in one go


class Found(NamedTuple):
    """A tensor as a file's header describes it, with the shape of the whole weight.

    The dtype is a string if it is not supported.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    file: Path


class TensorInfo(NamedTuple):
    """A checked weight as headers describe it.

    Attributes:
        shape: of the whole weight, its shards merged.
        dtype: as it is stored.
        file: that holds it, the first of several.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


class Source(ABC):
    """An opened checkpoint; ``open_checkpoint`` makes one.

    Args:
        directory: of the checkpoint.
        settings: of the checkpoint.
        found: every tensor in it, by Meta's name; derived ones left out.
        files: the files that hold them.

    Attributes:
        format: ``meta``, ``huggingface`` or ``llama-xla``.
        args: the shape, with the vocabulary size settled.
        sliding_window: how many positions a position attends to, or None.
        embedding_axis: see Settings.
        defaults: the sampling defaults of generation_config.json.

    Raises:
        CheckpointError: tensors that are missing, unknown or misshapen.
    """

    format: str
    may_be_quantised: ClassVar[bool] = False

    def __init__(
        self, directory: Path, settings: Settings, found: Mapping[str, Found], files: tuple[Path, ...]
    ) -> None:
        self.directory = directory
        self.files = files
        self.args = settle_vocab_size(settings, found)
        if self.args.sliding_window is None and settings.sliding_window is not None:
            self.args = replace(self.args, sliding_window=settings.sliding_window)
        self.sliding_window = self.args.sliding_window
        self.embedding_axis = settings.embedding_axis
        self.defaults = read_defaults(directory)
        weights = dict(found)
        self._spare_head = weights.pop(names.HEAD, None) if self.args.tie_word_embeddings else None
        self._infos = match(self.args, weights, settings.file, self.label, self.may_be_quantised)

    @property
    def is_quantised(self) -> bool:
        """Whether some weights are stored as int8 or int4, with scales."""
        return any(names.is_scale(name) for name in self._infos)

    @property
    def stored(self) -> dict[str, WeightFormat]:
        """The quantised weights by numberless names, those left out whose layers differ."""
        return formats_of({name: (info.shape, dtype_name(info.dtype)) for name, info in self._infos.items()})

    def rounded(self) -> dict[str, str]:
        """The weights that were rounded to a few bits once, by Meta's names, and to what."""
        return {
            weight: str(WeightFormat(QUANTISED[dtype], group_of(info.shape, QUANTISED[dtype], scale.shape)))
            for name, scale in self._infos.items()
            if names.is_scale(name)
            for weight in [names.weight_of_scales(name)]
            for info in [self._infos[weight]]
            for dtype in [dtype_name(info.dtype)]
        }

    def log_losses(self, storage: Storage, tensor: int = 1) -> None:
        """Log which weights, rounded already, a storage rounds once more.

        Args:
            storage: that the weights are about to be brought into.
            tensor: over how many devices they will be split.
        """
        again: dict[str, set[str]] = {}
        for name, before in self.rounded().items():
            after = storage.format_of(name, self.args, tensor)
            kept = storage.kept.get(names.numberless(name))
            if after is not None and after.is_quantised and (kept is None or kept.dtype != after.dtype):
                again.setdefault(str(after), set()).add(before)
        for after_label, each in again.items():
            log.warning(
                "%s: weights in %s are rounded again, to %s, which adds to their error; dtype float32 keeps them exact",
                self.directory,
                ", ".join(sorted(each)),
                after_label,
            )

    def infos(self) -> dict[str, TensorInfo]:
        """Shape, dtype and file of every weight by Meta's name, in the model's order."""
        return dict(self._infos)

    def read(self, name: str) -> torch.Tensor:
        """Return one whole weight in Meta's layout, as a host tensor in its stored dtype.

        Do not write to it: it may be the mapped file.

        Raises:
            CheckpointError: replicated parts that differ, or a file that was changed since it was opened.
            KeyError: a name that is not in ``infos()``.
        """
        info = self._infos[name]
        tensor = self._read(name)
        if name == names.EMBEDDING and self._spare_head is not None and not same_bits(tensor, self._read(names.HEAD)):
            raise CheckpointError(
                f"{self._spare_head.file}: the head {names.HEAD} differs from the embedding {names.EMBEDDING}, "
                f"although the settings of {self.directory} tie them; expected equal tensors, or none for the head"
            )
        assert tuple(tensor.shape) == info.shape
        return tensor

    def tensors(self, order: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of every weight, in the model's order or another one; see ``read``."""
        for name in order or self._infos:
            yield name, self.read(name)
            self._let_go(name)

    def _let_go(self, name: str) -> None:  # noqa: B027  (optional: not every source keeps something)
        """Release what reading a weight keeps mapped, if nobody holds it any more."""

    def label(self, name: str) -> str:
        """Return the name of a weight for error messages."""
        return name

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor:
        """Return one whole weight; also the head of a tied model if the files hold one."""


def checked(
    source: Source, allow_nan: bool = False, order: Iterable[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for every weight of a source; refuse NaN, infinity, and weights of zeros only.

    Args:
        source: an opened checkpoint.
        allow_nan: log a warning with the name and continue.
        order: of the names; None for the model's.

    Raises:
        CheckpointError: the first weight that is not finite, or is zero throughout, with its file.
    """
    for name, tensor in source.tensors(order):
        where = f"{source.infos()[name].file}: tensor {source.label(name)}"
        check_finite(tensor, where, "the checkpoint is damaged, or its training went wrong", allow_nan)
        if is_blank(name, tensor):
            if not allow_nan:
                raise CheckpointError(f"{where} {BLANK}; {setting('allow_nan')} loads it all the same")
            log.warning("%s %s", where, BLANK)
        yield name, tensor
        del tensor  # or it would stay in memory while the next one is read


def check_finite(tensor: torch.Tensor, where: str, cause: str, allow_nan: bool) -> None:
    """Refuse a weight that holds NaN or infinity, or log it.

    Args:
        where: the file and the weight.
        cause: what may have happened.
        allow_nan: log it.

    Raises:
        CheckpointError: it is not finite, and that is not allowed.
    """
    if is_finite(tensor):
        return
    found = f"{where} holds NaN or infinity"
    if not allow_nan:
        raise CheckpointError(f"{found}: {cause}; {setting('allow_nan')} loads it all the same")
    log.warning("%s", found)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every number of a tensor is finite.

    NaN and infinity both show in the minimum and the maximum.
    """
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def is_blank(name: str, tensor: torch.Tensor) -> bool:
    """Whether a weight that no training leaves at zero is zero throughout.

    Downloads that reserve a file's whole length leave zeros where they stop. wo, w2 and biases may be zero, and so may
    their scales: layers that were added to a trained model begin so.
    """
    may_be = names.weight_of_scales(name).endswith(MAY_BE_ZERO)
    return not may_be and not tensor.reshape(-1)[:1].any() and not tensor.any()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit, also where they hold NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pairs = zip(torch.split(one.reshape(-1), CHUNK), torch.split(other.reshape(-1), CHUNK), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def settle_vocab_size(settings: Settings, found: Mapping[str, Found]) -> ModelArgs:
    """Return the shape; a vocabulary size of -1 becomes the embedding's number of rows.

    Raises:
        CheckpointError: the size is -1 and there is no embedding.
    """
    if settings.args.vocab_size != -1:
        return settings.args
    if names.EMBEDDING not in found or len(found[names.EMBEDDING].shape) != 2:
        raise CheckpointError(
            f"{settings.file}: vocab_size is -1 and the checkpoint has no {names.EMBEDDING} to take it from"
        )
    return settings.args.with_vocab_size(found[names.EMBEDDING].shape[0])


def match(
    args: ModelArgs,
    found: Mapping[str, Found],
    settings_file: Path,
    label: Callable[[str], str] = str,
    may_be_quantised: bool = False,
) -> dict[str, TensorInfo]:
    """Compare the tensors that were found with those of the model.

    Args:
        args: the model's shape, its vocabulary size settled.
        found: by Meta's names.
        settings_file: the file that declares the shape, for errors.
        label: returns a weight's name for errors.
        may_be_quantised: matrices may be int8 or int4, with scales (quantize.py).

    Returns:
        ``found`` in the model's order.

    Raises:
        CheckpointError: missing, extra or misshapen tensors, or unsupported dtypes; the first ten of each are named.
    """
    if args.n_layers > len(found):  # a damaged number could name billions of layers
        last = names.IN_LAYER[0].meta.format(args.n_layers - 1)
        raise CheckpointError(
            f"{settings_file}: n_layers is {args.n_layers}, but {last} and others are missing from {len(found)} tensors"
        )
    files = sorted({info.file.name for info in found.values()})
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in names.expected_weights(args):
        shapes[name] = names.shape_of(weight, args)
        if may_be_quantised and name in found and len(shapes[name]) == 2:
            shapes |= _quantised_shapes(name, shapes[name], found)
    found = {
        name: info._replace(dtype=_allowed(info.dtype, names.scale_of(name) in shapes)) for name, info in found.items()
    }

    def described(name: str) -> str:
        return f"{label(name)} in {found[name].file.name}" if len(files) > 1 else label(name)

    matched, misshapen = {}, []
    for name, shape in shapes.items():
        info = found.get(name)
        if info is not None and info.shape != shape:
            misshapen.append(f"{described(name)} {list(info.shape)} instead of {list(shape)}")
        if info is not None and isinstance(info.dtype, torch.dtype):
            matched[name] = TensorInfo(info.shape, info.dtype, info.file)
    odd = {name: info.dtype for name, info in found.items() if isinstance(info.dtype, str)}
    floats = {name for name, dtype in odd.items() if dtype.startswith(("F", "torch.float"))}
    problems = {
        "missing": [label(name) for name in shapes if name not in found],
        "not known to this model": [described(name) for name in found if name not in shapes],
        "of another shape": misshapen,
        "not floating point": [f"{described(name)} {dtype}" for name, dtype in odd.items() if name not in floats],
        "of a type that is not computed with": [f"{described(name)} {odd[name]}" for name in odd if name in floats],
        "of the other 16-bit type": [f"{described(name)} {found[name].dtype}" for name in _mixed_halves(found)],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(each)} {kind}: {_first_of(each)}" for kind, each in problems.items() if each)
        where = f"{settings_file.parent} ({_first_of(files)})"
        raise CheckpointError(
            f"{where}: the tensors do not match {settings_file.name}, so one of them is another model's or damaged and "
            f"must be downloaded again; {listed}"
        )
    return matched


def _quantised_shapes(name: str, shape: tuple[int, ...], found: Mapping[str, Found]) -> dict[str, tuple[int, ...]]:
    """The shapes of a quantised weight and of its scales, by their names, those of the groups that it has, or the usual
    ones; none for a weight in floating point.
    """
    dtype, scale = found[name].dtype, names.scale_of(name)
    if dtype not in (torch.int8, torch.uint8):
        return {}
    channels, width = shape
    if dtype == torch.int8:
        possible = [(channels,), (channels, width // INT8_GROUP)]
    else:
        possible = [(channels, width // group) for group in GROUPS if width % group == 0]
        shape = (channels, width // 2)
    has = found[scale].shape if scale in found else None
    return {name: shape, scale: has if has in possible else possible[0] if possible else (channels, 0)}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def _allowed(dtype: torch.dtype | str, with_scale: bool) -> torch.dtype | str:
    """Return the dtype, as a string if it is not supported: of integers only int8 and int4's bytes, with scales."""
    if dtype in (torch.int8, torch.uint8) and with_scale:
        return dtype
    return next((name for name, each in INTEGERS.items() if each == dtype), dtype)


def _first_of(items: Sequence[str]) -> str:
    named = ", ".join(item[:LONGEST_NAME] for item in items[:NAMED_AT_MOST])
    return named + (", ..." if len(items) > NAMED_AT_MOST else "")


def _mixed_halves(found: Mapping[str, Found]) -> list[str]:
    """Return the less frequent of float16 and bfloat16 tensors if both occur.

    No checkpoint has both, but a damaged header can say so. Scales may be of another dtype.
    """
    halves = [
        [n for n, info in found.items() if info.dtype == dtype and not names.is_scale(n)]
        for dtype in (torch.float16, torch.bfloat16)
    ]
    return min(halves, key=len)


def read_defaults(directory: Path) -> GenerationDefaults:
    """Read the sampling defaults of a directory's generation_config.json, if there is one.

    ``do_sample: false`` means temperature 0.

    Raises:
        CheckpointError: the file is damaged, or a value is out of its range.
    """
    path = directory / "generation_config.json"
    if not os.path.lexists(path):
        return GenerationDefaults()
    content = read_json(path)
    eos: Any = content.get("eos_token_id")
    temperature: Any = 0.0 if content.get("do_sample") is False else content.get("temperature")
    try:
        return GenerationDefaults(
            temperature=temperature,
            top_p=content.get("top_p"),
            stop_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            **{name: content.get(name) for name in ("top_k", "min_p", "typical_p", "repetition_penalty")},
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
