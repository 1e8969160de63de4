"""What generate logs: a line for each phase and one of speeds; with --verbose the original's lines, whose numbers agree
with it and with the results.
"""

from __future__ import annotations

import io
import logging
import re
import signal
import sys
from typing import Any, NamedTuple

import pytest
from commands import ROOT, Outcome, Run, finished
from fakes import FakeRunner, fake_llm, next_token

from llama import LLaMA, load_tokenizer
from llama.cli.output import leave_compiling_to_bars, log_to_stderr
from llama.config import DEMO_DIR, DraftConfig, EngineConfig
from llama.drafting.chain import Drafter
from llama.engine.drafting import Drafting, Drafts
from llama.engine.engine import Engine
from llama.engine.pace import Pace
from llama.engine.sequence import Sequence
from llama.startup import Startup

README = ROOT / "README.md"
TOKENIZER = DEMO_DIR / "tokenizer.model"
CLASSIC = ("Processing prompt pos", "Processed prompts", "Totally decoded")
CHUNK = re.compile(r"Processing prompt pos \[(\d+), (\d+)\), section length (\d+)")
PROCESSED = re.compile(r"Processed prompts with (\d+) to (\d+) tokens, and generated (\d+) tokens")
DECODED = re.compile(r"Totally decoded (\d+) tokens in (\d+\.\d{5}) seconds(?:, (\d+) of them cached)?")
SPEEDS = re.compile(
    r"(?:Pass (?P<number>\d+) of \d+: )?(?:(?P<prompts>\d+) prompts?(?: and (?P<samples>\d+) samples)? in all: )?"
    r"(?P<tokens>\d+) prompt tokens?(?: \((?P<cached>\d+) cached\))?(?P<rate> at [\d.]+ tok/s)?, "
    r"(?P<generated>\d+) generated(?: at [\d.]+ tok/s)?"
    r"(?:, (?P<accepted>\d+) of (?P<drafted>\d+) drafted tokens? accepted)?, "
    r"in (?P<seconds>\d+\.\d\d) s(?:; first token \d+\.\d\d s after the (?P<since>command|pass) began)?"
)


class HalfRight(Drafter):
    """Guesses what the fake device will choose, and something else at every third place."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def propose(self, sequences: Any, draft_len: int) -> Drafts:
        return Drafts.of([self._guess(sequence, draft_len) for sequence in sequences], draft_len)

    def _guess(self, sequence: Sequence, draft_len: int) -> list[int]:
        ids = list(sequence.ids)
        for _ in range(draft_len):
            token = next_token(ids, self._vocab_size, (sequence.params.seed or 0) if sequence.params.temperature else 0)
            ids.append(token if len(ids) % 3 else token + 1)
        return ids[len(sequence.ids) :]


@pytest.fixture
def on_fake(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``on_fake("--prompt", "a")``: generate on a device whose tokens can be computed."""

    def build(*_: Any, config: EngineConfig, startup: Startup, drafting: DraftConfig | None, **__: Any) -> LLaMA:
        tokenizer = load_tokenizer(TOKENIZER)
        engine = Engine(config, FakeRunner(config, tokenizer.n_words))
        if drafting is not None:
            engine.drafting = Drafting(HalfRight(tokenizer.n_words), Pace(config.draft_lens), tokenizer.n_words)
        return LLaMA(engine, tokenizer, startup=startup)

    monkeypatch.setattr(LLaMA, "build", staticmethod(build))
    shapes = ["--buckets", "16,4,1", "--max_seq_len", "128", "--max_gen_len", "20", "--seed", "5", "--json"]

    def call(*flags: str) -> Outcome:
        left = list(shapes)
        for flag in [f for f in flags if f.startswith("--") and f in left]:
            del left[left.index(flag) : left.index(flag) + (1 if flag == "--json" else 2)]
        return run("generate", *flags, *left)

    return call


def prompted(*prompts: str) -> list[str]:
    """The flags that give prompts."""
    return [word for prompt in prompts for word in ("--prompt", prompt)]


class Pass(NamedTuple):
    """The numbers of one pass, as the log tells them.

    Attributes:
        speeds: the groups of SPEEDS; those that are not there are None.
    """

    chunks: list[tuple[int, int, int]]
    shortest: int
    longest: int
    generated: int
    decoded: int
    seconds: float
    cached: int
    speeds: dict[str, str | None]


def passes_of(err: str) -> list[Pass]:
    """The passes that a log tells of; no line with a number of theirs is left unread."""
    passes, chunks = [], list[tuple[int, int, int]]()
    processed: re.Match[str] | None = None
    decoded: re.Match[str] | None = None
    for line in err.splitlines():
        if found := CHUNK.fullmatch(line):
            start, end, length = map(int, found.groups())
            chunks.append((start, end, length))
        processed = PROCESSED.fullmatch(line) or processed
        decoded = DECODED.fullmatch(line) or decoded
        if speeds := SPEEDS.fullmatch(line):
            assert processed is not None
            assert decoded is not None
            numbers = [int(number) for number in processed.groups()]
            total, seconds, cached = decoded.groups()
            told = int(total), float(seconds), int(cached or 0), speeds.groupdict()
            passes.append(Pass(chunks, *numbers, *told))
            chunks, processed, decoded = [], None, None
    assert (chunks, processed, decoded) == ([], None, None), err
    return passes


