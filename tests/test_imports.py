"""The direction of imports (docs/architecture.md), the rooms that may use torch_xla, and what importing starts."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import llama

ROOT = Path(llama.__file__).parent
# Lower rooms know nothing of higher ones. Rooms on one line may know each other.
LADDER = [
    {
        "config",
        "environment",
        "errors",
        "gguf_header",
        "gguf_settings",
        "planning",
        "quantization",
        "ranks",
        "regular_files",
        "sampling_params",
        "settings",
        "sharding",
        "storage",
        "wire_format",
        "startup",
    },
    {"xla"},
    {"compiled"},
    {"checkpoint", "tokenizer"},
    {"chat", "engine", "grammar"},
    {"loading"},
    {"drafting"},
    {"detokenizer", "inspection"},
    {"arguments", "inputs", "outputs"},
    {"scoring"},
    {"generation"},
    {"batch", "conversation", "bench", "multiple_choice"},
    {"integrations"},
    {"cli"},
]
KNOWS_TORCH_XLA = {"xla"}
HOLDS_NO_TENSORS = {
    "arguments",
    "config",
    "environment",
    "errors",
    "gguf_header",
    "gguf_settings",
    "ranks",
    "regular_files",
    "sampling_params",
    "settings",
    "sharding",
    "wire_format",
    "planning",
    "quantization",
    "storage",
    "startup",
    "grammar",
    "detokenizer",
    "tokenizer",
    "inputs",
    "scoring",
    "multiple_choice",
    "batch",
    "chat",
    "cli",
}


def modules() -> list[tuple[str, Path]]:
    """(room, file) of every module; a package is one room."""
    return [
        (p.relative_to(ROOT).parts[0].removesuffix(".py"), p)
        for p in sorted(ROOT.rglob("*.py"))
        if p != ROOT / "__init__.py"
    ]


def module_name(path: Path) -> str:
    return ".".join(("llama", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


PATHS = {module_name(path): path for _, path in modules()}


def imported(path: Path) -> set[str]:
    """The modules that a file imports at run time, at its top or inside a function.

    Imports for type checkers do not count. ``from package import module`` counts for the module, not for the package.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in PATHS else str(node.module) for name in names}
    return found


def rank(room: str) -> int:
    return next(i for i, rooms in enumerate(LADDER) if room in rooms)


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: value if isinstance(value, str) else value.stem)
def test_imports_run_one_way(room: str, path: Path) -> None:
    """No room imports a higher one, and every room has its place on the ladder."""
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("llama.")}
    upward = [other for other in rooms if rank(other) > rank(room)]
    assert not upward, f"{path.name} imports {upward}, which stand above it"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, the first of them repeated at the end; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Neither within a room nor across rooms of one rank, not even by an import inside a function."""
    found = circle({name: imported(path) & PATHS.keys() for name, path in PATHS.items()})
    assert not found, " imports ".join(reversed(found))


def test_a_circle_is_found() -> None:
    """The test above can fail: here a imports b, which imports c, which imports a."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: value if isinstance(value, str) else value.stem)
def test_one_place_knows_torch_xla(room: str, path: Path) -> None:
    """torch_xla's names change with every release; they are met in these rooms only. Some rooms hold no tensors at
    all.
    """
    roots = {name.split(".")[0] for name in imported(path)}
    assert room in KNOWS_TORCH_XLA or "torch_xla" not in roots
    assert room not in HOLDS_NO_TENSORS or "torch" not in roots


def test_the_ladder_names_every_room() -> None:
    """A new module needs a place, and a removed one leaves the ladder."""
    assert {room for room, _ in modules()} - {"demo"} == set().union(*LADDER)


def test_importing_starts_nothing() -> None:
    """`import llama` imports no torch; importing every module imports no torch_xla and starts no device."""
    code = f"""
import sys, importlib, llama
assert "torch" not in sys.modules
for name in {list(PATHS)!r}:
    importlib.import_module(name)
assert "torch_xla" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exports_resolve() -> None:
    """What __all__ promises can be imported, and nothing else pretends to."""
    assert all(getattr(llama, name) is not None for name in llama.__all__)
    assert set(llama._HOME) | {"__version__"} == set(llama.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Lama'"):
        _ = llama.Lama
