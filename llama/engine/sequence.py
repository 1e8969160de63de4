"""One request, from submit to result: its ids, its slot, its times, its text and the details of its tokens.

A Sequence holds no device tensor. Those who own a part of it: ``inputs`` makes it, the scheduler gives it a slot, the
engine counts its positions and hands it what was read, and ``outputs`` makes its result.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Iterable, Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import numpy as np

from llama.config import word_count
from llama.engine.chunks import Chunk
from llama.engine.prefixes import key_of
from llama.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "interrupted"]
Kinds = tuple[bool, bool, bool]  # log-probabilities, hidden states, logits

_numbers = itertools.count()


class Status(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"  # in the queue
    PREFILLING = "prefilling"  # in a slot; chunks of its prompt are to be run
    RUNNING = "running"  # in a slot; decode steps run it
    ENDING = "ending"  # it needs no more steps; its last tokens are to be read
    FINISHED = "finished"


class Grammar(Protocol):
    """What a request's output must follow."""

    def allowed(self, vocab_size: int) -> np.ndarray:
        """The tokens that may come next: [W] int32 words of bits, the lowest bit first."""
        ...

    def advance(self, token_ids: SequenceOf[int]) -> None:
        """Follow the tokens that were chosen."""
        ...

    def ahead(self, token_ids: SequenceOf[int], vocab_size: int) -> list[np.ndarray]:
        """The tokens that may come after each of these, as far as they are allowed; nothing is followed."""
        ...


class Text(Protocol):
    """A growing text that may find a stop string in itself."""

    @property
    def stop(self) -> str | None:
        """The stop string that was found."""
        ...

    def push(self, token_id: int, *, search: bool) -> str:
        """Take a token; return the text that is certain now."""
        ...

    def finish(self) -> str:
        """Return the rest of the text; no more tokens come."""
        ...


class TokenDetails(NamedTuple):
    """Details of n tokens, on the host; None for a kind that was not requested.

    Attributes:
        logprobs: [n, token_info.WIDTH] float32.
        hidden_states: [n, dim] float32.
        logits: [n, V] float32.
    """

    logprobs: np.ndarray | None
    hidden_states: np.ndarray | None
    logits: np.ndarray | None

    @classmethod
    def joined(cls, parts: SequenceOf[TokenDetails]) -> TokenDetails | None:
        """The details of consecutive tokens; None without a part."""
        if not parts:
            return None
        columns = zip(*parts, strict=True)
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))

    def of_kinds(self, kinds: Kinds) -> TokenDetails:
        """Some kinds of it."""
        return TokenDetails(*(array if wanted else None for array, wanted in zip(self, kinds, strict=True)))

    def first(self, count: int) -> TokenDetails:
        """Those of the first ``count`` tokens."""
        return self.part(0, count)

    def part(self, first: int, count: int) -> TokenDetails:
        """Those of ``count`` tokens from ``first`` on."""
        return TokenDetails(*(None if array is None else array[first : first + count] for array in self))


class Draft(NamedTuple):
    """What a step is to check for one sequence.

    Attributes:
        sequence: whose.
        token_ids: guesses of the tokens after its last one; may be empty.
        masks: the tokens that its grammar allows after each guess, [W] int32 words of bits; empty without a grammar.
    """

    sequence: Sequence
    token_ids: list[int]
    masks: list[np.ndarray]


@dataclass
class DraftCounts:
    """How drafting went: vLLM's four counters.

    Attributes:
        drafts: steps that checked at least one drafted token.
        draft_tokens: drafted tokens that were checked.
        accepted_tokens: of them, those that were the chosen ones.
        accepted_per_position: how often the first, the second, ... drafted token was.
    """

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)

    def add(self, drafted: int, accepted: int) -> None:
        """Count a step that checked ``drafted`` tokens, of which the first ``accepted`` were right."""
        if not drafted:
            return
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += accepted
        missing = accepted - len(self.accepted_per_position)
        self.accepted_per_position += [0] * missing
        for place in range(accepted):
            self.accepted_per_position[place] += 1

    def merge(self, other: DraftCounts) -> None:
        """Add what another one has counted."""
        self.drafts += other.drafts
        self.draft_tokens += other.draft_tokens
        self.accepted_tokens += other.accepted_tokens
        pairs = itertools.zip_longest(self.accepted_per_position, other.accepted_per_position, fillvalue=0)
        self.accepted_per_position = [a + b for a, b in pairs]

    @property
    def rejected_tokens(self) -> int:
        """Drafted tokens that were checked in vain."""
        return self.draft_tokens - self.accepted_tokens


