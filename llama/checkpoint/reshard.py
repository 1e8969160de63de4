"""Rewrite checkpoints: ``reshard`` into Meta's format, ``convert`` into our own safetensors.

The source may have any format. Weights are read one at a time and freed before the next one; writing.py describes what
an interrupted run leaves behind. The source's params.json, tokenizer files and generation_config.json are copied, and
checksums.json gets the sha256 of every file, sizes.json the size and a sample of every file of weights.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from llama.checkpoint import names, native, partition, with_scales, writing
from llama.checkpoint.checksums import CHECKSUMS, SIZES, check_files, sample_of
from llama.checkpoint.gguf_file import GGUFSource
from llama.checkpoint.meta_pth import NOTES
from llama.checkpoint.quantize import in_format
from llama.checkpoint.recognise import open_checkpoint
from llama.checkpoint.source import Source, TensorInfo, dtype_name, is_finite
from llama.config import EngineConfig
from llama.errors import CheckpointError, ConfigError, setting
from llama.regular_files import read_bytes, reason_of
from llama.sharding import axis_of, head_of, whole_shape
from llama.storage import QUANTISED, Storage, choose_storage
from llama.tokenizer import gguf_kind

log = logging.getLogger("llama")

COMPANIONS = (
    *("*.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)
CONVERTED_DTYPES = {
    **{"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
    **{"int8": torch.int8, "int4": torch.uint8},
}
LLAMA_3_THETA = 500000.0
UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def reshard(
    src: str | Path, dst: str | Path, model_parallel: int, *, embedding_axis: int | None = None, progress: bool = False
) -> tuple[Path, ...]:
    """Write a checkpoint in Meta's format, split for a number of model-parallel ranks.

    Args:
        src: a checkpoint of any format.
        dst: a directory that does not exist yet.
        model_parallel: number of shards; 1 joins all.
        embedding_axis: 1 splits the embedding's vectors (LLaMA 1 and 2), 0 its vocabulary (Llama 3). Default: as the
            source is, or was, split; else as Meta's code for the model splits it.
        progress: a bar on stderr.

    Returns:
        The shards.

    Raises:
        CheckpointError: see open_checkpoint and check_files; sizes that cannot be divided; ``dst`` exists; too little
            disk space.
        ConfigError: model_parallel or embedding_axis is out of range.
    """
    if model_parallel < 1 or embedding_axis not in (None, 0, 1):
        raise ConfigError(
            f"got model_parallel {model_parallel} and embedding_axis {embedding_axis}, expected 1 or more, and 0 or 1"
        )
    source, target = open_checkpoint(Path(src)), Path(dst)
    check_files(source.directory, source.files)
    if source.is_quantised and source.format == native.FORMAT:
        raise CheckpointError(
            f"{source.directory} holds {min(_dtypes(source))} weights, for which Meta's format has no place; "
            "reshard the original"
        )
    known_axis = source.embedding_axis if embedding_axis is None else embedding_axis
    axis = _usual_axis(source) if known_axis is None else known_axis
    partition.check_divisible(source.args, model_parallel, axis)
    size = _widened_bytes(source)
    with writing.new_directory(target) as directory:
        _check_room(directory, size + -(-size // model_parallel))
        sums = _write_shards(source, directory, model_parallel, axis, progress)
        shards = tuple(target / name for name in sums)
        _write_sizes(directory, sums)
        notes = _notes(source, known_axis if model_parallel == 1 else None)
        if notes:
            sums[NOTES] = writing.write_bytes(directory / NOTES, writing.json_bytes(notes))
        is_meta = source.format == "meta"  # then the file is copied, so that a vocab_size of -1 stays
        params = (
            (source.directory / "params.json").read_bytes() if is_meta else writing.json_bytes(source.args.to_params())
        )
        _write_companions(source, directory, sums, params)
    noun = "shard" if model_parallel == 1 else "shards"
    log.info("Wrote %s: %d %s, %d bytes of weights", target, model_parallel, noun, size)
    return shards


def convert(
    src: str | Path,
    dst: str | Path,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    *,
    int4_group: int = EngineConfig.int4_group,
    progress: bool = False,
) -> tuple[Path, ...]:
    """Write a checkpoint in our own format: safetensors with Meta's names.

    Args:
        src: a checkpoint of any format.
        dst: a directory that does not exist yet.
        dtype: float32, bfloat16, float16, or int8 or int4 with their scales beside them, for what ``Storage`` says
            (quantize.py); None keeps every weight as it is, bit by bit.
        max_shard_size: most bytes of weights in a file, as a number or with a unit such as ``5GB``; None writes one
            file.
        int4_group: how many numbers of an int4 weight share a scale, as ``EngineConfig.int4_group``.
        progress: a bar on stderr.

    Returns:
        The files with weights.

    Raises:
        CheckpointError: see open_checkpoint and check_files; a number that the dtype cannot hold; ``dst`` exists; too
            little disk space.
        ConfigError: an unknown dtype, or an invalid size or group.
    """
    if dtype is not None and dtype not in CONVERTED_DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, expected one of {', '.join(CONVERTED_DTYPES)}")
    EngineConfig(dtype="int4", int4_group=int4_group)  # refuses other groups
    if dtype != "int4" and int4_group != EngineConfig.int4_group:
        raise ConfigError(
            f"int4_group: got {int4_group}, but {setting('dtype')} is {dtype or 'not given'}, not int4; leave one of "
            "them out"
        )
    most = None if max_shard_size is None else parse_size(max_shard_size)
    source, target = open_checkpoint(Path(src)), Path(dst)
    check_files(source.directory, source.files)
    storage = None if dtype is None else choose_storage(dtype, source.stored, group=int4_group)
    infos = source.infos() if storage is None else _converted_infos(source, storage)
    if storage is not None:
        source.log_losses(storage)
    sizes = {name: _bytes(info) for name, info in infos.items()}
    with writing.new_directory(target) as directory:
        _check_room(directory, sum(sizes.values()))
        groups = native.shards_of(sizes, most)
        sums = _write_native(source, storage, infos, groups, directory, progress)
        files = tuple(target / name for name in sums)
        index = native.index_of(dict(zip(sums, groups, strict=True)), sum(sizes.values()))
        _write_sizes(directory, sums)
        if len(groups) > 1:
            sums[native.INDEX] = writing.write_bytes(directory / native.INDEX, writing.json_bytes(index))
        _write_companions(source, directory, sums, writing.json_bytes(source.args.to_params()))
    noun = "file" if len(files) == 1 else "files"
    log.info("Wrote %s: %d %s, %d bytes of weights", target, len(files), noun, sum(sizes.values()))
    return files


def parse_size(text: int | str) -> int:
    """Bytes, from a number or a text such as ``5GB`` or ``500 MiB``.

    Raises:
        ConfigError: it is neither, or not positive.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    size = math.floor(float(found.group(1)) * UNITS.get(found.group(2).upper(), 0)) if found else 0
    if size < 1:
        raise ConfigError(
            f"max_shard_size: got {text!r}, expected a number of bytes, or one with a unit such as 5GB or 500MiB"
        )
    return size


