"""Probabilities of many rows: packed evaluation in any order, results in the order of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from arena.background import ahead
from arena.config import Recipe
from arena.data.tokens import TokenStore
from arena.distributed import compute_in
from arena.metrics import SWAPPED, softmax
from arena.packing.loader import PackedLoader
from arena.packing.plan import PackPlan, plan_evaluation
from arena.packing.tree import Prefixes
from arena.progress import progress


@torch.inference_mode()
def predict(
    classifier: nn.Module,
    store: TokenStore,
    rows: np.ndarray,
    *,
    budget: int,
    orders: Sequence[int],
    dtype: str,
    prefixes: Prefixes | None = None,
    title: str = "judging",
) -> np.ndarray:
    """Judges rows of a store.

    Args:
        classifier: a `PackedClassifier`.
        rows: which conversations; the result is in this order.
        budget: tokens in a micro-batch at most.
        orders: which orders of A and B to judge, and average: 0 as the row stands, 1 exchanged; the store holds them.
        dtype: compute dtype.
        prefixes: what the store's examples share, which is then computed once; None shares nothing.

    Returns:
        float64 (len(rows), 3), rows that sum to 1.

    Raises:
        FloatingPointError: a logit that is not finite; the row is named.
    """
    assert max(orders) < store.orders, "the store does not hold these orders"
    examples = (np.asarray(rows)[:, None] * store.orders + np.asarray(orders)).reshape(-1)
    plan = plan_evaluation(store.lengths, examples, budget=budget, prefixes=prefixes)
    logits = np.empty((len(examples), 3), dtype=np.float32)
    logits[_places(plan.examples, examples, len(store))] = _logits(classifier, store, plan, dtype, title)
    _check(logits, rows, len(orders))
    probabilities = softmax(logits).reshape(len(rows), len(orders), 3)
    for at, order in enumerate(orders):
        if order == 1:
            probabilities[:, at] = probabilities[:, at][:, SWAPPED]
    return np.asarray(probabilities.mean(axis=1))


def _logits(classifier: nn.Module, store: TokenStore, plan: PackPlan, dtype: str, title: str) -> np.ndarray:
    """float32 (n, 3), in the order of the plan."""
    device = next(classifier.parameters()).device
    loader = PackedLoader(store, None, plan, pin=device.type == "cuda")
    was_training = classifier.training
    classifier.eval()
    found: list[Tensor] = []  # left on the device until the end, so that it never waits for a copy
    with progress(title, len(plan.examples), "examples") as advance:
        for micro_batch in ahead(loader.micro_batches()):
            with compute_in(device, dtype):
                found.append(classifier(micro_batch.to(device)))
            advance(micro_batch.batch_size)
    classifier.train(was_training)
    return torch.cat(found).float().cpu().numpy() if found else np.empty((0, 3), dtype=np.float32)


def _places(planned: np.ndarray, examples: np.ndarray, n: int) -> np.ndarray:
    """Where each planned example stands among `examples`."""
    place = np.full(n, -1, dtype=np.int64)
    place[examples] = np.arange(len(examples))
    return np.asarray(place[planned])


def predict_or_prior(
    classifier: nn.Module,
    store: TokenStore,
    rows: np.ndarray,
    judgeable: np.ndarray,
    prior: np.ndarray,
    recipe: Recipe,
    prefixes: Prefixes | None,
    straight: np.ndarray | None = None,
) -> np.ndarray:
    """`predict` by a recipe's settings; rows that have nothing to judge get the prior.

    Args:
        judgeable: bool (len(rows),).
        prior: (3,).
        prefixes: as in `predict`.
        straight: the judgeable rows' probabilities in straight order, where they are known already.
    """
    result = np.tile(prior, (len(rows), 1))
    orders = [order for order in range(1 + recipe.judge.swap) if order > 0 or straight is None]
    if judgeable.any() and orders:
        result[judgeable] = predict(
            classifier, store, np.asarray(rows)[judgeable],
            budget=recipe.packing.budget, orders=orders, dtype=recipe.model.dtype,
            prefixes=prefixes,
        )  # fmt: skip
    if straight is not None:
        result[judgeable] = (result[judgeable] + straight) / 2 if orders else straight
    return result


def _check(logits: np.ndarray, rows: np.ndarray, orders: int) -> None:
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise FloatingPointError(
            f"{len(bad)} of {len(logits)} examples got logits that are not finite, first row {rows[bad[0] // orders]}"
        )
