"""Operations that torch_xla's builder has no word for, handed to XLA ready-made: fusions, a reduction, an all-gather.

A computation may be given as a serialised HLO module (``HloModuleProto`` of xla/service/hlo.proto), and fusions in it
pass through the compiler as they are. The few messages needed are written here in protobuf's wire format: torch_xla
ships none of their Python classes. Their field numbers are fixed for good by protobuf's rules.

XLA's layout assignment forgets the layouts inside a fusion except of its parameters and its result, so a fusion's
operation takes parameters only: no conversion and no slice in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from llama.wire_format import nested, number, packed

FLOAT32, BFLOAT16, INT32, TUPLE = 11, 16, 4, 13  # xla_data.proto's PrimitiveType
PRIMITIVE = {"s8": 2, "f16": 10, "f32": FLOAT32, "bf16": BFLOAT16}  # as the builder names them
ProductKind = Literal["loop", "onednn"]
# how XLA:CPU's own rewriters mark what a library shall run
ONEDNN = '{"fusion_config":{"kind":"__onednn_fusion"}}'
XNNPACK = '{"fusion_config":{"kind":"__xnn_fusion"}}'


@cache
def product(weight: tuple[int, int], x: tuple[int, int], *, kind: ProductKind, layers: int = 0) -> Any:
    """A computation of one matrix product in float32: [out, n], a column for each row of x.

    Args:
        weight: its shape, [out, in].
        x: the other operand's shape: [n, in], but for oneDNN, which knows no other order, [in, n].
        kind: ``loop`` is one fused loop over the result's elements in their order: x is read anew for each row of the
            weight, from the cache if it is small. ``onednn`` is that library's product.
        layers: 0, or of how many weights the computation takes one.

    Returns:
        What ``Op.call`` of torch_xla's builder takes. Its parameters are (weight, x), or with ``layers`` (the number of
        a weight, x, every weight): a Conditional with a branch for each weight, so that it is read where it is.
    """
    import torch_xla.core.xla_builder as xb

    module, shapes, contracted = Module(), (shape(weight), shape(x)), 0 if kind == "onednn" else 1
    result = shape((weight[0], x[1 - contracted]))

    def multiplied(within: Computation, operands: Sequence[int]) -> int:
        """The product within a computation; weights are contracted along their second dimension."""
        dimensions = nested(30, packed(1, [1]) + packed(2, [contracted]))
        inner = Computation(module, shapes)
        fused = inner.ended(inner.add("dot", result, inner.parameters, dimensions), result)
        config = nested(43, ONEDNN.encode()) if kind == "onednn" else b""
        how = nested(11, b"kCustom" if kind == "onednn" else b"kLoop")
        return within.add("fusion", result, operands, how + packed(38, [fused]) + config)

    if not layers:
        entry = Computation(module, shapes)
        root = multiplied(entry, entry.parameters)
    else:
        pair = tuple_shape(shapes)
        branches = []
        for _ in range(layers):
            branch = Computation(module, [pair])
            operands = [branch.add("get-tuple-element", shapes[i], branch.parameters, number(13, i)) for i in (0, 1)]
            branches.append(branch.ended(multiplied(branch, operands), result))
        entry = Computation(module, [shape((), INT32), shapes[1], *[shapes[0]] * layers])
        which, of_x, *weights = entry.parameters
        pairs = [entry.add("tuple", pair, [each, of_x]) for each in weights]
        root = entry.add("conditional", result, [which, *pairs], packed(38, branches))
    return xb.computation_from_module_proto("product", module.serialised(entry, root, result))


@cache
def bfloat16_product(x: tuple[int, int], weight: tuple[int, int]) -> Any:
    """A computation of one matrix product by XNNPACK: bfloat16 [n, in] and [out, in], summed up in float32 [n, out].

    It runs on one core: products of parts of x run side by side.

    Args:
        x, weight: their shapes.

    Returns:
        What ``Op.call`` of torch_xla's builder takes. Its parameters are (x, weight).
    """
    import torch_xla.core.xla_builder as xb

    module, shapes, result = Module(), [shape(x, BFLOAT16), shape(weight, BFLOAT16)], shape((x[0], weight[0]))
    inner = Computation(module, shapes)
    dot = inner.add("dot", result, inner.parameters, nested(30, packed(1, [1]) + packed(2, [1])))
    fused = inner.ended(dot, result)
    entry = Computation(module, shapes)
    how = nested(11, b"kCustom") + packed(38, [fused]) + nested(43, XNNPACK.encode())
    root = entry.add("fusion", result, entry.parameters, how)
    return xb.computation_from_module_proto("bfloat16_product", module.serialised(entry, root, result))


@cache
def tiles(weight: tuple[int, int], kind: str, rows: int, channels: int) -> Any:
    """A computation of a product in float32 whose channels c, c + C / channels, ... are summed up side by side.

    One reduction with a result for each of the tile's channels and rows. XLA fuses what it reads into it.

    Args:
        weight: its shape, [C, in].
        kind: its dtype, as the builder names it.
        rows: of the other operand, [rows, in] float32.
        channels: of a tile, which divide C.

    Returns:
        What ``Op.call`` of torch_xla's builder takes. Its parameters are (weight, x, zero), its result a tuple of
        [C / channels] float32, for each of a tile's channels one a row.
    """
    import torch_xla.core.xla_builder as xb

    module, scalar = Module(), shape(())
    (count, width), results = (weight[0] // channels, weight[1]), channels * rows
    adding = Computation(module, [scalar] * (2 * results))
    pairs = zip(adding.parameters[:results], adding.parameters[results:], strict=True)
    scalars = tuple_shape([scalar] * results)
    added = adding.ended(adding.add("tuple", scalars, [adding.add("add", scalar, pair) for pair in pairs]), scalars)

    entry = Computation(module, [shape(weight, PRIMITIVE[kind]), shape((rows, width)), scalar])
    of_weight, of_x, zero = entry.parameters
    block = shape((count, width))

    def taken(operand: int, start: int, size: int, primitive: int) -> int:
        """Some rows of an operand."""
        bounds = ((start, start + size), (0, width))
        dimensions = b"".join(nested(17, number(1, a) + number(2, b) + number(3, 1)) for a, b in bounds)
        return entry.add("slice", shape((size, width), primitive), [operand], dimensions)

    blocks = [taken(of_weight, i * count, count, PRIMITIVE[kind]) for i in range(channels)]
    blocks = [entry.add("convert", block, [each]) for each in blocks] if kind != "f32" else blocks
    lines = [entry.add("reshape", shape((width,)), [taken(of_x, i, 1, FLOAT32)]) for i in range(rows)]
    spread = [entry.add("broadcast", block, [line], packed(14, [1])) for line in lines]
    products = [entry.add("multiply", block, [a, b]) for a in blocks for b in spread]
    result = tuple_shape([shape((count,))] * results)
    root = entry.add("reduce", result, [*products, *[zero] * results], packed(14, [1]) + packed(38, [added]))
    return xb.computation_from_module_proto("tiles", module.serialised(entry, root, result))


@cache
def numbered_copy(size: int, which: int, count: int) -> Any:
    """A computation of a copy of x [1, size] float32 by XNNPACK; those of other numbers are not taken to be the same.

    It takes the larger or the smaller of each number and itself, as the bits of ``which`` say.

    Returns:
        What ``Op.call`` of torch_xla's builder takes.
    """
    import torch_xla.core.xla_builder as xb

    module, line = Module(), shape((1, size))
    inner = Computation(module, [line])
    root = inner.parameters[0]
    for bit in range(max(1, (count - 1).bit_length())):
        root = inner.add("maximum" if which >> bit & 1 else "minimum", line, [root, root])
    fused = inner.ended(root, line)
    entry = Computation(module, [line])
    how = nested(11, b"kCustom") + packed(38, [fused]) + nested(43, XNNPACK.encode())
    root = entry.add("fusion", line, entry.parameters, how)
    return xb.computation_from_module_proto("numbered_copy", module.serialised(entry, root, line))


@cache
def all_gather(x: tuple[int, int], groups: tuple[tuple[int, ...], ...]) -> Any:
    """A computation of [rows, T width] float32 from the x [rows, width] of the T devices of each group.

    Args:
        x: its shape.
        groups: the devices of each, by their numbers in the mesh.

    Returns:
        What ``Op.call`` of torch_xla's builder takes.
    """
    import torch_xla.core.xla_builder as xb

    module, (rows, width) = Module(), x
    result = shape((rows, width * len(groups[0])))
    entry = Computation(module, [shape(x)])
    members = b"".join(nested(49, packed(1, group)) for group in groups)
    how = packed(14, [1]) + number(26, 1) + members + number(71, 1)  # dimension, channel, groups by device number
    root = entry.add("all-gather", result, entry.parameters, how)
    return xb.computation_from_module_proto("all_gather", module.serialised(entry, root, result))


class Module:
    """``HloModuleProto`` in the making: its computations, and the numbers of its instructions and computations."""

    def __init__(self) -> None:
        self._computations: list[bytes] = []
        self._last = 0

    def next_number(self) -> int:
        """A number that nothing else in the module has."""
        self._last += 1
        return self._last

    def append(self, computation: bytes) -> None:
        """Take a computation that calls no other one than those before it."""
        self._computations.append(computation)

    def serialised(self, entry: Computation, root: int, result: bytes) -> bytes:
        """The module's bytes."""
        name, number_of = entry.name, entry.ended(root, result)
        computations = b"".join(nested(3, each) for each in self._computations)
        head = nested(1, b"product") + nested(2, name.encode())
        return (
            head
            + computations
            + nested(4, entry.signature(result))
            + number(5, self.next_number())
            + number(6, number_of)
        )


