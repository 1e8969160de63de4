"""What a call returns: typed results, as Python objects and as the JSON that the command line prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from llama.chat import Message
from llama.engine import FinishReason


@dataclass(frozen=True)
class Timing:
    """Seconds and rates of the batch that a prompt ran in.

    Attributes:
        load_s: loading the weights and the tokenizer, once a model.
        compile_s: compiling the programs that this call needed and did not have.
        ttft_s: from the start of the batch to its first tokens on the host; compiling is not part of it.
        prefill_s: the prompt chunks alone, up to the first tokens on the host.
        decode_s: from there to the last token on the host.
        prefill_tok_s: prompt tokens of the batch's rows a second.
        decode_tok_s: tokens a second that decode steps really produced, over all rows: stop tokens and padding do not count.
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
        prompt: its text.
        generation: the text that follows it; the prompt is not repeated, and a space between the two belongs to the generation.
        token_ids: the generated ids, without the stop token.
        finish_reason: ``stop`` at a stop token, ``length`` at max_gen_len, ``interrupted`` at LLaMA.interrupt().
        prompt_tokens: tokens of the prompt, BOS included.
        cached_tokens: how many of them the cache still held, so that they were not run again.
        seed: the one used; repeat it for the same text.
        timing, programs: of the batch.
    """

    index: int
    prompt: str
    generation: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    seed: int
    timing: Timing
    programs: ProgramCount

    def as_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints on one line."""
        fields = asdict(self)
        usage = {
            "prompt_tokens": fields.pop("prompt_tokens"),
            "cached_tokens": fields.pop("cached_tokens"),
            "completion_tokens": len(self.token_ids),
        }
        timing = {name: round(value, 6) for name, value in fields.pop("timing").items()}
        return {**{k: v for k, v in fields.items() if k not in ("programs", "seed")}, "usage": usage, "timing": timing} | {
            "programs": fields["programs"],
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Piece:
    """Text that became certain, and at a prompt's end its result.

    Attributes:
        index: the prompt's place in the call.
        text: possibly empty.
        result: on the prompt's last piece only.
    """

    index: int
    text: str
    result: Generation | None


class CompletionPrediction(TypedDict):
    """Meta's result of a text completion."""

    generation: str


class ChatPrediction(TypedDict):
    """Meta's result of a chat completion."""

    generation: Message
