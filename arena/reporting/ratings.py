"""Ratings from votes: the Bradley-Terry model, fitted exactly, with bootstrap resamples of whole groups.

The points that A gets of a vote are expected to be sigmoid(s_A - s_B + w . d): s are the models' strengths, d the
differences of style features and w their weights, if there are any. A win gives one point and a tie half a point. So
does the leaderboard of Chatbot Arena (FastChat, `elo_analysis.py`: "one tie => one A win + one B win"), and the points
are all that Davidson's model with ties (1970, JASA 65, 317) takes from a model's votes too. They need no parameter for
the frequency of ties, and a predicted vote enters with its expected points.

Each strength and weight is also given one tie against 0 (a model of average strength), which keeps it finite when a
model only wins or only loses, and moves it by much less than its interval is wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from arena.metrics import AT_ONCE, resamples

PRIOR = 1.0  # ties that each strength and weight is given
STEPS, LARGEST, ENOUGH = 100, 2.0, 1e-6  # of Newton's method; the error is the square of the last step


@dataclass(frozen=True)
class Comparisons:
    """Votes between models.

    Attributes:
        models: the names of the models, each with at least one vote.
        a, b: int64 (n,), the numbers of the models of each vote, which differ.
        points: float64 (n,), A's: 1 for a win, 0.5 for a tie, 0 for a loss, or the expected points of a prediction.
        groups: the group of each vote; votes of a group are drawn together.
        features: the names of features of the answers; there may be none.
        style: float64 (n, len(features)), their differences, A's minus B's.
    """

    models: tuple[str, ...]
    a: np.ndarray
    b: np.ndarray
    points: np.ndarray
    groups: Sequence[str]
    features: tuple[str, ...]
    style: np.ndarray


def fit(votes: Comparisons, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Strengths and weights of style.

    Returns:
        float64 (models + features,): strengths with mean 0, then weights; and (rounds, models + features), the same of
        each resample. A model without votes in a resample is average there.

    Raises:
        FloatingPointError: the fit does not converge.
    """
    n_models, exchanged = len(votes.models), votes.a > votes.b
    pairs = np.sort(np.column_stack([votes.a, votes.b]), axis=1)
    points = np.where(exchanged, 1 - votes.points, votes.points)
    style = np.where(exchanged[:, None], -votes.style, votes.style) + 0.0  # without -0
    distinct, row = np.unique(np.column_stack([pairs, style]), axis=0, return_inverse=True)
    group, names = pd.factorize(np.array(votes.groups, dtype=object), sort=True)
    place, shape = (group, row.reshape(-1)), (len(names), len(distinct))
    counts, scores = (csr_matrix((each, place), shape) for each in (np.ones(len(points)), points))
    model = _Model(distinct[:, :2].astype(np.int64), distinct[:, 2:], n_models)

    every = np.ones((1, len(names)))
    values = model.fitted(every @ counts, every @ scores, np.zeros((1, model.size)))
    at_once = max(1, AT_ONCE // max(len(distinct), model.size**2))
    drawn = [
        model.fitted(some @ counts, some @ scores, values)
        for many in resamples(len(names), rounds)
        for some in np.split(many, range(at_once, len(many), at_once))
    ]
    return values[0], np.vstack(drawn)


class _Model:
    """The Bradley-Terry model of some kinds of votes; each kind is a pair of models with a difference in style."""

    def __init__(self, pairs: np.ndarray, style: np.ndarray, n_models: int) -> None:
        n, k = style.shape
        self.n_models, self.size = n_models, n_models + k
        columns = np.hstack([pairs, np.broadcast_to(np.arange(n_models, self.size), (n, k))])
        values = np.hstack([np.broadcast_to([1.0, -1.0], (n, 2)), style])
        self.design = _sparse(columns, values, self.size)
        places, squares = columns[:, :, None] * self.size + columns[:, None, :], values[:, :, None] * values[:, None, :]
        self.squares = _sparse(places.reshape(n, -1), squares.reshape(n, -1), self.size**2)  # x x^T of each kind

    def fitted(self, counts: np.ndarray, scores: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The maximum for each of some samples, float64 (samples, size), by Newton's method.

        Args:
            counts, scores: (samples, kinds), the votes of each kind, and the sum of their points.
            start: (1, size).
        """
        values, diagonal = np.repeat(start, len(counts), axis=0), np.arange(self.size)
        for _ in range(STEPS):
            expected, tie = expit(values @ self.design.T), expit(values)
            slope = (scores - counts * expected) @ self.design + PRIOR * (0.5 - tie)
            curvature = (counts * expected * (1 - expected)) @ self.squares
            curvature = curvature.reshape(-1, self.size, self.size)
            curvature[:, diagonal, diagonal] += PRIOR * tie * (1 - tie)
            step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
            longest = np.abs(step).max(axis=1, keepdims=True)
            values += step * np.minimum(1.0, LARGEST / np.maximum(longest, ENOUGH))
            if longest.max() < ENOUGH:
                break
        else:
            raise FloatingPointError(f"the ratings do not converge in {STEPS} steps: please report it, with the votes")
        strengths = values[:, : self.n_models]
        strengths -= strengths.mean(axis=1, keepdims=True)
        return values


def _sparse(columns: np.ndarray, values: np.ndarray, width: int) -> csr_matrix:
    """A matrix with equally many values, (n, some), in each row."""
    n, each = columns.shape
    return csr_matrix((values.reshape(-1), columns.reshape(-1), np.arange(0, n * each + 1, each)), (n, width))


def separated(votes: Comparisons) -> list[str]:
    """The models whose distance from most others is limited by no vote, only by the tie that each is given.

    They were not compared with the others, or only won or only lost, alone or as a set (Ford, 1957, Am. Math. Mon. 64,
    28).
    """
    size = len(votes.models)
    beaten = np.concatenate([votes.a, votes.b]), np.concatenate([votes.b, votes.a])
    points = csr_matrix((np.concatenate([votes.points, 1 - votes.points]), beaten), (size, size))
    points.eliminate_zeros()
    sets = connected_components(points, connection="strong")[1]
    return [name for name, each in zip(votes.models, sets, strict=True) if each != np.bincount(sets).argmax()]
