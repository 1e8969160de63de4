"""Make the prompts of the drafting benchmark, ``llama/bench/draft_prompts.jsonl``, from one seed.

    .venv/bin/python scripts/make_draft_prompts.py

Of each task there are prompts that are measured, and others from whose answers the benchmark makes a datastore. A
multiple of 8 of each, so that batches of 1, 4 and 8 rows are full.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_text import TextMaker

from llama.bench.draft_prompts import PROMPTS_FILE
from llama.config import DEMO_CONTEXT, DEMO_DIR
from llama.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

SEED = 20_261_126  # no seed of the demo model's training
MEASURED, HELD_OUT = 16, 32  # of each task
ROOM = 160  # tokens that must fit behind a prompt
OPENING_WORDS = (6, 12)


def makers(text: TextMaker) -> dict[str, Callable[[], str]]:
    """How a prompt of each task is made."""
    return {
        "copy": lambda: text.of_kind("recite").prompt,
        "edit": lambda: text.of_kind("rewrite").prompt,
        "story": lambda: opening(text),
    }


def opening(text: TextMaker) -> str:
    """The first few words of a story."""
    return " ".join(text.of_kind("story").text.split(" ")[: text.rng.randint(*OPENING_WORDS)])


def lines(seed: int, tokenizer: Tokenizer) -> Iterator[str]:
    """The file's lines: prompts that fit, no two of them alike."""
    seen: set[str] = set()
    for task, make in makers(TextMaker(seed)).items():
        found: list[str] = []
        while len(found) < MEASURED + HELD_OUT:
            prompt = make()
            if prompt not in seen and len(tokenizer.encode(prompt)) + ROOM <= DEMO_CONTEXT:
                found.append(prompt)
                seen.add(prompt)
        for place, prompt in enumerate(found):
            yield json.dumps({"task": task, "prompt": prompt} | ({"held_out": True} if place >= MEASURED else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=PROMPTS_FILE)
    options = parser.parse_args()
    made = lines(options.seed, load_tokenizer(find_tokenizer(DEMO_DIR)))
    options.out.write_text("".join(f"{line}\n" for line in made), encoding="utf-8")


if __name__ == "__main__":
    main()
