"""The commands `llama-xla inspect`, `convert` and `reshard`: examine a checkpoint, or write it in another layout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llama.cli.flags import shown
from llama.cli.loading import config_of, takes_loading
from llama.cli.output import json_line, log_to_stderr, write
from llama.config import EngineConfig
from llama.errors import ProblemsFoundError, UserError


@takes_loading(
    only=("tokenizer_path", "max_seq_len", "max_batch_size", "dtype", "int4_group", "cache_dtype"),
    max_seq_len=(EngineConfig.max_seq_len, "Positions in the memory plan."),
    max_batch_size=(1, "Prompts in the memory plan."),
)
def inspect(
    directory: str,
    *,
    loading: dict[str, Any],
    check_tensors: bool = False,
    check_sums: bool = False,
    json: bool = False,
) -> None:
    """Show the contents of a checkpoint directory, its memory needs, and its problems.

    llama-xla inspect path/to/checkpoint --max_seq_len 4096

    Flags:
        directory: The checkpoint; the name of the flag may be left out.
        {tokenizer_path}
        {max_seq_len}
        {max_batch_size}
        {dtype}
        {int4_group}
        {cache_dtype}
        check_tensors: Read all weights, look for NaN and infinity, and compare the files with their sums if there are
            any.
        check_sums: Read all files and compare them with their sums: the checksums.json that convert and reshard wrote,
            checklist.chk, *.sha256 or SHA256SUMS.
        json: Print one JSON object.
    """
    from llama.inspection import inspect_checkpoint, report

    log_to_stderr(quiet=False)
    tokenizer = Path(loading["tokenizer_path"]) if loading["tokenizer_path"] else None
    found = inspect_checkpoint(Path(directory), tokenizer, config_of(loading), check_tensors, check_sums)

    def spell(problem: UserError) -> str:
        return shown(problem, inspect)

    if json:
        write(json_line({"directory": directory, **found.facts, "problems": list(map(spell, found.problems))}))
    else:
        write("\n".join(report(found, spell)) + "\n")
    if found.problems:
        raise ProblemsFoundError(f"{directory}: {len(found.problems)} problem{'s' * (len(found.problems) > 1)} found")


@takes_loading(only=("int4_group",))
def convert(
    src: str,
    dst: str,
    *,
    loading: dict[str, Any],
    dtype: str | None = None,
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
        {int4_group}
        max_shard_size: Most bytes in a file, with a unit such as 5GB. Default: one file.
        quiet: Log nothing to stderr.
    """
    from llama.checkpoint import reshard as rewriting

    log_to_stderr(quiet)
    rewriting.convert(src, dst, dtype, max_shard_size, **loading, progress=not quiet and sys.stderr.isatty())


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
