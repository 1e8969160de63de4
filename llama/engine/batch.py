"""One batch on its way: the device's state, what the host knows of the rows, and the late reading of what is new.

Shapes: B batch rows, T chunk length, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

from llama.compiled.steps import REPORT_WINDOW, Head, Known, State
from llama.engine.request import Controls, Kinds, Request, Shaping
from llama.xla import transfers
from llama.xla.counters import counters

FinishReason = Literal["stop", "length", "interrupted"]


class Details(NamedTuple):
    """What is known of n tokens, on the host; None for what was not asked for.

    Attributes:
        logprobs: [n, logprobs.WIDTH] float32.
        hidden: [n, dim] float32.
        logits: [n, V] float32.
    """

    logprobs: np.ndarray | None
    hidden: np.ndarray | None
    logits: np.ndarray | None

    @classmethod
    def fetched(cls, known: Known, kinds: Kinds) -> Details:
        """Some kinds of a program's findings, each [B, T, ...]. Host sync: yes."""
        return cls(
            *(transfers.fetch(t).float().numpy() if wanted else None for t, wanted in zip(known, kinds, strict=True))
        )

    @classmethod
    def joined(cls, parts: Sequence[Details]) -> Details:
        """The details of consecutive tokens; at least one part."""
        return cls(*(None if column[0] is None else np.concatenate(column) for column in zip(*parts, strict=True)))

    def of_row(self, row: int) -> Details:
        """One row's part of what was fetched of a batch: [T, ...] each."""
        return Details(*(None if array is None else array[row] for array in self))

    def of_kinds(self, kinds: Kinds) -> Details:
        """Some kinds of it."""
        return Details(*(array if wanted else None for array, wanted in zip(self, kinds, strict=True)))

    def first(self, count: int) -> Details:
        """Those of the first so many tokens."""
        return Details(*(None if array is None else array[:count] for array in self))


def wanted_kinds(requests: Sequence[Request]) -> Kinds:
    """Which fields of Details some of these requests ask for."""
    logprobs, hidden, logits = zip(*(request.kinds for request in requests), strict=True) if requests else ((), (), ())
    return any(logprobs), any(hidden), any(logits)


class Progress(NamedTuple):
    """What became known of a row.

    Attributes:
        row: which one.
        new_ids: its new tokens, without the stop token.
        finish_reason: why it ended, if it did.
        stop_id: the stop token that ended it.
        details: of the new tokens and the stop token, where the request wants them.
        prompt_details: of the prompt's tokens from the second on; on the row's first progress only, where the request
            wants them.
    """

    row: int
    new_ids: list[int]
    finish_reason: FinishReason | None
    stop_id: int | None = None
    details: Details | None = None
    prompt_details: Details | None = None


class Snapshot(NamedTuple):
    """What there is to read after some step: the report, and what its steps have told of their tokens."""

    report: torch.Tensor
    known: tuple[Known, ...]


@dataclass
class BatchClock:
    """Times and counts of one batch, filled in while it runs.

    Attributes:
        ttft_s: from the start of the batch, warm-up excluded, to its first tokens on the host.
        prefilled: prompt tokens that were run: not those in the cache, and those of several samples once.
        prefill_s: from the first chunk to the first tokens on the host.
        decode_s: from there to the last tokens on the host.
        generated: tokens produced, stop tokens not counted.
        decoded: those of them that decode steps produced: all but each row's first.
        runs: program runs.
    """

    ttft_s: float = 0.0
    prefilled: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    generated: int = 0
    decoded: int = 0
    runs: int = 0
    _began: float = 0.0
    _prefill_began: float = 0.0
    _prefill_ended: float = 0.0
    _runs_before: int = 0

    def start(self) -> None:
        """The batch begins."""
        self._began, self._runs_before = time.perf_counter(), counters.runs

    def start_prefill(self) -> None:
        """The batch is on the device."""
        self._prefill_began = time.perf_counter()

    def end_prefill(self) -> None:
        """The first tokens are on the host."""
        self._prefill_ended = time.perf_counter()
        self.ttft_s = self._prefill_ended - self._began
        self.prefill_s = self._prefill_ended - self._prefill_began

    def tick(self, progress: Sequence[Progress]) -> None:
        """Some tokens are on the host."""
        new = sum(len(p.new_ids) for p in progress)
        self.decoded += new if self.generated else 0
        self.generated += new
        self.runs = counters.runs - self._runs_before
        if self._prefill_ended:
            self.decode_s = time.perf_counter() - self._prefill_ended


