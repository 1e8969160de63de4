"""Make the examples of `llama-xla score` in docs/examples/, from one seed.

    .venv/bin/python scripts/make_score_examples.py

    stories.jsonl   which of four sentences goes on with a story; the wrong ones are from other stories
    pronouns.jsonl  which of four pronouns goes on with a sentence: the same choices for all items

Beside each there are as many items of another seed, NAME_train.jsonl, for demonstrations. They are short: 16 of them
and an item fit into the demo model's 512 positions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_stories import PLOTS
from demo_text import TextMaker

from llama.config import DEMO_DIR
from llama.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
SEED = 20_261_126  # no seed of the demo model's training
ITEMS = 40
CHOICES = 4
LONGEST_ITEM, LONGEST_CHOICE = 23, 18  # tokens

PRONOUNS = ("She", "He", "They", "It")
OPENINGS = (
    "There once was {a_kind} named {A}.",
    "{A} was {a_kind} who lived near {home}.",
    "This is a story about {A}, {a_kind} who lived near {home}.",
)
BEFORE = {  # a pronoun: the sentences that it goes on with
    "She": OPENINGS,
    "He": OPENINGS,
    "They": ("One {day}, {A} and {B} played {place}.", "{A} and {B} ran and hid {spot}.", "{A} and {B} were friends."),
    "It": ("{A} had {a_obj}. {he} took it everywhere.", "{A} looked around and saw {a_pet}.", "It was {a_pet}!"),
}


def step(text: TextMaker) -> tuple[str, str, str]:
    """Two sentences of a story that follow one another, both with its hero's name, and the name."""
    while True:
        world, plot = text.world(), text.rng.choice(PLOTS)
        place = text.rng.randrange(1, len(plot.beats))
        first, second = text.say(plot.beats[place - 1], world), text.say(plot.beats[place], world)
        if world["A"] in first and world["A"] in second:
            return first, second, world["A"]


def story(text: TextMaker, tokenizer: Tokenizer, _: int) -> dict[str, Any]:
    """A sentence of a story, the next one, and sentences of other stories."""
    while True:
        context, right, hero = step(text)
        if len(tokenizer.encode(f"{context} {right}")) > LONGEST_ITEM:
            continue
        choices = [right]
        while len(choices) < CHOICES:
            _, wrong, _ = step(text)
            if hero not in wrong and wrong not in choices and len(tokenizer.encode(wrong)) <= LONGEST_CHOICE:
                choices.append(wrong)
        text.rng.shuffle(choices)
        return {"context": context, "choices": choices, "gold": choices.index(right)}


def pronoun(text: TextMaker, tokenizer: Tokenizer, place: int) -> dict[str, Any]:
    """A sentence, and the pronoun that may follow; each pronoun in its turn."""
    right = PRONOUNS[place % len(PRONOUNS)]
    while True:
        world = text.world()
        if right in ("She", "He") and world["he"] != right.lower():
            continue
        context = text.say(BEFORE[right], world)
        if len(tokenizer.encode(context)) <= LONGEST_ITEM:
            return {"context": context, "choices": PRONOUNS, "gold": right}


Maker = Callable[[TextMaker, Tokenizer, int], dict[str, Any]]


def write(path: Path, make: Maker, seed: int, tokenizer: Tokenizer) -> None:
    """Write different items, one a line, in random order."""
    text = TextMaker(seed)
    lines: dict[str, str] = {}
    while len(lines) < ITEMS:
        item = make(text, tokenizer, len(lines))
        lines.setdefault(item["context"], json.dumps(item))
    shuffled = text.rng.sample(list(lines.values()), ITEMS)
    path.write_text("".join(f"{line}\n" for line in shuffled), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=EXAMPLES)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(find_tokenizer(DEMO_DIR))
    for name, make in (("stories", story), ("pronouns", pronoun)):
        write(options.out / f"{name}.jsonl", make, options.seed, tokenizer)
        write(options.out / f"{name}_train.jsonl", make, options.seed + 1, tokenizer)


if __name__ == "__main__":
    main()
