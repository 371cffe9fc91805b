"""Scores of held-out rows: each metric with an interval, and log-loss and accuracy on slices of the rows.

Rows that share a prompt are one group of the intervals, because they are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from arena.data.prepare import FoldData
from arena.data.task import Masks, Task
from arena.metrics import Score, Terms, agreement, estimate
from arena.training.held_out import Predictions


def score_tables(
    data: FoldData, best: Predictions, last: Predictions, base: np.ndarray | None = None
) -> dict[str, Any]:
    """What `metrics.json` says of the held-out rows besides the plain metrics.

    `scores` has the metrics of the best checkpoint, which was chosen on the same rows, and `last_step_scores` those of
    the last one, which was not. `slices` has the log-loss and accuracy of the best one on each slice, with the prior's,
    or those of the `base`, as in `held_out.scores`.
    """
    examples, labels = data.eval_rows * data.store.orders, data.labels[data.eval_rows]
    cut = data.store.tokens_cut[examples]
    slices = {**token_slices(data.store.lengths[examples] + cut, cut), **data.task.slices(data.held_out.table)}
    groups = data.held_out.groups()
    compared = ("prior", np.tile(data.prior, (len(labels), 1))) if base is None else ("base", base)
    of_best = of_means(data.task, estimate(_terms(data, best), groups))
    of_last = of_best if last is best else of_means(data.task, estimate(_terms(data, last), groups))
    return {
        "scores": {name: asdict(score) for name, score in of_best.items()},
        "last_step_scores": {name: asdict(score) for name, score in of_last.items()},
        "slices": slice_scores(data.task, labels, best.probabilities, compared, slices, groups),
    }


def _terms(data: FoldData, predictions: Predictions) -> dict[str, Terms]:
    """Those of `score_terms`, and of the flip rate if several orders were judged."""
    terms = score_terms(data.task, data.labels[data.eval_rows], predictions.probabilities, data.prior)
    if predictions.flipped is not None:
        terms["flip_rate"] = predictions.flipped, data.has_input[data.eval_rows]
    return terms


def score_terms(
    task: Task, labels: np.ndarray, probabilities: np.ndarray, prior: np.ndarray
) -> dict[str, Terms]:  # fmt: skip
    """Of the task's metrics, and of agreement and what it is compared with.

    Args:
        prior: (C,), whose most probable class is what agreement is compared with.
    """
    terms = {
        name: (metric.terms(labels, probabilities), metric.weights(probabilities))
        for name, metric in task.metrics.items()
    }
    if not task.classes:
        return terms
    ones = np.ones(len(labels))
    terms["agreement"] = agreement.terms(labels, probabilities), ones
    terms["agreement_base_rate"] = labels[:, prior.argmax()], ones
    if task.tie is not None:
        tie = task.classes.index(task.tie)
        voted = probabilities.argmax(axis=1) != tie
        weights = (1 - labels[:, tie]) * voted
        most = np.delete(prior, tie).argmax()
        terms["agreement_without_ties"] = agreement.terms(labels, probabilities) * voted, weights
        terms["agreement_without_ties_base_rate"] = np.delete(labels, tie, axis=1)[:, most] * voted, weights
    return terms


def of_means(task: Task, scores: Mapping[str, Score]) -> dict[str, Score]:
    """The scores of weighted means as those of the task's metrics."""
    found = dict(scores)
    for name in task.metrics.keys() & scores.keys():
        score, of_mean = scores[name], task.metrics[name].of_mean
        low, high = (None if end is None else of_mean(end) for end in (score.low, score.high))
        found[name] = Score(of_mean(score.value), low, high, score.rows)
    return found


def token_slices(tokens: np.ndarray, cut: np.ndarray) -> dict[str, Masks]:
    """Thirds by the number of tokens before truncation, and what was truncated.

    Args:
        tokens, cut: int (n,), of each row before truncation, and how many of them were cut.
    """
    third = np.searchsorted(np.quantile(tokens, [1 / 3, 2 / 3]), tokens)
    lengths = {name: third == at for at, name in enumerate(("shortest third", "middle third", "longest third"))}
    return {"length": lengths, "truncation": {"whole": cut == 0, "cut": cut > 0}}


def slice_scores(
    task: Task, labels: np.ndarray, probabilities: np.ndarray, compared: tuple[str, np.ndarray],
    slices: Mapping[str, Masks], groups: Sequence[str],
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """By property and value, the scores of the rows that have it; values that no row has are left out.

    Args:
        compared: the name of what is scored beside the probabilities, prior or base, and what it predicts.
    """
    other, others = compared
    metrics = {name: metric for name, metric in task.metrics.items() if name in ("log_loss", "accuracy")}
    terms = {}
    for name, metric in metrics.items():
        terms[name] = metric.terms(labels, probabilities), metric.weights(probabilities)
        terms[f"{other}_{name}"] = metric.terms(labels, others), metric.weights(others)
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
