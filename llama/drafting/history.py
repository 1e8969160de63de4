"""What drafters share: a guess that goes on from an earlier place of the same text."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf


def continuation(ids: SequenceOf[int], start: int, count: int) -> list[int]:
    """The ``count`` tokens that follow if the text goes on as it did from ``start``.

    Where the text ends before, the copy goes on with itself: after ``a b a b`` with ``start`` 2 follow ``a b a b a``.
    So a text that repeats itself gets a whole draft, however short its period.

    Args:
        ids: the text.
        start: within the text.
        count: 0 or more.
    """
    found = list(ids[start : start + count])
    return (found * -(-count // max(len(found), 1)))[:count]
