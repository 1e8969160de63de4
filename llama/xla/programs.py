"""A function becomes a program on the device.

A **program** is one compiled XLA executable for one set of shapes. ``compile_program`` traces a function once by lazy
tensors, asks XLA to compile the graph, and keeps the graph's hash. Each later call hands the hash and the inputs to
torch_xla and neither traces nor guards anything. torch.compile's ``openxla`` backend reaches the same executable
through dynamo, at three seconds of tracing a program instead of a few hundredths (docs/log.md, 2026-11-20).

Written against torch_xla 2.9.0, pinned in setup.py: the calls into ``_XLAC`` are those that its own dynamo bridge
makes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llama.errors import EngineError, LLaMAError
from llama.xla import mesh
from llama.xla.backend import MALLOC_FOR_RUNS, device_kind, set_malloc
from llama.xla.counters import counters, fallback_ops, xla_compilations

TensorFn = Callable[..., tuple[torch.Tensor, ...]]
MAPS, MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
MAPS_LEFT = 2000  # a compile takes up to some hundreds

# What the last runs took over, which holds no memory any more: XLA lets go of such a tensor when the run has ended, and
# whoever drops it sooner waits for that, be it this thread or torch_xla's, which then starts the next run late.
_taken_over: deque[list[torch.Tensor]] = deque(maxlen=32)


class UnsupportedOpError(LLaMAError):
    """A traced function used an operation that XLA lacks: torch_xla would run it on the host now and bake its result
    in for ever.
    """

    def __init__(self, program: str, fallbacks: list[str]) -> None:
        super().__init__(
            f"program {program}: XLA has no {', '.join(fallbacks)}; "
            "write it with operations that stay on the device (llama/xla/ops.py)"
        )


class TooManyProgramsError(LLaMAError):
    """The process holds nearly as many memory mappings as the system allows, and XLA:CPU would crash for want of more:
    each of its programs takes dozens, and torch_xla keeps the last 2,048 of a process.
    """

    def __init__(self, program: str, held: int, most: int) -> None:
        super().__init__(
            f"program {program} is not compiled: the process holds {held} memory mappings, vm.max_map_count allows "
            f"{most}, and XLA would crash without more; start a new process, or raise the limit "
            f"(sysctl -w vm.max_map_count={4 * most})"
        )


def _refuse_without_maps(program: str) -> None:
    """Raise TooManyProgramsError where a compile could run out of memory mappings."""
    try:
        most = int(MOST_MAPS.read_bytes())
        held = MAPS.read_bytes().count(b"\n")
    except (OSError, ValueError):
        return  # a system without this limit
    if held > most - MAPS_LEFT:
        raise TooManyProgramsError(program, held, most)


class Program:
    """One compiled executable; call it with device tensors of the shapes that it was compiled for.

    The inputs named in ``donated`` give their memory to the outputs: the tensors passed there are dead after the call.
    """

    def __init__(
        self,
        name: str,
        graph_hash: object,
        inputs: list[torch.Tensor | int],
        passed_through: dict[int, int],
        edits: bool = False,
        splits: tuple[str, ...] = (),
        donated: Sequence[int] = (),
    ) -> None:
        self.name = name
        self._graph_hash = graph_hash
        self._inputs = inputs  # per graph input: the index of an argument, or the tensor itself (weights, constants)
        self._passed_through = passed_through  # index of an output that is an argument unchanged: index of the argument
        self._edits = edits
        self._splits = splits  # of the arguments, on a mesh
        self._donated = donated  # indices of arguments

    def __call__(self, *args: torch.Tensor) -> list[torch.Tensor]:
        """Run it on ``args``; the outputs are device tensors that may still be being computed. Host sync: no.

        Raises:
            EngineError: an argument is split over the mesh in another way than those that it was compiled for.
        """
        import torch_xla

        if self._splits:
            self._check_splits(args)
        if self._edits:
            counters.edits += 1
        else:
            counters.runs += 1
        inputs = [args[i] if isinstance(i, int) else i for i in self._inputs]
        outputs: list[torch.Tensor] = torch_xla._XLAC._run_cached_graph(self._graph_hash, inputs)
        if self._donated:
            _taken_over.append([args[i] for i in self._donated])
        for place, arg in self._passed_through.items():
            outputs.insert(place, args[arg])
        return outputs

    def _check_splits(self, args: Sequence[torch.Tensor]) -> None:
        """Refuse arguments that XLA would take for something else."""
        for number, (arg, expected) in enumerate(zip(args, self._splits, strict=True)):
            found = mesh.split_of(arg)
            if found != expected:
                raise EngineError(
                    f"program {self.name}: argument {number} is split over the devices as {found or 'nothing'}, "
                    f"expected {expected}"
                )


def compile_program(
    name: str,
    fn: TensorFn,
    args: Sequence[torch.Tensor],
    donated: Sequence[int] = (),
    *,
    edits: bool = False,
    splits: Sequence[mesh.Split] | None = None,
) -> Program:
    """Trace ``fn`` once on ``args`` and compile the graph; nothing is run and ``args`` keep their values.

    Args:
        name: how errors and logs call the program.
        fn: takes device tensors, returns a tuple of tensors, mutates nothing. Tensors that it closes over (weights)
            become inputs of the program; they are neither copied nor folded into it.
        args: device tensors, materialised, of the shapes and dtypes that every later call will pass.
        donated: indices of ``args`` whose memory an output of the same size takes over.
        edits: its runs count as ``counters.edits`` and not as ``counters.runs``.
        splits: of each output, on a mesh, where ``fn`` computes with one device's parts of ``args``. None means that
            all outputs are the same on all devices.

    Compiles: once per call; the caller keeps the result.

    Raises:
        UnsupportedOpError: XLA lacks an operation of it.
        TooManyProgramsError: the process has no memory mappings left for it.
    """
    import torch_xla
    import torch_xla.core.xla_model as xm
    from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

    if device_kind() == "CPU":
        _refuse_without_maps(name)
        if not edits:  # those of loading among them would keep what loading frees
            set_malloc(MALLOC_FOR_RUNS)
    xlac = torch_xla._XLAC
    began = time.perf_counter()
    known_fallbacks = fallback_ops()
    torch_xla.sync()
    xm.wait_device_ops()
    on_mesh = not mesh.current().is_single
    parts = [mesh.to_part(arg) for arg in args] if on_mesh else args
    index_of = {_input_id(part): i for i, part in enumerate(parts)}
    for i in donated:
        xlac._set_buffer_donation(args[i], True)
    traced = fn(*parts)
    fallbacks = fallback_ops() - known_fallbacks
    if fallbacks:
        raise UnsupportedOpError(name, sorted(fallbacks))
    argument_of = {xlac._xla_get_tensor_id(part): i for i, part in enumerate(parts)}
    origins = [argument_of.get(xlac._xla_get_tensor_id(output)) for output in traced]
    every = splits or [mesh.WHOLE] * len(traced)
    computed = [
        mesh.to_whole(output, split) if on_mesh else output
        for output, split, origin in zip(traced, every, origins, strict=True)
        if origin is None
    ]
    ids, values = xlac._get_tensors_xla_device_data_node(computed)
    inputs = [index_of.get(tensor_id, value) for tensor_id, value in zip(ids, values, strict=True)]
    compilations = xla_compilations()
    with alias_with_buffer_donor_config():
        graph_hash = xlac._get_graph_hash(computed)
        xlac._xla_warm_up_cache(computed, [])
    for i in donated:
        xlac._set_buffer_donation(args[i], False)
    xlac._clear_pending_irs(str(torch_xla.device()))
    passed_through = {i: origin for i, origin in enumerate(origins) if origin is not None}
    counters.compiled += 1
    counters.expected += xla_compilations() - compilations
    counters.compile_s += time.perf_counter() - began
    found = tuple(map(mesh.split_of, args)) if on_mesh else ()
    return Program(name, graph_hash, inputs, passed_through, edits, found, donated)


def _input_id(arg: torch.Tensor) -> int:
    """The number by which torch_xla will tell an argument, or a device's part of one, among the inputs of a graph."""
    import torch_xla

    xlac = torch_xla._XLAC
    if not mesh.current().is_single:
        # of a tensor that is split each question for its number gives it a new one: that of the answer
        _, (arg,) = xlac._get_tensors_xla_device_data_node([arg])
    return int(xlac._xla_get_tensor_id(arg))
