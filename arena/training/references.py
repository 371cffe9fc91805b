"""What a judge's log-loss is compared with: a simple baseline, a blend with it, and the best possible one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.model_selection import GroupKFold

from arena.data.prepare import FoldData
from arena.metrics import SMALLEST, log_loss
from arena.progress import optional
from arena.settings import Recipe

REFERENCES = (
    "recalibrated_log_loss", "baseline_log_loss", "blend_log_loss", "blend_weights", "bayes_log_loss",
    "bayes_log_loss_expected",
)  # fmt: skip
BLEND_FOLDS = 5


def references(recipe: Recipe, data: FoldData, probabilities: np.ndarray) -> dict[str, float | list[float] | None]:
    """The reference scores; None for what cannot be computed.

    `blend_log_loss` is of the judge's `probabilities` of the held-out rows blended with the baseline's, by weights
    that are fitted on other held-out groups; `blend_weights` are those of all held-out rows, the judge's first. As
    weights also set how confident a blend is, `recalibrated_log_loss` is of the judge alone with a weight of its own.
    """
    found: dict[str, float | list[float] | None] = dict.fromkeys(REFERENCES)
    labels, rows = data.labels[data.eval_rows], data.rows
    groups, baseline = data.held_out.groups(), None
    with optional("fitting the plain baseline"):
        train_rows = data.train_rows[data.train_rows < len(rows)]  # without those of extra files
        baseline = data.task.baseline(rows.table, rows.labels, train_rows, data.eval_rows, recipe.seed)
        found["baseline_log_loss"] = None if baseline is None else log_loss(labels, baseline)
    if baseline is not None and len(set(groups)) >= BLEND_FOLDS:
        with optional("blending judge and baseline"):
            both = [probabilities, baseline]
            found["recalibrated_log_loss"] = log_loss(labels, blended_across(labels, both[:1], groups))
            found["blend_log_loss"] = log_loss(labels, blended_across(labels, both, groups))
            found["blend_weights"] = blend_weights(labels, both)
    path = Path(recipe.data.path) / "truth.csv"
    with optional(f"reading {path}", "the report does not show the best possible log-loss"):
        truth = _truth(path, [data.ids[row] for row in data.eval_rows], data.task.columns)
        if truth is not None:
            found |= {"bayes_log_loss": log_loss(labels, truth), "bayes_log_loss_expected": log_loss(truth, truth)}
    return found


def blended_across(labels: np.ndarray, each: Sequence[np.ndarray], groups: Sequence[str]) -> np.ndarray:
    """The blend of several predictions of the same rows, float64 (n, C), in which no row's label sets its own weights.

    The rows are divided by group into `BLEND_FOLDS` folds, and each fold's weights are fitted on the others.
    """
    result = np.zeros_like(labels, dtype=np.float64)
    for fitted, others in GroupKFold(BLEND_FOLDS).split(labels, groups=groups):
        weights = blend_weights(labels[fitted], [one[fitted] for one in each])
        result[others] = blend([one[others] for one in each], weights)
    return result


def blend_weights(labels: np.ndarray, each: Sequence[np.ndarray]) -> list[float]:
    """The weights, at least 0, of the blend with the least log-loss. The loss is convex in them.

    Args:
        labels: (n, C), one-hot or probabilities.
        each: predictions of these rows, each (n, C).
    """
    logs = _logs(each)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        blended = log_softmax(np.tensordot(weights, logs, axes=1), axis=1)
        gradient = ((np.exp(blended) - labels) * logs).sum(axis=(1, 2)) / len(labels)
        return float(-(labels * blended).sum() / len(labels)), gradient

    start = np.full(len(each), 1 / len(each))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(each))
    assert found.success, found.message
    return [float(weight) for weight in found.x]


def blend(each: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted product of predictions, normalised: a logarithmic pool (Genest and Zidek, 1986)."""
    return np.asarray(np.exp(log_softmax(np.tensordot(np.array(weights), _logs(each), axes=1), axis=1)))


def _logs(each: Sequence[np.ndarray]) -> np.ndarray:
    """The logarithms of several predictions: float64 (k, n, C)."""
    return np.asarray(np.log(np.clip(np.stack(each), SMALLEST, 1.0)))


def _truth(path: Path, ids: list[str], columns: tuple[str, ...]) -> np.ndarray | None:
    """The probabilities from which synthetic labels were drawn; None for other rows."""
    if not path.is_file():
        return None
    table = pd.read_csv(path, dtype={"id": str})
    if "id" not in table:
        return None
    table = table.set_index("id")
    if not set(ids) <= set(table.index) or not set(columns) <= set(table.columns):
        return None
    return table.loc[ids, list(columns)].to_numpy(dtype=np.float64)
