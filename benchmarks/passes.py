"""The timed work of a cell: optimizer steps, passes of inference, or one full micro-batch, ours and padded alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arena.distributed import compute_in, reusing_memory
from arena.model.classifier import PackedClassifier
from arena.packing.batch import collate
from arena.packing.loader import PackedLoader
from arena.packing.plan import plan_evaluation, plan_training
from arena.packing.tree import Prefixes, find_prefixes
from arena.progress import ahead
from arena.training.optimizer import LossScaling, make_optimizer, trainable
from arena.training.step import accumulate
from benchmarks.cells import Cell, Settings
from benchmarks.timing import finish
from benchmarks.workload import Workload

PAD = 0
Step = list[Any]  # the micro-batches of a step, PackedBatch or PaddedBatch


@dataclass(frozen=True)
class PaddedBatch:
    """n examples, each padded on the right to the longest one's L tokens.

    Attributes:
        input_ids, attention_mask: int64 (n, L).
        targets: float32 (n, 3).
        index: int64 (n,), which example of the store each one is.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    index: Tensor

    def to(self, device: torch.device) -> PaddedBatch:
        parts = (self.input_ids, self.attention_mask, self.targets, self.index)
        return PaddedBatch(*(part.to(device) for part in parts))


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
class Taken:
    """Seconds of a step, and how many of them it waited for its data."""

    seconds: float
    waited: float


def work_of(cell: Cell, workload: Workload, settings: Settings, pin: bool = False) -> Work:
    """What a cell reads of the workload."""
    budget, padded = settings.recipe.packing.budget, cell.way in ("padded", "sorted")
    if cell.task == "peak":
        return _full_micro_batch(workload, budget)
    rows = settings.padded_rows if padded else settings.rows
    examples = np.arange(len(workload.store))[: 2 * rows] if cell.orders == 2 else workload.examples(0)[:rows]
    return _padded(cell, workload, examples) if padded else _packed(cell, workload, examples, budget, pin)


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


def _padded(cell: Cell, workload: Workload, examples: np.ndarray) -> Work:
    """Batches in the given order or by length, each padded to its longest example."""
    lengths = workload.store.lengths
    order = examples[np.argsort(lengths[examples], kind="stable")] if cell.way == "sorted" else examples
    cuts = [order[start : start + cell.batch] for start in range(0, len(order), cell.batch)]
    logical, computed = int(lengths[examples].sum()), sum(len(each) * int(lengths[each].max()) for each in cuts)
    return Work(
        steps=lambda count: ([pad(workload, each) for each in cuts] for _ in range(count)),
        examples=len(examples), micro_batches=len(cuts), logical=logical, unique=logical, computed=computed,
        slots=computed,
    )  # fmt: skip


def pad(workload: Workload, members: np.ndarray) -> PaddedBatch:
    """These examples as a padded batch."""
    lengths = workload.store.lengths[members]
    ids = np.full((len(members), lengths.max()), PAD, dtype=np.int64)
    for row, index in zip(ids, members.tolist(), strict=True):
        example = workload.store[index]
        row[: len(example)] = example
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    label = workload.labels[members]
    return PaddedBatch(*(torch.from_numpy(part) for part in (ids, mask.astype(np.int64), label, members)))


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


def train(classifier: nn.Module, work: Work, settings: Settings, count: int, device: torch.device) -> Iterator[Taken]:
    """Optimizer steps as training takes them: accumulated, clipped, AdamW. They are taken as they are asked for."""
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
        yield from _timed(work.steps(count), step, classifier, device)
    finally:
        model.zero_grad(set_to_none=True)  # after an error too: gradients would stay with the model


def infer(classifier: nn.Module, work: Work, settings: Settings, count: int, device: torch.device) -> Iterator[Taken]:
    """Passes over the rows, as they are asked for."""
    classifier.eval()
    once = partial(judge, classifier, dtype=settings.recipe.model.dtype, device=device)
    return _timed(work.steps(count), once, classifier, device)


@torch.inference_mode()
def judge(classifier: nn.Module, step: Step, dtype: str, device: torch.device) -> Tensor:
    """Float32 logits (n, 3) in the order of the batches, left on the device until all are there."""
    found = []
    for micro_batch in step:
        with compute_in(device, dtype):
            found.append(classifier(micro_batch.to(device)))
    return torch.cat(found).float().cpu()


def _timed(
    steps: Iterable[Step], once: Callable[[Step], object], classifier: nn.Module, device: torch.device
) -> Iterator[Taken]:
    """Times steps whose data are made in the background, as in training; ours reuse memory, as training does."""
    ours = isinstance(classifier, PackedClassifier)
    batches = ahead(steps)
    while True:
        finish(device)
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        waited = time.perf_counter() - start
        with reusing_memory(device) if ours else nullcontext():
            once(batch)
            finish(device)
        yield Taken(time.perf_counter() - start, waited)
