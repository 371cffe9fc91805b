"""Probabilities of many rows: evaluated in packed batches of any order, returned in the order of the rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from arena.background import ahead
from arena.config import Recipe
from arena.data.tokens import TokenStore
from arena.distributed import compute_in
from arena.inference.logits_cache import SECONDS, LogitsCache, PlanLogits
from arena.metrics import SWAPPED, softmax
from arena.packing.loader import PackedLoader
from arena.packing.plan import PackPlan, plan_evaluation
from arena.packing.tree import Prefixes
from arena.progress import progress
from arena.stopping import Stop
from arena.storage.files import fingerprint


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
    ids: Sequence[str] | None = None,
    logits_cache: LogitsCache | None = None,
    stop: Stop | None = None,
) -> np.ndarray:
    """Judges rows of a store.

    Args:
        classifier: a `PackedClassifier`.
        rows: which conversations; the result is in this order. A row that is listed twice is judged once.
        budget: the most tokens in a micro-batch.
        orders: the orders of A and B to judge and average: 0 as the row stands, 1 exchanged; the store must hold them.
        dtype: compute dtype.
        prefixes: what the store's examples share, which is then computed once; None shares nothing.
        ids: the ids of the store's rows, for messages.
        logits_cache: stores logits as they are computed, and supplies those of an earlier, identical call. The
            probabilities are bit for bit the same as without it.
        stop: is checked after each micro-batch.

    Returns:
        float64 (len(rows), 3), rows that sum to 1.

    Raises:
        FloatingPointError: a logit is not finite; the message names the row, and its micro-batch is not cached.
        Stopped: `stop` was requested; the logits computed so far are cached.
        OSError: logits could not be written to the cache.
        ValueError: another process is judging the same rows with the same `logits_cache`.
    """
    assert max(orders) < store.orders, "the store does not hold these orders"
    rows = np.asarray(rows, dtype=np.int64)
    once, place = _first_places(rows)
    examples = (once[:, None] * store.orders + np.asarray(orders)).reshape(-1)
    plan = plan_evaluation(store.lengths, examples, budget=budget, prefixes=prefixes)
    facts = {"tokens": store.fingerprint, "rows": fingerprint(once.tobytes()), "dtype": dtype, "budget": budget}
    facts |= {"orders": list(orders), "of_orders": store.orders}
    with nullcontext() if logits_cache is None else logits_cache.open(plan, facts) as cached:
        seconds = SECONDS if logits_cache is None else logits_cache.seconds
        collector = _LogitsCollector(plan, cached, seconds, lambda example: _named(example // store.orders, ids))
        _judge(classifier, store, plan, dtype, title, collector, stop)
    logits = collector.complete()[_places(plan.examples, examples, len(store))]
    probabilities = softmax(logits).reshape(len(once), len(orders), 3)
    for at, order in enumerate(orders):
        if order == 1:
            probabilities[:, at] = probabilities[:, at][:, SWAPPED]
    return np.asarray(probabilities.mean(axis=1)[place])


class _LogitsCollector:
    """Collects the logits of a plan in its order, and checks and caches them every few seconds.

    In between they stay on the device, so that it never waits for a copy.
    """

    def __init__(self, plan: PackPlan, cached: PlanLogits | None, seconds: float, name: Callable[[int], str]) -> None:
        self.plan, self.cached, self.seconds, self.name = plan, cached, seconds, name
        self.logits = np.full((len(plan.examples), 3), np.nan, dtype=np.float32) if cached is None else cached.logits
        self.known = np.zeros(plan.n_micro_batches, dtype=bool) if cached is None else cached.known
        self.todo = np.flatnonzero(~self.known).tolist()
        self._waiting: list[tuple[int, Tensor]] = []
        self._since = time.monotonic()

    def add(self, micro_batch: int, logits: Tensor) -> None:
        """Adds the float (n, 3) logits of a micro-batch."""
        assert logits.shape == (len(self.plan.micro_batch(micro_batch)), 3), "every example has three logits"
        self._waiting.append((micro_batch, logits))
        if time.monotonic() - self._since >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Checks and caches the logits added since the last call."""
        self._since = time.monotonic()
        if not self._waiting:
            return
        indices = [index for index, _ in self._waiting]
        values = torch.cat([logits for _, logits in self._waiting]).float().cpu().numpy()
        ends = np.cumsum([0, *(len(logits) for _, logits in self._waiting)])
        finite = np.isfinite(values).all(axis=1)
        good = [at for at in range(len(indices)) if finite[ends[at] : ends[at + 1]].all()]
        for at in good if self.cached is None else []:
            self._put(indices[at], values[ends[at] : ends[at + 1]])
        if self.cached is not None and good:
            self.cached.add(
                [indices[at] for at in good], np.concatenate([values[ends[at] : ends[at + 1]] for at in good])
            )
        self._waiting.clear()
        if not finite.all():
            self._refuse(np.concatenate([self.plan.micro_batch(index) for index in indices])[~finite], len(values))

    def complete(self) -> np.ndarray:
        """The finite float32 (n, 3) logits of every example of the plan."""
        assert self.known.all() and np.isfinite(self.logits).all(), "an example got no logits"
        return self.logits

    def _put(self, index: int, values: np.ndarray) -> None:
        end = int(self.plan.micro_ends[index])
        self.logits[end - len(values) : end], self.known[index] = values, True

    def _refuse(self, examples: np.ndarray, count: int) -> None:
        raise FloatingPointError(
            f"{len(examples)} of {count} examples got logits that are not finite, first {self.name(int(examples[0]))}: "
            "check that row; if there is nothing unusual about it, judge with model.dtype=float32"
        )


