"""What a judge's log-loss is compared with: a simple baseline, a blend with it, and the best possible one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from arena.data.prepare import FoldData
from arena.metrics import log_loss
from arena.progress import optional
from arena.settings import Recipe
from arena.training.fit_blend import FOLDS, Parts, cross_predicted, divide, fit_parts

REFERENCES = (
    "recalibrated_log_loss", "baseline_log_loss", "blend_log_loss", "blend_weights", "bayes_log_loss",
    "bayes_log_loss_expected",
)  # fmt: skip
ALONE, BOTH = Parts((0,), temperature=True), Parts((0, 1), temperature=True)


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
        fitted = data.task.fit_baseline(rows.table.select(train_rows), rows.labels[train_rows], recipe.seed)
        baseline = None if fitted is None else fitted(rows.table.select(data.eval_rows))
        found["baseline_log_loss"] = None if baseline is None else log_loss(labels, baseline)
    if baseline is not None and len(set(groups)) >= FOLDS:
        with optional("blending judge and baseline"):
            both = np.stack([probabilities, baseline])
            folds = divide(np.unique(groups, return_inverse=True)[1], recipe.seed)
            for key, parts in (("recalibrated", ALONE), ("blend", BOTH)):
                found[f"{key}_log_loss"] = log_loss(labels, cross_predicted(parts, labels, both, folds))
            found["blend_weights"] = list(fit_parts(BOTH, labels, both).weights)
    path = Path(recipe.data.path) / "truth.csv"
    with optional(f"reading {path}", "the report does not show the best possible log-loss"):
        truth = _truth(path, [data.ids[row] for row in data.eval_rows], data.task.columns)
        if truth is not None:
            found |= {"bayes_log_loss": log_loss(labels, truth), "bayes_log_loss_expected": log_loss(truth, truth)}
    return found


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
