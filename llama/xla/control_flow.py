"""Control flow inside a program: branches and loops around functions of tensors.

A function is traced like a program, and the computation that XLA's builder makes of it becomes the branch of a
Conditional or the body of a While. Tensors that are on the device already and that the function closes over, such as
weights, become inputs of the branch or loop and are not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from llama.xla import mesh

Tensors = tuple[torch.Tensor, ...]


class _Traced:
    """A function of tensors as a computation of XLA's builder.

    Args:
        name: of the computation.
        fn: returns a tuple of tensors. It must close over no tensor that the program has yet to compute: that is what
            ``inputs`` are for.
        inputs: tensors like those that it takes.

    Attributes:
        arguments: what the computation reads: the inputs, then the tensors on the device that ``fn`` closes over.
        shapes: sizes and dtype of each output.
    """

    def __init__(self, name: str, fn: Callable[..., Tensors], inputs: Sequence[torch.Tensor]) -> None:
        import torch_xla
        import torch_xla.core.xla_builder as xb

        def placeholder(like: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = xb.create_placeholder_tensor(like.shape, like.dtype)
            return made

        placeholders = list(map(placeholder, inputs))
        with mesh.held_as(placeholder) as weights:
            traced = fn(*placeholders)
        self.shapes = [(list(each.shape), each.dtype) for each in traced]
        lowered = torch_xla._XLAC.lowering.LoweringContext(name)
        lowered.set_name_string(name)
        lowered.build(list(traced))
        self._computation = xb.computation_from_module_proto(name, lowered.hlo())
        self.arguments, place = list(inputs), {}  # place: of each parameter, its index among the arguments
        for index, each in enumerate(placeholders):
            parameter = lowered.tensor_parameter_id(each)
            if parameter != -1:
                place[parameter] = index
        for part, instead in weights:
            parameter = lowered.tensor_parameter_id(instead)
            if parameter != -1:
                place[parameter] = len(self.arguments)
                self.arguments.append(part)
        for parameter, held in lowered.device_parameter_id_tensor_mapping().items():
            if parameter not in place:
                place[parameter] = len(self.arguments)
                self.arguments.append(held.to(inputs[0].device))
        self._places = [place[parameter] for parameter in range(len(place))]

    def call(self, given: Sequence[Any]) -> list[Any]:
        """The builder's outputs of the computation; ``given`` are the builder's values of ``arguments``."""
        import torch_xla.core.xla_builder as xb

        result = xb.Op.call(self._computation, [given[index] for index in self._places])
        if not result.shape().is_tuple():
            return [result]
        return [result.get_tuple_element(index) for index in range(len(self.shapes))]


def when(condition: torch.Tensor, fn: Callable[..., Tensors], inputs: Sequence[torch.Tensor]) -> Tensors:
    """``fn(*inputs)`` where a condition holds, else zeros: a branch of the program, not computed where it is not taken.

    Args:
        condition: bool scalar on the device.
        fn: a pure function of tensors. Weights that it closes over are not copied.
        inputs: what it takes; it must close over no other tensor that the program computes.

    Returns:
        The outputs of ``fn``, or zeros of their shapes and dtypes.
    """
    if condition.device.type != "xla":
        return tuple(torch.where(condition, each, torch.zeros_like(each)) for each in fn(*inputs))
    import torch_xla.core.xla_builder as xb

    traced = _Traced("branch", fn, inputs)
    taken, *parameters = _parameters("when", (condition, *traced.arguments))

    def yes(*given: Any) -> Any:
        return xb.Op.tuple(traced.call(given))

    def no(*given: Any) -> Any:
        builder = given[0].builder()
        zeros = (xb.Op.scalar(builder, 0, dtype=_type_of(dtype)).broadcast(sizes) for sizes, dtype in traced.shapes)
        return xb.Op.tuple(list(zeros))

    return _run("when", taken.mkconditional(parameters, yes, no), (condition, *traced.arguments))


def switch(index: torch.Tensor, branches: Sequence[Callable[..., Tensors]], inputs: Sequence[torch.Tensor]) -> Tensors:
    """``branches[index](*inputs)``: the other branches are not computed.

    Args:
        index: int32 or int64 scalar on the device, from 0 on; the last branch is taken for larger ones, too.
        branches: pure functions of ``inputs`` whose outputs have the same shapes and dtypes; see ``when``.
    """
    if len(branches) == 1:
        return branches[0](*inputs)
    if index.device.type != "xla":
        return branches[min(int(index), len(branches) - 1)](*inputs)
    import torch_xla.core.xla_builder as xb

    traced = [_Traced("branch", fn, inputs) for fn in branches]
    extra = [each.arguments[len(inputs) :] for each in traced]
    arguments = (index, *inputs, *(held for each in extra for held in each))
    which, *parameters = _parameters("switch", arguments)

    def choose(which: Any, given: Sequence[Any], number: int) -> Any:
        begin = len(inputs) + sum(map(len, extra[:number]))

        def this(which: Any, *given: Any) -> Any:
            return xb.Op.tuple(traced[number].call((*given[: len(inputs)], *given[begin : begin + len(extra[number])])))

        if number == len(traced) - 1:
            return this(which, *given)

        def later(which: Any, *given: Any) -> Any:
            return choose(which, given, number + 1)

        is_this = which <= xb.Op.scalar(which.builder(), number, dtype=which.shape().dtype)
        return is_this.mkconditional((which, *given), this, later)

    return _run("switch", choose(which, parameters, 0), arguments)


def repeat(
    count: int, fn: Callable[..., Tensors], carry: Sequence[torch.Tensor], constants: Sequence[torch.Tensor] = ()
) -> Tensors:
    """Run a function ``count`` times, each on what the last run returned: one body in the program, whatever the count.

    Args:
        count: at least 1.
        fn: takes the number of the run (int32 scalar), the carry and the constants; returns the next carry, in the same
            shapes and dtypes. Weights that it closes over are not copied.
        carry: what the first run takes. A cache that is donated to the program is updated in place.
        constants: other tensors that the program computes and the function reads.

    Returns:
        What the last run returned.
    """
    import torch_xla.core.xla_builder as xb

    first = torch.zeros((), dtype=torch.int32, device=carry[0].device)
    traced = _Traced("body", fn, (first, *carry, *constants))
    parameters = _parameters("repeat", traced.arguments)

    def more(number: Any, *given: Any) -> Any:
        return number < xb.Op.scalar(number.builder(), count, dtype=xb.Type.S32)

    def body(number: Any, *given: Any) -> Any:
        following = number + xb.Op.scalar(number.builder(), 1, dtype=xb.Type.S32)
        return xb.Op.tuple([following, *traced.call((number, *given)), *given[len(carry) :]])

    ended = _run("repeat", xb.Op.mkwhile(list(parameters), more, body), traced.arguments)
    return ended[1 : 1 + len(carry)]


def _parameters(name: str, arguments: Iterable[torch.Tensor]) -> list[Any]:
    """Parameters of a new builder, one for each argument."""
    import torch_xla.core.xla_builder as xb

    builder = xb.create_builder(name)
    return [xb.mkparam(builder, index, xb.tensor_shape(each)) for index, each in enumerate(arguments)]


def _run(name: str, result: Any, arguments: Sequence[torch.Tensor]) -> Tensors:
    """Add a computation that yields a tuple to the graph."""
    import torch_xla

    return tuple(torch_xla._XLAC._xla_user_computation(f"xla::{name}", list(arguments), result.build(name)))


def _type_of(dtype: torch.dtype) -> Any:
    """XLA's name of a dtype."""
    import torch_xla.core.xla_builder as xb

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "S32", torch.bool: "PRED"}
    return getattr(xb.Type, names[dtype])
