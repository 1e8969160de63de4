"""Processes whose streams are closed, full or gone, or whose environment is broken: the result where it can be had, one
line where it cannot, and never a traceback or a wait without an end.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import ROOT, Outcome

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.path.exists("/dev/full") or shutil.which("bash") is None, reason="the lines are bash's, on Linux"
    ),
]

TIMEOUT_S = 120
PLAN, INSPECT = "plan --prompt_len 9", "inspect llama/demo"
REFUSED = "generate --max_gen_len x"
GENERATE = "generate 'Once upon a time' --max_gen_len 3 --temperature 0"
STORY = "generate --max_gen_len 3 --temperature 0 --json"


class Broken(NamedTuple):
    """A command in an environment, and what comes of it.

    Attributes:
        line: for bash; ``X`` stands for llama-xla.
        code: the exit code.
        out: a part of stdout; None where nothing may be there.
        err: a part of the one line on stderr; None where it may hold the log, or nothing.
    """

    line: str
    code: int
    out: str | None = None
    err: str | None = None


ENVIRONMENTS = [
    # stdout
    Broken(f"X {PLAN} >&-", 2, err="stdout is closed"),
    Broken("X --help >&-", 2, err="stdout is closed"),
    Broken(f"X {GENERATE} >&-", 2, err="stdout is closed"),
    Broken(f"X {PLAN} >/dev/full", 2, err="No space left on device"),
    Broken("X help generate >/dev/full", 2, err="No space left on device"),
    Broken(f"PYTHONUNBUFFERED=1 X {PLAN} --json >/dev/full", 2, err="No space left on device"),
    Broken(f"X {GENERATE} --quiet --stream --json >/dev/full", 2, err="No space left on device"),
    # coverage, which may count what runs here, would write a file, too
    Broken(f"(ulimit -f 0; unset COVERAGE_PROCESS_CONFIG; X {PLAN} >too-large)", 2, err="File too large"),
    Broken(f"X {PLAN} 1</dev/null", 2, err="Bad file descriptor"),
    Broken(f"set -o pipefail; X {PLAN} | exit 0", 141),
    # stderr
    Broken(f"X {PLAN} 2>&-", 0, out="2 sections"),
    Broken(f"X {GENERATE} 2>&-", 0, out=", in a"),
    Broken(f"X {GENERATE} --verbose 2>/dev/full", 0, out=", in a"),
    Broken(f"X {REFUSED} 2>&-", 2),
    Broken(f"X {REFUSED} 2>/dev/full", 2),
    Broken(f"PYTHONUNBUFFERED=1 X {REFUSED} 2>/dev/full", 2),
    Broken("X 2>/dev/full", 2),
    # stdin
    Broken(f"X {PLAN} <&-", 0, out="2 sections"),
    Broken(f"X {STORY} --quiet <&-", 0, out='"prompt": "Once upon a time"'),
    Broken("X generate --prompts_file - <&-", 2, err="got no prompts"),
    Broken("X chat --ckpt_dir llama/demo <&-", 2, err="stdin: got nothing"),
    Broken("X chat --ckpt_dir llama/demo 0>/dev/null", 2, err="stdin: "),
    Broken("printf 'a\\xff' | X chat --ckpt_dir llama/demo", 2, err="stdin is not UTF-8"),
    # all of them
    Broken(f"X {PLAN} <&- >&- 2>&-", 2),
    Broken(f"X {PLAN} <&- 2>&-", 0, out="2 sections"),
    # variables
    Broken(f"env -u HOME -u USER X {PLAN}", 0, out="2 sections"),
    Broken(f"env -u PATH X {PLAN}", 0, out="2 sections"),
    Broken(f"env -i X {PLAN}", 0, out="2 sections"),
    Broken(f"env -i TMPDIR=/nowhere HOME=/dev/null TERM=dumb COLUMNS=1 X {GENERATE}", 0, out=", in a"),
    Broken(f"env -u HOME LC_ALL=C LANG=C TERM=dumb COLUMNS=1 LINES=0 X {PLAN}", 0, out="2 sections"),
    Broken("COLUMNS=x TERM= X help chat", 0, out="--ckpt_dir"),
    Broken(f"LC_ALL=nowhere PYTHONIOENCODING=ascii X {GENERATE} --prompt caf\u00e9 --echo", 2, err="beside --prompt"),
    Broken("HF_HOME=/dev/null HOME= X inspect org/model", 2, err="no such directory: org/model"),
    Broken("XDG_CACHE_HOME=nowhere X inspect org/model", 2, err="nowhere/huggingface/hub"),
    Broken(f"RANK=x X {PLAN}", 2, err="RANK: got 'x'"),
    Broken(f"PJRT_DEVICE=x X {PLAN}", 0, out="2 sections"),
    Broken(f"PJRT_DEVICE=x X {GENERATE}", 2, err="PJRT_DEVICE: got 'x'"),
    Broken(f"PJRT_DEVICE= X {GENERATE}", 2, err="PJRT_DEVICE: got ''"),
    Broken(f"PJRT_DEVICE=cpu X {STORY} --prompt a", 2, err="PJRT_DEVICE: got 'cpu'"),
    Broken("echo Hi | PJRT_DEVICE=x X chat --ckpt_dir llama/demo --chat_format llama2", 2, err="PJRT_DEVICE: got 'x'"),
    Broken(f"PJRT_DEVICE=CPU CPU_NUM_DEVICES=0 X {GENERATE}", 2, err="CPU_NUM_DEVICES: got '0'"),
    # the current directory
    Broken(f"mkdir gone && cd gone && rmdir ../gone && X {INSPECT}", 2, err="the current directory"),
    Broken("mkdir gone && cd gone && rmdir ../gone && X --help", 0, out="llama-xla generate"),
]


def outcome_of(line: str, directory: Path) -> Outcome:
    """Run a line in a directory that holds a link to the package."""
    (directory / "llama").symlink_to(ROOT / "llama")
    program = f"env PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)} -m llama.cli"
    done = subprocess.run(
        [shutil.which("bash") or "bash", "-c", line.replace("X ", f"{program} ")],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_the_table_is_long_enough() -> None:
    assert len({each.line for each in ENVIRONMENTS}) == len(ENVIRONMENTS) >= 24


@pytest.mark.parametrize("broken", ENVIRONMENTS, ids=[each.line for each in ENVIRONMENTS])
def test_a_broken_environment(broken: Broken, tmp_path: Path) -> None:
    """The result is there, or one line says why not; what cannot be printed is lost in silence."""
    outcome = outcome_of(broken.line, tmp_path)
    assert outcome.code == broken.code, outcome
    assert "Traceback" not in outcome.out + outcome.err
    assert "Exception ignored" not in outcome.err
    assert (broken.out or "") in outcome.out
    assert broken.out is not None or outcome.out == ""
    if broken.err is not None:
        assert outcome.err.count("\n") == 1, outcome.err
        assert outcome.err.startswith("llama-xla: ")
        assert broken.err in outcome.err


def test_a_stderr_whose_reader_is_gone_loses_no_result(tmp_path: Path) -> None:
    """As with ``2> >(head -1)``: the log ends, the text does not, and it is not taken for a closed stdout."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "llama.cli", *shlex.split(GENERATE)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=writing,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stdout) == (0, ", in a\n")


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """The descriptors of closed streams are the null device's before a command opens files."""
    code = (
        "import os; from llama.cli import streams; streams.mend(); "
        "print([os.path.realpath(f'/proc/self/fd/{fd}') for fd in (0, 2)], os.open('/dev/zero', 0) > 2)"
    )
    line = f"PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- 2>&-"
    done = subprocess.run(["bash", "-c", line], stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True)
    assert done.stdout == "['/dev/null', '/dev/null'] True\n"