class Computation:
    """``HloComputationProto`` in the making.

    Args:
        module: that it belongs to.
        parameters: their shapes.

    Attributes:
        parameters: the numbers of their instructions.
    """

    def __init__(self, module: Module, parameters: Sequence[bytes]) -> None:
        self._module, self._shapes = module, parameters
        self._number = module.next_number()
        self._instructions: list[bytes] = []
        self.name = f"computation.{self._number}"
        self.parameters = [self.add("parameter", of, [], number(9, place)) for place, of in enumerate(parameters)]

    def add(self, opcode: str, result: bytes, operands: Sequence[int], more: bytes = b"") -> int:
        """Append an instruction; ``more`` are the fields of its opcode. Returns its number."""
        number_of = self._module.next_number()
        name = nested(1, f"{opcode}.{number_of}".encode()) + nested(2, opcode.encode())
        wired = name + nested(3, result) + number(35, number_of) + packed(36, operands) + more
        self._instructions.append(wired)
        return number_of

    def ended(self, root: int, result: bytes) -> int:
        """Hand it to the module, with the instruction that it returns. Returns its number."""
        body = nested(1, self.name.encode()) + b"".join(nested(2, each) for each in self._instructions)
        self._module.append(body + nested(4, self.signature(result)) + number(5, self._number) + number(6, root))
        return self._number

    def signature(self, result: bytes) -> bytes:
        """``ProgramShapeProto``."""
        names = (nested(3, f"p{i}".encode()) for i in range(len(self._shapes)))
        return b"".join(nested(1, each) for each in self._shapes) + nested(2, result) + b"".join(names)


def shape(sizes: Sequence[int], kind: int = FLOAT32) -> bytes:
    """``ShapeProto`` of an array whose last dimension is contiguous."""
    return number(2, kind) + packed(3, sizes) + nested(5, packed(1, range(len(sizes))[::-1]))


def tuple_shape(shapes: Sequence[bytes]) -> bytes:
    """``ShapeProto`` of a tuple."""
    return number(2, TUPLE) + b"".join(nested(4, each) for each in shapes)
