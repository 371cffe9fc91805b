"""What a judge says of some answers to a prompt, and of one row in detail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from arena.data.task import Task

CERTAIN = 1e-9  # the probability of a loss that a certain win counts as
STEPS, LARGEST, CLOSE = 1000, 2.0, 1e-6  # of the fit of strengths, its longest step, and the one at which it ends


@dataclass(frozen=True)
class Ranking:
    """Answers in the order of how good a judge finds them.

    Attributes:
        order: int64 (k,), the numbers of the answers, the best first.
        strengths: float64 (k,), of a Bradley-Terry model of the pairs, with mean 0: answer i is preferred to j with the
            odds e^(strengths[i] - strengths[j]).
        wins: float64 (k, k), the probability that answer i is preferred to j, with half of the ties; 0.5 if i = j.
        tokens: what was computed.
        logical_tokens: the tokens of all prompts, which were computed without what they share.
    """

    order: np.ndarray
    strengths: np.ndarray
    wins: np.ndarray
    tokens: int
    logical_tokens: int


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of rows.

    Attributes:
        mean: float64 (n, C), the probabilities of the classes as of `Judge.predict_proba`.
        by_order: float64 (orders, n, C), as of `Judge.predict_orders`.
        tokens, logical_tokens: as of `Ranking`.
    """

    mean: np.ndarray
    by_order: np.ndarray
    tokens: int
    logical_tokens: int


@dataclass(frozen=True)
class Order:
    """A row in one of its orders.

    Attributes:
        probabilities: by class, as of the row as it was given.
        prompt: what the judge was shown.
        tokens: how many that is.
        turns_dropped: earlier turns that were omitted because the row is too long.
        tokens_cut: tokens that were omitted, with those of dropped turns.
    """

    probabilities: dict[str, float]
    prompt: str
    tokens: int
    turns_dropped: int
    tokens_cut: int


@dataclass(frozen=True)
class Explanation:
    """What a judge makes of a row.

    Attributes:
        probabilities: by class, as of `Judge.predict_proba`.
        orders: the row in each order that the judge reads; of several models, as the first of them is shown it.
        flips: whether the most probable class depends on the order.
        is_read: whether there is anything to read; otherwise the probabilities come from labels of training rows.
        kind: the kind of special rows that it is of; None: of none.
        tokens: what was computed for one model, for all rows that were explained together; what prompts share counts
            once.
        logical_tokens: the tokens of all their prompts.
    """

    probabilities: dict[str, float]
    orders: tuple[Order, ...]
    flips: bool
    is_read: bool
    kind: str | None
    tokens: int
    logical_tokens: int


def ranking(pairs: np.ndarray, read: np.ndarray, tie: int | None, tokens: int, logical_tokens: int) -> Ranking:
    """The ranking of answers by all their pairs (0, 1), (0, 2), ..., (1, 2), ...

    Args:
        pairs: (k (k - 1) / 2, C), the probabilities of each pair; first that of its first answer.
        read: bool, whether a pair has any text; nothing tells two answers without text apart.
        tie: the number of the class of ties, if there is one.
    """
    k = (1 + math.isqrt(1 + 8 * len(pairs))) // 2
    ties = 0.0 if tie is None else pairs[:, tie]
    first, second = np.triu_indices(k, 1)
    wins = np.full((k, k), 0.5)
    wins[first, second] = np.where(read, pairs[:, 0] + ties / 2, 0.5)
    wins[second, first] = 1 - wins[first, second]
    strong = strengths(wins)
    return Ranking(np.argsort(-strong, kind="stable"), strong, wins, tokens, logical_tokens)


def tie_of(task: Task) -> int | None:
    """The number of the class of ties, if a task has one."""
    return None if task.tie is None else task.classes.index(task.tie)


def strengths(wins: np.ndarray) -> np.ndarray:
    """The strengths of a Bradley-Terry model, float64 (k,) with mean 0, by Newton's method.

    Args:
        wins: float64 (k, k), how often i was preferred to j, as in `Ranking.wins`. A certain win counts as one that is
            lost once in a billion times, as its strength would be infinite.
    """
    k, others = len(wins), 1 - np.eye(len(wins))
    shares, found = np.clip(wins, CERTAIN, 1 - CERTAIN), np.zeros(len(wins))
    for _ in range(STEPS):
        expected = expit(found[:, None] - found)
        slope = ((shares - expected) * others).sum(axis=1)
        weights = expected * (1 - expected) * others
        # the constant, which no comparison determines, is kept at 0
        step = np.linalg.solve(np.diag(weights.sum(axis=1)) - weights + weights.max() / k, slope)
        found += step * min(1.0, LARGEST / max(np.abs(step).max(), CLOSE))
        if np.abs(step).max() < CLOSE:
            return np.asarray(found - found.mean())
    raise FloatingPointError(f"the ranking does not converge in {STEPS} steps: {wins.tolist()}")
