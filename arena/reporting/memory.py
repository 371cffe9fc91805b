"""An estimate of how a recipe runs on common cards: dtype, attention, budget, what is recomputed."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from transformers import PretrainedConfig

from arena.model.backbone import base_config
from arena.model.card import Card, resolve_dtype
from arena.model.families import ARCHITECTURES
from arena.model.lora import first_trained_layer
from arena.model.memory.estimate import GIB, POLICIES, describe, estimate_policies, fit, need, shape_of
from arena.progress import console
from arena.settings import ModelSettings, Recipe
from arena.tasks import task_of

# memory as CUDA reports it, which is less than the nominal size
CARDS = (
    Card("cuda", "12 GB: RTX 4070", (8, 9), int(11.6 * GIB)),
    Card("cuda", "16 GB: T4", (7, 5), int(14.6 * GIB)),
    Card("cuda", "24 GB: L4, A10, RTX 3090 and 4090", (8, 6), int(22.0 * GIB)),
    Card("cuda", "40 GB: A100", (8, 0), int(39.4 * GIB)),
    Card("cuda", "80 GB: A100, H100", (9, 0), int(79.1 * GIB)),
    Card("cuda", "141 GB: H200", (9, 0), int(139.7 * GIB)),
)
LAYERS = "layers by policy"
HEADER = ("card", "dtype", "attention", "budget", "least GiB", LAYERS, "recomputed")


def card_rows(recipe: Recipe, config: Any) -> list[list[str]]:
    """One row for each of `CARDS`, under `HEADER`: how the recipe runs there, or that it does not fit.

    `least GiB` is the memory of a step with full recomputation; `recomputed` the share of a forward computed twice.
    """
    first_trained_layer(recipe.model, shape_of(config).layers)  # reports a layer that the base lacks
    return [[card.name, *_row(recipe, config, card)] for card in CARDS]


def _row(recipe: Recipe, config: Any, card: Card) -> list[str]:
    dtype = resolve_dtype("auto" if recipe.model.dtype == "bfloat16" else recipe.model.dtype, card)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
    ampere = "flex" if dtype == "float32" else "flash or flex"
    attention = ampere if card.bfloat16 else "blockwise"
    try:
        budget = fit(recipe, config, card).packing.budget
    except ValueError:
        return [dtype, attention, "does not fit", "", "", ""]
    shape, classes, optimizer = shape_of(config), bool(task_of(recipe).classes), recipe.train.optimizer
    least = need(shape, recipe.model, budget, optimizer, classes=classes).total
    policies = estimate_policies(shape, recipe.model, budget, card, optimizer, classes=classes)
    share = sum(map(shape.recompute_fraction, policies)) / shape.layers
    return [dtype, attention, f"{budget:,}", f"{least / GIB:.1f}", describe(policies), f"{share:.0%}"]


def print_cards(recipe: Recipe, config: Any) -> None:
    """Prints the table of `card_rows`."""
    table = Table(title=f"{recipe.name}, training, estimated", title_justify="left")
    for name in HEADER:
        table.add_column(name, min_width=1 + max(map(len, POLICIES)) if name == LAYERS else None)
    for row in card_rows(recipe, config):
        table.add_row(*row)
    console.print(table)


def known_config(settings: ModelSettings) -> PretrainedConfig:
    """The config of a recipe's base, without network access for those in `ARCHITECTURES`; errors as in `load_base`."""
    known: PretrainedConfig = ARCHITECTURES.get(settings.base) or base_config(settings)
    return known
