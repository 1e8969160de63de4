"""GGUF, llama.cpp's format: one file with settings, tokenizer and weights, most of them in blocks of narrow integers.

Matrices of Q4_0 and Q8_0 are read as int4 and int8 in groups of 32 with their scales (quantize.py), which they are but
for the order of their bytes. Other weights in blocks are read as float32 (the library gguf knows the blocks), the rest
as it is stored: as views of the mapped file. wq and wk have Meta's order of rotary pairs already: the converters from
Hugging Face's order restore it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch

from llama.checkpoint.files import Header, TensorFile
from llama.checkpoint.names import is_scale
from llama.checkpoint.source import Found, Source
from llama.errors import CheckpointError
from llama.gguf_header import StoredTensor, gguf_in, read_header
from llama.gguf_settings import FREQUENCIES, KEPT, kept_tensors, read_gguf, to_gguf as to_gguf, to_meta
from llama.sharding import weight_of_scales
from llama.storage import scale_of

WIDE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
IN_ONE_GO = 2**20  # numbers widened at a time, which bounds the temporary memory


class GGUFSource(Source):
    """A GGUF file.

    Args:
        directory: the file, or a directory with one such file.

    Raises:
        CheckpointError: a damaged file, another architecture, a type of weight or a setting that is not supported, or
            see Source.
    """

    format = "gguf"
    may_be_quantised = True

    def __init__(self, directory: Path) -> None:
        path = gguf_in(directory) or directory
        settings = read_gguf(path)
        self._file = GGUFFile(path)
        found = {
            self._ours(theirs) or f"{theirs} (no weight of LLaMA's)": Found(header.shape, header.dtype, path)
            for theirs, header in self._file.headers.items()
            if theirs != FREQUENCIES  # the settings hold what it says
        }
        super().__init__(directory, settings, found, (path,))

    @staticmethod
    def _ours(theirs: str) -> str | None:
        """Meta's name of a tensor in the file, or of a weight's scales; None for an unknown one."""
        name = to_meta(weight_of_scales(theirs))
        return name and (scale_of(name) if is_scale(theirs) else name)

    def rounded(self) -> dict[str, str]:
        """Also those of the other types in blocks, by their type."""
        infos = self.infos()
        kinds = {to_meta(theirs): stored.kind for theirs, stored in self._file.stored.items() if stored.kind in BLOCKS}
        return {name: kind for name, kind in kinds.items() if name in infos} | super().rounded()

    def label(self, name: str) -> str:
        """A weight's name in Meta's and in this file."""
        theirs = to_gguf(weight_of_scales(name))
        return f"{name} ({theirs})" if theirs else name

    def _let_go(self, name: str) -> None:
        self._file.let_go()

    def _read(self, name: str) -> torch.Tensor:
        theirs = to_gguf(weight_of_scales(name)) or name
        return self._file.read(scale_of(theirs) if is_scale(name) else theirs)


class GGUFFile(TensorFile):
    """The tensors of a GGUF file: those in blocks as float32, or those that are kept as numbers and scales, by names in
    ``.weight`` and ``.scale``.

    Attributes:
        stored: every tensor as the header describes it, by name.
    """

    def _open(self) -> Callable[[str], torch.Tensor]:
        self.stored = read_header(self.path).tensors
        for name, stored in self.stored.items():
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
        headers: dict[str, Header] = {}
        for name, stored in self.stored.items():
            for each, (shape, dtype) in kept_tensors(name, stored).items():
                if each in headers or (each != name and each in self.stored):
                    raise CheckpointError(
                        f"{self.path} has the tensor {each} beside {name}, whose scales have that name"
                    )
                wide = WIDE.get(stored.kind, torch.float32)
                headers[each] = Header(shape, wide if dtype == "other" else getattr(torch, dtype))
        return headers

    def _tensor(self, name: str) -> torch.Tensor:
        stored = self.stored[weight_of_scales(name)]
        assert self._mapped is not None
        if len(self._mapped) < stored.start + stored.size:
            raise CheckpointError(f"{self.path} was changed while it was being read: it is shorter now")
        if stored.kind not in WIDE:
            data = np.frombuffer(self._mapped, np.uint8, stored.size, stored.start)
            is_kept = is_scale(name) or scale_of(name) in self.headers
            return kept(stored, data, is_scale(name)) if is_kept else widened(stored, data)
        dtype = WIDE[stored.kind]
        count = stored.size // dtype.itemsize
        return torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=stored.start).view(stored.shape)


def kept(stored: StoredTensor, data: np.ndarray[tuple[int], np.dtype[np.uint8]], scales: bool) -> torch.Tensor:
    """Return a matrix of Q4_0 or Q8_0 as int4 or int8 in groups of 32, or its scales: a copy of its bytes.

    A block is a float16 scale, then 16 bytes of Q4_0 in int4's order, or 32 integers of Q8_0.

    Args:
        stored: its type and shape.
        data: its bytes.
        scales: return those, [rows, width / 32] float16.
    """
    rows = stored.shape[0]
    blocks = torch.from_numpy(data).view(rows, stored.shape[1] // KEPT[stored.kind].group, -1)
    if scales:
        return blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    numbers = blocks[..., 2:].reshape(rows, -1)
    return numbers if KEPT[stored.kind].dtype == "int4" else numbers.view(torch.int8)


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
