"""A draft model: a second, smaller model writes ahead, and the large one checks what it wrote.

It has slots of its own, one beside each of the large model's, and runs the same programs (engine/programs.py) on its
own weights. It draws each token from the noise of the token's own (seed, position), which the large model's choice
reads, too: where both think alike they draw the same token. (Sources: Leviathan et al., arXiv 2211.17192, for the idea;
Daliri, Musco and Suresh, arXiv 2408.07978, for the common noise.)
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from llama.engine import chunks
from llama.engine.drafting import Drafter, Drafts
from llama.engine.programs import Program, all_programs
from llama.engine.runner import XlaRunner, new_tokens
from llama.engine.scheduler import Window, window_of
from llama.engine.sequence import Sequence, common_prefix
from llama.errors import ConfigError, setting
from llama.sampling_params import SamplingParams
from llama.tokenizer import Tokenizer

KINDS = ("admit", "chunk", "decode")  # the programs that it runs
FEW = 2  # known tokens that decode steps run before they draft; more are run apart from the other rows


@dataclass
class _Held:
    """What the draft model's slot holds of a sequence.

    Attributes:
        sequence: whose.
        ids: its ids; the list grows with it.
        shadow: stands for it in the draft model's slot.
        ran: leading ids that have been run.
        drafts: tokens that were drafted behind them and have been run, too.
    """

    sequence: weakref.ref[Sequence]
    ids: list[int]
    shadow: Sequence
    ran: int
    drafts: list[int] = field(default_factory=list)


class DraftModel(Drafter):
    """Drafts by a second model.

    Args:
        runner: the second model with programs and slots of its own, as many as the first one's and as long.
    """

    def __init__(self, runner: XlaRunner) -> None:
        self._runner = runner
        self._held: dict[int, _Held] = {}  # by slot

    @property
    def stop_compiling(self) -> bool:
        """See Drafter."""
        return self._runner.stop_compiling

    @stop_compiling.setter
    def stop_compiling(self, stop: bool) -> None:
        self._runner.stop_compiling = stop

    def prepare(self, sequences: SequenceOf[Sequence] | None) -> None:
        """See Drafter."""
        config = self._runner.config
        if sequences is None:
            self._runner.compile([p for p in all_programs(config) if p.kind in KINDS])
            return
        reach = min(max(s.limit for s in sequences), config.max_seq_len)
        keys = chunks.key_bucket(reach, config)
        width = next(w for w in config.widths if w >= min(len(sequences), config.max_batch_size))
        lengths = [b for b in config.buckets if 1 < b < reach]  # one that changes its slot begins anew, at any length
        wanted = [Program("chunk", length=b, key_len=max(keys, chunks.key_bucket(b, config))) for b in lengths]
        self._runner.compile([Program("admit"), *wanted, Program("decode", rows=width, key_len=keys)])

    def propose(self, sequences: SequenceOf[Sequence], draft_len: int) -> Drafts:
        """See Drafter."""
        try:
            return self._drafted(sequences, draft_len)
        except BaseException:  # what its slots hold is unknown
            self._held.clear()
            self._runner.reset()
            raise

    def _drafted(self, sequences: SequenceOf[Sequence], draft_len: int) -> Drafts:
        held = [self._followed(sequence) for sequence in sequences]
        behind = [each for each in held if self._missing(each) > FEW]
        if behind:
            self._catch_up(behind)
        for each in held:
            if each not in behind:
                ids = each.ids
                self._runner.put(self._slot(each), ids, each.ran, each.ran)
        steps = max(map(self._missing, held)) + draft_len - 1
        window = self._window(held, draft_len)
        for _ in range(steps):
            self._runner.decode(window, ())
        report = self._runner.fetched(self._runner.snapshot(()).report)
        guesses = []
        for each in held:
            ids, slot = each.ids, self._slot(each)
            found = new_tokens(report[slot], int(report[slot, -2]) - len(ids))
            each.ran, each.drafts = len(ids), found[:-1]
            guesses.append(found)
        return Drafts.of(guesses, draft_len)

    def _followed(self, sequence: Sequence) -> _Held:
        """What the sequence's slot holds of it, without drafts that did not come true. Of a sequence that was there
        before it keeps what both begin with, as the turns of a conversation do.
        """
        assert sequence.slot is not None
        held = self._held.get(sequence.slot)
        if held is None or held.sequence() is not sequence:
            given, room = sequence.params, self._runner.config.positions
            params = SamplingParams(
                room, given.temperature, given.top_p, given.seed, top_k=given.top_k, min_p=given.min_p
            )
            shadow = Sequence((0,), params)
            shadow.slot = sequence.slot
            self._runner.admit(shadow)  # its controls; its tokens come by ``put``
            shared = 0 if held is None else common_prefix(held.ids[: held.ran], sequence.ids)
            held = _Held(weakref.ref(sequence), sequence.ids, shadow, shared)
            self._held[sequence.slot] = held
        held.ran += common_prefix(held.drafts, sequence.ids[held.ran : held.ran + len(held.drafts)])
        held.ran, held.drafts = min(held.ran, len(sequence.ids) - 1), []
        return held

    def _catch_up(self, behind: SequenceOf[_Held]) -> None:
        """Run all but the last few known tokens of some sequences: chunks, and decode steps for what fills none.

        Rows beside them run on meanwhile; they are put where they belong afterwards.
        """
        for each in behind:
            ids = each.ids
            plan = self._plan(len(ids), each.ran)
            ready = plan[-1].end if plan else each.ran
            self._runner.put(self._slot(each), ids, each.ran, ready)
            for chunk in plan:
                self._runner.chunk([(each.shadow, chunk)])
            each.ran = ready
        steps = max(max(map(self._missing, behind)) - FEW, 0)
        window = self._window(behind, 0)
        for _ in range(steps):
            self._runner.decode(window, ())
        for each in behind:
            each.ran = min(each.ran + steps, len(each.ids) - 1)
            self._runner.put(self._slot(each), each.ids, each.ran, each.ran)

    def _plan(self, count: int, ran: int) -> list[chunks.Chunk]:
        """The chunks that run known tokens: all but the last, behind which a decode step chooses."""
        return chunks.prefill(count - 1, self._runner.config, ran)[0] if count - 1 > ran else []

    def _window(self, held: SequenceOf[_Held], draft_len: int) -> Window:
        config = self._runner.config
        reach = max(len(each.ids) for each in held) + draft_len
        return window_of([self._slot(each) for each in held], reach, config, config.widths, self._is_ready)

    def _is_ready(self, rows: int, key_len: int) -> bool:
        return self._runner.is_ready(Program("decode", rows=rows, key_len=key_len))

    def _missing(self, held: _Held) -> int:
        return len(held.ids) - held.ran

    @staticmethod
    def _slot(held: _Held) -> int:
        assert held.shadow.slot is not None
        return held.shadow.slot


def check_same_vocabulary(tokenizer: Tokenizer, draft: Tokenizer) -> None:
    """Refuse a draft model whose ids mean something else.

    Raises:
        ConfigError: the first ids that differ.
    """
    for token_id in range(min(tokenizer.n_words, draft.n_words)):
        pair = [_told(each, token_id) for each in (tokenizer, draft)]
        if pair[0] != pair[1]:
            raise ConfigError(
                f"draft_ckpt_dir: its vocabulary is another one: id {token_id} is {pair[0]} in the model and {pair[1]} "
                "in the draft model; a draft model needs the same tokenizer"
            )
    if tokenizer.n_words != draft.n_words:
        raise ConfigError(
            f"draft_ckpt_dir: its vocabulary has {draft.n_words} ids, the model's {tokenizer.n_words}: "
            f"id {min(tokenizer.n_words, draft.n_words)} is in one of them only; a draft model needs the same "
            f"tokenizer, or give {setting('tokenizer_path')} if the model's own was not found"
        )


def _told(tokenizer: Tokenizer, token_id: int) -> str:
    """What an id is, for a comparison and a message."""
    special = next((name for name, known in tokenizer.special_ids.items() if known == token_id), None)
    return f"control token {special!r}" if special is not None else repr(tokenizer.token_bytes(token_id))
