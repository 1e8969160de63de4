"""The functions that become programs: run tokens, choose the next one, append it; admit, copy and end slots.

All that differs between requests is in tensors. A function reads its tokens out of the state and writes back what it
chose, so the host sends nothing between a request's admission and its last token. What a program is compiled for is a
number of rows, a chunk length and a key bucket, nothing else.

The life of a slot, for a prompt of 12 tokens, chunks of 8 and 1, and 3 tokens to generate::

    position   0 1 2 3 4 5 6 7   8   9  10  11  12  13  14
    admit      tokens 0..11 written, start 0, ready 8, length 12
    chunk      ---------------                               start 8: decode steps run the slot from here on
    decode                       8                           start 9 < length: a prompt token, nothing is chosen
    decode                           9  10  11               start 12 = length: token 12 is chosen, length 13
    decode                                      12  13       token 14 is chosen, length 15 = limit: done

A step's rows are slots [first, first + rows). A row that is done or not ready runs, too, because shapes are static: it
writes to position ``start``, which is overwritten before anything reads it, and keeps its state.

Shapes: B rows of a step, T chunk length, n new tokens a row, S positions, V vocabulary, R report window.
"""

from __future__ import annotations

import torch

from llama.compiled import sampling, token_info
from llama.compiled.cache import CacheView
from llama.compiled.logits_processors import process_logits
from llama.compiled.model import Transformer
from llama.compiled.state import CONTROLS, Controls, Details, LogitsControls, State, logits_controls
from llama.xla import ops
from llama.xla.control_flow import when

Tensors = tuple[torch.Tensor, ...]

# --- running tokens ---------------------------------------------------------------------------------------------------


def chunk(
    model: Transformer,
    state: State,
    slot: torch.Tensor,
    keys: torch.Tensor,
    *,
    length: int,
    key_lens: tuple[int, ...],
) -> tuple[State, torch.Tensor]:
    """Run one chunk of a slot's prompt, from its ``start`` on.

    Args:
        slot: [1] int32.
        keys: [1] int32, how many leading cache positions it may have to read.
        length: positions that the chunk fills; those after the prompt's last token are padding.
        key_lens: how many it can read: the first that is enough is taken.

    Returns:
        The next state, and the residual stream [1, T, dim], which the program ``score`` reads.
    """
    row = state.rows(slot, 1)
    offsets = torch.arange(length, dtype=torch.int32, device=row.start.device)
    stream, kv_cache = _run(model, row, slot, row.start.unsqueeze(-1) + offsets, keys, key_lens)
    end = torch.minimum(row.start + length, row.length)
    last = (end - 1 - row.start).long().view(-1, 1, 1).expand(-1, 1, stream.shape[-1])
    ran = row._replace(kv_cache=kv_cache, start=end, hidden=stream.gather(1, last).squeeze(1))
    return state.with_rows(ran, row, slot), stream


def decode(
    model: Transformer,
    state: State,
    packed: torch.Tensor,
    first: torch.Tensor,
    keys: torch.Tensor,
    *,
    rows: int,
    key_lens: tuple[int, ...],
) -> State:
    """Run the next token of some slots; where it is the last one known, choose the one that follows.

    Slots whose request needs the program ``full`` only run their token here. The vocabulary head is a branch: a step in
    which no row chooses does not pay for it.

    Args:
        packed: [slots, words] int32, the packed Controls.
        first: [1] int32, the first slot.
        keys: [1] int32, how many leading cache positions it may have to read.
        rows: how many slots.
        key_lens: how many it can read: the first that is enough is taken.
    """
    row = state.rows(first, rows)
    controls = CONTROLS.unpack(ops.take_rows(packed, first, rows))
    active = ~row.done & (row.start >= row.ready)
    stream, kv_cache = _run(model, row, first, row.start.unsqueeze(-1), keys, key_lens)
    ran = row._replace(
        kv_cache=kv_cache,
        start=torch.where(active, row.start + 1, row.start),
        hidden=torch.where(active.unsqueeze(-1), stream.squeeze(1), row.hidden),
    )
    return state.with_rows(_choose_plain(model, ran, controls, active), row, first)


