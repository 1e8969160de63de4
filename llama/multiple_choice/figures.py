"""How good answers are: accuracy, precision, recall and F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llama.multiple_choice.answers import RULES, Answer, Rule
from llama.multiple_choice.items import Item


class ClassFigures(NamedTuple):
    """How well one class was found.

    Attributes:
        label: the choice's text where all items have the same choices, else its place.
        precision: right ones among the items for which the class was chosen; 0 if it never was.
        recall: right ones among the items of this class; 0 if there are none.
        f1: harmonic mean of both; 0 if both are.
        items: items of this class.
    """

    label: str
    precision: float
    recall: float
    f1: float
    items: int


class Figures(NamedTuple):
    """How good the choices of one rule are, over the items that were scored and have a right choice.

    Attributes:
        accuracy: share of right choices; None if there are no such items.
        macro_f1: mean F1 of the classes that are right for some item, as MetaICL computes it; likewise.
        classes: each class, in the order of the choices.
    """

    accuracy: float | None
    macro_f1: float | None
    classes: tuple[ClassFigures, ...]


@dataclass(frozen=True)
class Summary:
    """All answers of a call, as figures.

    Attributes:
        items: all that were asked.
        scored, skipped, truncated: how many of them; a truncated item was scored, too.
        judged: items that were scored and have a right choice.
        tokens: tokens of all contexts and choices together.
        cached_tokens: how many of them were not run again.
        figures: of each rule.
    """

    items: int
    scored: int
    skipped: int
    truncated: int
    judged: int
    tokens: int
    cached_tokens: int
    figures: Mapping[Rule, Figures]

    def as_json(self) -> dict[str, Any]:
        """The summary as JSON values; the classes are those of the rule ``sum``."""
        counts = {name: value for name, value in vars(self).items() if name != "figures"}
        by_sum, by_character, by_token = (self.figures[rule] for rule in RULES)
        return {
            **counts,
            "accuracy": by_sum.accuracy,
            "acc_norm": by_character.accuracy,
            "acc_token": by_token.accuracy,
            "macro_f1": by_sum.macro_f1,
            "macro_f1_norm": by_character.macro_f1,
            "macro_f1_token": by_token.macro_f1,
            "classes": [each._asdict() for each in by_sum.classes],
        }


def summarise(found: Sequence[Answer], asked: int | None = None) -> Summary:
    """The figures of some answers, in any order.

    Args:
        asked: how many items there were, if not all of them were answered.
    """
    scored = [answer for answer in found if answer.scores]
    scores = [score for answer in scored for score in answer.scores]
    judged = [answer for answer in scored if answer.item.gold is not None]
    return Summary(
        items=len(found) if asked is None else asked,
        scored=len(scored),
        skipped=len(found) - len(scored),
        truncated=sum(answer.is_truncated for answer in scored),
        judged=len(judged),
        tokens=sum(score.context_tokens + len(score.token_ids) for score in scores),
        cached_tokens=sum(score.cached_tokens for score in scores),
        figures={rule: _figures(judged, rule) for rule in RULES},
    )


def _figures(judged: Sequence[Answer], rule: Rule) -> Figures:
    """The figures of answers to items that have a right choice."""
    if not judged:
        return Figures(None, None, ())
    items = [answer.item for answer in judged]
    has_labels = have_same_choices(items)
    labels = list(items[0].choices) if has_labels else [str(i) for i in range(max(len(x.choices) for x in items))]

    def label(item: Item, place: int | None) -> str:
        assert place is not None
        return item.choices[place] if has_labels else labels[place]

    pairs = [(label(answer.item, answer.item.gold), label(answer.item, answer.chosen(rule))) for answer in judged]
    classes = tuple(_class_figures(each, pairs) for each in labels)
    found = [each.f1 for each in classes if each.items]
    return Figures(sum(gold == chosen for gold, chosen in pairs) / len(pairs), sum(found) / len(found), classes)


def have_same_choices(items: Sequence[Item]) -> bool:
    """Whether all items have the same choices, in any order: then a choice is a class."""
    return len({frozenset(item.choices) for item in items}) == 1


def _class_figures(label: str, pairs: Sequence[tuple[str, str]]) -> ClassFigures:
    """The figures of one class, from the right and the chosen class of each item."""
    right = sum(gold == chosen == label for gold, chosen in pairs)
    of_class, chosen_so = sum(gold == label for gold, _ in pairs), sum(chosen == label for _, chosen in pairs)
    precision = right / chosen_so if chosen_so else 0.0
    recall = right / of_class if of_class else 0.0
    f1 = 2 * right / (of_class + chosen_so) if right else 0.0
    return ClassFigures(label, precision, recall, f1, of_class)
