"""The JSON files beside a tokenizer: the names of its control tokens, and ids that end a generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama.errors import TokenizerError
from llama.regular_files import read_bytes, reason_of


def special_names(directory: Path) -> dict[str, str]:
    """Return the control tokens that a Hugging Face directory names; none without its files.

    For instance ``{"bos_token": "<s>"}``.

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
    """Return the ids that generation_config.json gives for a key such as ``eos_token_id``, if any.

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
    """Read the object in a JSON file; empty if there is no such file.

    Raises:
        TokenizerError: it is not readable, not JSON, or no object.
    """
    try:
        value = json.loads(read_bytes(path).decode("utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise TokenizerError(f"{path} is not readable: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value
