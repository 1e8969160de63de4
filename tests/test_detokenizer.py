"""Stop strings: where a text is cut, what is held back meanwhile, and that tokens' borders make no difference."""

from __future__ import annotations

import itertools
from pathlib import Path

from hypothesis import given, settings, strategies as st

from llama import SamplingParams, load_tokenizer
from llama.detokenizer import Detokenizer, StopStrings

TEXTS = st.text("ab ", max_size=30)
STOPS = st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=4)


def naive_end(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(start, end) of the stop string that is complete first; of several that end there, the longest."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts), end
    return None


def cut(text: str, borders: list[int]) -> list[str]:
    places = sorted({0, len(text), *(b % (len(text) + 1) for b in borders)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


@settings(max_examples=500, deadline=None)
@given(TEXTS, STOPS, st.lists(st.integers(0, 100), max_size=10), st.booleans())
def test_a_text_is_cut_at_the_first_stop_string(text: str, stops: list[str], borders: list[int], include: bool) -> None:
    """However the text comes in pieces, what is let through is what a search of the whole text says."""
    watch = StopStrings(stops, include)
    released = "".join(watch.push(piece) for piece in cut(text, borders))
    found = naive_end(text, stops)
    if found is None:
        assert watch.found is None
        assert released + watch.finish() == text
    else:
        start, end = found
        assert watch.found == text[start:end]
        assert released == text[: end if include else start]
        assert watch.push("more") == watch.finish() == ""


@settings(max_examples=500, deadline=None)
@given(TEXTS, STOPS)
def test_what_may_begin_a_stop_string_is_held_back_and_nothing_else(text: str, stops: list[str]) -> None:
    """After each character: held is the longest end of the text that some stop string begins with; a reader never sees
    part of one.
    """
    watch = StopStrings(stops)
    released = ""
    for count, character in enumerate(text, start=1):
        released += watch.push(character)
        if watch.found is not None:
            break
        so_far = text[:count]
        ends = [
            n for n in range(count + 1) if any(stop.startswith(so_far[count - n :]) and n < len(stop) for stop in stops)
        ]
        assert released == so_far[: count - max(ends)]


def test_without_stop_strings_everything_passes_at_once() -> None:
    watch = StopStrings(())
    assert [watch.push(piece) for piece in ("a", "", "bc")] == ["a", "", "bc"]
    assert watch.finish() == ""


def test_a_cut_character_is_no_stop_string(tokenizer_path: Path) -> None:
    """The bug: a text that ends within a character was flushed as U+FFFD, which the stop string U+FFFD matched."""
    tokenizer = load_tokenizer(tokenizer_path)
    half = next(i for i in range(tokenizer.n_words) if tokenizer.token_bytes(i) == "é".encode()[:1])
    whole = next(i for i in range(tokenizer.n_words) if tokenizer.token_bytes(i) == b"x")
    text = Detokenizer(tokenizer, tokenizer.encode("a"), SamplingParams(9, stop=("\ufffd",)))
    assert text.push(whole, search=True) == "x"
    assert text.push(half, search=True) == ""
    assert (text.finish(), text.stop, text.text) == ("\ufffd", None, "x\ufffd")
    broken = Detokenizer(tokenizer, tokenizer.encode("a"), SamplingParams(9, stop=("\ufffd",)))
    assert [broken.push(each, search=True) for each in (half, whole)] == ["", ""]  # in the middle it is text
    assert broken.stop == "\ufffd"
