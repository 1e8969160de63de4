"""The commands `llama-xla bench` and `llama-xla kernels`: measure speed, alone or beside other programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llama.cli.flags import one_of
from llama.cli.output import json_line, log_to_stderr, write
from llama.config import BUCKET_POLICIES, EngineConfig
from llama.errors import ConfigError, FlagError

if TYPE_CHECKING:
    from llama.bench.workload import Workload


def bench(
    *,
    shape: str = "110m",
    ckpt_dir: str | None = None,
    prompt_len: int = 512,
    gen_len: int = 128,
    repetitions: int = 5,
    batch: list[int] | None = None,
    dtype: str = "float32",
    max_seq_len: int | None = None,
    buckets: list[int] | None = None,
    bucket_policy: str = "greedy",
    vocab_size: int | None = None,
    heads: list[str] | None = None,
    mixed: int | None = None,
    slots: int | None = None,
    prefill_budget: int = EngineConfig.prefill_budget,
    compare: list[str] | None = None,
    output: str = "md",
    plot: str | None = None,
) -> None:
    """Measure prefill and decode speed, alone or beside another program. Warm-up is not counted.

    llama-xla bench --shape 110m -p 512 -n 64 -r 5 --compare hf

    Workload:
        shape: demo, tiny, 110m, 1.1b or 7b: the demo model, or random weights of that size.
        ckpt_dir: A checkpoint instead of random weights.
        prompt_len: Prompt tokens; also -p.
        gen_len: Generated tokens; also -n.
        repetitions: Runs that are counted; also -r.
        batch: Rows that run together; 1,8 measures both. Default: 1.
        dtype: How weights are stored: float32, bfloat16 or int8.
        max_seq_len: Positions of the cache. Default: as many as the workload needs.
        buckets: Chunk lengths. Default: the engine's.
        bucket_policy: greedy, or pad.
        vocab_size: Tokens of the random model's vocabulary. Default: the shape's own.
        heads: Time a decode step with this head, too: greedy, sample, full or logprobs.
        mixed: Instead of the workload above: this many requests of mixed lengths share --batch slots, first all at
            once, then arriving at random at 80 % of that rate.
        slots: Slots of our engine. Default: as many as rows.
        prefill_budget: With --mixed: prompt tokens that may run before the running requests get their next token.
        compare: Run hf (transformers) or llama.cpp on the same weights, alternating with llama-xla.

    Output:
        output: md, csv, json or jsonl; also -o. The last line is always one JSON object.
        plot: Write a PNG of tokens per second and time per step over the position to this file.
    """
    from llama.bench import child, report
    from llama.bench.ceiling import read_ceiling
    from llama.bench.workload import HEADS, RUNNERS, Workload

    log_to_stderr(quiet=True)
    one_of("output", output, report.FORMATS)
    runners = ["ours", *(one_of("compare", name, RUNNERS[1:]) for name in compare or ())]
    policy = one_of("bucket_policy", bucket_policy, BUCKET_POLICIES)
    if repetitions < 1:
        raise ConfigError(f"repetitions: got {repetitions}, expected at least 1")
    if plot is not None and not Path(plot).absolute().parent.is_dir():
        raise ConfigError(f"--plot: no such directory: {Path(plot).absolute().parent}")
    if mixed is not None:
        others = {"compare": compare, "heads": heads, "plot": plot, "slots": slots, "batch": (batch or [8])[1:]}
        unused = next((name for name, value in others.items() if value), None)
        if unused is not None:
            raise FlagError(f"--mixed measures this program alone, with one number of slots: leave --{unused} out")
        _bench_mixed(
            Workload(
                shape,
                ckpt_dir,
                prompt_len=1,
                gen_len=2,
                batch=(batch or [8])[0],
                dtype=dtype,
                max_seq_len=max_seq_len,
                buckets=tuple(buckets) if buckets else None,
                vocab_size=vocab_size,
            ),
            mixed,
            repetitions,
            {"prefill_budget": prefill_budget, "bucket_policy": policy},
        )
        return
    works = [
        Workload(
            shape,
            ckpt_dir,
            prompt_len,
            gen_len,
            rows,
            dtype,
            max_seq_len,
            tuple(buckets) if buckets else None,
            policy,
            vocab_size,
            tuple(one_of("heads", head, HEADS) for head in heads or ()),
            slots,
        )
        for rows in batch or (1,)
    ]
    rows, ceiling = [], 0.0
    for work in works:
        children: list[child.Child] = []
        try:
            for name in runners:
                print(f"Warming up {name}, batch {work.batch}", file=sys.stderr)
                children.append(child.Child(name, work))
            ceiling = max(ceiling, read_ceiling())
            runs = [[each.run() for each in children] for _ in range(repetitions)]  # alternating
            ceiling = max(ceiling, read_ceiling())
            rows += [
                report.summarise(work, c.runner, c.facts, [r[i] for r in runs], ceiling) for i, c in enumerate(children)
            ]
        finally:
            for each in children:
                each.close()
    compared = report.ratios(rows)
    write(report.render(rows, compared, output))
    if plot is not None:
        report.plot([row for row in rows if row["runner"] == "ours"], ceiling, Path(plot))
    brief = [{name: value for name, value in row.items() if name != "points"} for row in rows]
    write(json_line({"rows": brief, "ratios": compared, "read_ceiling_gb_s": ceiling / 1e9}))


def _bench_mixed(work: Workload, count: int, repetitions: int, settings: dict[str, object]) -> None:
    from llama.bench import mixed

    if count < 1:
        raise ConfigError(f"mixed: got {count}, expected at least 1")
    row = mixed.measure(work, count, repetitions, settings)
    write(mixed.report(row))
    write(json_line(row))


bench.short = {"p": "prompt_len", "n": "gen_len", "r": "repetitions", "o": "output"}  # type: ignore[attr-defined]


def kernels(*, shape: str = "110m", rows: list[int] | None = None, save: str | None = None, json: bool = False) -> None:
    """Time every lowering of a linear layer and of attention, and show which one the engine picks.

    llama-xla kernels --shape 110m --rows 1,8,64,512

    Flags:
        shape: tiny, 110m, 1.1b or 7b: its feed-forward layer, and its attention to 512 keys.
        rows: Rows that go through the layer at once. Default: 1,8,64,512.
        save: Write the table to this file, too.
        json: Print one JSON object per line and lowering.
    """
    from llama.bench import kernels as timing
    from llama.bench.workload import SHAPES

    log_to_stderr(quiet=True)
    args = SHAPES[one_of("shape", shape, tuple(SHAPES))]
    counts = rows or (1, 8, 64, 512)
    found = timing.linear_table(args, counts) + timing.attention_table(args, counts)
    text = "".join(json_line(each) for each in found) if json else timing.table(found)
    write(text)
    if save is not None:
        Path(save).write_text(text, encoding="utf-8")
