"""Probabilities of many rows: packed evaluation in any order, results in the order of the rows."""

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
from arena.files import fingerprint
from arena.judging.shards import SECONDS, Kept, Shards
from arena.metrics import SWAPPED, softmax
from arena.packing.loader import PackedLoader
from arena.packing.plan import PackPlan, plan_evaluation
from arena.packing.tree import Prefixes
from arena.progress import progress
from arena.stopping import Stop


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
    keep: Shards | None = None,
    stop: Stop | None = None,
) -> np.ndarray:
    """Judges rows of a store.

    Args:
        classifier: a `PackedClassifier`.
        rows: which conversations; the result is in this order. A row given twice is judged once.
        budget: tokens in a micro-batch at most.
        orders: which orders of A and B to judge, and average: 0 as the row stands, 1 exchanged; the store holds them.
        dtype: compute dtype.
        prefixes: what the store's examples share, which is then computed once; None shares nothing.
        ids: what people call the rows of the store, for messages.
        keep: where logits are kept as they come, and taken from when the same was asked before; the probabilities are
            the same to the last bit as without.
        stop: asked after each micro-batch.

    Returns:
        float64 (len(rows), 3), rows that sum to 1.

    Raises:
        FloatingPointError: a logit that is not finite; the row is named, and its micro-batch is not kept.
        Stopped: `stop` said so; what was judged till then is kept.
        OSError: logits could not be kept.
        ValueError: another process is judging the same with the same `keep`.
    """
    assert max(orders) < store.orders, "the store does not hold these orders"
    rows = np.asarray(rows, dtype=np.int64)
    once, place = _first_places(rows)
    examples = (once[:, None] * store.orders + np.asarray(orders)).reshape(-1)
    plan = plan_evaluation(store.lengths, examples, budget=budget, prefixes=prefixes)
    facts = {"tokens": store.fingerprint, "rows": fingerprint(once.tobytes()), "dtype": dtype, "budget": budget}
    facts |= {"orders": list(orders), "of_orders": store.orders}
    with nullcontext() if keep is None else keep.opened(plan, facts) as kept:
        seconds = SECONDS if keep is None else keep.seconds
        found = _Found(plan, kept, seconds, lambda example: _named(example // store.orders, ids))
        _judge(classifier, store, plan, dtype, title, found, stop)
    logits = found.complete()[_places(plan.examples, examples, len(store))]
    probabilities = softmax(logits).reshape(len(once), len(orders), 3)
    for at, order in enumerate(orders):
        if order == 1:
            probabilities[:, at] = probabilities[:, at][:, SWAPPED]
    return np.asarray(probabilities.mean(axis=1)[place])


class _Found:
    """The logits of a plan, in its order: checked, and kept, every few seconds.

    Until then they are left on the device, so that it never waits for a copy.
    """

    def __init__(self, plan: PackPlan, kept: Kept | None, seconds: float, name: Callable[[int], str]) -> None:
        self.plan, self.kept, self.seconds, self.name = plan, kept, seconds, name
        self.logits = np.full((len(plan.examples), 3), np.nan, dtype=np.float32) if kept is None else kept.logits
        self.known = np.zeros(plan.n_micro_batches, dtype=bool) if kept is None else kept.known
        self.todo = np.flatnonzero(~self.known).tolist()
        self._waiting: list[tuple[int, Tensor]] = []
        self._since = time.monotonic()

    def add(self, micro_batch: int, logits: Tensor) -> None:
        """Takes the float (n, 3) logits of a micro-batch."""
        assert logits.shape == (len(self.plan.micro_batch(micro_batch)), 3), "every example has three logits"
        self._waiting.append((micro_batch, logits))
        if time.monotonic() - self._since >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Checks and keeps what came since the last time."""
        self._since = time.monotonic()
        if not self._waiting:
            return
        indices = [index for index, _ in self._waiting]
        values = torch.cat([logits for _, logits in self._waiting]).float().cpu().numpy()
        ends = np.cumsum([0, *(len(logits) for _, logits in self._waiting)])
        finite = np.isfinite(values).all(axis=1)
        good = [at for at in range(len(indices)) if finite[ends[at] : ends[at + 1]].all()]
        for at in good if self.kept is None else []:
            self._put(indices[at], values[ends[at] : ends[at + 1]])
        if self.kept is not None and good:
            self.kept.add(
                [indices[at] for at in good], np.concatenate([values[ends[at] : ends[at + 1]] for at in good])
            )
        self._waiting.clear()
        if not finite.all():
            self._refuse(np.concatenate([self.plan.micro_batch(index) for index in indices])[~finite], len(values))

    def complete(self) -> np.ndarray:
        """float32 (n, 3), the logits of every example of the plan, finite."""
        assert self.known.all() and np.isfinite(self.logits).all(), "an example got no logits"
        return self.logits

    def _put(self, index: int, values: np.ndarray) -> None:
        end = int(self.plan.micro_ends[index])
        self.logits[end - len(values) : end], self.known[index] = values, True

    def _refuse(self, examples: np.ndarray, count: int) -> None:
        raise FloatingPointError(
            f"{len(examples)} of {count} examples got logits that are not finite, first {self.name(int(examples[0]))}: "
            "look at that row; if it is like any other, judge with model.dtype=float32"
        )


def _judge(
    classifier: nn.Module, store: TokenStore, plan: PackPlan, dtype: str, title: str, found: _Found, stop: Stop | None
) -> None:
    """Computes the micro-batches that are to do. Whatever ends it early, those that were complete are kept."""
    device = next(classifier.parameters()).device
    loader = PackedLoader(store, None, plan, pin=device.type == "cuda")
    was_training = classifier.training
    classifier.eval()
    try:
        known = len(plan.examples) - sum(len(plan.micro_batch(index)) for index in found.todo)
        with progress(title, len(plan.examples), "examples", known) as advance:
            for index, micro_batch in zip(found.todo, ahead(map(loader.micro_batch, found.todo)), strict=True):
                with compute_in(device, dtype):
                    found.add(index, classifier(micro_batch.to(device)))
                advance(micro_batch.batch_size)
                if stop is not None and stop():
                    raise stop.stopped()
    finally:
        classifier.train(was_training)
        found.flush()


def _first_places(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows without repeats, in the order in which they first come, and where among them each of `rows` stands."""
    _, first, which = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return rows[first[order]], place[which.reshape(-1)]


def _places(planned: np.ndarray, examples: np.ndarray, n: int) -> np.ndarray:
    """Where each of `examples` stands among the planned ones."""
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
    judgeable: np.ndarray,
    prior: np.ndarray,
    recipe: Recipe,
    prefixes: Prefixes | None,
    straight: np.ndarray | None = None,
    *,
    ids: Sequence[str] | None = None,
    keep: Shards | None = None,
    stop: Stop | None = None,
) -> np.ndarray:
    """`predict` by a recipe's settings; rows that have nothing to judge get the prior.

    Args:
        judgeable: bool (len(rows),).
        prior: (3,).
        prefixes, ids, keep, stop: as in `predict`.
        straight: the judgeable rows' probabilities in straight order, where they are known already.
    """
    result = np.tile(prior, (len(rows), 1))
    orders = [order for order in range(1 + recipe.judge.swap) if order > 0 or straight is None]
    if judgeable.any() and orders:
        result[judgeable] = predict(
            classifier, store, np.asarray(rows)[judgeable],
            budget=recipe.packing.budget, orders=orders, dtype=recipe.model.dtype,
            prefixes=prefixes, ids=ids, keep=keep, stop=stop,
        )  # fmt: skip
    if straight is not None:
        result[judgeable] = (result[judgeable] + straight) / 2 if orders else straight
    return result
