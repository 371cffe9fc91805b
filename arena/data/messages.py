"""Conversations as messages with roles and contents, read as exchanges of a prompt and an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arena.data.cells import FieldError, excerpt, is_blank, read_json, whole_characters

ROLES = ("system", "user", "assistant")


def read_exchanges(cells: Mapping[str, Any], field: str) -> list[tuple[str, str | None]]:
    """The prompts of a conversation, each with its answer; that of the last one is None if it has none.

    A system message, which may come first, is shown before the first prompt.

    Args:
        cells: in the column `field`, a list of objects with `role` and `content`, or JSON of it. A content is a text,
            or a list of parts of the type `text`.

    Raises:
        FieldError: the messages are not of this form, or a prompt has no text.
    """
    cell = cells.get(field)
    messages = read_json(cell, field) if isinstance(cell, str) else cell
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise FieldError(field, f"is {excerpt(cell)}; write a list of objects with role and content")
    system = _content(messages[0], field) if messages and messages[0].get("role") == ROLES[0] else None
    turns = messages[1:] if messages and messages[0].get("role") == ROLES[0] else messages
    for at, message in enumerate(turns):
        if message.get("role") != (due := ROLES[1 + at % 2]):
            raise FieldError(
                field,
                f"has the role {excerpt(message.get('role'))} where {due} is due; let user and assistant take turns, "
                "after one system message at most",
            )
    texts = [_content(message, field) for message in turns]
    prompts, answers = texts[::2], [*texts[1::2], None][: len(texts[::2])]
    if not prompts or any(prompt is None for prompt in prompts):
        raise FieldError(field, "has a user's turn without text; write its content or leave the row out")
    if system is not None:
        prompts[0] = f"{system}\n\n{prompts[0]}"
    return [(str(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _content(message: Mapping[str, Any], field: str) -> str | None:
    """A message's text; None if it is blank or missing."""
    content = message.get("content")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
        if odd := [kind for kind in kinds if kind != "text"]:
            raise FieldError(
                field, f"has a part of the type {excerpt(odd[0])}; only texts can be read, leave the row out"
            )
        texts = [part.get("text") for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else texts
    if is_blank(content):
        return None
    if not isinstance(content, str):
        raise FieldError(field, f"has a content that is {excerpt(content)}; write a text")
    return whole_characters(content)
