"""Prompts and their sampling parameters as rows to run: everything that can be refused is refused here, before any of
them runs.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from llama.engine.request import MAX_BAD_WORD_LEN, MAX_BAD_WORDS, MAX_STOP_IDS, Request
from llama.errors import ConfigError, PromptError
from llama.grammar import Grammars
from llama.inputs import Prompt, check_fit, encode_prompt
from llama.sampling_params import SamplingParams
from llama.tokenizer import Tokenizer


class Sample(NamedTuple):
    """One row to run.

    Attributes:
        prompt: the prompt's place in its call.
        number: which of the prompt's samples.
        text: the prompt, as it was given.
        request: for the engine.
    """

    prompt: int
    number: int
    text: Prompt
    request: Request


def make_samples(
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    vocab_size: int,
    max_seq_len: int,
    grammars: Grammars,
) -> list[Sample]:
    """The rows of a call, prompt by prompt.

    Args:
        prompts: texts or ids.
        params: one per prompt.
        tokenizer: the model's.
        eos_ids: end every generation that does not ignore them.
        vocab_size: rows of the embedding.
        max_seq_len: positions of the cache.
        grammars: of this tokenizer.

    Raises:
        PromptError: a prompt that cannot be read or does not fit.
        ConfigError: parameters that do not fit the tokenizer, the vocabulary or each other.
    """
    if len(prompts) != len(params):
        raise PromptError(f"got {len(prompts)} prompts and {len(params)} sampling parameters, expected one per prompt")
    samples: list[Sample] = []
    for index, (prompt, wish) in enumerate(zip(prompts, params, strict=True)):
        ids = encode_prompt(tokenizer, index, prompt, vocab_size)
        check_fit(index, len(ids), wish.max_gen_len, max_seq_len)
        check_ids(wish, vocab_size)
        stop_ids = _stop_ids(wish, eos_ids)
        bad_words = _bad_words(wish, tokenizer)
        seed = secrets.randbits(63) if wish.seed is None else wish.seed
        for number in range(wish.samples):
            # the samples share what is to be known of their prompt: the first one finds it out
            own = replace(wish, seed=(seed + number) % 2**63, prompt_logprobs=wish.prompt_logprobs and number == 0)
            request = Request(ids, own, stop_ids, bad_words, grammars.start(own, tuple(eos_ids)))
            samples.append(Sample(index, number, prompt, request))
    return samples


def check_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse token ids that the vocabulary does not have.

    Raises:
        ConfigError: with the first of them.
    """
    for name, ids in params.token_ids().items():
        foreign = next((i for i in ids if not 0 <= i < vocab_size), None)
        if foreign is not None:
            raise ConfigError(f"{name}: got id {foreign}, expected 0 to {vocab_size - 1}, the model's vocabulary")


def _stop_ids(params: SamplingParams, eos_ids: Sequence[int]) -> tuple[int, ...]:
    stop_ids = tuple(dict.fromkeys((*(() if params.ignore_eos else eos_ids), *params.stop_token_ids)))
    if len(stop_ids) > MAX_STOP_IDS:
        raise ConfigError(
            f"stop ids: got {len(stop_ids)} ({', '.join(map(str, stop_ids))}), expected at most {MAX_STOP_IDS}"
        )
    if params.min_tokens and params.allowed_token_ids is not None and set(params.allowed_token_ids) <= set(stop_ids):
        raise ConfigError("allowed_token_ids: got stop tokens only, of which min_tokens allows none at first")
    return stop_ids


def _bad_words(params: SamplingParams, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The ways to write each bad word: as it goes on in the middle of a text, and behind a space."""
    found: list[tuple[int, ...]] = []
    for word in params.bad_words:
        if isinstance(word, str):
            found += [tuple(tokenizer.encode_continuation(written)) for written in (word, " " + word.lstrip(" "))]
        else:
            found.append(word)
    words = tuple(dict.fromkeys(found))
    too_long = next((word for word in words if len(word) > MAX_BAD_WORD_LEN), None)
    if too_long is not None:
        raise ConfigError(
            f"bad_words: got one of {len(too_long)} tokens, {tokenizer.decode(too_long)!r}, expected at most {MAX_BAD_WORD_LEN}"
        )
    if sum(len(word) > 1 for word in words) > MAX_BAD_WORDS:
        raise ConfigError(
            f"bad_words: got more than {MAX_BAD_WORDS} ways to write those of several tokens; a word counts with and without a space"
        )
    return words
