"""The held-out rows of a fold: how a checkpoint's weights predict them, and the log-loss by which it is chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from arena.config import Recipe
from arena.data.prepare import FoldData
from arena.distributed import device_name
from arena.inference.evaluate import Evaluation
from arena.inference.logits import LogitsCache
from arena.metrics import log_loss
from arena.packing.tree import Prefixes
from arena.stopping import Stop


class HeldOut:
    """The evaluation of a fold's held-out rows: in their first order during training, in all orders at the end.

    Args:
        identity: what identifies the run, for the cache of logits; None: logits are not cached.
        cache: the folder of that cache.
    """

    def __init__(
        self, recipe: Recipe, data: FoldData, prefixes: Prefixes | None, device: torch.device, cache: Path,
        identity: dict[str, str] | None,
    ) -> None:  # fmt: skip
        self.recipe, self.data, self.device, self.cache, self.identity = recipe, data, device, cache, identity
        self.prefixes = prefixes
        self.has_input = data.has_input[data.eval_rows]
        self._in_first_order = self._evaluation(range(1))

    @property
    def n_scored(self) -> int:
        """The number of held-out rows that have input."""
        return int(self.has_input.sum())

    def log_loss(self, probabilities: np.ndarray) -> float:
        """The log-loss of (n, C) probabilities of the held-out rows, over those that have input."""
        labels = self.data.labels[self.data.eval_rows]
        return log_loss(labels[self.has_input], probabilities[self.has_input])

    def in_first_order(self, classifier: nn.Module, weights: str, stop: Stop | None) -> np.ndarray:
        """The probabilities of all held-out rows, float64 (n, C), from their first order.

        Args:
            weights: the digest of the checkpoint's weights, from whose cached logits this resumes.
        """
        return self._predict(self._in_first_order, classifier, "evaluating", weights, stop)

    def averaged(
        self, in_first_order: np.ndarray, classifier: nn.Module, weights: str, stop: Stop | None
    ) -> np.ndarray:
        """The mean over the orders that inference uses, of which the first is known."""
        orders = self.data.task.orders if self.recipe.judge.swap else 1
        if orders == 1:
            return in_first_order
        others = self._predict(self._evaluation(range(1, orders)), classifier, "judging", weights, stop)
        return np.asarray((in_first_order + (orders - 1) * others) / orders)

    def _evaluation(self, orders: range) -> Evaluation:
        data = self.data
        return Evaluation(
            data.task, data.store, data.eval_rows, orders=orders, packing=self.recipe.packing, prefixes=self.prefixes,
            has_input=data.has_input, ids=data.ids,
        )  # fmt: skip

    def _predict(
        self, evaluation: Evaluation, classifier: nn.Module, title: str, weights: str, stop: Stop | None
    ) -> np.ndarray:
        logits_cache = None
        if self.identity is not None:
            logits_cache = LogitsCache(self.cache, {**self.identity, "weights": weights}, device_name(self.device))
        return evaluation.probabilities(
            classifier, dtype=self.recipe.model.dtype, prior=self.data.prior, title=title, logits_cache=logits_cache,
            stop=stop,
        )  # fmt: skip
