"""Which row of the cache holds which tokens: a radix trie over token ids. Integers only; it holds no tensor.

A row is a slot, or one of the kept rows behind the slots, which no step runs. The trie answers which rows hold the most
of a prompt's beginning, and says of each row how much of it nobody else holds. Tries of different salts share nothing.
(Source of the idea: SGLang's RadixAttention, Zheng et al. 2024, arXiv 2312.07104, where a node owns pages; here a row
owns a path, because a row of the cache is one piece.)

Ids are kept as the bytes of int32 numbers, which compare at the speed of memory.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence as Sequences
from dataclasses import dataclass, field

from llama.engine.chunks import Chunk

ID_BYTES = 4


def key_of(ids: Iterable[int]) -> bytes:
    """Token ids as the trie takes them."""
    return array("i", ids).tobytes()


@dataclass(eq=False)
class Node:
    """A stretch of ids that all rows below it share.

    Attributes:
        label: its ids; empty at a root.
        parent: None at a root.
        children: by their first id.
        rows: those whose ids run through it.
    """

    label: bytes = b""
    parent: Node | None = None
    children: dict[bytes, Node] = field(default_factory=dict)
    rows: set[int] = field(default_factory=set)


@dataclass
class Held:
    """What a row holds.

    Attributes:
        node: the trie's node where its ids end.
        length: how many ids.
        salt: of the trie that it is in.
        plan: the chunks that a prompt of its own would be run by from the start, as far as its positions were computed
            that way or another row's that has the same plan up to there.
        is_kept: worth a place when its row is needed for something else.
        used: when it was last used, in uses.
    """

    node: Node
    length: int
    salt: Hashable
    plan: tuple[Chunk, ...]
    is_kept: bool
    used: int


class Prefixes:
    """The rows of a cache and what they hold."""

    def __init__(self) -> None:
        self.held: dict[int, Held] = {}
        self._roots: dict[Hashable, Node] = {}
        self._uses = 0

    # --- questions ----------------------------------------------------------------------------------------------------

    def matches(self, key: bytes, salt: Hashable) -> Iterator[tuple[int, int]]:
        """(row, leading ids of ``key`` that it holds) of every row that holds any, the most first."""
        node, depth = self._roots.get(salt), 0
        path: list[tuple[int, Node]] = []
        while node is not None:
            child = node.children.get(key[depth : depth + ID_BYTES])
            if child is None:
                break
            common = common_bytes(child.label, key, depth)
            depth += common
            path.append((depth // ID_BYTES, child))
            node = child if common == len(child.label) else None
        seen: set[int] = set()
        for length, node in reversed(path):
            yield from ((row, length) for row in sorted(node.rows - seen))
            seen |= node.rows

    def alone(self, row: int) -> int:
        """How many of the last ids of a row's nobody else holds."""
        node: Node | None = self.held[row].node
        count = 0
        while node is not None and node.rows == {row}:
            count += len(node.label)
            node = node.parent
        return count // ID_BYTES

    def least_used(self, rows: Iterable[int]) -> int:
        """Of some rows one that holds nothing, or else the one whose last use is longest ago."""
        return min(rows, key=lambda row: (self.held[row].used if row in self.held else 0, row))

    # --- changes ------------------------------------------------------------------------------------------------------

    def hold(self, row: int, key: bytes, salt: Hashable, plan: Sequences[Chunk] = (), *, is_kept: bool = True) -> None:
        """A row holds these ids from now on, and nothing else."""
        self.forget(row)
        if not key:
            return
        node, depth = self._roots.setdefault(salt, Node()), 0
        node.rows.add(row)
        while depth < len(key):
            first = key[depth : depth + ID_BYTES]
            child = node.children.get(first)
            if child is None:
                child = node.children[first] = Node(key[depth:], node)
                common = len(child.label)
            else:
                common = common_bytes(child.label, key, depth)
                if common < len(child.label):
                    child = _split(child, common)
            depth += common
            child.rows.add(row)
            node = child
        self.held[row] = Held(node, len(key) // ID_BYTES, salt, tuple(plan), is_kept, 0)
        self.use(row)

    def use(self, row: int) -> None:
        """What a row holds was useful now."""
        self._uses += 1
        self.held[row].used = self._uses

    def copy(self, source: int, target: int) -> None:
        """A row holds from now on what another one holds, too."""
        held = self.held[source]
        self.hold(target, self.key(source), held.salt, held.plan, is_kept=held.is_kept)

    def key(self, row: int) -> bytes:
        """The ids that a row holds."""
        found: list[bytes] = []
        node: Node | None = self.held[row].node if row in self.held else None
        while node is not None:
            found.append(node.label)
            node = node.parent
        return b"".join(reversed(found))

    def forget(self, row: int) -> None:
        """A row holds nothing any more."""
        held = self.held.pop(row, None)
        node = held.node if held else None
        while held and node is not None:
            node.rows.discard(row)
            parent = node.parent
            if not node.rows:
                if parent is None:
                    del self._roots[held.salt]
                else:
                    del parent.children[node.label[:ID_BYTES]]
            elif parent is not None and len(node.children) == 1:
                _join(node)
            node = parent

    def clear(self) -> None:
        """No row holds anything any more."""
        self.held.clear()
        self._roots.clear()


def _split(node: Node, common: int) -> Node:
    """Cut a node in two after ``common`` bytes; return the upper part."""
    upper = Node(node.label[:common], node.parent, {}, set(node.rows))
    assert node.parent is not None
    node.parent.children[node.label[:ID_BYTES]] = upper
    node.label, node.parent = node.label[common:], upper
    upper.children[node.label[:ID_BYTES]] = node
    return upper


def _join(node: Node) -> None:
    """Make one of a node and its only child where the same rows run through both."""
    (child,) = node.children.values()
    if child.rows != node.rows:
        return  # some row's ids end between them
    assert node.parent is not None
    child.label, child.parent = node.label + child.label, node.parent
    node.parent.children[child.label[:ID_BYTES]] = child


def common_bytes(label: bytes, key: bytes, begin: int) -> int:
    """How many bytes of whole ids a label and ``key[begin:]`` share at their beginnings."""
    end = min(len(label), len(key) - begin)
    if label[:end] == key[begin : begin + end]:
        return end
    low, high = 0, end // ID_BYTES  # ids: the first `low` are equal, not all of the first `high` are
    while high - low > 1:
        middle = (low + high) // 2
        a, b = low * ID_BYTES, middle * ID_BYTES
        low, high = (middle, high) if label[a:b] == key[begin + a : begin + b] else (low, middle)
    return low * ID_BYTES


def common_ids(a: bytes, b: bytes) -> int:
    """How many leading ids two keys share."""
    return common_bytes(a, b, 0) // ID_BYTES


def run_order(keys: Sequences[bytes], least: int) -> list[int]:
    """The order in which to run prompts so that each shared beginning is computed once: those that share at least
    ``least`` leading ids come one after the other, the groups in the order of their first members.
    """
    by_ids = sorted(range(len(keys)), key=lambda i: keys[i])
    groups: list[list[int]] = []
    for before, index in zip([None, *by_ids], by_ids, strict=False):
        if before is not None and common_ids(keys[before], keys[index]) >= least:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [index for group in sorted(groups, key=min) for index in group]


def shared_with_others(keys: Sequences[bytes]) -> list[int]:
    """For each key how many leading ids another one of them has, too."""
    by_ids = sorted(range(len(keys)), key=lambda i: keys[i])
    found = [0] * len(keys)
    for a, b in itertools.pairwise(by_ids):
        common = common_ids(keys[a], keys[b])
        found[a], found[b] = max(found[a], common), max(found[b], common)
    return found
