"""A Runner in a process of its own: ``Child`` is the parent's handle, ``python -m llama.bench.child`` the process.

One JSON object a line, through pipes: the process says its facts once it is warm, answers ``run`` and ``decode_at N``
with the times of a run, and ends when its stdin does. Whatever the runner itself prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from llama.bench.workload import Times, Workload
from llama.errors import ConfigError, LLaMAError


class Child:
    """A process that holds one warm Runner.

    Args:
        runner: a name of ``workload.RUNNERS``.

    Attributes:
        facts: what the runner says of itself.

    Raises:
        ConfigError: the runner refused the workload, or ended.
    """

    def __init__(self, runner: str, work: Workload) -> None:
        self.runner = runner
        command = [sys.executable, "-m", "llama.bench.child", runner, work.to_json()]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            self.facts: dict[str, Any] = self._answer()
        except BaseException:  # an interrupt, too: nobody else knows the process yet
            self.close()
            raise

    def run(self) -> Times:
        """One run, timed by the process itself; ``facts`` gets its peak memory so far.

        Raises:
            ConfigError: the runner failed.
        """
        return self._timed("run")

    def decode_at(self, position: int) -> Times:
        """Decode at one of the workload's depths; otherwise as ``run``."""
        return self._timed(f"decode_at {position}")

    def _timed(self, request: str) -> Times:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: _answer says how
            self._process.stdin.write(f"{request}\n")
            self._process.stdin.flush()
        answer = self._answer()
        self.facts["peak_bytes"] = answer.pop("peak_bytes")
        return Times(**answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise ConfigError(
                f"the benchmark of {self.runner} ended with code {self._process.returncode}: {errors.strip()[-500:]}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise ConfigError(answer["error"])
        return answer


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def serve(runner_name: str, work: Workload) -> None:
    """What the process does."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may stand between the answers

    def say(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    began = time.perf_counter()
    try:
        if runner_name == "ours":
            from llama.bench.ours import OursRunner as Runner
        elif runner_name == "hf":
            from llama.bench.peers import HuggingFaceRunner as Runner  # type: ignore[assignment]
        else:
            from llama.bench.peers import LlamaCppRunner as Runner  # type: ignore[assignment]
        imported = time.perf_counter() - began
        runner = Runner(work)
        say({"import_s": imported, **runner.facts, "ready_s": time.perf_counter() - began})
        for line in sys.stdin:
            _, _, position = line.partition(" ")
            times = runner.decode_at(int(position)) if position else runner.run()
            say({**asdict(times), "peak_bytes": peak_bytes()})
    except LLaMAError as error:
        say({"error": str(error)})


if __name__ == "__main__":
    serve(sys.argv[1], Workload.from_json(sys.argv[2]))
