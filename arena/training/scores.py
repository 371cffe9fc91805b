"""Scores of held-out rows: each metric with an interval, and log-loss and accuracy on slices of the rows.

The intervals are 95% intervals of a bootstrap over groups: rows that share a prompt are drawn together, because they
are not independent. A mean gets the percentile interval. Calibration errors are sums of absolute values, which noise
makes larger (Kumar et al., 2019, arXiv:1909.10155), and drawing rows again adds as much noise once more: they get the
basic interval, which takes that off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from arena.data.prepare import FoldData
from arena.data.task import Masks
from arena.metrics import agreement
from arena.training.held_out import Predictions

RESAMPLES, SEED = 1000, 0
LEVEL = 0.95
AT_ONCE = 2**22  # counts of groups that are drawn at once, which take 32 MiB

Terms = tuple[np.ndarray, np.ndarray]  # of a metric, (n,) or (n, k), and the weight of each row, (n,)


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


def score_tables(
    data: FoldData, best: Predictions, last: Predictions, base: np.ndarray | None = None
) -> dict[str, Any]:
    """What `metrics.json` says of the held-out rows besides the plain metrics.

    `scores` has the metrics of the best checkpoint, which was chosen on the same rows, and `last_step_scores` those of
    the last one, which was not. `slices` has the log-loss and accuracy of the best one on each slice, with the prior's,
    or those of the `base`, as in `held_out.scores`.
    """
    groups, slices = data.held_out.groups(), {**_token_slices(data), **data.task.slices(data.held_out.table)}
    of_best = _of_means(data, estimate(_terms(data, best), groups))
    of_last = of_best if last is best else _of_means(data, estimate(_terms(data, last), groups))
    return {
        "scores": {name: asdict(score) for name, score in of_best.items()},
        "last_step_scores": {name: asdict(score) for name, score in of_last.items()},
        "slices": _slice_scores(data, best.probabilities, base, slices, groups),
    }


def estimate(terms: Mapping[Any, Terms], groups: Sequence[str]) -> dict[Any, Score]:
    """Metrics with intervals, all from the same resamples. A metric that no row counts for is left out.

    Args:
        terms: `Metric.terms` by name, 0 for rows that do not count, and the weights of rows.
        groups: the group of each row.
    """
    # sorted, so that the order of the rows does not matter
    numbers, distinct = pd.factorize(np.array(groups, dtype=object), sort=True)
    members = csr_matrix((np.ones(len(numbers)), (numbers, np.arange(len(numbers)))))
    counted = {name: each for name, each in terms.items() if each[1].any()}
    if not counted:
        return {}
    sums = [members @ np.column_stack(each).astype(np.float64) for each in counted.values()]
    every = np.hstack(sums)
    resampled = np.vstack([counts @ every for counts in _resamples(len(distinct))])
    ends = np.cumsum([each.shape[1] for each in sums])[:-1]
    scores = {}
    for (name, (_, weights)), own, drawn in zip(counted.items(), sums, np.split(resampled, ends, axis=1), strict=True):
        value = float(_value(own.sum(axis=0)))
        low, high = _interval(value, drawn) if np.count_nonzero(own[:, -1]) > 1 else (None, None)
        scores[name] = Score(value, low, high, int(np.count_nonzero(weights)))
    return scores


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


def _resamples(n_groups: int) -> Iterator[np.ndarray]:
    """How often each group is drawn in each resample: float64 (some, n_groups), `RESAMPLES` rows in all."""
    rng, at_once = np.random.default_rng(SEED), max(1, AT_ONCE // n_groups)
    for first in range(0, RESAMPLES, at_once):
        some = min(at_once, RESAMPLES - first)
        drawn = rng.integers(0, n_groups, (some, n_groups)) + n_groups * np.arange(some)[:, None]
        yield np.bincount(drawn.reshape(-1), minlength=some * n_groups).reshape(some, n_groups).astype(np.float64)


def _terms(data: FoldData, predictions: Predictions) -> dict[str, Terms]:
    """Of the task's metrics, of agreement and what it is compared with, and of the flip rate if orders were judged."""
    task, labels, probabilities = data.task, data.labels[data.eval_rows], predictions.probabilities
    terms = {
        name: (metric.terms(labels, probabilities), metric.weights(probabilities))
        for name, metric in task.metrics.items()
    }
    if not task.classes:
        return terms
    ones = np.ones(len(labels))
    terms["agreement"] = agreement.terms(labels, probabilities), ones
    terms["agreement_base_rate"] = labels[:, data.prior.argmax()], ones
    if task.tie is not None:
        tie = task.classes.index(task.tie)
        voted = probabilities.argmax(axis=1) != tie
        weights = (1 - labels[:, tie]) * voted
        most = np.delete(data.prior, tie).argmax()
        terms["agreement_without_ties"] = agreement.terms(labels, probabilities) * voted, weights
        terms["agreement_without_ties_base_rate"] = np.delete(labels, tie, axis=1)[:, most] * voted, weights
    if predictions.flipped is not None:
        terms["flip_rate"] = predictions.flipped, data.has_input[data.eval_rows]
    return terms


def _of_means(data: FoldData, scores: Mapping[str, Score]) -> dict[str, Score]:
    """The scores of weighted means as those of the task's metrics."""
    found = dict(scores)
    for name in data.task.metrics.keys() & scores.keys():
        score, of_mean = scores[name], data.task.metrics[name].of_mean
        low, high = (None if end is None else of_mean(end) for end in (score.low, score.high))
        found[name] = Score(of_mean(score.value), low, high, score.rows)
    return found


def _token_slices(data: FoldData) -> dict[str, Masks]:
    """Thirds by the number of tokens before truncation, and what was truncated."""
    examples = data.eval_rows * data.store.orders
    cut = data.store.tokens_cut[examples]
    tokens = data.store.lengths[examples] + cut
    third = np.searchsorted(np.quantile(tokens, [1 / 3, 2 / 3]), tokens)
    lengths = {name: third == at for at, name in enumerate(("shortest third", "middle third", "longest third"))}
    return {"length": lengths, "truncation": {"whole": cut == 0, "cut": cut > 0}}


def _slice_scores(
    data: FoldData, probabilities: np.ndarray, base: np.ndarray | None, slices: Mapping[str, Masks],
    groups: Sequence[str],
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """By property and value, the scores of the rows that have it; values that no row has are left out."""
    labels = data.labels[data.eval_rows]
    compared = np.tile(data.prior, (len(labels), 1)) if base is None else base
    metrics = {name: metric for name, metric in data.task.metrics.items() if name in ("log_loss", "accuracy")}
    terms, other = {}, "prior" if base is None else "base"
    for name, metric in metrics.items():
        terms[name] = metric.terms(labels, probabilities), metric.weights(probabilities)
        terms[f"{other}_{name}"] = metric.terms(labels, compared), metric.weights(compared)
    masks = {(kind, value): mask for kind, values in slices.items() for value, mask in values.items()}
    masked = {
        (*at, name): (each * mask, weights * mask)
        for at, mask in masks.items()
        for name, (each, weights) in terms.items()
    }
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for (kind, value, name), score in estimate(masked, groups).items():
        table.setdefault(kind, {}).setdefault(value, {})[name] = asdict(score)
    return table
