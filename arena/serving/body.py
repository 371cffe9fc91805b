"""Reads the body of a request, within limits, and checks it: every refusal names what is wrong."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from arena.data.cells import FieldError, read_json
from arena.data.limits import Limits as RowLimits
from arena.data.limits import characters
from arena.data.rows import Cells
from arena.data.task import Task
from arena.serving.limits import CLOSE, Limits, RefusedError

SHOWN_PROBLEMS, MOST_PROBLEMS = 20, 2000
WRONG = 422
GONE = 499  # no status of HTTP: nobody reads it, but it is counted


async def read_body(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object of a request. Raises `RefusedError`."""
    kind = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(
            415, "the content type is not application/json: send JSON, and say so in that header", headers=CLOSE
        )
    try:
        text = (await _read(request, limits)).decode("utf-8")
        body = await asyncio.to_thread(_decoded, text)  # other requests go on while objects are read
    except UnicodeDecodeError:
        raise RefusedError(400, "the body is not UTF-8") from None
    except FieldError as error:
        raise RefusedError(400, str(error)) from None
    if not isinstance(body, dict):
        raise RefusedError(WRONG, "the body is not an object: send one, as /openapi.json describes it")
    return body


def _decoded(text: str) -> Any:
    """The value of a body. Of many small lists the garbage collector would look at all, again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return read_json(text, "the body")
    finally:
        if was_on:  # of several threads, the one that turned it off
            gc.enable()


async def _read(request: Request, limits: Limits) -> bytes:
    """The bytes of a body. What is too much is received, so that the client can read the answer, and not kept."""
    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                parts.append(part)
                if size > limits.body_bytes:
                    parts.clear()
    except TimeoutError:
        raise RefusedError(408, f"the body did not arrive within {limits.body_seconds:g} s", headers=CLOSE) from None
    except ClientDisconnect:
        raise RefusedError(GONE, "the client is gone") from None
    if size > limits.body_bytes:
        raise RefusedError(
            413, f"the body is {size:,} bytes, and {limits.body_bytes:,} are allowed: send fewer rows at once",
            headers=CLOSE,
        )  # fmt: skip
    return b"".join(parts)


def checked(model: type[BaseModel], body: Mapping[str, Any]) -> Any:
    """A request of a model. Raises `RefusedError` with all its problems."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        if error.error_count() > MOST_PROBLEMS:  # to list them would take longer than to find them
            raise RefusedError(WRONG, f"the body has {error.error_count():,} problems, such as unknown keys") from None
        raise refused(
            [_problem(each, model) for each in error.errors(include_url=False, include_input=False)]
        ) from None


def checked_texts(task: Task, rows: Sequence[Cells], limits: Limits) -> list[Cells]:
    """The texts of rows as a judge of the task reads them. Raises `RefusedError` with all their problems."""
    sizes, texts, problems = RowLimits(limits.characters, limits.turns), list[Cells](), list[dict[str, Any]]()
    for number, cells in enumerate(rows):
        try:
            if (size := characters(cells)) > limits.characters:
                raise FieldError(", ".join(task.texts), f"has {size:,} characters; {limits.characters:,} are allowed")
            for name, cell in cells.items():
                if isinstance(cell, list) and len(cell) > limits.turns:
                    raise FieldError(
                        name, f"has {len(cell):,} turns; {limits.turns:,} are allowed: leave out earlier ones"
                    )
            texts.append(task.read_texts(cells, sizes))
        except FieldError as error:
            problems.append({"row": number, "field": error.field, "what": error.what})
    if problems:
        raise refused(problems)
    return texts


def refused(problems: Sequence[Mapping[str, Any]]) -> RefusedError:
    """The refusal of a request with problems."""
    first = problems[0]
    where = first["field"] if first["row"] is None else f"row {first['row']}, {first['field']}"
    more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
    return RefusedError(WRONG, f"{where}: {first['what']}{more}", problems[:SHOWN_PROBLEMS])


def _problem(error: Any, model: type[BaseModel]) -> dict[str, Any]:
    """A problem of a request of a model, with the remedy, from what pydantic found."""
    where = list(error["loc"])
    row = where[1] if len(where) > 1 and where[0] == "rows" else None
    name = "".join(
        f"[{each}]" if isinstance(each, int) else f".{each[:80]}" for each in where[0 if row is None else 2 :]
    )
    rows: Any = None if row is None else model.model_fields["rows"].annotation
    fields = _fields(model if rows is None else rows.__args__[0])
    whole = "the body" if row is None else "the row"
    return {"row": row, "field": name.removeprefix(".") or whole, "what": _what(error, fields)}


def _fields(model: type[BaseModel]) -> str:
    """The names that an object of a model has in JSON."""
    return ", ".join(field.alias or name for name, field in model.model_fields.items())


def _what(error: Any, fields: str) -> str:
    """What is wrong, and what to send, if the object has fields of these names."""
    context = error.get("ctx", {})
    match error["type"]:
        case "value_error":
            return str(context["error"])
        case "missing":
            return f"is missing: the fields are {fields}"
        case "extra_forbidden":
            return f"is not a field here: the fields are {fields}"
        case "model_type":
            return f"is not an object: send one with the fields {fields}"
        case "list_type":
            return "is not a list: send one"
        case "too_short":
            return f"has {context['actual_length']} entries: send at least {context['min_length']}"
        case "too_long":
            return f"has more than {context['max_length']} entries: send fewer at once"
        case "bool_type":
            return "is neither true nor false: send one of them"
        case "string_unicode" | "invalid_key":
            return "has a key with half a character (a lone surrogate); write whole characters"
    return str(error["msg"])
