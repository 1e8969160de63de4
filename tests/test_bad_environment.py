"""Environments that name no usable device, and processes that were forked: a message and an exit code, never a crash.

torch_xla answers an unknown device with a C++ stack trace, and a CPU_NUM_DEVICES that is no count with a segmentation
fault.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest
from commands import Run, refused
from conftest import TINY, LLMFactory
from fakes import fake_llm

from llama import EngineConfig, LLaMA, environment
from llama.config import DEMO_DIR
from llama.environment import check_environment
from llama.errors import ConfigError
from llama.xla import backend

RANDOM = ["generate", "--random_weights", "--dim", "16", "--n_layers", "1", "--n_heads", "2", "--prompt", "a"]


@pytest.mark.parametrize("device", ["", " ", "cpu", "CUDA", "GPU", "FOO", "CPU,TPU", "CPU:0", "\u00e9", "x" * 5000])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=r"^PJRT_DEVICE: got .*expected .*\(CPU, in capitals\)") as raised:
        check_environment({"PJRT_DEVICE": device})
    assert len(str(raised.value)) < 400


def test_a_tpu_needs_its_library(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The library may be a package, or a file that the environment names."""
    with monkeypatch.context() as patch:  # Python itself asks for modules by this name, too
        patch.setattr(environment, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"libtpu is not installed.*pip install -e \.\[tpu\]"):
            check_environment({"PJRT_DEVICE": "TPU"})
        with pytest.raises(ConfigError, match=r"^PJRT_DEVICE: got 'NEURON'.*libneuronxla"):
            check_environment({"PJRT_DEVICE": "NEURON"})
        with pytest.raises(ConfigError, match=r"^TPU_LIBRARY_PATH: got .*absent.so"):
            check_environment({"PJRT_DEVICE": "TPU", "TPU_LIBRARY_PATH": f"{tmp_path}/absent.so"})
        check_environment({"PJRT_DEVICE": "TPU", "TPU_LIBRARY_PATH": __file__})
        patch.setattr(environment, "find_spec", lambda name: name == "libtpu" or None)
        check_environment({"PJRT_DEVICE": "TPU"})


@pytest.mark.parametrize("count", ["", " ", "0", "00", "-1", "x", "2x", "1.5", "1e3", "99999", "9" * 5000, "\u0662"])
@pytest.mark.parametrize("device", ["CPU", None])
def test_a_count_of_cpu_devices_is_a_positive_number(count: str, device: str | None) -> None:
    environment = {"CPU_NUM_DEVICES": count} | ({} if device is None else {"PJRT_DEVICE": device})
    with pytest.raises(ConfigError, match=r"^CPU_NUM_DEVICES: got .*expected"):
        check_environment(environment)


@pytest.mark.parametrize("count", ["1", "2", " 4", "08", "64"])
def test_counts_that_torch_xla_reads(count: str) -> None:
    check_environment({"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": count})


@pytest.mark.parametrize("name", ["PJRT_DEVICE", "CPU_NUM_DEVICES"])
def test_the_command_line_ends_with_code_2(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Checked whether or not torch_xla has been imported, before anything is loaded."""
    monkeypatch.setenv(name, "x")
    refused(run(*RANDOM), f"{name}: got 'x'", "expected")


def test_a_device_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch_xla's many lines the first one is shown."""

    def fails(*mesh: object) -> None:
        raise RuntimeError("Failed to open the device\n*** Begin stack trace ***\n\ttsl::CurrentStackTrace()")

    monkeypatch.setattr(backend.mesh, "start", fails)
    with pytest.raises(ConfigError, match=r"^PJRT_DEVICE: CPU cannot be started: Failed to open the device; [^\n]*$"):
        backend.init()


def test_a_device_whose_count_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several devices the client starts when they are counted."""

    def fails() -> None:
        raise RuntimeError("Failed to open the device\n*** Begin stack trace ***")

    monkeypatch.setattr("llama.loading.mesh.device_count", fails)
    with pytest.raises(ConfigError, match="cannot be started: Failed to open the device"):
        LLaMA.build(
            random_weights=replace(TINY, vocab_size=1024),
            config=EngineConfig(max_batch_size=2, max_seq_len=64, tensor_parallel=2),
        )


def in_fork(call: Callable[[], object], timeout_s: int = 20) -> str:
    """What a call raises in a forked process; the process is ended by a signal if it takes longer than that."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(timeout_s)
            call()
            os.write(write, b"nothing")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text


CALLS: dict[str, Callable[[LLaMA], object]] = {
    "generate": lambda llm: llm.generate("a", max_gen_len=2),
    "stream": lambda llm: list(llm.stream("a", max_gen_len=2)),
    "score": lambda llm: llm.score(["a"], [" b c"]),
    "rolling": lambda llm: llm.rolling(["a b"]),
    "text_completion": lambda llm: llm.text_completion(["a"], max_gen_len=2),
    "warm_up": lambda llm: llm.warm_up(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_forked_process_is_refused(name: str) -> None:
    """It would wait for ever for threads that a fork does not copy; the parent works on."""
    llm = fake_llm(DEMO_DIR / "tokenizer.model")
    said = in_fork(lambda: CALLS[name](llm))
    assert said.startswith(f"EngineError: the model was loaded in process {os.getpid()}")
    assert "spawn" in said
    CALLS[name](llm)


def test_a_call_that_was_open_at_the_fork_is_refused() -> None:
    llm = fake_llm(DEMO_DIR / "tokenizer.model")
    stream = llm.stream("a", max_gen_len=60)
    next(stream)
    assert in_fork(lambda: list(stream)).startswith("EngineError: the model was loaded in process")
    assert list(stream)


def test_a_model_that_is_loaded_in_a_fork(make_llm: LLMFactory) -> None:
    """The process that was forked after the device was started cannot start another one."""
    llm = make_llm()
    assert in_fork(lambda: llm.generate("a", max_gen_len=2)).startswith("EngineError: the model was loaded")
    said = in_fork(lambda: LLaMA.build(random_weights=replace(TINY, vocab_size=1024)))
    assert "spawn" in said
    assert said.startswith("EngineError: the device was started in process")
