"""Recognise the format of a checkpoint directory, by the content of its files and not their names."""

from __future__ import annotations

from pathlib import Path

from llama.checkpoint.files import SafetensorsFile
from llama.checkpoint.gguf_file import GGUFSource
from llama.checkpoint.hf_safetensors import HFSource
from llama.checkpoint.meta_pth import SHARD, MetaSource
from llama.checkpoint.native import NativeSource, is_native
from llama.checkpoint.source import Source
from llama.errors import CheckpointError
from llama.gguf_header import SUFFIX, gguf_in

SOURCES: dict[str, type[MetaSource | HFSource | NativeSource | GGUFSource]] = {
    each.format: each for each in (MetaSource, HFSource, NativeSource, GGUFSource)
}
EXPECTED = (
    "params.json with consolidated.00.pth (Meta), config.json with model.safetensors (Hugging Face), "
    "params.json with model.safetensors (llama-xla convert), or one .gguf file"
)
LISTED_AT_MOST = 12


def open_checkpoint(directory: Path) -> Source:
    """Open a checkpoint in whatever format it is; only headers are read.

    Raises:
        CheckpointError: no checkpoint, several formats at once, or a damaged one; see the formats' classes.
    """
    found = recognise(directory)
    if len(found.get(GGUFSource.format, ())) > 1:
        listed = ", ".join(found[GGUFSource.format][:LISTED_AT_MOST])
        raise CheckpointError(f"{directory} holds several .gguf files ({listed}), expected one: give the path of one")
    if len(found) == 1:
        return SOURCES[next(iter(found))](directory)
    if found:
        listed = "; ".join(f"{name}: {', '.join(files[:LISTED_AT_MOST])}" for name, files in found.items())
        raise CheckpointError(f"{directory} holds several formats ({listed}), expected one: move the others out of it")
    every = sorted(path.name for path in directory.iterdir())
    listed = ", ".join(every[:LISTED_AT_MOST]) + (", ..." if len(every) > LISTED_AT_MOST else "")
    if "params.json" in every:
        listed += "; no .pth file and no model.safetensors beside params.json"
    raise CheckpointError(f"{directory} holds no checkpoint (found: {listed or 'nothing'}); expected {EXPECTED}")


def recognise(directory: Path) -> dict[str, list[str]]:
    """Return the formats whose weights a directory holds, with the files' names.

    Raises:
        CheckpointError: it is not a directory, or the header of a safetensors file is damaged.
    """
    if directory.is_file() and gguf_in(directory) is not None:
        return {GGUFSource.format: [directory.name]}
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file, not a directory (expected one with {EXPECTED})")
    if not directory.is_dir():
        raise CheckpointError(f"no such directory: {directory} (expected one with {EXPECTED})")
    names = sorted(path.name for path in directory.iterdir())
    found: dict[str, list[str]] = {}
    for name in names:
        kind = _format_of(directory / name, "params.json" in names)
        if kind is not None:
            found.setdefault(kind, []).append(name)
    if not found and "config.json" in names and any(name.endswith(".index.json") for name in names):
        # opening it reports which files are missing
        found[HFSource.format] = [name for name in names if name.endswith(".index.json")]
    if len(found) > 1:  # a .gguf file that was made from the weights beside it
        found.pop(GGUFSource.format, None)
    return found


def _format_of(path: Path, beside_params: bool) -> str | None:
    """Return the format that a file of weights belongs to, or None for any other file.

    Beside a params.json, a .pth file of any name counts; elsewhere not, because transformers' trainer leaves .pth files
    beside its weights.
    """
    if SHARD.fullmatch(path.name) or (beside_params and path.suffix == ".pth"):
        return MetaSource.format
    if path.name.startswith("model") and path.suffix == ".safetensors":
        return NativeSource.format if is_native(SafetensorsFile(path)) else HFSource.format
    if path.name.startswith("pytorch_model") and path.suffix == ".bin":
        return HFSource.format
    if path.suffix.lower() == SUFFIX:
        return GGUFSource.format
    return None
