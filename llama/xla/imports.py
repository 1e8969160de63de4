"""Import torch_xla without the compilers that it imports and generation never calls.

``import torch_xla`` imports torch's dynamo and inductor, and with them sympy, networkx and triton, in three places: a
GRU layer that replaces torch's, the export to StableHLO, and two settings of dynamo. That is nine tenths of its time
(docs/log.md, 2026-11-21). Here stand-ins take these three places during the import. Afterwards they are removed, and
whoever uses one of the names gets the real module, which is imported then. Only ``from torch.nn import *`` has no GRU
until somebody has used it.

Written against torch_xla 2.9.0, pinned in setup.py; tests/test_startup.py checks that everything deferred works.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

DYNAMO = "torch._dynamo"
GRU = "torch_xla.experimental.gru"
STABLEHLO = "torch_xla.stablehlo"
SCAN = "torch_xla.experimental.scan"
LIGHT = (  # what the deferred modules import besides: they register kernels, and cost 10 ms together
    "torch_xla._dynamo",
    "torch_xla.experimental.quantized",
    "torch_xla.experimental.stablehlo_custom_call",
    "torch_xla.experimental.xla_dynamic_reshape_ops",
    "torch_xla.utils.dlpack",
)
EXPORTS = ("save_as_stablehlo", "save_torch_model_as_stablehlo")  # of torch_xla.stablehlo, in torch_xla itself


class _StandIn(ModuleType):
    """Takes a module's place while torch_xla is imported; whoever needs more of it gets the real module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def import_torch_xla() -> ModuleType:
    """Import torch_xla, and defer what generation does not need of it; where it is imported already, do nothing."""
    if "torch_xla" in sys.modules:
        return sys.modules["torch_xla"]
    import torch

    gru, placeholder = torch.nn.GRU, type("GRU", (), {})
    exports = dict.fromkeys(EXPORTS)
    stand_ins = [_stand_in(GRU, {"GRU": placeholder}), _stand_in(STABLEHLO, exports)]
    if DYNAMO not in sys.modules:
        # with the path of the real package: torch_xla sets two values in its module config, which is imported
        spec = find_spec(DYNAMO)
        assert spec is not None
        stand_ins.append(_stand_in(DYNAMO, {"__path__": spec.submodule_search_locations}))
        import_module(f"{DYNAMO}.config")
    try:
        torch_xla = import_module("torch_xla")
    finally:
        for module in stand_ins:
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]
        if torch.nn.GRU is placeholder:
            torch.nn.GRU = gru  # type: ignore[misc]
    _resolve_later(torch.nn, "GRU", lambda: _patched_gru(gru))
    for name in EXPORTS:
        _resolve_later(torch_xla, name, lambda name=name: getattr(import_module(STABLEHLO), name))  # type: ignore[misc]
    for full_name in (STABLEHLO, GRU, SCAN):
        package, _, name = full_name.rpartition(".")
        _resolve_later(import_module(package), name, lambda full_name=full_name: import_module(full_name))  # type: ignore[misc]
    for name in LIGHT:
        import_module(name)
    return torch_xla


def _stand_in(name: str, attributes: Mapping[str, Any]) -> ModuleType:
    module = _StandIn(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


def _resolve_later(module: ModuleType, name: str, resolve: Callable[[], Any]) -> None:
    """Take a name out of a module, and have its first use resolve it."""
    otherwise = module.__dict__.get("__getattr__")

    def find(wanted: str) -> Any:
        if wanted == name and name not in module.__dict__:
            return resolve()
        if otherwise is not None:
            return otherwise(wanted)
        raise AttributeError(f"module {module.__name__!r} has no attribute {wanted!r}")

    with suppress(AttributeError):
        delattr(module, name)
    module.__dict__["__getattr__"] = find


def _patched_gru(original: type) -> type:
    """The GRU that torch_xla puts in place of torch's: what its ``_patched_functions`` does at once."""
    import torch

    torch.nn.GRU = original  # type: ignore[misc, assignment]  # its base class
    found: type | None = getattr(import_module(GRU), "GRU", None)
    if found is None:  # it is being imported, and asks for its base class
        del torch.nn.GRU
        return original
    found._orig = original  # type: ignore[attr-defined]
    torch.nn.GRU = found  # type: ignore[misc, assignment]
    return found
