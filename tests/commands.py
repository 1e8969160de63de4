"""Run the command line in a test: in this process, or in a separate one.

A separate process is for tests of signals, pipes and imports.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from llama import cli

ROOT = Path(__file__).parent.parent
PROCESS_TIMEOUT_S = 300
DUMPS = "*after_optimizations.txt"


class Outcome(NamedTuple):
    """The exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        """stdout as JSON, one object a line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def results(self) -> list[dict[str, Any]]:
        """The objects that complete a prompt."""
        return [o for o in self.objects if "piece" not in o]

    @property
    def message(self) -> str:
        """The last line of stderr."""
        return (self.err.splitlines() or [""])[-1]


Run = Callable[..., Outcome]


def exit_code(arguments: Sequence[str]) -> int:
    """The exit code of the process if these were its arguments."""
    try:
        return cli._exit_code(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


def refused_at_once(outcome: Outcome, *words: str) -> None:
    """Assert a refusal before loading: exit code 2, no stdout, one line on stderr with these words."""
    assert outcome.err.count("\n") == 1, outcome.err
    refused(outcome, *words)


def refused(outcome: Outcome, *words: str) -> None:
    """Assert exit code 2, no stdout, and a last line on stderr with these words.

    Before that line, only the log of loading a model may be there.
    """
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    *logged, message = outcome.err.splitlines()
    assert all(re.match(r"Importing torch, about \d+ s$|Loading ", line) for line in logged), outcome.err
    assert message.startswith("llama-xla: ")
    assert [word for word in words if word not in message] == [], message


def process(arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start Python in the repository's root, with stdout and stderr as pipes by default."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONUNBUFFERED", "PYTHONIOENCODING")}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": env, **options}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, encoding="utf-8", **options)


def dumped_program(code: str, directory: Path) -> Path:
    """Run code that compiles one program; return XLA's dump of its optimised HLO. Beside it there may be the small one
    that makes an empty cache.
    """
    _run_dumping(code, directory)
    return _largest(directory.glob(DUMPS))


def dumped_programs(code: str, programs: Sequence[str], directory: Path) -> list[str]:
    """Run code that makes ``llm``, compile its programs one after the other; return the optimised HLO of each."""
    each = f"""
from pathlib import Path
for program in [{", ".join(programs)}]:
    llm.engine.runner.compile([program])
    print(len(list(Path({str(directory)!r}).glob({DUMPS!r}))))
"""
    counts = [int(line) for line in _run_dumping(code + each, directory).splitlines()]
    dumps = sorted(directory.glob(DUMPS))  # by the number that XLA gives each
    return [_largest(dumps[begin:end]).read_text() for begin, end in pairwise([0, *counts])]


def _run_dumping(code: str, directory: Path) -> str:
    """stdout of code whose programs XLA dumps. LLVM's optimisation comes after the HLO's, and would only take time."""
    flags = f"--xla_dump_to={directory} --xla_dump_hlo_as_text --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _largest(dumps: Iterable[Path]) -> Path:
    return max(dumps, key=lambda dump: dump.stat().st_size)


def finished(arguments: Sequence[str]) -> Outcome:
    """Run such a process to its end and return its outcome."""
    with process(arguments) as running:
        out, err = running.communicate(timeout=PROCESS_TIMEOUT_S)
    return Outcome(running.returncode, out, err)
