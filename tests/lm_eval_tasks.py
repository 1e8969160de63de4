"""Small tasks for lm-evaluation-harness, one of each output type, in files that are made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ANIMALS = ("cat", "dog", "bird", "horse")
COLOURS = ("red", "green", "orange", "brown", "white")
CHOICE = [
    {
        "question": f"The {animal} of the {place} is {COLOURS[i % 5]}. What colour is the {animal}?",
        "choices": [*COLOURS[i % 3 : i % 3 + 3], f"{COLOURS[i % 5]} and old"],
        "answer": i % 4,
    }
    for i, (animal, place) in enumerate((a, p) for a in ANIMALS for p in ("house", "farm"))
]
STORIES = [
    {"text": "Once upon a time, in a quiet town, there lived a young girl named Mia."},
    {"text": "The old sailor sat by the harbour. He told his dog of the sea, day after day, until the evening. " * 3},
    {"text": "A"},
    {"text": "Zürich: ☂ 42\n\n  the end "},
]
LINES = [
    {"context": "Once upon a time, there was a little", "word": " girl"},
    {"context": "Mia and her sister liked to look at the ", "word": "stars"},  # a space that belongs to the word
    {"context": "", "word": "Once upon a time"},
    {"context": "   ", "word": "The dog"},
    {"context": "They laughed until the evening. " * 20, "word": " The end"},
]
PROMPTS = [{"question": f"The {animal} said:", "answer": "yes"} for animal in ANIMALS]
COMMON = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "tiny_choice": (
        CHOICE,
        {
            "output_type": "multiple_choice",
            "fewshot_split": "test",
            "doc_to_text": "Q: {{question}}\nA:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
        },
    ),
    "tiny_word": (
        LINES,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{word}}",
            "target_delimiter": "",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ],
        },
    ),
    "tiny_story": (
        STORIES,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": name, "aggregation": "weighted_perplexity", "higher_is_better": False}
                for name in ("word_perplexity", "byte_perplexity")
            ],
        },
    ),
    "tiny_answer": (
        PROMPTS,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
}


def write_task(directory: Path, name: str, documents: list[dict[str, Any]], **config: Any) -> None:
    """Write one task: its documents as JSON lines, and its YAML, which is JSON here."""
    directory.mkdir(parents=True, exist_ok=True)
    data = directory / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(document)}\n" for document in documents), encoding="utf-8")
    kept = {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")}
    content = {"task": name, **COMMON, "dataset_kwargs": kept, **config}
    (directory / f"{name}.yaml").write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_tasks(directory: Path) -> Path:
    """Write all of them."""
    for name, (documents, config) in TASKS.items():
        write_task(directory, name, documents, **config)
    return directory
