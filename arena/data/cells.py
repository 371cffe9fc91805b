"""Parses the cells of a row: ids, texts, turns and numbers. Errors name the field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from arena.metrics import sum_tolerance

Labels = Literal["required", "optional", "ignored"]

LARGEST_EXACT_FLOAT = 2**53
CONTROL = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029]")
SURROGATE = re.compile("[\ud800-\udfff]")


class FieldError(ValueError):
    """A field that cannot be used: `field` is its name, `what` the problem and the remedy."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(f"{field}: {what}")
        self.field = field
        self.what = what


def read_id(value: Any) -> str:
    """The id as text; a whole number is written in plain decimals."""
    if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST_EXACT_FLOAT:
        value = int(value)  # pandas turns a column of whole numbers to float if one is missing
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise FieldError("id", "is blank or missing; give every row an id of its own")
    if not isinstance(value, str):
        raise FieldError("id", f"is {excerpt(value)}; write a text or a whole number")
    if CONTROL.search(value):  # CSV readers disagree on where such a row ends
        raise FieldError("id", f"is {excerpt(value)}, with a line break or control character; remove that")
    return whole_characters(value)


def read_turns(cells: Mapping[str, Any], field: str) -> list[str | None]:
    """The text or None of each turn, from a list or from a JSON list."""
    cell = cells.get(field)
    if cell is None or cell == "":
        raise FieldError(field, 'is empty or missing; write one text or null per turn, as in ["Hello", null]')
    value = read_json(cell, field) if isinstance(cell, str) else cell
    if not isinstance(value, list):
        raise FieldError(
            field, f'is {excerpt(value)}, not a list; write one text or null per turn, as in ["Hello", null]'
        )
    for turn, text in enumerate(value, 1):
        if not (text is None or isinstance(text, str)):
            raise FieldError(field, f"has {excerpt(text)} as turn {turn}; write a text or null")
    return [text if text is None else whole_characters(text) for text in value]


def read_text(cells: Mapping[str, Any], field: str) -> str | None:
    """A text; None if it is blank or missing."""
    cell = cells.get(field)
    if is_blank(cell):
        return None
    if not isinstance(cell, str):
        raise FieldError(field, f"is {excerpt(cell)}; write a text")
    return whole_characters(cell)


def read_answers(cells: Mapping[str, Any]) -> list[Any] | None:
    """The texts, not checked yet, of a row's `answers`; none for a question that has none, None if nothing is written.

    The cell is SQuAD's list or object, JSON of it, or a plain text.
    """
    cell = cells.get("answers")
    if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
        cell = read_json(cell, "answers")
    if is_blank(cell):
        return None
    texts = [cell] if isinstance(cell, str) else cell.get("text") if isinstance(cell, dict) else cell
    if not isinstance(texts, list):
        raise FieldError("answers", f"is {excerpt(cell)}; write SQuAD's list of answers, or one text")
    return [each.get("text") if isinstance(each, dict) else each for each in texts]


def is_blank(cell: Any) -> bool:
    """Whether a cell is null, empty or white space."""
    return cell is None or (isinstance(cell, str) and not cell.strip())


def label_form(names: Sequence[str], numbers: tuple[str, ...], word: str) -> tuple[str, ...]:
    """The columns of a file that hold the label: the probabilities of all classes, one word, or none.

    Args:
        names: the file's columns.
        numbers: the columns of the probabilities.
        word: the column of the word.

    Raises:
        FieldError: both forms are there, or only some of the probabilities.
    """
    found = tuple(name for name in numbers if name in names)
    if found and word in names:
        raise FieldError(word, f"is there along with {', '.join(found)}; keep one of the two forms of the label")
    if found and found != numbers:
        missing = [name for name in numbers if name not in names]
        raise FieldError(missing[0], f"is missing, but {', '.join(found)} is there; give all {len(numbers)} or none")
    return found or ((word,) if word in names else ())


def read_probabilities(cells: Mapping[str, Any], columns: Sequence[str]) -> list[float]:
    """The probabilities in these columns, which may be rounded to three digits, scaled to sum to 1.

    Raises `FieldError` if they are not a probability distribution.
    """
    values = [_number(cells[name], name) for name in columns]
    total = sum(values)
    if abs(total - 1) > sum_tolerance(len(values)):
        raise FieldError(
            ", ".join(columns),
            f"are {values}, which sum to {total:g}; write a 1 and zeros, or numbers that sum to 1",
        )
    return [value / total for value in values]


def _number(cell: Any, field: str) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        raise FieldError(field, f"is {excerpt(cell)}; write a number from 0 to 1") from None
    if not math.isfinite(value) or value < 0:
        raise FieldError(field, f"is {value}; write a number from 0 to 1")
    return value


def excerpt(cell: Any, width: int = 60) -> str:
    """A cell as error messages show it: short, on one line, in printable ASCII."""
    if cell is None:
        return "null"
    if not isinstance(cell, str | int | float):
        return f"a {type(cell).__name__}"
    if isinstance(cell, str) and len(cell) > width:
        return f"{json.dumps(cell[:width])} and so on"
    if isinstance(cell, int) and abs(cell) >= 10**width:
        return f"a number of more than {width} digits"
    return json.dumps(cell)


def whole_characters(text: str) -> str:
    """Replaces lone surrogates by U+FFFD: JSON can encode them, but tokenizers and files refuse them."""
    return text if is_utf8(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_utf8(text: str) -> bool:
    """Whether every character can be written as UTF-8; False for bytes read with `surrogateescape`."""
    return text.isascii() or not SURROGATE.search(text)


def read_json(text: str, field: str) -> Any:
    """The value of a JSON text; raises `FieldError` if it is not JSON or repeats a key of an object."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FieldError(field, f"is {excerpt(text)}, which is not JSON: {why}; write it as JSON") from None


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object as a dict. By default Python would silently keep the last of two equal keys."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{excerpt(next(name for name in names if names.count(name) > 1))} appears twice in an object")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeated_keys)  # `json.loads` would create one for each call
