"""The slots' tensors: what one program run hands to the next, and what each slot's request wants, packed.

A **slot** is one row of every tensor here. Everything that differs from request to request is data in them, so that no
request compiles a program.

Shapes: B slots, S positions (slack included), V vocabulary, W = ceil(V / 32) words of 32 bits each, R report window.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from llama.config import MAX_BAD_WORD_LEN, MAX_BAD_WORDS, MAX_STOP_IDS, word_count
from llama.sampling_params import MAX_BIASED_IDS
from llama.xla import ops

MOST = float(np.finfo(np.float32).max)
CACHE = ("key_cache", "value_cache")  # the first tensors of a State


class State(NamedTuple):
    """What one program run hands to the next; all on the device.

    Attributes:
        key_cache, value_cache: the stacked cache (cache.py); donated, so each run's input is dead after it.
        tokens: [B, S] int32, prompt and generated tokens.
        start: [B] int32, the position of the next token to run.
        ready: [B] int32, the position from which decode steps run the slot's tokens; chunks run those before.
        length: [B] int32, how many tokens are known.
        hidden: [B, dim], the residual stream of the last token that was run.
        done: [B] bool, the slot's request has ended, or there is none.
        report: [B, R + 2] int32, what the host reads: the last R generated tokens, ``length``, ``done``.
    """

    key_cache: torch.Tensor
    value_cache: torch.Tensor
    tokens: torch.Tensor
    start: torch.Tensor
    ready: torch.Tensor
    length: torch.Tensor
    hidden: torch.Tensor
    done: torch.Tensor
    report: torch.Tensor

    def rows(self, first: torch.Tensor, count: int) -> State:
        """The state of slots [first, first + count); the cache stays whole."""
        taken = (ops.take_rows(each, first, count) for each in self[len(CACHE) :])
        return State(*self.cache, *taken)

    def with_rows(self, rows: State, taken: State, first: torch.Tensor) -> State:
        """The state with changed rows, and their cache, in place of its own.

        Args:
            rows: the rows from slot ``first`` on, as they are to be.
            taken: as ``rows`` returned them; a tensor that is the same in both is left alone.
        """
        put = (
            whole if new is old else ops.put_rows(whole, new, first)
            for whole, new, old in zip(*(each[len(CACHE) :] for each in (self, rows, taken)), strict=True)
        )
        return State(*rows.cache, *put)

    @property
    def cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all slots."""
        return self.key_cache, self.value_cache


