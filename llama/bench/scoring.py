"""Multiple choice and shared prompts, with and without the prefix cache, and beside transformers.

An item is a context and a few choices; its prompt begins with demonstrations that all items share. Ids are random: a
model computes them like any others. ``cached`` begins with an empty prefix cache every time; ``not cached`` runs every
prompt from its start; transformers runs the choices of an item as one batch, as lm-evaluation-harness does.

The other measurement is a server's: requests that begin with one long system prompt, and when their first tokens come.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence as Sequences
from pathlib import Path
from typing import Any, NamedTuple

from llama.bench.report import pyplot, save
from llama.bench.workload import WEIGHTS_SEED, Workload
from llama.config import DEFAULT_BUCKETS, EngineConfig
from llama.errors import ConfigError
from llama.generation import LLaMA
from llama.sampling_params import SamplingParams

CONTEXT_TOKENS, CHOICE_TOKENS, CHOICES = 24, 4, 4
SHOT_TOKENS = CONTEXT_TOKENS + CHOICE_TOKENS
SHOTS = (0, 1, 4, 16)
SLOW_ITEMS = 20  # that are run where every one costs the same: without the cache, and by transformers
SYSTEM_TOKENS, OWN_TOKENS, REQUESTS = 512, 20, 32
SEED = 11
CACHED, NOT_CACHED, HF = "cached", "not cached", "transformers"
COLUMNS = {
    "task": "task",
    "model": "model",
    "dtype": "weights",
    "slots": "slots",
    "way": "way",
    "items": "items",
    "ms": "ms/item",
    "found_share": "found in the cache",
    "ratio": "speed / not cached",
}

Pairs = list[tuple[list[int], list[int]]]


class Task(NamedTuple):
    """What is scored.

    Attributes:
        name: as the table shows it.
        shots: demonstrations before every context.
        choices: of each item.
    """

    name: str
    shots: int
    choices: int = CHOICES

    @property
    def longest(self) -> int:
        """Tokens of a context and a choice, BOS included."""
        return 1 + (self.shots + 1) * SHOT_TOKENS

    def pairs(self, items: int, vocab_size: int) -> Pairs:
        """Every item's choices, one after the other; the same for every way."""
        chooser = random.Random(SEED)

        def ids(count: int) -> list[int]:
            return [chooser.randrange(3, vocab_size) for _ in range(count)]

        shared = [1, *ids(self.shots * SHOT_TOKENS)]
        contexts = [[*(shared if self.shots else ids(1)), *ids(CONTEXT_TOKENS)] for _ in range(items)]
        return [(context, ids(CHOICE_TOKENS)) for context in contexts for _ in range(self.choices)]


def tasks(shots: Sequences[int]) -> list[Task]:
    """Items with so many demonstrations, and one without anything to share."""
    return [Task("no overlap", 0, 1), *(Task(f"{count} shots", count) for count in shots)]


