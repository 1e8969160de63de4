"""What a pickle would run if it were loaded without restrictions. Its instructions are read, none is obeyed."""

from __future__ import annotations

import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from pathlib import Path

MOST_BYTES = 16 * 2**20  # of a pickle that are read: tensors lie beside it, so that a checkpoint's has some 100 kB
MOST_NAMES = 3  # in a message
LONGEST_NAME = 80  # characters in a message
LONGEST_TRIED = 1000  # characters
_HARMLESS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w*Storage|collections\.OrderedDict"
    r"|torch\.(b?float\d+\w*|u?int\d+|bool|complex\d+|Size|device|Tensor)"
)


def would_run(path: Path) -> str:
    """The classes and functions that a file's pickle names, besides those that tensors are made of, for a message.

    Args:
        path: an archive that torch.save wrote, or a bare pickle.

    Returns:
        module.name of the first few; empty if there are none.
    """
    names = [name for name in dict.fromkeys(_names(_pickled(path))) if not _HARMLESS.fullmatch(name)]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(_printable(name) for name in names[:MOST_NAMES]) + more


def check_names(path: Path) -> None:
    """Refuse names so long that torch must not see them: it searches its own message about one in quadratic time.

    Raises:
        ValueError: there is one.
    """
    if any(len(name) > LONGEST_TRIED for name in _names(_pickled(path))):
        raise ValueError(f"it names something with more than {LONGEST_TRIED} characters")


def _pickled(path: Path) -> bytes:
    """The beginning of a file's pickle; empty if there is none."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return file.read(MOST_BYTES)
        with zipfile.ZipFile(path) as archive:
            name = next((each for each in archive.namelist() if each.endswith("data.pkl")), None)
            if name is None:
                return b""
            with archive.open(name) as record:
                return record.read(MOST_BYTES)
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError):
        return b""


def _names(data: bytes) -> Iterator[str]:
    """module.name for every instruction that looks one up, up to the first that is damaged."""
    texts: list[str] = []  # as they are pushed; a name's module and the name are the last two
    memo: dict[int, str] = {}
    try:
        for code, argument, _ in pickletools.genops(data):
            if code.name in ("GLOBAL", "INST"):
                yield _name(*str(argument).split(" ", 1))
            elif code.name == "STACK_GLOBAL" and len(texts) > 1:
                yield _name(*texts[-2:])
            elif code.name == "MEMOIZE":
                memo[len(memo)] = texts[-1] if texts else ""
            elif "PUT" in code.name and isinstance(argument, int):
                memo[argument] = texts[-1] if texts else ""
            elif "GET" in code.name and isinstance(argument, int):
                texts.append(memo.get(argument, "?"))
            elif isinstance(argument, str) and "PERSID" not in code.name:
                texts.append(argument)
    except Exception:  # what cannot be parsed any further is not run either
        return


def _name(module: str, name: str = "?") -> str:
    """A global's name in Python 3: the protocols up to 2 write Python 2's."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name[:LONGEST_NAME])
