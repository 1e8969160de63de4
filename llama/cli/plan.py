"""The command `llama-xla plan`: show how a prompt is cut into chunks, without a device."""

from __future__ import annotations

import json as json_lib

from llama.cli.flags import one_of
from llama.config import BUCKET_POLICIES, DEFAULT_BUCKETS, EngineConfig
from llama.engine import chunks as bucket_plan


def plan(
    *,
    prompt_len: int,
    max_seq_len: int = 2048,
    buckets: list[int] | None = None,
    bucket_policy: str = "greedy",
    json: bool = False,
) -> None:
    """Show how a prompt is cut into chunks. No device is touched.

    llama-xla plan --prompt_len 1501 --max_seq_len 2048

    Flags:
        prompt_len: Tokens of the prompt, including BOS.
        max_seq_len: Positions of the cache.
        buckets: Chunk lengths. Default: 512,64,8,1.
        bucket_policy: greedy covers the prompt exactly; pad may fill up its last chunk.
        json: Print one JSON object per chunk and line.
    """
    policy = one_of("bucket_policy", bucket_policy, BUCKET_POLICIES)
    config = EngineConfig(max_seq_len=max_seq_len, buckets=tuple(buckets or DEFAULT_BUCKETS), bucket_policy=policy)
    chunks = bucket_plan.plan(prompt_len, config)
    for chunk in chunks:
        if json:
            print(json_lib.dumps(chunk._asdict()))
        else:
            padding = f", {chunk.length - chunk.valid} of it padding" if chunk.valid < chunk.length else ""
            print(
                f"prompt pos [{chunk.start}, {chunk.end}), section length {chunk.length}{padding}, "
                f"reads keys [0, {chunk.key_len})"
            )
    if not json:
        # tokens of the tail run in decode steps, which choose the first new token, too; after a longer chunk a program
        # of its own does; and one program puts the request into its slot
        programs = len({(c.length, c.key_len) for c in chunks}) + (chunks[-1].length > 1) + 1
        print(f"{len(chunks)} sections, {programs} programs, {prompt_len} of {max_seq_len} positions")
