"""The evaluation of rows: the one way from examples and a model to predictions, in the order of the rows.

The rows are packed in any order that fills the micro-batches. The trainer, its final scores and every judge use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from arena.data.task import Task
from arena.data.tokens import TokenStore
from arena.distributed import compute_in, reusing_memory
from arena.inference.deadline import Pace
from arena.inference.logits import SECONDS, Logits, LogitsCache
from arena.metrics import softmax
from arena.model.classifier import by_example
from arena.packing.loader import PackedLoader
from arena.packing.plan import PackPlan, plan_evaluation
from arena.packing.tree import Prefixes
from arena.progress import ahead, progress
from arena.ranks import in_turns, together
from arena.stopping import Stop
from arena.storage.files import fingerprint


class Evaluation:
    """Rows to evaluate in some of their orders, planned once for any number of models.

    Args:
        store: the tokens of rows; it must hold the orders.
        rows: which rows; the result is in this order. A row that is listed twice is computed once.
        orders: the orders of each row; 0 is as given.
        budget: the most tokens in a micro-batch.
        prefixes: what the store's examples share, which is then computed once; None shares nothing.
        has_input: bool, for each row of the store; rows without input get a prior. None: all have input.
        ids: the ids of the store's rows, for messages.
        joins: whether a row's examples show one side each, and are predicted together (`Task.joins`).
    """

    def __init__(
        self, task: Task, store: TokenStore, rows: np.ndarray, *, orders: Sequence[int], budget: int,
        prefixes: Prefixes | None = None, has_input: np.ndarray | None = None, ids: Sequence[str] | None = None,
        joins: bool = False,
    ) -> None:  # fmt: skip
        self.task, self.store, self.rows, self.orders, self.ids = task, store, rows, orders, ids
        self.joins, self.shown = joins, range(task.orders) if joins else orders
        assert max(self.shown) < store.orders, "the store does not hold these orders"
        self.has_input = np.ones(len(rows), dtype=bool) if has_input is None else has_input[rows]
        self._distinct, self._which = np.unique(np.asarray(rows)[self.has_input], return_inverse=True)
        self._examples = (self._distinct[:, None] * store.orders + np.asarray(self.shown)).reshape(-1)
        self.plan = plan_evaluation(store.lengths, self._examples, budget=budget, prefixes=prefixes)

    def probabilities(self, classifier: nn.Module, **options: Any) -> np.ndarray:
        """A model's predictions, float64 (len(rows), C): the mean over the orders of `by_order`, as its options."""
        return np.asarray(np.mean(self.by_order(classifier, **options), axis=0))

    @torch.no_grad()  # what FSDP gathers in torch's inference mode cannot be used in training afterwards
    def by_order(
        self,
        classifier: nn.Module,
        *,
        dtype: str,
        prior: np.ndarray | None = None,
        title: str = "judging",
        logits_cache: LogitsCache | None = None,
        stop: Stop | None = None,
        pace: Pace | None = None,
        accelerator: Accelerator | None = None,
    ) -> np.ndarray:
        """A model's predictions: probabilities of classes, or without classes what `by_example` gives.

        Args:
            classifier: a `PackedModel`.
            dtype: compute dtype.
            prior: (C,), the predictions of rows without input.
            logits_cache: stores logits as they are computed, and supplies those of an earlier, identical call. The
                probabilities are bit for bit the same as without it.
            stop: is checked after each micro-batch.
            pace: says which micro-batches there is time for, and counts and shows those that are done.
            accelerator: of ranks that call this alike and share the micro-batches; each then has its own parts in the
                cache, and all get the same result, or raise together. None: this process computes them all.

        Returns:
            float64 (len(orders), len(rows), C), each order's as of the row in order 0; C as in `Task.columns`. All
            orders are the same if they are predicted together. NaN for rows for which `pace` had no time.

        Raises:
            FloatingPointError: a logit is not finite; the message names the row, and its micro-batch is not cached.
            Stopped: `stop` was requested; the logits computed so far are cached.
            OSError: logits could not be written to the cache.
            ValueError: another process is evaluating the same rows with the same `logits_cache`.
        """
        assert self.has_input.all() or prior is not None, "rows without input need a prior"
        result = np.empty((len(self.orders), len(self.rows), len(self.task.columns)))
        if prior is not None:
            result[:, ~self.has_input] = prior
        if not len(self._examples):
            return result
        rows = fingerprint(self._distinct.tobytes())
        facts = {"tokens": self.store.fingerprint, "rows": rows, "dtype": dtype, "budget": self.plan.budget}
        facts |= {"orders": list(self.shown), "of_orders": self.store.orders}

        def compute(plan: PackPlan) -> np.ndarray:
            with nullcontext() if logits_cache is None else logits_cache.open(plan, facts) as parts:
                logits = Logits(plan, len(self.task.columns), parts)
                seconds = logits_cache.seconds if logits_cache else SECONDS
                own = partial(self._compute, classifier, dtype, title, logits, stop, seconds, pace)
                in_turns(classifier, own, partial(self._idle, classifier, dtype))
            return logits.complete() if pace is None else logits.values

        shares, values = _by_ranks(self.plan, compute, accelerator)
        places = _places(np.concatenate([plan.examples for plan in shares]), self._examples, len(self.store))
        self._fill(result, np.concatenate(values)[places])
        return result

    def _fill(self, result: np.ndarray, ordered: np.ndarray) -> None:
        """Writes what `by_order` returns for rows with input, given the logits of their examples in order."""
        by_row = ordered.astype(np.float64).reshape(len(self._distinct), len(self.shown), -1)
        if self.joins:
            result[:, self.has_input] = softmax(self.task.join(by_row))[self._which.reshape(-1)]
            return
        predicted = softmax(by_row) if self.task.classes else by_row
        for at, order in enumerate(self.orders):
            result[at, self.has_input] = self.task.reorder(predicted[:, at], order)[self._which.reshape(-1)]

    def _compute(
        self, classifier: nn.Module, dtype: str, title: str, logits: Logits, stop: Stop | None, seconds: float,
        pace: Pace | None,
    ) -> None:  # fmt: skip
        """Computes the micro-batches without logits. Whatever ends it early, those that were complete are cached."""
        device = next(classifier.parameters()).device
        plan = logits.plan
        loader = PackedLoader(self.store, None, plan, pin=device.type == "cuda")
        todo = np.flatnonzero(~logits.known).tolist()
        known = len(plan.examples) - sum(len(plan.micro_batch(index)) for index in todo)
        collector = _Collector(self, logits, seconds)
        shown = progress(title, len(plan.examples), "examples", known) if pace is None else nullcontext(_not_shown)
        costs = plan.costs(self.store.lengths)
        was_training = classifier.training
        classifier.eval()
        try:
            with reusing_memory(device), shown as advance:
                for index, micro_batch in zip(todo, ahead(map(loader.micro_batch, todo)), strict=True):
                    if pace is not None and not pace.fits(costs[index]):
                        break
                    with compute_in(device, dtype):
                        placed = micro_batch.to(device)
                        collector.add(index, by_example(classifier(placed), placed))
                    advance(micro_batch.batch_size)
                    if pace is not None:
                        pace.add(int(plan.logical_tokens[index]), costs[index])
                    if stop is not None and stop():
                        raise stop.stopped()
        finally:
            classifier.train(was_training)
            collector.flush()

    def _idle(self, classifier: nn.Module, dtype: str) -> None:
        """Runs the micro-batch that costs least, while other ranks run theirs."""
        device, was_training = next(classifier.parameters()).device, classifier.training
        loader = PackedLoader(self.store, None, self.plan)
        classifier.eval()
        with compute_in(device, dtype):
            classifier(loader.micro_batch(self.plan.n_micro_batches - 1).to(device))
        classifier.train(was_training)

    def name(self, example: int) -> str:
        """An example's row, for messages."""
        row = example // self.store.orders
        return f"row {row}" if self.ids is None else f"row {row}, id {self.ids[row]!r}"


