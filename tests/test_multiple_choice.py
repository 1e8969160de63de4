"""Items from files, prompts with demonstrations, answers and figures, without a model.

Prompts and F1 are compared with MetaICL's rules, which are written down here once more, and F1 with scikit-learn's.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from llama import LLaMA
from llama.errors import ConfigError, InterruptedRunError, PromptError
from llama.multiple_choice import (
    RULES,
    Answer,
    FewShot,
    Item,
    ask,
    evaluate,
    make_questions,
    read_items,
    summarise,
)
from llama.scoring import Score
from llama.tokenizer import Tokenizer

GOOD = {"context": "Is it", "choices": ["yes", "no"], "gold": 1}


def line(**changes: Any) -> bytes:
    """A line of a file; a change to ... leaves the key out."""
    return json.dumps({k: v for k, v in {**GOOD, **changes}.items() if v is not ...}).encode()


def numbered(count: int, gold: int | None = 0) -> list[Item]:
    return [Item(f"question {n}", (f"a{n}", f"b{n}"), gold) for n in range(count)]


# --- files


def read(tmp_path: Path, content: bytes) -> list[Item]:
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    return read_items(path)


@pytest.mark.parametrize("gold", [1, "no"])
def test_gold_is_a_place_or_a_text(tmp_path: Path, gold: Any) -> None:
    assert read(tmp_path, line(gold=gold)) == [Item("Is it", ("yes", "no"), 1)]


@pytest.mark.parametrize("gold", [None, ...])
def test_gold_may_be_unknown(tmp_path: Path, gold: Any) -> None:
    assert read(tmp_path, line(gold=gold)) == [Item("Is it", ("yes", "no"), None)]


def test_lines_are_read_as_editors_write_them(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, blank lines, a missing last line end and other keys are no part of an item.
    Characters that Python takes for line ends are part of a text, and so are spaces.
    """
    text = "caf\u00e9\u2028\u6f22 \x85 "
    content = (
        b"\xef\xbb\xbf"
        + line(id=7)
        + b"\r\n\r\n  \n"
        + json.dumps({**GOOD, "context": text}, ensure_ascii=False).encode()
    )
    assert [item.context for item in read(tmp_path, content)] == ["Is it", text]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no items", '"choices"']),
        (b" \n\r\n\xef", ["line 3", "not UTF-8", "byte 0"]),
        (line() + b"\n\n" + b"caf\xe9", ["line 3", "not UTF-8", "byte 3", "iconv"]),
        (line() + b"\n{", ["line 2", "not JSON", '"choices"']),
        (b"[" * 100_000, ["line 1", "not JSON"]),
        (b"[1]", ["line 1", "a JSON list"]),
        (b"3", ["line 1", "a JSON int"]),
        (b"{}", ["line 1", "the keys none", "not context"]),
        (line(choices=...), ["line 1", "the keys context, gold", "not choices"]),
        (line(context=3), ["line 1: context", "got 3", "a text"]),
        (line(context="half \ud83d"), ["line 1: context", "character 5", "surrogate"]),
        (line(choices="yes"), ['choices: got "yes"', "two texts or more"]),
        (line(choices=["yes"]), ['choices: got ["yes"]', "two texts or more"]),
        (line(choices=["yes", 1]), ["choice 1", "got 1", "a text"]),
        (line(choices=["yes", ""]), ["choice 1 is empty"]),
        (line(choices=[" \n", "no"]), ["choice 0 is empty"]),
        (line(choices=["yes", "no", "yes"]), ['choices 0 and 2 are both "yes"', "different"]),
        (line(gold=2), ["gold: got 2", "0 to 1"]),
        (line(gold=-1), ["gold: got -1", "0 to 1"]),
        (line(gold=1.0), ["gold: got 1.0", "0 to 1"]),
        (line(gold=True), ["gold: got true", "0 to 1"]),
        (line(gold="perhaps"), ['gold: got "perhaps"', "a choice's text"]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes, words: list[str]) -> None:
    """The message names the file, the line as an editor counts it, what was got and what was expected."""
    with pytest.raises(PromptError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert [word for word in [str(tmp_path / "items.jsonl"), *words] if word not in message] == [], message
    assert len(message) < len(str(tmp_path)) + 300


@pytest.mark.parametrize(("name", "reason"), [("absent.jsonl", "No such file"), (".", "directory")])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        read_items(tmp_path / name)


# --- prompts


def metaicl_text(demonstrations: Sequence[Item], item: Item) -> str:
    """What MetaICL puts before an option, for non-empty inputs: `MetaICLData._prepro_each_datapoint` with the method
    "direct" and add_newlines, and `tensorize`, which strings the parts together. The option's own line break is here,
    too.
    """
    text = ""
    for place, each in enumerate([*demonstrations, item]):
        text += ("" if place == 0 else "\n\n\n") + each.context
        text += "\n" + (each.choices[each.gold or 0] if each is not item else "")
    return text


@pytest.mark.parametrize("shots", [0, 1, 4])
def test_the_default_template_is_metaicl_s(shots: int) -> None:
    pool, items = numbered(9, gold=1), [Item("asked", ("x", "y"))]
    (prompt,) = FewShot(shots, 3).prompts(items, pool)
    drawn = sorted(pool, key=lambda each: prompt.find(each.context + "\n"))
    assert prompt == metaicl_text([each for each in drawn if each.context + "\n" in prompt], items[0])
    assert prompt.count("\n\n\n") == shots


def test_a_template_of_one_s_own() -> None:
    """Braces that are no field are text, and what stands after the choice separates demonstrations only."""
    few_shot = FewShot(1, template="{Q}: {context} {A}: {choice};\n")
    (prompt,) = few_shot.prompts([Item("asked {choice}", ("x", "y"))], numbered(1))
    assert prompt == "{Q}: question 0 {A}: a0;\n{Q}: asked {choice} {A}: "


def test_all_items_get_the_same_demonstrations() -> None:
    """Those of fewer shots are the first of those of more, and another seed draws others."""
    pool, items = numbered(30), [Item(f"asked {n}", ("x", "y")) for n in range(5)]
    begun = {shots: {p.partition("asked")[0] for p in FewShot(shots, 7).prompts(items, pool)} for shots in (0, 2, 16)}
    assert [len(found) for found in begun.values()] == [1, 1, 1]
    (two,), (sixteen,) = begun[2], begun[16]
    assert sixteen.startswith(two)
    assert next(FewShot(16, 8).prompts(items, pool)).partition("asked")[0] != sixteen
    assert len(set(sixteen.split("\n\n\n"))) == 17  # sixteen different ones, and nothing after them


def test_an_item_is_no_demonstration_of_itself() -> None:
    """It may be in the pool, also with its choices in another order; then the next one takes its place, and the others
    stay where they are.
    """
    pool = numbered(6)
    for item in pool:
        turned = Item(item.context, item.choices[::-1], 1)
        for asked in (item, turned):
            (prompt,) = FewShot(5, 1).prompts([asked], pool)
            assert prompt.count(item.context) == 1
            assert all(other.context in prompt for other in pool)
    drawn = [prompt.split("\n\n\n")[:2] for prompt in FewShot(2, 1).prompts(pool, pool)]
    common = max(drawn, key=drawn.count)
    assert drawn.count(common) == 4  # of six items two are drawn
    assert all(len(set(each) & set(common)) == 1 for each in drawn if each != common)


def test_items_that_share_a_context_but_not_the_choices_may_demonstrate_each_other() -> None:
    """An empty context is the usual one where the choices are whole sentences."""
    pool = [Item("", ("good", "bad"), 0), Item("", ("right", "wrong"), 0)]
    assert list(FewShot(1).prompts(pool, pool)) == ["\nright\n\n\n\n", "\ngood\n\n\n\n"]


def test_demonstrations_have_a_right_choice() -> None:
    pool = [*numbered(3, gold=None), Item("known", ("x", "y"), 1)]
    (prompt,) = FewShot(1).prompts([Item("asked", ("x", "y"))], pool)
    assert prompt == "known\ny\n\n\nasked\n"


@pytest.mark.parametrize("pool", [numbered(4), [*numbered(4), *numbered(4, gold=None)], numbered(4) * 3])
def test_too_few_demonstrations_are_refused(pool: list[Item]) -> None:
    """Copies of an item are copies of itself, but may be drawn for others."""
    with pytest.raises(PromptError, match=r"item 0: got (3|9) other items .* expected 10; shots (3|9) at most, or"):
        list(FewShot(10).prompts(pool[:1], pool))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shots": -1}, ["shots: got -1", "0 or more"]),
        ({"shots_seed": -1}, ["shots_seed: got -1", "0 or more"]),
        ({"template": "{context} {option}"}, ["template: got '{context} {option}'", "metaicl or lm-eval", "{choice}"]),
        ({"template": "{choice} {context}"}, ["after it"]),
        ({"template": "{context} {choice} {choice}"}, ["each once"]),
        ({"template": "MetaICL"}, ["got 'MetaICL'", "metaicl"]),
        ({"template": ""}, ["got ''"]),
    ],
    ids=repr,
)
def test_settings_are_checked(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        FewShot(**given)
    assert [word for word in words if word not in str(caught.value)] == []


# --- answers


class Letters:
    """A tokenizer of characters, after BOS; the character x is none."""

    n_words, bos_id = 1_114_112, 1

    def encode(self, text: str) -> list[int]:
        return [self.bos_id, *(ord(c) for c in text if c != "x")]


class Scorer:
    """In place of a LLaMA: a character's log-probability is a given number, and answers come backwards.

    Attributes:
        calls: texts of the contexts and continuations of each call.
    """

    def __init__(self, longest: int = 1000, interrupt_after: int | None = None, **logprobs: float) -> None:
        self.tokenizer, self.longest_scored = Letters(), longest
        self.calls: list[tuple[list[str], list[str], str]] = []
        self._logprobs, self._interrupt_after = logprobs, interrupt_after

    def score_each(self, contexts: Any, continuations: Any, *, too_long: str) -> Iterator[Score]:
        texts = ["".join(map(chr, ids)) for ids in continuations]
        self.calls.append((["".join(map(chr, ids[1:])) for ids in contexts], texts, too_long))
        for count, index in enumerate(reversed(range(len(texts)))):
            if count == self._interrupt_after:
                raise InterruptedRunError("interrupted")
            logprobs = tuple(self._logprobs.get(c, -1.0) for c in texts[index])
            length, cut = len(contexts[index]), max(len(contexts[index]) + len(texts[index]) - self.longest_scored, 0)
            yield Score(
                index, sum(logprobs), False, tuple(continuations[index]), logprobs, length - cut, length // 2, cut
            )


def scorer(*args: Any, **kwargs: Any) -> LLaMA:
    return cast("LLaMA", Scorer(*args, **kwargs))


def test_one_call_asks_everything() -> None:
    """All choices of all items, each behind its own prompt; a line break at the prompt's end counts to the choice."""
    items = [Item("one", ("a", "bb"), 1), Item("two", ("c", "d", "e"), 0)]
    llm = Scorer()
    found = evaluate(cast("LLaMA", llm), items)
    assert llm.calls == [(["one", "one", "two", "two", "two"], ["\na", "\nbb", "\nc", "\nd", "\ne"], "refuse")]
    assert [answer.index for answer in found.answers] == [0, 1]
    assert [[score.logprob for score in answer.scores] for answer in found.answers] == [[-2, -3], [-2, -2, -2]]


def test_the_rules_differ() -> None:
    """The sum prefers short choices. A division by characters does not count what the template adds, one by tokens
    does; of equal choices the first one counts.
    """
    (answer,) = evaluate(scorer(q=-0.5, **{"\n": -3.0}), [Item("", ("a", "qqq", "qqqqqq", "b"))]).answers
    assert [score.logprob for score in answer.scores] == [-4, -4.5, -6, -4]
    assert answer.chosen() == 0
    assert answer.chosen("norm") == 2  # -4, -1.5, -1, -4
    assert answer.chosen("token") == 2  # -2, -1.125, -6 / 7, -2
    (answer,) = evaluate(scorer(q=-0.5, r=-0.9, **{"\n": -3.0}), [Item("", ("q", "rr"))]).answers
    assert (answer.chosen(), answer.chosen("norm"), answer.chosen("token")) == (0, 1, 1)


def test_an_answer_as_json() -> None:
    (answer,) = evaluate(scorer(), [Item("abc", ("de", "f"), 0)]).answers
    assert answer.as_json() == {
        "index": 0,
        "chosen": 1,
        "chosen_norm": 0,
        "chosen_token": 0,
        "gold": 0,
        "skipped": False,
        "logprobs": [-3.0, -2.0],
        "is_greedy": [False, False],
        "tokens": [3, 2],
        "context_tokens": [4, 4],
        "cached_tokens": [2, 2],
        "truncated_tokens": [0, 0],
    }


LONG = [Item("short", ("a", "b"), 0), Item("long" * 5, ("a", "b" * 9), 0), Item("short", ("c", "d"), 1)]


def test_what_is_too_long_is_refused_before_anything_runs() -> None:
    llm = Scorer(longest=25)
    with pytest.raises(PromptError, match=r"^item 1, choice 1 does not fit: 21 context tokens .*max_seq_len 30, or"):
        evaluate(cast("LLaMA", llm), LONG)
    assert llm.calls == []


def test_the_refusal_is_of_the_longest_choice() -> None:
    """So that its cure is enough for all items."""
    items = [Item("long" * 5, ("a" * 9, "b"), 0), Item("long" * 9, ("a", "b" * 2), 0)]
    with pytest.raises(PromptError, match=r"^item 1, choice 1 does not fit: .*max_seq_len 39, or"):
        evaluate(scorer(longest=25), items)
    assert len(evaluate(scorer(longest=40), items).answers) == 2


def test_an_item_is_skipped_with_all_its_choices(caplog: pytest.LogCaptureFixture) -> None:
    """One choice that does not fit is enough: the others cannot be compared with it."""
    found = evaluate(scorer(longest=25), LONG, too_long="skip")
    assert [answer.chosen() for answer in found.answers] == [0, None, 0]
    assert (
        found.answers[1].as_json() | {"index": 1, "gold": 0, "skipped": True, "logprobs": []}
        == found.answers[1].as_json()
    )
    summary = found.summary
    assert (summary.items, summary.scored, summary.skipped, summary.judged) == (3, 2, 1, 2)
    assert summary.figures["sum"].accuracy == 0.5
    assert "Skipped 1 of 3 items" in caplog.text


def test_everything_may_be_skipped() -> None:
    """Then there is nothing to tell, but no error either."""
    llm = Scorer(longest=3)
    found = evaluate(cast("LLaMA", llm), LONG, too_long="skip")
    assert (found.summary.scored, found.summary.skipped) == (0, 3)
    assert found.summary.as_json()["accuracy"] is None
    assert llm.calls == [([], [], "skip")]


def test_a_context_is_cut() -> None:
    """Which is the engine's business; the summary counts it."""
    found = evaluate(scorer(longest=25), LONG, too_long="truncate")
    assert [answer.is_truncated for answer in found.answers] == [False, True, False]
    assert (found.summary.scored, found.summary.truncated) == (3, 1)


def test_a_choice_that_leaves_no_room_is_refused_whatever_is_wanted() -> None:
    with pytest.raises(PromptError, match=r"^item 1, choice 1: the continuation alone has 10 tokens"):
        evaluate(scorer(longest=10), LONG, too_long="truncate")


def test_a_choice_that_adds_no_token_is_named() -> None:
    few_shot = FewShot(template="{context}{choice}")
    with pytest.raises(PromptError, match=r"^item 1, choice 1: the continuation 'x' adds no token"):
        make_questions(cast("Tokenizer", Letters()), [*numbered(1), Item("q", ("a", "x"))], few_shot)


def test_what_was_known_at_an_interrupt_is_yielded() -> None:
    questions = make_questions(cast("Tokenizer", Letters()), numbered(3), FewShot())
    asked = ask(scorer(interrupt_after=5), questions)
    assert [next(asked).index, next(asked).index] == [2, 1]
    with pytest.raises(InterruptedRunError):
        next(asked)


# --- figures


def answer_of(item: Item, chosen: int) -> Answer:
    """An answer that chooses so by every rule."""
    score = Score(0, -1.0, True, (1,), (-1.0,), 3, 1, 0)
    worse = Score(0, -1000.0, False, (1,), (-1000.0,), 3, 1, 0)
    return Answer(0, item, tuple(score if place == chosen else worse for place in range(len(item.choices))))


def metaicl_f1(predictions: Sequence[str], groundtruths: Sequence[str]) -> float:
    """Macro F1 as `MetaICLData.evaluate` defines it: over the classes that are right for some item; a class that was
    never predicted has precision 1.
    """
    precisions, recalls = defaultdict(list), defaultdict(list)
    for prediction, groundtruth in zip(predictions, groundtruths, strict=True):
        recalls[groundtruth].append(prediction == groundtruth)
        precisions[prediction].append(prediction == groundtruth)
    found = []
    for label, hits in recalls.items():
        precision = sum(precisions[label]) / len(precisions[label]) if label in precisions else 1.0
        recall = sum(hits) / len(hits)
        found.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(found) / len(found)


def random_answers(seed: int, turned: bool = False) -> tuple[list[Answer], list[str], list[str]]:
    """Answers to items of the same choices, some of them never right or never chosen, with both as labels."""
    chance = random.Random(seed)
    labels = [f"class {n}" for n in range(chance.randint(2, 6))]
    right, chosen = (chance.choices(labels, [chance.random() ** 3 + 1e-3 for _ in labels], k=25) for _ in range(2))
    found = []
    for gold, choice in zip(right, chosen, strict=True):
        choices = tuple(chance.sample(labels, len(labels)) if turned else labels)
        found.append(answer_of(Item("", choices, choices.index(gold)), choices.index(choice)))
    return found, right, chosen


@pytest.mark.parametrize("seed", range(30))
def test_figures_are_metaicl_s(seed: int) -> None:
    """Also where each item has the classes in another order."""
    found, right, chosen = random_answers(seed, turned=bool(seed % 2))
    for figures in summarise(found).figures.values():
        assert figures.accuracy == pytest.approx(sum(a == b for a, b in zip(right, chosen, strict=True)) / 25)
        assert figures.macro_f1 == pytest.approx(metaicl_f1(chosen, right))
        assert sorted(each.label for each in figures.classes) == sorted(found[0].item.choices)


@pytest.mark.parametrize("seed", range(10))
def test_figures_are_scikit_learn_s(seed: int) -> None:
    """Per class, with 0 for 0 / 0; the mean is over the classes that are right for some item."""
    metrics = pytest.importorskip("sklearn.metrics")
    found, right, chosen = random_answers(seed)
    figures = summarise(found).figures["sum"]
    labels = [each.label for each in figures.classes]
    expected = metrics.precision_recall_fscore_support(right, chosen, labels=labels, zero_division=0)
    for column, name in enumerate(("precision", "recall", "f1", "items")):
        assert [getattr(each, name) for each in figures.classes] == pytest.approx(list(expected[column])), name
    present = [label for label in labels if label in right]
    assert figures.macro_f1 == pytest.approx(
        metrics.f1_score(right, chosen, labels=present, average="macro", zero_division=0)
    )


def test_figures_by_hand() -> None:
    """Three items of class a, one of b; a, a, b, a are chosen; c is neither."""
    choices = ("a", "b", "c")
    found = [answer_of(Item("", choices, gold), chosen) for gold, chosen in ((0, 0), (0, 0), (0, 1), (1, 0))]
    figures = summarise(found).figures["sum"]
    assert [tuple(each) for each in figures.classes] == [
        ("a", 2 / 3, 2 / 3, 2 / 3, 3),
        ("b", 0.0, 0.0, 0.0, 1),
        ("c", 0.0, 0.0, 0.0, 0),
    ]
    assert (figures.accuracy, figures.macro_f1) == (0.5, 1 / 3)


def test_without_common_choices_the_classes_are_places() -> None:
    """Of items with different numbers of choices the largest one counts."""
    items = [Item("", ("a", "b"), 0), Item("", ("c", "d", "e"), 2), Item("", ("f", "g"), 1)]
    figures = summarise([answer_of(item, chosen) for item, chosen in zip(items, (0, 2, 0), strict=True)]).figures["sum"]
    assert [(each.label, each.items) for each in figures.classes] == [("0", 1), ("1", 1), ("2", 1)]
    assert figures.accuracy == pytest.approx(2 / 3)
    assert figures.macro_f1 == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_items_without_a_right_choice_are_not_judged() -> None:
    """Nor do their choices decide what a class is."""
    known, unknown = Item("", ("a", "b"), 1), Item("", ("c", "d", "e"))
    summary = summarise([answer_of(known, 1), answer_of(unknown, 2)], asked=5)
    assert (summary.items, summary.scored, summary.skipped, summary.judged) == (5, 2, 0, 1)
    assert [each.label for each in summary.figures["norm"].classes] == ["a", "b"]
    assert summary.as_json()["accuracy"] == 1.0
    nothing = summarise([answer_of(unknown, 2)]).as_json()
    assert (nothing["accuracy"], nothing["macro_f1"], nothing["classes"]) == (None, None, [])
    assert json.loads(json.dumps(nothing)) == nothing


def test_the_summary_adds_up_tokens() -> None:
    found = evaluate(scorer(), [Item("abc", ("de", "f"), 0)]).summary.as_json()
    assert (found["tokens"], found["cached_tokens"]) == (4 + 3 + 4 + 2, 2 + 2)
    assert list(RULES) == ["sum", "norm", "token"]
