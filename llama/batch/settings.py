"""What the results of a batch depend on: the input, the model's files and the controls that lines leave out.

How many slots, chunks or processes there are does not belong to it: that changes how fast results come.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.batch.lines import shown
from llama.errors import CheckpointError

MODEL_FILES = (".json", ".jinja", ".model", ".pth", ".safetensors", ".bin", ".gguf")
SAMPLES, SAMPLE_BYTES = 16, 2**16  # of a large file, evenly spread: another model differs in most of them


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run, as its parts keep them.

    Attributes:
        values: JSON values by the names of settings.
    """

    values: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Equal for equal settings."""
        text = json.dumps(self.values, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """Say what differs from earlier settings, one text for each."""
        now = json.loads(json.dumps(self.values))  # as the parts have them: tuples are lists there
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return [_change(name, before.get(name), now.get(name)) for name in names]


def _change(name: str, before: Any, now: Any) -> str:
    if name in ("input", "ckpt_dir"):
        return f"{name} has other content"
    told = ["nothing" if value is None else shown(value) for value in (before, now)]
    return f"{name} was {told[0]} and is {told[1]}"


def model_digest(directory: Path, tokenizer_path: str | None) -> str:
    """A digest of a checkpoint: names, sizes and samples of its files, so that it takes no time on a large one.

    Args:
        tokenizer_path: a tokenizer elsewhere, or None.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        files = [directory] if directory.is_file() else directory.iterdir()
        found = [path for path in files if path.suffix in MODEL_FILES and path.is_file()]
        found += [directory.parent / "tokenizer.model"] if (directory.parent / "tokenizer.model").is_file() else []
        found += [] if tokenizer_path is None or not Path(tokenizer_path).is_file() else [Path(tokenizer_path)]
        for path in sorted(found):
            _add_file(digest, path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: {(error.strerror or str(error)).lower()}") from error
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
    with path.open("rb") as file:
        for sample in range(SAMPLES if size > SAMPLES * SAMPLE_BYTES else 1):
            file.seek(size // SAMPLES * sample)
            digest.update(file.read(SAMPLE_BYTES if size > SAMPLES * SAMPLE_BYTES else -1))
