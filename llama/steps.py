"""The few compiled functions. One step serves prefill and decode: run a chunk, and where it has a head, choose a token.

All that differs between requests is in tensors: a step reads its tokens out of the state, writes what it chose back into it, and
the host has nothing to send from the first chunk to the last token. What a program is compiled for is its ``ProgramKey`` and the
engine's shapes, nothing else.

Shapes: B batch rows, T chunk length, S max_seq_len, V vocabulary, W report window.

How the rows of a batch run through one plan, each with its own length (prompts of 5 and 9 tokens, chunks 8 and 1)::

    row 0   a b c d e . . . | .     its last token is in chunk 1: the hidden state behind ``e`` is carried to the head
    row 1   a b c d e f g h | i     its last token is in chunk 2, which has the head
                                    then both decode, row 0 at position 5 and row 1 at position 9; what row 0 wrote to
                                    positions 5 to 8 is overwritten one by one before anything reads it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from llama import sampling
from llama.kv_cache import CacheView
from llama.model import Transformer

Head = Literal["none", "greedy", "sample"]
HEADS: tuple[Head, ...] = ("none", "greedy", "sample")

REPORT_WINDOW = 16  # tokens a row that a report holds: at most so many steps may lie between two reads


class ProgramKey(NamedTuple):
    """What a compiled program depends on, beside the engine's own shapes.

    Attributes:
        length: tokens a row that it runs.
        key_len: cache positions that it reads.
        head: ``none`` in the middle of a prompt; ``greedy`` where every row takes the likeliest token; ``sample`` otherwise.
    """

    length: int
    key_len: int
    head: Head

    def __str__(self) -> str:
        return f"(chunk length {self.length}, key bucket {self.key_len}, head {self.head})"


class State(NamedTuple):
    """What one step hands to the next; all on the device.

    Attributes:
        kv_cache: the stacked cache; donated, so each step's input is dead after it.
        tokens: [B, S] int32, prompt and generated tokens.
        start: [B] int32, position of the next chunk's first token.
        length: [B] int32, how many tokens of the row are known.
        hidden: [B, dim], the residual stream behind the last known token, once a chunk has reached it.
        done: [B] bool, the row has ended (or was empty from the start).
        report: [B, W + 2] int32, what the host reads: the last W generated tokens, ``length``, ``done``.
    """

    kv_cache: torch.Tensor
    tokens: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    hidden: torch.Tensor
    done: torch.Tensor
    report: torch.Tensor


class Controls(NamedTuple):
    """What each row's request asks for; on the device, unchanged through a batch.

    Attributes:
        temperature: [B] float32.
        top_p: [B] float32.
        seed: [B, 2] int32, low and high word.
        limit: [B] int32, the length at which the row ends.
        stop_ids: [B, n] int32, the tokens that end the row; -1 fills up.
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    seed: torch.Tensor
    limit: torch.Tensor
    stop_ids: torch.Tensor


CACHE_ARGUMENT = State._fields.index("kv_cache")


def make_step(model: Transformer, key: ProgramKey) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The function to compile for ``key``: takes the tensors of a State and of Controls in order, returns those of the next State."""

    def step(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = State(*tensors[: len(State._fields)])
        controls = Controls(*tensors[len(State._fields) :])
        state = run_chunk(model, state, key.length, key.key_len)
        if key.head != "none":
            state = choose_token(model, state, controls, key.head)
        return tuple(state)

    return step


def run_chunk(model: Transformer, state: State, length: int, key_len: int) -> State:
    """Run ``length`` tokens of every row from its ``start`` on; keep the stream behind a row's last known token where it is among them."""
    offsets = torch.arange(length, dtype=torch.int32, device=state.start.device)
    positions = state.start.unsqueeze(-1) + offsets  # [B, T]
    ids = state.tokens.gather(1, positions.long())
    view = CacheView(state.kv_cache, state.start, key_len)
    stream = model(ids, positions, view)  # [B, T, dim]
    last = state.length - 1 - state.start  # [B], index of the last known token in this chunk, if it is in it
    inside = (last >= 0) & (last < length)
    index = last.clamp(0, length - 1).long().view(-1, 1, 1).expand(-1, 1, stream.shape[-1])
    hidden = torch.where(inside.unsqueeze(-1), stream.gather(1, index).squeeze(1), state.hidden)
    return state._replace(kv_cache=view.kv_cache, start=state.start + length, hidden=hidden)


def choose_token(model: Transformer, state: State, controls: Controls, head: Head) -> State:
    """Put one position a row through the vocabulary head, choose its next token and append it to the rows that have not ended."""
    logits = model.head(state.hidden)  # [B, V]
    if head == "greedy":
        chosen = sampling.argmax(logits)
    else:
        chosen = sampling.choose(logits, controls.temperature, controls.top_p, controls.seed, state.length)
    return append(state, controls, chosen)


def append(state: State, controls: Controls, chosen: torch.Tensor) -> State:
    """Append ``chosen`` [B] int32 to the rows that have not ended, and end those that reach a stop token or their limit."""
    active = ~state.done
    places = torch.arange(state.tokens.shape[1], dtype=torch.int32, device=chosen.device)
    here = (places == state.length.unsqueeze(-1)) & active.unsqueeze(-1)  # [B, S]
    tokens = torch.where(here, chosen.unsqueeze(-1), state.tokens)
    length = torch.where(active, state.length + 1, state.length)
    stopped = (chosen.unsqueeze(-1) == controls.stop_ids).any(dim=-1)
    done = state.done | stopped | (length >= controls.limit)
    recent = state.report[:, :REPORT_WINDOW]
    shifted = torch.cat((recent[:, 1:], chosen.unsqueeze(-1)), dim=-1)
    recent = torch.where(active.unsqueeze(-1), shifted, recent)
    report = torch.cat((recent, length.unsqueeze(-1), done.to(torch.int32).unsqueeze(-1)), dim=-1)
    return state._replace(tokens=tokens, start=length - 1, length=length, done=done, report=report)
