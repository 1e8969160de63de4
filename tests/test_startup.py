"""From the start of a process to its first token: what is imported, what is timed, and what Ctrl-C does meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import PROCESS_TIMEOUT_S, ROOT, Outcome, finished, process

from llama.startup import PHASES, Startup, process_start

GENERATE = ["-m", "llama.cli", "generate", "--temperature", "0", "--max_gen_len", "2"]
HEAVY = ["sympy", "networkx", "triton", "torch._dynamo", "torch._inductor", "functorch", "torch_xla.stablehlo"]
OPTIONAL = ["jinja2", "tokenizers", "tiktoken", "llguidance", "fairscale", "transformers", "matplotlib"]
AT_THE_DEVICE = ["torch", "torch_xla", "numpy", "tqdm", "safetensors", "psutil", "sentencepiece"]


def python(code: str) -> str:
    """stdout of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    return done.stdout


# -------------------------------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], [*HEAVY, *OPTIONAL, *AT_THE_DEVICE, "fire"]),
        (["generate", "--help"], [*HEAVY, *OPTIONAL, *AT_THE_DEVICE, "fire"]),
        (["plan", "--prompt_len", "9"], [*HEAVY, *OPTIONAL, *AT_THE_DEVICE]),
        (["inspect", "llama/demo"], [*HEAVY, "jinja2", "tokenizers", "tiktoken", "llguidance", "fairscale"]),
        pytest.param(GENERATE[2:], [*HEAVY, *OPTIONAL], marks=pytest.mark.slow),
    ],
    ids=["help", "generate-help", "plan", "inspect", "generate"],
)
def test_a_command_imports_what_it_uses(arguments: Sequence[str], absent: Sequence[str]) -> None:
    """What a command does not need costs none of its time."""
    code = f"""
import sys
from llama.cli import main
try:
    main({list(arguments)!r})
except SystemExit as end:
    assert not end.code, end.code
print([name for name in {list(absent)!r} if name in sys.modules])
"""
    assert python(code).splitlines()[-1] == "[]"


@pytest.mark.slow
def test_what_is_deferred_still_works() -> None:
    """Whoever uses torch_xla fully in the same process finds everything that a plain import gives."""
    python("""
import sys, torch
original = torch.nn.GRU
from llama.xla import backend
backend.init()
import torch_xla

assert "torch._dynamo" not in sys.modules
assert torch.nn.Linear and not hasattr(torch.nn, "Frobnicate") and not hasattr(torch_xla, "frobnicate")
# settings that torch_xla makes when it is imported
assert torch._dynamo.config.automatic_dynamic_shapes is False and torch._dynamo.config.specialize_float is True
assert torch._dynamo.config is sys.modules["torch._dynamo.config"]
# its GRU in place of torch's
assert torch.nn.GRU.__module__ == "torch_xla.experimental.gru" and torch.nn.GRU._orig is original
assert issubclass(torch.nn.GRU, original)
# the export, by each of its names
import torch_xla.stablehlo as by_name
assert torch_xla.stablehlo is by_name and torch_xla.save_as_stablehlo is by_name.save_as_stablehlo
assert torch_xla.save_torch_model_as_stablehlo is by_name.save_torch_model_as_stablehlo
assert torch_xla.experimental.scan.scan and torch_xla.experimental.gru.GRU is torch.nn.GRU
# and torch.compile
double = torch.compile(lambda x: x * 2, backend="openxla")
assert double(torch.ones(2, device="xla")).cpu().tolist() == [2, 2]
exported = torch.export.export(torch.nn.Linear(2, 1), (torch.ones(1, 2),))
assert "stablehlo" in by_name.exported_program_to_stablehlo(exported).get_stablehlo_text()
""")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["from torch_xla.experimental.gru import GRU", "from torch.nn import GRU"])
def test_a_deferred_layer_may_be_imported_first(first: str) -> None:
    """The module of the GRU asks torch for its own base class while it is imported."""
    python(f"""
import torch
original = torch.nn.GRU
from llama.xla import backend
backend.init()
{first}
assert GRU is torch.nn.GRU and GRU._orig is original and GRU is not original
""")


def test_a_torch_xla_that_is_imported_already_stays_as_it_is() -> None:
    python("""
import torch, torch_xla
gru = torch.nn.GRU
from llama.xla import backend
backend.init()
assert torch.nn.GRU is gru and torch_xla.stablehlo
""")


# -------------------------------------------------------------------------------------------------------------- timings


def test_every_moment_counts_for_one_phase() -> None:
    startup = Startup(since=100.0)
    startup.enter("load", 103.0)
    startup.enter("import", 103.5)
    startup.enter("compile", 104.5)
    startup.first_token(submitted=106.0, at=106.25, programs=2)
    startup.first_token(submitted=200.0, at=201.0, programs=9)
    startup.enter("load", 300.0)
    with startup.within("device"):
        pass
    assert startup.seconds == {"import": 4.0, "device": 0.0, "load": 0.5, "compile": 1.5, "prefill": 0.25}
    assert startup.as_json() == {
        "import_s": 4.0,
        "device_s": 0.0,
        "load_s": 0.5,
        "compile_s": 1.5,
        "prefill_s": 0.25,
        "total_s": 6.25,
        "programs": 2,
    }
    assert list(startup.table())[-1].split() == ["first", "token", "6.25", "s", "100.0%"]
    assert len(set(map(len, startup.table()))) == 1


