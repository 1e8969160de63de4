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

A step may check guesses (``verify``): it runs the last known token and the drafts behind it, chooses after each, and
keeps those up to the first that differs. Prompt tokens, generated tokens and drafts are the same thing to it.

A step's rows are slots [first, first + rows). A row that is done or not ready runs, too, because shapes are static: it
writes to position ``start``, which is overwritten before anything reads it, and keeps its state.

Shapes: B rows of a step, T chunk length, n new tokens a row, S positions, V vocabulary, R report window.
"""

from __future__ import annotations

import torch

from llama.compiled import sampling, token_info
from llama.compiled.cache import CacheView, LookaheadView
from llama.compiled.logits_processors import process_logits
from llama.compiled.medusa import MedusaHeads
from llama.compiled.model import Transformer
from llama.compiled.state import CONTROLS, Controls, Details, LogitsControls, State, logits_controls
from llama.xla import kv_cache, ops
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
    stream, row = _run(model, row, slot, row.start.unsqueeze(-1) + offsets, keys, key_lens)
    end = torch.minimum(row.start + length, row.length)
    last = (end - 1 - row.start).long().view(-1, 1, 1).expand(-1, 1, stream.shape[-1])
    ran = row._replace(start=end, hidden=stream.gather(1, last).squeeze(1))
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
    stream, row = _run(model, row, first, row.start.unsqueeze(-1), keys, key_lens)
    ran = row._replace(
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
    chosen = _with_every_control(raw, row.tokens, row.length, controls, wanted)
    chooses = ~row.done & (row.start == row.length) & (controls.full == 1)
    wants_details = (chooses & (controls.details == 1)).any()
    (described,) = when(wants_details, lambda *given: (token_info.describe(*given),), (raw, chosen))
    details = Details(described.unsqueeze(1), model.norm(row.hidden).unsqueeze(1), raw.unsqueeze(1))
    return state.with_rows(append(row, controls, chosen.unsqueeze(-1), chooses.int()), row, first), details


def verify(
    model: Transformer,
    state: State,
    packed: torch.Tensor,
    packed_logits: torch.Tensor,
    allowed: torch.Tensor,
    drafts: torch.Tensor,
    draft_allowed: torch.Tensor,
    first: torch.Tensor,
    keys: torch.Tensor,
    *,
    rows: int,
    length: int,
    key_lens: tuple[int, ...],
) -> tuple[State, Details]:
    """Run the known tokens of some slots and the drafts behind them, choose after each, and keep what agrees.

    A row gets the drafts that equal the tokens chosen in their places, and the first chosen one that differs: 1 to
    K + 1 tokens, those that decode steps would choose. Where more than T tokens of a prompt are left, T of them are
    run, and nothing is chosen. Keys and values of drafts that did not agree stay behind ``start`` and are overwritten
    before they are read.

    Args:
        packed, packed_logits, allowed: as in ``full``, for the first token that is chosen.
        drafts: [slots, 1 + K] int32: how many drafts, then the drafts. They and the known tokens that have not been run
            are T at most; what is more is dropped.
        draft_allowed: [slots, K, W] int32, bits of the tokens that a grammar allows after each draft.
        first: [1] int32, the first slot.
        keys: [1] int32, how many leading cache positions it may have to read.
        rows: B, how many slots.
        length: T = K + 1, tokens that it runs of each.
        key_lens: how many it can read: the first that is enough is taken.

    Returns:
        The next state, and the details of the tokens that could be chosen, [B, T, ...]; those of a row's new tokens are
        the first ones.
    """
    taken = state.rows(first, rows)
    controls = CONTROLS.unpack(ops.take_rows(packed, first, rows))
    wanted = logits_controls(model.args.vocab_size).unpack(ops.take_rows(packed_logits, first, rows))
    counted = ops.take_rows(drafts, first, rows)
    guesses, known = counted[:, 1:], taken.length - taken.start
    count = torch.minimum(counted[:, 0], length - known)
    row = taken._replace(tokens=_written(taken.tokens, guesses, taken.length, count))
    active = ~row.done & (row.start >= row.ready)
    order = torch.arange(length, dtype=torch.int32, device=row.start.device)
    stream, row = _run(model, row, first, row.start.unsqueeze(-1) + order, keys, key_lens)
    before = known.unsqueeze(-1) - 1 + order  # the places in the chunk after which tokens may be chosen
    hidden = _taken(stream, before)  # [B, T, dim]
    raw = model.head(hidden)  # [B, T, V]
    may = torch.cat((ops.take_rows(allowed, first, rows).unsqueeze(1), ops.take_rows(draft_allowed, first, rows)), 1)
    lengths = row.length.unsqueeze(-1) + order
    chosen, described = _choose_each(raw, row.tokens, lengths, controls, wanted, may)
    differs = (chosen[:, :-1] != guesses) | (order[:-1] >= count.unsqueeze(-1))
    agreed = (differs.int().cumsum(dim=1) == 0).int().sum(dim=1).int()
    ran = torch.minimum(known, torch.full_like(known, length))
    row = row._replace(start=torch.where(active, row.start + ran, row.start))
    row = append(row, controls, chosen, torch.where(active & (known <= length), 1 + agreed, 0))
    added = row.length - taken.length
    last = _taken(stream, (torch.where(added > 0, known + added - 1, ran) - 1).unsqueeze(-1)).squeeze(1)
    row = row._replace(hidden=torch.where(active.unsqueeze(-1), last, row.hidden))
    return state.with_rows(row, taken, first), Details(described, model.norm(hidden), raw)


def lookahead(
    model: Transformer,
    state: State,
    packed: torch.Tensor,
    jacobi: torch.Tensor,
    first: torch.Tensor,
    keys: torch.Tensor,
    *,
    rows: int,
    levels: int,
    width: int,
    key_lens: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One Jacobi iteration of lookahead decoding (Fu et al. 2024, arXiv 2402.02057): what would follow each column of a
    window of guesses behind a row's last known token.

    Token j of level l stands ``1 + l + j`` positions behind that token. Its keys and values go into the cache behind
    ``start``, in the chunk's order, where nothing reads them: the next step overwrites them. A row that is done or not
    ready is left alone but for that.

    Args:
        packed: [slots, words] int32, the packed Controls.
        jacobi: [slots, levels * width] int32, the window, level by level.
        first: [1] int32, the first slot.
        keys: [1] int32, how many leading cache positions it may have to read.
        rows: how many slots.

    Returns:
        Keys and values of the cache, and [B, width] int32: the token after the last level of each column, chosen as a
        step would choose it in that position, but for penalties, bias and bans.
    """
    row = state.rows(first, rows)
    controls = CONTROLS.unpack(ops.take_rows(packed, first, rows))
    order = torch.arange(levels * width, dtype=torch.int32, device=row.start.device)
    behind = torch.cat((torch.zeros_like(order[:1]), 1 + order // width + order % width))
    last = row.tokens.gather(1, row.start.unsqueeze(-1).long())
    ids = torch.cat((last, ops.take_rows(jacobi, first, rows)), dim=1)
    positions = row.start.unsqueeze(-1) + behind
    view = LookaheadView(width, *row.cache, first, row.start, keys, key_lens)
    stream = model(ids, positions, view)[:, -width:]
    following = positions[:, -width:] + 1
    own = Controls(*(_spread(each, width) for each in controls))
    chosen = _greedy_or_drawn(model.head(stream).flatten(0, 1), following.flatten(), own, own.temperature > 0)
    return *view.cache, chosen.view(rows, width)


def medusa(
    model: Transformer, heads: MedusaHeads, hidden: torch.Tensor, length: torch.Tensor, packed: torch.Tensor
) -> torch.Tensor:
    """What Medusa heads guess of the tokens behind each slot's last one.

    Args:
        hidden: [B, dim], the residual stream from which the last token was chosen.
        length: [B] int32, the position of the first guess.
        packed: [B, words] int32, the packed Controls.

    Returns:
        [B, heads] int32, chosen as a step would choose in these positions, but for penalties, bias and bans.
    """
    controls = CONTROLS.unpack(packed)
    sampled = controls.temperature > 0
    found = [
        _greedy_or_drawn(logits, length + place, controls, sampled)
        for place, logits in enumerate(heads(model.norm(hidden)))
    ]
    return torch.stack(found, dim=1)


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
) -> tuple[torch.Tensor, State]:
    """Run the tokens at ``positions`` [B, T]; return the residual stream [B, T, dim], and the row with its cache."""
    ids = row.tokens.gather(1, positions.long())
    view = CacheView(*row.cache, first, row.start, keys, key_lens)
    stream = model(ids, positions, view)
    return stream, row._replace(key_cache=view.key_cache, value_cache=view.value_cache)


# --- choosing and appending -------------------------------------------------------------------------------------------


def _choose_plain(model: Transformer, row: State, controls: Controls, active: torch.Tensor) -> State:
    """Choose for the active rows [B] bool that have run all their tokens and need nothing but ``sampling``."""
    chooses = active & (row.start == row.length) & (controls.full == 0)

    def chosen(hidden: torch.Tensor, length: torch.Tensor, *controls: torch.Tensor) -> Tensors:
        given = Controls(*controls)
        return (_greedy_or_drawn(model.head(hidden), length, given, given.temperature > 0),)

    (ids,) = when(chooses.any(), chosen, (row.hidden, row.length, *controls))
    return append(row, controls, ids.unsqueeze(-1), chooses.int())


def _greedy_or_drawn(
    logits: torch.Tensor, length: torch.Tensor, controls: Controls, sampled: torch.Tensor
) -> torch.Tensor:
    """The likeliest token of each row, [B] int32, or a drawn one where it is ``sampled`` [B] bool.

    Args:
        logits: [B, V] float32.
        length: [B] int32, the position that the token will take.
    """

    def drawn(logits: torch.Tensor, seed: torch.Tensor, length: torch.Tensor, *filters: torch.Tensor) -> Tensors:
        return (sampling.choose(logits, sampling.Filters(*filters), seed, length),)

    inputs = (logits, controls.seed, length, controls.temperature, controls.top_k, controls.top_p, controls.min_p)
    (draw,) = when(sampled.any(), drawn, inputs)
    return torch.where(sampled, draw, sampling.argmax(logits))


def _with_every_control(
    raw: torch.Tensor, tokens: torch.Tensor, length: torch.Tensor, controls: Controls, wanted: LogitsControls
) -> torch.Tensor:
    """The next token of each row, [B] int32, after all that a request can ask for; ``raw`` [B, V]."""
    logits = process_logits(raw, wanted, controls.stop_ids, tokens, length)
    return sampling.choose(logits, _filters(controls, wanted), controls.seed, length)


def _choose_each(
    raw: torch.Tensor,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    controls: Controls,
    wanted: LogitsControls,
    allowed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose at several positions of each row, as if the tokens before each had been chosen.

    Every position becomes a row of its own: the functions that choose one token do the rest.

    Args:
        raw: [B, T, V] float32.
        tokens: [B, S] int32, with the drafts behind what is known.
        lengths: [B, T] int32, the position that each token will take.
        controls, wanted: of the B rows.
        allowed: [B, T, W] int32, what a grammar allows.

    Returns:
        The tokens [B, T] int32, and what ``token_info.describe`` says of them [B, T, n], zeros where no row asks.
    """
    rows, count = lengths.shape
    logits, length, own = raw.flatten(0, 1), lengths.flatten(), Controls(*(_spread(each, count) for each in controls))
    plain = _greedy_or_drawn(logits, length, own, (own.temperature > 0) & (own.full == 0))

    def with_controls(
        raw: torch.Tensor, tokens: torch.Tensor, length: torch.Tensor, allowed: torch.Tensor, *both: torch.Tensor
    ) -> Tensors:
        own, given = Controls(*both[: len(controls)]), LogitsControls(*both[len(controls) :])
        given = given._replace(allowed=given.allowed & allowed)
        return (_with_every_control(raw, tokens, length, own, given),)

    given = (_spread(each, count) for each in wanted)
    inputs = (logits, _spread(tokens, count), length, allowed.flatten(0, 1), *own, *given)
    (full,) = when((own.full == 1).any(), with_controls, inputs)
    chosen = torch.where(own.full == 1, full, plain)
    (described,) = when((own.details == 1).any(), lambda *given: (token_info.describe(*given),), (logits, chosen))
    return chosen.view(rows, count), described.view(rows, count, -1)


def _spread(each: torch.Tensor, count: int) -> torch.Tensor:
    """Every row so many times, one after the other: [B, ...] to [B * count, ...]."""
    return each.unsqueeze(1).expand(each.shape[0], count, *each.shape[1:]).flatten(0, 1)


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
    stopped = (stops.bool() & kept).any(dim=1) | (length >= end)
    done = row.done | ((added > 0) & stopped)
    return row._replace(
        tokens=_written(row.tokens, chosen, row.length, added),
        start=torch.where(added > 0, length - 1, row.start),
        length=length,
        done=done,
        report=_reported(row.report, chosen, added, length, done),
    )


def _written(tokens: torch.Tensor, new: torch.Tensor, place: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Each row's ``tokens`` [B, S] with the first ``count`` [B] of ``new`` [B, n] from position ``place`` [B] on."""
    most = new.shape[1]
    places = torch.arange(tokens.shape[1], dtype=torch.int32, device=new.device) - place.unsqueeze(-1)
    here = (places >= 0) & (places < count.unsqueeze(-1))  # [B, S]
    return torch.where(here, new if most == 1 else new.gather(1, places.clamp(0, most - 1).long()), tokens)


def _taken(stream: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The stream [B, T, dim] at some places [B, n] of each row, [B, n, dim]; a place outside is the nearest inside."""
    inside = places.clamp(0, stream.shape[1] - 1).long()
    return stream.gather(1, inside.unsqueeze(-1).expand(-1, -1, stream.shape[-1]))


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
    new = State(*state.cache, row[:, 3:], start, ready, length, old.hidden, torch.zeros_like(old.done), report)
    return state.with_rows(new, old, slot)


def end(done: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
    """End some slots; both [slots] bool."""
    return done | ended


def copy(
    key_cache: torch.Tensor, value_cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor, *, key_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy a slot's first ``key_len`` keys and values to another slot; both [1] int32."""
    columns = key_cache.shape[-1] * -(-key_len // value_cache.shape[-1])
    return (
        kv_cache.copy_row(key_cache, source, target, key_len),
        kv_cache.copy_row(value_cache, source, target, columns),
    )


def move(state: State, source: torch.Tensor, target: torch.Tensor) -> State:
    """Give a slot's state, without its cache, to another slot, and end it where it was."""
    row, other = state.rows(source, 1), state.rows(target, 1)
    moved = state.with_rows(row, other, target)
    return moved._replace(done=ops.put_rows(moved.done, torch.ones_like(row.done), source))
