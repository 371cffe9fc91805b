"""Parses the cells of a row: its id, its turns and its label [A, B, tie]. Errors name the field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from arena.metrics import CLASSES, SUM_TOLERANCE

Labels = Literal["required", "optional", "ignored"]

NUMBERS = CLASSES
WORD = "winner"
WORDS = {
    "model_a": [1.0, 0.0, 0.0],
    "model_b": [0.0, 1.0, 0.0],
    "tie": [0.0, 0.0, 1.0],
    "tie (bothbad)": [0.0, 0.0, 1.0],
}
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


def label_columns(names: Collection[str], labels: Labels) -> tuple[str, ...]:
    """The columns among `names` that hold the label: three numbers, one word, or none.

    Raises `FieldError` if only some of the three numbers are there, if there are both numbers and a word, or if there
    is no label although `labels` is "required".
    """
    if labels == "ignored":
        return ()
    numbers = tuple(name for name in NUMBERS if name in names)
    if numbers and WORD in names:
        raise FieldError(WORD, f"is there along with {', '.join(numbers)}; keep one of the two forms of the label")
    if numbers and numbers != NUMBERS:
        missing = [name for name in NUMBERS if name not in names]
        raise FieldError(missing[0], f"is missing, but {', '.join(numbers)} is there; give all three or none")
    if labels == "required" and not numbers and WORD not in names:
        raise FieldError(NUMBERS[0], f"is missing; labelled rows need {', '.join(NUMBERS)}, or `{WORD}`")
    return numbers or ((WORD,) if WORD in names else ())


def read_label(record: Mapping[str, Any], labels: Labels) -> list[float] | None:
    """The probabilities [A, B, tie] of a row, which sum to 1; None if it has no label.

    Raises `FieldError` for a label that is not a probability distribution, and for a missing label if `labels` is
    "required".
    """
    columns = label_columns(record, labels)
    cells = [record[name] for name in columns]
    if all(_is_blank(cell) for cell in cells):
        if labels == "required":
            raise FieldError(columns[0], "is blank; label the row or leave it out")
        return None
    if columns == (WORD,):
        return _from_word(cells[0])
    return _from_numbers([_number(cell, name) for cell, name in zip(cells, columns, strict=True)])


def _is_blank(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _from_word(cell: Any) -> list[float]:
    word = cell.strip().casefold() if isinstance(cell, str) else None
    if word not in WORDS:
        raise FieldError(WORD, f"is {excerpt(cell)}; write one of {', '.join(WORDS)}")
    return list(WORDS[word])


def _number(cell: Any, field: str) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        raise FieldError(field, f"is {excerpt(cell)}; write a number from 0 to 1") from None
    if not math.isfinite(value) or value < 0:
        raise FieldError(field, f"is {value}; write a number from 0 to 1")
    return value


def _from_numbers(values: list[float]) -> list[float]:
    total = sum(values)
    if abs(total - 1) > SUM_TOLERANCE:
        raise FieldError(
            ", ".join(NUMBERS),
            f"are {values}, which sum to {total:g}; write one 1 and two 0, or three that sum to 1",
        )
    return [value / total for value in values]


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
