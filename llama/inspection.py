"""Inspect a checkpoint directory without loading it: the content of ``llama-xla inspect``.

Headers are read, and the samples that sizes.json has sums of; weights and whole files only on request. Every problem is
added to a list, and the rest is still reported.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import Source, is_finite, open_checkpoint
from llama.checkpoint.checksums import differences, differing_samples, recorded_sums
from llama.checkpoint.source import BLANK, is_blank
from llama.compiled.memory import check_fits, dtypes_for, gib, plan_memory
from llama.config import EngineConfig
from llama.errors import CheckpointError, TokenizerError, UserError, on_one_line
from llama.planning import parameter_count
from llama.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, mismatch
from llama.xla import backend

SPECIAL_SHOWN = 6


@dataclass
class Inspection:
    """The result of an inspection.

    Attributes:
        directory: that was inspected.
        facts: values of plain JSON types by label, in the order of the report.
        problems: an error for each reason why the checkpoint cannot be used, with its cure.
    """

    directory: Path
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[UserError] = field(default_factory=list)


def inspect_checkpoint(
    directory: Path,
    tokenizer_path: Path | None,
    config: EngineConfig,
    check_tensors: bool = False,
    check_sums: bool = False,
) -> Inspection:
    """Inspect a checkpoint and its tokenizer.

    Args:
        directory: of a checkpoint of any format.
        tokenizer_path: default: the one beside the weights.
        config: for the memory plan.
        check_tensors: read every weight and look for NaN and infinity; also compare the files with their sums, where
            there are any.
        check_sums: read every file and compare it with its sum; it is a problem if there are none.
    """
    found = Inspection(directory)
    source = tokenizer = None
    try:
        source = open_checkpoint(directory)
        found.facts |= weight_facts(source)
    except UserError as error:
        found.problems.append(error)
    try:
        tokenizer = load_tokenizer(tokenizer_path or find_tokenizer(directory))
        found.facts |= tokenizer_facts(tokenizer)
    except UserError as error:
        found.problems.append(error)
    if source is not None:
        _look_together(found, source, tokenizer, config)
        if check_tensors:
            found.problems += bad_tensors(source)
            found.facts["tensors_checked"] = len(source.infos())
    if os.path.exists(directory):
        try:
            _check_sums(found, source, check_sums, check_tensors)
        except UserError as error:
            found.problems.append(error)
    return found


def _check_sums(found: Inspection, source: Source | None, needed: bool, wanted: bool) -> None:
    """Compare the files with their sums, whether or not the weights could be opened.

    Args:
        found: gets the problems.
        source: the weights, whose sizes and samples are compared in any case.
        needed: compare whole files; it is an error if there are no sums.
        wanted: compare whole files if there are sums.
    """
    lists = recorded_sums(found.directory) if needed or wanted else {}
    if needed or lists:
        found.problems += map(CheckpointError, differences(found.directory))
        found.facts["files_checked"] = len({name for sums in lists.values() for name in sums})
    elif source is not None:
        found.problems += map(CheckpointError, differing_samples(source.files))


def _look_together(found: Inspection, source: Source, tokenizer: Tokenizer | None, config: EngineConfig) -> None:
    """Add the memory plan, and problems that weights, tokenizer and config only show together."""
    dtypes = dtypes_for(config, on_cpu=True, stored=source.stored)
    planned = (source.args, config, *dtypes, backend.host_memory())  # this machine's CPU device; none is started
    plan = plan_memory(*planned)
    found.facts["memory_plan"] = {
        "max_seq_len": config.max_seq_len,
        "max_batch_size": config.max_batch_size,
        "cache_dtype": plan.cache_dtype,
        **{name: getattr(plan, name) for name in ("weights", "cache", "activations", "total", "available")},
    }
    try:
        check_fits(*planned)
    except UserError as error:
        found.problems.append(error)
    if tokenizer is not None and tokenizer.n_words > source.args.vocab_size:
        found.problems.append(
            TokenizerError(
                f"the tokenizer has {tokenizer.n_words} ids but the embedding only {source.args.vocab_size} rows"
            )
        )
    if tokenizer is not None and (doubt := mismatch(tokenizer, source.args.vocab_size)) is not None:
        found.problems.append(TokenizerError(doubt))
    try:
        source.args.check_positions(config.max_seq_len, source.directory)
    except UserError as error:
        found.problems.append(error)


def weight_facts(source: Source) -> dict[str, Any]:
    """Return the facts in headers and settings about the weights."""
    args, infos = source.args, source.infos()
    counts: Counter[str] = Counter()
    for info in infos.values():
        dtype = "int4" if info.dtype == torch.uint8 else str(info.dtype).removeprefix("torch.")
        counts[dtype] += torch.Size(info.shape).numel() * info.dtype.itemsize
    rope: dict[str, Any] = {"theta": args.rope_theta}
    if args.rope_scaling is not None:
        rope |= {"scaling": args.rope_scaling.kind, "factor": args.rope_scaling.factor}
    shape = {
        name: getattr(args, name)
        for name in ("dim", "n_layers", "n_heads", "kv_heads", "head_dim", "hidden_dim", "vocab_size")
    }
    differing = ("qkv_bias", "qk_norm", "rotary_dim", "first_sliding_layer")  # from LLaMA, where they do
    shape |= {name: getattr(args, name) for name in differing if getattr(args, name)}
    return {
        "format": source.format,
        "files": [path.name for path in source.files],
        "shape": shape | {"norm_eps": args.norm_eps, "tie_word_embeddings": args.tie_word_embeddings},
        "parameters": parameter_count(args),
        "bytes_by_dtype": dict(counts),
        **({"quantised": dict(Counter(source.rounded().values()))} if source.rounded() else {}),
        "rope": rope,
        "sliding_window": source.sliding_window,
    }


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the facts about a tokenizer."""
    return {
        "tokenizer": {
            "kind": tokenizer.kind,
            "ids": tokenizer.n_words,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "stop_ids": list(tokenizer.stop_ids),
        "special_tokens": tokenizer.special_ids,
    }


def bad_tensors(source: Source) -> Iterator[UserError]:
    """Read every weight; yield an error for each that cannot be read, is not finite, or is zero throughout."""
    for name, info in source.infos().items():
        try:
            tensor = source.read(name)
            finite, blank = is_finite(tensor), is_blank(name, tensor)
        except UserError as error:
            yield error
            continue
        if not finite:
            yield CheckpointError(f"{info.file.name}: tensor {source.label(name)} holds NaN or infinity")
        elif blank:
            yield CheckpointError(f"{info.file.name}: tensor {source.label(name)} {BLANK}")


def report(found: Inspection, spell: Callable[[UserError], str] = str) -> Iterator[str]:
    """Yield the lines that people read; ``spell`` writes a problem's message."""
    yield f"{found.directory}"
    for label, value in found.facts.items():
        yield f"  {label.replace('_', ' ') + ':':<16} {on_one_line(_shown(label, value))}"
    yield "  no problems found" if not found.problems else "  problems:"
    for problem in found.problems:
        yield f"    - {spell(problem)}"


def _shown(label: str, value: Any) -> str:
    if label == "parameters":
        return f"{value:,}"
    if label == "bytes_by_dtype":
        return ", ".join(f"{dtype} {gib(count)}" for dtype, count in value.items())
    if label == "quantised":
        return ", ".join(f"{count} weights in {kind}" for kind, count in value.items())
    if label == "memory_plan":
        notes = {"cache": f" ({value['cache_dtype']})"}
        sizes = ", ".join(
            f"{name} {gib(value[name])}{notes.get(name, '')}"
            for name in ("weights", "cache", "activations", "total", "available")
        )
        return f"for {value['max_batch_size']} x {value['max_seq_len']} positions: {sizes}"
    if label == "special_tokens":
        names = [f"{text} {token}" for text, token in list(value.items())[:SPECIAL_SHOWN]]
        return ", ".join(names) + (f", ... ({len(value)} in all)" if len(value) > SPECIAL_SHOWN else "")
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
