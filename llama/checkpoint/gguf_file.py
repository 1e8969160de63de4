"""GGUF, llama.cpp's format: one file with settings, tokenizer and weights, most of them in blocks of narrow integers.

A weight in blocks is read as float32 (the library gguf knows the blocks), the others as they are stored: as views of
the mapped file. wq and wk have Meta's order of rotary pairs already: the converters from Hugging Face's order restore
it.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch

from llama.checkpoint.files import Header, TensorFile
from llama.checkpoint.source import Found, Source
from llama.errors import CheckpointError
from llama.gguf_header import StoredTensor, gguf_in, read_header
from llama.gguf_settings import FREQUENCIES, read_gguf
from llama.sharding import LAYER, numberless

WIDE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
IN_ONE_GO = 2**20  # numbers widened at a time, which bounds the temporary memory
TO_GGUF = {
    "tok_embeddings.weight": "token_embd.weight",
    "layers.{}.attention.wq.weight": "blk.{}.attn_q.weight",
    "layers.{}.attention.wk.weight": "blk.{}.attn_k.weight",
    "layers.{}.attention.wv.weight": "blk.{}.attn_v.weight",
    "layers.{}.attention.wo.weight": "blk.{}.attn_output.weight",
    "layers.{}.feed_forward.w1.weight": "blk.{}.ffn_gate.weight",
    "layers.{}.feed_forward.w2.weight": "blk.{}.ffn_down.weight",
    "layers.{}.feed_forward.w3.weight": "blk.{}.ffn_up.weight",
    "layers.{}.attention_norm.weight": "blk.{}.attn_norm.weight",
    "layers.{}.ffn_norm.weight": "blk.{}.ffn_norm.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
FROM_GGUF = {theirs: ours for ours, theirs in TO_GGUF.items()}
_LAYER = re.compile(r"^blk\.(0|[1-9][0-9]*)\.")


class GGUFSource(Source):
    """A GGUF file.

    Args:
        directory: the file, or a directory with one such file.

    Raises:
        CheckpointError: a damaged file, another architecture, a type of weight or a setting that is not supported, or
            see Source.
    """

    format = "gguf"

    def __init__(self, directory: Path) -> None:
        path = gguf_in(directory) or directory
        settings = read_gguf(path)
        self._file = GGUFFile(path)
        found = {
            to_meta(theirs) or f"{theirs} (no weight of LLaMA's)": Found(header.shape, header.dtype, path)
            for theirs, header in self._file.headers.items()
            if theirs != FREQUENCIES  # the settings hold what it says
        }
        super().__init__(directory, settings, found, (path,))

    def label(self, name: str) -> str:
        """A weight's name in Meta's and in this file."""
        theirs = to_gguf(name)
        return f"{name} ({theirs})" if theirs else name

    def _let_go(self, name: str) -> None:
        self._file.let_go()

    def _read(self, name: str) -> torch.Tensor:
        return self._file.read(to_gguf(name) or name)


class GGUFFile(TensorFile):
    """The tensors of a GGUF file; those in blocks are read as float32."""

    def _open(self) -> Callable[[str], torch.Tensor]:
        self._stored = read_header(self.path).tensors
        for name, stored in self._stored.items():
            if stored.kind not in WIDE and stored.kind not in BLOCKS:
                raise CheckpointError(
                    f"{self.path}: tensor {name} has the type {stored.kind}, expected one of "
                    f"{', '.join([*WIDE, *BLOCKS])}; quantise the original to one of these"
                )
        try:
            with self.path.open("rb") as file:
                self._mapped: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        return self._tensor

    def _close(self) -> None:
        self._mapped = None  # views keep it; the last one closes it

    def _headers(self) -> dict[str, Header]:
        return {name: Header(t.shape, WIDE.get(t.kind, torch.float32)) for name, t in self._stored.items()}

    def _tensor(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        assert self._mapped is not None
        if len(self._mapped) < stored.start + stored.size:
            raise CheckpointError(f"{self.path} was changed while it was being read: it is shorter now")
        if stored.kind not in WIDE:
            return widened(stored, np.frombuffer(self._mapped, np.uint8, stored.size, stored.start))
        dtype = WIDE[stored.kind]
        count = stored.size // dtype.itemsize
        return torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=stored.start).view(stored.shape)


def widened(stored: StoredTensor, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> torch.Tensor:
    """Return a weight that is stored in blocks as float32, a few rows at a time.

    Args:
        stored: its type and shape.
        data: its bytes.
    """
    from gguf import GGMLQuantizationType, dequantize

    kind, width = GGMLQuantizationType[stored.kind], stored.shape[-1]
    rows = data.reshape(prod(stored.shape[:-1]), -1)  # [rows, bytes of a row]
    wide = np.empty((len(rows), width), np.float32)
    step = max(IN_ONE_GO // width, 1)
    with np.errstate(all="ignore"):  # a damaged scale may be infinite, which `checked` refuses
        for first in range(0, len(rows), step):
            wide[first : first + step] = dequantize(rows[first : first + step], kind)
    return torch.from_numpy(wide).view(stored.shape)


def to_gguf(name: str) -> str | None:
    """GGUF's name for one of Meta's, or None for a name that is not in the table."""
    theirs, layer = TO_GGUF.get(numberless(name)), LAYER.search(name)
    return theirs and theirs.format(layer and layer[1])


def to_meta(name: str) -> str | None:
    """Meta's name for one of GGUF's, or None for a name that is not in the table."""
    layer = _LAYER.match(name)
    if layer is None:
        return None if "{" in name else FROM_GGUF.get(name)
    ours = FROM_GGUF.get(_LAYER.sub("blk.{}.", name))
    return ours and ours.format(layer[1])
