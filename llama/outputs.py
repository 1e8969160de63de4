"""What a call returns: typed results, as Python objects and as the JSON that the command line prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence as Sequences
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

import numpy as np

from llama.chat import Message
from llama.detokenizer import Detokenizer
from llama.engine.sequence import DraftCounts, FinishReason, Sequence, TokenDetails
from llama.sampling_params import MAX_LOGPROBS
from llama.tokenizer import Tokenizer

LEAST = -9999.0  # what JSON says for -inf, which it has no number for (as OpenAI and vLLM)


@dataclass(frozen=True)
class TopLogprob:
    """One of the likeliest tokens at a position; the fields are those of ``TokenLogprob``."""

    token_id: int
    token: str
    bytes: tuple[int, ...]
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(TopLogprob):
    """What is known of a token that was chosen, or that stands in a prompt.

    Attributes:
        token_id: its id.
        token: its text; U+FFFD where it holds only part of a character.
        bytes: its text as UTF-8 bytes, which joined over tokens are always whole.
        logprob: natural logarithm of its probability.
        rank: 1 for the likeliest token of the vocabulary, 2 for the next.
        top: the likeliest tokens, as many as were asked for, likeliest first.
    """

    rank: int
    top: tuple[TopLogprob, ...]

    def as_json(self) -> dict[str, Any]:
        """In the shape of OpenAI's chat completions, with the id and the rank."""
        return {**_json(self), "rank": self.rank, "top_logprobs": [_json(each) for each in self.top]}


def _json(each: TopLogprob) -> dict[str, Any]:
    return {"id": each.token_id, "token": each.token, "bytes": list(each.bytes), "logprob": finite(each.logprob)}


def finite(logprob: float) -> float:
    """A log-probability as JSON can say it."""
    return max(round(logprob, 6), LEAST) if logprob > -np.inf else LEAST


def read_logprobs(
    described: np.ndarray, token_ids: Sequences[int], top: int, tokenizer: Tokenizer
) -> list[TokenLogprob]:
    """Tokens with what ``describe`` found of them.

    Args:
        described: [n, WIDTH] float32.
        token_ids: n ids.
        top: how many of the likeliest are wanted, up to MAX_LOGPROBS.
        tokenizer: what ids mean.
    """
    found = []
    for token_id, numbers in zip(token_ids, described.tolist(), strict=True):
        likeliest, ids = numbers[2 : 2 + MAX_LOGPROBS], numbers[2 + MAX_LOGPROBS :]
        alternatives = [
            _named(int(i), value, tokenizer)
            for i, value in zip(ids[:top], likeliest[:top], strict=True)
            if value > -np.inf
        ]
        own = _named(token_id, numbers[0], tokenizer)
        found.append(
            TokenLogprob(own.token_id, own.token, own.bytes, own.logprob, int(numbers[1]), tuple(alternatives))
        )
    return found


