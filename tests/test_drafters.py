"""The drafters that need no model, against naive searches of the same history; no device."""

from __future__ import annotations

import gc
import random
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence as SequenceOf
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from llama import SamplingParams
from llama.drafting import Chain, Lookup, Suffix
from llama.drafting.history import continuation
from llama.drafting.suffix_automaton import MOST_UPDATED, Cursor, SuffixAutomaton
from llama.engine.drafting import Drafter, Drafts
from llama.engine.sequence import Sequence
from llama.errors import ConfigError

MICROSECONDS_ALLOWED = 50
LONG_HISTORY = 50_000
SMALL = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def sequence(ids: SequenceOf[int], output: SequenceOf[int] = ()) -> Sequence:
    """A sequence with a prompt and an output."""
    made = Sequence(tuple(ids), SamplingParams())
    grow(made, output)
    return made


def grow(sequence: Sequence, new: SequenceOf[int]) -> None:
    """The model chose these tokens."""
    sequence.ids += new
    sequence.token_ids += new


def guesses(drafter: Drafter, sequences: SequenceOf[Sequence], draft_len: int) -> list[list[int]]:
    """What a drafter proposes, as lists; checks the shapes."""
    drafts = drafter.propose(sequences, draft_len)
    assert drafts.tokens.shape == (len(sequences), draft_len)
    assert drafts.tokens.dtype == drafts.counts.dtype == np.int32
    assert ((drafts.counts >= 0) & (drafts.counts <= draft_len)).all()
    return [tokens[:count].tolist() for tokens, count in zip(drafts.tokens, drafts.counts, strict=True)]


def guess(drafter: Drafter, ids: SequenceOf[int], draft_len: int = 4) -> list[int]:
    """What a drafter proposes after these ids, as a new sequence."""
    return guesses(drafter, [sequence(ids)], draft_len)[0]


class Garbage(Drafter):
    """Guesses at random, or nothing."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._chooser = np.random.default_rng(seed)
        self._vocab_size = vocab_size

    def propose(self, sequences: SequenceOf[Sequence], draft_len: int) -> Drafts:
        shape = (len(sequences), draft_len)
        tokens = self._chooser.integers(0, self._vocab_size, shape, dtype=np.int32)
        return Drafts(tokens, self._chooser.integers(0, draft_len + 1, len(sequences), dtype=np.int32))


def tokens_per_step(drafter: Drafter, texts: SequenceOf[tuple[list[int], list[int]]], draft_len: int) -> float:
    """Tokens a step where a model says exactly these outputs: each step gives what was guessed right and one more."""
    steps = 0
    for prompt, output in texts:
        row, done = sequence(prompt), 0
        while done < len(output):
            right = agreeing(guesses(drafter, [row], draft_len)[0], output[done:])
            drafter.accepted(np.array([right], dtype=np.int32))
            grow(row, output[done : done + right + 1])
            done += right + 1
            steps += 1
        assert row.token_ids == output
        drafter.finished(row)
    return sum(len(output) for _, output in texts) / steps


def agreeing(guess: SequenceOf[int], truth: SequenceOf[int]) -> int:
    """How many leading tokens are equal."""
    return next((i for i, (a, b) in enumerate(zip(guess, truth, strict=False)) if a != b), min(len(guess), len(truth)))


def earlier(ids: SequenceOf[int], length: int) -> list[int]:
    """The positions after every earlier occurrence of the last ``length`` tokens, by looking everywhere."""
    end = list(ids[len(ids) - length :])
    return [i for i in range(length, len(ids)) if list(ids[i - length : i]) == end]


def longest_earlier(ids: SequenceOf[int]) -> int:
    """The length of the longest suffix that occurred before."""
    return max((n for n in range(len(ids)) if earlier(ids, n)), default=0)


# --- what follows


@pytest.mark.parametrize(
    ("start", "count", "expected"),
    [(0, 3, [1, 2, 3]), (2, 2, [3, 4]), (2, 5, [3, 4, 3, 4, 3]), (3, 3, [4, 4, 4]), (0, 0, [])],
)
def test_a_continuation_goes_on_with_itself(start: int, count: int, expected: list[int]) -> None:
    """A copy that reaches the history's end copies what it has just written, so a short period fills a long draft."""
    assert continuation([1, 2, 3, 4], start, count) == expected


