"""YAML restricted to what settings need: values, lists and groups; no tags, aliases or repeated keys; up to 1 MB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

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
