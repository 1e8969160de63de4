"""Which file is a checkpoint's tokenizer, of which kind it is, and what the files beside it say about it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llama.errors import TokenizerError, setting
from llama.tokenizer.base import Tokenizer

_HEAD = 4096  # bytes that tell the kinds apart
_RANKS_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s*")
_LFS_POINTER = b"version https://git-lfs.github.com/"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file; the same as ``Tokenizer(path)``.

    Raises:
        TokenizerError: see Tokenizer.
    """
    return Tokenizer(path)


def class_for(path: Path) -> type[Tokenizer]:
    """The class that reads a tokenizer file, by the file's first bytes.

    Raises:
        TokenizerError: there is no such file, or only a Git LFS pointer to it.
    """
    # each kind's module imports the base, which imports this one to pick a kind
    from llama.tokenizer.sentencepiece_kind import SentencePieceTokenizer
    from llama.tokenizer.tiktoken_kind import TiktokenTokenizer
    from llama.tokenizer.tokenizers_kind import JSONTokenizer

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
    if head.lstrip().startswith(b"{"):
        return JSONTokenizer
    if _RANKS_LINE.fullmatch(head.partition(b"\n")[0]):
        return TiktokenTokenizer
    return SentencePieceTokenizer


def find_tokenizer(ckpt_dir: Path) -> Path:
    """A checkpoint's tokenizer file, in its directory, or else in its parent, where LLaMA 1 keeps it.

    That is tokenizer.json where there is one, because it also has the tokens that were added to a model later on; or
    else the only ``*.model`` file.

    Raises:
        TokenizerError: there is none, or there are several.
    """
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


def special_names(directory: Path) -> dict[str, str]:
    """The control tokens that a Hugging Face directory names, for instance ``{"bos_token": "<s>"}``; none without its
    files.

    Raises:
        TokenizerError: tokenizer_config.json or special_tokens_map.json is damaged.
    """
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the second one wins
        for key, value in read_object(directory / file).items():
            name = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(name, str):
                names[key] = name
    return names


def generation_ids(directory: Path, key: str) -> tuple[int, ...]:
    """The ids that generation_config.json gives for a key such as ``eos_token_id``: none, one or several.

    Raises:
        TokenizerError: the file is damaged, or the value is no id and no list of ids.
    """
    value = read_object(directory / "generation_config.json").get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise TokenizerError(
            f"{directory / 'generation_config.json'}: {key}: got {value!r}, expected a token id or a list of them"
        )
    return tuple(ids)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object, empty where there is no such file.

    Raises:
        TokenizerError: it is not readable, not JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value