def _write_shards(source: Source, directory: Path, parts: int, embedding_axis: int, progress: bool) -> dict[str, str]:
    """Cut every weight and write the shards; returns their sha256 by name."""
    heads = source.args.kv_heads
    with ExitStack() as stack, _bar(2 * _widened_bytes(source), "Resharding", progress) as bar:
        scratches = [stack.enter_context(writing.Scratch(directory / f"{rank:02}.scratch")) for rank in range(parts)]
        for name, stored, scale in with_scales(source.tensors()):
            tensor, _ = in_format(stored, scale, None)
            del stored, scale  # or they would stay in memory while the next one is read
            weight = names.weight_of(name)
            assert weight is not None
            axis = embedding_axis if name == names.EMBEDDING else axis_of(name)
            replicated = partition.replicates_heads(weight, source.args, parts)
            for rank, scratch in enumerate(scratches):
                place, count = (head_of(rank, heads, parts), heads) if replicated else (rank, parts)
                scratch.append(name, partition.cut(tensor, place, count, axis))
            bar.update(tensor.numel() * tensor.element_size())
            del tensor
        files = {f"consolidated.{rank:02}.pth": scratch for rank, scratch in enumerate(scratches)}
        return {name: scratch.pack(directory / name, bar.update) for name, scratch in files.items()}


def _write_native(
    source: Source,
    storage: Storage | None,
    infos: Mapping[str, TensorInfo],
    groups: list[list[str]],
    directory: Path,
    progress: bool,
) -> dict[str, str]:
    """Write the files of our format; returns their sha256 by name.

    Args:
        storage: of the weights to write; None leaves every weight as it is.
        infos: of the weights to write, by name.
        groups: the names in each file.
    """
    notes = {"version": native.version_of(infos), "source": source.format}
    notes |= {"dtype": native.dtype_label({info.dtype for info in infos.values()})}
    notes |= {name: str(value) for name, value in _notes(source, source.embedding_axis).items()}
    sums = {}
    with _bar(_total_bytes(source), "Converting", progress) as bar:
        for name, group in zip(native.file_names(len(groups)), groups, strict=True):
            table = writing.safetensors_table({weight: (infos[weight].shape, infos[weight].dtype) for weight in group})
            metadata = native.make_metadata(notes, table, source.args)
            tensors = (_converted(source, storage, weight, bar) for weight in table)
            sums[name] = writing.write_safetensors(directory / name, table, metadata, tensors)
    return sums


