"""How much each layer may keep, found by running the largest micro-batch before training begins.

On a GPU the figures are measured: the peak with full recomputation, and what one more layer of each policy adds to it.
The policies chosen are then run and their peak is looked at; where it is above what the card holds, less is kept. On a
CPU, whose memory others use as well, they come from the arithmetic of `model/memory.py`. Policies change no number, so
that a run may go on with others on another card.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from arena.config import Recipe
from arena.distributed import compute_in, is_out_of_memory
from arena.model.backbone import backbone
from arena.model.checkpointing import set_policies
from arena.model.classifier import PackedClassifier, loss_sum
from arena.model.memory import GIB, LADDER, USABLE, WIDTH, Shape, describe, mix, need, shape_of
from arena.packing.batch import PackedBatch
from arena.packing.loader import PackedLoader
from arena.training.optim import trainable

CANDIDATES = 2000  # micro-batches, those with most tokens, among which the largest is looked for
MEASURED = 2  # layers that are given a policy to see what it adds
TRIES = 6
STATE = {"adamw": 12, "adamw8bit": 2}  # bytes a trained weight that the optimizer takes: moments, and room to work

Peak = Callable[[list[str]], float | None]  # bytes at the most with these policies; None: out of memory


@dataclass(frozen=True)
class Kept:
    """What was decided, and by what figures.

    Attributes:
        policies: one a layer.
        peak: bytes of the run with these policies, with room for the optimizer's state; None where it was not run.
        limit: bytes that may be used.
    """

    policies: list[str]
    peak: float | None
    limit: float

    def __str__(self) -> str:
        measured = "by arithmetic" if self.peak is None else f"peak {self.peak / GIB:.1f} GiB measured"
        return f"kept for the backward: {describe(self.policies)} ({measured}, room for {self.limit / GIB:.1f} GiB)"


def keep_what_fits(classifier: PackedClassifier, loader: PackedLoader, recipe: Recipe) -> Kept | None:
    """Gives every layer its policy where the recipe leaves that to us (`model.checkpointing=auto`), else None.

    Args:
        loader: of the training; its fullest micro-batch is run.

    Raises:
        ValueError: not even with full recomputation does it fit; says what to lower.
    """
    if recipe.model.checkpointing != "auto" or recipe.model.tune == "head":
        return None
    model, device = classifier.model, next(classifier.parameters()).device
    layers = len(backbone(model).layers)
    usable = [each for each in LADDER if each != "mlp" or recipe.model.lora.dropout == 0]
    if device.type == "cpu":
        kept = _by_arithmetic(shape_of(model.config), recipe, layers, usable)
    else:
        kept = _by_running(classifier, loader, recipe, layers, usable)
    set_policies(model, kept.policies)
    return kept


def _by_arithmetic(shape: Shape, recipe: Recipe, layers: int, usable: list[str]) -> Kept:
    tokens, limit = recipe.packing.budget, USABLE * psutil.virtual_memory().available
    width = WIDTH[recipe.model.dtype]
    wanted = need(shape, recipe.model, tokens, recipe.train.optimizer)
    kept = {policy: float(width * tokens * shape.kept(policy)) for policy in usable}
    free = limit - wanted.kept - wanted.working
    return Kept(mix(kept, {each: shape.again(each) for each in usable}, layers, free), None, limit)


def _by_running(
    classifier: PackedClassifier, loader: PackedLoader, recipe: Recipe, layers: int, usable: list[str]
) -> Kept:
    device = next(classifier.parameters()).device
    batch = fullest(loader, shape_of(classifier.model.config)).to(device)
    moments = STATE[recipe.train.optimizer] * sum(each.numel() for each in trainable(classifier.model).values())
    limit = USABLE * _held_at_most(device) - moments
    shape = shape_of(classifier.model.config)

    def peak(policies: list[str]) -> float | None:
        set_policies(classifier.model, policies)
        return _peak(classifier, batch, recipe.model.dtype)

    with _untouched(classifier, device):
        classifier.train()
        for parameter in trainable(classifier.model).values():  # they are there from a step's second micro-batch on
            parameter.grad = torch.zeros_like(parameter)
        peak(["full"] * layers)  # compiles, and tunes what it compiles, which takes memory once
        policies, found = choose(peak, {each: shape.again(each) for each in usable}, layers, limit)
    if found is None:
        raise ValueError(
            f"a micro-batch of {batch.tokens:,} tokens does not fit into {limit / GIB:.1f} GiB even with every layer "
            f"recomputed: lower packing.budget (now {recipe.packing.budget:,}) or prompt.max_length"
        )
    return Kept(policies, found + moments, limit + moments)


def choose(peak: Peak, again: dict[str, float], layers: int, limit: float) -> tuple[list[str], float | None]:
    """Policies that fit into `limit` bytes, and their peak; None as the peak where nothing fits.

    Args:
        peak: runs a step.
        again: what is computed again under each usable policy, `full` among them.
    """
    full = ["full"] * layers
    most = peak(full)
    if most is None or most > limit:
        return full, None
    kept = {"full": 0.0}
    few = min(MEASURED, layers)
    for policy in again:
        found = None if policy == "full" else peak([policy] * few + full[few:])
        if found is not None:
            kept[policy] = max(0.0, (found - most) / few)
    free = limit - most
    for _ in range(TRIES):
        policies = mix(kept, again, layers, free)
        if policies == full:
            break
        found = peak(policies)
        if found is not None and found <= limit:
            return policies, found
        free *= 0.85  # memory falls to pieces, and a layer in the middle may keep more than the first
    return full, most


def fullest(loader: PackedLoader, shape: Shape) -> PackedBatch:
    """The micro-batch that takes most memory, by what is kept of its tokens and of the keys that its segments see."""
    plan, lengths = loader.plan, loader.store.lengths
    each_key = 2 * shape.kv_heads * shape.head_dim

    def numbers(index: int) -> int:
        tree, tokens = plan.tree(index, lengths), int(plan.tokens[index])
        return tokens * shape.kept("none") + each_key * (tokens if tree is None else sum(tree.end))

    candidates = [int(index) for index in plan.tokens.argsort()[::-1][:CANDIDATES] if plan.tokens[index]]
    return loader.micro_batch(max(candidates, key=numbers))


def _peak(classifier: PackedClassifier, batch: PackedBatch, dtype: str) -> float | None:
    """Bytes reserved at the most by a forward and backward; None: out of memory."""
    device = batch.input_ids.device
    _empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with compute_in(device, dtype):
            logits = classifier(batch)
        loss_sum(logits, batch.label).backward()
        return float(torch.cuda.max_memory_reserved(device))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        classifier.zero_grad(set_to_none=False)


@contextmanager
def _untouched(classifier: nn.Module, device: torch.device) -> Iterator[None]:
    """Leaves random states, gradients and the mode as they were, and no memory behind."""
    was_training = classifier.training
    with torch.random.fork_rng(devices=[device]):
        try:
            yield
        finally:
            classifier.train(was_training)
            classifier.zero_grad(set_to_none=True)
            _empty_cache()


def _empty_cache() -> None:
    """Gives back what nothing refers to any more: what an error's frames held may lie in cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def _held_at_most(device: torch.device) -> float:
    """Bytes of the device that this process holds or could take."""
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device))
