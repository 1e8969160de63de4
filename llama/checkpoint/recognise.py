"""Recognise the format of a checkpoint directory, by the content of its files and not their names."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable
from pathlib import Path

from llama.checkpoint.files import SafetensorsFile
from llama.checkpoint.gguf_file import GGUFSource
from llama.checkpoint.hf_safetensors import HFSource
from llama.checkpoint.meta_pth import SHARD, MetaSource
from llama.checkpoint.native import NativeSource, is_native
from llama.checkpoint.source import Source
from llama.errors import CheckpointError
from llama.gguf_header import SUFFIX, gguf_in
from llama.regular_files import kind_of, reason_of

SOURCES: dict[str, type[MetaSource | HFSource | NativeSource | GGUFSource]] = {
    each.format: each for each in (MetaSource, HFSource, NativeSource, GGUFSource)
}
EXPECTED = (
    "params.json with consolidated.00.pth (Meta), config.json with model.safetensors (Hugging Face), "
    "params.json with model.safetensors (llama-xla convert), or one .gguf file"
)
LISTED_AT_MOST = 12
_CONVERT = "convert it to safetensors with the program that wrote it"
_HUB = "download the repository's config.json and *.safetensors instead"
STRANGERS = (  # weights that are not read, by patterns of their files' names in lower case: what they are, and the cure
    (
        "adapter_model.*",
        "an adapter (LoRA) without its base model: merge them with peft (merge_and_unload, save_pretrained)",
    ),
    (
        "consolidated*.safetensors",
        "in Mistral's own format, which is not read: download config.json and model*.safetensors of the same "
        "repository",
    ),
    ("*.incomplete", "a download that did not finish: run it again"),
    ("*.part", "a download that did not finish: run it again"),
    ("*.crdownload", "a download that did not finish: run it again"),
    ("*.aria2", "the record of a download that did not finish: run it again"),
    ("*.tmp", "an unfinished file: download or write it again"),
    ("mp_rank_*_model_states.pt", "a part of DeepSpeed's: join the parts with its zero_to_fp32.py"),
    ("zero_pp_rank_*.pt", "a part of DeepSpeed's: join the parts with its zero_to_fp32.py"),
    ("global_step*", "DeepSpeed's directory: join its parts with zero_to_fp32.py"),
    (
        "*.distcp",
        "a part of torch.distributed.checkpoint's (FSDP): join the parts with python -m "
        "torch.distributed.checkpoint.format_utils dcp_to_torch, and save the model with transformers",
    ),
    ("pytorch_model_fsdp*", f"FSDP's: {_CONVERT}"),
    ("*.onnx", f"in ONNX's format, which is not read: {_HUB}"),
    ("tf_model*.h5", f"TensorFlow's, which is not read: {_HUB}"),
    ("*.msgpack", f"Flax's, which is not read: {_HUB}"),
    ("*.ckpt*", f"a training checkpoint, which is not read: {_CONVERT}"),
    ("*.npz", f"MLX's or numpy's, which is not read: {_HUB}"),
    ("ggml*.bin", "llama.cpp's format before GGUF: convert the original anew"),
    ("*.nemo", f"NeMo's, which is not read: {_CONVERT}"),
    ("model_index.json", "of a diffusion pipeline, which is no language model"),
    ("optimizer.*", "the state of an optimiser; the model's weights are not there"),
    ("checkpoint-*", "a step of a training: give its directory"),
    ("*.safetensors.gz", "compressed: unpack it"),
    ("*.zip", "an archive: unpack it"),
    ("*.tar*", "an archive: unpack it"),
    ("*.pt", f"a file of unknown content: {_CONVERT}"),
    ("*.safetensors", "safetensors by another name, expected model.safetensors or model-0000N-of-0000M.safetensors"),
    ("*.bin", "a pickle by another name, expected pytorch_model.bin"),
)


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
    every = names_in(directory)
    listed = ", ".join(every[:LISTED_AT_MOST]) + (", ..." if len(every) > LISTED_AT_MOST else "")
    if "params.json" in every:
        listed += "; no .pth file and no model.safetensors beside params.json"
    foreign = stranger(every)
    raise CheckpointError(
        f"{directory} holds no checkpoint (found: {listed or 'nothing'}); "
        + (f"{foreign[0]} is {foreign[1]}" if foreign else f"expected {EXPECTED}")
    )


def recognise(directory: Path) -> dict[str, list[str]]:
    """Return the formats whose weights a directory holds, with the files' names.

    Raises:
        CheckpointError: it is not a directory, or the header of a safetensors file is damaged.
    """
    if os.path.isfile(directory) and gguf_in(directory) is not None:
        return {GGUFSource.format: [directory.name]}
    names = names_in(directory)
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


def names_in(directory: Path) -> list[str]:
    """Return the names of a directory's files, sorted.

    Raises:
        CheckpointError: it is no directory, or cannot be read.
    """
    try:
        return sorted(path.name for path in directory.iterdir())
    except NotADirectoryError as error:
        kind = "a file" if os.path.isfile(directory) else kind_of(directory.stat().st_mode)
        raise CheckpointError(f"{directory} is {kind}, not a directory (expected one with {EXPECTED})") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"no such directory: {directory} (expected one with {EXPECTED})") from error
    except (OSError, ValueError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{directory} cannot be read: {reason} (expected a directory with {EXPECTED})") from error


def stranger(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first file of weights that this package does not read, with what it is and the cure; or None."""
    return next(
        ((name, said) for pattern, said in STRANGERS for name in names if fnmatch.fnmatch(name.lower(), pattern)), None
    )


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
