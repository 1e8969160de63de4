"""Find a checkpoint's tokenizer file, recognise its kind, and load it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from llama.errors import TokenizerError, setting
from llama.gguf_header import MAGIC, gguf_in
from llama.tokenizer.base import Tokenizer
from llama.tokenizer.gguf_kind import load_gguf_tokenizer
from llama.tokenizer.sentencepiece_kind import SentencePieceTokenizer
from llama.tokenizer.tiktoken_kind import TiktokenTokenizer
from llama.tokenizer.tokenizers_kind import JSONTokenizer

_HEAD = 4096  # bytes that tell the kinds apart
_RANKS_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s*")
_LFS_POINTER = b"version https://git-lfs.github.com/"


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
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise TokenizerError(
            f"no tokenizer at {path} ({error.strerror}): expected a SentencePiece model, a tiktoken ranks file or a "
            f"tokenizer.json; give its path with {setting('tokenizer_path')}"
        ) from error
    if head.startswith(_LFS_POINTER):
        raise TokenizerError(
            f"{path} is a Git LFS pointer, expected the file that it stands for; run git lfs pull in its repository"
        )
    if head.startswith(MAGIC):
        return load_gguf_tokenizer
    if head.lstrip().startswith(b"{"):
        return JSONTokenizer
    if _RANKS_LINE.fullmatch(head.partition(b"\n")[0]):
        return TiktokenTokenizer
    return SentencePieceTokenizer


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
    for directory in (ckpt_dir, ckpt_dir.resolve().parent):
        if (directory / "tokenizer.json").is_file():
            return directory / "tokenizer.json"
        found = sorted(directory.glob("*.model"))
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
