"""Plans which examples share a micro-batch, from their lengths and common beginnings alone.

Training keeps the examples of an optimizer step together and divides each step into the least number of micro-batches,
evenly loaded. Evaluation may combine any examples and uses best-fit decreasing over the whole set. If the examples'
common beginnings are known, examples that share most are kept together, and each shared token counts once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from arena.packing.bins import Items, adjacent_items, best_fit, cost, longest_first, sharing_items, single_items
from arena.packing.tree import LEAST_SHARED, Prefixes, Tree, grow_tree
from arena.storage.files import fingerprint


@dataclass(frozen=True)
class PackPlan:
    """Micro-batches of examples, grouped into steps.

    Attributes:
        examples: int64 (n,), example indices, micro-batch after micro-batch.
        micro_ends: int64 (m,), where each micro-batch ends in `examples`.
        step_ends: int64 (s,), where each step ends in `micro_ends`.
        tokens: int64 (m,), tokens that each micro-batch computes; shared tokens count once.
        logical_tokens: int64 (m,), tokens of each micro-batch's examples.
        least_micro_batches: a lower bound of their number, from the tokens that each step computes.
        budget: the most tokens in a micro-batch.
        ranks: every step has a multiple of this many micro-batches; micro-batch i of a step is for rank i % ranks.
        shared: int32 (n,), tokens that each of `examples` shares with the one before it; a micro-batch's examples are
            in the order of their tokens. None: nothing is shared.
    """

    examples: np.ndarray
    micro_ends: np.ndarray
    step_ends: np.ndarray
    tokens: np.ndarray
    logical_tokens: np.ndarray
    least_micro_batches: int
    budget: int
    ranks: int = 1
    shared: np.ndarray | None = None

    @property
    def n_steps(self) -> int:
        return len(self.step_ends)

    @property
    def n_micro_batches(self) -> int:
        return len(self.micro_ends)

    @property
    def fill_rate(self) -> float:
        """Tokens / (micro-batches x budget)."""
        return float(self.tokens.sum() / (max(1, self.n_micro_batches) * self.budget))

    @property
    def unique_share(self) -> float:
        """Computed tokens / tokens of the examples."""
        return float(self.tokens.sum() / max(1, self.logical_tokens.sum()))

    @property
    def evenness(self) -> np.ndarray:
        """float64 (s,), the fewest divided by the most tokens among each step's micro-batches; 1 is even."""
        parts = np.split(self.tokens, self.step_ends[:-1])
        return np.array([part.min() / max(part.max(), 1) for part in parts])

    @property
    def fingerprint(self) -> str:
        parts = (self.examples, self.micro_ends, self.step_ends, self.tokens)
        return fingerprint(self.budget, self.ranks, *(np.ascontiguousarray(part, np.int64).tobytes() for part in parts))

    def micro_batch(self, index: int) -> np.ndarray:
        """The example indices of one micro-batch; empty if a rank has nothing to do."""
        start = self.micro_ends[index - 1] if index else 0
        return self.examples[start : self.micro_ends[index]]

    def tree(self, index: int, lengths: np.ndarray) -> Tree | None:
        """The prefix tree of one micro-batch's examples, given the length of every example; None: nothing is shared."""
        if self.shared is None:
            return None
        start = self.micro_ends[index - 1] if index else 0
        members, shared = self.micro_batch(index), self.shared[start : self.micro_ends[index]]
        return _tree_within(lengths[members].tolist(), shared.tolist(), self.budget)

    def costs(self, lengths: np.ndarray) -> np.ndarray:
        """float64 (m,), what each micro-batch costs in tokens of linear layers, given the length of every example."""
        ends = lengths[self.examples]
        starts = np.zeros_like(ends) if self.shared is None else np.minimum(self.shared, ends)
        total = np.concatenate([[0.0], np.cumsum(cost(starts, ends))])
        return np.diff(total[np.concatenate([[0], self.micro_ends])])

    def of_step(self, index: int, rank: int = 0) -> range:
        """The micro-batches of one step for `rank`."""
        start = int(self.step_ends[index - 1]) if index else 0
        return range(start + rank, int(self.step_ends[index]), self.ranks)

    def step(self, index: int, rank: int = 0) -> list[np.ndarray]:
        """The example indices of these micro-batches; all ranks together have each example once."""
        return [self.micro_batch(at) for at in self.of_step(index, rank)]

    def step_examples(self, index: int) -> np.ndarray:
        """The example indices of a step, over all ranks."""
        start = int(self.step_ends[index - 1]) if index else 0
        before = self.micro_ends[start - 1] if start else 0
        return self.examples[before : self.micro_ends[self.step_ends[index] - 1]]

    def step_size(self, index: int) -> int:
        """The number of examples in a step, over all ranks."""
        return len(self.step_examples(index))