def test_the_process_start_is_that_of_the_operating_system() -> None:
    import psutil

    since = time.time() - (time.perf_counter() - process_start())
    assert abs(psutil.Process().create_time() - since) < 1.5  # psutil knows the boot to a second


@pytest.mark.slow
def test_timings_account_for_the_whole_start() -> None:
    """The five phases add up to the time that a clock outside the process shows."""
    began = time.perf_counter()
    with process([*GENERATE, "--timings", "--json", "--stream", "--verbose"]) as running:
        assert running.stdout is not None
        first = running.stdout.readline()
        took = time.perf_counter() - began
        rest, err = running.communicate(timeout=PROCESS_TIMEOUT_S)
    (result,) = Outcome(running.returncode, first + rest, err).results
    startup = result["startup"]
    phases = [startup[f"{phase}_s"] for phase in PHASES]
    assert sum(phases) == pytest.approx(startup["total_s"], rel=0.05)
    assert startup["total_s"] == pytest.approx(took, rel=0.05, abs=0.1)
    assert all(value > 0 for value in phases)
    assert startup["programs"] == result["programs"]["compiled"] > 0
    assert "Importing torch, about" in err.splitlines()[0]
    phases_told, speeds = err.splitlines()[-2:]
    summary = dict(part.split()[:2] for part in phases_told.split(", ")[:4])
    assert sum(map(float, summary.values())) == pytest.approx(startup["total_s"] - startup["prefill_s"], abs=0.05)
    assert speeds.endswith(f"; first token {startup['total_s']:.2f} s after the command began")


@pytest.mark.slow
def test_timings_are_a_table_in_the_log() -> None:
    outcome = finished([*GENERATE, "--timings"])
    lines = outcome.err.splitlines()
    at = lines.index("Process start to first token:") + 1
    assert [line.split()[0] for line in lines[at : at + 6]] == [*PHASES, "first"]
    assert all(line.endswith("%") for line in lines[at : at + 6])


# --------------------------------------------------------------------------------------------------------------- Ctrl-C

SLOW_COMPILE = ["--random_weights", "--dim", "256", "--n_layers", "24", "--n_heads", "8", "--buckets", "512,64,8,1"]


def interrupted(arguments: Sequence[str], at: str, times: int = 1, after_s: float = 0.3) -> Outcome:
    """Press Ctrl-C after a line with these words; ``times`` times."""
    with process(arguments, stdin=subprocess.DEVNULL if "chat" not in arguments else subprocess.PIPE) as running:
        assert running.stderr is not None
        if running.stdin is not None:
            running.stdin.write("the cat\n")
            running.stdin.close()
            running.stdin = None
        seen = ""
        while at not in seen:
            line = running.stderr.readline()
            assert line, seen
            seen += line
        for _ in range(times):
            time.sleep(after_s)
            running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PROCESS_TIMEOUT_S)
    return Outcome(running.returncode, out, seen + err)


@pytest.fixture
def generate_slowly(tokenizer_path: Path) -> list[str]:
    shape = [*SLOW_COMPILE, "--tokenizer_path", str(tokenizer_path), "--prompt_len", "1200", "--max_seq_len", "2048"]
    return ["-m", "llama.cli", "generate", *shape, "--max_gen_len", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("output", [[], ["--json"]])
def test_ctrl_c_while_compiling(generate_slowly: list[str], output: list[str]) -> None:
    """A real SIGINT within XLA's compiler: the command ends after that program, without a result."""
    outcome = interrupted([*generate_slowly, "--verbose", *output], at="Compiled (admit)")
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.message == "llama-xla: interrupted while compiling"
    assert outcome.err.count("Compiled ") == 2  # the first is compiled in no time
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_a_second_ctrl_c_while_compiling_ends_at_once(generate_slowly: list[str]) -> None:
    """Python would see neither before the program is compiled."""
    outcome = interrupted([*generate_slowly, "--verbose"], at="Compiled (admit)", times=2, after_s=0.1)
    assert (outcome.code, outcome.out) == (-signal.SIGINT, "")
    assert outcome.err.count("Compiled ") == 1


@pytest.mark.slow
def test_ctrl_c_while_a_chat_compiles(tiny_checkpoint: Path) -> None:
    chat = ["-m", "llama.cli", "chat", "--ckpt_dir", str(tiny_checkpoint), "--chat_format", "llama2", "--verbose"]
    outcome = interrupted(chat, at="Compiling", after_s=0.05)
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.message == "llama-xla: interrupted while compiling"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "after_s"),
    [("Importing", 0.0), ("Importing", 0.1), ("Importing", 0.5), ("Importing", 1.0), ("Loading", 0.0)],
)
def test_ctrl_c_while_importing_and_loading(at: str, after_s: float) -> None:
    """One line, the exit code, no traceback, whatever is being imported: there is nothing to keep yet.

    The bug: a KeyboardInterrupt within torch_xla's import could be printed as ignored, and the command ran on.
    """
    outcome = interrupted(GENERATE, at, after_s=after_s)
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.message == "llama-xla: interrupted"
    assert "Traceback" not in outcome.err
