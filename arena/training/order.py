"""Which examples are trained on, in which order and micro-batches; the seed determines it before the first step."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from arena.config import Recipe
from arena.data.prepare import FoldData
from arena.packing.plan import PackPlan, epoch_order, plan_training
from arena.packing.tree import Prefixes, prefixes_for

SWAP_STREAM = 1  # separates the random numbers of swaps from those of shuffles


def training_order(rows: np.ndarray, orders: int, *, epochs: float, swap: str, seed: int) -> np.ndarray:
    """Example indices, epoch after epoch, each row once per epoch (twice with `swap="both"`).

    Args:
        rows: the conversations to train on.
        orders: examples per conversation in the store.
        epochs: may be fractional; the last epoch is then incomplete.
        swap: `never`; `random`, which draws each row's order anew in every epoch; or `both`, which gives both orders
            as two adjacent examples.

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
        examples = rows[shuffle] * orders
        if swap == "both":  # adjacent, because a row's two orders share its first prompt
            examples = (examples[:, None] + np.arange(2)).reshape(-1)
        elif swap == "random":
            examples += np.random.default_rng([seed, epoch, SWAP_STREAM]).integers(0, 2, len(rows))[shuffle]
        parts.append(examples)
    whole = np.concatenate(parts)
    return whole[: max(1, round(len(parts[0]) * epochs))]


def plan_fold(recipe: Recipe, data: FoldData, ranks: int = 1, prefixes: Prefixes | None = None) -> PackPlan:
    """The plan of a whole training run; the same recipe and data give the same plan.

    Args:
        prefixes: what the store's examples share; found with `prefixes_for` if not given.
    """
    settings = recipe.train
    swap = settings.swap if data.task.orders > 1 else "never"
    order = training_order(data.train_rows, data.store.orders, epochs=settings.epochs, swap=swap, seed=recipe.seed)
    return plan_training(
        data.store.lengths, order, step_size=settings.batch_size, budget=recipe.packing.budget, ranks=ranks,
        prefixes=prefixes or prefixes_for(data.store, recipe.packing, Path(recipe.data.cache)),
    )  # fmt: skip