def agree(outcome: Outcome, count: int, *, best_of: int | None = None) -> list[Pass]:
    """Assert that all numbers of a log agree with each other and with the results; return its passes.

    Args:
        count: prompts.
        best_of: samples of each that were run, where not all of them are results.
    """
    passes = passes_of(outcome.err)
    per_pass = len(outcome.results) // len(passes)
    for place, found in enumerate(passes):
        results = outcome.results[place * per_pass : (place + 1) * per_pass]
        was_run = [r for r in results if r["sample"] == 0 and r["timing"]["prefill_tok_s"] > 0]
        lengths = [r["usage"]["prompt_tokens"] for r in was_run]
        generated = sum(len(r["token_ids"]) for r in results)
        speeds = found.speeds
        assert (found.shortest, found.longest) == (min(lengths, default=0), max(lengths, default=0))
        assert int(speeds["tokens"] or 0) == sum(lengths)
        assert found.generated == int(speeds["generated"] or 0)
        assert found.generated == generated if best_of is None else found.generated > generated
        assert found.decoded == sum(lengths) + found.generated
        assert found.cached == int(speeds["cached"] or 0)
        if best_of is None:
            assert found.cached == sum(r["usage"]["cached_tokens"] for r in was_run)
        assert float(speeds["seconds"]) == pytest.approx(found.seconds, abs=0.00501)  # both are rounded
        requests = per_pass if best_of is None else count * best_of
        assert int(speeds["prompts"] or 1) == count
        assert int(speeds["samples"] or count) == requests
        assert speeds["since"] == ((None if not lengths else "command") if not place else "pass")
        assert all(end - start <= length for start, end, length in found.chunks)
    return passes


# --- the default ------------------------------------------------------------------------------------------------------


def test_the_default_log_is_one_line_of_speeds(on_fake: Run) -> None:
    """Whatever is asked for: a line a pass, and none of the original's; phases that the fake device lacks aside."""
    (line,) = on_fake("Once upon a time").err.splitlines()
    assert SPEEDS.fullmatch(line)
    assert line.startswith("5 prompt tokens at ")
    assert re.search(r", 20 generated at [\d.]+ tok/s, in [\d.]+ s; first token [\d.]+ s after the command ", line)
    outcome = on_fake(*prompted("Once", "upon a time"), "--repeat", "2")
    first, second = outcome.err.splitlines()
    assert first.startswith("Pass 1 of 2: 2 prompts in all: 6 prompt tokens at ")
    assert second.startswith("Pass 2 of 2: 2 prompts in all: 6 prompt tokens at ")
    assert second.endswith(" s after the pass began")


class _Screen(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("run")  # it restores the log
@pytest.mark.parametrize(
    ("stderr", "quiet", "verbose", "shown"),
    [
        (io.StringIO, False, False, ["own", "compiling", "warning"]),
        (_Screen, False, False, ["own", "warning"]),
        (_Screen, False, True, ["own", "compiling", "detail", "warning"]),
        (io.StringIO, True, False, []),
        (_Screen, True, False, []),
    ],
)
def test_bars_tell_what_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
    stderr: type[io.StringIO],
    quiet: bool,
    verbose: bool,
    shown: list[str],
) -> None:
    """At a terminal a line about it would stand between the answers of a chat, or cut the bar of a batch."""
    monkeypatch.setattr(sys, "stderr", stderr())
    log, own = logging.getLogger("llama"), logging.getLogger("llama.own")
    log_to_stderr(quiet, verbose)
    leave_compiling_to_bars(own, verbose)
    own.info("own")
    log.info("compiling")
    log.debug("detail")
    log.warning("warning")
    assert sys.stderr.getvalue().split() == shown  # type: ignore[attr-defined]


def test_quiet_is_quiet_also_for_the_original_s_lines(on_fake: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """example_xla.py asks for them by the level of their logger."""
    classic = logging.getLogger("llama.classic")
    monkeypatch.setattr(classic, "level", logging.DEBUG)
    classic.manager._clear_cache()  # type: ignore[attr-defined]
    try:
        assert on_fake("Once upon a time", "--quiet").err == ""
        assert [word for word in CLASSIC if word not in on_fake("Once upon a time").err] == []
    finally:
        monkeypatch.undo()
        classic.manager._clear_cache()  # type: ignore[attr-defined]


def test_python_users_see_the_original_s_lines_when_they_debug(caplog: pytest.LogCaptureFixture) -> None:
    llm = fake_llm(TOKENIZER)
    with caplog.at_level(logging.INFO, "llama"):
        llm.generate("Once upon a time", max_gen_len=3, temperature=0)
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, "llama"):
        llm.generate("The cat", max_gen_len=3, temperature=0)
    assert [word for word in CLASSIC if word not in caplog.text] == []
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


