"""Which examples share a micro-batch: integers in, plan out.

Training keeps the examples of an optimizer step together and cuts each step into the least number of micro-batches,
evenly loaded, by longest-processing-time scheduling (Graham, 1969) under a hard cap. Evaluation may put any examples
together and uses best-fit decreasing over the whole set.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from arena.files import fingerprint

# Cost of an example of n tokens, in units of one token's linear layers: n + n^2 / QUADRATIC. On Gemma-2-9B attention
# costs as much as the linear layers at n = 50,000 or so: 4 * 42 layers * 4,096 wide * n / 2 FLOP a token, against
# 2 * 8.3e9.
QUADRATIC = 50_000.0


@dataclass(frozen=True)
class PackPlan:
    """Micro-batches of examples, grouped into steps.

    Attributes:
        examples: int64 (n,), example indices, micro-batch after micro-batch.
        micro_ends: int64 (m,), where each micro-batch ends in `examples`.
        step_ends: int64 (s,), where each step ends in `micro_ends`.
        tokens: int64 (m,), tokens of each micro-batch.
        budget: tokens a micro-batch may hold.
        ranks: every step has a multiple of this many micro-batches; micro-batch i of a step is for rank i % ranks.
    """

    examples: np.ndarray
    micro_ends: np.ndarray
    step_ends: np.ndarray
    tokens: np.ndarray
    budget: int
    ranks: int = 1

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
    def least_micro_batches(self) -> int:
        """No packing of these steps needs fewer micro-batches than this."""
        least = -(-self.step_tokens // self.budget)
        return int((least + -least % self.ranks).sum())

    @property
    def step_tokens(self) -> np.ndarray:
        """int64 (s,), tokens of each step."""
        starts = np.concatenate([[0], self.step_ends[:-1]]).astype(np.int64)
        return np.add.reduceat(self.tokens, starts) if len(starts) else np.zeros(0, dtype=np.int64)

    @property
    def evenness(self) -> np.ndarray:
        """float64 (s,), fewest over most tokens among the micro-batches of each step; 1 is even."""
        parts = np.split(self.tokens, self.step_ends[:-1])
        return np.array([part.min() / max(part.max(), 1) for part in parts])

    @property
    def fingerprint(self) -> str:
        parts = (self.examples, self.micro_ends, self.step_ends)
        return fingerprint(self.budget, self.ranks, *(np.ascontiguousarray(part, np.int64).tobytes() for part in parts))

    def micro_batch(self, index: int) -> np.ndarray:
        """Example indices of one micro-batch; empty where a rank has nothing to do."""
        start = self.micro_ends[index - 1] if index else 0
        return self.examples[start : self.micro_ends[index]]

    def step(self, index: int, rank: int = 0) -> list[np.ndarray]:
        """The micro-batches of one step that are for `rank`; together the ranks have each example once."""
        start = int(self.step_ends[index - 1]) if index else 0
        return [self.micro_batch(at) for at in range(start + rank, int(self.step_ends[index]), self.ranks)]

    def step_size(self, index: int) -> int:
        """Examples in a step, over all ranks."""
        start = int(self.step_ends[index - 1]) if index else 0
        before = self.micro_ends[start - 1] if start else 0
        return int(self.micro_ends[self.step_ends[index] - 1] - before)


def plan_training(lengths: np.ndarray, order: np.ndarray, *, step_size: int, budget: int, ranks: int = 1) -> PackPlan:
    """Plans training: `order` is cut into steps of `step_size` examples, each step into micro-batches.

    Args:
        lengths: tokens of every example.
        order: example indices in the order in which they are to be seen. The last step may be short.

    Raises:
        ValueError: an example is longer than the budget; its index is named.
    """
    check_fits(lengths, order, budget)
    steps = [order[start : start + step_size] for start in range(0, len(order), step_size)]
    return _build((_even_bins(step, lengths[step], budget, ranks) for step in steps), lengths, budget, ranks)


def plan_evaluation(lengths: np.ndarray, indices: np.ndarray, *, budget: int, ranks: int = 1) -> PackPlan:
    """Plans evaluation: all examples in as few micro-batches as best-fit decreasing finds, in one step.

    Micro-batches come in order of falling cost, so that ranks that take every `ranks`-th one are evenly loaded.

    Raises:
        ValueError: an example is longer than the budget; its index is named.
    """
    check_fits(lengths, indices, budget)
    ordered = indices[np.argsort(-lengths[indices], kind="stable")]
    bins = _best_fit(ordered.tolist(), lengths[ordered].tolist(), budget)
    bins.sort(key=lambda members: -float(_cost(lengths[members]).sum()))
    bins += [[] for _ in range(-len(bins) % ranks)]
    return _build([bins] if bins else [], lengths, budget, ranks)


def least_bins(lengths: np.ndarray, budget: int) -> int:
    """No packing of these lengths needs fewer micro-batches than this."""
    return -(-int(lengths.sum()) // budget)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A shuffle of `range(n)` that depends on the seed and the epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def check_fits(lengths: np.ndarray, indices: np.ndarray, budget: int) -> None:
    """Raises `ValueError` where an example has more tokens than a micro-batch may hold, or none."""
    wrong = indices[(lengths[indices] > budget) | (lengths[indices] < 1)]
    if len(wrong):
        named = ", ".join(f"example {index} has {lengths[index]:,} tokens" for index in wrong[:5])
        raise ValueError(
            f"{len(wrong)} of {len(indices)} examples do not fit the budget of {budget:,} tokens: {named}; "
            "raise packing.budget or lower prompt.max_length"
        )


def _cost(lengths: np.ndarray) -> np.ndarray:
    lengths = np.asarray(lengths, dtype=np.float64)
    return lengths + lengths**2 / QUADRATIC


def _even_bins(indices: np.ndarray, lengths: np.ndarray, budget: int, ranks: int) -> list[list[int]]:
    """The least number of bins (a multiple of `ranks`) that the schedule or, where it fails, best-fit can fill."""
    order = np.argsort(-lengths, kind="stable")
    ordered, sizes = indices[order].tolist(), lengths[order].tolist()
    costs = _cost(lengths[order]).tolist()
    count = least_bins(lengths, budget)
    count += -count % ranks
    while True:
        bins = _longest_first(ordered, sizes, costs, budget, count)
        if bins is None:
            packed = _best_fit(ordered, sizes, budget)
            bins = packed + [[] for _ in range(count - len(packed))] if len(packed) <= count else None
        if bins is not None:
            return bins
        count += ranks


def _longest_first(
    indices: list[int], sizes: list[int], costs: list[float], budget: int, count: int
) -> list[list[int]] | None:
    """Each example, the longest first, to the cheapest bin that has room; None when one finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens, loads = [0] * count, [0.0] * count
    for index, size, cost in zip(indices, sizes, costs, strict=True):
        place = min((at for at in range(count) if tokens[at] + size <= budget), key=loads.__getitem__, default=None)
        if place is None:
            return None
        bins[place].append(index)
        tokens[place] += size
        loads[place] += cost
    return bins


def _best_fit(indices: list[int], sizes: list[int], budget: int) -> list[list[int]]:
    """Each example to the fullest bin that has room for it, a new bin where none has."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index, size in zip(indices, sizes, strict=True):
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            bins.append([])
            left, place = budget, len(bins) - 1
        else:
            left, place = room.pop(at)
        bins[place].append(index)
        if left > size:
            bisect.insort(room, (left - size, place))
    return bins


def _build(
    steps: Iterator[list[list[int]]] | list[list[list[int]]], lengths: np.ndarray, budget: int, ranks: int
) -> PackPlan:
    examples: list[int] = []
    micro_ends: list[int] = []
    step_ends: list[int] = []
    tokens: list[int] = []
    for bins in steps:
        for members in bins:
            examples += members
            micro_ends.append(len(examples))
            tokens.append(int(lengths[members].sum()) if members else 0)
        step_ends.append(len(micro_ends))
    parts = [np.asarray(part, dtype=np.int64) for part in (examples, micro_ends, step_ends, tokens)]
    plan = PackPlan(parts[0], parts[1], parts[2], parts[3], budget, ranks)
    assert (plan.tokens <= budget).all(), "a micro-batch is over the budget"
    return plan
