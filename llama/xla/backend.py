"""The device: where it is, how XLA and the allocator are set up for it, and how much memory it has.

The modules of ``llama/xla`` are the only ones that know torch_xla, whose names change from release to release. They
know nothing of models or text.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from llama.environment import check_environment, cores
from llama.errors import ConfigError, EngineError
from llama.sharding import Mesh
from llama.xla import mesh
from llama.xla.imports import import_torch_xla

# How XLA compiles for the CPU device; whoever sets XLA_FLAGS has the last word. Measured in docs/log.md, 2026-11-21.
CPU_FLAGS = (
    # its newer emitter writes to the cache by a loop over all positions of all layers
    "--xla_cpu_use_fusion_emitters=false",
    # the loop over rows widens a narrow weight as it reads it; hoisted, it would be written to memory in float32 first
    # and sums of products, as attention's of one row are, split in two would be written to memory before they are added
    # up
    "--xla_disable_hlo_passes=while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion,tree_reduction_rewriter",
    # LLVM: as many numbers in a register as the narrowest fit, so that integers are multiplied in pairs, and no loop
    # over a group of a few numbers unrolled before it could use registers (docs/log.md, 2026-11-26)
    "--xla_backend_extra_options=-vectorizer-maximize-bandwidth=true,-unroll-full-max-count=8",
    # a program is compiled in parts, side by side, each of which takes three of the process's memory mappings: XLA's 32
    # would keep two cores no busier
    f"--xla_cpu_parallel_codegen_split_count={min(32, 2 * cores())}",
)

# A run of a program allocates its scratch memory anew, and glibc would map it and give it back each time: the kernel
# hands out zeroed pages at 1 to 4 GB/s, which was most of a batched attention's time. So freed memory is kept
# (docs/log.md, 2026-11-21), but from the first compile on only: what loading frees would stay, too. One arena serves
# all threads, the others cannot grow large.
MALLOC_PARAMETERS = {  # their numbers in malloc.h
    "M_ARENA_MAX": -8,
    "M_MMAP_MAX": -4,
    "M_MMAP_THRESHOLD": -3,
    "M_TRIM_THRESHOLD": -1,
}
MALLOC_AT_START = {"M_ARENA_MAX": 1}
# Weights are copied to the devices of a mesh, and what has been copied is given back at once.
MALLOC_FOR_MESH = {"M_MMAP_THRESHOLD": 2**18}
MALLOC_FOR_RUNS = {"M_MMAP_MAX": 0, "M_TRIM_THRESHOLD": 2**31 - 1}

_started_in: int | None = None  # the process that started the PJRT client


def init(devices: Mesh = Mesh()) -> torch.device:  # noqa: B008  (it is frozen)
    """Start the PJRT client, once, and return its device. PJRT_DEVICE chooses it; without it a TPU is taken where
    there is one.

    Sets ``PJRT_DEVICE=CPU`` when neither the variable nor a TPU is there, so that a laptop needs no set-up.

    Args:
        devices: the mesh of all devices, which torch_xla then calls one device; or the first device alone.

    Raises:
        ConfigError: see ``prepare``, ``starting`` and ``mesh.start``.
    """
    global _started_in
    torch_xla = prepare()
    with starting():
        mesh.start(devices)
        if not devices.is_single and device_kind() == "CPU":
            set_malloc(MALLOC_FOR_MESH)
        device: torch.device = torch_xla.device()
    _started_in = os.getpid()
    _wait_at_exit()
    return device


@contextmanager
def starting() -> Iterator[None]:
    """Within: the PJRT client may be started.

    Raises:
        ConfigError: it cannot be; the error that torch_xla raises is a C++ stack trace of many lines.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"PJRT_DEVICE: {os.environ.get('PJRT_DEVICE', 'no value')} cannot be started: {reason[:300]}; "
            "another process may hold the device; PJRT_DEVICE=CPU needs none"
        ) from error


@cache
def _wait_at_exit() -> None:
    """Let the device finish before the process ends: its threads would abort the process if they still ran then."""

    def finish() -> None:
        with suppress(RuntimeError):  # of a device that has failed before
            wait()

    atexit.register(finish)


def prepare() -> ModuleType:
    """Import torch_xla after its environment variables and the allocator have been set; start no client yet.

    Raises:
        ConfigError: see ``check_environment``; torch_xla is not imported then.
        EngineError: the client was started by the process from which this one was forked.
    """
    if _started_in not in (None, os.getpid()):
        raise EngineError(
            f"the device was started in process {_started_in} and does not run in process {os.getpid()}, which was "
            'forked from it; start processes with multiprocessing.get_context("spawn"), or fork before LLaMA.build'
        )
    check_environment(os.environ)
    if "PJRT_DEVICE" not in os.environ and not os.path.exists("/dev/accel0") and not os.path.exists("/dev/vfio/0"):
        os.environ["PJRT_DEVICE"] = "CPU"
    if os.environ.get("PJRT_DEVICE") == "CPU":
        set_malloc(MALLOC_AT_START)
        if CPU_FLAGS[0] not in os.environ.get("XLA_FLAGS", ""):  # a parent process may have set them
            os.environ["XLA_FLAGS"] = " ".join((*CPU_FLAGS, os.environ.get("XLA_FLAGS", ""))).strip()
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # torch_xla's default, which a parent process may have set
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # XLA warns at every compile for a mesh of its next version
    return import_torch_xla()


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
        raise ConfigError(
            "dump_hlo: XLA has been started in this process, and reads its flags only then; use a new process"
        )
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={directory} --xla_dump_hlo_as_text".strip()
    )


@contextmanager
def profiled(directory: Path) -> Iterator[None]:
    """Within: the device and the runtime are traced; the trace is written at the end, for TensorBoard and for
    Perfetto.
    """
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
    """Bytes that the device has free, or each device of a mesh: its share of the host's on the CPU device, else what
    the device reports, or None where it does not.
    """
    if device_kind() == "CPU":
        return host_memory() // mesh.current().devices
    import torch_xla.core.xla_model as xm

    try:
        info = xm.get_memory_info(device)
    except RuntimeError:
        return None
    return int(info["bytes_limit"] - info["bytes_used"])


def wait() -> None:
    """Mark a step boundary and wait until the device has nothing left to do: what a clock must do before it stops."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    torch_xla.sync(wait=True)
    xm.wait_device_ops()
