"""Linear layers of 4-bit integers as GPTQ, AWQ and compressed-tensors pack them, in our layout or widened.

Each packs eight integers of 4 bits into an int32, the first into its lowest bits:

    GPTQ                 qweight [in / 8, out], eight of a column's; scales [in / G, out]; qzeros [in / G, out / 8],
                         eight of a row's, less 1 in its first format; g_idx [in], each column's group; bias [out],
                         zeros where the model has none
    AWQ                  qweight [in, out / 8], eight of a row's in the order 0 2 4 6 1 3 5 7; scales as GPTQ's;
                         qzeros [in / G, out / 8] in that order
    compressed-tensors   weight_packed [out, in / 8], eight of a row's, 8 added to each; weight_scale [out, in / G];
                         weight_shape, [out, in]

A number is (integer - zero point) x scale. If every zero point is 8, the layer becomes int4 (quantize.py) without loss;
groups that are not 32, 64 or 128 wide are divided into such groups. If not, it is widened to float32, exactly.

Sources: the formats' own packages, AutoGPTQ and GPTQModel, AutoAWQ, compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from llama.checkpoint.files import TensorFile
from llama.checkpoint.quantize import BLOCK, ZERO, pack
from llama.errors import CheckpointError
from llama.quantization import SUFFIXES, Quantization, our_group
from llama.storage import GROUPS

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in an int32 the first, second, ... of eight integers is
IN_A_WORD = 8
SCALES = (torch.float16, torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)


class Part(NamedTuple):
    """A tensor of a packed layer: in which file, under which name."""

    file: TensorFile
    name: str


class PackedLayer:
    """A packed linear layer, opened by its headers.

    Args:
        quantization: of the checkpoint.
        layer: its name in the file, for errors.
        parts: its tensors, by suffix.

    Attributes:
        shape: [out, in].
        group: of our layout, into which it can be put; None where it is widened.
        scale_dtype: of our layout's scales, float16 or float32.
        file: that holds the integers.

    Raises:
        CheckpointError: a tensor is missing, misshapen or of another dtype; or groups that cannot be divided into ours.
    """

    def __init__(self, quantization: Quantization, layer: str, parts: Mapping[str, Part]) -> None:
        self._quantization, self._layer, self._parts = quantization, layer, parts
        self._check_complete()
        self.file = parts[SUFFIXES[quantization.method][0]].file
        method = quantization.method
        shapes = {suffix: part.file.headers[part.name].shape for suffix, part in parts.items()}
        if method == "compressed-tensors":
            packed, scales = shapes["weight_packed"], shapes["weight_scale"]
            self.shape, groups = self._declared_shape(packed), scales[1]
            wanted: dict[str, tuple[int, ...]] = {
                "weight_packed": (self.shape[0], -(-self.shape[1] // IN_A_WORD)),
                "weight_scale": (self.shape[0], groups),
            }
        else:
            words, groups = shapes["qweight"], shapes["scales"][0]
            by_column = method == "gptq"
            self.shape = (words[1], words[0] * IN_A_WORD) if by_column else (words[1] * IN_A_WORD, words[0])
            wanted = {
                "qweight": words,
                "scales": (groups, self.shape[0]),
                "qzeros": (groups, self.shape[0] // IN_A_WORD),
                "g_idx": (self.shape[1],),
            }
        wrong = [f"{suffix} {list(shape)}" for suffix, shape in shapes.items() if wanted.get(suffix, shape) != shape]
        if wrong or not groups or self.shape[1] % groups or self.shape[1] % IN_A_WORD:
            described = ", ".join(wrong) or f"{groups} groups in rows of {self.shape[1]}"
            raise self._damaged(f"the shapes contradict each other: {described}")
        self._group = self.shape[1] // groups  # as it is stored
        scale = parts["weight_scale" if method == "compressed-tensors" else "scales"]
        is_half = scale.file.headers[scale.name].dtype == torch.float16
        self.scale_dtype = torch.float16 if is_half else torch.float32
        self.group = self._our_group() if quantization.is_symmetric else None

    def _check_complete(self) -> None:
        method = self._quantization.method
        needed = [suffix for suffix in SUFFIXES[method] if suffix != "g_idx"]
        missing = [suffix for suffix in needed if suffix not in self._parts]
        if missing:
            raise self._damaged(f"tensor {missing[0]} is missing, expected {', '.join(needed)}")
        for suffix, part in self._parts.items():
            header = part.file.headers[part.name]
            is_list = suffix in ("g_idx", "weight_shape", "bias")
            allowed = SCALES if suffix in ("scales", "weight_scale", "bias") else INDICES if is_list else (torch.int32,)
            if header.dtype not in allowed or len(header.shape) != (1 if is_list else 2):
                raise self._damaged(f"{suffix} is {header.dtype} {list(header.shape)}")

    def _declared_shape(self, packed: tuple[int, ...]) -> tuple[int, int]:
        """What ``weight_shape`` holds, which goes with the integers."""
        declared = self._read("weight_shape").tolist()
        if len(declared) != 2 or declared[0] != packed[0] or -(-declared[1] // IN_A_WORD) != packed[1]:
            raise self._damaged(f"weight_shape is {declared} for weight_packed {list(packed)}")
        return declared[0], declared[1]

    def _our_group(self) -> int:
        group = our_group(self._group)
        if group is None:
            raise self._damaged(f"groups of {self._group} are not read, expected a multiple of {GROUPS[-1]}")
        return group

    def _damaged(self, what: str) -> CheckpointError:
        part = next(iter(self._parts.values()))
        return CheckpointError(f"{part.file.path}: {self._layer} ({self._quantization.method}): {what}")

    def _read(self, suffix: str) -> torch.Tensor:
        part = self._parts[suffix]
        return part.file.read(part.name)

    def let_go(self) -> None:
        """Release what reading kept mapped."""
        for part in self._parts.values():
            part.file.let_go()

    def packed(self) -> torch.Tensor:
        """The integers in our layout: [out, in / 2] uint8. Only where ``group`` is not None."""
        assert self.group is not None
        self._check_zeros()
        return pack(self._numbers(), self.group)

    def scales(self) -> torch.Tensor:
        """The scales of our groups: [out, in / group], float16 or float32. Only where ``group`` is not None."""
        assert self.group is not None
        scales = self._scales().repeat_interleave(self._group // self.group, dim=1)
        return scales.to(self.scale_dtype).contiguous()

    def widened(self) -> torch.Tensor:
        """The numbers that it stands for: [out, in] float32."""
        numbers, scales, zeros = self._numbers(), self._scales().float(), self._zeros()
        wide = torch.empty(self.shape)
        rows = max(BLOCK // self.shape[1], 1)
        split = (torch.split(each, rows) for each in (numbers, scales, zeros, wide))
        for block, scale, zero, out in zip(*split, strict=True):
            groups = block.view(len(block), -1, self._group).to(torch.int8) - zero.unsqueeze(-1)
            torch.mul(groups, scale.unsqueeze(-1), out=out.view(groups.shape))
        return wide

    def _numbers(self) -> torch.Tensor:
        """The integers: [out, in] uint8, 0 to 15."""
        self._check_order()
        if "bias" in self._parts and self._read("bias").any():
            raise self._damaged("it has a bias that is not zero, which this model does not have")
        if self._quantization.method == "compressed-tensors":
            return nibbles(self._read("weight_packed"))[:, : self.shape[1]].contiguous()
        words = self._read("qweight")
        if self._quantization.method == "gptq":
            return nibbles(words.t().contiguous())
        return nibbles(words, AWQ_PLACES).t().contiguous()

    def _scales(self) -> torch.Tensor:
        """The stored scales: [out, in / G]."""
        if self._quantization.method == "compressed-tensors":
            return self._read("weight_scale")
        return self._read("scales").t()

    def _zeros(self) -> torch.Tensor:
        """The zero points: [out, in / G] int8."""
        if self._quantization.method == "compressed-tensors":
            return torch.full((self.shape[0], self.shape[1] // self._group), ZERO, dtype=torch.int8)
        words = self._read("qzeros")
        if self._quantization.method == "awq":
            return nibbles(words, AWQ_PLACES).t().to(torch.int8)
        # one addition for all eight, which carries: GPTQModel makes its second format of the first like that
        return nibbles(words + self._quantization.added * 0x11111111).t().to(torch.int8)

    def _check_zeros(self) -> None:
        zeros = self._zeros()
        if not bool((zeros == ZERO).all()):
            other = sorted(set(zeros.flatten().tolist()) - {ZERO})
            raise self._damaged(
                f"quantization_config says sym true, but there are zero points {', '.join(map(str, other[:4]))}, "
                f"expected {ZERO}; write sym false there, and the weights are widened"
            )

    def _check_order(self) -> None:
        """Refuse columns in another order than that of their groups."""
        if "g_idx" not in self._parts:
            return
        order = self._read("g_idx")
        if not torch.equal(order.long(), torch.arange(len(order)) // self._group):
            raise self._damaged(
                "g_idx says that the columns' groups are scattered (act-order, desc_act), which is not read here; take "
                "a checkpoint that was quantised without it"
            )


def nibbles(words: torch.Tensor, places: tuple[int, ...] = tuple(range(IN_A_WORD))) -> torch.Tensor:
    """The integers of 4 bits in int32 words: [rows, words] becomes [rows, 8 words] uint8.

    Args:
        places: where in a word the first, second, ... is.
    """
    octets = words.contiguous().view(torch.uint8)  # little-endian: the lowest bits come first
    pairs = torch.stack((octets & 15, octets >> 4), dim=-1).view(len(words), -1, IN_A_WORD)
    if places != tuple(range(IN_A_WORD)):
        pairs = pairs[..., list(places)]
    return pairs.reshape(len(words), -1)
