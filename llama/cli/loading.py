"""What commands do before they load the weights: flags, the tokenizer for their checks, the import of torch; and the
loading itself.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.cli.devices import SECTION as DEVICES, devices_of
from llama.cli.flags import Command, one_of, with_flags
from llama.cli.output import ending_at_once
from llama.config import (
    ACTIVATIONS,
    BUCKET_POLICIES,
    CACHE_DTYPES,
    DEFAULT_BUCKETS,
    DEMO_CONTEXT,
    DEMO_DIR,
    DTYPES,
    PREFILL_PRODUCTS,
    EngineConfig,
)
from llama.environment import check_environment
from llama.errors import TokenizerError

if TYPE_CHECKING:
    from llama.generation import LLaMA
    from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

IMPORTS_TAKE_S = 2  # torch and torch_xla from the page cache (docs/log.md, 2026-11-21)
SECTIONS: dict[str, dict[str, tuple[str, Any, str]]] = {  # section: name: (kind, default, help)
    "Model": {
        "ckpt_dir": (
            "str | None",
            None,
            "Directory in Meta's, Hugging Face's or llama-xla's own format, or a GGUF file. Default: the demo model.",
        ),
        "tokenizer_path": (
            "str | None",
            None,
            "SentencePiece model, tiktoken ranks or tokenizer.json. Default: the one in ckpt_dir or its parent.",
        ),
        "allow_nan": ("bool", False, "Load weights that hold NaN or infinity."),
        "check_sums": (
            "bool",
            False,
            "Read all files of the checkpoint first and compare them with the sums beside them; see inspect.",
        ),
        "dtype": (
            "str",
            "auto",
            "Weights: float32, bfloat16, int8, int4; auto: quantised ones as they are, others float32 on a CPU, else "
            "bfloat16.",
        ),
        "int4_group": ("int", EngineConfig.int4_group, "How many numbers of an int4 weight share a scale: 64 or 128."),
        "cache_dtype": (
            "str",
            "auto",
            "Keys and values: float32, bfloat16; auto: float32 up to 2048 positions on a CPU, else bfloat16.",
        ),
        "activations": (
            "str",
            EngineConfig.activations,
            "Round what meets int8 and int4 weights to int16, or leave it in float32, on a CPU.",
        ),
        "prefill_products": (
            "str",
            EngineConfig.prefill_products,
            "Round prompts' activations that meet bfloat16 and int4 weights to bfloat16, or leave them in float32, on "
            "a CPU.",
        ),
    },
    "Shapes, fixed when the programs are compiled": {
        "max_seq_len": (
            "int | None",
            None,
            "Positions of the cache, for a prompt and what follows it. Default: 2048, or 512 for the demo model.",
        ),
        "max_batch_size": ("int", 1, "Slots, each of which holds a beginning; chunks run one after the other."),
        "buckets": (
            "list[int] | None",
            None,
            "Chunk lengths that prompts are cut into. Default: 512,64,8,1.",
        ),
        "bucket_policy": ("str", "greedy", "greedy covers a prompt exactly; pad may fill up its last chunk."),
        "prefix_cache_bytes": (
            "int",
            EngineConfig.prefix_cache_bytes,
            "Memory for beginnings of prompts whose slots are needed for something else.",
        ),
        "batch_invariant": ("bool", False, "A result depends on nothing but its prompt, to the last bit; slower."),
        "fail_on_recompile": ("bool", False, "A program compiled after warm-up is an error with exit code 3."),
    },
    "Devices": DEVICES,
}


def takes_loading(**instead: tuple[Any, str]) -> Callable[[Callable[..., None]], Command]:
    """Give a command the flags of a model and its shapes; it receives their values in its parameter ``loading``.

    In the command's docstring ``{loading}`` stands for their help.

    Args:
        instead: the command's own default and help of a flag.
    """
    flags = {name: flag for section in SECTIONS.values() for name, flag in section.items()}
    flags |= {name: (flags[name][0], *own) for name, own in instead.items()}
    sections = [
        "\n".join([f"{title}:", *(f"    {name}: {flags[name][2]}" for name in section)])
        for title, section in SECTIONS.items()
    ]
    kinds = {name: kind for name, (kind, _, _) in flags.items()}
    defaults = {name: default for name, (_, default, _) in flags.items()}
    return with_flags("loading", defaults, kinds, "\n\n".join(sections))


def config_of(loading: Mapping[str, Any]) -> EngineConfig:
    """The engine's shapes, as the flags of ``takes_loading`` say.

    Raises:
        FlagError: a name that is none of those allowed.
        ConfigError: see EngineConfig.
    """
    positions = DEMO_CONTEXT if loading["ckpt_dir"] is None else EngineConfig.max_seq_len
    return EngineConfig(
        max_batch_size=loading["max_batch_size"],
        max_seq_len=positions if loading["max_seq_len"] is None else loading["max_seq_len"],
        buckets=tuple(loading["buckets"] or DEFAULT_BUCKETS),
        bucket_policy=one_of("bucket_policy", loading["bucket_policy"], BUCKET_POLICIES),
        dtype=one_of("dtype", loading["dtype"], DTYPES),
        int4_group=loading["int4_group"],
        cache_dtype=one_of("cache_dtype", loading["cache_dtype"], CACHE_DTYPES),
        activations=one_of("activations", loading["activations"], ACTIVATIONS),
        prefill_products=one_of("prefill_products", loading["prefill_products"], PREFILL_PRODUCTS),
        prefix_cache_bytes=loading["prefix_cache_bytes"],
        batch_invariant=loading["batch_invariant"],
        fail_on_recompile=loading["fail_on_recompile"],
        **devices_of(loading)._asdict(),
    )


def loaded(loading: Mapping[str, Any], config: EngineConfig, tokenizer: Tokenizer | None, quiet: bool) -> LLaMA:
    """Import torch and load the model that the flags name; Ctrl-C ends the process meanwhile."""
    announce_imports()
    with ending_at_once():
        from llama.generation import LLaMA  # torch and torch_xla take seconds: flags are checked first

        return LLaMA.build(
            loading["ckpt_dir"],
            loading["tokenizer_path"],
            tokenizer=tokenizer,
            config=config,
            allow_nan=loading["allow_nan"],
            check_sums=loading["check_sums"],
            progress=not quiet and sys.stderr.isatty(),
        )


def announce_imports() -> None:
    """Log that torch is about to be imported, which takes seconds; nothing where it has been.

    Raises:
        ConfigError: the environment names no usable device, see ``check_environment``.
    """
    check_environment(os.environ)
    if "torch" not in sys.modules:
        log.info("Importing torch, about %d s", IMPORTS_TAKE_S)


def readable_tokenizer(ckpt_dir: str | None, tokenizer_path: str | None) -> Tokenizer | None:
    """Return the tokenizer, or None if it cannot be read.

    ``LLaMA.build`` raises the reason later, after the errors of the checkpoint.
    """
    from llama.tokenizer import find_tokenizer, load_tokenizer

    try:
        return load_tokenizer(tokenizer_path or find_tokenizer(DEMO_DIR if ckpt_dir is None else Path(ckpt_dir)))
    except TokenizerError:
        return None
