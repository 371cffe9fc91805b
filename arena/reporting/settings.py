"""Prints the settings of a recipe with their types, defaults and meanings."""

from __future__ import annotations

import difflib
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from arena.command_line import command
from arena.config import Recipe
from arena.progress import console

WIDTH = 80  # columns
WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}
BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


@dataclass(frozen=True)
class Setting:
    """One key of a recipe.

    Attributes:
        key: dotted, as in an override.
        default: as YAML; None if every recipe must give a value.
    """

    key: str
    kind: str
    default: str | None
    about: str

    def __str__(self) -> str:
        default = "no default" if self.default is None else f"default {self.default}"
        wrap = partial(textwrap.wrap, width=WIDTH, subsequent_indent="    ", break_on_hyphens=False)
        return "\n".join([*wrap(f"{self.key}: {self.kind}; {default}"), *wrap(self.about, initial_indent="    ")])


def settings(group: type[BaseModel] = Recipe, above: str = "") -> Iterator[Setting]:
    """All settings in the order of the recipe; a group's settings follow it."""
    for name, field in group.model_fields.items():
        below = _group(field)
        if below is None or field.description:  # a group with a description can also be given by name, like templates
            default = None if field.is_required() else _yaml(field.get_default(call_default_factory=True))
            kind = "text or a group" if below else _kind(field)
            yield Setting(f"{above}{name}", kind, default, field.description or "")
        if below is not None:
            yield from settings(below, f"{above}{name}.")


def print_settings(words: tuple[str, ...] = ()) -> None:
    """Prints the settings whose key or description contains all of the words; without words, all settings.

    Raises:
        ValueError: no setting matches; the message suggests similar ones.
    """
    every = list(settings())
    matching = [each for each in every if all(word.lower() in f"{each.key} {each.about}".lower() for word in words)]
    if not matching:
        keys = {part: each.key for each in every for part in (each.key, each.key.rpartition(".")[2])}
        near = sorted({keys[name] for name in difflib.get_close_matches(" ".join(words), keys, n=3, cutoff=0.7)})
        hint = f"did you mean {' or '.join(near)}?" if near else f"`{command('arena', 'settings')}` lists all of them"
        raise ValueError(f"no setting is about {' '.join(words)!r}: {hint}")
    for each in matching:
        console.print(str(each))
    example = command("arena", "train", "train.batch_size=32")
    console.print(f"\nTo change one, add KEY=VALUE to a command:\n    {example}")


def _group(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _kind(field: FieldInfo) -> str:
    limits = [
        f"{sign} {_yaml(getattr(each, name))}"
        for each in field.metadata
        for name, sign in BOUNDS
        if getattr(each, name, None) is not None
    ]
    word, also, rest = _word(field.annotation).partition(" or null")
    return " ".join([word, " and ".join(limits)]).strip() + also + rest


def _word(kind: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_word, parts))
    if origin is tuple:
        several = parts[-1] is Ellipsis
        return f"list of {_word(parts[0])}" if several else f"list of {len(parts)} {_word(parts[0])}s"
    if hasattr(kind, "__metadata__"):  # Annotated
        return _word(parts[0])
    if origin is dict:
        return "a group of your own names"
    if issubclass(kind, BaseModel):
        return f"a group of {', '.join(kind.model_fields)}"
    return WORDS[kind]


def _yaml(value: Any) -> str:
    """A value as YAML, as in a recipe or an override."""
    value = list(value) if isinstance(value, tuple) else value
    style = '"' if isinstance(value, str) and "\n" in value else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10**6)
    return str(text).removesuffix("\n").removesuffix("\n...")
