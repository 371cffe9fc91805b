"""Bin packing: the items that a planner places, and bins of them.

Examples that share a beginning stay together if they fit into one micro-batch.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arena.packing.tree import Tree, grow_tree

# The cost of an example of n tokens, in units of one token's linear layers, is n + n^2 / QUADRATIC. On Gemma-2-9B
# attention costs as much as the linear layers at about n = 50,000: 4 * 42 layers * 4,096 wide * n / 2 FLOP per token
# compared with 2 * 8.3e9.
QUADRATIC = 50_000.0

Bins = list[list[int]]


def longest_first(sizes: Sequence[int], costs: Sequence[float], capacity: int, count: int) -> Bins | None:
    """Puts each item, the costliest first, into the least loaded of `count` bins with room; None if one does not fit.

    This is longest-processing-time scheduling (Graham, 1969) with a hard cap.
    """
    bins: Bins = [[] for _ in range(count)]
    room, loads = [capacity] * count, [0.0] * count
    places = range(count)
    for item in sorted(range(len(sizes)), key=costs.__getitem__, reverse=True):
        size = sizes[item]
        place, least = -1, float("inf")
        for at in places:
            if loads[at] < least and room[at] >= size:
                place, least = at, loads[at]
        if place < 0:
            return None
        bins[place].append(item)
        room[place] -= size
        loads[place] += costs[item]
    return bins


def best_fit(sizes: Sequence[int], capacity: int) -> Bins:
    """Best-fit decreasing: puts each item, the largest first, into the fullest bin with room, or else a new bin."""
    bins: Bins = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for item in np.argsort(-np.asarray(sizes, dtype=np.int64), kind="stable").tolist():
        size = sizes[item]
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            bins.append([])
            left, place = capacity, len(bins) - 1
        else:
            left, place = room.pop(at)
        bins[place].append(item)
        if left > size:
            bisect.insort(room, (left - size, place))
    return bins


@dataclass(frozen=True)
class Items:
    """The items to place into micro-batches.

    Attributes:
        members: the examples (indices in the planner's list) of each item; None if item i is example i.
        sizes: tokens that each item adds to a micro-batch.
        costs: the cost of computing them, in tokens of linear layers.
        base: tokens that every micro-batch has in addition: the beginning that all examples share.
        tokens: tokens of all items and of one base, where shared tokens count once.
    """

    members: list[list[int]] | None
    sizes: list[int]
    costs: list[float]
    base: int
    tokens: int


def single_items(lengths: np.ndarray, base: int = 0) -> Items:
    """One item for each example."""
    sizes, costs = lengths - base, cost(np.full_like(lengths, base), lengths)
    return Items(None, sizes.tolist(), costs.tolist(), base, base + int(sizes.sum()))


def adjacent_items(lengths: np.ndarray, shared: np.ndarray, places: np.ndarray, base: int) -> Items:
    """One item for each few examples that must share a micro-batch.

    Args:
        lengths: int64 (n, k), tokens of the examples of each item.
        shared: int64 (n, k), tokens that each shares with the one before it in its item; `base` first.
        places: int64 (n, k), where they are in the planner's list.
        base: tokens that all examples share.
    """
    sizes, costs = (lengths - shared).sum(axis=1), cost(shared, lengths).sum(axis=1)
    return Items(places.tolist(), sizes.tolist(), costs.tolist(), base, base + int(sizes.sum()))


def sharing_items(lengths: Sequence[int], shared: Sequence[int], budget: int) -> Items:
    """One item for each group of examples that share more than all do; groups that exceed the budget are divided.

    Args:
        lengths, shared: as for `grow_tree`, of examples in the order of their tokens.
    """
    tree = grow_tree(lengths, shared)
    groups = _Groups(tree, budget)
    roots = groups.below[-1]
    one_root = len(roots) == 1 and len(lengths) > 1
    parts = groups.parts(roots[0] if one_root else -1)
    members, sizes, costs = (list(column) for column in zip(*parts, strict=True))
    return Items(members, sizes, costs, tree.end[roots[0]] if one_root else 0, tree.tokens)


def cost(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The cost of computing the tokens [start, end) of examples, float64."""
    return np.asarray(end - start + (end**2 - start**2) / QUADRATIC)


Part = tuple[list[int], int, float]  # members, size, cost


class _Groups:
    """A prefix tree with the size, cost and examples of each segment's subtree.

    Attributes:
        below: the children of each segment; under -1, the segments that begin an example.
        own: the examples that end in each segment.
        size, cost: of each segment and its descendants.
        cut: for subtrees that exceed a micro-batch, the parts that fit, each including the segment itself.
    """

    def __init__(self, tree: Tree, budget: int) -> None:
        self.below: dict[int, list[int]] = {}
        self.own: dict[int, list[int]] = {}
        self.cut: dict[int, list[Part]] = {}
        for example, node in enumerate(tree.ends_in):
            self.own.setdefault(node, []).append(example)
        start, end = np.array(tree.start), np.array(tree.end)
        self.size: list[int] = (end - start).tolist()
        self.cost: list[float] = cost(start, end).tolist()
        alone = list(zip(self.size, self.cost, strict=True))
        for node in reversed(range(len(tree.parent))):  # descendants come after their ancestors
            if self.size[node] > budget - tree.start[node]:
                self.cut[node] = self._merged(node, *alone[node], room=budget - tree.end[node])
            parent = tree.parent[node]
            self.below.setdefault(parent, []).append(node)
            if parent >= 0:
                self.size[parent] += self.size[node]
                self.cost[parent] += self.cost[node]

    def parts(self, node: int) -> list[Part]:
        """The descendants of a segment, in parts that fit into a micro-batch along with it and its ancestors."""
        parts: list[Part] = [(self.own[node], 0, 0.0)] if node in self.own else []
        for child in self.below.get(node, []):
            parts += self.cut.get(child) or [(self._members(child), self.size[child], self.cost[child])]
        return parts

    def _merged(self, node: int, size: int, cost: float, room: int) -> list[Part]:
        """The parts below a segment, merged as far as they fit in `room` tokens, each including the segment."""
        parts = self.parts(node)
        merged = []
        for places in best_fit([part[1] for part in parts], room):
            chosen = [parts[place] for place in places]
            members = [member for part in chosen for member in part[0]]
            merged.append((members, size + sum(part[1] for part in chosen), cost + sum(part[2] for part in chosen)))
        return merged

    def _members(self, node: int) -> list[int]:
        members, waiting = [], [node]
        while waiting:
            at = waiting.pop()
            members += self.own.get(at, [])
            waiting += self.below.get(at, [])
        return members