def choose(model: Transformer, state: State, packed: torch.Tensor, slot: torch.Tensor) -> State:
    """Choose the first token of a slot whose last chunk reached the end of its prompt."""
    row = state.rows(slot, 1)
    controls = CONTROLS.unpack(ops.take_rows(packed, slot, 1))
    return state.with_rows(_choose_plain(model, row, controls, ~row.done), row, slot)


def full(
    model: Transformer,
    state: State,
    packed: torch.Tensor,
    packed_logits: torch.Tensor,
    allowed: torch.Tensor,
    first: torch.Tensor,
    *,
    rows: int,
) -> tuple[State, Details]:
    """Choose the next token with every control, for the slots that need it and have run all their tokens.

    Args:
        packed_logits: [slots, words] int32, the packed LogitsControls.
        allowed: [slots, W] int32, bits of the tokens that a grammar allows; all ones without one.
    """
    row = state.rows(first, rows)
    controls = CONTROLS.unpack(ops.take_rows(packed, first, rows))
    wanted = logits_controls(model.args.vocab_size).unpack(ops.take_rows(packed_logits, first, rows))
    wanted = wanted._replace(allowed=wanted.allowed & ops.take_rows(allowed, first, rows))
    raw = model.head(row.hidden)  # [B, V]
    logits = process_logits(raw, wanted, controls.stop_ids, row.tokens, row.length)
    chosen = sampling.choose(logits, _filters(controls, wanted), controls.seed, row.length)
    chooses = ~row.done & (row.start == row.length) & (controls.full == 1)
    wants_details = (chooses & (controls.details == 1)).any()
    (described,) = when(wants_details, lambda *given: (token_info.describe(*given),), (raw, chosen))
    details = Details(described.unsqueeze(1), model.norm(row.hidden).unsqueeze(1), raw.unsqueeze(1))
    return state.with_rows(append(row, controls, chosen.unsqueeze(-1), chooses.int()), row, first), details


def score(
    model: Transformer,
    tokens: torch.Tensor,
    slot: torch.Tensor,
    start: torch.Tensor,
    stream: torch.Tensor,
    *,
    length: int,
) -> Details:
    """Describe the token after each position of a chunk that has been run.

    Args:
        tokens: [slots, S] int32.
        slot, start: [1] int32; the chunk began at position ``start``.
        stream: [1, T, dim], as ``chunk`` returned it.
        length: T.
    """
    logits = model.head(stream)  # [1, T, V]
    following = start + 1 + torch.arange(length, dtype=torch.int32, device=stream.device)
    ids = ops.take_rows(tokens, slot, 1).gather(1, following.clamp(max=tokens.shape[1] - 1).long().unsqueeze(0))
    described = token_info.describe(logits.flatten(0, 1), ids.flatten())
    return Details(described.view(1, length, -1), model.norm(stream), logits)


