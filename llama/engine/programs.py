"""The registry of compiled programs: what each one is, what must be warm, and what a set of requests can need.

A program is a function of ``compiled/steps.py`` at fixed sizes. Its kind says which named tensors it takes and returns,
which it donates, and which sizes it is compiled for. Warm-up and the runner read the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence as Sequences
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch

from llama.compiled import cache, steps
from llama.compiled.model import Transformer
from llama.compiled.state import CACHE, Details, State
from llama.config import EngineConfig
from llama.engine import chunks
from llama.engine.sequence import Sequence
from llama.xla import mesh
from llama.xla.linear import Rules, ruled

GROUPS: dict[str, Any] = {"state": State, "details": Details}  # one name for several tensors


class Kind(NamedTuple):
    """What the programs of one kind have in common.

    Attributes:
        function: of ``compiled/steps.py``.
        takes, returns: names of tensors, or of groups of them, in the function's order.
        donates: tensors whose memory an output takes over.
        sizes: which of a program's sizes it is compiled for.
        runs_model: it reads the model's weights; others only put requests into slots, copy, move and end them.
    """

    function: Callable[..., Any]
    takes: tuple[str, ...]
    returns: tuple[str, ...]
    donates: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    runs_model: bool = True


KINDS: dict[str, Kind] = {
    "chunk": Kind(steps.chunk, ("state", "slot", "keys"), ("state", "stream"), CACHE, ("length", "key_lens")),
    "decode": Kind(steps.decode, ("state", "controls", "slot", "keys"), ("state",), CACHE, ("rows", "key_lens")),
    "choose": Kind(steps.choose, ("state", "controls", "slot"), ("state",)),
    "full": Kind(
        steps.full, ("state", "controls", "logits_controls", "allowed", "slot"), ("state", "details"), (), ("rows",)
    ),
    "verify": Kind(
        steps.verify,
        ("state", "controls", "logits_controls", "allowed", "drafts", "draft_allowed", "slot", "keys"),
        ("state", "details"),
        CACHE,
        ("rows", "length", "key_lens"),
    ),
    "lookahead": Kind(
        steps.lookahead,
        ("state", "controls", "jacobi", "slot", "keys"),
        (*CACHE, "following"),
        CACHE,
        ("rows", "levels", "width", "key_lens"),
    ),
    "score": Kind(steps.score, ("tokens", "slot", "position", "stream"), ("details",), (), ("length",)),
    "admit": Kind(steps.admit, ("state", "row", "slot"), ("state",), runs_model=False),
    "end": Kind(steps.end, ("done", "ended"), ("done",), runs_model=False),
    "copy": Kind(steps.copy, (*CACHE, "slot", "target"), CACHE, CACHE, ("key_len",), runs_model=False),
    "move": Kind(steps.move, ("state", "slot", "target"), ("state",), runs_model=False),
}


@dataclass(frozen=True)
class Program:
    """One compiled program.

    Attributes:
        kind: a name of ``KINDS``.
        rows: slots that it runs.
        length: positions of a chunk, or tokens of each row that a step with drafts runs.
        key_len: cache positions that it reads at most, or copies. One that runs tokens has a branch for every key
            bucket up to there.
    """

    kind: str
    rows: int = 0
    length: int = 0
    key_len: int = 0

    def __str__(self) -> str:
        words = {
            "rows": f"rows {self.rows}",
            "levels": f"{self.length} tokens",
            "length": f"drafts {self.length - 1}" if self.kind == "verify" else f"chunk length {self.length}",
            "key_len": f"positions {self.key_len}",
            "key_lens": f"keys up to {self.key_len}",
        }
        return f"({', '.join([self.kind, *(words[name] for name in KINDS[self.kind].sizes if name in words)])})"

    def covers(self, other: Program) -> bool:
        """Whether it does what another program does."""
        same = replace(other, key_len=self.key_len) == self
        reaches = "key_lens" in KINDS[self.kind].sizes and self.key_len >= other.key_len
        return self == other or (same and reaches)

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of the tensors that it takes, in order."""
        return _spread(KINDS[self.kind].takes)

    @property
    def returns(self) -> tuple[str, ...]:
        """The names of the tensors that it returns, in order."""
        return _spread(KINDS[self.kind].returns)

    @property
    def donated(self) -> tuple[int, ...]:
        """The indices in ``takes`` of the tensors that are dead after a run."""
        return tuple(self.takes.index(name) for name in KINDS[self.kind].donates)

    def function(self, model: Transformer, config: EngineConfig) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The function to compile: it takes and returns tensors in the order of ``takes`` and ``returns``."""
        kind = KINDS[self.kind]
        key_lens = tuple(k for k in config.key_buckets if self.length <= k <= self.key_len)
        rows = max(self.rows // config.data_parallel, 1)  # of each group of devices
        every = {"rows": rows, "length": self.length, "key_len": self.key_len, "key_lens": key_lens}
        every |= dict(zip(("width", "levels"), config.lookahead, strict=False))
        sizes = {name: every[name] for name in kind.sizes}
        leading = (model,) if kind.runs_model else ()

        rules = Rules(config.batch_invariant, config.activations, config.prefill_products)

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with ruled(rules), model.as_parts():
                found = kind.function(*leading, *_gathered(kind.takes, tensors), **sizes)
            parts = found if len(kind.returns) > 1 else (found,)
            return tuple(
                each
                for name, part in zip(kind.returns, parts, strict=True)
                for each in (part if name in GROUPS else (part,))
            )

        return run

    def splits(self, parts: int) -> tuple[mesh.Split, ...]:
        """How each tensor that it returns is split over a mesh, with the model over ``parts`` devices."""
        return tuple(cache.split(parts) if name in CACHE else mesh.ROWS for name in self.returns)


def _spread(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(each for name in names for each in (GROUPS[name]._fields if name in GROUPS else (name,)))


def _gathered(names: Iterable[str], tensors: tuple[torch.Tensor, ...]) -> list[Any]:
    """The tensors with those of a group as one named tuple."""
    found: list[Any] = []
    begin = 0
    for name in names:
        count = len(GROUPS[name]._fields) if name in GROUPS else 1
        part = tensors[begin : begin + count]
        found.append(GROUPS[name](*part) if name in GROUPS else part[0])
        begin += count
    return found


# --- what is needed ---------------------------------------------------------------------------------------------------


def all_programs(config: EngineConfig) -> list[Program]:
    """Every program that any request can need under this configuration."""
    scored = chunks.scored_lengths(config)
    lengths = sorted({b for b in config.buckets if b > 1} | set(scored), reverse=True)
    longest = config.key_buckets[-1]
    found = [Program("chunk", length=b, key_len=longest) for b in lengths]
    found += [Program("decode", rows=w, key_len=longest) for w in config.widths]
    found += [Program("choose"), *(Program("full", rows=w) for w in dict.fromkeys((1, *config.widths)))]
    found += [Program("score", length=b) for b in scored]
    for width in config.verify_widths:
        found += [Program("verify", rows=width, length=d + 1, key_len=longest) for d in config.draft_lens]
        found += [lookahead_program(config, width, longest)] if config.lookahead else []
    found += [Program("admit"), Program("end")]
    if config.copies_rows:
        found += [Program("copy", key_len=k) for k in config.copy_lens]
    if config.max_batch_size > config.data_parallel:
        found += [Program("move")]
    return found


def programs_for(
    sequences: Sequences[Sequence], config: EngineConfig, cached: Iterable[tuple[int, ...]] = ()
) -> list[Program]:
    """The programs that these requests can need when they run beside each other, in the order of their first use.

    Of the widths only the one that covers all of them: narrower ones save time, and a full warm-up compiles them.

    Args:
        cached: how many leading tokens of each need not be run, as far as is known: one number or several that are
            possible; zeros without it.
    """
    if not sequences:
        return []
    found = [Program("admit")]
    several = config.max_batch_size > 1 and len(sequences) > 1
    width = next(w for w in config.widths if w >= min(len(sequences), config.max_batch_size))
    seen = set()
    for sequence, counts in zip(sequences, cached or [(0,)] * len(sequences), strict=True):
        lengths = len(sequence.prompt_ids), sequence.limit, sequence.scored_from
        wish = (*lengths, sequence.generates, sequence.needs_full, sequence.leader is None, counts)
        if wish in seen:  # evaluations have tens of thousands of requests of a few hundred lengths
            continue
        seen.add(wish)
        for count in counts:
            found += _own_programs(sequence, config, count, width)
        if any(counts):
            found += _programs_of_a_rest(sequence, config, width)
    shares = config.prefix_cache or any(s.leader is not None for s in sequences)
    if config.copies_rows and ((several and shares) or config.prefix_cache_bytes):
        longest = max(s.limit for s in sequences)
        enough = next(k for k in config.copy_lens if k >= min(longest, config.max_seq_len))
        found += [Program("copy", key_len=k) for k in config.copy_lens if k <= enough]
    if several or any(s.params.stop for s in sequences):
        found.append(Program("end"))
    every = list(dict.fromkeys(found))
    return [p for p in every if not any(other != p and other.covers(p) for other in every)]


def _own_programs(sequence: Sequence, config: EngineConfig, cached: int, width: int) -> Iterator[Program]:
    """What one request needs, where decode steps run ``width`` slots."""
    prompt_len = len(sequence.prompt_ids)
    if sequence.leader is not None:
        cached = max(cached, prompt_len - 1)
    scored_from = sequence.scored_from
    plan, ready = chunks.prefill(sequence.prompt_run, config, cached, scored_from=scored_from)
    for chunk in plan:
        yield Program("chunk", length=chunk.length, key_len=chunk.key_len)
        if chunks.is_scored(chunk, scored_from):
            yield Program("score", length=chunk.length)
    if not sequence.generates:
        return
    if ready == prompt_len:
        yield Program("full", rows=1) if sequence.needs_full else Program("choose")
    if ready + 1 < sequence.limit:  # a decode step runs position ready, and others up to the one before the last
        yield from _decoding(sequence, config, width)
        checked = next(w for w in config.verify_widths if w >= width)
        for draft_len in config.draft_lens:
            last = min(sequence.limit + draft_len, config.max_seq_len)
            yield Program("verify", rows=checked, length=draft_len + 1, key_len=chunks.key_bucket(last, config))
        if config.lookahead:
            last = min(sequence.limit + prod(config.lookahead), config.max_seq_len)
            yield lookahead_program(config, checked, chunks.key_bucket(last, config))


def _programs_of_a_rest(sequence: Sequence, config: EngineConfig, width: int) -> Iterator[Program]:
    """What any rest of a prompt can need: what rows hold of its beginning can change until it is admitted."""
    scored = chunks.scored_lengths(config) if sequence.scored_from is not None else ()
    for length in config.buckets:
        if 1 < length <= sequence.prompt_run or length in scored:
            padding = length - 1 if length in scored else 0
            reach = chunks.key_bucket(min(sequence.prompt_run + padding, config.max_seq_len), config)
            yield Program("chunk", length=length, key_len=reach)
    yield from (Program("score", length=length) for length in scored)
    if sequence.generates:
        yield Program("full", rows=1) if sequence.needs_full else Program("choose")
        yield from _decoding(sequence, config, width)


def _decoding(sequence: Sequence, config: EngineConfig, width: int) -> Iterator[Program]:
    """What decode steps of a request need."""
    reach = config.max_seq_len if config.batch_invariant else chunks.key_bucket(sequence.limit - 1, config)
    yield Program("decode", rows=width, key_len=reach)
    if sequence.needs_full:
        yield Program("full", rows=width)


def lookahead_program(config: EngineConfig, rows: int, key_len: int) -> Program:
    """The program of a Jacobi window, which follows a row's last token."""
    return Program("lookahead", rows=rows, length=1 + prod(config.lookahead), key_len=key_len)


_names = [name for group in GROUPS.values() for name in group._fields]
assert len(set(_names)) == len(_names)  # a run's outputs are told apart by name
