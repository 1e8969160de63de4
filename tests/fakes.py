"""A device that can be computed by hand: the engine, streaming and the command line are tested on it in milliseconds.

``FakeRunner`` keeps what the real one keeps on the device, as lists of integers. Its model chooses the next token by
``next_token``, a sum over all tokens before it, read from its cache: a position that was never written, or that another
request left behind, changes the text or raises StaleReadError.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Sequences
from dataclasses import dataclass, field
from pathlib import Path

from llama import EngineConfig, LLaMA, SamplingParams, load_tokenizer
from llama.engine.chunks import Chunk, is_scored
from llama.engine.drafting import Drafting
from llama.engine.engine import Engine
from llama.engine.programs import Program, all_programs
from llama.engine.runner import REPORT_WINDOW, News, Snapshot, new_tokens
from llama.engine.scheduler import Window
from llama.engine.sequence import Draft, Sequence, TokenDetails
from llama.errors import EngineError, InterruptedRunError, RecompileError
from llama.sampling_params import MAX_LOGPROBS

import numpy as np  # isort: skip

GARBAGE = -1
VOCAB = 320
FIRST = 3  # of the tokens that it chooses; those before are control tokens


class StaleReadError(AssertionError):
    """A position was read that holds something else than the request's own token."""


def next_token(ids: Sequences[int], vocab_size: int, seed: int = 0) -> int:
    """The token after these: 31 times their weighted sum, plus the seed, modulo the vocabulary."""
    total = sum((place % 7 + 1) * token for place, token in enumerate(ids))
    return FIRST + (31 * total + 7 * len(ids) + seed) % (vocab_size - FIRST)


def expected_ids(
    prompt: Sequences[int], params: SamplingParams, vocab_size: int, stop_ids: Sequences[int] = ()
) -> list[int]:
    """What a request gets that runs alone: its tokens, a stop token left out."""
    ids = list(prompt)
    for _ in range(params.max_gen_len):
        token = next_token(ids, vocab_size, (params.seed or 0) if params.temperature else 0)
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def token_logprob(before: Sequences[int], token: int, vocab_size: int) -> float:
    """The log-probability of a token: 0 for the one that is chosen, less the farther the token is from it."""
    return -((next_token(before, vocab_size) - token) % vocab_size) / 10


def details_of(ids: Sequences[int], first: int, count: int, vocab_size: int) -> TokenDetails:
    """What the device says of ``count`` tokens from ``first`` on, in the columns of ``token_info.describe``."""
    described = np.zeros((count, 2 + 2 * MAX_LOGPROBS), dtype=np.float32)
    for row, place in enumerate(range(first, first + count)):
        described[row, 0] = token_logprob(ids[:place], ids[place], vocab_size)
        described[row, 2 + MAX_LOGPROBS] = next_token(ids[:place], vocab_size)
    return TokenDetails(described, None, None)


@dataclass
class Slot:
    """One slot's state; of a row behind the slots only its cache."""

    tokens: list[int] = field(default_factory=list)
    start: int = 0
    ready: int = 0
    done: bool = True
    sequence: Sequence | None = None
    cache: list[int] = field(default_factory=list)
    recent: list[int] = field(default_factory=list)