def measure(
    work: Workload,
    shots: Sequences[int],
    items: int,
    repetitions: int,
    peers: Sequences[str],
    say: Callable[[str], None],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time all tasks; return a row for each way, and what else there is to say.

    Args:
        work: the model, its dtype, and ``batch`` slots.
        shots: numbers of demonstrations.
        items: that are scored with the cache.
        repetitions: timed runs of each way, in turns; medians are returned.
        peers: ``hf`` or nothing.
        say: told what runs.

    Raises:
        ConfigError: ``max_seq_len`` is too small for the longest prompt.
    """
    wanted = tasks(shots)
    least = max(*(task.longest for task in wanted), SYSTEM_TOKENS + OWN_TOKENS + 1)
    if work.max_seq_len is not None and work.max_seq_len < least:
        raise ConfigError(f"max_seq_len: got {work.max_seq_len}, expected at least {least} for the longest prompt")
    config = EngineConfig(
        max_seq_len=work.max_seq_len or least,
        max_batch_size=work.batch,
        dtype=work.dtype,  # type: ignore[arg-type]
        cache_dtype=work.cache_dtype,  # type: ignore[arg-type]
        buckets=work.buckets or DEFAULT_BUCKETS,
        bucket_policy=work.bucket_policy,  # type: ignore[arg-type]
    )
    say(f"Warming up {work.name}, {work.batch} slots")
    llm = LLaMA.build(work.directory, config=config, random_weights=work.args, seed=WEIGHTS_SEED)
    llm.warm_up()
    others = [_transformers(work, config.max_seq_len) for _ in peers]
    rows: list[dict[str, Any]] = []
    common = {"model": work.name, "dtype": work.dtype, "slots": work.batch}
    furthest = 0.0
    for task in wanted:
        say(f"Scoring {task.name}")
        found, apart = _measure_task(llm, task, items, repetitions, others)
        rows += [common | {"task": task.name} | row for row in found]
        furthest = max(furthest, apart)
    say(f"Serving {REQUESTS} requests with one system prompt")
    system, ratio = _measure_system(llm, repetitions)
    rows += [common | row for row in system]
    notes = [
        f"log-probabilities with and without the cache differ by {furthest:.1e} at most",
        f"{REQUESTS} requests with one system prompt of {SYSTEM_TOKENS} tokens: first tokens {ratio:.1f} x sooner in "
        "sum",
    ]
    return rows, notes


def _measure_task(
    llm: LLaMA, task: Task, items: int, repetitions: int, others: Sequences[Callable[[Pairs], None]]
) -> tuple[list[dict[str, Any]], float]:
    """Rows of one task, and the largest difference between its log-probabilities with and without the cache."""
    many = task.pairs(items, llm.vocab_size)
    few = many[: SLOW_ITEMS * task.choices]
    few_items = len(few) // task.choices
    spent: dict[str, list[float]] = {way: [] for way in (CACHED, NOT_CACHED, *([HF] if others else []))}
    scores: dict[str, list[float]] = {}
    share = 0.0
    for number in range(1 + repetitions):  # the first one touches all memory
        for way in spent:
            began = time.perf_counter()
            if way == HF:
                others[0](few)
                seconds = (time.perf_counter() - began) / few_items
            else:
                llm.engine.scheduler.forget()
                pairs = many if way == CACHED and number else few
                results = llm.score(*_columns(pairs), prefix_cache=way == CACHED)
                seconds = (time.perf_counter() - began) * task.choices / len(pairs)
                found = [each for each in results if each is not None]
                scores[way] = [each.logprob for each in found]
                if way == CACHED:
                    share = sum(s.cached_tokens for s in found) / sum(s.context_tokens + CHOICE_TOKENS for s in found)
            if number:
                spent[way].append(seconds)
    rows: list[dict[str, Any]] = []
    for way, seconds_each in spent.items():
        median = statistics.median(seconds_each)
        ratio = statistics.median(a / b for a, b in zip(spent[NOT_CACHED], seconds_each, strict=True))
        row = {"way": way, "items": items if way == CACHED else few_items, "ms": 1e3 * median, "ratio": ratio}
        rows.append(row | ({"found_share": share} if way == CACHED else {}))
    apart = max(abs(a - b) for a, b in zip(scores[CACHED], scores[NOT_CACHED], strict=False))
    return rows, apart


def _columns(pairs: Pairs) -> tuple[list[list[int]], list[list[int]]]:
    return [context for context, _ in pairs], [continuation for _, continuation in pairs]


def _measure_system(llm: LLaMA, repetitions: int) -> tuple[list[dict[str, Any]], float]:
    """Rows of the requests with one system prompt, and how many times sooner their first tokens come in sum."""
    chooser = random.Random(SEED)
    system = [1, *(chooser.randrange(3, llm.vocab_size) for _ in range(SYSTEM_TOKENS - 1))]
    prompts = [[*system, *(chooser.randrange(3, llm.vocab_size) for _ in range(OWN_TOKENS))] for _ in range(REQUESTS)]
    sums: dict[str, list[float]] = {CACHED: [], NOT_CACHED: []}
    for _ in range(repetitions):
        for way, found in sums.items():
            llm.engine.scheduler.forget()
            params = SamplingParams(1, 0.0, prefix_cache=way == CACHED)
            found.append(sum(result.timing.ttft_s for result in llm.generate(prompts, params=params)))
    ratio = statistics.median(b / a for a, b in zip(sums[CACHED], sums[NOT_CACHED], strict=True))
    rows = [
        {
            "task": "system prompt",
            "way": way,
            "items": REQUESTS,
            "ms": 1e3 * statistics.median(found) / REQUESTS,
            "ratio": ratio if way == CACHED else 1.0,
        }
        for way, found in sums.items()
    ]
    return rows, ratio


def _transformers(work: Workload, positions: int) -> Callable[[Pairs], None]:
    """transformers' LlamaForCausalLM on the same weights: a function that scores pairs."""
    import torch

    from llama.bench.peers import transformers_model

    model = transformers_model(work, positions)

    def run(pairs: Pairs) -> None:
        with torch.inference_mode():
            for begin in range(0, len(pairs), CHOICES):
                ids = torch.tensor([[*context, *own] for context, own in pairs[begin : begin + CHOICES]])
                logits = model(input_ids=ids[:, :-1], logits_to_keep=CHOICE_TOKENS, use_cache=False).logits
                chosen = ids[:, -CHOICE_TOKENS:].unsqueeze(-1)
                logits.float().log_softmax(dim=-1).gather(2, chosen).sum(dim=1)

    return run


def plot(rows: Sequences[dict[str, Any]], path: Path) -> None:
    """Draw the milliseconds of an item over the demonstrations, one line a way.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    library = pyplot()
    figure, axes = library.subplots(figsize=(6.5, 4.2), layout="constrained")
    scored = [row for row in rows if row["task"].endswith(" shots")]
    for way in dict.fromkeys(row["way"] for row in scored):
        own = [row for row in scored if row["way"] == way]
        shots = [int(row["task"].split()[0]) for row in own]
        axes.plot(shots, [row["ms"] for row in own], marker="o", label=f"llama-xla, {way}" if way != HF else way)
    first = scored[0]
    axes.set(
        xlabel=f"demonstrations of {SHOT_TOKENS} tokens",
        ylabel=f"milliseconds an item of {CHOICES} choices",
        title=f"Multiple choice, {first['model']}, {first['dtype']}",
        yscale="log",
        xticks=sorted({int(row["task"].split()[0]) for row in scored}),
    )
    for axis_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_ticks("{x:.0f}")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)
