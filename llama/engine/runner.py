"""The slots on the device: their tensors, and the compiled programs that change them. It knows no queue and no text.

Between a request's admission and its end nothing is uploaded for it, except the mask of allowed tokens of a request
that follows a grammar. ``Runner`` says what the engine needs of a device; ``XlaRunner`` is the one for XLA.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence as Sequences
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from llama.compiled import cache
from llama.compiled.memory import cache_dtype_for
from llama.compiled.model import Transformer
from llama.compiled.state import CONTROLS, Details, State, logits_controls
from llama.config import LONGEST_DRAFT, EngineConfig, word_count
from llama.engine.chunks import Chunk, is_scored
from llama.engine.programs import KINDS, Program, all_programs, lookahead_program
from llama.engine.scheduler import Window
from llama.engine.sequence import Draft, Sequence, TokenDetails, bits_of
from llama.errors import EngineError, InterruptedRunError, RecompileError, setting
from llama.xla import programs as compiling, transfers
from llama.xla.counters import counters

log = logging.getLogger("llama")

# Seconds that compiling one program takes, before the first has been timed: one that runs the model, of any depth, and
# one that only edits slots (docs/log.md, 2026-11-21).
FIRST_GUESS_S = {True: 0.7, False: 0.05}
REPORT_WINDOW = LONGEST_DRAFT + 1  # tokens a slot that a report holds: the most that may come between two reads


class Chosen(NamedTuple):
    """Details of the tokens that one run of ``full`` or ``verify`` chose.

    Attributes:
        details: [rows, T, ...] on the device; of each row's new tokens the first ones.
        rows: the row of each sequence that chose a token.
    """

    details: Details
    rows: dict[Sequence, int]


class Scored(NamedTuple):
    """Details of the tokens that one chunk of a prompt predicts.

    Attributes:
        details: [1, T, ...] on the device; on a mesh [M, T, ...], one row for each group.
        row: of them.
        sequence: whose prompt.
        begin: the first of the T that is wanted.
        size: how many are.
    """

    details: Details
    row: int
    sequence: Sequence
    begin: int
    size: int


class Snapshot(NamedTuple):
    """What can be read after some step, while later ones run.

    Attributes:
        report: [slots, REPORT_WINDOW + 2] int32.
        slots: the sequences that ran, by slot.
        chosen: details of the tokens since the last snapshot, in order.
        scored: details of prompts' tokens since the last snapshot, in order.
    """

    report: torch.Tensor
    slots: dict[int, Sequence]
    chosen: tuple[Chosen, ...] = ()
    scored: tuple[Scored, ...] = ()


class News(NamedTuple):
    """What was read of one sequence.

    Attributes:
        sequence: whose.
        new_ids: its new tokens, a stop token included.
        ended: the device has ended it.
        details: of the new tokens, where the request needs them.
    """

    sequence: Sequence
    new_ids: list[int]
    ended: bool
    details: TokenDetails | None


class Runner(Protocol):
    """What the engine needs of a device. A slot is a number; a call starts work and returns before it is done.

    Attributes:
        stop_compiling: set it from a signal handler to end a compilation before its next program.
    """

    stop_compiling: bool

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    @property
    def kept_rows(self) -> int:
        """Rows of the cache behind the slots, which keep prefixes."""
        ...

    def is_ready(self, program: Program) -> bool:
        """Whether a program is compiled."""
        ...

    def compile(self, wanted: Sequences[Program] | None = None) -> None:
        """Compile these programs, or all, where they are not compiled yet."""
        ...

    def admit(self, sequence: Sequence) -> None:
        """Put a sequence into its slot."""
        ...

    def chunk(self, runs: Sequences[tuple[Sequence, Chunk]]) -> None:
        """Run a chunk of each prompt, all of one length and in different groups of devices; where tokens are scored,
        the next snapshot has their details.
        """
        ...

    def choose(self, sequences: Sequences[Sequence]) -> None:
        """Choose the first tokens of sequences in different groups of devices, after their last chunks."""
        ...

    def decode(self, window: Window, chooses: tuple[Sequence, ...]) -> None:
        """Run the next token of the slots in a window; the program ``full`` chooses for the sequences given."""
        ...

    def verify(self, window: Window, drafts: Sequences[Draft], draft_len: int) -> None:
        """Run the known tokens of the slots in a window and the drafts behind them, and keep what agrees.

        Args:
            drafts: of the sequences that choose a token; the others only run theirs.
            draft_len: K, no sequence has more.
        """
        ...

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first ``count`` positions of a row of the cache, a slot's or a kept one, to another row."""
        ...

    def move(self, source: int, target: int, count: int) -> None:
        """Move a slot's request, whose first ``count`` positions have been run, to another slot."""
        ...

    def end(self, slots: Iterable[int]) -> None:
        """End the requests in some slots."""
        ...

    def snapshot(self, sequences: Iterable[Sequence]) -> Snapshot:
        """What can be read now of these sequences."""
        ...

    def read(self, snapshot: Snapshot) -> list[News]:
        """Fetch a snapshot and return what is new in it. Waits for the device."""
        ...

    def reset(self) -> None:
        """Forget all slots after an error."""
        ...


