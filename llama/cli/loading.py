"""What commands do before they load the weights: the tokenizer for their checks, and the import of torch."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llama.config import DEMO_DIR
from llama.errors import TokenizerError

if TYPE_CHECKING:
    from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

IMPORTS_TAKE_S = 2  # torch and torch_xla from the page cache (docs/log.md, 2026-11-21)


def announce_imports() -> None:
    """Log that torch is about to be imported, which takes seconds; nothing where it has been."""
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
