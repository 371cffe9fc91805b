"""What a planner places: examples that share a beginning stay together, as far as they fit one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arena.packing.bins import best_fit
from arena.packing.tree import Tree, grow_tree

# Cost of an example of n tokens, in units of one token's linear layers: n + n^2 / QUADRATIC. On Gemma-2-9B attention
# costs as much as the linear layers at n = 50,000 or so: 4 * 42 layers * 4,096 wide * n / 2 FLOP a token, against
# 2 * 8.3e9.
QUADRATIC = 50_000.0


@dataclass(frozen=True)
class Items:
    """What is placed into micro-batches.

    Attributes:
        members: the examples (places in the planner's list) of each item; None where item i is example i.
        sizes: tokens that each item adds to a micro-batch.
        costs: what it costs to compute them, in tokens of linear layers.
        base: tokens that every micro-batch has beside them: the beginning that all examples share.
        tokens: tokens of all items and of one base, each shared one counted once.
    """

    members: list[list[int]] | None
    sizes: list[int]
    costs: list[float]
    base: int
    tokens: int


def single_items(lengths: np.ndarray, base: int = 0) -> Items:
    """Each example by itself."""
    sizes, costs = lengths - base, cost(np.full_like(lengths, base), lengths)
    return Items(None, sizes.tolist(), costs.tolist(), base, base + int(sizes.sum()))


def sharing_items(lengths: Sequence[int], shared: Sequence[int], budget: int) -> Items:
    """Groups of examples that share more than all do; a group too large for the budget is cut into several.

    Args:
        lengths, shared: of examples in the order of their tokens, as `grow_tree` takes them.
    """
    groups = _Groups(grow_tree(lengths, shared))
    roots = groups.below[-1]
    base = 0
    if len(roots) == 1 and len(lengths) > 1:
        (root,) = roots
        base = groups.tree.end[root]
        parts = groups.parts(root, budget - base)
    else:
        parts = [part for root in roots for part in groups.whole_or_parts(root, budget)]
    members, sizes, costs = (list(column) for column in zip(*parts, strict=True))
    return Items(members, sizes, costs, base, groups.tree.tokens)


def cost(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of computing the tokens [start, end) of examples, float64."""
    return np.asarray(end - start + (end**2 - start**2) / QUADRATIC)


Part = tuple[list[int], int, float]  # members, size, cost


class _Groups:
    """A prefix tree with the size, cost and examples of everything below each segment."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.below: dict[int, list[int]] = {}
        self.own: dict[int, list[int]] = {}
        for example, node in enumerate(tree.ends_in):
            self.own.setdefault(node, []).append(example)
        self.size = [end - start for start, end in zip(tree.start, tree.end, strict=True)]
        self.alone: list[float] = cost(np.array(tree.start), np.array(tree.end)).tolist()
        self.cost = list(self.alone)
        for node in reversed(range(len(tree.parent))):
            parent = tree.parent[node]
            self.below.setdefault(parent, []).append(node)
            if parent >= 0:
                self.size[parent] += self.size[node]
                self.cost[parent] += self.cost[node]

    def members(self, node: int) -> list[int]:
        found, waiting = [], [node]
        while waiting:
            at = waiting.pop()
            found += self.own.get(at, [])
            waiting += self.below.get(at, [])
        return found

    def whole_or_parts(self, node: int, room: int) -> list[Part]:
        """Everything below and in a segment, in parts of at most `room` tokens that each hold the segment."""
        if self.size[node] <= room:
            return [(self.members(node), self.size[node], self.cost[node])]
        start, end = self.tree.start[node], self.tree.end[node]
        parts = self.parts(node, room - (end - start))
        merged = []
        for places in best_fit([size for _, size, _ in parts], room - (end - start)):
            members = [member for place in places for member in parts[place][0]]
            size = end - start + sum(parts[place][1] for place in places)
            merged.append((members, size, self.alone[node] + sum(parts[place][2] for place in places)))
        return merged

    def parts(self, node: int, room: int) -> list[Part]:
        """Everything below a segment, without it, in parts of at most `room` tokens."""
        ends_here: list[Part] = [(self.own[node], 0, 0.0)] if node in self.own else []
        return ends_here + [part for child in self.below.get(node, []) for part in self.whole_or_parts(child, room)]
