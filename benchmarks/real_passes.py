"""The timed work of a cell: optimizer steps, passes of inference, or one full micro-batch, ours and padded alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import nn

from arena.background import ahead
from arena.distributed import compute_in
from arena.packing.batch import collate
from arena.packing.loader import PackedLoader
from arena.packing.plan import plan_evaluation, plan_training
from arena.packing.tree import Prefixes, find_prefixes
from arena.training.optim import make_optimizer, trainable
from arena.training.scaling import LossScaling
from arena.training.step import accumulate
from benchmarks.cells import PADDED_BATCH, Cell, RealSettings
from benchmarks.timing import finish
from benchmarks.variants import pad
from benchmarks.workload import Workload

Step = list[Any]  # the micro-batches of a step, PackedBatch or PaddedBatch


@dataclass(frozen=True)
class Work:
    """What a cell reads.

    Attributes:
        steps: makes the micro-batches of so many steps, each of the same examples, anew in each call.
        examples: in a step.
        micro_batches: in a step.
        logical: tokens of a step's examples.
        unique: tokens of a step that have to be computed, common beginnings counted once; without sharing and where
            padded, `logical`.
        computed: tokens that the model is given in a step, padding included.
        slots: tokens that the micro-batches have room for.
        loader: of the step by our plan; None for padded batches and a micro-batch made by hand.
    """

    steps: Callable[[int], Iterable[Step]]
    examples: int
    micro_batches: int
    logical: int
    unique: int
    computed: int
    slots: int
    loader: PackedLoader | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of each timed step, and how many of them the step waited for its data."""

    seconds: list[float]
    waited: list[float]


def work_of(cell: Cell, workload: Workload, settings: RealSettings, pin: bool) -> Work:
    """What a cell reads of the workload."""
    if cell.task == "peak":
        return _full_micro_batch(workload, settings.recipe.packing.budget)
    rows = settings.padded_rows if cell.way == "padded" else settings.rows
    examples = np.arange(2 * rows) if cell.orders == 2 else workload.examples(0)[:rows]
    if cell.way == "padded":
        return _padded(workload, examples)
    return _packed(cell, workload, examples, settings.recipe.packing.budget, pin)


def _packed(cell: Cell, workload: Workload, examples: np.ndarray, budget: int, pin: bool) -> Work:
    """Our plan of these examples: of a training step, or of evaluation."""
    prefixes: Prefixes | None = find_prefixes(workload.store) if cell.share else None
    lengths = workload.store.lengths
    if cell.task == "train":
        plan = plan_training(lengths, examples, step_size=len(examples), budget=budget, prefixes=prefixes)
    else:
        plan = plan_evaluation(lengths, examples, budget=budget, prefixes=prefixes)
    loader = PackedLoader(workload.store, workload.labels, plan, pin=pin)
    unique = int(plan.tokens.sum())
    return Work(
        steps=lambda count: (step for _ in range(count) for step in loader),
        examples=len(examples), micro_batches=plan.n_micro_batches, logical=int(lengths[examples].sum()),
        unique=unique, computed=unique, slots=plan.n_micro_batches * budget, loader=loader,
    )  # fmt: skip


def _padded(workload: Workload, examples: np.ndarray) -> Work:
    """Batches in the given order, each padded to its longest example."""
    lengths = workload.store.lengths
    cuts = [examples[start : start + PADDED_BATCH] for start in range(0, len(examples), PADDED_BATCH)]
    logical, computed = int(lengths[examples].sum()), sum(len(each) * int(lengths[each].max()) for each in cuts)
    return Work(
        steps=lambda count: ([pad(workload, each) for each in cuts] for _ in range(count)),
        examples=len(examples), micro_batches=len(cuts), logical=logical, unique=logical, computed=computed,
        slots=computed,
    )  # fmt: skip


def _full_micro_batch(workload: Workload, budget: int) -> Work:
    """One micro-batch of exactly `budget` tokens, nothing shared: the last example is cut to fit."""
    items: list[Any] = []
    left = budget
    for index in range(len(workload.store)):
        ids = workload.store[index][:left]
        items.append({"input_ids": ids, "label": workload.labels[index]})
        left -= len(ids)
        if not left:
            break
    if left:
        raise ValueError(f"the rows have {left} tokens too few to fill a micro-batch of {budget}: take more rows")
    batch = collate(items)
    return Work(lambda count: repeat([batch], count), len(items), 1, budget, budget, budget, budget)


def train(classifier: nn.Module, work: Work, settings: RealSettings, repeats: int, device: torch.device) -> Times:
    """Optimizer steps as training takes them: accumulated, clipped, AdamW; the first one is not timed."""
    recipe, model = settings.recipe, classifier.get_submodule("model").train()
    optimizer = make_optimizer(model, recipe.train)
    parameters = list(trainable(model).values())
    scaling = LossScaling(recipe.model.dtype, device)

    def step(batch: Step) -> None:
        accumulate(classifier, batch, work.examples, device, recipe.model.dtype, scaling)
        scaling.unscale(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.train.max_grad_norm))
        scaling.step(optimizer, norm)
        optimizer.zero_grad(set_to_none=True)

    try:
        return _timed(work.steps(repeats + 1), step, device)
    finally:
        model.zero_grad(set_to_none=True)  # after an error too: gradients would stay with the model


@torch.inference_mode()
def infer(classifier: nn.Module, work: Work, settings: RealSettings, repeats: int, device: torch.device) -> Times:
    """Passes over the rows, logits left on the device until the end of each; the first one is not timed."""
    classifier.eval()

    def one_pass(batch: Step) -> None:
        found = []
        for micro_batch in batch:
            with compute_in(device, settings.recipe.model.dtype):
                found.append(classifier(micro_batch.to(device)))
        torch.cat(found).float().cpu()

    return _timed(work.steps(repeats + 1), one_pass, device)


def _timed(steps: Iterable[Step], once: Callable[[Step], None], device: torch.device) -> Times:
    """Times steps whose data are made in the background, as in training."""
    seconds: list[float] = []
    waited: list[float] = []
    finish(device)
    start = time.perf_counter()
    for batch in ahead(steps):
        waited.append(time.perf_counter() - start)
        once(batch)
        finish(device)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return Times(seconds[1:], waited[1:])
