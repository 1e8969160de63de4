"""One way to decode, plainly or with a drafter, ready to answer prompts; and what a run of it counts.

Every run has a new drafter and a new pace: what a drafter learns from one prompt (a corpus of answers, n-grams, how
often guesses come true) may help with the next one, and never with the same one again. Weights on the device stay, and
nothing is compiled twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence as Sequences
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from llama.config import DraftConfig
from llama.drafting.opening import open_drafting
from llama.engine.drafting import Drafter, Drafting, Drafts, Plan
from llama.engine.pace import Pace
from llama.engine.programs import all_programs
from llama.engine.runner import XlaRunner
from llama.engine.sequence import DraftCounts, Sequence
from llama.generation import LLaMA
from llama.outputs import Generation
from llama.sampling_params import SamplingParams
from llama.xla.counters import counters, surprises

NEVER_RUN = ("full", "score")  # programs of controls that no prompt has here


class Way(NamedTuple):
    """A way to decode.

    Attributes:
        name: how tables call it.
        settings: of its drafter; None for plain decoding.
    """

    name: str
    settings: DraftConfig | None


class Timed(Drafter):
    """Another drafter, and what it costs.

    Attributes:
        seconds: spent in ``propose`` and ``accepted``.
        asked: for how many sequences a guess was wanted.
    """

    def __init__(self, inner: Drafter) -> None:
        self._inner = inner
        self.seconds, self.asked = 0.0, 0

    def propose(self, sequences: Sequences[Sequence], draft_len: int) -> Drafts:
        """See Drafter."""
        began = time.perf_counter()
        found = self._inner.propose(sequences, draft_len)
        self.seconds += time.perf_counter() - began
        self.asked += len(sequences)
        return found

    def accepted(self, counts: np.ndarray) -> None:
        """See Drafter."""
        began = time.perf_counter()
        self._inner.accepted(counts)
        self.seconds += time.perf_counter() - began

    @property
    def stop_compiling(self) -> bool:
        """See Drafter."""
        return self._inner.stop_compiling

    @stop_compiling.setter
    def stop_compiling(self, stop: bool) -> None:
        self._inner.stop_compiling = stop

    def prepare(self, sequences: Sequences[Sequence] | None) -> None:
        """See Drafter."""
        self._inner.prepare(sequences)

    def finished(self, sequence: Sequence) -> None:
        """See Drafter."""
        self._inner.finished(sequence)

    def close(self) -> None:
        """See Drafter."""
        self._inner.close()


class Counted(Drafting):
    """Drafting that counts, besides the drafts, what its steps gave.

    Attributes:
        steps: for each sequence, those that checked drafts of it or of its neighbours and gave it a token.
        tokens: what they gave.
        early: of these, those that came with a sequence's first token.
    """

    def __init__(self, drafter: Drafter, pace: Pace, vocab_size: int) -> None:
        super().__init__(drafter, pace, vocab_size)
        self.steps, self.tokens, self.early = 0, 0, 0

    def checked(self, plan: Plan, known: Sequences[int], rows: int, seconds: float) -> None:
        """See Drafting."""
        super().checked(plan, known, rows, seconds)
        for draft, before in zip(plan.drafts, known, strict=True):
            new = len(draft.sequence.ids) - before
            if new:
                self.steps += 1
                self.tokens += new
                self.early += new - 1 if before == len(draft.sequence.prompt_ids) else 0


@dataclass(frozen=True)
class Run:
    """All prompts of a task, once.

    Attributes:
        decode_s: seconds from a group's last first token to its last token, summed over groups.
        job_s: seconds from a group's submission to its last token, likewise.
        tokens: generated tokens, stop tokens included, without each prompt's first and what came in one step with it.
        steps: that chose them, summed over prompts: with a drafter one step may choose several.
        texts: the token ids of each prompt's answer.
        counts: of drafts.
        propose_s: seconds in the drafter.
        asked: for how many sequences it was asked for a guess, over all proposals.
        compiled: programs that were compiled meanwhile, by us and by XLA.
    """

    decode_s: float
    job_s: float
    tokens: int
    steps: int
    texts: list[list[int]]
    counts: DraftCounts = field(default_factory=DraftCounts)
    propose_s: float = 0.0
    asked: int = 0
    compiled: int = 0


@dataclass
class Contestant:
    """A way to decode, ready to run.

    Attributes:
        way: which.
        llm: warm, of ``batch`` slots; other contestants may use it, one after the other.
        new_drafter: makes a drafter that has learnt nothing; None for plain decoding.
    """

    way: Way
    llm: LLaMA
    new_drafter: Callable[[], Drafter] | None = None

    def run(self, prompts: Sequences[str], params: SamplingParams) -> Run:
        """Answer all prompts, in groups of as many as there are slots."""
        engine, batch = self.llm.engine, self.llm.config.max_batch_size
        drafting, timed = self._drafting()
        engine.drafting = drafting
        before = _compiled()
        found: list[Generation] = []
        decode_s = job_s = 0.0
        for start in range(0, len(prompts), batch):
            group = prompts[start : start + batch]
            seeded = [replace(params, seed=start + row) for row in range(len(group))]
            results = self.llm.generate(group, params=seeded)
            decode_s += _decode_s(results)
            job_s += results[0].totals.total_s
            found += results
        compiled = _compiled() - before
        engine.drafting = None
        generated = sum(map(_generated, found))
        tokens = generated - len(found)
        texts = [result.token_ids for result in found]
        if drafting is None or timed is None:
            return Run(decode_s, job_s, tokens, tokens, texts, compiled=compiled)
        return Run(
            decode_s,
            job_s,
            tokens - drafting.early,
            drafting.steps + (tokens - drafting.tokens),  # all others gave one token each
            texts,
            drafting.counts,
            timed.seconds,
            timed.asked,
            compiled,
        )

    def compile(self) -> None:
        """Compile everything that any prompt here can need."""
        runner, config = self.llm.engine.runner, self.llm.config
        runner.compile([program for program in all_programs(config) if program.kind not in NEVER_RUN])
        if self.new_drafter is not None:
            self.new_drafter().prepare(None)

    def _drafting(self) -> tuple[Counted | None, Timed | None]:
        """A new drafter and a new pace; nothing for plain decoding."""
        if self.new_drafter is None or self.way.settings is None:
            return None, None
        timed = Timed(self.new_drafter())
        vocab_size = self.llm.vocab_size
        made = Counted.of(timed, self.llm.config, vocab_size, adaptive=self.way.settings.is_adaptive)
        assert isinstance(made, Counted)
        return made, timed


def drafter_maker(settings: DraftConfig, llm: LLaMA, is_demo: bool) -> Callable[[], Drafter]:
    """A function that makes a drafter which has learnt nothing yet; weights are loaded the first time only."""
    runner = llm.engine.runner
    assert isinstance(runner, XlaRunner)
    loaded: dict[str, Drafter] = {}

    def make() -> Drafter:
        opened = open_drafting(settings, runner.model.args, llm.tokenizer, llm.config, is_demo)
        return replace(opened, loaded=loaded).drafter(runner)

    return make


def _compiled() -> int:
    """Programs compiled in this process, by us and by XLA unasked."""
    return counters.compiled + surprises()


def _generated(result: Generation) -> int:
    """Generated tokens, a stop token included."""
    return len(result.token_ids) + (result.finish_reason == "stop" and isinstance(result.stop_reason, int))


def _decode_s(results: Sequences[Generation]) -> float:
    """Seconds from the last first token of prompts that began together to their last token."""
    first = max(result.timing.ttft_s for result in results)
    return max(result.timing.ttft_s + result.timing.decode_s for result in results) - first
