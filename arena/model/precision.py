"""The compute dtype of a run: `auto` decided by the card, and what the card has no instructions for refused."""

from __future__ import annotations

from arena.config import Recipe
from arena.model.card import Card


def resolve_dtype(setting: str, card: Card) -> str:
    """The dtype that a model computes in on a card: `bfloat16`, `float16` or `float32`.

    Args:
        setting: `model.dtype` of a recipe; `auto` takes bfloat16 where the card has it, else float16.

    Raises:
        ValueError: bfloat16 on a card that has none.
    """
    if setting == "auto":
        return "bfloat16" if card.bfloat16 else "float16"
    if setting == "bfloat16" and not card.bfloat16:
        raise ValueError(
            f"model.dtype is bfloat16, which {card.name} (compute capability {card.capability[0]}."
            f"{card.capability[1]}) does not have: pass model.dtype=float16"
        )
    return setting


def with_dtype(recipe: Recipe, card: Card) -> Recipe:
    """The recipe with the dtype that it means on a card, as it is used and saved. Errors as `resolve_dtype`."""
    model = recipe.model.model_copy(update={"dtype": resolve_dtype(recipe.model.dtype, card)})
    return recipe.model_copy(update={"model": model})
