"""Find a checkpoint's tokenizer file, recognise its kind, and load it."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable
from pathlib import Path

from llama.errors import TokenizerError, setting
from llama.gguf_header import MAGIC, SUFFIX, gguf_in
from llama.regular_files import MOST_BYTES, check_regular, mistaken, reason_of
from llama.tokenizer.base import Tokenizer
from llama.tokenizer.gguf_kind import load_gguf_tokenizer
from llama.tokenizer.sentencepiece_kind import SentencePieceTokenizer
from llama.tokenizer.tiktoken_kind import TiktokenTokenizer
from llama.tokenizer.tokenizers_kind import JSONTokenizer

MOST_PADDING = 2  # rows of an embedding for each id
_HEAD = 4096  # bytes that tell the kinds apart
_RANKS_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s*")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer file of any kind; the kind is recognised by content.

    Args:
        path: a SentencePiece model, a tiktoken ranks file, a tokenizer.json, or a GGUF file.

    Raises:
        TokenizerError: the file is absent or damaged, has no BOS or EOS, or needs a library that is not installed.
    """
    return _loader_for(Path(path))(Path(path))


def _loader_for(path: Path) -> Callable[[Path], Tokenizer]:
    """Return what reads a file, judging by the file's first bytes."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if not head.startswith(MAGIC) and path.suffix.lower() != SUFFIX:  # the others are read whole
            check_regular(path, MOST_BYTES)
    except OSError as error:
        raise TokenizerError(
            f"no tokenizer at {path} ({reason_of(error)}): expected a SentencePiece model, a tiktoken ranks file or a "
            f"tokenizer.json; give its path with {setting('tokenizer_path')}"
        ) from error
    if found := mistaken(path):
        raise TokenizerError(f"{path} is no tokenizer: {found}")
    if head.startswith(MAGIC) or path.suffix.lower() == SUFFIX:
        return load_gguf_tokenizer
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        return JSONTokenizer
    if _RANKS_LINE.fullmatch(head.partition(b"\n")[0]):
        return TiktokenTokenizer
    return SentencePieceTokenizer


def mismatch(tokenizer: Tokenizer, rows: int) -> str | None:
    """Return why a tokenizer with far fewer ids than an embedding has rows may be another model's; else None.

    Embeddings are padded, by some hundred rows. One that is more than twice as large is hardly padding.
    """
    if tokenizer.n_words * MOST_PADDING >= rows:
        return None
    return (
        f"the tokenizer has {tokenizer.n_words} ids, but the model's embedding {rows} rows: it may belong to another "
        f"model, and texts are wrong then; give the right one with {setting('tokenizer_path')}"
    )


def find_tokenizer(ckpt_dir: Path) -> Path:
    """Return a checkpoint's tokenizer file, from its directory or else its parent (LLaMA 1).

    tokenizer.json is preferred, because it also has the tokens that were added to a model later; otherwise it is the
    only ``*.model`` file. A GGUF file has its own.

    Raises:
        TokenizerError: there is none, or there are several.
    """
    gguf = gguf_in(ckpt_dir)
    if gguf is not None:
        return gguf
    for directory in (ckpt_dir, Path(os.path.realpath(ckpt_dir)).parent):
        if os.path.lexists(directory / "tokenizer.json"):
            return directory / "tokenizer.json"
        try:
            found = sorted(path for path in directory.iterdir() if path.suffix == ".model")
        except OSError:  # the weights' error says that
            found = []
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(p.name for p in found)
            raise TokenizerError(
                f"{directory} has {len(found)} tokenizers ({names}), expected one; "
                f"choose with {setting('tokenizer_path')}"
            )
    raise TokenizerError(
        f"no tokenizer (tokenizer.json or *.model) in {ckpt_dir} or its parent; "
        f"give its path with {setting('tokenizer_path')}"
    )