@dataclass
class XlaRunner:
    """The slots' tensors and programs on an XLA device, or on a mesh of devices.

    On a mesh slot s is in group ``s % M``, at place ``s // M`` in it, so that neighbouring slots are at work in
    different groups. Device tensors hold a group's rows side by side. A program that runs one row runs one of each
    group: those that have nothing to do get no row, and change nothing.

    Args:
        model: with its weights on ``device``.
        config: every static shape.
        device: from ``backend.init``.
        progress: show a bar on stderr while programs are compiled.

    Attributes:
        stop_compiling: set it from a signal handler to end a compilation before its next program.
    """

    model: Transformer
    config: EngineConfig
    device: torch.device
    progress: bool = False
    stop_compiling: bool = False
    _programs: dict[Program, compiling.Program] = field(default_factory=dict)
    _covering: dict[Program, Program | None] = field(default_factory=dict)  # which of them runs for which
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _chosen: list[Chosen] = field(default_factory=list)
    _scored: list[Scored] = field(default_factory=list)
    _warm: bool = False
    _took: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def __post_init__(self) -> None:
        slots, vocab_size = self.config.max_batch_size, self.model.args.vocab_size
        # the host's copy of what each slot's request wants: uploaded again as a whole when a part of it has changed
        self._host = {
            "controls": np.tile(CONTROLS.pack(), (slots, 1)),
            "logits_controls": np.tile(logits_controls(vocab_size).pack(), (slots, 1)),
            "allowed": np.full((slots, word_count(vocab_size)), -1, dtype=np.int32),
        }
        self._stale = set(self._host)
        self._numbers: dict[tuple[int, ...], torch.Tensor] = {}
        self._any: dict[int, torch.Tensor] = {}

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.model.args.vocab_size

    @property
    def kept_rows(self) -> int:
        """Rows of the cache behind the slots, which keep prefixes."""
        return cache.kept_rows(self.model.args, self.config, self._cache_dtype)

    @property
    def _cache_dtype(self) -> torch.dtype:
        return cache_dtype_for(self.config, self.model.activation_dtype)

    # --- compiling ----------------------------------------------------------------------------------------------------

    def is_ready(self, program: Program) -> bool:
        """Whether a program is compiled, or one that covers it."""
        return self._ready(program) is not None

    def _ready(self, program: Program) -> Program | None:
        """The compiled program that covers another with the fewest keys, or None."""
        if program not in self._covering:
            covering = (p for p in self._programs if p.covers(program))
            self._covering[program] = min(covering, key=lambda p: p.key_len, default=None)
        return self._covering[program]

    def compile(self, wanted: Sequences[Program] | None = None) -> None:
        """Compile programs ahead of their first use; run none of them.

        Args:
            wanted: which ones; None means all, after which no request can compile anything.

        Raises:
            RecompileError: ``fail_on_recompile`` is set, a compilation has been completed before, and something is left
                to compile.
            InterruptedRunError: ``stop_compiling`` was set; what has been compiled is kept.
        """
        missing = [p for p in (all_programs(self.config) if wanted is None else wanted) if not self.is_ready(p)]
        if missing:
            self._refuse_recompile(missing)
            seconds = self._announce(missing)
            with tqdm(
                missing, f"Compiling, about {seconds} s", unit="program", disable=not self.progress, leave=False
            ) as bar:
                for program in bar:
                    if not self.stop_compiling:
                        self._compile(program)
                    if self.stop_compiling:  # not warm: what is left is compiled when it is needed
                        raise InterruptedRunError("interrupted while compiling")
        self._warm = True

    def _announce(self, missing: Sequences[Program]) -> int:
        """Log how many programs are compiled now; return the seconds, if they take as long as others of their kind."""
        mean = {kind: sum(found) / len(found) if found else FIRST_GUESS_S[kind] for kind, found in self._took.items()}
        seconds = max(round(sum(mean[KINDS[program.kind].runs_model] for program in missing)), 1)
        log.info("Compiling %d program%s, about %d s", len(missing), "" if len(missing) == 1 else "s", seconds)
        return seconds

    def _refuse_recompile(self, missing: Sequences[Program]) -> None:
        if self._warm and self.config.fail_on_recompile:
            raise RecompileError(
                f"{len(missing)} programs would be compiled after warm-up: {', '.join(map(str, missing[:4]))}; warm up "
                "with prompts of this length, or with all programs (LLaMA.warm_up()), or run without "
                f"{setting('fail_on_recompile')}"
            )

    def _compile(self, program: Program) -> None:
        before = counters.compile_s
        arguments = [self._example(name, program) for name in program.takes]
        self._programs[program] = compiling.compile_program(
            str(program),
            program.function(self.model, self.config),
            arguments,
            program.donated,
            edits=not KINDS[program.kind].runs_model,
            splits=program.splits(self.model.parts),
        )
        self._covering.clear()
        self._took[KINDS[program.kind].runs_model].append(counters.compile_s - before)
        log.debug("Compiled %s in %.2f seconds", program, counters.compile_s - before)

    def _example(self, name: str, program: Program) -> torch.Tensor:
        """A tensor like the one of that name that every run of the program takes."""
        if name in State._fields or name in self._host:
            return self.tensor(name)
        if name in ("slot", "target", "position", "keys"):
            # not one and the same tensor for two arguments, which tracing could not tell apart
            return self._rows_of(np.zeros(self._groups, dtype=np.int32))
        if name == "draft_allowed":
            return self._any_token(program.length - 1)
        slots, positions, groups = self.config.max_batch_size, self.config.positions, self._groups
        stream = (groups, program.length, self.model.args.dim)
        shapes = {
            "row": (groups, 3 + positions),
            "ended": (slots,),
            "stream": stream,
            "drafts": (slots, program.length),
            "jacobi": (slots, program.length - 1),
        }
        dtypes = {"ended": torch.bool, "stream": self.model.activation_dtype}
        return transfers.upload_rows(torch.zeros(shapes[name], dtype=dtypes.get(name, torch.int32)), self.device)

    # --- tensors ------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all slots; the next use makes new tensors."""
        self._tensors, self._chosen, self._scored, self._stale = {}, [], [], set(self._host)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the slots, made or uploaded where it is missing or stale."""
        if name in self._stale:
            self._tensors[name] = self._uploaded(self._host[name].copy())
            self._stale.discard(name)
        elif name not in self._tensors:
            self._tensors |= self._fresh_state()._asdict()
        return self._tensors[name]

    def _fresh_state(self) -> State:
        """The state of empty slots: done, with one token each."""
        slots, positions = self.config.max_batch_size, self.config.positions
        zeros = torch.zeros(slots, dtype=torch.int32)
        host = (
            torch.zeros(slots, positions, dtype=torch.int32),
            zeros,
            zeros,
            torch.ones(slots, dtype=torch.int32),
            torch.zeros(slots, self.model.args.dim, dtype=self.model.activation_dtype),
            torch.ones(slots, dtype=torch.bool),
            torch.zeros(slots, REPORT_WINDOW + 2, dtype=torch.int32),
        )
        model = self.model
        keys_and_values = cache.allocate(model.args, self.config, self._cache_dtype, self.device, model.parts)
        return State(*keys_and_values, *(transfers.upload_rows(t, self.device) for t in host))

    @property
    def _groups(self) -> int:
        """M, among how many groups of devices the slots are divided."""
        return self.config.data_parallel

    def _number(self, value: int) -> torch.Tensor:
        """An int32 of one element on the device, uploaded once; on a mesh for every group."""
        return self._numbers_of((value,) * self._groups)

    def _at(self, *rows: int, others: int = -1) -> torch.Tensor:
        """The place of rows of the cache in their groups, which differ; ``others`` for groups that have no row."""
        return self._by_group({row: row // self._groups for row in rows}, others)

    def _by_group(self, numbers: Mapping[int, int], others: int) -> torch.Tensor:
        """A number for the group of each row, and ``others`` for the other groups."""
        found = [others] * self._groups
        for row, number in numbers.items():
            found[row % self._groups] = number
        return self._numbers_of(tuple(found))

    def _numbers_of(self, numbers: tuple[int, ...]) -> torch.Tensor:
        """An int32 for each group, uploaded once."""
        if numbers not in self._numbers:
            self._numbers[numbers] = self._rows_of(np.array(numbers, dtype=np.int32))
        return self._numbers[numbers]

    def _rows_of(self, array: np.ndarray) -> torch.Tensor:
        """Upload rows of the groups, in their order."""
        return transfers.upload_rows(torch.from_numpy(array), self.device)

    def _one_row(self, slot: int, row: np.ndarray) -> torch.Tensor:
        """Upload one row for the group of a slot."""
        rows = np.zeros((self._groups, *row.shape), dtype=row.dtype)
        rows[slot % self._groups] = row
        return self._rows_of(rows)

    def _uploaded(self, array: np.ndarray) -> torch.Tensor:
        """Upload a row for each slot."""
        by_group = array.reshape(-1, self._groups, *array.shape[1:]).swapaxes(0, 1)
        return self._rows_of(np.ascontiguousarray(by_group.reshape(array.shape)))

    def fetched(self, tensor: torch.Tensor) -> np.ndarray:
        """Fetch a row for each slot, or for each of a window. Host sync: yes."""
        host = transfers.fetch_rows(tensor)
        array: np.ndarray = (host.float() if host.dtype == torch.bfloat16 else host).numpy()
        return array.reshape(self._groups, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)

    def _run(self, program: Program, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run a program; keep the slots' tensors that it returns, and return the others.

        Compiles it first where nobody foresaw it.
        """
        ready = self._ready(program)
        if ready is None:
            self._refuse_recompile([program])
            self._announce([program])
            self._compile(program)
        arguments = [inputs[name] if name in inputs else self.tensor(name) for name in program.takes]
        outputs = dict(zip(program.returns, self._programs[ready or program](*arguments), strict=True))
        kept = {name: outputs.pop(name) for name in list(outputs) if name in State._fields}
        self._tensors |= kept
        return outputs

    # --- what the engine needs ----------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence) -> None:
        """Put a sequence into its slot: its tokens, its positions and its controls."""
        slot = _slot(sequence)
        self._set("controls", slot, packed_controls(sequence))
        if sequence.needs_full:
            self._set("logits_controls", slot, packed_logits_controls(sequence, self.vocab_size))
            self._allow(sequence)
        self.put(slot, sequence.prompt_ids, sequence.start, sequence.ready)

    def put(self, slot: int, ids: Sequences[int], start: int, ready: int) -> None:
        """Give a slot its known tokens and its positions."""
        row = np.zeros(3 + self.config.positions, dtype=np.int32)
        row[:3] = start, ready, len(ids)
        row[3 : 3 + len(ids)] = ids
        self._run(Program("admit"), row=self._one_row(slot, row), slot=self._at(slot))

    def chunk(self, runs: Sequences[tuple[Sequence, Chunk]]) -> None:
        """Run a chunk of each prompt; where tokens are scored, keep their details for the next snapshot."""
        length, key_len = runs[0][1].length, max(chunk.key_len for _, chunk in runs)
        slots = self._at(*(_slot(sequence) for sequence, _ in runs))
        keys = self._by_group({_slot(sequence): chunk.key_len for sequence, chunk in runs}, others=length)
        stream = self._run(Program("chunk", length=length, key_len=key_len), slot=slots, keys=keys)["stream"]
        scored = [(sequence, chunk) for sequence, chunk in runs if is_scored(chunk, sequence.scored_from)]
        if not scored:
            return
        starts = self._by_group({_slot(sequence): chunk.start for sequence, chunk in scored}, others=0)
        found = self._run(Program("score", length=length), slot=slots, position=starts, stream=stream)
        for sequence, chunk in scored:
            assert sequence.scored_from is not None
            # position p predicts token p + 1; the prompt's last position predicts a token that is not of the prompt
            first = max(sequence.scored_from - 1 - chunk.start, 0)
            count = min(chunk.valid, len(sequence.prompt_ids) - 1 - chunk.start) - first
            self._scored.append(Scored(Details(**found), _slot(sequence) % self._groups, sequence, first, count))

    def choose(self, sequences: Sequences[Sequence]) -> None:
        """Choose the first tokens of sequences after their last chunks."""
        full = [s for s in sequences if s.needs_full]
        plain = [_slot(s) for s in sequences if not s.needs_full]
        if plain:
            self._run(Program("choose"), slot=self._at(*plain))
        if full:
            rows = {s: _slot(s) % self._groups for s in full}
            self._choose_full(Program("full", rows=1), self._at(*map(_slot, full)), rows)

    def decode(self, window: Window, chooses: tuple[Sequence, ...]) -> None:
        """Run the next token of the slots in a window; the program ``full`` chooses for the sequences given."""
        program = Program("decode", rows=window.rows, key_len=window.key_len)
        first = self._first(window)
        self._run(program, slot=first, keys=self._number(window.key_len))
        if chooses:
            rows = {s: _slot(s) - window.first for s in chooses}
            self._choose_full(Program("full", rows=window.rows), first, rows)

    def _first(self, window: Window) -> torch.Tensor:
        """The first slot of a window, in each group."""
        return self._number(window.first // self._groups)

    def verify(self, window: Window, drafts: Sequences[Draft], draft_len: int) -> None:
        """Run the known tokens of the slots in a window and the drafts behind them, and keep what agrees."""
        slots = self.config.max_batch_size
        counted = np.zeros((slots, 1 + draft_len), dtype=np.int32)
        may: np.ndarray | None = None  # only where a grammar says what may follow a draft
        for draft in drafts:
            slot, count = _slot(draft.sequence), len(draft.token_ids)
            counted[slot, : 1 + count] = count, *draft.token_ids
            if draft.sequence.grammar is not None:
                self._allow(draft.sequence)
            if draft.masks:
                may = self._any_mask(draft_len) if may is None else may
                may[slot, : len(draft.masks)] = draft.masks
        found = self._run(
            Program("verify", rows=window.rows, length=draft_len + 1, key_len=window.key_len),
            drafts=self._uploaded(counted),
            draft_allowed=self._any_token(draft_len) if may is None else self._uploaded(may),
            slot=self._first(window),
            keys=self._number(window.key_len),
        )
        rows = {d.sequence: _slot(d.sequence) - window.first for d in drafts if any(d.sequence.kinds)}
        if rows:
            self._chosen.append(Chosen(Details(**found), rows))

    def lookahead(self, window: Window, jacobi: np.ndarray) -> np.ndarray:
        """What follows each column of the Jacobi windows [slots, levels * width] of the slots in a window: [rows,
        width]. Host sync: yes.
        """
        found = self._run(
            lookahead_program(self.config, window.rows, window.key_len),
            jacobi=self._uploaded(jacobi.astype(np.int32)),
            slot=self._first(window),
            keys=self._number(window.key_len),
        )
        return self.fetched(found["following"])

    def _any_token(self, draft_len: int) -> torch.Tensor:
        """The mask that allows every token after each draft, uploaded once."""
        if draft_len not in self._any:
            self._any[draft_len] = self._uploaded(self._any_mask(draft_len))
        return self._any[draft_len]

    def _any_mask(self, draft_len: int) -> np.ndarray:
        shape = (self.config.max_batch_size, draft_len, word_count(self.vocab_size))
        return np.full(shape, -1, dtype=np.int32)

    def _choose_full(self, program: Program, slot: torch.Tensor, rows: dict[Sequence, int]) -> None:
        """Choose with every control.

        Args:
            slot: that the program takes.
            rows: the row of each sequence that chooses.
        """
        for sequence in rows:
            if sequence.grammar is not None:
                self._allow(sequence)
        found = self._run(program, slot=slot)
        if any(any(s.kinds) for s in rows):
            self._chosen.append(Chosen(Details(**found), rows))

    def _allow(self, sequence: Sequence) -> None:
        """Have a grammar's mask uploaded before the next choice."""
        slot = _slot(sequence)
        allowed = np.int32(-1) if sequence.grammar is None else sequence.allowed(self.vocab_size)
        self._set("allowed", slot, allowed)

    def _set(self, name: str, slot: int, row: np.ndarray | np.int32) -> None:
        """Change a slot's row of a tensor that the host keeps."""
        if np.any(self._host[name][slot] != row):
            self._host[name][slot] = row
            self._stale.add(name)

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first ``count`` positions of a row of the cache to another row; the cost follows ``count``."""
        key_len = next(k for k in self.config.copy_lens if k >= count)
        # a group that has nothing to copy copies its first row to where it is
        self._run(Program("copy", key_len=key_len), slot=self._at(source, others=0), target=self._at(target, others=0))

    def move(self, source: int, target: int, count: int) -> None:
        """Move a slot's request, whose first ``count`` positions have been run, to another slot."""
        self.copy(source, target, count)
        self._run(Program("move"), slot=self._at(source), target=self._at(target))
        for name, rows in self._host.items():
            self._set(name, target, rows[source].copy())

    def end(self, slots: Iterable[int]) -> None:
        """End the requests in some slots: no later step chooses a token for them."""
        ended = np.zeros(self.config.max_batch_size, dtype=bool)
        ended[list(slots)] = True
        self._run(Program("end"), ended=self._uploaded(ended))

    # --- reading ------------------------------------------------------------------------------------------------------

    def snapshot(self, sequences: Iterable[Sequence]) -> Snapshot:
        """What can be read now of these sequences; later steps do not change it."""
        chosen, self._chosen = tuple(self._chosen), []
        scored, self._scored = tuple(self._scored), []
        return Snapshot(self.tensor("report"), {_slot(s): s for s in sequences}, chosen, scored)

    def read(self, snapshot: Snapshot) -> list[News]:
        """Fetch a snapshot and return what is new in it. Host sync: yes."""
        report = self.fetched(snapshot.report)
        for part in snapshot.scored:
            found = _row(self._fetched(part.details, part.sequence.kinds), part.row)
            part.sequence.prompt_details.append(found.part(part.begin, part.size))
        kinds = _needed_kinds(snapshot)
        fetched = [(self._fetched(each.details, kinds), each) for each in snapshot.chosen] if any(kinds) else []
        news = []
        for slot, sequence in snapshot.slots.items():
            length, ended = int(report[slot, -2]), bool(report[slot, -1])
            new_ids = new_tokens(report[slot], length - len(sequence.ids))
            steps = [_row(found, each.rows[sequence]) for found, each in fetched if sequence in each.rows]
            details = TokenDetails.joined(steps[: len(new_ids)]) if any(sequence.kinds) else None
            details = details and details.first(len(new_ids))  # a step that checks drafts has room for more
            news.append(News(sequence, new_ids, ended, details and details.of_kinds(sequence.kinds)))
        return news

    def _fetched(self, details: Details, kinds: tuple[bool, ...]) -> TokenDetails:
        """Some kinds of details, each [B, T, ...]. Host sync: yes."""
        pairs = zip(details, kinds, strict=True)
        return TokenDetails(*(self.fetched(each) if wanted else None for each, wanted in pairs))


def new_tokens(report: np.ndarray, count: int) -> list[int]:
    """The last ``count`` tokens of a slot's report.

    Raises:
        EngineError: the report holds fewer: tokens were generated that nobody read in time.
    """
    window = report.shape[0] - 2
    if not 0 <= count <= window:
        raise EngineError(f"a read would lose tokens: {count} are new, a report holds {window}")
    return [int(token) for token in report[window - count : window]]


def packed_controls(sequence: Sequence) -> np.ndarray:
    """A request's Controls as one row of words."""
    params = sequence.params
    seed = params.seed or 0
    stop_ids = np.full(CONTROLS.sizes("stop_ids"), -1, np.int32)
    stop_ids[: len(sequence.stop_ids)] = sequence.stop_ids
    return CONTROLS.pack(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32).view(np.int32),
        limit=sequence.limit,
        stop_ids=stop_ids,
        full=sequence.needs_full,
        details=sequence.kinds[0],
    )


