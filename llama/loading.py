"""A model's weights onto the device, after they have been found to go with the tokenizer and the configuration."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from tqdm import tqdm

from llama import checkpoint, sharding
from llama.compiled.memory import check_fits, dtypes_for
from llama.compiled.model import Transformer
from llama.config import EngineConfig, ModelArgs
from llama.errors import ConfigError, TokenizerError, setting
from llama.tokenizer import Tokenizer, mismatch
from llama.xla import backend, mesh

log = logging.getLogger("llama")


def load_model(
    source: checkpoint.Source | None,
    args: ModelArgs,
    config: EngineConfig,
    device: torch.device,
    *,
    seed: int = 1,
    allow_nan: bool = False,
    progress: bool = False,
) -> Transformer:
    """Load a checkpoint's weights onto the device, or make random ones there.

    Args:
        source: an opened checkpoint; None for random weights.
        args: the shape, ``vocab_size`` settled.
        config: says the storage dtype, and how many positions there are.
        seed: of the random weights.
        allow_nan: go on where a weight holds NaN or infinity.
        progress: a bar on stderr.

    Raises:
        CheckpointError: a tensor is damaged.
        ConfigError: the model does not fit; nothing has been read then.
    """
    stored = None if source is None else source.stored
    storage, activation_dtype = dtypes_for(config, on_cpu=backend.device_kind() == "CPU", stored=stored)
    memory = check_fits(args, config, storage, activation_dtype, backend.free_memory(device))
    if source is not None:
        source.log_losses(storage, config.tensor_parallel)
    log.debug("Memory%s: %s", "" if mesh.current().is_single else " on each device", memory)
    with torch.device("meta"):
        model = Transformer(args, config.positions, activation_dtype, config.tensor_parallel)
    named = checkpoint.random_tensors(args, seed) if source is None else checkpoint.checked(source, allow_nan)
    with tqdm(
        total=memory.weights, desc="Loading", unit="B", unit_scale=True, disable=not progress, leave=False
    ) as bar:
        for loaded in checkpoint.place(model, named, storage, device):
            bar.update(loaded)
    return model


def mesh_for(config: EngineConfig, args: ModelArgs) -> EngineConfig:
    """The configuration with its number of devices settled, after the model has been found to divide by them.

    Raises:
        ConfigError: it does not, or there are more or fewer devices; the message names what works.
    """
    data, tensor = config.data_parallel, config.tensor_parallel
    if data == tensor == 1:
        return config
    count = mesh.device_count()
    tensor = tensor or max(count // data, 1)
    hint = "; CPU_NUM_DEVICES in the environment says how many a CPU is" if backend.device_kind() == "CPU" else ""
    sharding.check(args, sharding.Mesh(data, tensor), count, hint)
    hosts = mesh.host_count()
    if hosts > 1 and data > 1:
        raise ConfigError(
            f"data_parallel: got {data} on {hosts} hosts; groups of slots live on one host. Leave it out, or give each "
            "host its own devices and divide the prompts: llama-xla batch does"
        )
    if hosts > 1 and config.collect_s:
        raise ConfigError(
            f"collect_s: got {config.collect_s} on {hosts} hosts, whose clocks differ; leave it out: all must take the "
            "same steps"
        )
    return replace(config, tensor_parallel=tensor)


def matched(
    args: ModelArgs | None, source: checkpoint.Source | None, tokenizer: Tokenizer, config: EngineConfig
) -> ModelArgs:
    """The model's shape, after weights, tokenizer and configuration have been found to go together.

    Args:
        args: of random weights; None with a source.
        source: the checkpoint.

    Raises:
        ConfigError: the model is computed for fewer positions than the cache has.
        TokenizerError: the tokenizer has more ids than the embedding has rows.
    """
    if source is not None:
        args = source.args
    assert args is not None
    args.check_positions(config.max_seq_len, "the model" if source is None else source.directory)
    if args.vocab_size == -1:
        args = args.with_vocab_size(tokenizer.n_words)
    if tokenizer.n_words > args.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.n_words} ids but the model's embedding only {args.vocab_size} rows: "
            f"it belongs to another model; give the right one with {setting('tokenizer_path')}"
        )
    if source is not None and (doubt := mismatch(tokenizer, args.vocab_size)) is not None:
        log.warning("%s", TokenizerError(doubt))
    return args
