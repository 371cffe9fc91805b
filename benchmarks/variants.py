"""The ways to read the same examples that the benchmark compares: how each cuts them into batches, and its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from arena.distributed import compute_in
from arena.model.backbone import backbone, underlying
from arena.model.classifier import PackedClassifier, loss_sum
from arena.packing.batch import PackedBatch
from arena.packing.loader import PackedLoader
from arena.packing.plan import plan_evaluation, plan_training
from arena.packing.tree import find_prefixes
from benchmarks.models import PAD, Models
from benchmarks.settings import BenchSettings
from benchmarks.workload import Workload


@dataclass(frozen=True)
class PaddedBatch:
    """n examples, each padded on the right to the longest one's L tokens.

    Attributes:
        input_ids, attention_mask: int64 (n, L).
        label: float32 (n, 3).
        index: int64 (n,), which example of the store each one is.
    """

    input_ids: Tensor
    attention_mask: Tensor
    label: Tensor
    index: Tensor

    def to(self, device: torch.device) -> PaddedBatch:
        parts = (self.input_ids, self.attention_mask, self.label, self.index)
        return PaddedBatch(*(part.to(device) for part in parts))


Batch = PackedBatch | PaddedBatch


@dataclass(frozen=True)
class Reading:
    """One pass over some examples.

    Attributes:
        load: makes the batches anew each time, as a data loader does.
        batches: how many there are.
        computed: tokens that the model is given, padding included.
        logical: tokens of the examples.
    """

    load: Callable[[], Iterator[Batch]]
    batches: int
    computed: int
    logical: int


@dataclass(frozen=True)
class Variant:
    """A way to read examples.

    Attributes:
        read: (workload, examples, settings, training) to a pass over these examples.
        logits: (model, batch) to (n, 3).
        ours: whether it takes our model or transformers' own.
        at_once: whether both orders of the rows are one pass; else they are two.
    """

    title: str
    read: Callable[[Workload, np.ndarray, BenchSettings, bool], Reading]
    logits: Callable[[nn.Module, Batch], Tensor]
    ours: bool = False
    at_once: bool = False


def read_packed(
    workload: Workload, examples: np.ndarray, settings: BenchSettings, training: bool, *, share: bool
) -> Reading:
    """End to end under the token budget, by our plans; with `share` what examples have in common is computed once."""
    lengths, budget = workload.store.lengths, settings.budget
    prefixes = find_prefixes(workload.store) if share else None
    if training:
        plan = plan_training(lengths, examples, step_size=len(examples), budget=budget, prefixes=prefixes)
    else:
        plan = plan_evaluation(lengths, examples, budget=budget, prefixes=prefixes)
    loader = PackedLoader(workload.store, workload.labels, plan)
    return Reading(
        load=lambda: chain.from_iterable(loader),
        batches=plan.n_micro_batches,
        computed=int(plan.tokens.sum()),
        logical=int(lengths[examples].sum()),
    )


def read_padded(
    workload: Workload,
    examples: np.ndarray,
    settings: BenchSettings,
    training: bool,
    *,
    grouped: bool = False,
    size: int | None = None,
) -> Reading:
    """Batches of `size` examples (default: the setting), in the given order or sorted by length beforehand."""
    lengths, size = workload.store.lengths, size or settings.batch
    order = examples[np.argsort(lengths[examples], kind="stable")] if grouped else examples
    cuts = [order[start : start + size] for start in range(0, len(order), size)]
    return Reading(
        load=lambda: (pad(workload, members) for members in cuts),
        batches=len(cuts),
        computed=sum(len(members) * int(lengths[members].max()) for members in cuts),
        logical=int(lengths[examples].sum()),
    )


def pad(workload: Workload, members: np.ndarray) -> PaddedBatch:
    """These examples as a padded batch."""
    lengths = workload.store.lengths[members]
    ids = np.full((len(members), lengths.max()), PAD, dtype=np.int64)
    for row, index in zip(ids, members.tolist(), strict=True):
        example = workload.store[index]
        row[: len(example)] = example
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    label = workload.labels[members].astype(np.float32)
    return PaddedBatch(*(torch.from_numpy(part) for part in (ids, mask.astype(np.int64), label, members)))


def our_logits(model: nn.Module, batch: Batch) -> Tensor:
    """By our classifier."""
    logits: Tensor = PackedClassifier(model)(batch)
    return logits


def padded_logits(model: nn.Module, batch: Batch) -> Tensor:
    """By transformers' classifier, as it is."""
    assert isinstance(batch, PaddedBatch)
    logits: Tensor = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits  # fmt: skip
    return logits


