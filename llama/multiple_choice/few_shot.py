"""Prompts with demonstrations, as MetaICL writes them (Min et al. 2022, arXiv 2110.15943).

Every item gets the same demonstrations in the same order, so that all prompts begin alike.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from llama.errors import ConfigError, PromptError, setting
from llama.multiple_choice.items import Item

FIELDS = ("{context}", "{choice}")
TEMPLATES = {"metaicl": "{context}\n{choice}\n\n\n", "lm-eval": "{context} {choice}\n\n"}


@dataclass(frozen=True)
class FewShot:
    """How items become prompts.

    A template has the fields {context} and {choice}, in this order. A demonstration is the whole template with its
    right choice. An item is the template up to its choice; what stands after {choice} separates demonstrations.

    Attributes:
        shots: demonstrations before each item.
        shots_seed: which ones, and in which order; the first k of a seed are the same for any k.
        template: a name of TEMPLATES, or a text with both fields.

    Raises:
        ConfigError: a value is out of its range.
    """

    shots: int = 0
    shots_seed: int = 0
    template: str = "metaicl"

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ConfigError(f"shots: got {self.shots}, expected 0 or more")
        if self.shots_seed < 0:
            raise ConfigError(f"shots_seed: got {self.shots_seed}, expected 0 or more")
        places = [self._text.find(field) for field in FIELDS]
        if any(self._text.count(field) != 1 for field in FIELDS) or places[0] > places[1]:
            raise ConfigError(
                f"template: got {self.template!r}, expected {' or '.join(TEMPLATES)}, "
                f"or a text with {FIELDS[0]} and, after it, {FIELDS[1]}, each once"
            )

    @property
    def _text(self) -> str:
        return TEMPLATES.get(self.template, self.template)

    @cached_property
    def _parts(self) -> tuple[str, str, str]:
        """What stands before the context, between it and the choice, and after the choice."""
        before, _, rest = self._text.partition(FIELDS[0])
        between, _, after = rest.partition(FIELDS[1])
        return before, between, after

    def question(self, item: Item) -> str:
        """The item up to where its choices differ, without demonstrations."""
        before, between, _ = self._parts
        return f"{before}{item.context}{between}"

    def demonstration(self, item: Item) -> str:
        """An item with its right choice."""
        assert item.gold is not None
        return f"{self.question(item)}{item.choices[item.gold]}{self._parts[2]}"

    def prompts(self, items: Sequence[Item], pool: Iterable[Item]) -> Iterator[str]:
        """The text before the choices of each item.

        The pool is put into an order by the seed, and every item gets the first ones of that order that do not ask the
        same as the item does. So an item may be in the pool; and where none is among the first, all prompts begin with
        the same demonstrations.

        Args:
            pool: what demonstrations are taken from; those without a right choice are left out.

        Raises:
            PromptError: there are too few of them.
        """
        order = _shuffled([item for item in pool if item.gold is not None], self.shots_seed) if self.shots else []
        for index, item in enumerate(items):
            others = (other for other in order if not other.is_like(item))
            taken = list(islice(others, self.shots))
            if len(taken) < self.shots:
                raise PromptError(
                    f"item {index}: got {len(taken)} other items with a right choice to demonstrate, expected "
                    f"{self.shots}; {setting('shots')} {len(taken)} at most, or {setting('shots_file')} with more"
                )
            yield "".join(self.demonstration(other) for other in taken) + self.question(item)


def _shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The items in an order that depends on the seed alone; ``Random.random`` is the same in all versions of Python."""
    chance = random.Random(seed)
    keys = [chance.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]
