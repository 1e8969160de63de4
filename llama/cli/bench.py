"""The commands `llama-xla bench` and `llama-xla kernels`: measure speed, alone or beside other programs."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.cli.drafting import drafting_of, takes_drafting
from llama.cli.flags import one_of
from llama.cli.output import json_line, log_to_stderr, write
from llama.config import BUCKET_POLICIES, CACHE_DTYPES, DEMO_CONTEXT, DRAFTER_OF, DTYPES, DraftConfig, EngineConfig
from llama.errors import ConfigError, FlagError

if TYPE_CHECKING:
    from llama.bench import startup
    from llama.bench.draft_runs import Way
    from llama.bench.workload import Workload

PROMPT_LEN, GEN_LEN = 512, 128
POSITIONS_GEN_LEN = 32
WARM_UP_SLOTS = (1, 8)
VERIFY_POSITIONS = 512


@takes_drafting
def bench(
    *,
    drafting: dict[str, Any],
    shape: str | None = None,
    ckpt_dir: str | None = None,
    prompt_len: list[int] | None = None,
    gen_len: int | None = None,
    repetitions: int = 5,
    batch: list[int] | None = None,
    dtype: str = "float32",
    cache_dtype: str = "auto",
    max_seq_len: int | None = None,
    buckets: list[int] | None = None,
    bucket_policy: str = "greedy",
    vocab_size: int | None = None,
    heads: list[str] | None = None,
    mixed: int | None = None,
    positions: list[int] | None = None,
    scoring: int | None = None,
    shots: list[int] | None = None,
    slots: int | None = None,
    prefill_budget: int = EngineConfig.prefill_budget,
    compare: list[str] | None = None,
    startup: bool = False,
    warm_up: bool = False,
    other_version: str | None = None,
    n_layers: list[int] | None = None,
    keep: str | None = None,
    each: bool = False,
    prompts_file: str | None = None,
    temperature: float | None = None,
    verify_cost: bool = False,
    output: str = "md",
    plot: str | None = None,
) -> None:
    """Measure prefill and decode speed, alone or beside another program. Warm-up is not counted.

    llama-xla bench --shape 110m -p 512 -n 64 -r 5 --compare hf
    llama-xla bench --shape 110m -p 512,1501 -r 5 --startup --compare llama.cpp
    llama-xla bench --shape 110m -p 128 -n 64 -r 5 --batch 8,32 --compare llama.cpp
    llama-xla bench --shape 110m --positions 1024,2048,4096 -r 3 --compare llama.cpp --plot positions.png
    llama-xla bench --drafter auto,lookup,suffix --each --batch 1,8 -r 3 --plot drafting.png

    Workload:
        shape: demo, tiny, 110m, 1.1b or 7b: the demo model, or random weights of that size. Default: 110m, or with
            --drafter demo.
        ckpt_dir: A checkpoint instead of random weights.
        prompt_len: Prompt tokens, BOS included; also -p. --startup takes several, such as 512,1501. Default: 512.
        gen_len: Generated tokens; also -n. Default: 128, or with --positions 32.
        repetitions: Runs that are counted; also -r.
        batch: Rows that run together; 1,8 measures both. Default: 1.
        dtype: How weights are stored: float32, bfloat16, int8 or int4.
        cache_dtype: How our keys and values are stored: float32, bfloat16; auto: float32 up to 2048 positions on a CPU,
            else bfloat16.
        max_seq_len: Positions of the cache. Default: as many as the workload needs; with --startup and --warm_up 2048,
            or 512 for the demo model, or as many as the longest prompt needs; with --drafter 2048, or 512 for the demo
            model; with --verify_cost 512.
        buckets: Chunk lengths. Default: the engine's.
        bucket_policy: greedy, or pad.
        vocab_size: Tokens of the random model's vocabulary. Default: the shape's own.
        heads: Time a decode step with this head, too: greedy, sample, full or logprobs.
        mixed: Instead of the workload above: this many requests of mixed lengths share --batch slots, first all at
            once, then arriving at random at 80 % of that rate.
        slots: Slots of our engine. Default: as many as rows.
        positions: Instead of the workload above: prefill one row up to each of these positions, such as 1024,2048,4096,
            and decode --gen_len tokens there, with a cache of float32 and with one of bfloat16, or with --cache_dtype.
            --compare llama.cpp too.
        scoring: Instead of the workload above: score this many items of four choices, with and without the prefix
            cache, and serve 32 requests with one system prompt; in --batch slots, default 1. --compare hf too.
        shots: With --scoring: demonstrations before an item. Default: 0,1,4,16.
        prefill_budget: With --mixed: prompt tokens that may run before the running requests get their next token.
        compare: Run hf (transformers) or llama.cpp on the same weights, alternating with llama-xla.

    Start-up:
        startup: Instead of the workload above: seconds from process start to first token, in phases. Each run is a
            fresh process that maps a checkpoint; random weights are written to one first.
        warm_up: Instead of the workload above: wall and CPU seconds of a full warm-up with --batch slots, 1,8 by
            default, in fresh processes.
        other_version: Measure this checkout of the project, too, alternating; a directory.
        n_layers: With --warm_up: layers of the random model; 12,32 measures both. Default: the shape's own.
        keep: With --startup: write the checkpoint to this directory and keep it for the next time. Default: a temporary
            one.

    {drafting}

    Measuring drafting:
        each: With --drafter: measure each name by itself instead of all of them as one chain. Plain decoding is always
            measured beside them, task by task: copy, edit and story.
        prompts_file: With --drafter: other prompts, JSON lines {"task": "copy", "prompt": "..."}. Lines with
            "held_out": true are not measured; the plain model's answers to them become the datastore of retrieval
            where --datastore and --word_bank name none.
        temperature: With --drafter: sample at this temperature. Default: 0, which takes the likeliest token.
        verify_cost: Instead of the workload above: what a step that checks drafts takes, in decode steps, at one row.
            Random weights will do. --draft_lens says how many drafts; default here: 1,2,3,5,7.

    Output:
        output: md, csv, json or jsonl; also -o. The last line is always one JSON object.
        plot: Write a PNG of tokens per second and time per step over the position to this file; with --startup of
            the phases, with --drafter of the speed-ups, with --positions of tokens per second at each.
    """
    from llama.bench import report
    from llama.bench.workload import HEADS, RUNNERS, Workload

    log_to_stderr(quiet=True)
    one_of("output", output, report.FORMATS)
    runners = ["ours", *(one_of("compare", name, RUNNERS[1:]) for name in compare or ())]
    policy = one_of("bucket_policy", bucket_policy, BUCKET_POLICIES)
    if repetitions < 1:
        raise ConfigError(f"repetitions: got {repetitions}, expected at least 1")
    if plot is not None and not Path(plot).absolute().parent.is_dir():
        raise ConfigError(f"--plot: no such directory: {Path(plot).absolute().parent}")
    is_drafting = drafting["drafter"] is not None
    work = Workload(
        shape or ("demo" if is_drafting else "110m"),
        ckpt_dir,
        prompt_len=1,
        dtype=one_of("dtype", dtype, DTYPES[1:]),
        cache_dtype=one_of("cache_dtype", cache_dtype, CACHE_DTYPES),
        buckets=tuple(buckets) if buckets else None,
        bucket_policy=policy,
        vocab_size=vocab_size,
    )
    given = {
        "warm_up": warm_up,
        "prompt_len": prompt_len,
        "gen_len": gen_len,
        "batch": batch,
        "heads": heads,
        "mixed": mixed,
        "positions": positions is not None,
        "scoring": scoring is not None,
        "shots": shots,
        "slots": slots,
        "prefill_budget": prefill_budget != EngineConfig.prefill_budget,
        "compare": compare,
        "other_version": other_version,
        "n_layers": n_layers,
        "keep": keep,
        "verify_cost": verify_cost,
        **{name: value is not None for name, value in drafting.items()},
        "each": each,
        "prompts_file": prompts_file,
        "temperature": temperature is not None,
        "plot": plot,
    }
    if startup:
        _refuse("startup", "measures one token of one request", given, "prompt_len compare other_version keep plot")
        lengths = prompt_len or [PROMPT_LEN]
        if min(lengths) < 2:
            raise ConfigError(f"prompt_len: got {min(lengths)}, expected at least 2: BOS and one token after it")
        work = replace(work, gen_len=2, max_seq_len=_positions(work, max_seq_len, max(lengths) + 2))
        works = [replace(work, prompt_len=length) for length in lengths]
        _bench_startup(works, runners[1:], other_version, repetitions, keep, output, plot)
    elif warm_up:
        _refuse("warm_up", "compiles and runs nothing", given, "warm_up batch other_version n_layers")
        if n_layers and work.directory is not None:
            raise FlagError("--n_layers: a checkpoint has its own; leave it out, or name random weights by --shape")
        if n_layers and min(n_layers) < 1:
            raise ConfigError(f"n_layers: got {min(n_layers)}, expected at least 1")
        work = replace(work, gen_len=2, max_seq_len=_positions(work, max_seq_len, 3))
        works = [replace(work, batch=rows) for rows in batch or WARM_UP_SLOTS]
        _bench_warm_up(works, n_layers or [None], other_version, repetitions, output)
    elif mixed is not None:
        _refuse("mixed", "measures this program alone", given, "mixed batch prefill_budget")
        if len(batch or ()) > 1:
            raise FlagError("--mixed takes one number of slots: got several in --batch, expected one")
        work = replace(work, gen_len=2, batch=(batch or [8])[0], max_seq_len=max_seq_len)
        _bench_mixed(work, mixed, repetitions, {"prefill_budget": prefill_budget, "bucket_policy": policy})
    elif positions is not None:
        _refuse("positions", "decodes one row", given, "positions gen_len compare plot cache_dtype")
        wanted = tuple(sorted(set(positions)))
        if not wanted or wanted[0] < 1:
            raise ConfigError(f"positions: got {positions}, expected 1 or more each, such as 1024,2048")
        work = replace(
            work,
            prompt_len=wanted[-1],
            gen_len=POSITIONS_GEN_LEN if gen_len is None else gen_len,
            max_seq_len=max_seq_len,
            depths=wanted,
        )
        _bench_positions(work, runners[1:], repetitions, output, plot)
    elif scoring is not None:
        _refuse("scoring", "scores prompts of its own", given, "scoring shots batch compare plot")
        if len(batch or ()) > 1:
            raise FlagError("--scoring takes one number of slots: got several in --batch, expected one")
        work = replace(work, gen_len=2, batch=(batch or [1])[0], max_seq_len=max_seq_len)
        _bench_scoring(work, shots, scoring, runners[1:], repetitions, output, plot)
    elif verify_cost:
        _refuse("verify_cost", "times single steps at one row", given, "verify_cost draft_lens")
        work = replace(work, gen_len=2, max_seq_len=VERIFY_POSITIONS if max_seq_len is None else max_seq_len)
        _bench_verify_cost(work, drafting["draft_lens"], repetitions, output)
    elif is_drafting:
        used = " ".join(["batch gen_len each prompts_file temperature plot", *drafting])
        _refuse("drafter", "measures answers to prompts of its own", given, used)
        work = replace(work, gen_len=GEN_LEN if gen_len is None else gen_len, max_seq_len=max_seq_len)
        if work.directory is None:
            raise FlagError(
                f"--drafter measures what a trained model says: got --shape {work.shape}, which has random weights; "
                "expected --shape demo or --ckpt_dir; --verify_cost takes random weights"
            )
        work = replace(work, max_seq_len=_positions(work, max_seq_len, 0))
        works = [replace(work, batch=rows) for rows in batch or (1,)]
        _bench_drafting(works, drafting, each, prompts_file, repetitions, temperature or 0.0, output, plot)
    else:
        drafting_of(drafting)  # refuses its flags without --drafter
        homes = {
            "--startup or --warm_up": ("other_version", "n_layers", "keep"),
            "--scoring": ("shots",),
            "--drafter": ("each", "prompts_file", "temperature"),
        }
        for home, names in homes.items():
            misplaced = next((name for name in names if given[name]), None)
            if misplaced is not None:
                raise FlagError(f"--{misplaced}: got it without {home}, expected both or none")
        if len(prompt_len or ()) > 1:
            raise FlagError("--prompt_len: got several lengths, expected one; --startup takes several")
        work = replace(
            work,
            prompt_len=(prompt_len or [PROMPT_LEN])[0],
            gen_len=GEN_LEN if gen_len is None else gen_len,
            max_seq_len=max_seq_len,
            heads=tuple(one_of("heads", head, HEADS) for head in heads or ()),
            slots=slots,
        )
        _bench_speed([replace(work, batch=rows) for rows in batch or (1,)], runners, repetitions, output, plot)


def _refuse(mode: str, reason: str, given: Mapping[str, object], used: str) -> None:
    """Refuse the first given flag that a mode does not use; ``used`` lists those that it does."""
    unused = next((name for name, value in given.items() if value and name not in used.split()), None)
    if unused is not None:
        raise FlagError(f"--{mode} {reason}: got --{unused}, too; leave one of them out")


def _positions(work: Workload, max_seq_len: int | None, least: int) -> int:
    """The cache's length: what the flag says, else generate's default, or ``least`` if that is more."""
    if max_seq_len is not None:
        return max_seq_len
    is_demo = work.ckpt_dir is None and work.directory is not None
    return max(least, DEMO_CONTEXT if is_demo else EngineConfig.max_seq_len)


def _bench_speed(
    works: Sequence[Workload], runners: Sequence[str], repetitions: int, output: str, plot: str | None
) -> None:
    from llama.bench import child, report
    from llama.bench.ceiling import read_ceiling

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


def _bench_startup(
    works: Sequence[Workload],
    compare: Sequence[str],
    other_version: str | None,
    repetitions: int,
    keep: str | None,
    output: str,
    plot: str | None,
) -> None:
    from llama.bench import report, startup

    if set(compare) - {"llama.cpp"}:
        raise FlagError(f"--startup: got --compare {' and '.join(compare)}, expected llama.cpp or none")
    if keep is not None and not Path(keep).is_dir():
        raise FlagError(f"--keep: got {keep}, expected a directory that exists; make it first")
    programs: list[startup.Startable] = list(_versions(other_version))
    with startup.place_for_files(None if keep is None else Path(keep)) as place:
        directory = startup.write_checkpoint(works[0], place)
        if compare:
            programs.append(startup.LlamaCpp(startup.write_llama_cpp_file(works[0], directory, place)))
        rows = startup.measure(works, directory, programs, repetitions, _say)
    compared = startup.ratios(rows)
    write(report.written(rows, output, startup.COLUMNS, startup.notes(compared)))
    if plot is not None:
        startup.plot(rows, Path(plot))
    write(json_line({"measured": "startup", "rows": rows, "ratios": compared}))


def _bench_warm_up(
    works: Sequence[Workload],
    depths: Sequence[int | None],
    other_version: str | None,
    repetitions: int,
    output: str,
) -> None:
    from llama.bench import report, startup

    pairs = [(work, depth) for depth in depths for work in works]
    rows = startup.measure_warm_up(pairs, _versions(other_version), repetitions, _say)
    compared = startup.ratios(rows)
    write(report.written(rows, output, startup.WARM_UP_COLUMNS, startup.notes(compared)))
    write(json_line({"measured": "warm_up", "rows": rows, "ratios": compared}))


def _versions(other_version: str | None) -> list[startup.Version]:
    """This version, and another one if there is one."""
    from llama.bench.startup import Version

    return [Version(), *([] if other_version is None else [Version(Path(other_version))])]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _bench_mixed(work: Workload, count: int, repetitions: int, settings: dict[str, object]) -> None:
    from llama.bench import mixed

    if count < 1:
        raise ConfigError(f"mixed: got {count}, expected at least 1")
    row = mixed.measure(work, count, repetitions, settings)
    write(mixed.report(row))
    write(json_line(row))


def _bench_positions(work: Workload, compare: Sequence[str], repetitions: int, output: str, plot: str | None) -> None:
    from llama.bench import positions, report

    if set(compare) - {"llama.cpp"}:
        raise FlagError(f"--positions: got --compare {' and '.join(compare)}, expected llama.cpp or none")
    rows = positions.measure(work, compare, repetitions, _say)
    compared = positions.ratios(rows)
    write(report.written(rows, output, positions.COLUMNS, [positions.note(each) for each in compared]))
    if plot is not None:
        positions.plot(rows, Path(plot))
    write(json_line({"measured": "positions", "rows": rows, "ratios": compared}))


def _bench_scoring(
    work: Workload,
    shots: list[int] | None,
    items: int,
    peers: Sequence[str],
    repetitions: int,
    output: str,
    plot: str | None,
) -> None:
    from llama.bench import report, scoring

    if set(peers) - {"hf"}:
        raise FlagError(f"--scoring: got --compare {' and '.join(peers)}, expected hf or none")
    wanted = scoring.SHOTS if shots is None else tuple(shots)
    for name, value, least in (("scoring", items, 1), ("shots", min(wanted), 0)):
        if value < least:
            raise ConfigError(f"{name}: got {value}, expected {least} or more")
    rows, notes = scoring.measure(work, wanted, items, repetitions, peers, _say)
    write(report.written(rows, output, scoring.COLUMNS, notes))
    if plot is not None:
        scoring.plot(rows, Path(plot))
    write(json_line({"measured": "scoring", "rows": rows, "notes": notes}))


def _bench_verify_cost(work: Workload, draft_lens: list[int] | None, repetitions: int, output: str) -> None:
    from llama.bench import report, verify_cost

    rows = verify_cost.measure(work, draft_lens or verify_cost.DRAFT_LENS, repetitions)
    write(report.written(rows, output, verify_cost.COLUMNS, []))
    write(json_line({"measured": "verify_cost", "rows": rows}))


def _bench_drafting(
    works: Sequence[Workload],
    given: Mapping[str, Any],
    each: bool,
    prompts_file: str | None,
    repetitions: int,
    temperature: float,
    output: str,
    plot: str | None,
) -> None:
    from llama.bench import draft_prompts, drafting, report
    from llama.sampling_params import SamplingParams

    params = SamplingParams(works[0].gen_len, temperature)
    with tempfile.TemporaryDirectory() as scratch:
        settings, store = _with_store(given, Path(scratch) / "store")
        prompts = draft_prompts.read_prompts(Path(prompts_file) if prompts_file else draft_prompts.PROMPTS_FILE)
        plans = drafting.Plans(works, _ways(settings, each), prompts, repetitions, params, store)
        rows, costs = drafting.measure(plans, _say)
    write(report.written(rows, output, drafting.COLUMNS, drafting.notes(rows, costs)))
    if plot is not None:
        drafting.plot(rows, Path(plot))
    write(json_line({"measured": "drafting", "rows": rows, "verify_cost": costs}))


def _with_store(given: Mapping[str, Any], store: Path) -> tuple[DraftConfig, Path | None]:
    """What the flags of drafting say, where retrieval without a file gets a datastore that is still to be made."""
    names = [name.strip() for name in given["drafter"].split(",")]
    is_missing = "retrieval" in names and given["datastore"] is None and given["word_bank"] is None
    settings = drafting_of({**given, "datastore": store} if is_missing else given)
    assert settings is not None  # a drafter is given
    return settings, store if is_missing else None


def _ways(settings: DraftConfig, each: bool) -> list[Way]:
    """The chain, or every name of it with the settings that it uses."""
    from llama.bench.draft_runs import Way

    if not each:
        return [Way(",".join(settings.drafter), settings)]
    found = []
    for name in settings.drafter:
        unused: dict[str, Any] = {field: None for field, owner in DRAFTER_OF.items() if owner != name}
        found.append(Way(name, replace(settings, drafter=(name,), **unused)))
    return found


bench.short = {"p": "prompt_len", "n": "gen_len", "r": "repetitions", "o": "output"}  # type: ignore[attr-defined]


def kernels(*, shape: str = "110m", rows: list[int] | None = None, save: str | None = None, json: bool = False) -> None:
    """Time every lowering of a linear layer, of attention and of the layers, and show which one the engine picks.

    llama-xla kernels --shape 110m --rows 1,8,64,512

    Flags:
        shape: tiny, 110m, 1.1b or 7b: its feed-forward layer, its attention to 512 keys, and six of its layers.
        rows: Rows that go through the layer at once. Default: 1,8,64,512.
        save: Write the table to this file, too.
        json: Print one JSON object per line and lowering.
    """
    from llama.bench import kernels as timing
    from llama.bench.workload import SHAPES

    log_to_stderr(quiet=True)
    args = SHAPES[one_of("shape", shape, tuple(SHAPES))]
    counts = rows or (1, 8, 64, 512)
    tables = (timing.linear_table, timing.attention_table, timing.layers_table)
    found = [line for table in tables for line in table(args, counts)]
    text = "".join(json_line(each) for each in found) if json else timing.table(found)
    write(text)
    if save is not None:
        Path(save).write_text(text, encoding="utf-8")
