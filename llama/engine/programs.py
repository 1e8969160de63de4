"""Which compiled programs a configuration can meet, and which ones a batch of requests runs, in what order.

Pure integers and names, no tensor: the engine runs what stands here, and warm-up compiles it. That both ask the same
    functions is
what makes "nothing compiles after warm-up" hold.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama.compiled.steps import CHOOSING, IN_DECODE_STEP, Head, ProgramKey
from llama.config import EngineConfig
from llama.engine import chunks as buckets
from llama.engine.chunks import Chunk
from llama.engine.request import Request

LONGEST_SCORED = (
    64  # tokens of a chunk whose positions all go through the vocabulary head: their logits are length x vocabulary
)
FAN_OUT = ProgramKey(0, 0, "fan_out")


def all_keys(config: EngineConfig) -> list[ProgramKey]:
    """Every program that any prompt, sampling parameter and length can need under this configuration."""
    shapes = buckets.program_shapes(config)
    several = config.max_batch_size > 1
    keys = [ProgramKey(length, key_len, "none") for length, key_len in shapes]
    keys += [ProgramKey(1, key_len, head) for head in IN_DECODE_STEP for length, key_len in shapes if length == 1]
    keys += [ProgramKey(0, 0, head) for head in CHOOSING]
    scored = [ProgramKey(length, key_len, "score", several) for length, key_len in shapes if length <= LONGEST_SCORED]
    if several:
        keys += [ProgramKey(length, key_len, "none", one_row=True) for length, key_len in shapes] + [FAN_OUT]
    return keys + scored


def keys_for(requests: Sequence[Request], config: EngineConfig, cached: int = 0) -> list[ProgramKey]:
    """The programs that a batch of these requests can need, in the order of their first use."""
    head = head_for(requests)
    if runs_by_row(requests, config, cached):
        groups = rows_by_prompt(requests)
        keys = [
            key
            for rows in groups.values()
            for _, key in prefill_runs([requests[i] for i in rows], config, 0, None, one_row=True)
        ]
        keys += [FAN_OUT, ProgramKey(0, 0, head)]
    else:
        keys = [key for _, key in prefill_runs(requests, config, cached, head)]
    decoding = [r for r in requests if r.params.max_gen_len > 1]
    if decoding:
        # from the shortest prompt on: where the longest rows end early, the batch goes on at the others' positions
        first = buckets.key_bucket(min(len(r.prompt_ids) for r in decoding) + 1, config)
        last = buckets.key_bucket(max(r.limit for r in decoding) - 1, config)
        keys += [key for k in config.key_buckets if first <= k <= last for key in decode_keys(k, head)]
    return list(dict.fromkeys(keys))


def prefill_runs(
    requests: Sequence[Request], config: EngineConfig, cached: int, head: Head | None, *, one_row: bool = False
) -> list[tuple[Chunk | None, ProgramKey]]:
    """What runs, in order, for the requests' prefill: a chunk's programs, and behind the last chunk the head alone (no
    chunk).

    Args:
        head: chooses the first token; None for no head.
    """
    scored = any(r.params.prompt_logprobs for r in requests)
    longest = max(len(r.prompt_ids) for r in requests)
    chunks = buckets.plan(longest, config, cached, LONGEST_SCORED if scored else None)
    runs: list[tuple[Chunk | None, ProgramKey]] = [
        (c, ProgramKey(c.length, c.key_len, "score" if scored else "none", one_row)) for c in chunks
    ]
    if head in IN_DECODE_STEP and chunks[-1].length == 1 and not scored:
        runs[-1] = (chunks[-1], ProgramKey(1, chunks[-1].key_len, head))
    elif head is not None:
        runs.append((None, ProgramKey(0, 0, head)))
    return runs


def runs_by_row(requests: Sequence[Request], config: EngineConfig, cached: int) -> bool:
    """Whether each prompt is prefilled by itself: once for all its samples, or for what is to be known of its
    tokens.
    """
    if config.max_batch_size == 1 or cached:
        return False
    shares = any(r.params.samples > 1 for r in requests) and len(rows_by_prompt(requests)) < len(requests)
    return shares or any(r.params.prompt_logprobs for r in requests)


def rows_by_prompt(requests: Sequence[Request]) -> dict[tuple[int, ...], list[int]]:
    """The rows that share each prompt."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(request.prompt_ids, []).append(i)
    return groups


def head_for(requests: Sequence[Request]) -> Head:
    """The cheapest head that serves all rows; one row that needs more brings it in for the batch, where the others ask
    nothing of it.
    """
    return max((_head_of(r) for r in requests), key=CHOOSING.index, default="greedy")


def _head_of(request: Request) -> Head:
    if any(request.kinds):
        return "logprobs"
    if request.params.reshapes_logits:
        return "full"
    return "greedy" if request.params.temperature == 0 else "sample"


def decode_keys(key_len: int, head: Head) -> list[ProgramKey]:
    """The programs of one decode step."""
    if head in IN_DECODE_STEP:
        return [ProgramKey(1, key_len, head)]
    return [ProgramKey(1, key_len, "none"), ProgramKey(0, 0, head)]
