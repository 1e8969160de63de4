"""Find the checkpoint that a command line names: a directory, or a model in Hugging Face's local cache.

Nothing is downloaded. The cache is laid out by huggingface_hub:

    models--ORG--NAME/refs/main           the commit that was downloaded last
    models--ORG--NAME/snapshots/COMMIT/   its files
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from llama.errors import CheckpointError
from llama.gguf_header import gguf_in
from llama.regular_files import read_bytes

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # ORG/NAME
MODEL = "models--"
LISTED_AT_MOST = 8


def locate(name: str) -> str:
    """Return the directory of the checkpoint that a user names.

    Args:
        name: a directory; a model's directory in the cache, or its ``snapshots``; or ORG/NAME of a model that is in the
            cache. Anything else is returned as it is, and so is a GGUF file: reading it says what is wrong with it.

    Raises:
        CheckpointError: another file, a model that is not in the cache, or several models or snapshots.
    """
    path = Path(name)
    if os.path.isdir(name):
        return _within(path)
    if os.path.isfile(name) and not is_gguf(path):
        raise CheckpointError(f"{name} is a file, expected the directory that holds the checkpoint: {path.parent}")
    if os.path.exists(name):
        return name
    if is_hub_name(name):
        cached = hub_cache() / (MODEL + name.replace("/", "--"))
        if not os.path.isdir(cached):
            raise CheckpointError(
                f"no such directory: {name}, and no model of this name in {hub_cache()}; if it is one on the Hugging "
                f"Face hub, download it: {download(name)}"
            )
        return str(_snapshot(cached))
    return name


def is_hub_name(name: str) -> bool:
    """Whether a name could be that of a model on the Hugging Face hub, ORG/NAME."""
    return HUB_NAME.fullmatch(name) is not None


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF file, by its name or its first bytes."""
    return os.path.isfile(path) and gguf_in(path) is not None


def hub_cache() -> Path:
    """The directory of huggingface_hub's cache, by the variables that it reads."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))


def download(name: str) -> str:
    """The command that downloads a model into the cache; Meta's repositories hold the weights twice."""
    return f'hf download {name} --exclude "original/*" (pip install huggingface_hub)'


def _within(directory: Path) -> str:
    """Return the snapshot in a directory of the cache, or any other directory itself."""
    model = directory.resolve().parent if directory.resolve().name == "snapshots" else directory.resolve()
    if model.name.startswith(MODEL):
        return str(_snapshot(model))
    models = sorted(path.name for path in directory.glob(f"{MODEL}*--*"))
    if models:
        names = ", ".join(_hub_name(each) for each in models[:LISTED_AT_MOST])
        more = ", ..." if len(models) > LISTED_AT_MOST else ""
        raise CheckpointError(f"{directory} is a cache of models, expected one of them: {names}{more}")
    return str(directory)


def _snapshot(model: Path) -> Path:
    """Return the snapshot that refs/main names, or the only one that there is."""
    snapshots = sorted(path for path in (model / "snapshots").glob("*") if os.path.isdir(path))
    try:
        main = read_bytes(model / "refs" / "main").decode().strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    chosen = [path for path in snapshots if path.name == main] or snapshots
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise CheckpointError(f"{model} holds no snapshot; download the model again: {download(_hub_name(model.name))}")
    listed = ", ".join(path.name for path in chosen[:LISTED_AT_MOST])
    raise CheckpointError(
        f"{model} holds {len(chosen)} snapshots ({listed}) and no refs/main that names one, expected one; give its "
        "directory"
    )


def _hub_name(directory: str) -> str:
    return directory.removeprefix(MODEL).replace("--", "/", 1)
