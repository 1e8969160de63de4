"""Fusions that XLA does not form by itself, handed to it ready-made.

XLA's builder has no word for a fusion, but a computation may be given as a serialised HLO module (``HloModuleProto`` of
xla/service/hlo.proto), and fusions in it pass through the compiler as they are. The few messages needed are written
here in protobuf's wire format: torch_xla ships none of their Python classes. Their field numbers are fixed for good by
protobuf's rules.

XLA's layout assignment forgets the layouts inside a fusion except of its parameters and its result, so a fusion's
operation takes parameters only: no conversion and no slice in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

FLOAT32 = 11  # xla_data.proto's PrimitiveType
LOOP, CUSTOM = "kLoop", "kCustom"
ONEDNN = '{"fusion_config":{"kind":"__onednn_fusion"}}'  # how XLA:CPU's own rewriter marks what oneDNN shall run


@cache
def product(weight: tuple[int, int], x: tuple[int, int], *, onednn: bool) -> Any:
    """A computation of one matrix product in float32, as one fusion: [out, n], a column for each row of x.

    Args:
        weight: its shape, [out, in].
        x: the other operand's shape: [n, in], but for oneDNN, which knows no other order, [in, n].
        onednn: whether oneDNN runs it. Else it becomes one loop over the result's elements in their order: x is read
            anew for each row of the weight, from the cache if it is small.

    Returns:
        What ``Op.call`` of torch_xla's builder takes.
    """
    import torch_xla.core.xla_builder as xb

    shapes, contracted = (shape(weight), shape(x)), 0 if onednn else 1  # the dimension of x; of the weight the second
    result = shape((weight[0], x[1 - contracted]))
    dot = instruction(3, "dot", result, [1, 2], nested(30, packed(1, [1]) + packed(2, [contracted])))
    inner = computation(7, [parameter(1, shapes[0], 0), parameter(2, shapes[1], 1), dot], shapes, result, root=3)
    kind = nested(11, (CUSTOM if onednn else LOOP).encode()) + packed(38, [7])
    config = nested(43, ONEDNN.encode()) if onednn else b""
    fusion = instruction(6, "fusion", result, [4, 5], kind + config)
    entry = computation(8, [parameter(4, shapes[0], 0), parameter(5, shapes[1], 1), fusion], shapes, result, root=6)
    module = nested(1, b"product") + nested(2, b"computation.8") + nested(3, inner) + nested(3, entry)
    module += nested(4, signature(shapes, result)) + number(5, 9) + number(6, 8)
    return xb.computation_from_module_proto("product", module)


def shape(sizes: Sequence[int]) -> bytes:
    """``ShapeProto`` of a float32 array whose last dimension is contiguous."""
    return number(2, FLOAT32) + packed(3, sizes) + nested(5, packed(1, range(len(sizes))[::-1]))


def signature(parameters: Sequence[bytes], result: bytes) -> bytes:
    """``ProgramShapeProto``."""
    names = (nested(3, f"p{i}".encode()) for i in range(len(parameters)))
    return b"".join(nested(1, each) for each in parameters) + nested(2, result) + b"".join(names)


def parameter(number_of: int, of: bytes, place: int) -> bytes:
    """``HloInstructionProto`` of a computation's parameter at a place."""
    return instruction(number_of, "parameter", of, [], number(9, place))


def instruction(number_of: int, opcode: str, result: bytes, operands: Sequence[int], more: bytes) -> bytes:
    """``HloInstructionProto``; ``more`` are the fields of its opcode."""
    name = nested(1, f"{opcode}.{number_of}".encode()) + nested(2, opcode.encode())
    return name + nested(3, result) + number(35, number_of) + packed(36, operands) + more


def computation(
    number_of: int, instructions: Sequence[bytes], parameters: Sequence[bytes], result: bytes, root: int
) -> bytes:
    """``HloComputationProto``; XLA numbers computations and their instructions through together."""
    body = nested(1, f"computation.{number_of}".encode()) + b"".join(nested(2, each) for each in instructions)
    return body + nested(4, signature(parameters, result)) + number(5, number_of) + number(6, root)


def varint(value: int) -> bytes:
    """A whole number in groups of seven bits, lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    """A field that holds a whole number."""
    return varint(field << 3) + varint(value)


def nested(field: int, content: bytes) -> bytes:
    """A field that holds a message, a string or bytes."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def packed(field: int, values: Sequence[int]) -> bytes:
    """A repeated field of whole numbers."""
    return nested(field, b"".join(map(varint, values)))
