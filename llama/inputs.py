"""Prompts and sampling parameters become sequences: everything that can be refused is refused here, before one runs.

No tensor here: the command line checks prompts before torch is imported.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence as Sequences
from dataclasses import replace

from llama.config import MAX_BAD_WORD_LEN, MAX_BAD_WORDS, MAX_STOP_IDS
from llama.detokenizer import Detokenizer
from llama.engine.sequence import Sequence
from llama.errors import ConfigError, PromptError, setting
from llama.grammar import Grammars
from llama.sampling_params import SamplingParams
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

Prompt = str | Sequences[int]

_told: set[str] = set()  # what has been logged once in this process


def encode_prompt(tokenizer: Tokenizer, index: int, prompt: Prompt, vocab_size: int) -> tuple[int, ...]:
    """Encode a prompt: a text after BOS; ids are taken as they are.

    Args:
        index: the prompt's place in its call, for messages.
        vocab_size: rows of the embedding, which given ids must be in.

    Raises:
        PromptError: a text that is not valid Unicode, no ids, or one outside the embedding.
    """
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"prompt {index} is not valid Unicode: character {error.start} cannot be written as UTF-8"
            ) from error
        return tuple(tokenizer.encode(prompt))
    foreign = [i for i in prompt if not 0 <= i < vocab_size]
    if foreign or not prompt:
        got = f"id {foreign[0]}" if foreign else "no ids"
        raise PromptError(f"prompt {index}: got {got}, expected at least one id, each from 0 to {vocab_size - 1}")
    return tuple(prompt)


def check_fit(index: int, prompt_tokens: int, max_gen_len: int, max_seq_len: int) -> None:
    """Refuse a prompt whose longest generation would not fit into the cache.

    Raises:
        PromptError: with the numbers, and each number that would make it fit.
    """
    wanted = prompt_tokens + max_gen_len
    if wanted <= max_seq_len:
        return
    cures = [f"{setting('max_seq_len')} {wanted}"]
    if prompt_tokens < max_seq_len:
        cures.append(f"{setting('max_gen_len')} {max_seq_len - prompt_tokens} at most")
    if max_gen_len < max_seq_len:
        cures.append(f"a prompt of {max_seq_len - max_gen_len} tokens at most")
    raise PromptError(
        f"prompt {index} does not fit: {prompt_tokens} prompt tokens + max_gen_len {max_gen_len} = {wanted} "
        f"positions, max_seq_len is {max_seq_len}; it takes {', or '.join(cures)}"
    )


def random_seed() -> int:
    """A seed of 63 bits."""
    return secrets.randbits(63)


def make_sequences(
    prompts: Sequences[Prompt],
    params: Sequences[SamplingParams],
    tokenizer: Tokenizer,
    eos_ids: Sequences[int],
    vocab_size: int,
    max_seq_len: int,
    grammars: Grammars,
    fresh_seed: Callable[[], int] = random_seed,
) -> list[Sequence]:
    """The sequences of a call, prompt by prompt and sample by sample.

    Args:
        prompts: texts or ids.
        params: one per prompt.
        tokenizer: the model's.
        eos_ids: end every generation that does not ignore them.
        vocab_size: rows of the embedding.
        max_seq_len: positions of a slot.
        grammars: of this tokenizer.
        fresh_seed: makes the seed of a prompt whose parameters have none.

    Raises:
        PromptError: a prompt that cannot be read or does not fit.
        ConfigError: parameters that do not fit the tokenizer, the vocabulary or each other.
    """
    if len(prompts) != len(params):
        raise PromptError(f"got {len(prompts)} prompts and {len(params)} sampling parameters, expected one per prompt")
    sequences: list[Sequence] = []
    for index, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        ids = encode_prompt(tokenizer, index, prompt, vocab_size)
        check_fit(index, len(ids), wanted.max_gen_len, max_seq_len)
        check_ids(wanted, vocab_size)
        stop_ids = _stop_ids(wanted, eos_ids)
        bad_words = _bad_words(wanted, tokenizer)
        _check_something_left(wanted, stop_ids, bad_words, tokenizer)
        bad_words += _beyond(wanted, bad_words, tokenizer, vocab_size)
        _tell_undecided(wanted)
        seed = fresh_seed() if wanted.seed is None else wanted.seed
        leader = None
        for number in range(wanted.samples):
            # the samples share the details of their prompt: the first one finds them
            scored = wanted.prompt_logprobs and number == 0
            own = replace(wanted, seed=(seed + number) % 2**63, prompt_logprobs=scored)
            text = Detokenizer(tokenizer, ids, own)
            grammar = grammars.start(own, tuple(eos_ids))
            first_scored = 1 if scored else None
            sequence = Sequence(ids, own, stop_ids, bad_words, grammar, text, index, number, leader, first_scored)
            leader = leader or sequence
            sequences.append(sequence)
    return sequences


def scored_sequence(
    index: int, context: Sequences[int], continuation: Sequences[int], cache_salt: str | None, *, prefix_cache: bool
) -> Sequence:
    """A sequence that has its continuation scored and generates nothing.

    Args:
        index: its place in its call.
        context, continuation: ids, at least one each, that fit.
        cache_salt, prefix_cache: see SamplingParams.
    """
    params = SamplingParams(1, 0.0, seed=0, logprobs=0, prefix_cache=prefix_cache, cache_salt=cache_salt)
    prompt = (*context, *continuation)
    return Sequence(prompt, params, index=index, scored_from=len(context), generates=False)


def check_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse token ids that the vocabulary does not have.

    Raises:
        ConfigError: with the first of them.
    """
    for name, ids in params.token_ids().items():
        foreign = next((i for i in ids if not 0 <= i < vocab_size), None)
        if foreign is not None:
            raise ConfigError(f"{name}: got id {foreign}, expected 0 to {vocab_size - 1}, the model's vocabulary")