def _converted_infos(source: Source, storage: Storage) -> dict[str, TensorInfo]:
    """Return the weights to write, by name, with scales for those that are quantised."""
    infos, made = source.infos(), dict[str, TensorInfo]()
    for name, info in infos.items():
        if names.is_scale(name):
            continue
        wanted, scale = storage.format_of(name, source.args), names.scale_of(name)
        if names.numberless(name) in storage.kept:
            made |= {name: info, scale: infos[scale]}
        elif wanted is None:
            made[name] = info if info.dtype.is_floating_point else _wide_info(source, name)
        elif wanted.is_quantised:
            rows, width = whole_shape(name, source.args)
            is_int4, groups = wanted.dtype == "int4", (width // wanted.group,) if wanted.group else ()
            made[name] = TensorInfo((rows, width // 2 if is_int4 else width), CONVERTED_DTYPES[wanted.dtype], info.file)
            made[scale] = TensorInfo((rows, *groups), torch.float32, info.file)
        else:
            made[name] = _wide_info(source, name)._replace(dtype=CONVERTED_DTYPES[wanted.dtype])
    return made


def _wide_info(source: Source, name: str) -> TensorInfo:
    """A weight as it is when it has been widened."""
    return TensorInfo(whole_shape(name, source.args), torch.float32, source.infos()[name].file)


def _converted(source: Source, storage: Storage | None, name: str, bar: tqdm[None]) -> torch.Tensor:
    """Return a weight, or the scales of one, as it is to be written.

    A weight that becomes int8 or int4 is read twice, because the file stores the scales first.

    Raises:
        CheckpointError: it holds numbers that the new dtype cannot.
    """
    weight = names.weight_of_scales(name)
    scale = names.scale_of(weight) if names.scale_of(weight) in source.infos() else None
    if storage is None or names.numberless(weight) in storage.kept:
        made = source.read(name)
        bar.update(made.nbytes)
        return made
    tensor, scales = source.read(weight), None if scale is None else source.read(scale)
    made, made_scales = in_format(tensor, scales, storage.format_of(weight, source.args))
    if name != weight:
        assert made_scales is not None
        return made_scales
    bar.update(tensor.nbytes)
    if made.dtype.is_floating_point and made is not tensor and not is_finite(made) and is_finite(tensor):
        raise CheckpointError(
            f"{source.infos()[name].file}: tensor {source.label(name)} holds numbers that {made.dtype} cannot"
        )
    return made


def _dtypes(source: Source) -> set[str]:
    """The dtypes of a checkpoint's quantised weights."""
    return {QUANTISED[dtype] for info in source.infos().values() if (dtype := dtype_name(info.dtype)) in QUANTISED}


def _write_sizes(directory: Path, sums: dict[str, str]) -> None:
    """Write sizes.json, for the files of weights in ``sums``."""
    samples = {name: sample_of(directory / name) for name in sums}
    sums[SIZES] = writing.write_bytes(directory / SIZES, writing.json_bytes(samples))


def _write_companions(source: Source, directory: Path, sums: dict[str, str], params: bytes) -> None:
    """Copy the tokenizer and generation defaults, or write those of a GGUF file; write the checksums and params.json.

    params.json is written last, because nothing loads without it.
    """
    if source.format == GGUFSource.format:
        files = list(gguf_kind.companions(source.files[0]))
    else:
        files = [(path.name, _content(path)) for path in companions(source.directory)]
    for name, content in files:
        sums[name] = writing.write_bytes(directory / name, content)
    sums["params.json"] = hashlib.sha256(params).hexdigest()
    writing.write_bytes(directory / CHECKSUMS, writing.json_bytes(sums))
    writing.write_bytes(directory / "params.json", params)


def _content(path: Path) -> bytes:
    """Return what a companion holds.

    Raises:
        CheckpointError: it cannot be read, or is too large to be one.
    """
    try:
        return read_bytes(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error


def companions(directory: Path) -> list[Path]:
    """Return the files of a checkpoint to copy with its weights.

    LLaMA 1 and 2 keep the tokenizer in the parent directory.
    """
    found = [path for pattern in COMPANIONS for path in sorted(directory.glob(pattern)) if os.path.isfile(path)]
    if not any(path.name.startswith("tokenizer") or path.suffix == ".model" for path in found):
        above = sorted(directory.resolve().parent.glob("*.model"))
        found += above if len(above) == 1 else []
    return found


def _notes(source: Source, embedding_axis: int | None) -> dict[str, int]:
    """Return the settings that params.json has no key for, without those that are None."""
    notes = {"sliding_window": source.sliding_window, "embedding_axis": embedding_axis}
    return {name: value for name, value in notes.items() if value is not None}


def _usual_axis(source: Source) -> int:
    """Return the axis along which Meta's code splits this model's embedding.

    Llama 3 is recognised by its rotary base.
    """
    return 0 if source.args.rope_theta == LLAMA_3_THETA else 1


def _bytes(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel() * info.dtype.itemsize


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(f"{directory.parent} has {free} bytes free, {needed} are needed")


def _total_bytes(source: Source) -> int:
    return sum(_bytes(info) for info in source.infos().values())


def _widened_bytes(source: Source) -> int:
    """Bytes of all weights when the quantised ones have been widened."""
    infos = {name: info for name, info in source.infos().items() if not names.is_scale(name)}
    return sum(
        _bytes(info if info.dtype.is_floating_point else _wide_info(source, name)) for name, info in infos.items()
    )


def _bar(total: int, title: str, progress: bool) -> tqdm[None]:
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=not progress, leave=False)
