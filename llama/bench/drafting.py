"""How much faster drafting makes a model that answers: plain decoding and every drafter in turns, task by task.

Groups of ``batch`` prompts begin together, so a group's decode time is the time from its last first token to its last
token. Everything is compiled before the first run that counts, and a compilation after that is an error. Ways with
equal shapes share a model and its slots, one after the other.

Retrieval needs texts. Where no datastore is given, the plain model first answers prompts of the same tasks that are not
measured (``held_out``), and a datastore is made of these prompts and answers, as ``llama-xla datastore build`` makes it
of the output of ``generate --json``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama import checkpoint
from llama.bench import report, verify_cost
from llama.bench.draft_prompts import Prompt, by_task, check_fit
from llama.bench.draft_runs import Contestant, Run, Way, drafter_maker
from llama.bench.workload import Workload
from llama.config import DEFAULT_BUCKETS, EngineConfig
from llama.drafting import datastore
from llama.drafting.files import fingerprint
from llama.drafting.opening import open_drafting
from llama.engine.runner import XlaRunner
from llama.engine.sequence import DraftCounts
from llama.errors import ConfigError, RecompileError, setting
from llama.generation import LLaMA
from llama.loading import matched
from llama.sampling_params import SamplingParams
from llama.tokenizer import find_tokenizer, load_tokenizer

PLAIN = "plain"
COLUMNS = {
    "runner": "drafter",
    "model": "model",
    "dtype": "weights",
    "batch": "batch",
    "task": "task",
    "tokens_per_step": "tokens/step",
    "accepted_share": "accepted",
    "accepted_len": "mean length",
    "decode_tok_s": "decode tok/s",
    "speedup": "speed-up",
    "job_speedup": "whole job",
    "propose_us": "µs/proposal",
    "differ": "texts that differ",
}


@dataclass(frozen=True)
class Plans:
    """What is measured.

    Attributes:
        works: the model and its shapes, one for each number of rows; ``gen_len`` and ``max_seq_len`` are set.
        ways: with drafters.
        prompts: those that are held out included.
        repetitions: runs that count.
        params: of every prompt; each gets a seed of its own.
        store: where the datastore is made that some ways name; None where that is not wanted.
    """

    works: Sequence[Workload]
    ways: Sequence[Way]
    prompts: Sequence[Prompt]
    repetitions: int
    params: SamplingParams
    store: Path | None = None

    def store_of(self, way: Way) -> Path | None:
        """The datastore that has to be made for a way; None where it needs none."""
        return self.store if way.settings is not None and way.settings.datastore == self.store else None


def measure(plans: Plans, say: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run everything.

    Args:
        say: called with a line for people before something takes long.

    Returns:
        A row for each number of rows, task and way, plain decoding first; and what checking drafts costs
        (``verify_cost``).

    Raises:
        ConfigError, CheckpointError, TokenizerError, DatastoreError: a prompt or a file that does not fit; nothing has
            been loaded then. Or no answer is longer than a token.
        RecompileError: something was compiled after the warm-up.
    """
    check(plans)
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    tasks = by_task(plans.prompts)
    for work in plans.works:
        say(f"Compiling, batch {work.batch}")
        contestants = _contestants(plans, work, say)
        for contestant in contestants:  # the first run touches all memory
            for prompts in tasks.values():
                contestant.run(prompts[: work.batch], plans.params)
        rows += compete(contestants, work, tasks, plans.repetitions, plans.params, say)
        if not costs:
            runner = contestants[-1].llm.engine.runner
            assert isinstance(runner, XlaRunner)
            costs = verify_cost.measure_steps(runner, work, plans.repetitions)
    return rows, costs