# --- prompt lookup


@settings(deadline=None)
@given(SMALL, st.integers(1, 4), st.integers(1, 4), st.sampled_from(["newest", "first"]), st.data())
def test_lookup_is_a_search_of_the_whole_history(
    ids: list[int], min_ngram: int, more: int, order: str, data: st.DataObject
) -> None:
    """The longest n-gram that occurred before is continued, whatever the steps in which the history came."""
    drafter = Lookup(min_ngram + more, min_ngram, order)  # type: ignore[arg-type]
    row = sequence(ids[: data.draw(st.integers(1, len(ids)))])
    while True:
        known = row.ids
        sizes = [n for n in range(min_ngram + more, min_ngram - 1, -1) if n < len(known) and earlier(known, n)]
        places = earlier(known, sizes[0]) if sizes else []
        expected = continuation(known, places[-1 if order == "newest" else 0], 5) if places else []
        assert guesses(drafter, [row], 5) == [expected]
        if len(known) == len(ids):
            break
        grow(row, ids[len(known) : len(known) + data.draw(st.integers(1, 9))])


def test_lookup_prefers_the_longer_match_and_then_its_order() -> None:
    """Of two places where the last two tokens stood, the newest or the first goes on."""
    ids = [1, 2, 5, 1, 2, 6, 9, 2, 7, 1, 2]
    assert guess(Lookup(2, order="newest"), ids, 1) == [6]
    assert guess(Lookup(2), ids, 1) == [5]
    assert guess(Lookup(1, order="newest"), ids, 1) == [7]


def test_nothing_is_guessed_where_nothing_occurred_before() -> None:
    """Not even the history's own end."""
    for drafter in (Lookup(), Suffix()):
        assert guess(drafter, [1]) == guess(drafter, [1, 2, 3]) == []
        assert guess(drafter, [7, 7]) == [7, 7, 7, 7]
        assert drafter.propose([], 4).tokens.shape == (0, 4)


# --- the suffix automaton


@settings(deadline=None)
@given(SMALL)
def test_the_automaton_knows_the_longest_suffix_that_occurred_before(ids: list[int]) -> None:
    """Its length after every token, and a place: the newest one, while the history is short enough to keep them all."""
    automaton = SuffixAutomaton()
    for count, token in enumerate(ids, start=1):
        automaton.extend(token)
        known = ids[:count]
        length = longest_earlier(known)
        assert (automaton.size, automaton.match_len) == (count, length)
        if length:
            assert automaton.match_end in earlier(known, length)
        if length and count <= MOST_UPDATED:
            assert automaton.match_end == earlier(known, length)[-1]


@settings(deadline=None)
@given(SMALL, SMALL, st.data())
def test_a_cursor_follows_another_text_while_the_automaton_grows(
    ids: list[int], other: list[int], data: st.DataObject
) -> None:
    """The longest end of the other text that occurs in the automaton's, which splits its states meanwhile.

    What was appended after a match may make it longer; a cursor finds that out only by going on, so it may know less,
    and never more.
    """
    automaton = SuffixAutomaton()
    cursor = Cursor(automaton)
    written = 0
    for count, token in enumerate(other, start=1):
        for new in ids[written : written + data.draw(st.integers(0, 5))]:
            automaton.extend(new)
            written += 1
        cursor.advance(token)
        matched = other[count - cursor.match_len : count]
        assert cursor.match_len <= longest_inside(other[:count], ids[:written])
        assert ids[: cursor.match_end][cursor.match_end - len(matched) :] == matched
    fresh = Cursor(automaton)
    for count, token in enumerate(other, start=1):
        fresh.advance(token)
        assert fresh.match_len == longest_inside(other[:count], ids[:written])


