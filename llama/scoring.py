"""What is scored: a continuation after a context, as token ids that fit, and the results. No tensor here.

The rules are lm-evaluation-harness's: spaces at a context's end belong to the continuation, the whole text is encoded
and cut where the encoded context ends, and of a text that is too long the last tokens are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence as Sequences
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llama.engine.sequence import Sequence, TokenDetails
from llama.errors import ConfigError, PromptError, setting
from llama.inputs import Prompt, encode_prompt
from llama.sampling_params import MAX_LOGPROBS
from llama.tokenizer import Tokenizer

TooLong = Literal["refuse", "truncate", "skip"]
TOO_LONG: tuple[TooLong, ...] = ("refuse", "truncate", "skip")


class Pair(NamedTuple):
    """What is scored, as ids.

    Attributes:
        context: at least one id.
        continuation: the ids whose log-probabilities are wanted, at least one.
        truncated: ids that were cut off the context's beginning.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    truncated: int = 0


@dataclass(frozen=True)
class Score:
    """The log-probability of a continuation.

    Attributes:
        index: the pair's place in its call.
        logprob: the sum over the continuation's tokens, natural logarithm, from the raw logits.
        is_greedy: every one of its tokens is the likeliest in its place.
        token_ids: of the continuation.
        token_logprobs: of each of them.
        context_tokens: tokens of the context that were used.
        cached_tokens: how many of them need not be run again.
        truncated_tokens: tokens that were cut off the context's beginning.
    """

    index: int
    logprob: float
    is_greedy: bool
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    context_tokens: int
    cached_tokens: int
    truncated_tokens: int


@dataclass(frozen=True)
class RollingScore:
    """The log-probability of a whole text.

    Attributes:
        index: the text's place in its call.
        logprob: the sum over its tokens, each scored once.
        tokens: how many they are; BOS, after which the first is scored, is not one of them.
        windows: runs into which the text was cut.
    """

    index: int
    logprob: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        """Per token; 1 for a text without tokens."""
        return math.exp(-self.logprob / self.tokens) if self.tokens else 1.0


def encode_pair(
    tokenizer: Tokenizer, index: int, context: Prompt, continuation: Prompt, vocab_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of a context and of its continuation.

    Args:
        index: the pair's place in its call, for messages.
        context: a text, encoded after BOS, or ids.
        continuation: likewise a text or ids.
        vocab_size: rows of the embedding.

    Raises:
        PromptError: a text and ids together, an empty continuation, or what ``encode_prompt`` refuses.
    """
    if isinstance(context, str) != isinstance(continuation, str):
        raise PromptError(f"pair {index}: got a text and token ids, expected two texts or two lists of ids")
    if not isinstance(context, str) or not isinstance(continuation, str):
        own = encode_prompt(tokenizer, index, context, vocab_size)
        return own, encode_prompt(tokenizer, index, continuation, vocab_size)
    kept = context.rstrip()
    whole = encode_prompt(tokenizer, index, context + continuation, vocab_size)
    before = encode_prompt(tokenizer, index, kept, vocab_size)
    if len(whole) <= len(before):
        raise PromptError(f"pair {index}: the continuation {continuation!r:.60} adds no token, expected at least one")
    return whole[: len(before)], whole[len(before) :]


def fitted(
    index: int, context: tuple[int, ...], continuation: tuple[int, ...], longest: int, too_long: TooLong
) -> Pair | None:
    """A pair that fits; None where it is skipped.

    Args:
        index: the pair's place in its call, for messages.
        longest: tokens of context and continuation that one run takes: ``max_seq_len`` and one more, because the last
            one is not run.
        too_long: what becomes of a longer one.

    Raises:
        PromptError: it does not fit and is refused, or the continuation alone leaves no room for a token before it.
        ConfigError: ``too_long`` is none of TOO_LONG.
    """
    if too_long not in TOO_LONG:
        raise ConfigError(f"too_long: got {too_long!r}, expected one of {', '.join(TOO_LONG)}")
    surplus = len(context) + len(continuation) - longest
    if surplus <= 0:
        return Pair(context, continuation)
    if too_long == "skip":
        return None
    if surplus >= len(context):
        raise PromptError(
            f"pair {index}: the continuation alone has {len(continuation)} tokens, expected at most {longest - 1}; "
            f"{setting('max_seq_len')} {len(continuation)} at least, or {setting('too_long')} skip"
        )
    if too_long == "refuse":
        raise PromptError(
            f"pair {index} does not fit: {len(context)} context tokens + {len(continuation)} of the continuation = "
            f"{surplus + longest}, expected at most {longest}; {setting('max_seq_len')} {surplus + longest - 1}, "
            f"or {setting('too_long')} truncate or skip"
        )
    return Pair(context[surplus:], continuation, surplus)


def score_of(index: int, pair: Pair, sequence: Sequence) -> Score:
    """The result of a sequence that has ended.

    Args:
        index: the pair's place in its call.
    """
    details = TokenDetails.joined(sequence.prompt_details)
    assert details is not None
    assert details.logprobs is not None
    logprobs = tuple(float(each) for each in details.logprobs[:, 0])
    likeliest = details.logprobs[:, 2 + MAX_LOGPROBS].astype(int).tolist()  # see token_info.describe
    return Score(
        index,
        math.fsum(logprobs),
        likeliest == list(pair.continuation),
        pair.continuation,
        logprobs,
        len(pair.context),
        sequence.cached,
        pair.truncated,
    )


def rolling_windows(ids: Sequences[int], prefix_id: int, longest: int) -> Iterator[Pair]:
    """Cut a text into pairs that score each of its tokens once, after as much context as fits.

    As lm-evaluation-harness does it: the first pair scores as many tokens as fit, each later one as many new tokens
    behind at least one token of context, and the last one has as much context as there is room for.

    Args:
        ids: of the text, without BOS.
        prefix_id: what stands before its first token.
        longest: see ``fitted``.
    """
    most, done = longest - 1, 0
    while done < len(ids):
        end = min(done + most, len(ids))
        before = ids[max(end - longest, 0) : done]
        context = tuple(before) if end - longest >= 0 else (prefix_id, *before)
        yield Pair(context, tuple(ids[done:end]))
        done = end
