"""What the device has been asked to do since the process began: compiles, runs, transfers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch


@dataclass
class Counters:
    """What the device has been asked to do since the process began.

    Attributes:
        compiled: programs compiled through ``compile_program``.
        expected: computations that XLA compiled for them; fewer, where it had compiled the same graph before.
        compile_s: seconds that tracing and compiling them took.
        runs: runs of programs that read the model's weights.
        edits: runs of small programs that put requests into slots, copy, move and end them.
        fetches: transfers from the device to the host.
        fetched_bytes: what they carried.
        uploads: tensors that the host gave to the device.
        uploaded_bytes: what they held.
    """

    compiled: int = 0
    expected: int = 0
    compile_s: float = 0.0
    runs: int = 0
    edits: int = 0
    fetches: int = 0
    fetched_bytes: int = 0
    uploads: int = 0
    uploaded_bytes: int = 0

    def sent(self, tensor: torch.Tensor) -> None:
        """Count a tensor that goes to the device."""
        self.uploads += 1
        self.uploaded_bytes += tensor.nbytes


counters = Counters()


def xla_compilations() -> int:
    """How many computations XLA itself has compiled in this process, by torch_xla's own counter.

    Independent of ``counters.compiled``: a compile that slips past ``compile_program`` shows here.
    """
    import torch_xla.debug.metrics as metrics

    data = metrics.metric_data("CompileTime")
    return int(data[0]) if data else 0


def fallback_ops() -> Counter[str]:
    """Operations that torch_xla has run on the host because XLA lacks them, and how often."""
    import torch_xla.debug.metrics as metrics

    return Counter({op: metrics.counter_value(op) for op in metrics.executed_fallback_ops()})


def surprises() -> int:
    """How many computations XLA has compiled outside ``compile_program``; a call may compare two moments."""
    return xla_compilations() - counters.expected
