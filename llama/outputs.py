"""What a call returns: typed results, as Python objects and as the JSON that the command line prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import numpy as np

from llama.chat import Message
from llama.compiled.token_info import TokenLogprob, finite
from llama.engine.batch import FinishReason


@dataclass(frozen=True)
class Timing:
    """Seconds and rates of the batch that a prompt ran in.

    Attributes:
        load_s: loading the weights and the tokenizer, once a model.
        compile_s: compiling the programs that this call needed and did not have.
        ttft_s: from the start of the batch to its first tokens on the host; compiling is not part of it.
        prefill_s: the prompt chunks alone, up to the first tokens on the host.
        decode_s: from there to the last token on the host.
        prefill_tok_s: prompt tokens a second: of the batch's rows, less those in the cache, and of several samples'
            prompt once.
        decode_tok_s: tokens a second that decode steps really produced, over all rows: stop tokens and padding do not
            count.
    """

    load_s: float
    compile_s: float
    ttft_s: float
    prefill_s: float
    decode_s: float
    prefill_tok_s: float
    decode_tok_s: float


@dataclass(frozen=True)
class ProgramCount:
    """Programs compiled for the call, and program runs of the batch."""

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
        timing, programs: of the batch.
        logprobs: of each of ``token_ids``; None where they were not asked for.
        prompt_logprobs: of the prompt's tokens; the first is None, because nothing stands before it.
        hidden_states: [n, dim] float32, of the last layer, behind its norm: those from which the n tokens of
            ``token_ids`` were chosen, and before them, with prompt_logprobs, those from which the prompt's tokens from
            the second on are told.
        logits: [n, vocab] float32, raw, of the same positions.
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
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    hidden_states: np.ndarray | None = None
    logits: np.ndarray | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum over ``token_ids``: the logarithm of the generation's probability, behind its prompt."""
        return None if self.logprobs is None else float(sum(each.logprob for each in self.logprobs))

    def as_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints on one line; what was not asked for has no key, and arrays go to files."""
        found: dict[str, Any] = {name: getattr(self, name) for name in _PRINTED}
        found["usage"] = {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": len(self.token_ids),
        }
        found["timing"] = {name: round(value, 6) for name, value in asdict(self.timing).items()}
        found |= {"programs": asdict(self.programs), "seed": self.seed}
        if self.logprobs is not None:
            found["cumulative_logprob"] = finite(self.cumulative_logprob or 0.0)
            found["logprobs"] = [each.as_json() for each in self.logprobs]
        if self.prompt_logprobs is not None:
            found["prompt_logprobs"] = [None if each is None else each.as_json() for each in self.prompt_logprobs]
        return found


_PRINTED = ("index", "sample", "prompt", "generation", "token_ids", "finish_reason", "stop_reason")


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