def _by_ranks(
    plan: PackPlan, compute: Callable[[PackPlan], np.ndarray], accelerator: Accelerator | None
) -> tuple[list[PackPlan], list[np.ndarray]]:
    """The shares of all ranks, and what they compute of them."""
    if accelerator is None:
        return [plan], [compute(plan)]
    shares = [share(plan, rank, accelerator.num_processes) for rank in range(accelerator.num_processes)]
    return shares, together(accelerator, lambda: compute(shares[accelerator.process_index]))


def share(plan: PackPlan, rank: int, ranks: int) -> PackPlan:
    """Every `ranks`-th micro-batch of an evaluation's plan from number `rank` on, which may be none, as a plan.

    The micro-batches are the same for any number of ranks, and so are their results. Those that cost most come first,
    so the shares are even.
    """
    if ranks == 1:
        return plan
    chosen = np.arange(rank, plan.n_micro_batches, ranks)
    starts, ends = np.concatenate([[0], plan.micro_ends])[chosen], plan.micro_ends[chosen]
    places = np.concatenate([chosen[:0], *map(np.arange, starts, ends)])
    return replace(
        plan, examples=plan.examples[places], micro_ends=np.cumsum(ends - starts), step_ends=np.array([len(chosen)]),
        tokens=plan.tokens[chosen], logical_tokens=plan.logical_tokens[chosen], least_micro_batches=len(chosen),
        shared=None if plan.shared is None else plan.shared[places],
    )  # fmt: skip


