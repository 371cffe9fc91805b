"""What a judge says of some answers to a prompt, and of one row in detail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

STEPS, CLOSE = 10_000, 1e-10  # of the fit of strengths at most, and the change at which it ends


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
        is_read: whether there is anything to read; otherwise the probabilities are mean labels of training rows.
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


def ranking(pairs: np.ndarray, ties: np.ndarray | float, tokens: int, logical_tokens: int) -> Ranking:
    """The ranking of answers by all their pairs (0, 1), (0, 2), ..., (1, 2), ...

    Args:
        pairs: (k (k - 1) / 2,), the probability that the first of each pair is preferred.
        ties: the same of a tie.
    """
    k = (1 + math.isqrt(1 + 8 * len(pairs))) // 2
    first, second = np.triu_indices(k, 1)
    wins = np.full((k, k), 0.5)
    wins[first, second] = pairs + ties / 2
    wins[second, first] = 1 - wins[first, second]
    strong = strengths(wins)
    return Ranking(np.argsort(-strong, kind="stable"), strong, wins, tokens, logical_tokens)


def strengths(wins: np.ndarray) -> np.ndarray:
    """The strengths of a Bradley-Terry model, with mean 0, by the minorisation-maximisation of Hunter (2004).

    Args:
        wins: float64 (k, k), how often i was preferred to j, as in `Ranking.wins`; more than 0 outside the diagonal.
    """
    pairs = (wins + wins.T) * (1 - np.eye(len(wins)))
    won, found = (wins * (1 - np.eye(len(wins)))).sum(axis=1), np.ones(len(wins))
    for _ in range(STEPS):
        former, found = found, won / (pairs / (found[:, None] + found)).sum(axis=1)
        found /= np.exp(np.log(found).mean())
        if np.abs(np.log(found / former)).max() < CLOSE:
            break
    return np.log(found)
