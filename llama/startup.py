"""The phases from the start of a process to its first token, and the seconds that each took."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

Phase = Literal["import", "device", "load", "compile", "prefill"]
PHASES: tuple[Phase, ...] = get_args(Phase)
STARTTIME_FIELD = 22  # of /proc/self/stat, proc(5)


def process_start() -> float:
    """When this process began, as ``time.perf_counter`` would have read then; to 0.01 s."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()  # from the third on
    started = int(fields[STARTTIME_FIELD - 3]) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started)


@dataclass
class Startup:
    """A stopwatch: every moment from ``since`` to the first token counts for exactly one phase.

    Attributes:
        since: when the current phase began, by ``time.perf_counter``; first, the start of the process or of loading.
        phase: the current one; None after the first token.
        seconds: of each phase so far.
        programs: how many were compiled before the first token.
    """

    since: float = field(default_factory=time.perf_counter)
    phase: Phase | None = "import"
    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    programs: int = 0

    def enter(self, phase: Phase | None, at: float | None = None) -> None:
        """Begin a phase now, or at an earlier moment; after the first token nothing counts any more."""
        if self.phase is not None:
            now = time.perf_counter() if at is None else at
            self.seconds[self.phase] += now - self.since
            self.phase, self.since = phase, now

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Within: this phase; afterwards the one before goes on."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def first_token(self, submitted: float, at: float, programs: int) -> None:
        """Note the first token, once: when its request was submitted and when it was on the host."""
        if self.phase is not None:
            self.enter("prefill", submitted)
            self.enter(None, at)
            self.programs = programs

    @property
    def total_s(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, float | int]:
        """The object ``startup`` that ``--json --timings`` prints."""
        phases = {f"{phase}_s": round(value, 6) for phase, value in self.seconds.items()}
        return {**phases, "total_s": round(self.total_s, 6), "programs": self.programs}

    def table(self) -> Iterator[str]:
        """Yield a line for each phase, and one for their sum: seconds and share."""
        for name, value in (*self.seconds.items(), ("first token", self.total_s)):
            yield f"{name:<11} {value:7.2f} s {value / self.total_s:6.1%}"
