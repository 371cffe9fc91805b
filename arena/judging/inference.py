"""Probabilities of many rows: packed evaluation in any order, results in the order of the rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from arena.config import Recipe
from arena.data.tokens import TokenStore
from arena.distributed import compute_in
from arena.metrics import SWAPPED, softmax
from arena.packing.loader import PackedLoader
from arena.packing.plan import plan_evaluation
from arena.progress import progress


@torch.inference_mode()
def predict(
    classifier: nn.Module,
    store: TokenStore,
    rows: np.ndarray,
    *,
    budget: int,
    swap: bool,
    dtype: str,
    title: str = "judging",
) -> np.ndarray:
    """Judges rows of a store.

    Args:
        classifier: a `PackedClassifier`.
        rows: which conversations; the result is in this order.
        budget: tokens in a micro-batch at most.
        swap: judge both orders and average; the store must hold both.
        dtype: compute dtype.

    Returns:
        float64 (len(rows), 3), rows that sum to 1.

    Raises:
        FloatingPointError: a logit that is not finite; the row is named.
    """
    assert not swap or store.orders == 2, "the store holds one order only"
    orders = 2 if swap else 1
    examples = (np.asarray(rows)[:, None] * store.orders + np.arange(orders)).reshape(-1)
    logits = np.empty((len(examples), 3), dtype=np.float32)
    place = np.full(len(store), -1, dtype=np.int64)
    place[examples] = np.arange(len(examples))
    loader = PackedLoader(store, None, plan_evaluation(store.lengths, examples, budget=budget))
    device = next(classifier.parameters()).device
    was_training = classifier.training
    classifier.eval()
    with progress(title, len(examples), "examples") as advance:
        for batch in loader:
            for micro_batch in batch:
                with compute_in(device, dtype):
                    result = classifier(micro_batch.to(device))
                logits[place[micro_batch.index.numpy()]] = result.float().cpu().numpy()
                advance(micro_batch.batch_size)
    classifier.train(was_training)
    _check(logits, rows, orders)
    probabilities = softmax(logits).reshape(len(rows), orders, 3)
    if swap:
        probabilities[:, 1] = probabilities[:, 1][:, SWAPPED]
    return np.asarray(probabilities.mean(axis=1))


def predict_or_prior(
    classifier: nn.Module, store: TokenStore, rows: np.ndarray, judgeable: np.ndarray, prior: np.ndarray, recipe: Recipe
) -> np.ndarray:
    """`predict` by a recipe's settings; rows that have nothing to judge get the prior.

    Args:
        judgeable: bool (len(rows),).
        prior: (3,).
    """
    result = np.tile(prior, (len(rows), 1))
    if judgeable.any():
        result[judgeable] = predict(
            classifier, store, np.asarray(rows)[judgeable],
            budget=recipe.packing.budget, swap=recipe.judge.swap, dtype=recipe.model.dtype,
        )  # fmt: skip
    return result


def _check(logits: np.ndarray, rows: np.ndarray, orders: int) -> None:
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise FloatingPointError(
            f"{len(bad)} of {len(logits)} examples got logits that are not finite, first row {rows[bad[0] // orders]}"
        )