@pytest.mark.slow
def test_the_readme_shows_this_log() -> None:
    """The lines around the story of its first screen are those of a first run; numbers aside."""
    _, _, rest = README.read_text(encoding="utf-8").partition("```text\nImporting ")
    block = "Importing " + rest.partition("```")[0]
    outcome = finished(["-m", "llama.cli", "generate", "--prompt", "Once upon a time", "--max_gen_len", "2"])
    kinds = [re.sub(r"\d+(\.\d+)?", "N", line) for line in outcome.err.splitlines()]
    shown = [re.sub(r"\d+(\.\d+)?", "N", line) for line in block.splitlines()]
    assert [*shown[:3], shown[-1]] == kinds
    assert shown[3].startswith("Once upon a time")


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "flags"),
    [
        (["Once upon a time"], ""),
        (["Once upon a time"], "--max_gen_len 1"),
        (["Once upon a time"], "--max_gen_len 2 --stream"),
        (["Once", "upon a time there was", "", "the"], ""),
        (["Once", "upon a time there was", "", "the"], "--max_batch_size 2 --prefill_budget 1"),
        (["Once upon a time"], "--n 3"),
        (["Once", "upon a time there was"], "--n 3 --max_batch_size 2"),
        (["Once", "upon a time"], "--repeat 3"),
        (["Once upon a time"], "--drafter lookup --draft_lens 3,7"),
        (["Once", "upon a time"], "--drafter lookup --draft_lens 5 --max_batch_size 1 --n 2"),
        (["a b c d e f g h i j k l m n o p q"], "--bucket_policy pad"),
    ],
)
def test_all_numbers_agree(on_fake: Run, prompts: list[str], flags: str) -> None:
    outcome = on_fake(*prompted(*prompts), *flags.split(), "--verbose")
    assert outcome.code == 0
    passes = agree(outcome, len(prompts))
    assert len(passes) == (3 if "--repeat" in flags else 1)
    if "--drafter" in flags:
        counts = [r["drafting"] for r in outcome.results]
        assert int(passes[0].speeds["drafted"] or 0) == sum(c["draft_tokens"] for c in counts) > 0
        assert int(passes[0].speeds["accepted"] or 0) == sum(c["accepted_tokens"] for c in counts) > 0
    if "--n" not in flags:  # samples run what they do not find in a row
        for found in passes:
            assert sum(end - start for start, end, _ in found.chunks) == int(found.speeds["tokens"] or 0)


def test_samples_that_are_not_returned_count(on_fake: Run) -> None:
    """They were generated, in the seconds that the line tells."""
    outcome = on_fake(*prompted("Once", "upon a time"), "--n", "1", "--best_of", "4", "--verbose")
    (found,) = agree(outcome, 2, best_of=4)
    assert found.generated > sum(len(r["token_ids"]) for r in outcome.results)


def test_tokens_that_the_cache_held(on_fake: Run) -> None:
    """They are tokens of the prompt, named apart, and were not run."""
    story = "there was a little girl who lived in a small house by the sea with her mother and her father and a dog"
    (found,) = agree(on_fake(*prompted(story, f"{story} and a cat"), "--max_batch_size", "1", "--verbose"), 2)
    assert 0 < found.cached < int(found.speeds["tokens"] or 0)
    run_again = sum(end - start for start, end, _ in found.chunks)
    assert run_again == int(found.speeds["tokens"] or 0) - found.cached


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_stop_token_is_no_generated_token(on_fake: Run, after: int) -> None:
    """A text that ends at once has no tokens; its prompt was run all the same."""
    ids = on_fake("Once upon a time", "--temperature", "0").results[0]["token_ids"]
    stop = ids.index(ids[after])
    outcome = on_fake("Once upon a time", "--temperature", "0", "--stop_token_ids", str(ids[after]), "--verbose")
    (found,) = agree(outcome, 1)
    assert (found.generated, found.decoded) == (stop, 5 + stop)


class Interrupting(io.StringIO):
    """A stream whose reader presses Ctrl-C as soon as it sees a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text, self._pressed = text, False

    def write(self, text: str) -> int:
        if self._text in text and not self._pressed:
            self._pressed = True
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


@pytest.mark.parametrize(
    ("moment", "begun"), [("pos [0, 16)", 0), ("pos [16, 20)", 0), ('"piece"', 1)], ids=["first", "second", "text"]
)
def test_interrupted_requests_count_as_far_as_they_came(
    on_fake: Run, monkeypatch: pytest.MonkeyPatch, moment: str, begun: int
) -> None:
    """A prompt that was not run to its end is not counted, nor one that never had a slot."""
    out, err = Interrupting(moment), Interrupting(moment)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    story = " ".join(["once"] * 30)
    flags = ["--max_batch_size", "1", "--stream", "--verbose"]
    code = on_fake(*prompted(story, "a"), *flags).code
    outcome = Outcome(code, out.getvalue(), err.getvalue())
    assert outcome.code == 130
    assert [r["finish_reason"] for r in outcome.results] == ["interrupted"] * 2
    (found,) = passes_of("\n".join(outcome.err.splitlines()[:-1]))
    assert (found.speeds["rate"] is not None) == (begun > 0)
    agree(outcome, 2)
