"""Recipes: read from YAML, with overrides such as `train.epochs=2`, changed and saved."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from arena.prompt_settings import RECIPES, find_file, read_yaml, read_yaml_file
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


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one dotted key of a nested dictionary, and creates missing groups.

    Args:
        override: `key=value`, where the value is YAML.

    Raises:
        ValueError: `override` has another form.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"override {_short(override)} is not `key=value`, for example train.batch_size=32")
    *groups, last = key.strip().split(".")
    for group in groups:
        below = tree.setdefault(group, {})
        if below is None:
            below = tree[group] = {}
        if not isinstance(below, dict):
            raise ValueError(f"override {_short(override)}: {group!r} is a single value without settings below it")
        tree = below
    try:
        tree[last] = read_yaml(text, "the value")
    except ValueError as error:
        raise ValueError(
            f"override {_short(override)}: {error}; quote the value if it has special characters"
        ) from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "...")


def explain(error: Any, settings: type[BaseModel]) -> str:
    """The message for a validation error of `settings`, with the nearest known key if a key is unknown."""
    path = [str(part) for part in error["loc"]]
    where = ".".join(path) or "the recipe"
    if error["type"] != "extra_forbidden":
        where = ".".join(part for part in path if part.replace("_", "").isalnum())  # not which type of several it is
        return f"{where or 'the recipe'}: {error['msg'].removeprefix('Value error, ')}"
    known = list(_group(settings, path[:-1]).model_fields)
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.6)
    below = [f"{name}.{path[-1]}" for name in known if path[-1] in _group(settings, [*path[:-1], name]).model_fields]
    hint = f"did you mean {(near or below)[0]!r}?" if near or below else f"known here: {', '.join(known)}"
    return f"{where}: unknown key; {hint}"


def _group(settings: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """The settings class at a dotted path below `settings`."""
    group = settings
    for name in path:
        field = group.model_fields.get(name)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if below:
            group = below[0]
    return group


# of a trained judge: keys, and prefixes of keys
INFER_SETTINGS = ("judge.", "packing.", "model.base", "model.dtype", "model.attention", "data.cache", "data.max_")


def judge_settings(overrides: Sequence[str], known: Sequence[str]) -> list[str]:
    """The overrides that apply to a trained judge, without `name=`, which selects the run; others are refused.

    Args:
        known: keys, and prefixes of keys that end in a dot or an underscore.
    """
    keys = [each.partition("=")[0].strip() for each in overrides]
    groups = tuple(each for each in known if each.endswith((".", "_")))
    odd = [key for key in keys if key not in (*known, "name") and not key.startswith(groups or (" ",))]
    if odd:
        names = ", ".join(f"{each}*" if each in groups else each for each in known)
        raise ValueError(f"{odd[0]} does not apply to a trained judge: only {names} can be set here")
    return [each for each, key in zip(overrides, keys, strict=True) if key != "name"]


def refuse_both(flag: str, overrides: Sequence[str], *keys: str) -> None:
    """Raises `ValueError` if an override sets the same thing as a flag, as one of them would be ignored."""
    for override in overrides:
        if override.partition("=")[0].strip() in keys:
            raise ValueError(f"{flag} and {override} set the same thing: give one of the two")
