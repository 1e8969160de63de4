"""How a prompt is cut into chunks of a few fixed lengths: pure integers, no tensor, no device.

XLA compiles a program for each shape it meets, so a prompt of any length is sent as chunks whose lengths come from a
short list. ``greedy`` always takes the longest chunk that still fits into the rest of the prompt; ``pad`` may fill the
tail up with padding where one longer program costs less than several shorter ones. (Source of the idea:
pytorch-tpu/llama, pull request 13.)

    1501 tokens, buckets 512, 64, 8, 1:   [0, 512) [512, 1024)   7 x 64   3 x 8   5 x 1   = 17 chunks
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from llama.config import LONGEST_SCORED, EngineConfig
from llama.errors import ConfigError

# The price of starting one program, in prompt tokens: a chunk of n tokens costs n + this. A short chunk reads all
# weights however few tokens it holds. At 110m float32 it was 27 on one day (55 ms for 8 tokens, 142 for 64) and
# 9 on another (50 and 215); docs/log.md, 2026-11-26.
RUN_COST = 20


class Chunk(NamedTuple):
    """One program run of the prefill.

    Attributes:
        start: position of its first token.
        length: its bucket: how many positions the program fills.
        valid: how many of them hold prompt tokens; fewer than ``length`` only in a padded tail.
        key_len: how many leading cache positions the program reads.
    """

    start: int
    length: int
    valid: int
    key_len: int

    @property
    def end(self) -> int:
        """The position after the chunk's last prompt token."""
        return self.start + self.valid


def plan(prompt_len: int, config: EngineConfig, cached: int = 0) -> tuple[Chunk, ...]:
    """Cut a prompt into chunks.

    Args:
        prompt_len: tokens of the prompt, 1 to ``config.max_seq_len``.
        cached: how many of them are in the cache already, fewer than ``prompt_len``; the first chunk begins after them.

    Returns:
        Chunks in order; each begins where the one before ends, the last one ends at ``prompt_len``, and none reaches
        past ``config.max_seq_len``, because XLA clamps a write that does not fit and would overwrite the last positions
        silently.

    Raises:
        ConfigError: ``prompt_len`` or ``cached`` is out of its range.
    """
    if not 1 <= prompt_len <= config.max_seq_len:
        raise ConfigError(f"prompt_len: got {prompt_len}, expected 1 to max_seq_len={config.max_seq_len}")
    if not 0 <= cached < prompt_len:
        raise ConfigError(f"cached: got {cached}, expected 0 to prompt_len - 1 = {prompt_len - 1}")
    new = prompt_len - cached
    greedy = config.bucket_policy == "greedy"
    lengths = _greedy(new, config.buckets) if greedy else _padded(new, config.max_seq_len - cached, config.buckets)
    return tuple(_laid(lengths, cached, prompt_len, config))


def prefill(
    count: int, config: EngineConfig, cached: int = 0, *, scored_from: int | None = None
) -> tuple[list[Chunk], int]:
    """Chunks that run a prompt by themselves, and the position from which decode steps take over.

    Decode steps run the tail of ones: beside other requests it costs nothing there, and the last one chooses the first
    new token. A prompt whose tokens are scored, or whose bits may not depend on its neighbours, is run by chunks to its
    end, with one padded chunk in place of the ones.

    Args:
        count: tokens of the prompt that are run.
        cached: see ``plan``.
        scored_from: the first token whose log-probability is wanted, or None. Chunks that hold the position before it,
            or a later one, are no longer than ``LONGEST_SCORED``: all their positions go through the vocabulary head.

    Returns:
        The chunks, and the end of the last one, which is ``count`` where decode steps run none of the prompt.
    """
    if scored_from is not None:
        body = _before_scored(scored_from - 1, config, cached)
        start = body[-1].end if body else cached
        return [*body, *_scored(start, count, config)], count
    chunks = list(plan(count, config, cached))
    tail = next((i for i, chunk in enumerate(reversed(chunks)) if chunk.length > 1), len(chunks))
    body, ones = chunks[: len(chunks) - tail], chunks[len(chunks) - tail :]
    if ones and config.batch_invariant and config.shortest_chunk > 1:
        body.append(_chunk(ones[0].start, config.shortest_chunk, count, config))
    return body, body[-1].end if body else cached


def is_scored(chunk: Chunk, scored_from: int | None) -> bool:
    """Whether a chunk predicts a token whose log-probability is wanted."""
    return scored_from is not None and chunk.end >= scored_from


