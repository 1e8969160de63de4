"""The flags that say how many devices hold a model and divide its slots; a section of loading.py's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llama.errors import FlagError

SECTION: dict[str, tuple[str, Any, str]] = {  # name: (kind, default, help)
    "tensor_parallel": ("int | None", None, "Devices that hold the model together, each a part of every layer."),
    "data_parallel": ("int", 1, "Groups of such devices, among which the slots are divided."),
    "mp": ("bool", False, "As --tensor_parallel with all devices; the original's flag."),
}


class Devices(NamedTuple):
    """How many devices: ``EngineConfig``'s numbers."""

    tensor_parallel: int
    data_parallel: int


def devices_of(given: Mapping[str, Any]) -> Devices:
    """What the flags say.

    Raises:
        FlagError: both flags for the devices of a model, or less than one.
    """
    number = given["tensor_parallel"]
    if number is not None and given["mp"]:
        raise FlagError(f"--tensor_parallel and --mp: got {number} and True, expected one of them")
    if number is not None and number < 1:
        raise FlagError(f"--tensor_parallel: got {number}, expected at least 1; --mp True takes all devices")
    return Devices(0 if given["mp"] else number or 1, given["data_parallel"])
