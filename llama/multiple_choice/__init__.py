"""Multiple choice: a model chooses the likeliest of an item's choices. No tensor here.

items.py     items, and the files that hold them
few_shot.py  prompts with demonstrations
answers.py   questions as token ids, one call of LLaMA.score_each for all of them, what was chosen
figures.py   accuracy, precision, recall and F1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llama.multiple_choice.answers import RULES, Answer, Question, Rule, ask, fitting, make_questions
from llama.multiple_choice.few_shot import TEMPLATES, FewShot
from llama.multiple_choice.figures import ClassFigures, Figures, Summary, have_same_choices, summarise
from llama.multiple_choice.items import Item, read_items
from llama.scoring import TooLong

if TYPE_CHECKING:
    from llama.generation import LLaMA

__all__ = [
    "RULES",
    "TEMPLATES",
    "Answer",
    "ClassFigures",
    "Evaluation",
    "FewShot",
    "Figures",
    "Item",
    "Question",
    "Rule",
    "Summary",
    "ask",
    "evaluate",
    "fitting",
    "have_same_choices",
    "make_questions",
    "read_items",
    "summarise",
]


class Evaluation(NamedTuple):
    """All answers in the order of the items, and their figures."""

    answers: tuple[Answer, ...]
    summary: Summary


def evaluate(
    llm: LLaMA,
    items: Sequence[Item],
    few_shot: FewShot | None = None,
    pool: Sequence[Item] | None = None,
    *,
    too_long: TooLong = "refuse",
) -> Evaluation:
    """Let a model choose for every item.

    Args:
        few_shot: None means no demonstrations and the default template.
        pool: what demonstrations are taken from; None means the items themselves, never the one that is asked.
        too_long: see ``ask``.

    Raises:
        PromptError: too few demonstrations, or an item that does not fit and is refused; nothing is run then.
        InterruptedRunError: ``LLaMA.interrupt`` was called.
    """
    asked = make_questions(llm.tokenizer, items, few_shot or FewShot(), items if pool is None else pool)
    found = sorted(ask(llm, asked, too_long=too_long), key=lambda answer: answer.index)
    return Evaluation(tuple(found), summarise(found))
