"""Metrics of probabilities: log-loss, accuracy, agreement, Brier score and calibration errors, with intervals.

The intervals are 95% intervals of a bootstrap over groups: rows of a group are drawn together. A mean gets the
percentile interval. Calibration errors are sums of absolute values, which noise makes larger (Kumar et al., 2019,
arXiv:1909.10155), and drawing rows again adds as much noise once more: they get the basic interval, which takes that
off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from scipy import special
from scipy.sparse import csr_matrix

SMALLEST = 1e-15  # probabilities are clipped to at least this, as the competition's scorer does
BINS = 15  # of calibration errors
RESAMPLES, SEED = 1000, 0
LEVEL = 0.95
AT_ONCE = 2**22  # counts of groups that are drawn at once, which take 32 MiB

Terms = tuple[np.ndarray, np.ndarray]  # of a metric, (n,) or (n, k), and the weight of each row, (n,)


class Metric:
    """A metric of labels and probabilities, both (n, C): rows that sum to 1; labels may be soft.

    Its value comes from sums over rows alone, so that it can be computed for many resamples of the rows at once: the
    absolute sums of its terms, added up, over the sum of the rows' weights; then `of_mean` of that.

    Args:
        terms: the terms of each row, (n,) or (n, k), from labels and probabilities.
        higher_is_better: whether a larger value is a better one.
    """

    def __init__(
        self, terms: Callable[[np.ndarray, np.ndarray], np.ndarray], *, higher_is_better: bool = False
    ) -> None:  # fmt: skip
        self.terms, self.higher_is_better = terms, higher_is_better
        update_wrapper(self, terms)

    def weights(self, probabilities: np.ndarray) -> np.ndarray:
        """float64 (n,), how much each row counts: all the same."""
        return np.ones(len(probabilities))

    def of_mean(self, mean: float) -> float:
        """The value as an increasing function of the weighted mean: the mean itself."""
        return mean

    def check(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Raises `ValueError` if there are no rows, the shapes differ, or a number is not finite."""
        _check(labels, probabilities)

    def __call__(self, labels: np.ndarray, probabilities: np.ndarray) -> float:
        """The metric's value. Raises `ValueError` as `check` does."""
        self.check(labels, probabilities)
        sums = self.terms(labels, probabilities).sum(axis=0)
        return self.of_mean(float(np.abs(sums).sum() / self.weights(probabilities).sum()))