def check(plans: Plans) -> None:
    """Refuse what can be refused before weights are loaded: see ``measure``."""
    work = plans.works[0]
    assert work.directory is not None  # a trained model
    if plans.store is not None and not any(prompt.held_out for prompt in plans.prompts):
        raise ConfigError(
            'drafter: retrieval needs texts: got prompts without "held_out": true, from whose answers a datastore '
            f"would be made; add some to the prompts, or name a file by {setting('datastore')}"
        )
    tokenizer = load_tokenizer(find_tokenizer(work.directory))
    config = _config(work)
    args = matched(None, checkpoint.open_checkpoint(work.directory), tokenizer, config)
    check_fit(plans.prompts, tokenizer, work.gen_len, work.positions)
    for way in plans.ways:
        if way.settings is not None and plans.store_of(way) is None:
            open_drafting(way.settings, args, tokenizer, way.settings.settled(config), work.ckpt_dir is None)


def _config(work: Workload) -> EngineConfig:
    return EngineConfig(
        max_seq_len=work.positions,
        max_batch_size=work.batch,
        dtype=work.dtype,  # type: ignore[arg-type]
        cache_dtype=work.cache_dtype,  # type: ignore[arg-type]
        buckets=work.buckets or DEFAULT_BUCKETS,
        prefix_cache=False,  # the same prompts come again and again
        bucket_policy=work.bucket_policy,  # type: ignore[arg-type]
        fail_on_recompile=True,
    )


def _contestants(plans: Plans, work: Workload, say: Callable[[str], None]) -> list[Contestant]:
    """Plain decoding and all ways, with everything compiled."""
    models: dict[EngineConfig, LLaMA] = {}
    found = []
    for way in (Way(PLAIN, None), *plans.ways):
        config = _config(work) if way.settings is None else way.settings.settled(_config(work))
        if config not in models:
            models[config] = LLaMA.build(work.directory, config=config)
        llm = models[config]
        new_drafter = None if way.settings is None else drafter_maker(way.settings, llm, work.ckpt_dir is None)
        found.append(Contestant(way, llm, new_drafter))
        store = plans.store_of(way)
        if store is not None and not store.exists():
            say("Making a datastore of the plain model's answers to other prompts")
            make_datastore(found[0], plans.prompts, plans.params, store)
        found[-1].compile()
    return found


def make_datastore(plain: Contestant, prompts: Iterable[Prompt], params: SamplingParams, path: Path) -> None:
    """Let the plain model answer the prompts that are held out, and write what it said to a datastore."""
    texts = [prompt.text for prompt in prompts if prompt.held_out]
    answers = plain.run(texts, params).texts
    tokenizer = plain.llm.tokenizer
    documents = [tokenizer.encode(text) + answer for text, answer in zip(texts, answers, strict=True)]
    datastore.build(documents, fingerprint(tokenizer), path)


