"""The few compiled functions. One step serves prefill and decode: run a chunk, and where it has a head, choose a token.

All that differs between requests is in tensors: a step reads its tokens out of the state, writes what it chose back
    into it, and
the host has nothing to send from the first chunk to the last token. What a program is compiled for is its
``ProgramKey`` and the engine's shapes, nothing else.

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

from llama.compiled import sampling, token_info as logprobs
from llama.compiled.cache import CacheView
from llama.compiled.logits_processors import shaped
from llama.compiled.model import Transformer
from llama.engine.request import Controls, Shaping

Head = Literal["none", "score", "greedy", "sample", "full", "logprobs", "fan_out"]
CHOOSING: tuple[Head, ...] = ("greedy", "sample", "full", "logprobs")  # each does all that the ones before it do
IN_DECODE_STEP: tuple[Head, ...] = (
    "greedy",
    "sample",
)  # compiled together with a chunk of one token; the others are programs of their own
SHAPING: tuple[Head, ...] = ("full", "logprobs")

REPORT_WINDOW = 16  # tokens a row that a report holds: at most so many steps may lie between two reads


class ProgramKey(NamedTuple):
    """What a compiled program depends on, beside the engine's own shapes.

    Attributes:
        length: tokens a row that it runs; 0 for a head alone.
        key_len: cache positions that it reads; 0 for a head alone.
        head: what follows the chunk.
            ``none``: nothing.
            ``score``: what is known of each of the chunk's tokens.
            ``greedy``: every row takes the likeliest token.
            ``sample``: temperature, top-k, top-p and min-p.
            ``full``: every control there is.
            ``logprobs``: the same, and what is known of the token.
            ``fan_out``: no token; one row's prefill becomes that of several.
        one_row: it runs a state of one row and not the batch's.
    """

    length: int
    key_len: int
    head: Head
    one_row: bool = False

    def __str__(self) -> str:
        what = f"chunk length {self.length}, key bucket {self.key_len}, " if self.length else ""
        return f"({what}head {self.head}{', one row' if self.one_row else ''})"


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


class Known(NamedTuple):
    """What programs of the heads ``score`` and ``logprobs`` return behind the state; the host fetches what was asked
    for.

    Attributes:
        logprobs: [B, T, logprobs.WIDTH] float32, of the token behind each of the chunk's positions, or of the one that
            was chosen.
        hidden: [B, T, dim], the last layer's hidden state, behind its norm, that tells that token.
        logits: [B, T, V] float32, raw.
    """

    logprobs: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor


CACHE_ARGUMENT = State._fields.index("kv_cache")


def make_step(model: Transformer, key: ProgramKey) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The function to compile for ``key``.

    It takes the tensors of a State in order and returns those of the next, and of Known where the head has it. Behind
    the state it
    takes: for a head that chooses, those of Controls; for ``full`` and ``logprobs``, those of Shaping, too; for
        ``fan_out`` what that
    function takes.
    """

    def step(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, others = State(*tensors[: len(State._fields)]), tensors[len(State._fields) :]
        if key.head == "fan_out":
            return tuple(fan_out(state, *others))
        known: tuple[torch.Tensor, ...] = ()
        if key.length:
            before = state
            state, stream = run_chunk(model, state, key.length, key.key_len)
            if key.head == "score":
                known = score(model, before, stream)
        if key.head in CHOOSING:
            controls, shaping = Controls(*others[: len(Controls._fields)]), others[len(Controls._fields) :]
            state, known = choose_token(model, state, controls, Shaping(*shaping) if shaping else None, key.head)
        return (*state, *known)

    return step


def run_chunk(model: Transformer, state: State, length: int, key_len: int) -> tuple[State, torch.Tensor]:
    """Run ``length`` tokens of every row from its ``start`` on; keep the stream behind a row's last known token where
    it is among them.

    Returns:
        The next state, and the residual stream [B, T, dim].
    """
    offsets = torch.arange(length, dtype=torch.int32, device=state.start.device)
    positions = state.start.unsqueeze(-1) + offsets  # [B, T]
    ids = state.tokens.gather(1, positions.long())
    view = CacheView(state.kv_cache, state.start, key_len)
    stream = model(ids, positions, view)  # [B, T, dim]
    last = state.length - 1 - state.start  # [B], index of the last known token in this chunk, if it is in it
    inside = (last >= 0) & (last < length)
    index = last.clamp(0, length - 1).long().view(-1, 1, 1).expand(-1, 1, stream.shape[-1])
    hidden = torch.where(inside.unsqueeze(-1), stream.gather(1, index).squeeze(1), state.hidden)
    return state._replace(kv_cache=view.kv_cache, start=state.start + length, hidden=hidden), stream


def score(model: Transformer, state: State, stream: torch.Tensor) -> Known:
    """What is known of the token behind each position of a chunk: of position ``start`` + 1 to ``start`` + T.

    Args:
        state: as it was before the chunk.
        stream: [B, T, dim].
    """
    rows, length = stream.shape[:2]
    logits = model.head(stream)  # [B, T, V]
    following = state.start.unsqueeze(-1) + 1 + torch.arange(length, dtype=torch.int32, device=stream.device)
    ids = state.tokens.gather(1, following.clamp(max=state.tokens.shape[1] - 1).long())
    described = logprobs.describe(logits.flatten(0, 1), ids.flatten())
    return Known(described.view(rows, length, -1), model.norm(stream), logits)


def choose_token(
    model: Transformer, state: State, controls: Controls, shaping: Shaping | None, head: Head
) -> tuple[State, tuple[torch.Tensor, ...]]:
    """Put one position a row through the vocabulary head, choose its next token and append it to the rows that have not
    ended.

    Returns:
        The next state, and Known for the head ``logprobs``.
    """
    raw = model.head(state.hidden)  # [B, V]
    if head == "greedy":
        return append(state, controls, sampling.argmax(raw)), ()
    logits, typical_p = raw, None
    if shaping is not None:
        logits, typical_p = shaped(raw, shaping, controls.stop_ids, state.tokens, state.length), shaping.typical_p
    filters = sampling.Filters(controls.temperature, controls.top_k, controls.top_p, controls.min_p, typical_p)
    chosen = sampling.choose(logits, filters, controls.seed, state.length)
    known: tuple[torch.Tensor, ...] = ()
    if head == "logprobs":
        described = logprobs.describe(raw, chosen)
        known = Known(described.unsqueeze(1), model.norm(state.hidden).unsqueeze(1), raw.unsqueeze(1))
    return append(state, controls, chosen), known


def append(state: State, controls: Controls, chosen: torch.Tensor) -> State:
    """Append ``chosen`` [B] int32 to the rows that have not ended, and end those that reach a stop token or their
    limit.
    """
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


def fan_out(state: State, kv_cache: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor) -> State:
    """Give some rows the cache and the hidden state that one row's prefill has made.

    Args:
        state: of the batch.
        kv_cache: the stacked cache of one row.
        hidden: [1, dim].
        rows: [B] bool, which ones.
    """
    chosen = rows.view(1, -1, 1, 1, 1)
    return state._replace(
        kv_cache=torch.where(chosen, kv_cache, state.kv_cache),
        hidden=torch.where(rows.unsqueeze(-1), hidden, state.hidden),
    )