def plan_training(
    lengths: np.ndarray,
    order: np.ndarray,
    *,
    step_size: int,
    budget: int,
    ranks: int = 1,
    prefixes: Prefixes | None = None,
    together: int = 1,
) -> PackPlan:
    """Plans training: divides `order` into steps of `step_size` examples, and each step into micro-batches.

    Args:
        lengths: tokens of every example.
        order: example indices in the order of training. The last step may have fewer examples.
        prefixes: what the examples share; None shares nothing.
        together: how many adjacent examples of `order` must share a micro-batch each time; it divides `step_size`.

    Raises:
        ValueError: an example, or those that must share a micro-batch, are longer than the budget; the message names
            the first of them.
    """
    check_fits(lengths, order, budget)
    assert step_size % together == 0 and len(order) % together == 0, "a step has whole rows"
    order = np.asarray(order, dtype=np.int64)
    steps = (order[start : start + step_size] for start in range(0, len(order), step_size))
    cut = partial(_cut_evenly, lengths=lengths, budget=budget, ranks=ranks, prefixes=prefixes, together=together)
    return _build(map(cut, steps), lengths, budget, ranks, prefixes)


def plan_evaluation(
    lengths: np.ndarray, indices: np.ndarray, *, budget: int, ranks: int = 1, prefixes: Prefixes | None = None
) -> PackPlan:
    """Plans evaluation: all examples in one step, in as few micro-batches as best-fit decreasing finds.

    Micro-batches are in order of decreasing cost, so that ranks that take every `ranks`-th one are evenly loaded.

    Raises:
        ValueError: an example is longer than the budget; the message names its index.
    """
    check_fits(lengths, indices, budget)
    indices = np.asarray(indices, dtype=np.int64)
    members, items = _items(indices, lengths, budget, prefixes)
    bins = best_fit(items.sizes, budget - items.base)
    costs = [sum(items.costs[item] for item in places) for places in bins]
    bins = [bins[at] for at in sorted(range(len(bins)), key=costs.__getitem__, reverse=True)]
    bins += [[] for _ in range(-len(bins) % ranks)]
    steps = [(_examples(bins, members, items), _least(items, budget, ranks))] if len(indices) else []
    return _build(steps, lengths, budget, ranks, prefixes)