def longest_inside(text: list[int], inside: list[int]) -> int:
    """The length of the longest suffix of a text that occurs in another one."""
    windows = {tuple(inside[i:j]) for i in range(len(inside) + 1) for j in range(i, len(inside) + 1)}
    return max(n for n in range(len(text) + 1) if tuple(text[len(text) - n :]) in windows)


def test_the_automaton_stays_small() -> None:
    """At most two states a token, as the theory says."""
    chooser = random.Random(0)
    automaton = SuffixAutomaton()
    for _ in range(2000):
        automaton.extend(chooser.randrange(3))
    assert len(automaton._links) <= 2 * automaton.size


# --- suffix decoding


@settings(deadline=None)
@given(SMALL, st.integers(1, 4), st.sampled_from([0.5, 1.0, 8.0]), st.data())
def test_suffix_continues_the_longest_match(
    ids: list[int], min_match: int, draft_per_match: float, data: st.DataObject
) -> None:
    """In whatever steps the history came; no more than the match is worth, and nothing below ``min_match``."""
    drafter = Suffix(min_match, draft_per_match)
    row = sequence(ids[: data.draw(st.integers(1, len(ids)))])
    while True:
        known = row.ids
        length = longest_earlier(known)
        found = guesses(drafter, [row], 6)[0]
        if length < min_match:
            assert found == []
        else:
            assert len(found) == min(6, int(np.ceil(draft_per_match * length)))
            assert found in [continuation(known, place, len(found)) for place in earlier(known, length)]
        if len(known) == len(ids):
            break
        grow(row, ids[len(known) : len(known) + data.draw(st.integers(1, 9))])


def test_suffix_goes_on_with_an_earlier_output() -> None:
    """What one request was answered is guessed for the next one, up to the answer's end; 0 switches that off."""
    for drafter, expected in ((Suffix(), [13, 14]), (Suffix(corpus_tokens=0), [])):
        drafter.finished(sequence([1, 2], [11, 12, 13, 14]))
        drafter.finished(sequence([1, 2], [21, 22]))
        assert guess(drafter, [5, 11, 12]) == expected


def test_the_longer_match_wins() -> None:
    """The history's own is followed unless an earlier output matches further."""
    drafter = Suffix()
    drafter.finished(sequence([1], [3, 4, 5, 50]))
    assert guess(drafter, [9, 4, 5, 60, 4, 5], 1) == [60]
    assert guess(drafter, [4, 5, 60, 3, 4, 5], 1) == [50]


def test_a_row_meets_outputs_that_end_while_it_runs() -> None:
    """Also those that fill a new half of the corpus."""
    drafter = Suffix(corpus_tokens=40)
    row = sequence([7, 8])
    for start in range(100, 200, 10):
        assert guesses(drafter, [row], 3) == [[]]
        output = list(range(start, start + 10))
        drafter.finished(sequence([1], output))
        grow(row, output[:2])
        assert guesses(drafter, [row], 3) == [output[2:5]]
        grow(row, [start + 1000])


@pytest.mark.parametrize("corpus_tokens", [1, 2, 3, 64, 1000])
def test_the_corpus_is_bounded(corpus_tokens: int) -> None:
    """However many and long the outputs are, and the newest one is known to the last token."""
    drafter, chooser = Suffix(corpus_tokens=corpus_tokens), random.Random(1)
    for number in range(60):
        output = [number * 1000 + i for i in range(chooser.randrange(90))]
        drafter.finished(sequence([1], output))
        assert sum(len(corpus.ids) for corpus in drafter._corpora) <= corpus_tokens
        assert sum(corpus.automaton.size for corpus in drafter._corpora) <= corpus_tokens
        if corpus_tokens == 1000 and len(output) > 3:
            assert guess(drafter, output[:-1], 4) == output[-1:]