def _check_something_left(
    params: SamplingParams, stop_ids: Sequences[int], bad_words: Sequences[tuple[int, ...]], tokenizer: Tokenizer
) -> None:
    """Refuse bans of single tokens that leave none to choose: the device would have to choose a banned one.

    A grammar is left out: what it allows changes from token to token, and it has the last word.

    Raises:
        ConfigError: with the settings that contradict each other.
    """
    banned = {word[0] for word in bad_words if len(word) == 1}
    is_free = params.allowed_token_ids is None and len(banned) + len(stop_ids) < tokenizer.n_words
    if params.is_constrained or is_free:
        return
    allowed = range(tokenizer.n_words) if params.allowed_token_ids is None else params.allowed_token_ids
    left = {i for i in allowed if i < tokenizer.n_words} - banned
    if not left and params.allowed_token_ids is None:
        raise ConfigError(
            f"bad_words: got all {tokenizer.n_words} ids of the tokenizer, expected at least one that may be chosen"
        )
    if not left:
        others = f" {setting('bad_words')} bans, or" if banned else ""
        raise ConfigError(
            f"allowed_token_ids: got only ids that{others} the tokenizer does not have (it has {tokenizer.n_words}), "
            "expected at least one that may be chosen"
        )
    if params.min_tokens and left <= set(stop_ids):
        if params.allowed_token_ids is not None and not banned:
            raise ConfigError("allowed_token_ids: got stop tokens only, of which min_tokens allows none at first")
        raise ConfigError(
            f"bad_words: got every id but stop tokens, of which {setting('min_tokens')}={params.min_tokens} allows "
            "none at first"
        )


def _beyond(
    params: SamplingParams, bad_words: Sequences[tuple[int, ...]], tokenizer: Tokenizer, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """Bans of the embedding's rows that are no tokens: the fewer tokens are left, the likelier those are chosen."""
    if params.allowed_token_ids is not None or params.is_constrained or all(len(word) > 1 for word in bad_words):
        return ()
    return tuple((i,) for i in range(tokenizer.n_words, vocab_size))


def _tell_undecided(params: SamplingParams) -> None:
    """Log, once in a process, which of two settings has the last word where they may contradict each other."""
    grammar = params.constraint_name if params.is_constrained else None
    found = {
        "bad_words with {}: where every token that the grammar allows is a bad word, one is written": bool(
            grammar and params.bad_words
        ),
        "min_tokens with {}: a text ends where the grammar allows nothing more, also before so many tokens": bool(
            grammar and params.min_tokens
        ),
        "stop or stop_token_ids with {}: a text that they end need not satisfy the grammar": bool(
            grammar and (params.stop or params.stop_token_ids)
        ),
        "bad_words with allowed_token_ids: where every allowed token would complete a bad word, one is written": bool(
            params.allowed_token_ids is not None and params.bad_words
        ),
    }
    for message in (text.format(grammar) for text, holds in found.items() if holds):
        if message not in _told:
            _told.add(message)
            log.warning("%s", message)


def _stop_ids(params: SamplingParams, eos_ids: Sequences[int]) -> tuple[int, ...]:
    stop_ids = tuple(dict.fromkeys((*(() if params.ignore_eos else eos_ids), *params.stop_token_ids)))
    if len(stop_ids) > MAX_STOP_IDS:
        raise ConfigError(
            f"stop ids: got {len(stop_ids)} ({', '.join(map(str, stop_ids))}), expected at most {MAX_STOP_IDS}"
        )
    return stop_ids


def _bad_words(params: SamplingParams, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The ways to write each bad word: within a text, and after a space."""
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
            f"bad_words: got one of {len(too_long)} tokens, {tokenizer.decode(too_long)!r}, "
            f"expected at most {MAX_BAD_WORD_LEN}"
        )
    if sum(len(word) > 1 for word in words) > MAX_BAD_WORDS:
        raise ConfigError(
            f"bad_words: got more than {MAX_BAD_WORDS} ways to write those of several tokens; "
            "a word counts with and without a space"
        )
    return words