def _judge(
    classifier: nn.Module,
    store: TokenStore,
    plan: PackPlan,
    dtype: str,
    title: str,
    collector: _LogitsCollector,
    stop: Stop | None,
) -> None:
    """Computes the micro-batches that are to do. Whatever ends it early, those that were complete are cached."""
    device = next(classifier.parameters()).device
    loader = PackedLoader(store, None, plan, pin=device.type == "cuda")
    was_training = classifier.training
    classifier.eval()
    try:
        known = len(plan.examples) - sum(len(plan.micro_batch(index)) for index in collector.todo)
        with progress(title, len(plan.examples), "examples", known) as advance:
            for index, micro_batch in zip(collector.todo, ahead(map(loader.micro_batch, collector.todo)), strict=True):
                with compute_in(device, dtype):
                    collector.add(index, classifier(micro_batch.to(device)))
                advance(micro_batch.batch_size)
                if stop is not None and stop():
                    raise stop.stopped()
    finally:
        classifier.train(was_training)
        collector.flush()


def _first_places(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows in the order of their first occurrence, and the index among them of each of `rows`."""
    _, first, which = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return rows[first[order]], place[which.reshape(-1)]


def _places(planned: np.ndarray, examples: np.ndarray, n: int) -> np.ndarray:
    """The position of each of `examples` in the plan."""
    place = np.full(n, -1, dtype=np.int64)
    place[planned] = np.arange(len(planned))
    assert len(planned) == len(examples) and (place[examples] >= 0).all(), "the plan has other examples"
    return np.asarray(place[examples])


def _named(row: int, ids: Sequence[str] | None) -> str:
    return f"row {row}" if ids is None else f"row {row}, id {ids[row]!r}"


def predict_or_prior(
    classifier: nn.Module,
    store: TokenStore,
    rows: np.ndarray,
    has_responses: np.ndarray,
    prior: np.ndarray,
    recipe: Recipe,
    prefixes: Prefixes | None,
    straight: np.ndarray | None = None,
    *,
    ids: Sequence[str] | None = None,
    logits_cache: LogitsCache | None = None,
    stop: Stop | None = None,
) -> np.ndarray:
    """Calls `predict` with a recipe's settings; rows without any response get the prior.

    Args:
        has_responses: bool (len(rows),), as from `rows_with_responses`.
        prior: (3,).
        prefixes, ids, logits_cache, stop: as in `predict`.
        straight: the probabilities, in straight order, of the rows with responses, if they are already known.
    """
    result = np.tile(prior, (len(rows), 1))
    orders = [order for order in range(1 + recipe.judge.swap) if order > 0 or straight is None]
    if has_responses.any() and orders:
        result[has_responses] = predict(
            classifier, store, np.asarray(rows)[has_responses],
            budget=recipe.packing.budget, orders=orders, dtype=recipe.model.dtype,
            prefixes=prefixes, ids=ids, logits_cache=logits_cache, stop=stop,
        )  # fmt: skip
    if straight is not None:
        result[has_responses] = (result[has_responses] + straight) / 2 if orders else straight
    return result
