"""The flags of drafting, declared once for all commands that generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llama.cli.flags import Command, section, with_flags
from llama.config import DRAFTERS, LOOKUP_ORDERS, DraftConfig
from llama.errors import FlagError

FLAGS = {  # name: (kind, help)
    "drafter": (
        "str",
        "Guess tokens, several of which are checked in one step; the text stays the same. Names, tried in order: "
        f"{', '.join(DRAFTERS)}. auto is suffix,lookup where that pays; auto,medusa tries medusa, too.",
    ),
    "draft_lens": ("list[int]", "How many guesses a step can check, a program for each. Default: 3,7."),
    "draft_ckpt_dir": ("str", "Of model: the directory of a smaller model with the same vocabulary."),
    "medusa_dir": ("str", "Of medusa: the directory of heads for this model. Default: the demo model's own."),
    "datastore": ("str", "Of retrieval: a file that llama-xla datastore build made."),
    "word_bank": ("str", "Of retrieval: a file of n-grams of earlier answers; it is made, and grows from run to run."),
    "lookup_order": (
        "str",
        f"Of lookup: which earlier place is continued: {' or '.join(LOOKUP_ORDERS)}. Default: first.",
    ),
    "corpus_tokens": (
        "int",
        "Of suffix: tokens of earlier outputs that are kept to draft from; 0 keeps none. Default: 65536.",
    ),
    "lookahead": (
        "list[int]",
        "Of lookahead: width of the window, tokens of an n-gram, n-grams kept for each token. Default: 5,4,5.",
    ),
}


def takes_drafting(command: Callable[..., None]) -> Command:
    """Give a command the flags of drafting; it receives their values in its parameter ``drafting``, by name.

    In the command's docstring ``{drafting}`` stands for their help.
    """
    described = section("Drafting", {name: text for name, (_, text) in FLAGS.items()})
    kinds = {name: f"{kind} | None" for name, (kind, _) in FLAGS.items()}
    return with_flags("drafting", dict.fromkeys(FLAGS), kinds, {"drafting": described})(command)


def drafting_of(given: Mapping[str, Any]) -> DraftConfig | None:
    """What the flags say; None without ``--drafter``.

    Raises:
        FlagError: a flag of drafting without ``--drafter``.
        ConfigError: see DraftConfig.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if not chosen:
        return None
    if "drafter" not in chosen:
        raise FlagError(f"--{next(iter(chosen))}: got it without --drafter, expected both or none")
    names = tuple(name.strip() for name in chosen.pop("drafter").split(","))
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()
    }
    return DraftConfig(names, **settings)
