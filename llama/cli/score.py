"""The command `llama-xla score`: the likeliest choice of each item of a file, and how often it is the right one."""

from __future__ import annotations

import logging
import re
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.cli.flags import one_of
from llama.cli.loading import config_of, loaded, readable_tokenizer, takes_loading
from llama.cli.output import interruptible, json_line, log_to_stderr, write
from llama.cli.terminal import visible
from llama.errors import FlagError, InterruptedRunError

if TYPE_CHECKING:
    from llama.multiple_choice import Answer, Summary
    from llama.scoring import TooLong

log = logging.getLogger("llama")

HEADER = "  item   sum  norm  token  gold  context > choice\n"
SIZES = (3, 6, 7, 6)  # of the header's columns
DEFAULT_WIDTH, MIN_ROOM = 120, 40
ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
RULE_NAMES = {"sum": "log-probability", "norm": "per character", "token": "per token"}


@takes_loading()
def score(
    file: str,
    *,
    loading: dict[str, Any],
    shots: int = 0,
    shots_file: str | None = None,
    shots_seed: int = 0,
    template: str = "metaicl",
    limit: int | None = None,
    too_long: str = "refuse",
    json: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    r"""Choose the likeliest choice of each item of a file, and say how many are right.

    llama-xla score docs/examples/stories.jsonl
    llama-xla score docs/examples/stories.jsonl --shots 4 --shots_file docs/examples/stories_train.jsonl --json

    Every line of the file is {"context": "...", "choices": ["...", "..."], "gold": 0}; gold is the right choice, as its
    place or its text, and may be left out.

    Items:
        file: The items; the name of the flag may be left out.
        limit: Ask the first so many items only.
        too_long: An item that does not fit: refuse ends the command, truncate cuts its context from the left, skip
            leaves it out.

    Demonstrations:
        shots: Items with their right choice, put before each item; the same for all.
        shots_file: The file that they are taken from. Default: the items' own file, never the item that is asked.
        shots_seed: Which ones are taken, and in which order.
        template: How a context and a choice become text: metaicl, lm-eval, or a text such as
            "Q: {context}\nA: {choice}\n\n", in which \n is a line break. What follows {choice} separates
            demonstrations.

    {loading}

    Output:
        json: Print one JSON object per item and line, and a last one of the figures.
        quiet: Log nothing to stderr.
        verbose: Log the memory plan, too, and every program that is compiled.
    """
    log_to_stderr(quiet, verbose)
    if limit is not None and limit < 1:
        raise FlagError(f"--limit: got {limit}, expected at least 1")
    if shots_file is not None and not shots:
        raise FlagError("--shots_file: got it without --shots, expected both or none")
    config = config_of(loading)
    from llama.multiple_choice import FewShot, ask, fitting, make_questions, read_items
    from llama.scoring import TOO_LONG

    policy: TooLong = one_of("too_long", too_long, TOO_LONG)
    few_shot = FewShot(shots, shots_seed, _unescaped(template))
    items = read_items(Path(file))
    pool = items if shots_file is None else read_items(Path(shots_file))
    items = items[:limit]
    tokenizer = readable_tokenizer(loading["ckpt_dir"], loading["tokenizer_path"])
    questions = [] if tokenizer is None else make_questions(tokenizer, items, few_shot, pool)
    fitting(questions, config.max_seq_len + 1, policy)  # before the weights, whose loading can take minutes
    llm = loaded(loading, config, tokenizer, quiet)  # a model without a tokenizer is refused here
    log.info("Scoring %d choices of %d items", sum(len(item.choices) for item in items), len(items))
    printer = _Printer(json, len(items))
    began = time.perf_counter()
    with closing(llm), interruptible(llm):
        try:
            for answer in ask(llm, questions, too_long=policy):
                printer.take(answer)
        except InterruptedRunError:
            if not printer.answers:
                raise
            printer.finish()
            raise InterruptedRunError("interrupted; what was known is printed") from None
        printer.finish()
    log.info("Done in %.2f seconds", time.perf_counter() - began)


def _unescaped(template: str) -> str:
    r"""A template as it was meant: a shell's arguments have no line breaks, so \n stands for one."""
    return re.sub(r"\\[nt\\]", lambda found: ESCAPES[found[0]], template)


class _Printer:
    """Writes answers to stdout in the order of the items, and the figures after them.

    Args:
        items: how many were asked.
    """

    def __init__(self, as_json: bool, items: int) -> None:
        self.answers: list[Answer] = []
        self._as_json, self._items = as_json, items
        self._held: dict[int, Answer] = {}
        self._next = 0
        self._has_header = False
        self._width = shutil.get_terminal_size((DEFAULT_WIDTH, 0)).columns

    def take(self, answer: Answer) -> None:
        """Print an answer when all before it are printed."""
        self.answers.append(answer)
        self._held[answer.index] = answer
        while self._next in self._held:
            self._print(self._held.pop(self._next))
            self._next += 1

    def finish(self) -> None:
        """Print what waits for answers that do not come, and the figures."""
        from llama.multiple_choice import have_same_choices, summarise

        for index in sorted(self._held):
            self._print(self._held[index])
        found = summarise(self.answers, self._items)
        if self._as_json:
            write(json_line({"summary": found.as_json()}))
        else:
            judged = [answer.item for answer in self.answers if answer.scores and answer.item.gold is not None]
            write("\n" + _table(found, "class" if have_same_choices(judged) else "place"))

    def _print(self, answer: Answer) -> None:
        if self._as_json:
            write(json_line(answer.as_json()))
            return
        if not self._has_header:
            write(HEADER)
            self._has_header = True
        write(_row(answer, self._width) + "\n")


def _row(answer: Answer, width: int) -> str:
    """One line of the table of items: places of choices, and the texts as far as there is room."""
    item, chosen = answer.item, answer.chosen()
    if chosen is None:
        return f"{answer.index:6}    skipped: too long"
    mark = " " if item.gold is None else "+" if chosen == item.gold else "-"
    places = [chosen, answer.chosen("norm"), answer.chosen("token"), "" if item.gold is None else item.gold]
    start = f"{answer.index:6} {mark} " + "".join(f"{place:{size}}" for place, size in zip(places, SIZES, strict=True))
    room = max(width - len(start) - 2, MIN_ROOM)
    choice = _clipped(_one_line(item.choices[chosen]), room // 2)
    context = _clipped(_one_line(item.context)[::-1], room - len(choice) - 3)[::-1]  # its end is next to the choice
    return f"{start}  {context} > {choice}"


def _one_line(text: str) -> str:
    """A text without line breaks, its control characters written out: a table is read at a terminal in the end."""
    shown = visible(" ".join(text.split()))
    return " ".join("".join(c if c.isprintable() else " " for c in shown).split())


def _clipped(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 3] + "..."


def _table(found: Summary, class_name: str) -> str:
    """The figures of all items, for a reader."""
    counts = f"{found.scored} of {found.items} items scored, {found.skipped} skipped, {found.truncated} truncated"
    tokens = f"{found.tokens} tokens, {found.cached_tokens} of them from the cache"
    lines = [f"{counts}, {found.judged} with a right choice; {tokens}"]
    if found.judged:
        lines += ["", f"{'likeliest by':16}{'accuracy':>10}{'macro F1':>10}"]
        for rule, figures in found.figures.items():
            lines.append(f"{RULE_NAMES[rule]:16}{figures.accuracy:10.3f}{figures.macro_f1:10.3f}")
        classes = found.figures["sum"].classes
        labels = [_clipped(_one_line(each.label), MIN_ROOM) for each in classes]
        size = max(map(len, [class_name, *labels]))
        lines += ["", f"{class_name:{size}}{'precision':>10}{'recall':>10}{'F1':>10}{'items':>10}"]
        lines += [
            f"{label:{size}}{each.precision:10.3f}{each.recall:10.3f}{each.f1:10.3f}{each.items:10}"
            for label, each in zip(labels, classes, strict=True)
        ]
    return "".join(f"{line}\n" for line in lines)