@dataclass(eq=False)
class Sequence:
    """One request.

    Attributes:
        prompt_ids: at least one token id.
        params: its controls; ``seed`` is set, and prompt plus ``max_gen_len`` fit into ``max_seq_len``.
        stop_ids: ids that end it; they are not part of its tokens.
        bad_words: token sequences that are never completed.
        grammar: what its output must follow, or None.
        text: what its tokens become, or None where nobody wants text.
        index: the prompt's place in its call.
        sample: which of the prompt's samples.
        leader: the sequence that has the same prompt and prefills it for this one.
        scored_from: the first token of the prompt whose log-probability is wanted; None where none is.
        generates: it chooses tokens; without it its prompt is scored, and that is all.
        id: its number in this process.
        status: where it stands.
        slot: where it runs, or ran last; None before.
        ids: the prompt's and the generated ids that the host knows, a stop token included.
        token_ids: the generated ids that are part of the result.
        start: the position of the next token to run.
        length: the most tokens that the device may have; fewer where it met a stop token.
        cached: leading positions that were not run again.
        chunks: the chunks of its prompt that are still to be run.
        ready: the position from which decode steps run it.
        finish_reason, stop_reason: why it ended: a stop token's id, or a stop string.
        error: what ended it instead.
        runs: program runs that took part in it.
        submitted, admitted, first_token, finished: seconds of ``time.perf_counter``; None before.
        drafting: how many of its tokens were drafted.
        details: of the generated tokens, the stop token included; one part a read.
        prompt_details: of the prompt's tokens from ``scored_from`` on, one part a chunk.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None
    text: Text | None = None
    index: int = 0
    sample: int = 0
    leader: Sequence | None = None
    scored_from: int | None = None
    generates: bool = True
    id: int = field(default_factory=_numbers.__next__)
    status: Status = Status.WAITING
    slot: int | None = None
    ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    start: int = 0
    length: int = 0
    cached: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    ready: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: Exception | None = None
    runs: int = 0
    submitted: float | None = None
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    drafting: DraftCounts = field(default_factory=DraftCounts)
    details: list[TokenDetails] = field(default_factory=list)
    prompt_details: list[TokenDetails] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = list(self.prompt_ids)
        self.length = len(self.ids)

    @property
    def limit(self) -> int:
        """The length, prompt included, at which it ends."""
        return len(self.prompt_ids) + (self.params.max_gen_len if self.generates else 0)

    @property
    def prompt_run(self) -> int:
        """How many tokens of its prompt have to be run: all, or all but the last one where that is only scored."""
        return len(self.prompt_ids) - (0 if self.generates else 1)

    @property
    def most_cached(self) -> int:
        """How many leading positions need not be run, if some row holds them: the token before the first one that is
        chosen or scored is run in any case, because its hidden state is needed.
        """
        return (len(self.prompt_ids) if self.scored_from is None else self.scored_from) - 1

    @cached_property
    def prompt_key(self) -> bytes:
        """The tokens of its prompt that are run, as a key of ``engine.prefixes``."""
        return key_of(self.prompt_ids[: self.prompt_run])

    @property
    def kinds(self) -> Kinds:
        """Which details of its tokens are needed: those requested, and log-probabilities to rank samples by."""
        params = self.params
        return params.logprobs is not None or params.is_ranked, params.hidden_states, params.logits

    @property
    def is_scored(self) -> bool:
        """Whether the log-probabilities of all tokens from ``scored_from`` on have been read."""
        read = sum(0 if part.logprobs is None else len(part.logprobs) for part in self.prompt_details)
        return self.scored_from is not None and read == len(self.prompt_ids) - self.scored_from

    @property
    def needs_full(self) -> bool:
        """Whether the program ``full`` chooses its tokens."""
        return self.generates and (any(self.kinds) or self.params.reshapes_logits)

    @property
    def is_live(self) -> bool:
        """Whether it occupies a slot."""
        return self.status in (Status.PREFILLING, Status.RUNNING)

    @property
    def held_ids(self) -> list[int]:
        """The ids whose keys and values its slot holds. The last token was chosen, but may not have been run."""
        return self.ids[: min(self.start, len(self.ids) - 1)]

    def allowed(self, vocab_size: int) -> np.ndarray:
        """The tokens that may come next as far as single tokens decide: [W] int32 words of bits.

        A grammar has the last word: where it allows bad words only, they are allowed.
        """
        if self.grammar is not None:
            allowed = self.grammar.allowed(vocab_size)
        elif self.params.allowed_token_ids is not None:
            allowed = bits_of(self.params.allowed_token_ids, vocab_size)
        else:
            allowed = np.full(word_count(vocab_size), -1, dtype=np.int32)
        return self._without_banned(allowed, vocab_size)

    def draft(self, guesses: SequenceOf[int], vocab_size: int) -> Draft:
        """The guesses that are worth checking.

        They end with a stop token, before the limit (the last token is chosen in any case), and before a token that the
        vocabulary does not have or a grammar does not allow.
        """
        room = min(self.limit - self.length - 1, len(guesses))
        useful: list[int] = []
        for token_id in guesses[: max(room, 0)]:
            if not 0 <= token_id < vocab_size:
                break
            useful.append(int(token_id))
            if token_id in self.stop_ids:
                break
        if self.grammar is None or not useful:
            return Draft(self, useful, [])
        masks = self.grammar.ahead(useful, vocab_size)
        return Draft(self, useful[: len(masks)], [self._without_banned(mask, vocab_size) for mask in masks])

    def _without_banned(self, allowed: np.ndarray, vocab_size: int) -> np.ndarray:
        """A mask without the bad words of one token, if it allows any other token."""
        banned = [word[0] for word in self.bad_words if len(word) == 1]
        if not banned:  # the usual case, at every step of a request that follows a grammar
            return allowed
        rest = allowed & ~bits_of(banned, vocab_size)
        return rest if rest.any() else allowed

    def take(self, new_ids: list[int], ended: bool, details: TokenDetails | None = None) -> str:
        """Take tokens that were read from the device; return the text that they make certain.

        Args:
            new_ids: in order, a stop token included.
            ended: the device has ended the slot with the last of them.
            details: of these tokens, where the request needs them.

        Raises:
            ConfigError: the grammar cannot be followed.
        """
        if new_ids and self.first_token is None:
            self.first_token = time.perf_counter()
        self.ids += new_ids
        stop_id = new_ids[-1] if ended and new_ids and new_ids[-1] in self.stop_ids else None
        chosen = new_ids if stop_id is None else new_ids[:-1]
        if self.grammar is not None and chosen:
            self.grammar.advance(chosen)
        shown, before = new_ids if self.params.include_stop else chosen, len(self.token_ids)
        found = "".join(self._texts(shown))
        if details is not None:
            cut = self.finish_reason is not None  # by a stop string: later tokens do not count
            self.details.append(details.first(len(self.token_ids) - before) if cut else details)
        if self.finish_reason is None and ended:
            self.stop_reason = stop_id
            found += self.finish("length" if stop_id is None else "stop")
        return found

    def _texts(self, token_ids: list[int]) -> Iterable[str]:
        """The text of each token, up to the one that completes a stop string, which ends the sequence."""
        for token_id in token_ids:
            self.token_ids.append(token_id)
            if self.text is not None:
                yield self.text.push(token_id, search=len(self.token_ids) > self.params.min_tokens)
                if self.text.stop is not None:
                    self.stop_reason = self.text.stop
                    self.finish("stop")
                    return

    def finish(self, reason: FinishReason) -> str:
        """End it; return the rest of its text."""
        self.finish_reason, self.finished = reason, time.perf_counter()
        return "" if self.text is None or self.text.stop is not None else self.text.finish()


class Update(NamedTuple):
    """News of a sequence.

    Attributes:
        sequence: whose.
        text: text that became certain; may be empty.
        is_last: it has ended: its ``finish_reason`` or its ``error`` is set.
    """

    sequence: Sequence
    text: str
    is_last: bool = False


def bits_of(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """A set of token ids as [W] int32 words of bits, the lowest bit first."""
    member = np.zeros(word_count(vocab_size) * 32, dtype=bool)
    member[list(token_ids)] = True
    return np.packbits(member, bitorder="little").view(np.int32)


def common_prefix(a: SequenceOf[int], b: SequenceOf[int]) -> int:
    """How many leading ids two sequences share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