def compete(
    contestants: Sequence[Contestant],
    work: Workload,
    tasks: Mapping[str, Sequence[str]],
    repetitions: int,
    params: SamplingParams,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run all contestants on each task, taking turns; return a row for each task and contestant.

    Args:
        contestants: the first one is what the others are compared with.
        tasks: the prompts of each.

    Raises:
        RecompileError: something was compiled meanwhile.
        ConfigError: no answer is longer than a token.
    """
    rows = []
    for task, prompts in tasks.items():
        runs: list[list[Run]] = [[] for _ in contestants]
        for number in range(1, repetitions + 1):
            say(f"Batch {work.batch}, {task}, round {number} of {repetitions}")
            for contestant, found in zip(contestants, runs, strict=True):
                found.append(contestant.run(prompts, params))
        for contestant, found in zip(contestants, runs, strict=True):
            _check_runs(f"{task}, {contestant.way.name}", found)
            rows.append(summarise(contestant.way, work, task, found, runs[0]))
    return rows


def _check_runs(what: str, runs: Sequence[Run]) -> None:
    """Refuse runs that say nothing about decoding."""
    compiled = sum(run.compiled for run in runs)
    if compiled:
        raise RecompileError(f"{what}: {compiled} programs were compiled after the warm-up")
    if not all(run.tokens and run.decode_s > 0 for run in runs):
        raise ConfigError(f"prompts_file: {what}: got answers of one token at most, expected longer ones to time")


# --- results ----------------------------------------------------------------------------------------------------------


def summarise(way: Way, work: Workload, task: str, runs: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    """One row: medians over repetitions of what was timed, sums of what was counted.

    A speed-up compares two runs of one repetition: seconds for each decoded token, and seconds of the whole job.

    Args:
        runs: of this way, one a repetition.
        plain: of plain decoding, likewise.
    """
    rates = [run.tokens / run.decode_s for run in runs]
    speedups = [run.tokens * p.decode_s / (p.tokens * run.decode_s) for run, p in zip(runs, plain, strict=True)]
    counts, differ = DraftCounts(), set[int]()
    for run, other in zip(runs, plain, strict=True):
        counts.merge(run.counts)
        differ |= {i for i, (a, b) in enumerate(zip(run.texts, other.texts, strict=True)) if a != b}
    asked = sum(run.asked for run in runs)
    row: dict[str, Any] = {
        "runner": way.name,
        "model": work.name,
        "dtype": work.dtype,
        "batch": work.batch,
        "task": task,
        "prompts": len(runs[0].texts),
        "gen_len": work.gen_len,
        "repetitions": len(runs),
        "tokens": runs[0].tokens,
        "tokens_per_step": sum(run.tokens for run in runs) / max(sum(run.steps for run in runs), 1),
        "decode_tok_s": statistics.median(rates),
        "decode_spread": statistics.pstdev(rates),
        "speedup": statistics.median(speedups),
        "least_speedup": min(speedups),
        "most_speedup": max(speedups),
        "job_speedup": statistics.median(p.job_s / run.job_s for run, p in zip(runs, plain, strict=True)),
        "differ": len(differ),
        "compiled_after_warm_up": sum(run.compiled for run in runs),
    }
    if way.settings is not None:
        row |= {
            "draft_lens": list(way.settings.draft_lens),
            "drafts": counts.drafts,
            "draft_tokens": counts.draft_tokens,
            "accepted_tokens": counts.accepted_tokens,
            "accepted_share": counts.accepted_tokens / counts.draft_tokens if counts.draft_tokens else None,
            "accepted_len": 1 + counts.accepted_tokens / counts.drafts if counts.drafts else None,
            "propose_us": 1e6 * sum(run.propose_s for run in runs) / asked if asked else None,
        }
    return row


def notes(rows: Sequence[dict[str, Any]], costs: Sequence[dict[str, Any]]) -> list[str]:
    """Lines after the table: what checking costs, and whether the texts are those of plain decoding."""
    differing = [f"{row['runner']}, batch {row['batch']}: {row['differ']}" for row in rows if row["differ"]]
    told = f"texts that differ from plain decoding: {'; '.join(differing)}" if differing else "all texts are equal"
    return [*map(verify_cost.note, costs), f"{told}; nothing was compiled after the warm-up"]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the speed-up of every drafter, grouped by task; one panel for each number of rows.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    library = report.pyplot()
    batches, tasks, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("batch", "task", "runner"))
    names.remove(PLAIN)
    height = 0.9 + 2.6 * len(batches)
    figure, panels = library.subplots(
        len(batches), figsize=(10, height), layout="constrained", squeeze=False, sharey=True
    )
    width = 0.84 / len(names)
    for axes, batch in zip(panels[:, 0], batches, strict=True):
        found = {(row["runner"], row["task"]): row["speedup"] for row in rows if row["batch"] == batch}
        for number, name in enumerate(names):
            places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(tasks))]
            heights = [found[name, task] for task in tasks]
            bars = axes.bar(places, heights, 0.92 * width, label=name, color=COLOURS[number % len(COLOURS)])
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2, bbox=LABEL_BOX)
        axes.axhline(1.0, color="#444444", linewidth=1, zorder=1.5)
        axes.set_xticks(range(len(tasks)), tasks)
        axes.set_ylabel("speed-up of decoding")
        axes.set_ylim(0, 1.15 * max(1.0, *(row["speedup"] for row in rows)))
        axes.set_title(f"{rows[0]['model']}, {rows[0]['dtype']}, batch {batch}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 8), frameon=False)
    report.save(figure, path)


LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the line at 1.0 would cross some labels
COLOURS = ("#222255", "#4477aa", "#44aa99", "#ddaa33", "#cc6677", "#8877bb", "#999933", "#bbbbbb")