def _named(token_id: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    return TopLogprob(token_id, data.decode(errors="replace"), tuple(data), logprob)


@dataclass(frozen=True)
class Timing:
    """Seconds and rates of one request.

    Attributes:
        load_s: loading the weights and the tokenizer, once a model; without imports and the start of the device.
        compile_s: compiling the programs that its call needed and did not have; no other number includes it.
        queue_s: from submit to a free slot.
        ttft_s: from submit to its first token on the host.
        prefill_s: from its slot to its first token on the host.
        decode_s: from there to its last token on the host.
        prefill_tok_s: prompt tokens a second, without those that were cached.
        decode_tok_s: tokens a second that decode steps produced for it: all but the first.
    """

    load_s: float
    compile_s: float
    queue_s: float
    ttft_s: float
    prefill_s: float
    decode_s: float
    prefill_tok_s: float
    decode_tok_s: float

    @classmethod
    def of(cls, sequence: Sequence, load_s: float, compile_s: float) -> Timing:
        """The times of a sequence that has ended."""
        submitted = sequence.submitted or 0.0
        finished = sequence.finished or submitted
        admitted = finished if sequence.admitted is None else sequence.admitted
        first = finished if sequence.first_token is None else sequence.first_token
        prefill_s, decode_s = first - admitted, finished - first
        run = len(sequence.prompt_ids) - sequence.cached if sequence.first_token is not None else 0
        decoded = max(len(sequence.ids) - len(sequence.prompt_ids) - 1, 0)
        return cls(
            load_s=load_s,
            compile_s=compile_s,
            queue_s=admitted - submitted,
            ttft_s=first - submitted,
            prefill_s=prefill_s,
            decode_s=decode_s,
            prefill_tok_s=run / prefill_s if prefill_s else 0.0,
            decode_tok_s=decoded / decode_s if decode_s else 0.0,
        )


@dataclass
class Totals:
    """Sums over a call's requests, complete when the call has ended.

    Attributes:
        requests: samples that were run.
        total_s: from the call's first submit to its last token.
        ttft_s: to its first token.
        prefill_s: seconds in which some request was between its slot and its first token.
        decode_s: seconds in which some request was between its first token and its last.
        prompt_lengths: tokens of each prompt that has had a first token chosen, once for all its samples.
        cached_tokens: how many of them the cache still held.
        prompt_tokens: tokens of the prompts that were run; those that were cached do not count.
        generated_tokens: tokens of the results.
        decoded_tokens: tokens that decode steps produced.
        runs: runs of programs that read the weights, those of other callers included.
        drafting: drafts of all requests.
    """

    requests: int = 0
    total_s: float = 0.0
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_lengths: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    decoded_tokens: int = 0
    runs: int = 0
    drafting: DraftCounts = field(default_factory=DraftCounts)

    def add_up(self, sequences: Sequences[Sequence], runs: int) -> None:
        """Fill it in from the sequences of a call that has ended."""
        began = min(s.submitted or 0.0 for s in sequences)
        spans = [(s.admitted, s.first_token, s.finished) for s in sequences]
        firsts = [first for _, first, _ in spans if first is not None]
        self.requests, self.runs = len(sequences), runs
        self.total_s = max(s.finished or began for s in sequences) - began
        self.ttft_s = min(firsts, default=began) - began
        self.prefill_s = covered([(a, b) for a, b, _ in spans if a is not None and b is not None])
        self.decode_s = covered([(b, c) for _, b, c in spans if b is not None and c is not None])
        leaders = [s for s in sequences if s.leader is None and s.first_token is not None]
        self.prompt_lengths = [len(s.prompt_ids) for s in leaders]
        self.cached_tokens = sum(s.cached for s in leaders)
        self.prompt_tokens = sum(len(s.prompt_ids) - s.cached for s in sequences if s.first_token is not None)
        self.generated_tokens = sum(len(s.token_ids) for s in sequences)
        self.decoded_tokens = sum(max(len(s.ids) - len(s.prompt_ids) - 1, 0) for s in sequences)
        for sequence in sequences:
            self.drafting.merge(sequence.drafting)

    def classic_lines(self) -> Iterator[str]:
        """The lines with which pytorch-tpu/llama ends a call, in its words.

        The original counts the steps of its longest row, stop token included, and decodes all positions but the last.
        Here both lines count the tokens of all results: those decoded are the prompts' and the generated ones.
        """
        shortest, longest = min(self.prompt_lengths, default=0), max(self.prompt_lengths, default=0)
        cached = f", {self.cached_tokens} of them cached" if self.cached_tokens else ""
        yield f"Processed prompts with {shortest} to {longest} tokens, and generated {self.generated_tokens} tokens"
        decoded = sum(self.prompt_lengths) + self.generated_tokens
        yield f"Totally decoded {decoded} tokens in {self.total_s:.5f} seconds{cached}"


def covered(spans: Sequences[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


@dataclass(frozen=True)
class ProgramCount:
    """Programs compiled for the call, and program runs that took part in the request."""

    compiled: int
    runs: int


@dataclass(frozen=True)
class Generation:
    """What became of one prompt.

    Attributes:
        index: the prompt's place in the call.
        sample: which of its ``n`` samples, from 0; the best first where they were chosen from more.
        prompt: its text.
        generation: the text that follows it; the prompt is not repeated, and a space between the two belongs to the
            generation.
        token_ids: the generated ids, without the stop token, but with the tokens of a stop string.
        finish_reason: ``stop`` at a stop token or a stop string, ``length`` at max_gen_len, ``interrupted`` at
            LLaMA.interrupt().
        stop_reason: the id of that stop token, or that stop string; None otherwise.
        prompt_tokens: tokens of the prompt, BOS included.
        cached_tokens: how many of them the cache still held, so that they were not run again.
        seed: the one used; repeat it for the same text.
        timing, programs: of the request.
        totals: of its call, complete when the call has ended.
        logprobs: of each of ``token_ids``; None where they were not asked for.
        prompt_logprobs: of the prompt's tokens; the first is None, because nothing stands before it.
        hidden_states: [n, dim] float32, of the last layer, after its norm: those from which the n tokens of
            ``token_ids`` were chosen, and before them, with prompt_logprobs, those from which the prompt's tokens from
            the second on are told.
        logits: [n, vocab] float32, raw, of the same positions.
        drafting: how many of its tokens were drafted; None without a drafter.
    """

    index: int
    sample: int
    prompt: str
    generation: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_tokens: int
    cached_tokens: int
    seed: int
    timing: Timing
    programs: ProgramCount
    totals: Totals
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    hidden_states: np.ndarray | None = None
    logits: np.ndarray | None = None
    drafting: DraftCounts | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum over ``token_ids``: the logarithm of the generation's probability after its prompt."""
        return None if self.logprobs is None else float(sum(each.logprob for each in self.logprobs))

    def as_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints on one line; what was not asked for has no key, and arrays go to files."""
        found: dict[str, Any] = {name: getattr(self, name) for name in _PRINTED}
        found["usage"] = {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": len(self.token_ids),
        }
        if self.drafting is not None:
            found["usage"]["completion_tokens_details"] = {
                "accepted_prediction_tokens": self.drafting.accepted_tokens,
                "rejected_prediction_tokens": self.drafting.rejected_tokens,
            }
            found["drafting"] = asdict(self.drafting)
        found["timing"] = {name: round(value, 6) for name, value in asdict(self.timing).items()}
        found |= {"programs": asdict(self.programs), "seed": self.seed}
        if self.logprobs is not None:
            found["cumulative_logprob"] = finite(self.cumulative_logprob or 0.0)
            found["logprobs"] = [each.as_json() for each in self.logprobs]
        if self.prompt_logprobs is not None:
            found["prompt_logprobs"] = [None if each is None else each.as_json() for each in self.prompt_logprobs]
        return found


_PRINTED = ("index", "sample", "prompt", "generation", "token_ids", "finish_reason", "stop_reason")


def result_of(
    sequence: Sequence, prompt: str, tokenizer: Tokenizer, timing: Timing, programs: ProgramCount, totals: Totals
) -> Generation:
    """The result of a sequence that has ended.

    Args:
        prompt: its text.
        tokenizer: what its ids mean.
    """
    assert sequence.finish_reason is not None
    assert isinstance(sequence.text, Detokenizer)
    params, token_ids = sequence.params, sequence.token_ids
    assert params.seed is not None
    own = TokenDetails.joined(sequence.details)
    own = None if own is None else own.first(len(token_ids))
    before = TokenDetails.joined((sequence.leader or sequence).prompt_details)
    is_scored = (sequence.leader or sequence).params.prompt_logprobs

    def read(details: TokenDetails | None, ids: Sequences[int]) -> list[TokenLogprob]:
        if details is None or details.logprobs is None:  # interrupted before the first token
            return []
        return read_logprobs(details.logprobs, ids, params.logprobs or 0, tokenizer)

    prompt_logprobs: list[TokenLogprob | None] | None = None
    if is_scored and before is not None and params.logprobs is not None:
        prompt_logprobs = [None, *read(before, sequence.prompt_ids[1:])]
    return Generation(
        index=sequence.index,
        sample=sequence.sample,
        prompt=prompt,
        generation=sequence.text.text,
        token_ids=token_ids,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        prompt_tokens=len(sequence.prompt_ids),
        cached_tokens=sequence.cached,
        seed=params.seed,
        timing=timing,
        programs=programs,
        totals=totals,
        logprobs=None if params.logprobs is None else read(own, token_ids),
        prompt_logprobs=prompt_logprobs,
        hidden_states=_joined("hidden_states", before, own) if params.hidden_states else None,
        logits=_joined("logits", before, own) if params.logits else None,
    )


def mean_logprob(sequence: Sequence) -> float:
    """The mean log-probability of the tokens that were chosen, the stop token included."""
    details = TokenDetails.joined(sequence.details)
    return -np.inf if details is None or details.logprobs is None else float(details.logprobs[:, 0].mean())


def _joined(field: str, *parts: TokenDetails | None) -> np.ndarray | None:
    """One field of the prompt's and the generation's details, one after the other; None where there are none."""
    arrays = [array for part in parts if part is not None and (array := getattr(part, field)) is not None]
    return np.concatenate(arrays) if arrays else None


@dataclass(frozen=True)
class Piece:
    """Text that became certain, and at a prompt's end its result.

    Attributes:
        index: the prompt's place in the call.
        sample: which of its samples.
        text: possibly empty.
        result: on the sample's last piece only.
    """

    index: int
    sample: int
    text: str
    result: Generation | None


class TokenList(TypedDict, total=False):
    """What Meta's results hold where log-probabilities were asked for: a text and a number for each token."""

    tokens: list[str]
    logprobs: list[float]


class CompletionPrediction(TokenList):
    """Meta's result of a text completion."""

    generation: str


class ChatPrediction(TokenList):
    """Meta's result of a chat completion."""

    generation: Message
