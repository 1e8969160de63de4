"""The suffix array of a text of integers, in numpy."""

from __future__ import annotations

import numpy as np

KEY_BITS = 63  # of a sort key that stays positive
MOST_TOKENS = 2**31 - 1  # so that two ranks fit into a key


def suffix_array(text: np.ndarray) -> np.ndarray:
    """Sort all suffixes of a text.

    Prefix doubling: once the suffixes are sorted by their first h tokens, a suffix's rank and the rank of the one h
    tokens later sort them by 2 h. The first sort takes as many tokens as one key holds, and later ones only the
    suffixes that still tie: O(n log n) for texts as people write them, O(n log^2 n) for one token n times. (Source:
    Manber and Myers 1993, with the ties of Larsson and Sadakane 2007.)

    Args:
        text: [n] of any unsigned dtype; at most ``MOST_TOKENS``.

    Returns:
        [n] int32: where the smallest suffix begins, the next one, and so on. A suffix that begins another one is
        smaller.
    """
    count = len(text)
    bits = (int(text.max(initial=0)) + 1).bit_length()
    sorted_by = max(KEY_BITS // bits, 1)
    keys = _leading(text, bits, sorted_by)
    places = np.argsort(keys).astype(np.int32)
    rank = np.empty(count, dtype=np.int32)
    tied = _rank(keys[places], places, np.arange(count, dtype=np.int32), rank)
    del keys
    while tied.size:
        starts = places[tied]
        later = starts + np.int64(sorted_by)
        second = np.where(later < count, rank[np.minimum(later, count - 1)] + np.int64(1), 0)
        keys = rank[starts] * np.int64(count + 1) + second
        order = np.argsort(keys)
        places[tied] = starts[order]
        tied = _rank(keys[order], places[tied], tied, rank)
        sorted_by *= 2
    return places


def _leading(text: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first ``count`` tokens of each suffix as one integer; the end of the text is smaller than any token."""
    keys = np.zeros(len(text), dtype=np.int64)
    for offset in range(count):
        keys <<= bits
        keys[: max(len(text) - offset, 0)] |= text[offset:].astype(np.int64) + 1
    return keys


def _rank(keys: np.ndarray, starts: np.ndarray, order: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Write the ranks of suffixes that were sorted; return which of them still tie.

    Args:
        keys: [m] ascending.
        starts: [m] the suffixes in that order.
        order: [m] ascending places of the suffix array that they take.
        rank: [n], is written: the first place of those that tie.

    Returns:
        Those of ``order`` whose suffixes tie with another.
    """
    is_first = np.ones(len(keys) + 1, dtype=bool)
    np.not_equal(keys[1:], keys[:-1], out=is_first[1:-1])
    here = np.arange(len(keys), dtype=np.int32)
    rank[starts] = order[np.maximum.accumulate(np.where(is_first[:-1], here, 0))]
    return order[~(is_first[:-1] & is_first[1:])]
