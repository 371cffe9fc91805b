"""The compute dtype of a run: resolves `auto` for a card, and refuses a dtype that the card does not support."""

from __future__ import annotations

from arena.config import Recipe
from arena.model.card import Card


def resolve_dtype(setting: str, card: Card) -> str:
    """The dtype that a model computes in on a card: `bfloat16`, `float16` or `float32`.

    Args:
        setting: `model.dtype` of a recipe; `auto` is bfloat16 if the card supports it, else float16.

    Raises:
        ValueError: the card does not support bfloat16.
    """
    if setting == "auto":
        return "bfloat16" if card.bfloat16 else "float16"
    if setting == "bfloat16" and not card.bfloat16:
        raise ValueError(
            f"model.dtype is bfloat16, which {card.name} (compute capability {card.capability[0]}."
            f"{card.capability[1]}) does not support: pass model.dtype=float16"
        )
    return setting


def with_dtype(recipe: Recipe, card: Card) -> Recipe:
    """The recipe with its dtype resolved for a card. Raises the same errors as `resolve_dtype`."""
    model = recipe.model.model_copy(update={"dtype": resolve_dtype(recipe.model.dtype, card)})
    return recipe.model_copy(update={"model": model})
