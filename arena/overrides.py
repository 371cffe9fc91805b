"""Settings as text: YAML without ambiguities, overrides by `key=value`, and messages about invalid settings.

YAML is restricted to what settings need: values, lists and groups; no tags, aliases or repeated keys; up to 1 MB.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

LARGEST = 10**6  # characters
# the library's errors, also for invalid numbers and dates and for deep nesting
ERRORS = (yaml.YAMLError, ValueError, OverflowError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Refuses what settings do not need, in particular what lets a small file expand without limit."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        line = self.line + 1  # of the look-ahead: the same line, or the next
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*{event.anchor}) about line {line}: write the value out")
        if tag := getattr(event, "tag", None):
            raise yaml.YAMLError(f"a tag ({tag}) about line {line}: leave it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        tree = super().construct_mapping(node, deep)
        if len(tree) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), keys[0])
            raise yaml.YAMLError(f"{twice!r} appears twice in a group: keep one")
        return tree


def read_yaml(text: str, what: str) -> Any:
    """The value of a YAML text.

    Args:
        what: where the text comes from, for the message.

    Raises:
        ValueError: it is not YAML, is too large, or has more than plain values, lists and groups.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{what} has {len(text):,} characters, but settings have at most {LARGEST:,}")
    try:
        return yaml.load(text, _Loader)
    except ERRORS as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{what} is not YAML that can be used: {why}") from None


def read_yaml_file(path: Path) -> dict[str, Any]:
    """The groups of a YAML file. Raises `ValueError` as `read_yaml` does, and if it is not UTF-8 or has no groups."""
    try:
        if path.stat().st_size > 4 * LARGEST:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, too many for settings")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from None
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {type(tree).__name__} instead of settings: write `key: value` lines")
    if odd := [key for key in tree if not isinstance(key, str)]:
        raise ValueError(f"{path} has {odd[0]!r} as a key: write a name")
    return tree


def find_file(name: str, folder: Path, kind: str) -> Path:
    """A built-in file by its name, or any file by its path."""
    built_in = folder / f"{name}.yaml"
    if built_in.is_file():
        return built_in
    if Path(name).is_file():
        return Path(name)
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(f"there is no {kind} {name!r}: name one of {names}, or give the path of a YAML file")


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


def _short(text: str, width: int = 100) -> str:
    return repr(text if len(text) <= width else text[:width] + "...")


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