# --- all of them


MAKERS: list[Callable[[], Drafter]] = [Lookup, Suffix, lambda: Chain([Lookup(min_ngram=3), Suffix()])]


@pytest.mark.parametrize("make", MAKERS)
def test_two_sequences_at_once_are_guessed_as_each_alone(make: Callable[[], Drafter]) -> None:
    """Though they come in another order each time, and one pauses."""
    chooser = random.Random(2)
    texts = [[chooser.randrange(4) for _ in range(80)] for _ in range(2)]
    together, alone = make(), [make(), make()]
    rows, twins = ([sequence(text[:10]) for text in texts] for _ in range(2))
    for step in range(10, 80):
        order = [0, 1] if step % 2 else [1, 0]
        order = order[:1] if step % 3 == 0 else order
        found = guesses(together, [rows[i] for i in order], 3)
        assert found == [guesses(alone[i], [twins[i]], 3)[0] for i in order]
        for row, text in zip((*rows, *twins), (*texts, *texts), strict=True):
            grow(row, [text[step]])


@pytest.mark.parametrize("make", MAKERS)
def test_a_sequence_that_nobody_has_is_forgotten(make: Callable[[], Drafter]) -> None:
    """Also one whose end the drafter was never told."""
    drafter = make()
    row = sequence([1, 2, 3, 1, 2])
    drafter.propose([row], 3)
    gone = weakref.ref(row)
    del row
    gc.collect()
    assert gone() is None


def test_an_ended_sequence_leaves_no_index() -> None:
    """While somebody still holds it."""
    lookup, suffix, row = Lookup(), Suffix(), sequence([1, 2, 1])
    for drafter in (lookup, suffix):
        drafter.propose([row], 3)
        drafter.finished(row)
        drafter.finished(row)
        drafter.close()
        drafter.close()
    assert (len(lookup._indices), len(suffix._rows)) == (0, 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Lookup(min_ngram=0), "min_ngram: got 0"),
        (lambda: Lookup(2, 3), "max_ngram: got 2, expected at least min_ngram=3"),
        (lambda: Lookup(order="last"), "order: got 'last', expected one of newest, first"),  # type: ignore[arg-type]
        (lambda: Suffix(min_match=0), "min_match: got 0"),
        (lambda: Suffix(draft_per_match=0), "draft_per_match: got 0"),
        (lambda: Suffix(draft_per_match=float("nan")), "draft_per_match: got nan"),
        (lambda: Suffix(corpus_tokens=-1), "corpus_tokens: got -1"),
        (lambda: Chain([]), "drafters: got none"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Drafter], words: str) -> None:
    """With the value and the range."""
    with pytest.raises(ConfigError, match=words):
        make()


# --- speed


def proposal_microseconds(drafter: Drafter, text: list[int]) -> float:
    """Time of a proposal after one new token on a long history: the best of several batches, in time of this thread, so
    that other programs on the machine do not count.
    """
    row = sequence(text[:LONG_HISTORY])
    drafter.propose([row], 7)
    batches = []
    for start in range(LONG_HISTORY, len(text), 100):
        spent = 0.0
        for token in text[start : start + 100]:
            grow(row, [token])
            with untraced():
                before = time.thread_time()
                drafter.propose([row], 7)
                spent += time.thread_time() - before
        batches.append(spent / 100 * 1e6)
    return min(batches)


@contextmanager
def untraced() -> Iterator[None]:
    """Within: no coverage of lines, which takes several times as long as the lines."""
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


def zipfian(count: int, vocab_size: int = 32_000) -> list[int]:
    """Tokens as frequent as words are."""
    drawn = np.random.default_rng(0).zipf(1.2, count) % vocab_size
    return [int(token) for token in drawn]


