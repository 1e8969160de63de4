"""The device: where it is, how a function becomes a program on it, what was compiled, run and transferred.

With ops.py (and later sharding.py) this is the only module that knows torch_xla, whose names change from release to release.
It knows nothing of models or text.

A **program** is one compiled XLA executable for one set of shapes. ``compile_program`` traces a function once by lazy tensors,
asks XLA to compile the graph, and keeps the graph's hash; each later call hands the hash and the inputs to the runtime and
neither traces nor guards anything. torch.compile's ``openxla`` backend reaches the same executable through dynamo, at three
seconds of tracing a program instead of a few hundredths (docs/log.md, 2026-11-20).

Written against torch_xla 2.9.0, pinned in setup.py: the calls into ``_XLAC`` are those that its own dynamo bridge makes.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.errors import ConfigError, LLaMAError

ALIGNMENT = 64  # bytes

# How XLA compiles for the CPU device; whoever sets XLA_FLAGS has the last word. Measured in docs/log.md, 2026-11-21.
CPU_FLAGS = (
    # its newer emitter writes to the cache by a loop over all positions of all layers
    "--xla_cpu_use_fusion_emitters=false",
    # the loop over rows widens a narrow weight as it reads it; hoisted, it would be written to memory in float32 first
    # and sums of products, as attention's of one row are, split in two would be written to memory before they are added up
    "--xla_disable_hlo_passes=while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion,tree_reduction_rewriter",
)

# A run of a program allocates its scratch memory anew, and glibc would map it and give it back each time: the kernel hands out zeroed
# pages at 1 to 4 GB/s, which was most of a batched attention's time. So freed memory is kept (docs/log.md, 2026-11-21), but from the
# first compile on only: what loading frees would stay, too. One arena serves all threads, the others cannot grow large.
MALLOC_PARAMETERS = {"M_ARENA_MAX": -8, "M_MMAP_MAX": -4, "M_TRIM_THRESHOLD": -1}  # their numbers in malloc.h
MALLOC_AT_START = {"M_ARENA_MAX": 1}
MALLOC_FOR_RUNS = {"M_MMAP_MAX": 0, "M_TRIM_THRESHOLD": 2**31 - 1}

TensorFn = Callable[..., tuple[torch.Tensor, ...]]


@dataclass
class Counters:
    """What the device has been asked to do since the process began.

    Attributes:
        compiled: programs compiled through ``compile_program``.
        compile_s: seconds that tracing and compiling them took.
        runs: program runs.
        fetches: transfers from the device to the host.
        fetched_bytes: what they carried.
        uploads: tensors that the host gave to the device.
        uploaded_bytes: what they held.
    """

    compiled: int = 0
    compile_s: float = 0.0
    runs: int = 0
    fetches: int = 0
    fetched_bytes: int = 0
    uploads: int = 0
    uploaded_bytes: int = 0

    def sent(self, tensor: torch.Tensor) -> None:
        """Count a tensor that goes to the device."""
        self.uploads += 1
        self.uploaded_bytes += tensor.nbytes


counters = Counters()


def init() -> torch.device:
    """Start the PJRT client, once, and return its device. PJRT_DEVICE chooses it; without it a TPU is taken where there is one.

    Sets ``PJRT_DEVICE=CPU`` when neither the variable nor a TPU is there, so that a laptop needs no set-up.
    """
    if "PJRT_DEVICE" not in os.environ and not os.path.exists("/dev/accel0") and not os.path.exists("/dev/vfio/0"):
        os.environ["PJRT_DEVICE"] = "CPU"
    if os.environ.get("PJRT_DEVICE") == "CPU":
        set_malloc(MALLOC_AT_START)
        if CPU_FLAGS[0] not in os.environ.get("XLA_FLAGS", ""):  # a parent process may have set them
            os.environ["XLA_FLAGS"] = " ".join((*CPU_FLAGS, os.environ.get("XLA_FLAGS", ""))).strip()
    import torch_xla

    device: torch.device = torch_xla.device()
    return device


def set_malloc(options: Mapping[str, int]) -> None:
    """Set glibc's mallopt parameters; other C libraries are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in options.items():
            mallopt(MALLOC_PARAMETERS[name], value)


def dump_programs(directory: Path) -> None:
    """Have XLA write every program that it compiles to a directory; call it before ``init``.

    Raises:
        ConfigError: XLA has been started, and reads its flags no more.
    """
    if "torch_xla" in sys.modules:
        raise ConfigError("dump_hlo: XLA has been started in this process, and reads its flags only then; use a new process")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={directory} --xla_dump_hlo_as_text".strip()


@contextmanager
def profiled(directory: Path) -> Iterator[None]:
    """Within: the device and the runtime are traced; the trace is written at the end, for TensorBoard and for Perfetto."""
    import torch_xla.debug.profiler as profiler

    profiler.start_trace(str(directory))
    try:
        yield
    finally:
        wait()
        profiler.stop_trace()


def device_kind() -> str:
    """``CPU`` or ``TPU``: the PJRT device type that this process runs on."""
    import torch_xla.runtime

    return str(torch_xla.runtime.device_type())


def host_memory() -> int:
    """Bytes that the host can still give out without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def free_memory(device: torch.device) -> int | None:
    """Bytes that the device has free: of the host on the CPU device, else what the device reports, or None where it does not."""
    if device_kind() == "CPU":
        return host_memory()
    import torch_xla.core.xla_model as xm

    try:
        info = xm.get_memory_info(device)
    except RuntimeError:
        return None
    return int(info["bytes_limit"] - info["bytes_used"])


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device. A transfer: it compiles nothing."""
    counters.sent(tensor)
    return tensor.to(device)


