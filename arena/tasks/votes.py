"""Votes: preferences between answers of named models, with the style of the answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Features, Value

from arena.data.cells import read_text
from arena.data.limits import Limits
from arena.data.rows import Cells
from arena.tasks.preference import Preference

MODELS = ("model_a", "model_b")
ANSWERS = ("response_a", "response_b")
STYLE = ("length", "headers", "bold", "lists")  # the features of `style_differences`
AT_ONCE = 512
CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
MARKDOWN = (  # headers, bold texts and items of lists
    re.compile(r"^ {0,3}#{1,6}[ \t]", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
    re.compile(r"^[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]", re.MULTILINE),
)


@dataclass(frozen=True)
class Votes(Preference):
    """Rows of the preference task, in any of its layouts, that keep the names of both models; None: not named."""

    rows = "votes"
    features = Features({**Preference.features, **{name: Value("string") for name in MODELS}})

    def file_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        return (*super().file_columns(names), *MODELS)

    def read_texts(self, cells: Cells, limits: Limits) -> Cells:
        return {**super().read_texts(cells, limits), **{name: read_text(cells, name) for name in MODELS}}


def models_of(rows: Dataset) -> list[tuple[str | None, str | None]]:
    """The names of both models of each row."""
    columns = rows.select_columns(list(MODELS)).with_format("arrow")[:]
    return list(zip(*(columns[name].to_pylist() for name in MODELS), strict=True))


def points_of(probabilities: np.ndarray) -> np.ndarray:
    """float64 (n,): what A gets of each vote. A tie is half a win.

    Args:
        probabilities: (n, 3), of the classes.
    """
    return np.asarray(probabilities @ [1.0, 0.0, 0.5])


def style_differences(rows: Dataset) -> np.ndarray:
    """float64 (len(rows), len(STYLE)): (a - b) / (a + b + 1) for each feature of answers A and B."""
    counts: list[list[tuple[int, ...]]] = [[], []]
    for batch in rows.select_columns(list(ANSWERS)).iter(AT_ONCE):
        for found, name in zip(counts, ANSWERS, strict=True):
            found += [_style(turns) for turns in batch[name]]
    a, b = np.array(counts, dtype=np.float64)
    return np.asarray((a - b) / (a + b + 1))


def _style(turns: Sequence[str | None]) -> tuple[int, ...]:
    """The features of an answer: its characters, and the Markdown outside of fenced code."""
    text = "\n".join(turn or "" for turn in turns)
    plain = CODE.sub("", text)
    return (len(text), *(len(pattern.findall(plain)) for pattern in MARKDOWN))