def packed_logits_controls(sequence: Sequence, vocab_size: int) -> np.ndarray:
    """A request's LogitsControls as one row of words."""
    params, packing = sequence.params, logits_controls(vocab_size)
    biases = params.logit_bias or {}
    ids, bias = (
        np.zeros(packing.sizes("bias_ids"), np.int32),
        np.zeros(packing.sizes("bias"), np.float32),
    )
    ids[: len(biases)], bias[: len(biases)] = list(biases), list(biases.values())
    bad_words = np.full(packing.sizes("bad_words"), -1, np.int32)
    for line, word in enumerate(word for word in sequence.bad_words if len(word) > 1):
        bad_words[line, -len(word) :] = word
    # a grammar's mask changes at every step and is uploaded by itself
    allowed = np.int32(-1) if sequence.grammar is not None else sequence.allowed(vocab_size)
    return packing.pack(
        typical_p=params.typical_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        prompt_len=len(sequence.prompt_ids),
        first_stop=len(sequence.prompt_ids) + params.min_tokens,
        bias_ids=ids,
        bias=bias,
        bad_words=bad_words,
        in_prompt=bits_of(sequence.prompt_ids, vocab_size),
        allowed=allowed,
    )


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def _needed_kinds(snapshot: Snapshot) -> tuple[bool, ...]:
    """Which kinds of details some sequence of a snapshot needs."""
    columns = zip(*(s.kinds for s in snapshot.slots.values()), strict=True)
    return tuple(any(column) for column in columns) or (False, False, False)


def _row(details: TokenDetails, row: int) -> TokenDetails:
    """One row's part of what was fetched of several: [T, ...] each."""
    return TokenDetails(*(None if array is None else array[row] for array in details))
