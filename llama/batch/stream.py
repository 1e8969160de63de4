"""Requests through the engine as one stream: as results come, further requests are handed in, so that slots stay full.

The engine's own queue holds a few requests more than there are slots, and the memory of a run does not grow with its
input. While a stream runs, nobody else steps the engine.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from llama.batch.fields import Request
from llama.batch.lines import Line
from llama.batch.requests import Prepared, request_of
from llama.engine.sequence import Sequence
from llama.errors import InterruptedRunError, RecompileError, UserError
from llama.generation import LLaMA
from llama.grammar import Grammars, is_cut
from llama.inputs import Prompt, make_sequences
from llama.outputs import Generation, ProgramCount, Timing, Totals, mean_logprob, result_of
from llama.xla.counters import surprises

WAITING_PER_SLOT = 1


class Answer(NamedTuple):
    """What became of a line.

    Attributes:
        line: of the input.
        request: what it asked for; None if it could not be read.
        results: prompt by prompt and sample by sample; ``index`` is the prompt's place in the line.
        error: why there are none.
        is_cut: a text among them ended before its grammar was satisfied.
    """

    line: Line
    request: Request | None
    results: list[Generation]
    error: UserError | None = None
    is_cut: bool = False


@dataclass
class _Job:
    """A line in the engine.

    Attributes:
        number: how many lines were begun before it.
        left: sequences that have not ended.
    """

    number: int
    line: Line
    request: Request
    prompts: tuple[Prompt, ...]
    sequences: list[Sequence]
    left: int = 0
    found: list[tuple[float, Generation]] = field(default_factory=list)  # with the mean log-probability


class Stream:
    """Runs the lines of a batch.

    Args:
        llm: its engine is stepped by the stream alone.
        prepared: prompts and parameters for this model.
        most_ahead: lines that may begin after the oldest one that has not ended; None means any number. For a caller
            that holds results back until it is their turn.
    """

    def __init__(self, llm: LLaMA, prepared: Prepared, most_ahead: int | None = None) -> None:
        self._llm, self._prepared, self._most_ahead = llm, prepared, most_ahead
        self._engine = llm.engine
        self._grammars = Grammars(llm.tokenizer)
        self._jobs: dict[int, _Job] = {}  # by the number of a sequence
        self._open: dict[int, _Job] = {}  # by its own number, the oldest first
        self._begun = 0

    def run(self, lines: Iterable[Line]) -> Generator[Answer, None, None]:
        """Yield what became of each line, in the order in which they end. Closing it ends what runs.

        Raises:
            InterruptedRunError: ``LLaMA.interrupt`` was called; what ran is lost.
            RecompileError: under ``fail_on_recompile``, when something was left to compile after warm-up.
            Exception: the engine lost its state.
        """
        self._engine.stop_compiling(False)
        if self._llm.config.fail_on_recompile:
            self._llm.warm_up()
        queue, surprised = iter(lines), surprises()
        try:
            while True:
                yield from self._refill(queue)
                if not self._open:
                    break
                for update in self._engine.step():
                    if update.is_last and update.sequence.id in self._jobs:
                        yield from self._take(update.sequence)
                self._end_if_interrupted()
        finally:
            self._cancel(self._jobs.values())
            if self._jobs:
                self._engine.step()  # takes the cancelled sequences out of their slots
            self._jobs, self._open = {}, {}
        if self._llm.config.fail_on_recompile and surprises() > surprised:
            raise RecompileError(f"XLA compiled {surprises() - surprised} computations outside the engine's programs")

    def _end_if_interrupted(self) -> None:
        if self._llm.take_interrupt():
            raise InterruptedRunError("interrupted")

    # --- beginnings ---------------------------------------------------------------------------------------------------

    def _refill(self, queue: Iterator[Line]) -> Iterator[Answer]:
        """Begin lines while there is room for them; yield those that are refused."""
        new: list[Sequence] = []
        room = self._llm.config.max_batch_size * (1 + WAITING_PER_SLOT)
        while len(self._jobs) < room and not self._is_far_ahead():
            line = next(queue, None)
            if line is None:
                break
            self._end_if_interrupted()
            number, request = self._begun, None
            self._begun += 1
            try:
                request = request_of(line)
                new += self._begin(number, line, request)
            except UserError as error:
                yield Answer(line, request, [], error)
        if new:
            self._engine.prepare(new)
            for sequence in new:
                self._engine.submit(sequence)

    def _is_far_ahead(self) -> bool:
        oldest = next(iter(self._open), self._begun)
        return self._most_ahead is not None and self._begun - oldest >= self._most_ahead

    def _begin(self, number: int, line: Line, request: Request) -> list[Sequence]:
        """The sequences of a line.

        Raises:
            UserError: its prompts do not fit, or its parameters are not allowed.
        """
        llm, prepared = self._llm, self._prepared
        params, prompts = prepared.params(line.index, request), prepared.prompts(request)
        eos_ids = (*llm.tokenizer.stop_ids, *llm.defaults.stop_ids, *prepared.stop_ids(request))
        sequences = make_sequences(
            prompts,
            [params] * len(prompts),
            llm.tokenizer,
            tuple(dict.fromkeys(eos_ids)),
            llm.vocab_size,
            llm.config.max_seq_len,
            self._grammars,
        )
        job = _Job(number, line, request, prompts, sequences, len(sequences))
        self._open[job.number] = job
        self._jobs |= {sequence.id: job for sequence in sequences}
        return sequences

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _take(self, sequence: Sequence) -> Iterator[Answer]:
        """Keep the result of a sequence that has ended; yield the answer of its line when all of them have."""
        job = self._jobs.pop(sequence.id)
        if sequence.error is not None and not isinstance(sequence.error, UserError):
            raise sequence.error
        if sequence.error is not None:
            self._cancel([job])
            self._close(job)
            yield Answer(job.line, job.request, [], sequence.error)
            return
        score = mean_logprob(sequence) if sequence.params.is_ranked else 0.0
        job.found.append((score, self._result(job, sequence)))
        job.left -= 1
        if not job.left:
            self._close(job)
            results, params = _chosen(job), job.sequences[0].params
            cut = any(is_cut(r.generation, r.finish_reason, r.stop_reason, params) for r in results)
            yield Answer(job.line, job.request, results, is_cut=cut)

    def _cancel(self, jobs: Iterable[_Job]) -> None:
        """End the sequences of lines."""
        for sequence in [each for job in {job.number: job for job in jobs}.values() for each in job.sequences]:
            if sequence.id in self._jobs:
                self._engine.cancel(sequence)

    def _close(self, job: _Job) -> None:
        """Forget a line."""
        del self._open[job.number]
        for sequence in job.sequences:
            self._jobs.pop(sequence.id, None)

    def _result(self, job: _Job, sequence: Sequence) -> Generation:
        llm = self._llm
        prompt = llm.prompt_text(job.prompts[sequence.index])
        timing = Timing.of(sequence, llm.load_s, 0.0)
        return result_of(sequence, prompt, llm.tokenizer, timing, ProgramCount(0, sequence.runs), Totals())


def _chosen(job: _Job) -> list[Generation]:
    """The results of a line: all, or of each prompt the best."""
    params = job.sequences[0].params
    found = sorted(job.found, key=lambda pair: (pair[1].index, -pair[0], pair[1].sample))
    if not params.is_ranked:
        return [result for _, result in found]
    chosen = []
    for first in range(0, len(found), params.samples):
        best = [result for _, result in found[first : first + params.n]]
        chosen += [replace(result, sample=place) for place, result in enumerate(best)]
    return chosen