@dataclass
class FakeRunner:
    """See ``engine.runner.Runner``.

    Attributes:
        compiled: programs, in the order in which they were.
        ran: what was run, in order: the kind and its numbers.
        fail_after: runs until one raises.
        kept_rows: rows behind the slots.
    """

    config: EngineConfig
    vocab_size: int = VOCAB
    stop_compiling: bool = False
    compiled: list[Program] = field(default_factory=list)
    ran: list[tuple[object, ...]] = field(default_factory=list)
    fail_after: int | None = None
    slots: list[Slot] = field(default_factory=list)
    is_warm: bool = False
    kept_rows: int = 0

    def __post_init__(self) -> None:
        self.reset()

    def is_ready(self, program: Program) -> bool:
        return any(p.covers(program) for p in self.compiled)

    def compile(self, wanted: Sequences[Program] | None = None) -> None:
        missing = [p for p in (all_programs(self.config) if wanted is None else wanted) if not self.is_ready(p)]
        if missing and self.is_warm and self.config.fail_on_recompile:
            raise RecompileError(f"{len(missing)} programs would be compiled: {missing[0]}")
        for program in missing:
            if self.stop_compiling:
                raise InterruptedRunError("interrupted while compiling")
            self.compiled.append(program)
        self.is_warm = True

    def _run(self, program: Program, *numbers: object) -> None:
        if not self.is_ready(program):
            if self.is_warm and self.config.fail_on_recompile:
                raise RecompileError(f"1 programs would be compiled: {program}")
            self.compiled.append(program)
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                self.fail_after = None
                raise EngineError("the device failed")
        self.ran.append((program.kind, *numbers))

    def admit(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._run(Program("admit"), sequence.slot)
        cache = self.slots[sequence.slot].cache
        prompt = list(sequence.prompt_ids)
        self.slots[sequence.slot] = Slot(prompt, sequence.start, sequence.ready, False, sequence, cache)

    def chunk(self, runs: Sequences[tuple[Sequence, Chunk]]) -> None:
        self._check_groups([sequence for sequence, _ in runs])
        assert len({chunk.length for _, chunk in runs}) == 1
        for sequence, chunk in runs:
            self._chunk(sequence, chunk)

    def _check_groups(self, sequences: Sequences[Sequence]) -> None:
        """No group runs two rows."""
        groups = [s.slot % self.config.data_parallel for s in sequences if s.slot is not None]
        assert len(set(groups)) == len(sequences)

    def _chunk(self, sequence: Sequence, chunk: Chunk) -> None:
        assert sequence.slot is not None
        self._run(
            Program("chunk", length=chunk.length, key_len=chunk.key_len), sequence.slot, chunk.start, chunk.length
        )
        slot = self.slots[sequence.slot]
        assert slot.start == chunk.start
        assert chunk.start + chunk.length <= self.config.positions
        for place in range(chunk.start, chunk.start + chunk.length):
            self._write(slot, place, slot.tokens[place] if place < len(slot.tokens) else GARBAGE)
        slot.start = chunk.end
        if is_scored(chunk, sequence.scored_from):
            self._run(Program("score", length=chunk.length), sequence.slot)
            self._check(slot, chunk.end)
            assert sequence.scored_from is not None
            first = max(sequence.scored_from, chunk.start + 1)
            count = min(chunk.end + 1, len(slot.tokens)) - first
            self._scored.append((sequence, details_of(slot.tokens, first, count, self.vocab_size)))

    def choose(self, sequences: Sequences[Sequence]) -> None:
        self._check_groups(sequences)
        for sequence in sequences:
            assert sequence.slot is not None
            self._run(Program("full", rows=1) if sequence.needs_full else Program("choose"), sequence.slot)
            self._choose(self.slots[sequence.slot])

    def decode(self, window: Window, chooses: tuple[Sequence, ...]) -> None:
        self._run(Program("decode", rows=window.rows, key_len=window.key_len), window.first, window.rows)
        assert 0 <= window.first <= self.config.max_batch_size - window.rows
        assert window.first % self.config.data_parallel == window.rows % self.config.data_parallel == 0
        for slot in self.slots[window.first : window.first + window.rows]:
            if slot.done or slot.start < slot.ready:
                self._write(slot, min(slot.start, self.config.positions - 1), GARBAGE)
                continue
            assert slot.start < window.key_len
            self._write(slot, slot.start, slot.tokens[slot.start])
            slot.start += 1
            if slot.start == len(slot.tokens):
                assert slot.sequence is not None
                assert not slot.sequence.needs_full or slot.sequence in chooses or slot.sequence.finished is not None
                self._choose(slot)
        if chooses:
            self._run(Program("full", rows=window.rows), window.first)

    def _write(self, slot: Slot, place: int, token: int) -> None:
        slot.cache += [GARBAGE] * (place + 1 - len(slot.cache))
        slot.cache[place] = token

    def _check(self, slot: Slot, count: int) -> None:
        if slot.cache[:count] != slot.tokens[:count]:
            raise StaleReadError(f"the cache holds {slot.cache[:count]}, the request is {slot.tokens[:count]}")

    def _choose(self, slot: Slot) -> None:
        sequence = slot.sequence
        assert sequence is not None
        self._check(slot, len(slot.tokens))
        params = sequence.params
        token = next_token(slot.tokens, self.vocab_size, (params.seed or 0) if params.temperature else 0)
        slot.tokens.append(token)
        slot.recent = [*slot.recent, token][-REPORT_WINDOW:]
        slot.done = token in sequence.stop_ids or len(slot.tokens) >= sequence.limit
        if slot.done:
            slot.start = len(slot.tokens) - 1

    def verify(self, window: Window, drafts: Sequences[Draft], draft_len: int) -> None:
        length = draft_len + 1
        given = {d.sequence.slot: d.token_ids for d in drafts}
        self._run(
            Program("verify", rows=window.rows, length=length, key_len=window.key_len), window.first, window.rows, given
        )
        for number in range(window.first, window.first + window.rows):
            slot = self.slots[number]
            known, guesses = len(slot.tokens) - slot.start, given.get(number, [])
            assert len(guesses) <= draft_len
            row = [*slot.tokens[slot.start :], *guesses][:length]
            for place in range(length):
                self._write(slot, slot.start + place, row[place] if place < len(row) else GARBAGE)
            if slot.done or slot.start < slot.ready:
                continue
            slot.start += min(known, length)
            if known > length:
                continue
            for guess in [*guesses[: length - known], None]:
                self._choose(slot)
                if slot.done or slot.tokens[-1] != guess:
                    break
            slot.start = len(slot.tokens) - 1

    def copy(self, source: int, target: int, count: int) -> None:
        assert source % self.config.data_parallel == target % self.config.data_parallel
        self._run(Program("copy", key_len=next(k for k in self.config.copy_lens if k >= count)), source, target, count)
        kept = self.slots[target].cache[count:]
        self.slots[target].cache = [*self.slots[source].cache[:count], *kept]

    def move(self, source: int, target: int, count: int) -> None:
        self.copy(source, target, count)
        self._run(Program("move"), source, target)
        cache = self.slots[target].cache
        moved = self.slots[source]
        self.slots[source] = Slot(moved.tokens, moved.start, moved.ready, True, None, moved.cache)
        self.slots[target] = Slot(
            moved.tokens, moved.start, moved.ready, moved.done, moved.sequence, cache, moved.recent
        )

    def end(self, slots: Iterable[int]) -> None:
        ended = sorted(slots)
        self._run(Program("end"), *ended)
        for slot in ended:
            self.slots[slot].done = True

    def snapshot(self, sequences: Iterable[Sequence]) -> Snapshot:
        rows = []
        for slot in self.slots[: self.config.max_batch_size]:
            recent = [0] * (REPORT_WINDOW - len(slot.recent)) + slot.recent
            rows.append([*recent, len(slot.tokens), int(slot.done)])
        taken = {s.slot: s for s in sequences if s.slot is not None}
        scored, self._scored = tuple(self._scored), []
        return Snapshot(np.array(rows), taken, (), scored)  # type: ignore[arg-type]

    def read(self, snapshot: Snapshot) -> list[News]:
        news = []
        for scored, details in snapshot.scored:  # type: ignore[misc]
            scored.prompt_details.append(details)  # type: ignore[attr-defined]
        for slot, sequence in snapshot.slots.items():
            row = np.asarray(snapshot.report[slot])
            news.append(News(sequence, new_tokens(row, int(row[-2]) - len(sequence.ids)), bool(row[-1]), None))
        return news

    def reset(self) -> None:
        self.slots = [Slot() for _ in range(self.config.max_batch_size + self.kept_rows)]
        self._scored: list[tuple[Sequence, TokenDetails]] = []


def run_all(engine: Engine, sequences: Sequences[Sequence], rounds: int = 2000) -> int:
    """Submit and run to the end; return the number of rounds."""
    for each in sequences:
        engine.submit(each)
    for number in range(rounds):
        if not engine.has_work:
            return number
        engine.step()
    raise AssertionError("the engine does not come to an end")


def check(*sequences: Sequence) -> None:
    """Every sequence has ended with what it would get alone."""
    for each in sequences:
        assert each.error is None
        assert each.token_ids == expected_ids(each.prompt_ids, each.params, VOCAB, each.stop_ids)
        assert each.finish_reason in ("length", "stop")


def fake_llm(tokenizer_path: Path, drafting: Drafting | None = None, kept_rows: int = 0, **settings: object) -> LLaMA:
    """A LLaMA on a fake device."""
    config = EngineConfig(**{"max_seq_len": 128, "buckets": (16, 4, 1), **settings})  # type: ignore[arg-type]
    tokenizer = load_tokenizer(tokenizer_path)
    runner = FakeRunner(config, tokenizer.n_words, kept_rows=kept_rows)
    return LLaMA(Engine(config, runner, drafting), tokenizer)