class Controls(NamedTuple):
    """How each slot's next token is chosen and when the slot ends; unchanged while a request runs.

    Attributes:
        temperature, top_k, top_p, min_p: [B], see ``sampling.Filters``.
        seed: [B, 2] int32, low and high word.
        limit: [B] int32, the length at which the slot ends.
        stop_ids: [B, n] int32, the tokens that end the slot; -1 fills up.
        full: [B] int32, 1 where the program ``full`` chooses: penalties, bias, bans, or details are wanted.
        details: [B] int32, 1 where log-probabilities are wanted.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    limit: torch.Tensor
    stop_ids: torch.Tensor
    full: torch.Tensor
    details: torch.Tensor


class LogitsControls(NamedTuple):
    """Penalties, bias and bans of each slot; read by the program ``full`` only.

    Attributes:
        typical_p: [B] float32, see ``sampling.Filters``.
        repetition, presence, frequency: [B] float32, see ``logits_processors.penalised``.
        prompt_len: [B] int32, where the output begins.
        first_stop: [B] int32, the length from which on a stop token may be chosen.
        bias_ids, bias: [B, 300] int32 and float32, added to these tokens' logits; zeros fill up.
        bad_words: [B, n, m] int32, token sequences at the end of each line; -1 before them, and in all of an unused
            line.
        in_prompt: [B, W] int32, bits of the tokens in the prompt.
        allowed: [B, W] int32, bits of the tokens that may come next; a grammar changes them at every step.
    """

    typical_p: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    prompt_len: torch.Tensor
    first_stop: torch.Tensor
    bias_ids: torch.Tensor
    bias: torch.Tensor
    bad_words: torch.Tensor
    in_prompt: torch.Tensor
    allowed: torch.Tensor


class Details(NamedTuple):
    """What the programs ``full`` and ``score`` return about tokens; the host fetches what was requested.

    Attributes:
        logprobs: [B, T, token_info.WIDTH] float32, of the token after each position, or of the one that was chosen.
        hidden_states: [B, T, dim], the last layer's hidden state, after its norm, that predicts that token.
        logits: [B, T, V] float32, raw.
    """

    logprobs: torch.Tensor
    hidden_states: torch.Tensor
    logits: torch.Tensor


class Field(NamedTuple):
    """One control in a packed row.

    Attributes:
        dtype: of its numbers.
        sizes: their shape in one slot; () for one number.
        unused: the value that changes nothing, in slots without a request.
    """

    dtype: type
    sizes: tuple[int, ...]
    unused: float


ControlsT = TypeVar("ControlsT", Controls, LogitsControls)


class Packing(Generic[ControlsT]):
    """Controls of a slot as one row of int32 words, so that one small transfer uploads those of all slots.

    Args:
        kind: the named tuple of tensors that the words become on the device.
        fields: one per attribute of ``kind``, in order.
    """

    def __init__(self, kind: type[ControlsT], fields: Mapping[str, Field]) -> None:
        assert tuple(fields) == kind._fields
        self._kind: type[ControlsT] = kind
        self._fields = dict(fields)
        self.width = sum(prod(field.sizes) for field in fields.values())

    def sizes(self, name: str) -> tuple[int, ...]:
        """The shape of a field in one slot."""
        return self._fields[name].sizes

    def pack(self, **values: Any) -> np.ndarray:
        """One slot's row: [width] int32. A field that is not given has its unused value."""
        parts = []
        for name, field in self._fields.items():
            array: np.ndarray = np.full(field.sizes, field.unused, dtype=field.dtype)
            if name in values:
                # float32 holds no larger number, and NumPy would warn of it
                array[...] = np.clip(values[name], -MOST, MOST) if field.dtype is np.float32 else values[name]
            parts.append(array.reshape(-1).view(np.int32))
        return np.concatenate(parts)

    def unpack(self, rows: torch.Tensor) -> ControlsT:
        """The named tensors of packed rows [B, width] on the device."""
        found, begin = [], 0
        for field in self._fields.values():
            end = begin + prod(field.sizes)
            words = rows[:, begin:end]
            numbers = ops.float_of_bits(words) if field.dtype is np.float32 else words
            found.append(numbers.reshape(rows.shape[0], *field.sizes))
            begin = end
        unpacked: ControlsT = self._kind(*found)
        return unpacked


CONTROLS = Packing(
    Controls,
    {
        "temperature": Field(np.float32, (), 0.0),
        "top_k": Field(np.int32, (), 0),
        "top_p": Field(np.float32, (), 1.0),
        "min_p": Field(np.float32, (), 0.0),
        "seed": Field(np.int32, (2,), 0),
        "limit": Field(np.int32, (), 1),
        "stop_ids": Field(np.int32, (MAX_STOP_IDS,), -1),
        "full": Field(np.int32, (), 0),
        "details": Field(np.int32, (), 0),
    },
)


def logits_controls(vocab_size: int) -> Packing[LogitsControls]:
    """How ``LogitsControls`` are packed for a vocabulary."""
    words = word_count(vocab_size)
    return Packing(
        LogitsControls,
        {
            "typical_p": Field(np.float32, (), 1.0),
            "repetition": Field(np.float32, (), 1.0),
            "presence": Field(np.float32, (), 0.0),
            "frequency": Field(np.float32, (), 0.0),
            "prompt_len": Field(np.int32, (), 1),
            "first_stop": Field(np.int32, (), 0),
            "bias_ids": Field(np.int32, (MAX_BIASED_IDS,), 0),
            "bias": Field(np.float32, (MAX_BIASED_IDS,), 0.0),
            "bad_words": Field(np.int32, (MAX_BAD_WORDS, MAX_BAD_WORD_LEN), -1),
            "in_prompt": Field(np.int32, (words,), 0),
            "allowed": Field(np.int32, (words,), -1),
        },
    )