def filled(drafter: Suffix, text: list[int]) -> Suffix:
    """A drafter that has seen a corpus of outputs."""
    for start in range(0, 20_000, 500):
        drafter.finished(sequence([1], text[start : start + 500]))
    return drafter


@pytest.mark.parametrize("kind", ["words", "one token"])
@pytest.mark.parametrize("name", ["lookup", "lookup, newest", "suffix", "suffix with a corpus"])
def test_a_proposal_takes_microseconds_on_a_long_history(name: str, kind: str) -> None:
    """At 50,000 tokens, where searching the whole prompt at each step is felt (vLLM #16883)."""
    text = zipfian(LONG_HISTORY + 500) if kind == "words" else [7] * (LONG_HISTORY + 500)
    drafters: dict[str, Callable[[], Drafter]] = {
        "lookup": Lookup,
        "lookup, newest": lambda: Lookup(order="newest"),
        "suffix": Suffix,
        "suffix with a corpus": lambda: filled(Suffix(), text),
    }
    spent = proposal_microseconds(drafters[name](), text)
    print(f"{name}, {kind}: {spent:.1f} microseconds a proposal")
    assert spent < MICROSECONDS_ALLOWED


# --- tokens a step


Texts = list[tuple[list[int], list[int]]]


def passages(vocab_size: int, seed: int, count: int = 3, length: int = 300) -> Iterator[list[int]]:
    """Random passages: the smaller the vocabulary, the more places look alike."""
    chooser = random.Random(seed)
    for _ in range(count):
        yield [3 + chooser.randrange(vocab_size) for _ in range(length)]


def copies(vocab_size: int, seed: int = 1) -> Texts:
    """Passages that are said again."""
    return [([*passage, 1], passage) for passage in passages(vocab_size, seed)]


def edited_copies(vocab_size: int, seed: int = 2) -> Texts:
    """Passages that are said again with one token in fifteen left out or changed."""
    chooser = random.Random(seed)
    texts = []
    for passage in passages(vocab_size, seed):
        kept = [token for token in passage if chooser.random() > 0.03]
        texts.append(
            ([*passage, 1], [t if chooser.random() > 0.03 else chooser.randrange(3, vocab_size) for t in kept])
        )
    return texts


def repetitions(seed: int = 3) -> Texts:
    """Outputs that go round in circles."""
    chooser = random.Random(seed)
    units = [[chooser.randrange(3, 500) for _ in range(size)] for size in (2, 5, 11, 23)]
    return [([chooser.randrange(3, 500) for _ in range(60)], unit * 12) for unit in units]


def noise(seed: int = 4) -> Texts:
    """Outputs that have nothing to do with their prompts."""
    return [(first, second) for first, second in zip(passages(60, seed), passages(60, seed + 1), strict=True)]


KINDS: dict[str, Texts] = {
    "copy": copies(400),
    "copy of look-alikes": copies(12),
    "edited copy": edited_copies(400),
    "edited copy of look-alikes": edited_copies(24),
    "repetitive": repetitions(),
    "noise": noise(),
}


class TransformersLookup(Drafter):
    """transformers' prompt lookup on the same ids."""

    def propose(self, sequences: SequenceOf[Sequence], draft_len: int) -> Drafts:
        import torch
        from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

        found = []
        for row in sequences:
            generator = PromptLookupCandidateGenerator(num_output_tokens=draft_len, max_length=10**9)
            ids, _ = generator.get_candidates(torch.tensor([row.ids]))
            found.append(ids[0, len(row.ids) :].tolist())
        return Drafts.of(found, draft_len)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_lookup_accepts_as_many_tokens_as_transformers(kind: str) -> None:
    """Tokens a step at transformers' own draft length, 10; its class runs on the same ids."""
    ours, theirs = (tokens_per_step(drafter, KINDS[kind], 10) for drafter in (Lookup(), TransformersLookup()))
    print(f"{kind}: {ours:.2f} tokens a step, transformers {theirs:.2f}")
    assert ours >= 0.95 * theirs