def _not_shown(count: int) -> None:
    """In place of `progress`, where a `Pace` shows it."""


class _Collector:
    """Checks and stores logits every few seconds; until then they stay on the device, which waits for no copy."""

    def __init__(self, evaluation: Evaluation, logits: Logits, seconds: float) -> None:
        self.evaluation, self.logits, self.seconds = evaluation, logits, seconds
        self._waiting: list[tuple[int, Tensor]] = []
        self._since = time.monotonic()

    def add(self, micro_batch: int, logits: Tensor) -> None:
        """Adds the float (n, C) logits of a micro-batch."""
        examples = self.logits.plan.micro_batch(micro_batch)
        shape = len(examples), self.logits.width
        assert logits.shape == shape, "every example has one number for each column"
        self._waiting.append((micro_batch, logits))
        if time.monotonic() - self._since >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Checks and stores the logits added since the last call; those of a micro-batch that is not finite are not."""
        self._since = time.monotonic()
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        sizes = [len(logits) for _, logits in waiting]
        values = torch.cat([logits for _, logits in waiting]).float().cpu().numpy()
        by_batch = np.split(values, np.cumsum(sizes)[:-1])
        good = [at for at, each in enumerate(by_batch) if np.isfinite(each).all()]
        if good:
            self.logits.add([waiting[at][0] for at in good], np.concatenate([by_batch[at] for at in good]))
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            examples = np.concatenate([self.logits.plan.micro_batch(index) for index, _ in waiting])[~finite]
            raise FloatingPointError(
                f"{len(examples)} of {len(values)} examples got logits that are not finite, first "
                f"{self.evaluation.name(int(examples[0]))}: check that row; if there is nothing unusual about it, "
                "use model.dtype=float32"
            )


def _places(planned: np.ndarray, examples: np.ndarray, n: int) -> np.ndarray:
    """The position of each of `examples` in the plan."""
    place = np.full(n, -1, dtype=np.int64)
    place[planned] = np.arange(len(planned))
    assert len(planned) == len(examples) and (place[examples] >= 0).all(), "the plan has other examples"
    return np.asarray(place[examples])
