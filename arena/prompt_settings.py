"""The settings of prompts (template, chat markers, length), and the base of all groups of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from arena.overrides import find_file, read_yaml_file
from arena.storage.files import require_utf8

RECIPES = Path(__file__).parent / "recipes"


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

    def identity(self) -> dict[str, Any]:
        """What decides a prompt; fields that came later are left out where they have their default, as before them."""
        fields, later = Template.model_fields, ("text", "pair", "classes", "context", "response", "unanswerable")
        unset = {name for name in later if getattr(self.template, name) == fields[name].default}
        return self.model_dump(exclude={"template": unset})
