"""What commands do before they load the weights: flags, the tokenizer for their checks, the import of torch; and the
loading itself.

The flags of a model and its shapes are declared here for all commands. Those of ``bench`` describe a workload that
other programs run, too, and are its own.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.cli.devices import SECTION as DEVICES, devices_of
from llama.cli.flags import Command, section, with_flags
from llama.cli.output import ending_at_once
from llama.config import DEMO_CONTEXT, DEMO_DIR, DraftConfig, EngineConfig, ModelArgs
from llama.environment import check_environment
from llama.errors import TokenizerError

if TYPE_CHECKING:
    from llama.generation import LLaMA
    from llama.startup import Startup
    from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

IMPORTS_TAKE_S = 2  # torch and torch_xla from the page cache (docs/log.md, 2026-11-21)
SECTIONS: dict[str, dict[str, tuple[str, Any, str]]] = {  # section: name: (kind, default, help)
    "model": {
        "ckpt_dir": (
            "str | None",
            None,
            "Directory in Meta's, Hugging Face's or llama-xla's own format, or a GGUF file. Default: the demo model.",
        ),
        "tokenizer_path": (
            "str | None",
            None,
            "SentencePiece model, tiktoken ranks or tokenizer.json. Default: the one beside the weights or in the "
            "parent directory.",
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
    "shapes": {
        "max_seq_len": (
            "int | None",
            None,
            "Positions of the cache, for a prompt and what follows it. Default: 2048, or 512 for the demo model.",
        ),
        "max_batch_size": ("int | None", 1, "Slots, each of which holds a beginning; chunks run one after the other."),
        "buckets": (
            "list[int] | None",
            None,
            "Chunk lengths that prompts are cut into. Default: 512,64,8,1.",
        ),
        "bucket_policy": ("str", "greedy", "greedy covers a prompt exactly; pad may fill up its last chunk."),
        "prefix_cache_bytes": (
            "int",
            EngineConfig.prefix_cache_bytes,
            "Memory for beginnings of prompts whose slots are needed for something else; the memory plan of --verbose "
            "shows it. What a free slot still holds is used in any case.",
        ),
        "batch_invariant": ("bool", False, "A result depends on nothing but its prompt, to the last bit; slower."),
        "fail_on_recompile": ("bool", False, "A program compiled after warm-up is an error with exit code 3."),
    },
    "devices": DEVICES,
}
TITLES = {"model": "Model", "shapes": "Shapes, fixed when the programs are compiled", "devices": "Devices"}
CONFIGURED = {f.name for f in fields(EngineConfig)}


def takes_loading(
    *, only: Sequence[str] | None = None, without: Sequence[str] = (), **instead: tuple[Any, str]
) -> Callable[[Callable[..., None]], Command]:
    """Give a command the flags of a model and its shapes; it receives their values in its parameter ``loading``.

    In the command's docstring ``{loading}`` stands for the help of all, ``{model}``, ``{shapes}`` or ``{devices}`` for
    that of a section, and a flag's name in braces for its own line.

    Args:
        only: the flags that the command has; None means all.
        without: those that it lacks, or has flags of its own for.
        instead: the command's own default and help of a flag.
    """
    every = {name: flag for flags in SECTIONS.values() for name, flag in flags.items()}
    chosen = {name: every[name] for name in (every if only is None else only) if name not in without}
    chosen |= {name: (chosen[name][0], *own) for name, own in instead.items()}
    lines = {name: f"{name}: {text}" for name, (_, _, text) in chosen.items()}
    sections = {
        key: section(TITLES[key], {name: chosen[name][2] for name in flags if name in chosen})
        for key, flags in SECTIONS.items()
    }
    kinds = {name: kind for name, (kind, _, _) in chosen.items()}
    defaults = {name: default for name, (_, default, _) in chosen.items()}
    texts = {"loading": "\n\n".join(sections.values()), **sections, **lines}
    return with_flags("loading", defaults, kinds, texts)


def config_of(
    loading: Mapping[str, Any], *, slots: int = 1, has_random_weights: bool = False, **own: Any
) -> EngineConfig:
    """The engine's shapes, as the flags of ``takes_loading`` say; EngineConfig's defaults where there is no flag.

    Args:
        slots: as many where ``max_batch_size`` is not given, rounded up so that each group of devices has its share.
        has_random_weights: there is no checkpoint, and the model is not the demo model either.
        own: fields of EngineConfig for which the command has flags of its own.

    Raises:
        FlagError: see devices_of.
        ConfigError: see EngineConfig.
    """
    given = {name: value for name, value in loading.items() if name in CONFIGURED and value is not None} | own
    if "mp" in loading:
        given |= devices_of(loading)._asdict()
    if "buckets" in given:
        given["buckets"] = tuple(given["buckets"])
    if "max_batch_size" not in given:
        groups = max(given.get("data_parallel", 1), 1)
        given["max_batch_size"] = -(-slots // groups) * groups
    if "max_seq_len" not in given and loading["ckpt_dir"] is None and not has_random_weights:
        given["max_seq_len"] = DEMO_CONTEXT
    return EngineConfig(**given)


def loaded(
    loading: Mapping[str, Any],
    config: EngineConfig,
    tokenizer: Tokenizer | None,
    quiet: bool,
    *,
    random_weights: ModelArgs | None = None,
    startup: Startup | None = None,
    drafting: DraftConfig | None = None,
) -> LLaMA:
    """Import torch and load the model that the flags name; Ctrl-C ends the process meanwhile.

    Args:
        tokenizer: the one that ``readable_tokenizer`` found.
        quiet: no bars either.
        random_weights, startup, drafting: see LLaMA.build.
    """
    _announce_imports()
    with ending_at_once():
        from llama.generation import LLaMA  # torch and torch_xla take seconds: flags are checked first

        return LLaMA.build(
            loading["ckpt_dir"],
            loading["tokenizer_path"],
            tokenizer=tokenizer,
            config=config,
            random_weights=random_weights,
            allow_nan=loading["allow_nan"],
            check_sums=loading["check_sums"],
            progress=not quiet and sys.stderr.isatty(),
            startup=startup,
            drafting=drafting,
        )


def _announce_imports() -> None:
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
