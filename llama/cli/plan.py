"""The command `llama-xla plan`, without a device: how a prompt is cut into chunks, or a model over devices."""

from __future__ import annotations

import json as json_lib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama.cli import device_plan
from llama.cli.flags import one_of
from llama.cli.loading import config_of, takes_loading
from llama.cli.output import counted, write
from llama.config import DEMO_DIR, EngineConfig, ModelArgs
from llama.engine import chunks as bucket_plan
from llama.errors import ConfigError, FlagError, TokenizerError, setting
from llama.planning import ACCELERATORS, GIB, Accelerator, DevicePlan, choose_dtypes
from llama.sharding import Mesh, check
from llama.storage import WeightFormat

OF_DEVICES = ("dtype", "int4_group", "cache_dtype")  # flags of loading that say nothing about chunks


@takes_loading(
    only=("max_seq_len", "buckets", "bucket_policy", *OF_DEVICES),
    max_seq_len=(EngineConfig.max_seq_len, "Positions of the cache."),
    dtype=(
        EngineConfig.dtype,
        "Weights: float32, bfloat16, int8, int4; auto: quantised ones as they are, others bfloat16, or float32 for "
        "cpu.",
    ),
    cache_dtype=(
        EngineConfig.cache_dtype,
        "Keys and values: float32, bfloat16; auto: float32 up to 2048 positions for cpu, else bfloat16.",
    ),
)
def plan(
    *,
    loading: dict[str, Any],
    prompt_len: int | None = None,
    tensor_parallel: int | None = None,
    data_parallel: int | None = None,
    ckpt_dir: str | None = None,
    vocab_size: int | None = None,
    accelerator: str | None = None,
    bandwidth: float | None = None,
    memory: float | None = None,
    link: float | None = None,
    plot: str | None = None,
    max_batch_size: int | None = None,
    json: bool = False,
) -> None:
    """Show how a prompt is cut into chunks, or a model over devices. No device is touched.

    llama-xla plan --prompt_len 1501 --max_seq_len 2048
    llama-xla plan --tensor_parallel 8 --ckpt_dir path/to/checkpoint --accelerator v5e

    Chunks of a prompt:
        prompt_len: Tokens of the prompt, including BOS.
        {bucket_policy}

    A model over devices:
        tensor_parallel: Devices that hold one copy of the model together. Default: 1.
        data_parallel: Copies of the model, each with its part of the slots. Default: 1.
        ckpt_dir: Directory with params.json or config.json, weights need not be there; or a GGUF file. Default: the
            demo model.
        vocab_size: Of a params.json that says -1 and has no tokenizer beside it.
        {dtype}
        {int4_group}
        {cache_dtype}
        max_batch_size: Slots on all devices together. Default: one on each copy of the model.
        accelerator: v4, v5e, v5p or v6e, whose public figures are used; or cpu, which has none.
        bandwidth: Of a device's memory in GB/s, instead of the accelerator's.
        memory: Of a device in GiB, instead of the accelerator's.
        link: What a device sends to others in GB/s, in one direction, instead of the accelerator's.
        plot: Draw what the devices hold into this file, such as devices.png.

    Both:
        {max_seq_len}
        {buckets}
        json: Print JSON: one object per chunk and line, or one for all devices.
    """
    config = config_of(loading)
    values = {
        "tensor_parallel": tensor_parallel,
        "data_parallel": data_parallel,
        "ckpt_dir": ckpt_dir,
        "vocab_size": vocab_size,
        "max_batch_size": max_batch_size,
        "accelerator": accelerator,
        "bandwidth": bandwidth,
        "memory": memory,
        "link": link,
        "plot": plot,
    }
    changed = [name for name in OF_DEVICES if loading[name] != getattr(EngineConfig, name)]
    _check_one_kind(prompt_len, [*(name for name, value in values.items() if value is not None), *changed])
    if prompt_len is None:
        _show_devices(values, config, json)
    else:
        _show_chunks(prompt_len, config, json)


def _check_one_kind(prompt_len: int | None, of_devices: list[str]) -> None:
    """Refuse flags of both kinds of plan, and of neither."""
    if prompt_len is None and not of_devices:
        raise FlagError(
            "--prompt_len, for the chunks of a prompt, or --tensor_parallel, for a model over devices, is needed; "
            "llama-xla plan --help lists the flags"
        )
    if prompt_len is not None and of_devices:
        raise FlagError(
            f"--prompt_len shows the chunks of a prompt, --{of_devices[0]} is for a model over devices; "
            "leave one of them out"
        )