@dataclass
class Row:
    """What the host knows of a row: ``ids`` are the prompt's and the generated ones, a stop token included."""

    request: Request
    ids: list[int]
    active: bool = True
    prompt_details: Details | None = None


@dataclass
class Batch:
    """One batch on its way.

    Attributes:
        state, controls, shaping: on the device; ``shaping`` is None where no row needs it.
        head: what chooses the rows' tokens.
        rows: those that have a request.
        cached: leading positions of every row whose keys and values are in the cache already.
        masks_stale: a grammar has moved on since ``shaping.allowed`` was made.
    """

    state: State
    controls: Controls
    shaping: Shaping | None
    head: Head
    rows: list[Row]
    cached: int = 0
    masks_stale: bool = False
    _known: list[Known] = field(default_factory=list)

    @property
    def active(self) -> list[Request]:
        """The requests that the host has not seen end."""
        return [row.request for row in self.rows if row.active]

    @property
    def is_constrained(self) -> bool:
        """The host must see each token before the next one can be chosen."""
        return any(request.constraint is not None for request in self.active)

    def add_known(self, known: Known) -> None:
        """Keep what a step told of its tokens until it is read."""
        self._known.append(known)

    def tell_prompts(self, scores: Sequence[Details], rows: Sequence[int]) -> None:
        """Give each of the rows that share a prompt what it asks of the chunks' findings, one part a chunk; no parts,
        nothing.

        From the prompt's second token on: the last position tells the token behind the prompt.
        """
        for row in (self.rows[i] for i in rows if scores):
            if row.request.params.prompt_logprobs:
                row.prompt_details = (
                    Details.joined(scores).of_kinds(row.request.kinds).first(len(row.request.prompt_ids) - 1)
                )

    def snapshot(self) -> Snapshot:
        """What there is to read now; it can be read while later steps run."""
        known, self._known = tuple(self._known), []
        return Snapshot(self.state.report, known)

    def read(self, snapshot: Snapshot) -> list[Progress]:
        """Fetch a report and tell what is new in it. Host sync: yes."""
        reports = transfers.fetch(snapshot.report).tolist()
        counts = [
            report[-2] - len(row.ids) if row.active else 0 for row, report in zip(self.rows, reports, strict=False)
        ]
        kinds = wanted_kinds(self.active)
        steps = [Details.fetched(known, kinds) for known in snapshot.known[: max(counts, default=0)]]
        progress = []
        for i, (row, report, count) in enumerate(zip(self.rows, reports, counts, strict=False)):
            if row.active:
                own = row.request.kinds
                told = (
                    Details.joined([step.of_row(i).of_kinds(own) for step in steps[:count]])
                    if any(own) and count
                    else None
                )
                progress.append(
                    self._news(i, row, report[REPORT_WINDOW - count : REPORT_WINDOW], bool(report[-1]), told)
                )
        return progress

    def _news(self, index: int, row: Row, new_ids: list[int], done: bool, details: Details | None) -> Progress:
        row.ids += new_ids
        row.active = not done
        stop_id = new_ids[-1] if done and new_ids and new_ids[-1] in row.request.stop_ids else None
        chosen = new_ids if stop_id is None else new_ids[:-1]
        if row.request.constraint is not None and chosen:
            row.request.constraint.advance(chosen)
            self.masks_stale = True
        reason: FinishReason | None = None if not done else "length" if stop_id is None else "stop"
        prompt_details, row.prompt_details = row.prompt_details, None
        return Progress(index, chosen, reason, stop_id, details, prompt_details)

    def end(self, row: int) -> None:
        """The caller wants no more of a row; the device may go on with it, unread."""
        self.rows[row].active = False

    def forget_from(self, position: int) -> None:
        """Drop what the prefill has not reached from the rows' ids; one more id stays, as one that was chosen but not
        run.
        """
        for row in self.rows:
            del row.ids[position + 1 :]

    def end_interrupted(self) -> list[Progress]:
        """End the rows that are still active."""
        ended = [i for i, row in enumerate(self.rows) if row.active]
        for i in ended:
            self.rows[i].active = False
        return [Progress(i, [], "interrupted") for i in ended]
