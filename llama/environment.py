"""The process's cores, and the environment variables that choose the device, which are checked without torch_xla."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec

from llama.errors import ConfigError

LIBRARIES = {"TPU": "libtpu", "NEURON": "libneuronxla"}  # that torch_xla finds by itself, by their PJRT device
LIBTPU_PATHS = ("TPU_LIBRARY_PATH", "PTXLA_TPU_LIBRARY_PATH")  # environment variables, read before the library
BRINGS_NO_LIBRARY = {"XPU"}  # an entry point of torch_xla itself; whether there is a library shows at the start
PLUGINS = "torch_xla.plugins"  # the group of entry points that add further devices


def cores() -> int:
    """How many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_environment(environment: Mapping[str, str]) -> None:
    """Check the variables that choose the device: torch_xla answers wrong ones with a stack trace or a crash.

    Args:
        environment: the process's variables.

    Raises:
        ConfigError: PJRT_DEVICE names no device whose library is installed, or CPU_NUM_DEVICES is no count.
    """
    device = environment.get("PJRT_DEVICE")
    count = environment.get("CPU_NUM_DEVICES")
    if device not in (None, "CPU"):
        _check_library(device, environment)
    elif count is not None and not re.fullmatch(r"0*[1-9][0-9]{0,3}", count.strip(), re.ASCII):
        raise ConfigError(
            f"CPU_NUM_DEVICES: got {count!r:.60}, expected how many devices the CPU is, 1 to 9999; unset it to have one"
        )


def _check_library(device: str, environment: Mapping[str, str]) -> None:
    """Check that the library of a device other than the CPU is installed.

    Raises:
        ConfigError: it is not, or the device is unknown.
    """
    path = next((environment[name] for name in LIBTPU_PATHS if environment.get(name)), None)
    if device == "TPU" and path is not None:
        if not os.path.isfile(path):
            raise ConfigError(f"TPU_LIBRARY_PATH: got {path!r:.200}, expected the file libtpu.so; unset it")
        return
    libraries = [name for name, library in LIBRARIES.items() if find_spec(library) is not None]
    plugins = {point.name.upper() for point in entry_points(group=PLUGINS)} - LIBRARIES.keys()
    if device in (*libraries, *plugins):
        return
    if device == "TPU":
        reason = "but its library libtpu is not installed; on a TPU VM install it with pip install -e .[tpu]"
    elif device in LIBRARIES:
        reason = f"but its library {LIBRARIES[device]} is not installed"
    else:
        reason = "which torch_xla does not know"
    known = ", ".join(["CPU", *libraries, *sorted(plugins - BRINGS_NO_LIBRARY)])
    raise ConfigError(
        f"PJRT_DEVICE: got {device!r:.60}, {reason}; expected what is installed here ({known}, in capitals), "
        "or no such variable, to have the device found"
    )