class TokenMetric(Metric):
    """A metric of predicted tokens, the mean over the tokens of all rows.

    In place of probabilities it takes (n, 2): the sum over a row's tokens, and their number. There are no labels.
    """

    def weights(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities[:, 1]

    def check(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        if not np.isfinite(probabilities).all() or not probabilities[:, 1].any():
            raise ValueError(f"{len(probabilities)} rows have no tokens to predict, or numbers that are not finite")


@Metric
def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Mean cross entropy in nats."""
    return np.asarray(-(labels * np.log(np.clip(probabilities, SMALLEST, 1.0))).sum(axis=1))


class Perplexity(TokenMetric):
    """A metric of predicted tokens, e to the power of the mean."""

    def of_mean(self, mean: float) -> float:
        return math.exp(mean)


@TokenMetric
def token_log_loss(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Mean negative log-likelihood of a predicted token in nats."""
    return predictions[:, 0]


@Perplexity
def perplexity(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """e to the power of the mean negative log-likelihood of a predicted token."""
    return predictions[:, 0]


@partial(Metric, higher_is_better=True)
def accuracy(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The share of rows whose most probable class is the label's most probable class."""
    return np.asarray(labels.argmax(axis=1) == probabilities.argmax(axis=1))


@partial(Metric, higher_is_better=True)
def agreement(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """How often the most probable class is one drawn from the label; with one-hot labels, the accuracy."""
    return np.asarray(labels[np.arange(len(labels)), probabilities.argmax(axis=1)])


@Metric
def brier(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Brier score, the mean squared distance to the label: from 0 to 2, or to 1 with two classes, as scikit-learn."""
    squares = ((probabilities - labels) ** 2).sum(axis=1)
    return np.asarray(squares / 2 if labels.shape[1] == 2 else squares)


@Metric
def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Expected calibration error of the top class, in equal-width bins (Guo et al., 2017, arXiv:1706.04599)."""
    confidence = probabilities.max(axis=1)
    right = labels[np.arange(len(labels)), probabilities.argmax(axis=1)]
    return _by_bin(right - confidence, np.minimum((confidence * BINS).astype(int), BINS - 1))


@Metric
def classwise_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Calibration error of each class in bins of equally many rows, the mean over classes.

    It is the adaptive calibration error of Nixon et al. (2019, arXiv:1904.01685). Equal probabilities share a bin.
    """
    gaps = labels - probabilities
    columns = [_by_bin(gap, equal_mass(p)) for gap, p in zip(gaps.T, probabilities.T, strict=True)]
    return np.asarray(np.hstack(columns) / labels.shape[1])


def equal_mass(values: np.ndarray) -> np.ndarray:
    """The bin of each value, from 0 to BINS - 1."""
    return np.asarray(np.searchsorted(np.quantile(values, np.arange(1, BINS) / BINS), values, side="right"))


def _by_bin(gaps: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(n, BINS): each row's gap in the column of its bin, and 0 in the others."""
    terms = np.zeros((len(gaps), BINS))
    terms[np.arange(len(gaps)), place] = gaps
    return terms


METRICS: Mapping[str, Metric] = MappingProxyType(  # of tasks with classes
    {
        "log_loss": log_loss, "accuracy": accuracy, "brier": brier, "ece": calibration_error,
        "classwise_ece": classwise_calibration_error,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Score:
    """A metric of some rows.

    Attributes:
        low, high: the ends of its interval; None if the rows are of one group, which cannot be resampled.
            That of a calibration error may lie below the value.
        rows: how many rows count.
    """

    value: float
    low: float | None
    high: float | None
    rows: int


def estimate(terms: Mapping[Any, Terms], groups: Sequence[str]) -> dict[Any, Score]:
    """Metrics with intervals, all from the same resamples. A metric that no row counts for is left out.

    Args:
        terms: `Metric.terms` by name, 0 for rows that do not count, and the weights of rows.
        groups: the group of each row.
    """
    scores = {}
    for name, (own, drawn) in _resampled(terms, groups).items():
        value = float(_value(own.sum(axis=0)))
        low, high = _interval(value, drawn) if np.count_nonzero(own[:, -1]) > 1 else (None, None)
        scores[name] = Score(value, low, high, int(np.count_nonzero(terms[name][1])))
    return scores


def differences(first: Mapping[Any, Terms], second: Mapping[Any, Terms], groups: Sequence[str]) -> dict[Any, Score]:
    """The metrics of `first` minus those of `second` on the same rows, with percentile intervals."""
    both = {(0, name): each for name, each in first.items()} | {(1, name): each for name, each in second.items()}
    sums, found = _resampled(both, groups), {}
    for name in (name for name in first if (0, name) in sums and (1, name) in sums):
        (one, of_one), (other, of_other) = sums[0, name], sums[1, name]
        value = float(_value(one.sum(axis=0)) - _value(other.sum(axis=0)))
        low, high, rows = None, None, int(np.count_nonzero(first[name][1]))
        if np.count_nonzero(one[:, -1]) > 1:
            kept = (of_one[:, -1] > 0) & (of_other[:, -1] > 0)
            drawn = _value(of_one[kept]) - _value(of_other[kept])
            low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        found[name] = Score(value, low, high, rows)
    return found


def _resampled(terms: Mapping[Any, Terms], groups: Sequence[str]) -> dict[Any, tuple[np.ndarray, np.ndarray]]:
    """By metric that some row counts for, the sums of its terms and weights in each group and in each resample."""
    # sorted, so that the order of the rows does not matter
    numbers, distinct = pd.factorize(np.array(groups, dtype=object), sort=True)
    members = csr_matrix((np.ones(len(numbers)), (numbers, np.arange(len(numbers)))))
    counted = {name: each for name, each in terms.items() if each[1].any()}
    if not counted:
        return {}
    sums = [members @ np.column_stack(each).astype(np.float64) for each in counted.values()]
    every = np.hstack(sums)
    resampled = np.vstack([counts @ every for counts in resamples(len(distinct))])
    drawn = np.split(resampled, np.cumsum([each.shape[1] for each in sums])[:-1], axis=1)
    return dict(zip(counted, zip(sums, drawn, strict=True), strict=True))


def _interval(value: float, resampled: np.ndarray) -> tuple[float, float]:
    """The interval of a metric from the sums of each resample; one may have no row of a small slice."""
    values = _value(resampled[resampled[:, -1] > 0])
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    is_mean = resampled.shape[1] == 2
    return (low, high) if is_mean else (max(0.0, 2 * value - high), max(0.0, 2 * value - low))


def _value(sums: np.ndarray) -> np.ndarray:
    """The metric of sums of its terms and, last, of the weights; a mean may be negative."""
    terms = sums[..., :-1]
    total = terms[..., 0] if terms.shape[-1] == 1 else np.abs(terms).sum(axis=-1)
    return np.asarray(total / sums[..., -1])


def resamples(n_groups: int, rounds: int = RESAMPLES) -> Iterator[np.ndarray]:
    """How often each group is drawn in each resample: float64 (some, n_groups), `rounds` rows in all."""
    rng, at_once = np.random.default_rng(SEED), max(1, AT_ONCE // n_groups)
    for first in range(0, rounds, at_once):
        some = min(at_once, rounds - first)
        drawn = rng.integers(0, n_groups, (some, n_groups)) + n_groups * np.arange(some)[:, None]
        yield np.bincount(drawn.reshape(-1), minlength=some * n_groups).reshape(some, n_groups).astype(np.float64)


def softmax(logits: np.ndarray) -> np.ndarray:
    """The float64 probabilities of logits along the last axis."""
    return np.asarray(special.softmax(logits.astype(np.float64), axis=-1))


def sum_tolerance(classes: int) -> float:
    """How far the sum of that many probabilities may be from 1 if each is rounded to three digits."""
    return classes * 0.0005 + 1e-6


def _check(labels: np.ndarray, probabilities: np.ndarray) -> None:
    if labels.shape != probabilities.shape or labels.ndim != 2 or len(labels) == 0:
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape} cannot be compared")
    for name, values in (("labels", labels), ("probabilities", probabilities)):
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise ValueError(f"{len(bad)} rows of {name} are not finite, first row {bad[0]}: {values[bad[0]].tolist()}")