def restarted_logits(model: nn.Module, batch: Batch) -> Tensor:
    """By transformers' own packing: positions that start again tell it to build a block mask over the whole row."""
    assert isinstance(batch, PackedBatch)
    hidden = backbone(model)(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state  # fmt: skip
    logits: Tensor = underlying(model).score(hidden[0, batch.cu_seqlens[1:].long() - 1])
    return logits


VARIANTS: dict[str, Variant] = {
    "a": Variant(
        "ours: packed, shared prefixes", partial(read_packed, share=True), our_logits, ours=True, at_once=True
    ),
    "b": Variant("ours: packed, nothing shared", partial(read_packed, share=False), our_logits, ours=True),
    "c": Variant("transformers: padded, given order", read_padded, padded_logits),
    "d": Variant("transformers: padded, sorted by length", partial(read_padded, grouped=True), padded_logits),
    "e": Variant("transformers: packed by position_ids", partial(read_packed, share=False), restarted_logits),
}
ONE_BY_ONE = Variant("transformers: one by one", partial(read_padded, size=1), padded_logits)


def readings(variant: Variant, workload: Workload, task: str, settings: BenchSettings) -> list[Reading]:
    """The passes that a task takes: `train` and `infer` read order 0, `both` reads both orders."""
    first, second = workload.examples(0), workload.examples(1)
    if task != "both":
        return [variant.read(workload, first, settings, task == "train")]
    if variant.at_once:
        return [variant.read(workload, np.arange(len(workload.store)), settings, False)]
    return [variant.read(workload, order, settings, False) for order in (first, second)]


def work(
    variant: Variant, models: Models, passes: list[Reading], task: str, dtype: str, device: torch.device
) -> dict[int, Tensor]:
    """A task: for `train` gradients of the mean loss in the model, else logits (3,) by example."""
    if task == "train":
        model = models.ours.train() if variant.ours else models.stock_train
        for reading in passes:
            train_step(variant, model, reading, dtype, device)
        return {}
    model = models.ours.eval() if variant.ours else models.stock_infer
    found: dict[int, Tensor] = {}
    for reading in passes:
        found |= infer(variant, model, reading, dtype, device)
    return found


def train_step(variant: Variant, model: nn.Module, reading: Reading, dtype: str, device: torch.device) -> None:
    """Gradients of the mean loss over the step's examples, accumulated over its batches; earlier ones are dropped."""
    model.zero_grad(set_to_none=True)
    batches = list(reading.load())
    size = sum(len(batch.index) for batch in batches)
    for batch in batches:
        placed = batch.to(device)
        with compute_in(device, dtype):
            logits = variant.logits(model, placed)
        (loss_sum(logits.float(), placed.label) / size).backward()


@torch.inference_mode()
def infer(variant: Variant, model: nn.Module, reading: Reading, dtype: str, device: torch.device) -> dict[int, Tensor]:
    """Float32 logits (3,) of each example, on the CPU."""
    found: dict[int, Tensor] = {}
    for batch in reading.load():
        with compute_in(device, dtype):
            logits = variant.logits(model, batch.to(device))
        found |= dict(zip(batch.index.tolist(), logits.float().cpu(), strict=True))
    return found
