"""Chooses what each layer recomputes, by running the largest micro-batch before training begins.

On a GPU the memory is measured: the peak with full recomputation, and what one more layer of each policy adds to it.
The chosen policies are then run; if their peak exceeds the card's memory, more is recomputed. On a CPU, whose memory
other processes share, the estimate of `model/memory/estimate.py` is used. Policies do not change any number, so a run
can resume on another card with other policies.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from arena.distributed import compute_in, is_out_of_memory
from arena.model.backbone import classifies
from arena.model.card import card_of
from arena.model.classifier import loss_sum
from arena.model.language_model import PackedModel
from arena.model.lora import first_trained_layer
from arena.model.memory.estimate import (
    FROZEN,
    GIB,
    USABLE_SHARE,
    Shape,
    allowed_policies,
    describe,
    estimate_policies,
    mix_policies,
    room,
    shape_of,
)
from arena.model.memory.fused import set_policies
from arena.model.sharding import is_sharded
from arena.packing.batch import PackedBatch
from arena.packing.loader import PackedLoader
from arena.settings import Recipe
from arena.training.optimizer import trainable

CANDIDATES = 2000  # micro-batches with the most tokens, among which the largest is sought
MEASURED = 2  # layers that get a policy to measure what it adds
TRIES = 6
STATE = {"adamw": 12, "adamw8bit": 2}  # bytes per trained weight that the optimizer takes: moments and workspace

Peak = Callable[[list[str]], float | None]  # peak bytes with these policies; None: out of memory


@dataclass(frozen=True)
class RecomputePlan:
    """The chosen policies and the figures behind the choice.

    Attributes:
        policies: one for each layer.
        peak: peak bytes measured with these policies, including the optimizer's state; None if they were not run.
        limit: bytes that may be used.
    """

    policies: list[str]
    peak: float | None
    limit: float

    def __str__(self) -> str:
        measured = "estimated" if self.peak is None else f"measured peak {self.peak / GIB:.1f} GiB"
        return f"recomputation, by layer: {describe(self.policies)} ({measured}, {self.limit / GIB:.1f} GiB usable)"


def choose_policies(classifier: PackedModel, loader: PackedLoader, recipe: Recipe) -> RecomputePlan | None:
    """Sets every layer's policy if the recipe leaves the choice open (`model.checkpointing=auto`); else returns None.

    A model that is sharded recomputes every layer then.

    Args:
        loader: the training loader; its largest micro-batch is run.

    Raises:
        ValueError: a micro-batch does not fit even with full recomputation; the message says which settings to lower.
    """
    if recipe.model.checkpointing != "auto" or recipe.model.tune == "head":
        return None
    model, device = classifier.model, next(classifier.parameters()).device
    if is_sharded(classifier):  # trials of ranks that differ would wait for each other
        set_policies(model, ["full"] * shape_of(model.config).layers)
        return None
    if device.type == "cpu":
        card, shape = card_of(device), shape_of(model.config)
        policies = estimate_policies(
            shape, recipe.model, recipe.packing.budget, card, recipe.train.optimizer, classes=classifies(model)
        )
        plan = RecomputePlan(policies, None, room(card))
    else:
        plan = _measured(classifier, loader, recipe)
    set_policies(model, plan.policies)
    return plan


def _measured(classifier: PackedModel, loader: PackedLoader, recipe: Recipe) -> RecomputePlan:
    device = next(classifier.parameters()).device
    batch = fullest(loader, shape_of(classifier.model.config)).to(device)
    moments = STATE[recipe.train.optimizer] * sum(each.numel() for each in trainable(classifier.model).values())
    limit = USABLE_SHARE * _held_at_most(device) - moments
    shape = shape_of(classifier.model.config)
    frozen = [FROZEN] * first_trained_layer(recipe.model, shape.layers)
    layers = shape.layers - len(frozen)

    def peak(policies: list[str]) -> float | None:
        set_policies(classifier.model, frozen + policies)
        return _peak(classifier, batch, recipe.model.dtype)

    with _untouched(classifier, device):
        classifier.train()
        for parameter in trainable(classifier.model).values():  # as from a step's second micro-batch on
            parameter.grad = torch.zeros_like(parameter)
        peak(["full"] * layers)  # compiles and tunes kernels, which takes memory once
        fractions = {policy: shape.recompute_fraction(policy) for policy in reversed(allowed_policies(recipe.model))}
        policies, measured = search_policies(peak, fractions, layers, limit)
    if measured is None:
        raise ValueError(
            f"a micro-batch of {batch.tokens:,} tokens does not fit into {limit / GIB:.1f} GiB even with every layer "
            f"recomputed: lower packing.budget (now {recipe.packing.budget:,}) or prompt.max_length"
        )
    return RecomputePlan(frozen + policies, measured + moments, limit + moments)


def search_policies(
    peak: Peak, recompute: dict[str, float], layers: int, limit: float
) -> tuple[list[str], float | None]:
    """Policies that fit into `limit` bytes, and their peak; the peak is None if nothing fits.

    Args:
        peak: runs a step.
        recompute: the recomputed fraction under each allowed policy, `full` among them.
    """
    full = ["full"] * layers
    most = peak(full)
    if most is None or most > limit:
        return full, None
    saved = {"full": 0.0}
    few = min(MEASURED, layers)
    for policy in recompute:
        measured = None if policy == "full" else peak([policy] * few + full[few:])
        if measured is not None:
            saved[policy] = max(0.0, (measured - most) / few)
    free = limit - most
    for _ in range(TRIES):
        policies = mix_policies(saved, recompute, layers, free)
        if policies == full:
            break
        measured = peak(policies)
        if measured is not None and measured <= limit:
            return policies, measured
        free *= 0.85  # because of fragmentation, and because a middle layer may save more than the first
    return full, most


def fullest(loader: PackedLoader, shape: Shape) -> PackedBatch:
    """The micro-batch that takes most memory, by what is saved of its tokens and of its segments' keys."""
    plan, lengths = loader.plan, loader.store.lengths
    each_key = 2 * shape.kv_heads * shape.head_dim

    def numbers(index: int) -> int:
        tree, tokens = plan.tree(index, lengths), int(plan.tokens[index])
        return tokens * shape.saved_per_token("none") + each_key * (tokens if tree is None else sum(tree.end))

    candidates = [int(index) for index in plan.tokens.argsort()[::-1][:CANDIDATES] if plan.tokens[index]]
    return loader.micro_batch(max(candidates, key=numbers))


def _peak(classifier: PackedModel, batch: PackedBatch, dtype: str) -> float | None:
    """Peak bytes reserved by a forward and backward; None: out of memory."""
    device = batch.input_ids.device
    _empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with compute_in(device, dtype):
            outputs = classifier(batch)
        assert batch.targets is not None
        loss_sum(outputs, batch.targets).backward()
        return float(torch.cuda.max_memory_reserved(device))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        classifier.zero_grad(set_to_none=False)


@contextmanager
def _untouched(classifier: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores random states, gradients and the training mode afterwards, and frees the memory."""
    was_training = classifier.training
    with torch.random.fork_rng(devices=[device]):
        try:
            yield
        finally:
            classifier.train(was_training)
            classifier.zero_grad(set_to_none=True)
            _empty_cache()


def _empty_cache() -> None:
    """Frees cached memory; garbage is collected first, because the frames of an error may be in reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def _held_at_most(device: torch.device) -> float:
    """Bytes of the device's memory that this process holds or could allocate."""
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device))
