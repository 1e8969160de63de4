"""Questions as token ids, and what a model answers to them: one call of ``LLaMA.score_each`` for all."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llama.errors import PromptError, setting
from llama.multiple_choice.few_shot import FewShot
from llama.multiple_choice.items import Item
from llama.scoring import Score, TooLong, encode_pair, fitted
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama.generation import LLaMA

log = logging.getLogger("llama")

Rule = Literal["sum", "norm", "token"]

RULES: tuple[Rule, ...] = ("sum", "norm", "token")


@dataclass(frozen=True)
class Question:
    """An item as token ids.

    Attributes:
        index: its place in the call.
        pairs: context and continuation for each choice.
    """

    index: int
    item: Item
    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@contextmanager
def _naming(index: int, place: int) -> Iterator[None]:
    """Within: an error that speaks of pair 0 or prompt 0 speaks of this choice of this item."""
    try:
        yield
    except PromptError as error:
        message = error.shown(setting).removeprefix("pair 0").removeprefix("prompt 0")
        raise PromptError(f"item {index}, choice {place}{message}") from error


def make_questions(
    tokenizer: Tokenizer, items: Sequence[Item], few_shot: FewShot, pool: Iterable[Item] = ()
) -> list[Question]:
    """Items as token ids, with their demonstrations.

    Args:
        pool: see ``FewShot.prompts``.

    Raises:
        PromptError: too few demonstrations, or a choice that adds no token.
    """
    found = []
    for index, (item, prompt) in enumerate(zip(items, few_shot.prompts(items, pool), strict=True)):
        pairs = []
        for place, choice in enumerate(item.choices):
            with _naming(index, place):
                pairs.append(encode_pair(tokenizer, 0, prompt, choice, tokenizer.n_words))
        found.append(Question(index, item, tuple(pairs)))
    return found


def fitting(asked: Sequence[Question], longest: int, too_long: TooLong) -> list[Question]:
    """The questions that are scored: those of which all choices fit, or may be cut.

    Args:
        longest: see ``LLaMA.longest_scored``.

    Raises:
        PromptError: a choice does not fit and is refused. It is the longest one: what would make it fit is enough for
            all.
    """
    pairs = [(question, place) for question in asked for place in range(len(question.pairs))]
    pairs.sort(key=lambda pair: sum(map(len, pair[0].pairs[pair[1]])), reverse=True)
    skipped = set()
    for question, place in pairs:
        with _naming(question.index, place):
            if fitted(0, *question.pairs[place], longest, too_long) is None:
                skipped.add(question.index)
    return [question for question in asked if question.index not in skipped]


@dataclass(frozen=True)
class Answer:
    """What a model chose.

    Attributes:
        index: the item's place in the call.
        scores: of its choices; none if the item was skipped.
    """

    index: int
    item: Item
    scores: tuple[Score, ...] = ()

    def chosen(self, rule: Rule = "sum") -> int | None:
        """The place of the likeliest choice, of equal ones the first; None if the item was skipped.

        Args:
            rule: ``sum`` compares log-probabilities, ``norm`` divides them by the characters of the choice, ``token``
                by the tokens that were scored.
        """
        lengths = {
            "sum": [1 for _ in self.scores],
            "norm": [len(choice) for choice in self.item.choices],
            "token": [len(score.token_ids) for score in self.scores],
        }[rule]
        rates = [score.logprob / length for score, length in zip(self.scores, lengths, strict=False)]
        return rates.index(max(rates)) if rates else None

    @property
    def is_truncated(self) -> bool:
        """The context of some choice was cut."""
        return any(score.truncated_tokens for score in self.scores)

    def as_json(self) -> dict[str, Any]:
        """The answer as JSON values; lists have an entry for each choice, none if the item was skipped."""
        return {
            "index": self.index,
            "chosen": self.chosen(),
            "chosen_norm": self.chosen("norm"),
            "chosen_token": self.chosen("token"),
            "gold": self.item.gold,
            "skipped": not self.scores,
            "logprobs": [score.logprob for score in self.scores],
            "is_greedy": [score.is_greedy for score in self.scores],
            "tokens": [len(score.token_ids) for score in self.scores],
            "context_tokens": [score.context_tokens for score in self.scores],
            "cached_tokens": [score.cached_tokens for score in self.scores],
            "truncated_tokens": [score.truncated_tokens for score in self.scores],
        }


def ask(llm: LLaMA, asked: Sequence[Question], *, too_long: TooLong = "refuse") -> Iterator[Answer]:
    """Ask all questions in one call of ``LLaMA.score_each``, and yield each answer when it is known, in any order.

    Args:
        too_long: what becomes of an item of which a choice does not fit: see ``LLaMA.score``. ``skip`` skips the item.

    Raises:
        PromptError: a question does not fit and is refused; nothing is run then.
        InterruptedRunError: ``LLaMA.interrupt`` was called; answers that were known have been yielded.
    """
    taken = fitting(asked, llm.longest_scored, too_long)
    if len(taken) < len(asked):
        log.warning("Skipped %d of %d items: they are too long", len(asked) - len(taken), len(asked))
    kept = {question.index for question in taken}
    yield from (Answer(question.index, question.item) for question in asked if question.index not in kept)
    owners = [(question, place) for question in taken for place in range(len(question.pairs))]
    pairs = [question.pairs[place] for question, place in owners]
    found: dict[int, dict[int, Score]] = {question.index: {} for question in taken}
    contexts, continuations = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for score in llm.score_each(contexts, continuations, too_long=too_long):
        question, place = owners[score.index]
        scores = found[question.index]
        scores[place] = score
        if len(scores) == len(question.pairs):
            del found[question.index]
            yield Answer(question.index, question.item, tuple(scores[i] for i in sorted(scores)))
