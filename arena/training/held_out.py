"""The held-out rows of a fold: how weights predict them, their scores, and the file of predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from torch import nn

from arena.data.prepare import FoldData
from arena.distributed import device_name
from arena.inference.evaluate import Evaluation
from arena.inference.logits import LogitsCache
from arena.packing.tree import Prefixes
from arena.ranks import on_first_rank, together
from arena.settings import Recipe
from arena.stopping import Stop
from arena.storage.files import atomic_write
from arena.storage.manifest import damage
from arena.training.checkpoint import read_evaluation, write_evaluation


@dataclass(frozen=True)
class Predictions:
    """What the weights of a checkpoint predict for all held-out rows.

    Attributes:
        probabilities: float64 (n, C), the mean over the orders that inference uses; the prior for rows without input.
        flipped: bool (n,), where the most probable class is another one in the other orders; None: there are none.
    """

    probabilities: np.ndarray
    flipped: np.ndarray | None


class HeldOut:
    """The evaluation of a fold's held-out rows: as given during training, in all orders at the end.

    Rows without input are not scored during training, and get the prior at the end.

    Args:
        accelerator: of the ranks that share the rows.
        identity: what identifies the run, for the cache of logits.
        cache: the folder of that cache.
    """

    def __init__(
        self, recipe: Recipe, data: FoldData, prefixes: Prefixes | None, accelerator: Accelerator, cache: Path,
        identity: dict[str, str],
    ) -> None:  # fmt: skip
        self.recipe, self.data, self.accelerator, self.cache, self.identity = recipe, data, accelerator, cache, identity
        self.prefixes = prefixes
        self.has_input = data.has_input[data.eval_rows]
        self.scored = data.eval_rows[self.has_input]
        self._as_given = self._evaluation(range(1))

    def scores(self, probabilities: np.ndarray) -> dict[str, float]:
        """The log-loss of probabilities of the rows `scored`, and the metric that chooses the best checkpoint."""
        labels, metrics = self.data.labels[self.scored], self.data.task.metrics
        names = {"log_loss", self.recipe.train.best_metric}
        return {name: metrics[name](labels, probabilities) for name in sorted(names, key=list(metrics).index)}

    def of_all_rows(self, probabilities: np.ndarray) -> np.ndarray:
        """Those of the rows `scored`, and the prior for the others."""
        every = np.tile(self.data.prior, (len(self.has_input), 1))
        every[self.has_input] = probabilities
        return every

    def predict_as_given(self, classifier: nn.Module, weights: str, stop: Stop | None) -> np.ndarray:
        """The probabilities of the rows `scored`, float64 (n, C), as given.

        Args:
            weights: the digest of the checkpoint's weights, from whose cached logits this resumes.
        """
        return self._predict(self._as_given, classifier, "evaluating", weights, stop)

    def predict_of_base(self, place: Path, classifier: nn.Module, stop: Stop | None) -> np.ndarray:
        """What the base predicts for all held-out rows, float64 (n, C).

        Args:
            place: a folder in which that is saved, so that it is computed once.
            classifier: before anything was trained or loaded into it.
        """
        if not together(self.accelerator, lambda: damage(place) is None)[0]:
            predicted = self.predict_as_given(classifier, "base", stop)
            on_first_rank(self.accelerator, lambda: write_evaluation(place, self.scores(predicted), predicted))
        return self.of_all_rows(read_evaluation(place))

    def predict_averaged(
        self, as_given: np.ndarray, classifier: nn.Module, weights: str, stop: Stop | None
    ) -> Predictions:
        """The predictions in the orders that inference uses; those as given are known."""
        orders, mean, flipped = (self.data.task.orders if self.recipe.judge.swap else 1), as_given, None
        if orders > 1 and not self.data.task.joins(self.recipe.prompt):
            others = self._predict(self._evaluation(range(1, orders)), classifier, "judging", weights, stop)
            mean = (as_given + (orders - 1) * others) / orders
            flipped = np.zeros(len(self.has_input), dtype=bool)
            flipped[self.has_input] = as_given.argmax(axis=1) != others.argmax(axis=1)
        return Predictions(self.of_all_rows(mean), flipped)

    def _evaluation(self, orders: range) -> Evaluation:
        data = self.data
        return Evaluation(
            data.task, data.store, self.scored, orders=orders, budget=self.recipe.packing.budget,
            prefixes=self.prefixes, ids=data.ids, joins=data.task.joins(self.recipe.prompt),
        )  # fmt: skip

    def _predict(
        self, evaluation: Evaluation, classifier: nn.Module, title: str, weights: str, stop: Stop | None
    ) -> np.ndarray:
        machine = device_name(self.accelerator.device)
        return evaluation.probabilities(
            classifier, dtype=self.recipe.model.dtype, title=title, stop=stop, accelerator=self.accelerator,
            logits_cache=LogitsCache(self.cache, {**self.identity, "weights": weights}, machine),
        )  # fmt: skip


def write_oof(path: Path, data: FoldData, probabilities: np.ndarray) -> None:
    """Out-of-fold predictions in the file's order: `id`, the predictions, and any label, as class and as values."""
    labels, task = data.labels[data.eval_rows], data.task
    columns: dict[str, Any] = {"id": [data.ids[row] for row in data.eval_rows]}
    columns |= {name: probabilities[:, at] for at, name in enumerate(task.columns)}
    if task.classes:
        columns["label"] = [task.classes[at] for at in labels.argmax(axis=1)]
        columns |= {f"label_{name}": labels[:, at] for at, name in enumerate(task.columns)}
    table = pd.DataFrame(columns)
    with atomic_write(path) as draft:
        table.to_csv(draft, index=False, lineterminator="\n")


def scores(data: FoldData, probabilities: np.ndarray, base: np.ndarray | None) -> dict[str, Any]:
    """The task's metrics and further scores of the held-out rows, and for comparison the log-loss of the prior, or of
    the base.

    Args:
        base: what the base predicts for them; None if the task has classes.
    """
    labels, metrics = data.labels[data.eval_rows], data.task.metrics
    values = {name: metric(labels, probabilities) for name, metric in metrics.items()}
    values |= data.task.further_scores(labels, probabilities)
    if base is not None:
        return {**values, **{f"base_{name}": metric(labels, base) for name, metric in metrics.items()}}
    return {**values, "prior_log_loss": metrics["log_loss"](labels, np.tile(data.prior, (len(labels), 1)))}
