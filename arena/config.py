"""Recipes: read from YAML, with overrides such as `train.epochs=2`, changed and saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from arena.overrides import apply_override, explain, find_file, read_yaml_file
from arena.prompt_settings import RECIPES
from arena.settings import Recipe
from arena.storage.files import local_path, require_utf8


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the built-in recipe called `name`, or the recipe file at the path `name`.

    Args:
        overrides: `key=value` texts with a dotted key and a YAML value, such as `train.batch_size=32`.

    Raises:
        ValueError: there is no such recipe, a key is unknown, or a value is invalid; the message says what is allowed.
    """
    return _validated(name, read_yaml_file(find_file(name, RECIPES, "recipe")), overrides)


def change(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with some settings changed; for `overrides` and errors see `load_recipe`."""
    return _validated(recipe.name, recipe.model_dump(mode="json"), overrides)


def save_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text with all defaults written out; `load_recipe` reads back an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def run_place(runs: Path, name: str) -> Path:
    """The folder `runs/name` of a recipe called `name`, or of a fold of it.

    Raises:
        ValueError: `runs` is a URL, or the folder is a link that leads out of `runs`.
    """
    require_utf8(runs)
    place = local_path(runs, "--runs") / name
    if runs.resolve() not in place.resolve().parents:
        raise ValueError(f"{place} is a link that leads out of {runs}, to {place.resolve()}: remove it, or name --runs")
    return place


def recipe_names() -> list[str]:
    """The built-in recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _validated(name: str, tree: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    for override in overrides:
        apply_override(tree, override)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"recipe {name}: " + "; ".join(explain(each, Recipe) for each in error.errors())) from None
    local_path(recipe.data.cache, "data.cache")
    given = {override.partition("=")[0].strip() for override in overrides}
    if recipe.train.max_steps is not None and "train.epochs" in given and "train.max_steps" not in given:
        raise ValueError(
            f"train.epochs has no effect here, because recipe {name} has train.max_steps={recipe.train.max_steps}: "
            "pass train.max_steps=null too"
        )
    return recipe