@pytest.mark.parametrize("draft_len", [7, 15])
def test_suffix_tells_places_apart_that_look_alike(draft_len: int) -> None:
    """Long copies of a small vocabulary, in which three tokens stand in several places."""
    texts = copies(6)
    lookup, suffix = (tokens_per_step(drafter, texts, draft_len) for drafter in (Lookup(), Suffix(corpus_tokens=0)))
    print(f"draft length {draft_len}: suffix {suffix:.2f} tokens a step, lookup {lookup:.2f}")
    assert suffix >= 1.2 * lookup


@pytest.mark.parametrize("kind", KINDS)
def test_no_drafter_changes_a_text(kind: str) -> None:
    """Whatever is guessed, each step gives a token at least and the text comes out; random guesses are no exception."""
    texts = [(prompt, output[:60]) for prompt, output in KINDS[kind][:2]]
    for drafter in (Lookup(), Suffix(), Garbage(500), Chain([Garbage(500), Suffix()])):
        assert 1 <= tokens_per_step(drafter, texts, 5) <= 6


# --- a chain


class Scripted(Drafter):
    """Guesses one token after the prompts that it knows, and notes what it is told."""

    def __init__(self, knows: dict[int, int]) -> None:
        self._knows = knows
        self.asked: list[list[int]] = []
        self.told: list[list[int]] = []
        self.ended: list[Sequence] = []
        self.closed = 0

    def propose(self, sequences: SequenceOf[Sequence], draft_len: int) -> Drafts:
        self.asked.append([row.ids[0] for row in sequences])
        known = [[self._knows[row.ids[0]]] * 2 if row.ids[0] in self._knows else [] for row in sequences]
        return Drafts.of(known, draft_len)

    def accepted(self, counts: np.ndarray) -> None:
        self.told.append(counts.tolist())

    def finished(self, sequence: Sequence) -> None:
        self.ended.append(sequence)

    def close(self) -> None:
        self.closed += 1


def test_a_chain_asks_in_order_and_tells_who_guessed() -> None:
    """The first drafter that has a guess gives it; those after it are not asked. A success is told to its own only."""
    first, second, third = Scripted({10: 1}), Scripted({10: 9, 20: 2}), Scripted({})
    chain = Chain([first, second, third])
    rows = [sequence([number]) for number in (30, 20, 10)]
    assert guesses(chain, rows, 3) == [[], [2, 2], [1, 1]]
    chain.accepted(np.array([0, 2, 1], dtype=np.int32))
    assert (first.asked, second.asked, third.asked) == ([[30, 20, 10]], [[30, 20]], [[30]])
    assert (first.told, second.told, third.told) == ([[0, 0, 1]], [[0, 2]], [[0]])


def test_a_chain_ends_early_where_all_have_a_guess() -> None:
    """Then the later drafters are neither asked nor told."""
    first, second = Scripted({10: 1}), Scripted({})
    chain = Chain([first, second])
    assert guesses(chain, [sequence([10])], 3) == [[1, 1]]
    chain.accepted(np.array([2], dtype=np.int32))
    assert (first.told, second.asked, second.told) == ([[2]], [], [])
    assert guesses(chain, [], 3) == []


def test_a_chain_forwards_every_end() -> None:
    """All drafters are closed in order, also after one that fails."""

    class Failing(Scripted):
        def close(self) -> None:
            super().close()
            raise OSError("the disk is full")

    drafters = [Scripted({}), Failing({}), Scripted({})]
    chain, row = Chain(drafters), sequence([1])
    chain.finished(row)
    with pytest.raises(OSError, match="the disk is full"):
        chain.close()
    assert [(drafter.ended, drafter.closed) for drafter in drafters] == [([row], 1)] * 3
