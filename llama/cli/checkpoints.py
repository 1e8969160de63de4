"""The commands `llama-xla inspect`, `convert` and `reshard`: examine a checkpoint, or write it in another layout."""

from __future__ import annotations

import sys
from pathlib import Path

from llama.cli.flags import one_of, shown
from llama.cli.output import json_line, log_to_stderr, write
from llama.config import CACHE_DTYPES, DTYPES, EngineConfig
from llama.errors import ProblemsFoundError, UserError


def inspect(
    directory: str,
    *,
    tokenizer_path: str | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 1,
    dtype: str = "auto",
    int4_group: int = EngineConfig.int4_group,
    cache_dtype: str = "auto",
    check_tensors: bool = False,
    check_sums: bool = False,
    json: bool = False,
) -> None:
    """Show the contents of a checkpoint directory, its memory needs, and its problems.

    llama-xla inspect path/to/checkpoint --max_seq_len 4096

    Flags:
        directory: The checkpoint; the name of the flag may be left out.
        tokenizer_path: Its tokenizer. Default: the one beside the weights.
        max_seq_len: Positions in the memory plan.
        max_batch_size: Prompts in the memory plan.
        dtype: How weights would be stored: float32, bfloat16, int8, int4, or auto.
        int4_group: How many numbers of an int4 weight would share a scale: 64 or 128.
        cache_dtype: How keys and values would be stored: float32, bfloat16, or auto.
        check_tensors: Read all weights, look for NaN and infinity, and compare the files with their sums if there are
            any.
        check_sums: Read all files and compare them with their sums: the checksums.json that convert and reshard wrote,
            checklist.chk, *.sha256 or SHA256SUMS.
        json: Print one JSON object.
    """
    from llama.inspection import inspect_checkpoint, report

    log_to_stderr(quiet=False)
    config = EngineConfig(
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        dtype=one_of("dtype", dtype, DTYPES),
        int4_group=int4_group,
        cache_dtype=one_of("cache_dtype", cache_dtype, CACHE_DTYPES),
    )
    tokenizer = Path(tokenizer_path) if tokenizer_path else None
    found = inspect_checkpoint(Path(directory), tokenizer, config, check_tensors, check_sums)

    def spell(problem: UserError) -> str:
        return shown(problem, inspect)

    if json:
        write(json_line({"directory": directory, **found.facts, "problems": list(map(spell, found.problems))}))
    else:
        write("\n".join(report(found, spell)) + "\n")
    if found.problems:
        raise ProblemsFoundError(f"{directory}: {len(found.problems)} problem{'s' * (len(found.problems) > 1)} found")


def convert(
    src: str,
    dst: str,
    *,
    dtype: str | None = None,
    int4_group: int = EngineConfig.int4_group,
    max_shard_size: str | None = None,
    quiet: bool = False,
) -> None:
    """Write a checkpoint of any format as safetensors with Meta's names, which load fastest and safest.

    llama-xla convert path/to/checkpoint path/to/new --dtype bfloat16 --max_shard_size 5GB

    Flags:
        src: The checkpoint; the name of the flag may be left out.
        dst: A directory that does not exist yet; the name of the flag may be left out.
        dtype: float32, bfloat16, float16, int8 (linear layers, with a scale per output channel), or int4 (layers, with
            a scale per group; embedding and head int8). Default: keep every weight's dtype.
        int4_group: How many numbers of an int4 weight share a scale: 64 or 128.
        max_shard_size: Most bytes in a file, with a unit such as 5GB. Default: one file.
        quiet: Log nothing to stderr.
    """
    from llama.checkpoint import reshard as rewriting

    log_to_stderr(quiet)
    rewriting.convert(
        src, dst, dtype, max_shard_size, int4_group=int4_group, progress=not quiet and sys.stderr.isatty()
    )


def reshard(src: str, dst: str, *, model_parallel: int, quiet: bool = False) -> None:
    """Write a checkpoint of any format in Meta's, split for a number of model-parallel ranks.

    llama-xla reshard llama-2-13b llama-2-13b-one --model_parallel 1

    Flags:
        src: The checkpoint; the name of the flag may be left out.
        dst: A directory that does not exist yet; the name of the flag may be left out.
        model_parallel: Number of files; 1 joins all.
        quiet: Log nothing to stderr.
    """
    from llama.checkpoint import reshard as rewriting

    log_to_stderr(quiet)
    rewriting.reshard(src, dst, model_parallel, progress=not quiet and sys.stderr.isatty())