def _run(
    model: Transformer,
    row: State,
    first: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    key_lens: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the tokens at ``positions`` [B, T]; return the residual stream [B, T, dim] and the cache."""
    ids = row.tokens.gather(1, positions.long())
    view = CacheView(row.kv_cache, first, row.start, keys, key_lens)
    return model(ids, positions, view), view.kv_cache


# --- choosing and appending -------------------------------------------------------------------------------------------


def _choose_plain(model: Transformer, row: State, controls: Controls, active: torch.Tensor) -> State:
    """Choose for the active rows [B] bool that have run all their tokens and need nothing but ``sampling``."""
    chooses = active & (row.start == row.length) & (controls.full == 0)

    def chosen(hidden: torch.Tensor, length: torch.Tensor, *controls: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = Controls(*controls)
        logits = model.head(hidden)  # [B, V]
        greedy = sampling.argmax(logits)
        sampled = given.temperature > 0

        def drawn(logits: torch.Tensor, seed: torch.Tensor, length: torch.Tensor, *filters: torch.Tensor) -> Tensors:
            return (sampling.choose(logits, sampling.Filters(*filters), seed, length),)

        inputs = (logits, given.seed, length, given.temperature, given.top_k, given.top_p, given.min_p)
        (draw,) = when(sampled.any(), drawn, inputs)
        return (torch.where(sampled, draw, greedy),)

    (ids,) = when(chooses.any(), chosen, (row.hidden, row.length, *controls))
    return append(row, controls, ids.unsqueeze(-1), chooses.int())


def _filters(controls: Controls, wanted: LogitsControls) -> sampling.Filters:
    return sampling.Filters(controls.temperature, controls.top_k, controls.top_p, controls.min_p, wanted.typical_p)


def append(row: State, controls: Controls, chosen: torch.Tensor, count: torch.Tensor) -> State:
    """Append tokens to the rows, and end those that reach a stop token, their limit or the end of the cache.

    Args:
        chosen: [B, n] int32, new tokens in order.
        count: [B] int32, how many of them count, 0 for a row that gets none. Those after a stop token, and those past
            the limit, are dropped.

    Returns:
        The next state of the rows: ``start`` is the position of the last token appended, which is not run yet.
    """
    most = chosen.shape[1]
    order = torch.arange(most, dtype=torch.int32, device=chosen.device)
    stops = (chosen.unsqueeze(-1) == controls.stop_ids.unsqueeze(1)).any(dim=-1).int()  # [B, n]
    stopped_before = stops.cumsum(dim=1).int() - stops
    end = controls.limit.clamp(max=row.tokens.shape[1])
    room = (end - row.length).clamp(min=0)
    kept = (order < count.unsqueeze(-1)) & (order < room.unsqueeze(-1)) & (stopped_before == 0)
    added = kept.int().sum(dim=1).int()
    length = row.length + added
    places = torch.arange(row.tokens.shape[1], dtype=torch.int32, device=chosen.device) - row.length.unsqueeze(-1)
    here = (places >= 0) & (places < added.unsqueeze(-1))  # [B, S]
    new = chosen if most == 1 else chosen.gather(1, places.clamp(0, most - 1).long())
    stopped = (stops.bool() & kept).any(dim=1) | (length >= end)
    done = row.done | ((added > 0) & stopped)
    return row._replace(
        tokens=torch.where(here, new, row.tokens),
        start=torch.where(added > 0, length - 1, row.start),
        length=length,
        done=done,
        report=_reported(row.report, chosen, added, length, done),
    )


def _reported(
    report: torch.Tensor, chosen: torch.Tensor, added: torch.Tensor, length: torch.Tensor, done: torch.Tensor
) -> torch.Tensor:
    """The report with the first ``added`` [B] of the tokens ``chosen`` [B, n] shifted in from the right."""
    window = report.shape[1] - 2
    both = torch.cat((report[:, :window], chosen), dim=-1)
    places = torch.arange(window, dtype=torch.int32, device=chosen.device) + added.unsqueeze(-1)
    recent = both.gather(1, places.long())
    return torch.cat((recent, length.unsqueeze(-1), done.int().unsqueeze(-1)), dim=-1)


# --- slots ------------------------------------------------------------------------------------------------------------


def admit(state: State, row: torch.Tensor, slot: torch.Tensor) -> State:
    """Put a request into a slot; its cache is left alone.

    Args:
        row: [1, 3 + S] int32: ``start``, ``ready`` and ``length``, then the prompt's tokens.
        slot: [1] int32.
    """
    start, ready, length = (row[:, i] for i in range(3))
    report = torch.zeros(1, state.report.shape[1], dtype=torch.int32, device=row.device)
    report = torch.cat((report[:, :-2], length.unsqueeze(-1), report[:, -1:]), dim=-1)
    old = state.rows(slot, 1)
    new = State(state.kv_cache, row[:, 3:], start, ready, length, old.hidden, torch.zeros_like(old.done), report)
    return state.with_rows(new, old, slot)


def end(done: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
    """End some slots; both [slots] bool."""
    return done | ended


def copy(kv_cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor, *, key_len: int) -> torch.Tensor:
    """Copy a slot's first ``key_len`` keys and values to another slot; both [1] int32."""
    return ops.copy_cache(kv_cache, source, target, key_len)


def move(state: State, source: torch.Tensor, target: torch.Tensor) -> State:
    """Give a slot's state, without its cache, to another slot, and end it where it was."""
    row, other = state.rows(source, 1), state.rows(target, 1)
    moved = state.with_rows(row, other, target)
    return moved._replace(done=ops.put_rows(moved.done, torch.ones_like(row.done), source))
