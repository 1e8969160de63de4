"""Prompts as ids, and whether they fit: everything about a prompt that can be refused before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence

from llama.errors import PromptError, setting
from llama.tokenizer import Tokenizer

Prompt = str | Sequence[int]


def encode_prompt(tokenizer: Tokenizer, index: int, prompt: Prompt, vocab_size: int) -> tuple[int, ...]:
    """A prompt's ids: a text's behind BOS, given ones as they are.

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