def least_bins(lengths: np.ndarray, budget: int) -> int:
    """A lower bound for the number of micro-batches of these lengths if nothing is shared."""
    return -(-int(lengths.sum()) // budget)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `range(n)` that depends only on the seed and the epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def check_fits(lengths: np.ndarray, indices: np.ndarray, budget: int) -> None:
    """Raises `ValueError` if an example has more tokens than the budget, or none."""
    wrong = indices[(lengths[indices] > budget) | (lengths[indices] < 1)]
    if len(wrong):
        named = ", ".join(f"example {index} has {lengths[index]:,} tokens" for index in wrong[:5])
        raise ValueError(
            f"{len(wrong)} of {len(indices)} examples do not fit the budget of {budget:,} tokens: {named}; "
            "raise the budget (packing.budget) or shorten the examples (prompt.max_length)"
        )


def _tree_within(lengths: list[int], shared: list[int], budget: int) -> Tree:
    """The prefix tree of a micro-batch, within the budget.

    Which beginnings are worth a segment depends on the other examples. So the tree of a few examples may have more
    tokens than their part of a larger tree, which the planner counted; sharing every common token never has more.
    """
    tree = grow_tree(lengths, shared)
    return tree if tree.tokens <= budget else grow_tree(lengths, shared, least=1)


Step = tuple[list[np.ndarray], int]  # examples of each micro-batch; the least number of micro-batches


def _items(
    indices: np.ndarray, lengths: np.ndarray, budget: int, prefixes: Prefixes | None
) -> tuple[np.ndarray, Items]:
    """The items to place and the examples that their members refer to, in the order of their tokens if it is known."""
    if prefixes is None or not len(indices):
        return indices, single_items(lengths[indices])
    members = indices[np.argsort(prefixes.rank[indices], kind="stable")]
    shared = prefixes.between(prefixes.rank[members])
    return members, sharing_items(lengths[members].tolist(), shared.tolist(), budget)


def _adjacent(
    indices: np.ndarray, lengths: np.ndarray, budget: int, prefixes: Prefixes | None, together: int
) -> tuple[np.ndarray, Items]:
    """As `_items`, with one item for each `together` adjacent examples."""
    rows = indices.reshape(-1, together)
    shared, order, base = np.zeros_like(rows), np.arange(len(indices)), 0
    if prefixes is not None:
        ranks = prefixes.rank[rows]
        rows = np.take_along_axis(rows, np.argsort(ranks, axis=1), axis=1)
        between = prefixes.between(np.sort(ranks, axis=1).reshape(-1)).reshape(rows.shape)
        shared[:, 1:] = np.where(between >= LEAST_SHARED, np.minimum(between, lengths[rows]), 0)[:, 1:]
        order = np.argsort(prefixes.rank[rows.reshape(-1)], kind="stable")
        common = int(prefixes.between(prefixes.rank[rows.reshape(-1)[order]])[1:].min())
        base = min(common, int(lengths[rows].min())) if common >= LEAST_SHARED else 0
        shared[:, 0] = base
    places = np.argsort(order).reshape(rows.shape)
    items = adjacent_items(lengths[rows], shared, places, base)
    if max(items.sizes, default=0) + base > budget:
        first = int(np.argmax(items.sizes))
        raise ValueError(
            f"the examples {', '.join(map(str, rows[first]))} of one row have {items.sizes[first] + base:,} tokens "
            f"together, more than the budget of {budget:,}: raise packing.budget or lower prompt.max_length"
        )
    return rows.reshape(-1)[order], items


def _cut_evenly(
    indices: np.ndarray, *, lengths: np.ndarray, budget: int, ranks: int, prefixes: Prefixes | None, together: int
) -> Step:
    """Divides a step into the least number of micro-batches (a multiple of `ranks`) that the heuristics find."""
    if together > 1:
        members, items = _adjacent(indices, lengths, budget, prefixes, together)
    else:
        members, items = _items(indices, lengths, budget, prefixes)
    ways = [items]
    # keeping sharers together may need one more micro-batch than separating them
    if together == 1 and len(items.sizes) < len(members):
        ways.append(single_items(lengths[members], items.base))
    count = least = _least(items, budget, ranks)
    while True:
        for way in ways:
            bins = longest_first(way.sizes, way.costs, budget - way.base, count)
            if bins is None:
                packed = best_fit(way.sizes, budget - way.base)
                bins = packed + [[] for _ in range(count - len(packed))] if len(packed) <= count else None
            if bins is not None:
                return _examples(bins, members, way), least
        count += ranks


def _least(items: Items, budget: int, ranks: int) -> int:
    """The least multiple of `ranks` that the tokens need; each micro-batch has the base once."""
    least = max(1, -(-(items.tokens - items.base) // max(1, budget - items.base)))
    return least + -least % ranks


def _examples(bins: list[list[int]], members: np.ndarray, items: Items) -> list[np.ndarray]:
    """The examples of each bin, in the order of `members`."""
    if items.members is not None:
        bins = [[at for item in places for at in items.members[item]] for places in bins]
    return [members[sorted(places)] for places in bins]


def _build(steps: Iterable[Step], lengths: np.ndarray, budget: int, ranks: int, prefixes: Prefixes | None) -> PackPlan:
    examples, micro_ends, step_ends = array("q"), array("q"), array("q")
    tokens, logical, shared, least = array("q"), array("q"), array("i"), 0
    for bins, needed in steps:
        for members in bins:
            examples.frombytes(members.tobytes())
            micro_ends.append(len(examples))
            logical.append(int(lengths[members].sum()))
            tokens.append(logical[-1])
            if prefixes is not None:
                common = prefixes.between(prefixes.rank[members]).tolist()
                shared.extend(common)
                tokens[-1] = _tree_within(lengths[members].tolist(), common, budget).tokens
        step_ends.append(len(micro_ends))
        least += needed
    parts = [np.array(part, dtype=np.int64) for part in (examples, micro_ends, step_ends, tokens, logical)]
    known = None if prefixes is None else np.array(shared, dtype=np.int32)
    plan = PackPlan(parts[0], parts[1], parts[2], parts[3], parts[4], least, budget, ranks, known)
    assert (plan.tokens <= budget).all(), "a micro-batch is over the budget"
    return plan
