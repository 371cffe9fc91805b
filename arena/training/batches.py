"""The examples of a fold: in which order and micro-batches they are trained on, and the loader that yields them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np

from arena.data.prepare import FoldData, prepare_fold
from arena.demo.synthetic import ensure_demo
from arena.model.backbone import load_tokenizer
from arena.packing.loader import PackedLoader
from arena.packing.plan import PackPlan, epoch_order, plan_evaluation, plan_training
from arena.packing.tree import Prefixes, prefixes_for
from arena.settings import Recipe
from arena.storage.files import fingerprint
from arena.tasks import task_of

SWAP_STREAM = 1  # separates the random numbers of swaps from those of shuffles


def training_order(
    rows: np.ndarray, orders: int, *, epochs: float, swap: str, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Example indices, epoch after epoch, each row once per epoch (twice with `swap="both"`).

    Args:
        rows: the rows to train on.
        orders: examples of each row in the store.
        epochs: may be fractional; the last epoch is then incomplete.
        swap: `never`; `random`, which draws each row's order anew in every epoch; or `both`, which gives both orders
            as two adjacent examples.
        groups: int64 (len(rows),), the group of each row; rows of a group are then adjacent, and the groups in an order
            drawn anew in every epoch. None: rows are shuffled alone.

    Raises:
        ValueError: `swap` needs both orders, but the store holds one.
    """
    if swap != "never" and orders != 2:
        raise ValueError(
            f"train.swap={swap} needs both orders of each row, but the token store holds one: prepare the fold with "
            "the same recipe that it is planned with"
        )
    parts = []
    for epoch in range(math.ceil(epochs)):
        shuffle = epoch_order(len(rows), seed, epoch)
        if groups is not None:
            place = epoch_order(int(groups.max()) + 1, seed, epoch)
            shuffle = shuffle[np.argsort(place[groups[shuffle]], kind="stable")]
        examples = rows[shuffle] * orders
        if swap == "both":  # adjacent, because a row's two orders share its first prompt
            examples = (examples[:, None] + np.arange(2)).reshape(-1)
        elif swap == "random":
            examples += np.random.default_rng([seed, epoch, SWAP_STREAM]).integers(0, 2, len(rows))[shuffle]
        parts.append(examples)
    whole = np.concatenate(parts)
    return whole[: max(1, round(len(parts[0]) * epochs))]


def epoch_size(recipe: Recipe, data: FoldData) -> int:
    """The number of examples in an epoch."""
    both = data.task.joins(recipe.prompt) or (recipe.train.swap == "both" and data.task.orders > 1)
    return len(data.train_rows) * (2 if both else 1)


def due_after(every: int | Literal["epoch"], plan: PackPlan, size: int) -> frozenset[int]:
    """The steps of a plan after which something is due that happens every so often; 0: never.

    Args:
        every: a number of steps; or `epoch`: the first step at whose end all examples of an epoch were trained on.
        size: the examples of an epoch.
    """
    if every != "epoch":
        return frozenset(range(every, plan.n_steps + 1, every) if every else ())
    seen = plan.micro_ends[plan.step_ends - 1]  # examples, after each step
    ends = np.arange(size, len(plan.examples) + 1, size)
    return frozenset((np.searchsorted(seen, ends) + 1).tolist())


def plan_fold(recipe: Recipe, data: FoldData, ranks: int = 1, prefixes: Prefixes | None = None) -> PackPlan:
    """The plan of a whole training run; the same recipe and data give the same plan.

    Args:
        prefixes: what the store's examples share; found with `prefixes_for` if not given.
    """
    settings, together = recipe.train, data.task.joins(recipe.prompt)
    swap = "both" if together else settings.swap if data.task.orders > 1 else "never"
    if together and settings.batch_size % 2:
        raise ValueError(
            f"train.batch_size is {settings.batch_size}, but a prompt that shows one answer alone has two examples of "
            f"each row in a step: set an even number, such as {settings.batch_size + 1}"
        )
    epochs = settings.epochs
    if settings.max_steps is not None:
        epochs = settings.max_steps * settings.batch_size / epoch_size(recipe, data)
    groups = None if data.groups is None else data.groups[data.train_rows]
    order = training_order(
        data.train_rows, data.store.orders, epochs=epochs, swap=swap, seed=recipe.seed, groups=groups
    )
    order = order[: len(order) - len(order) % 2] if together else order  # of a part of an epoch
    return plan_training(
        data.store.lengths, order, step_size=settings.batch_size, budget=recipe.packing.budget, ranks=ranks,
        prefixes=prefixes or prefixes_for(data.store, recipe.packing, Path(recipe.data.cache)),
        together=2 if together else 1,
    )  # fmt: skip


def steps_fingerprint(plan: PackPlan) -> str:
    """The fingerprint of which examples are in which step, however many micro-batches and ranks divide it."""
    steps = [np.sort(plan.step_examples(index)) for index in range(plan.n_steps)]
    return fingerprint([len(step) for step in steps], np.concatenate(steps).tobytes())


def step_targets(plan: PackPlan, data: FoldData, step: int) -> int:
    """The number of targets in a step, over all ranks: its examples, or the tokens that are predicted of them."""
    if data.store.places is None:
        return plan.step_size(step)
    return int(data.store.places.lengths[plan.step_examples(step)].sum())


def open_fold(recipe: Recipe, fold: int = 0, *, held_out: bool = False) -> PackedLoader:
    """The batches of one fold, for notebooks and training loops of your own; each batch has `input_text` too.

    Rows are read and tokenised, or taken from the cache, and the demo's rows are written where they are missing. Of the
    base, only the tokenizer is loaded.

    Args:
        fold: the fold that is held out.
        held_out: gives the held-out rows, as evaluation reads them, instead of the rows to train on.

    Returns:
        A loader that yields, for each optimizer step, the list of its micro-batches (`arena.PackedBatch`), each of at
        most `packing.budget` tokens. Held-out rows are one step, in the order that packs best; a micro-batch's `index`
        says which examples it holds. The tokens are `loader.store`, the plan is `loader.plan`.

    Raises:
        ValueError: the recipe's data or base cannot be used, or there is no such fold.
    """
    ensure_demo(recipe)
    tokenizer = load_tokenizer(recipe.model.base, recipe.model.revision)
    data = prepare_fold(recipe, task_of(recipe), fold, tokenizer)
    prefixes = prefixes_for(data.store, recipe.packing, Path(recipe.data.cache))
    if held_out:
        examples = data.eval_rows * data.store.orders
        plan = plan_evaluation(data.store.lengths, examples, budget=recipe.packing.budget, prefixes=prefixes)
    else:
        plan = plan_fold(recipe, data, prefixes=prefixes)
    return PackedLoader(data.store, data.targets, plan, tokenizer)
