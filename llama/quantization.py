"""Weights that other programs have quantised, as config.json's ``quantization_config`` declares them; no tensors here.

Three ways to pack 4-bit integers are read, checkpoint/packed.py unpacks them. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from llama.errors import CheckpointError, setting
from llama.storage import GROUPS

KEYS = ("quantization_config", "compression_config")  # the second is an older name of compressed-tensors'
Method = Literal["gptq", "awq", "compressed-tensors"]
# By method: the suffixes of a packed layer's tensors, the needed ones first
SUFFIXES: dict[Method, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
}
READ = (
    "GPTQ in 4 bits without act-order, AWQ in 4 bits (gemm), or compressed-tensors pack-quantized (4 bits, symmetric, "
    "groups or channels)"
)
# Other methods of transformers', and what their weights are
REFUSED = {
    "aqlm": "sums of learned vectors",
    "auto-round": "AutoRound's own packing; it also exports GPTQ's",
    "bitnet": "ternary weights",
    "bitsandbytes": "NF4, FP4 or LLM.int8() blocks",
    "compressed_tensors": "a misspelt compressed-tensors",
    "eetq": "int8 in the layout of a CUDA kernel",
    "fbgemm_fp8": "8-bit floating point",
    "finegrained_fp8": "8-bit floating point in blocks",
    "fp8": "8-bit floating point in blocks",
    "fp_quant": "MXFP4 or NVFP4 blocks",
    "higgs": "learned grids",
    "hqq": "half-quadratic quantisation with zero points in floating point",
    "modelopt": "NVIDIA's FP8 and NVFP4",
    "mxfp4": "4-bit floating point in blocks",
    "quanto": "quantised when it is loaded, or in quanto's own packing",
    "quark": "AMD's formats",
    "sinq": "two scales for each number",
    "spqr": "sparse outliers beside narrow integers",
    "torchao": "tensors of torchao's classes",
    "vptq": "learned vectors",
}


class Quantization(NamedTuple):
    """How a checkpoint's linear layers are packed.

    Attributes:
        method: by transformers' name.
        is_symmetric: every zero point is the middle, 8 of 0 to 15: then the weights are kept as they are.
        added: what GPTQ's stored zero points lack: 1 in its first format, 0 in gptq_v2.
    """

    method: Method
    is_symmetric: bool
    added: int = 0

    @property
    def label(self) -> str:
        """The method as people call it."""
        names = {"gptq": "GPTQ", "awq": "AWQ", "compressed-tensors": "compressed-tensors"}
        return names[self.method] if self.is_symmetric or self.method == "awq" else f"asymmetric {names[self.method]}"


def read_quantization(path: Path, config: Mapping[str, Any]) -> Quantization | None:
    """What config.json says about quantised weights; None where there are none.

    Args:
        path: of config.json, for errors.
        config: its content.

    Raises:
        CheckpointError: a method, or a variant of one, that is not read; the message names it and what is read.
    """
    keys = [key for key in KEYS if config.get(key) is not None]
    if not keys:
        return None
    if len(keys) > 1:
        raise CheckpointError(f"{path}: got both {' and '.join(keys)}, expected one of them")
    (key,) = keys
    given = config[key]
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: {key} is {str(given)[:60]}, expected an object")
    reading = _Reading(path, key, given)
    method = given.get("quant_method", "compressed-tensors" if key == KEYS[1] else None)
    if method == "gptq":
        return _gptq(reading)
    if method == "awq":
        return _awq(reading)
    if method == "compressed-tensors":
        return _compressed(reading)
    what = REFUSED.get(str(method))
    raise reading.refused("quant_method", method, f"{what}: " if what else "")


class _Reading:
    """A quantization_config that is being read.

    Args:
        path: of config.json.
        key: of the object in it.
        given: the object, or one within it.
    """

    def __init__(self, path: Path, key: str, given: Mapping[str, Any]) -> None:
        self.path, self.key, self.given = path, key, given

    def expect(self, name: str, *allowed: object, default: object = None) -> object:
        """Return a setting's value, which is one of those allowed, types included.

        Raises:
            CheckpointError: it is another.
        """
        value = self.given.get(name, default)
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise self.refused(name, value)
        return value

    def refused(self, name: str, value: object, what: str = "") -> CheckpointError:
        """The error that names a setting and what is read."""
        method = self.given.get("quant_method")
        of = f" of {method}" if method is not None and name != "quant_method" else ""
        return CheckpointError(
            f"{self.path}: {self.key}: {name}{of} is {str(value)[:80]!r}, {what}which is not read here; expected "
            f"{READ}; "
            f"or take the original weights, with {setting('dtype')} int4 or int8"
        )

    def within(self, name: str, given: object) -> _Reading:
        """An object within it.

        Raises:
            CheckpointError: it is none.
        """
        if not isinstance(given, dict):
            raise self.refused(name, given)
        return _Reading(self.path, f"{self.key}: {name}", given)


def _gptq(reading: _Reading) -> Quantization:
    reading.expect("bits", 4)
    reading.expect("desc_act", False, default=False)  # columns in another order, whose groups are scattered
    reading.expect("pack_dtype", "int32", "torch.int32", None)
    reading.expect("is_marlin_format", False, None)
    form = reading.expect("checkpoint_format", "gptq", "gptq_v2", default=reading.given.get("format", "gptq"))
    symmetric = reading.expect("sym", True, False, default=True)
    return Quantization("gptq", bool(symmetric), added=1 if form == "gptq" else 0)


def _awq(reading: _Reading) -> Quantization:
    reading.expect("bits", 4, default=reading.given.get("w_bit"))
    version = reading.given.get("version", "gemm")
    if str(version).lower() != "gemm":
        raise reading.refused("version", version)
    reading.expect("zero_point", True, default=True)
    return Quantization("awq", is_symmetric=False)


def _compressed(reading: _Reading) -> Quantization:
    reading.expect("format", "pack-quantized")
    reading.expect("quantization_status", "compressed", "frozen", None)
    reading.expect("kv_cache_scheme", None)
    sparsity = reading.given.get("sparsity_config")
    if sparsity:
        reading.within("sparsity_config", sparsity).expect("format", "dense")
    if reading.given.get("transform_config"):
        raise reading.refused("transform_config", reading.given["transform_config"])
    groups = reading.given.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise reading.refused("config_groups", groups)
    for name, scheme in groups.items():
        group = reading.within(f"config_groups {name}", scheme)
        for each in ("input_activations", "output_activations"):
            group.expect(each, None)
        group.expect("format", "pack-quantized", None)
        weights = group.within("weights", group.given.get("weights"))
        weights.expect("num_bits", 4)
        weights.expect("type", "int", default="int")
        weights.expect("symmetric", True, default=True)
        weights.expect("strategy", "group", "channel", None)
        weights.expect("actorder", None, "weight", "static", False)  # other orders scatter the groups
        weights.expect("dynamic", False, default=False)
    return Quantization("compressed-tensors", is_symmetric=True)


def packed_layer(name: str, method: str) -> tuple[str, str] | None:
    """The layer and the suffix of a packed tensor's name, such as ``(model.layers.0.self_attn.q_proj, qweight)``; None
    for any other.
    """
    layer, _, suffix = name.rpartition(".")
    return (layer, suffix) if suffix in SUFFIXES[cast(Method, method)] else None


def our_group(group: int) -> int | None:
    """The group of ours into which others' groups of so many numbers can be divided; None where there is none."""
    return next((each for each in GROUPS if group % each == 0), None)


def packed_group(layer: str, method: str, headers: Mapping[str, tuple[Sequence[int], str]]) -> int | None:
    """The group in which a packed layer is kept, by the shapes of its tensors; None where they do not say.

    Args:
        layer: its name.
        headers: shape and dtype of every tensor, by name.
    """
    by_row = method == "compressed-tensors"
    numbers, scales = (
        f"{layer}.{each}" for each in (("weight_packed", "weight_scale") if by_row else ("qweight", "scales"))
    )
    if scales not in headers:
        return None
    axis = 1 if by_row else 0
    shapes = headers[numbers][0], headers[scales][0]
    if any(len(shape) != 2 or shape[axis] < 1 for shape in shapes):
        return None
    return our_group(8 * shapes[0][axis] // shapes[1][axis])