def adopt(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Give a host tensor that nobody will write to any more to the device.

    On the CPU device without a copy: the program reads the host's memory, which may be a mapped file. It must begin at a multiple
    of 64 bytes, as PJRT demands, or else is copied to where it does. Other devices get a copy, like ``upload``'s.
    """
    if device.type != "xla" or device_kind() != "CPU":
        return upload(tensor, device)
    from torch_xla.utils.dlpack import from_dlpack

    counters.sent(tensor)
    host = tensor.detach().contiguous()
    adopted: torch.Tensor = from_dlpack(host.clone() if host.data_ptr() % ALIGNMENT else host)
    return adopted


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a device tensor to the host. Host sync: yes, it waits until the program that makes the tensor has run."""
    counters.fetches += 1
    counters.fetched_bytes += tensor.nbytes
    return tensor.cpu()


def wait() -> None:
    """Mark a step boundary and wait until the device has nothing left to do: what a clock must do before it stops."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    torch_xla.sync(wait=True)
    xm.wait_device_ops()


def xla_compilations() -> int:
    """How many computations XLA itself has compiled in this process, by torch_xla's own counter.

    Independent of ``counters.compiled``: a compile that slips past ``compile_program`` shows here.
    """
    import torch_xla.debug.metrics as metrics

    data = metrics.metric_data("CompileTime")
    return int(data[0]) if data else 0


def xla_compile_seconds() -> float:
    """Seconds that XLA's compiler took in this process, without tracing; in torch_xla's own counter."""
    import torch_xla.debug.metrics as metrics

    data = metrics.metric_data("CompileTime")
    return float(data[1]) / 1e9 if data else 0.0


def fallback_ops() -> Counter[str]:
    """Operations that torch_xla has run on the host because XLA lacks them, and how often."""
    import torch_xla.debug.metrics as metrics

    return Counter({op: metrics.counter_value(op) for op in metrics.executed_fallback_ops()})


class UnsupportedOpError(LLaMAError):
    """A traced function used an operation that XLA lacks: torch_xla would run it on the host now and bake its result in for ever."""

    def __init__(self, program: str, fallbacks: list[str]) -> None:
        super().__init__(
            f"program {program}: XLA has no {', '.join(fallbacks)}; write it with operations that stay on the device (llama/ops.py)"
        )


class Program:
    """One compiled executable; call it with device tensors of the shapes that it was compiled for.

    The inputs named in ``donated`` give their memory to the outputs: the tensors passed there are dead after the call.
    """

    def __init__(self, name: str, graph_hash: object, inputs: list[torch.Tensor | int], passed_through: dict[int, int]) -> None:
        self.name = name
        self._graph_hash = graph_hash
        self._inputs = inputs  # per graph input: the index of an argument, or the tensor itself (weights, constants)
        self._passed_through = passed_through  # index of an output that is an argument unchanged: index of the argument

    def __call__(self, *args: torch.Tensor) -> list[torch.Tensor]:
        """Run it on ``args``; the outputs are device tensors that may still be being computed. Host sync: no."""
        import torch_xla

        counters.runs += 1
        inputs = [args[i] if isinstance(i, int) else i for i in self._inputs]
        outputs: list[torch.Tensor] = torch_xla._XLAC._run_cached_graph(self._graph_hash, inputs)
        for place, arg in self._passed_through.items():
            outputs.insert(place, args[arg])
        return outputs


def compile_program(name: str, fn: TensorFn, args: Sequence[torch.Tensor], donated: Sequence[int] = ()) -> Program:
    """Trace ``fn`` once on ``args`` and compile the graph; nothing is run and ``args`` keep their values.

    Args:
        name: how errors and logs call the program.
        fn: takes device tensors, returns a tuple of tensors, mutates nothing. Tensors that it closes over (weights) become
            inputs of the program; they are neither copied nor folded into it.
        args: device tensors, materialised, of the shapes and dtypes that every later call will pass.
        donated: indices of ``args`` whose memory an output of the same size takes over.

    Compiles: once per call; the caller keeps the result.
    """
    import torch_xla
    import torch_xla.core.xla_model as xm
    from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

    if device_kind() == "CPU":
        set_malloc(MALLOC_FOR_RUNS)
    xlac = torch_xla._XLAC
    began = time.perf_counter()
    known_fallbacks = fallback_ops()
    torch_xla.sync()
    xm.wait_device_ops()
    index_of = {xlac._xla_get_tensor_id(arg): i for i, arg in enumerate(args)}
    for i in donated:
        xlac._set_buffer_donation(args[i], True)
    traced = fn(*args)
    fallbacks = fallback_ops() - known_fallbacks
    if fallbacks:
        raise UnsupportedOpError(name, sorted(fallbacks))
    origins = [index_of.get(xlac._xla_get_tensor_id(output)) for output in traced]
    computed = [output for output, origin in zip(traced, origins, strict=True) if origin is None]
    ids, values = xlac._get_tensors_xla_device_data_node(computed)
    inputs = [index_of.get(tensor_id, value) for tensor_id, value in zip(ids, values, strict=True)]
    with alias_with_buffer_donor_config():
        graph_hash = xlac._get_graph_hash(computed)
        xlac._xla_warm_up_cache(computed, [])
    for i in donated:
        xlac._set_buffer_donation(args[i], False)
    xlac._clear_pending_irs(str(torch_xla.device()))
    counters.compiled += 1
    counters.compile_s += time.perf_counter() - began
    return Program(name, graph_hash, inputs, {i: origin for i, origin in enumerate(origins) if origin is not None})
