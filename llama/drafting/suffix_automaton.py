"""A suffix automaton that grows with a text and knows how much of the text's end occurred before.

Every substring of the text leads from the root to one state; a state stands for all substrings that end at the same
places. Its link leads to the longest suffix of them that ends at more places. The state of the whole text therefore
links to the longest suffix that occurred before: no search is needed. (Source: Blumer et al., The smallest automaton
recognizing the subwords of a text, 1985; as a drafter in SAM decoding, Hu et al., arXiv 2411.10666.)
"""

from __future__ import annotations

ROOT = 0
NONE = -1
MOST_UPDATED = 16  # states whose newest occurrence a token updates


class SuffixAutomaton:
    """The substrings of a growing text, and a place of each.

    A token costs amortised constant time, and at most two states.

    Attributes:
        size: tokens so far.
        match_len: how many tokens at the end of the text occurred before, together.
        match_end: the position after that earlier occurrence. It is the newest one, unless more than ``MOST_UPDATED``
            ever longer matches end there: texts such as ``a a a a``, in which any place will do.
    """

    def __init__(self) -> None:
        self.size = 0
        self.match_len = 0
        self.match_end = 0
        self._last = ROOT
        self._next: list[dict[int, int]] = [{}]  # of a state: the state that a token leads to
        self._links = [NONE]
        self._lengths = [0]  # of a state's longest substring
        self._ends = [0]  # the position after its newest occurrence

    def extend(self, token: int) -> None:
        """Append a token."""
        follow, links = self._next, self._links
        state, self._last, self.size = self._last, len(links), self.size + 1
        self._add(follow={}, link=ROOT, length=self.size, end=self.size)
        while state != NONE and token not in follow[state]:
            follow[state][token] = self._last
            state = links[state]
        match = ROOT if state == NONE else self._match(state, token)
        links[self._last] = match
        self.match_len, self.match_end = self._lengths[match], self._ends[match]
        self._visit(match)

    def _match(self, state: int, token: int) -> int:
        """The state that stands for ``state``'s longest substring and ``token``, and for nothing longer."""
        follow, links, lengths = self._next, self._links, self._lengths
        target, length = follow[state][token], lengths[state] + 1
        if lengths[target] == length:
            return target
        clone = len(links)  # it takes the shorter substrings of the target, which end at more places from now on
        self._add(follow[target].copy(), links[target], length, self._ends[target])
        links[target] = clone
        while state != NONE and follow[state].get(token) == target:
            follow[state][token] = clone
            state = links[state]
        return clone

    def _add(self, follow: dict[int, int], link: int, length: int, end: int) -> None:
        self._next.append(follow)
        self._links.append(link)
        self._lengths.append(length)
        self._ends.append(end)

    def _visit(self, state: int) -> None:
        """The text ends here now: tell the state and those that it links to."""
        for _ in range(MOST_UPDATED):
            if state == ROOT:
                return
            self._ends[state] = self.size
            state = self._links[state]


class Cursor:
    """Follows another text, and knows the longest end of it that occurs in an automaton's text.

    The automaton may grow meanwhile. A match that this makes longer stays as it is: the cursor may know less than there
    is, but never more, and each new token is compared with all that is there.

    Attributes:
        match_len: tokens of that end.
    """

    def __init__(self, automaton: SuffixAutomaton) -> None:
        self.match_len = 0
        self._automaton = automaton
        self._state = ROOT

    @property
    def match_end(self) -> int:
        """The position in the automaton's text after the match; of several places as in ``SuffixAutomaton``."""
        self._settle()
        return self._automaton._ends[self._state]

    def advance(self, token: int) -> None:
        """Append a token to the text that is followed; amortised constant time."""
        self._settle()
        follow, links = self._automaton._next, self._automaton._links
        while self._state != ROOT and token not in follow[self._state]:
            self._state = links[self._state]
            self.match_len = self._automaton._lengths[self._state]
        if token in follow[self._state]:
            self._state = follow[self._state][token]
            self.match_len += 1

    def _settle(self) -> None:
        """Go to the state that stands for the match now: the automaton may have split the one that did."""
        links, lengths = self._automaton._links, self._automaton._lengths
        while self._state != ROOT and lengths[links[self._state]] >= self.match_len:
            self._state = links[self._state]
