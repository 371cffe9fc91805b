"""Overrides such as `train.epochs=2`, and errors of a settings tree in words."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from arena.plain_yaml import read_yaml


def apply(tree: dict[str, Any], override: str) -> None:
    """Sets one dotted key of a nested dictionary, making the groups on its way."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"override {_short(override)} is not `key=value`, for example train.batch_size=32")
    *groups, last = key.strip().split(".")
    for group in groups:
        below = tree.setdefault(group, {})
        if below is None:
            below = tree[group] = {}
        if not isinstance(below, dict):
            raise ValueError(f"override {_short(override)}: {group!r} is a single value, it has no settings below it")
        tree = below
    try:
        tree[last] = read_yaml(text, "the value")
    except ValueError as error:
        raise ValueError(
            f"override {_short(override)}: {error}; quote the value if it holds special characters"
        ) from None


def _short(text: str, width: int = 100) -> str:
    return repr(text if len(text) <= width else text[:width] + "...")


def explain(error: Any, root: type[BaseModel]) -> str:
    """One validation error in words, with the nearest known key when a key is unknown."""
    path = [str(part) for part in error["loc"]]
    where = ".".join(path) or "the recipe"
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    known = list(_group(root, path[:-1]).model_fields)
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.6)
    below = [f"{name}.{path[-1]}" for name in known if path[-1] in _group(root, [*path[:-1], name]).model_fields]
    hint = f"did you mean {(near or below)[0]!r}?" if near or below else f"known here: {', '.join(known)}"
    return f"{where}: unknown key; {hint}"


def _group(group: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """The settings class that stands at a dotted path below another."""
    for name in path:
        field = group.model_fields.get(name)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if below:
            group = below[0]
    return group
