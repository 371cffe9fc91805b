"""What all settings are made of, YAML files and the base of groups, and the settings of prompts.

YAML is restricted to what settings need: values, lists and groups; no tags, aliases or repeated keys; up to 1 MB.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from arena.storage.files import require_utf8

RECIPES = Path(__file__).parent / "recipes"
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


class Settings(BaseModel):
    """Base of every settings group: unknown keys are refused, and validated settings are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        require_utf8(*(value if isinstance(value, list | tuple) else [value]))
        return value


class Template(Settings):
    """The texts of the prompt, all taken as plain text. Chat markers come from `PromptSettings.chat`.

    A task uses the fields that it has a place for.
    """

    instruction: str = Field(description="instruction at the beginning of the prompt")
    opening: str = Field("", description="text between the instruction and the first turn")
    user: str = Field("### User:\n", description="heading of each user prompt")
    answer_a: str = Field("### Assistant A:\n", description="heading of each answer of A")
    answer_b: str = Field("### Assistant B:\n", description="heading of each answer of B")
    answer: str = Field(
        "", description="heading of each answer where an example shows one side alone; empty: both are shown"
    )
    separator: str = Field("\n\n", description="text after each prompt, answer or text")
    closing: str = Field("", description="text after the last turn")
    verdict: str = Field("verdict is: [[", min_length=1, description="last tokens of every example")
    text: str = Field("", description="classification: heading of the text")
    pair: str = Field("", description="classification: heading of the second text")
    classes: str = Field("", description="classification: what introduces the names of the classes; empty: not shown")
    context: str = Field("", description="instruction: heading of the context, in prompts without chat markers")
    response: str = Field("", description="instruction: heading of the response, in prompts without chat markers")
    unanswerable: str = Field(
        "unanswerable", min_length=1, description="instruction: the answer to a question that has none"
    )
    missing: str = Field("[no text]", description="text in place of a null prompt, answer or text")
    cut: str = Field(" [...] ", min_length=1, description="mark where a text was truncated")
    cut_turns: str = Field("[earlier turns left out]\n\n", min_length=1, description="mark for omitted turns")


def built_in_templates() -> set[str]:
    """The names of the templates that come with the package."""
    return {path.stem for path in (RECIPES / "templates").glob("*.yaml")}


class PromptSettings(Settings):
    template: Template = Field(description="a built-in template's name, the path of a YAML file, or fields as below")
    chat: Literal["auto", "gemma", "chatml", "llama3", "plain"] = Field(
        "auto",
        description="chat markers around the prompt; auto: those of the base's tokenizer, if it has any",
    )
    max_length: int = Field(4096, ge=16, description="most tokens in an example")

    @model_validator(mode="before")
    @classmethod
    def _read_template(cls, values: Any) -> Any:
        """A template may be given by a built-in name, by path, or written out."""
        if isinstance(values, dict) and isinstance(values.get("template"), str):
            path = find_file(values["template"], RECIPES / "templates", "template")
            return {**values, "template": read_yaml_file(path)}
        return values

    @property
    def pointwise(self) -> bool:
        """Whether the examples of a row each show one answer alone, and their logits are added."""
        return bool(self.template.answer)

    def identity(self) -> dict[str, Any]:
        """What decides a prompt; fields that came later are left out where they have their default, as before them."""
        fields = Template.model_fields
        later = "text", "pair", "classes", "context", "response", "unanswerable", "answer"
        unset = {name for name in later if getattr(self.template, name) == fields[name].default}
        return self.model_dump(exclude={"template": unset})