def _show_chunks(prompt_len: int, config: EngineConfig, json: bool) -> None:
    chunks = bucket_plan.plan(prompt_len, config)
    for chunk in chunks:
        if json:
            write(json_lib.dumps(chunk._asdict()) + "\n")
        else:
            padding = f", {chunk.length - chunk.valid} of it padding" if chunk.valid < chunk.length else ""
            write(
                f"prompt pos [{chunk.start}, {chunk.end}), section length {chunk.length}{padding}, "
                f"reads keys [0, {chunk.key_len})\n"
            )
    if not json:
        # tokens of the tail run in decode steps, which choose the first new token, too; after a longer chunk a program
        # of its own does; and one program puts the request into its slot
        programs = len({(c.length, c.key_len) for c in chunks}) + (chunks[-1].length > 1) + 1
        sections = f"{counted(len(chunks), 'section')}, {counted(programs, 'program')}"
        write(f"{sections}, {prompt_len} of {config.max_seq_len} positions\n")


def _show_devices(values: dict[str, Any], config: EngineConfig, json: bool) -> None:
    data, tensor, slots = (values[name] for name in ("data_parallel", "tensor_parallel", "max_batch_size"))
    mesh = Mesh(1 if data is None else data, 1 if tensor is None else tensor)
    slots = mesh.data if slots is None else slots
    config = replace(config, max_batch_size=slots, widths=(), data_parallel=mesh.data, tensor_parallel=mesh.tensor)
    figures = _figures(values, mesh)
    directory = DEMO_DIR if values["ckpt_dir"] is None else Path(values["ckpt_dir"])
    args, stored, notes = _shape(directory, values["vocab_size"], config)
    check(args, mesh)
    dtypes = choose_dtypes(config, on_cpu=values["accelerator"] == "cpu", stored=stored)
    found = DevicePlan(args, mesh, config, *dtypes, figures)
    if json:
        write(json_lib.dumps(device_plan.as_json(found, notes)) + "\n")
    else:
        write("\n".join(device_plan.lines(found, notes)) + "\n")
    if values["plot"] is not None:
        device_plan.draw(found, directory.resolve().name, Path(values["plot"]))


def _figures(values: dict[str, Any], mesh: Mesh) -> Accelerator:
    """The figures of the accelerator that is named, with the user's own in place of its."""
    name = values["accelerator"]
    figures = Accelerator() if name is None else ACCELERATORS[one_of("accelerator", name, list(ACCELERATORS))]
    for flag, unit in (("memory", GIB), ("bandwidth", 1e9), ("link", 1e9)):
        value = values[flag]
        if value is None:
            continue
        if not 0 < value * unit < float("inf"):
            raise ConfigError(f"{flag}: got {value}, expected a positive finite number")
        figures = figures._replace(**{flag: value * unit, "is_public": False})
    if figures.bandwidth is None and values["link"] is not None:
        raise ConfigError(f"link: got {values['link']}, but no time is predicted without {setting('bandwidth')}, too")
    if figures.bandwidth is not None and figures.link is None and mesh.tensor > 1:
        raise ConfigError(
            f"bandwidth: got {values['bandwidth']}, but the time of {mesh.tensor} devices is not predicted without "
            f"{setting('link')}, too"
        )
    return figures


def _shape(
    directory: Path, vocab_size: int | None, config: EngineConfig
) -> tuple[ModelArgs, Mapping[str, WeightFormat], list[str]]:
    """The model's shape with its vocabulary settled, its quantised weights, and what was assumed.

    Raises:
        CheckpointError: no settings, or damaged ones.
        ConfigError: a vocabulary that contradicts the settings, or is not known; or more positions than the model
            attends to.
    """
    from llama.gguf_header import gguf_in
    from llama.gguf_settings import read_planned_gguf
    from llama.settings import read_planned

    gguf = gguf_in(directory)
    settings, stored = read_planned(directory) if gguf is None else read_planned_gguf(gguf)
    args = settings.args
    args.check_positions(config.max_seq_len, settings.file)
    if vocab_size is not None and args.vocab_size not in (-1, vocab_size):
        raise ConfigError(f"vocab_size: got {vocab_size}, but {directory} has {args.vocab_size}; leave it out")
    if vocab_size is not None:
        return args.with_vocab_size(vocab_size), stored, []
    if args.vocab_size != -1:
        return args, stored, []
    rows = _tokenizer_size(directory, settings.file)
    return args.with_vocab_size(rows), stored, [f"the embedding has as many rows as the tokenizer has ids, {rows}"]


def _tokenizer_size(directory: Path, settings_file: Path) -> int:
    from llama.tokenizer import find_tokenizer, load_tokenizer

    try:
        return load_tokenizer(find_tokenizer(directory)).n_words
    except TokenizerError as error:
        raise ConfigError(
            f"{settings_file} has vocab_size -1, and no tokenizer tells it: {error}; give {setting('vocab_size')}"
        ) from error