def scored_lengths(config: EngineConfig) -> tuple[int, ...]:
    """Lengths of chunks whose tokens are scored, descending."""
    return tuple(b for b in config.buckets if b <= LONGEST_SCORED and (b > 1 or config.shortest_chunk == 1))


def _before_scored(end: int, config: EngineConfig, cached: int) -> list[Chunk]:
    """Chunks of a prompt up to about the first position that is scored; those of one token are left to scored ones."""
    return [chunk for chunk in plan(end, config, cached) if chunk.length > 1] if end > cached else []


def _scored(start: int, count: int, config: EngineConfig) -> list[Chunk]:
    """Chunks of positions [start, count), the last one padded if that is cheaper."""
    return _laid(_padded(count - start, config.positions - start, scored_lengths(config)), start, count, config)


def _laid(lengths: Iterable[int], start: int, count: int, config: EngineConfig) -> list[Chunk]:
    """Chunks of these lengths, one after the other from ``start`` on, of a prompt of ``count`` tokens."""
    chunks = []
    for length in lengths:
        chunks.append(_chunk(start, length, count, config))
        start = chunks[-1].end
    return chunks


def _chunk(start: int, length: int, count: int, config: EngineConfig) -> Chunk:
    """A chunk of a prompt of ``count`` tokens; it may reach past their end, into the slack of the cache."""
    reach = min(start + length, config.max_seq_len)
    return Chunk(start, length, min(length, count - start), key_bucket(reach, config))


def cost(count: int, config: EngineConfig, cached: int, *, scored_from: int | None = None, rides: bool = False) -> int:
    """About how long a prompt's rest takes, in prompt tokens of a long chunk.

    Args:
        count, cached, scored_from: see ``prefill``.
        rides: other requests take decode steps, with which the tail of ones rides.
    """
    chunks, ready = prefill(count, config, cached, scored_from=scored_from)
    return sum(RUN_COST + c.length for c in chunks) + (0 if rides else (RUN_COST + 1) * (count - ready))


@lru_cache(maxsize=65536)
def resumed(
    count: int, config: EngineConfig, held: int, *, scored_from: int | None = None, rides: bool = False
) -> tuple[int, int]:
    """From which position to run a prompt whose beginning is held: the cheapest one.

    It may be before the end of what is held: to run three positions again may turn five chunks of one token into one
    of eight, and one chunk of 512 may cost less than seven of 64.

    Args:
        held: leading positions that some row holds, fewer than ``count``.
        count, scored_from, rides: see ``cost``.

    Returns:
        The position, and what it saves beside a cold start, in the unit of ``cost``; (0, 0) where nothing is saved.
    """
    rest = count - held
    aligned = (count - -(-rest // bucket) * bucket for bucket in config.buckets)
    starts = {0, held, *(start for start in aligned if start > 0)}
    costs = {start: cost(count, config, start, scored_from=scored_from, rides=rides) for start in starts}
    best = min(starts, key=lambda start: (costs[start], -start))
    return best, costs[0] - costs[best]


def key_bucket(end: int, config: EngineConfig) -> int:
    """The smallest key bucket that holds positions [0, end)."""
    return next(k for k in config.key_buckets if k >= end)


def _greedy(remaining: int, buckets: tuple[int, ...]) -> list[int]:
    """The longest bucket that fits, again and again; ``buckets`` descend and end in 1."""
    lengths = []
    for bucket in buckets:
        count, remaining = divmod(remaining, bucket)
        lengths += [bucket] * count
    return lengths


def _padded(tokens: int, room: int, buckets: tuple[int, ...]) -> list[int]:
    """Full chunks of the longest bucket, then the cheapest way through the tail, which may end in one padded chunk.

    Args:
        tokens: how many to cover.
        room: positions of the cache that are left for them.
    """
    full, tail = divmod(tokens, buckets[0])
    room -= full * buckets[0]
    # best[n]: (cost, first bucket) of covering the last n tokens; a padded chunk must not pass the end of the cache
    best: list[tuple[int, int]] = [(0, 0)]
    for n in range(1, tail + 1):
        start = tail - n
        options = [b for b in buckets if b <= n or start + b <= room]
        best.append(min((b + RUN_COST + best[max(n - b, 0)][0], -b) for b in options))
    lengths = [buckets[0]] * full
    while tail > 0:
        bucket = -best[tail][1]
        lengths.append(bucket)
        tail -= bucket
    return lengths
