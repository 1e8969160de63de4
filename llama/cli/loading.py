"""The tokenizer of a model, for the checks that commands make before they load the weights."""

from __future__ import annotations

from pathlib import Path

from llama.config import DEMO_DIR
from llama.errors import TokenizerError
from llama.tokenizer import Tokenizer, find_tokenizer, load_tokenizer


def readable_tokenizer(ckpt_dir: str | None, tokenizer_path: str | None) -> Tokenizer | None:
    """Return the tokenizer, or None if it cannot be read.

    ``LLaMA.build`` raises the reason later, after the errors of the checkpoint.
    """
    try:
        return load_tokenizer(tokenizer_path or find_tokenizer(DEMO_DIR if ckpt_dir is None else Path(ckpt_dir)))
    except TokenizerError:
        return None
