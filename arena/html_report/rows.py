"""The held-out rows of a run: predictions, labels, slices and texts, and as many of them as a page can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from arena.data.dataset import Rows
from arena.data.files import read_files
from arena.data.prepare import held_out_file
from arena.data.rows import ROWS_AT_ONCE
from arena.data.task import Masks, Task
from arena.html_report.page import as_json
from arena.html_report.source import Fold, Source, damaged
from arena.metrics import log_loss
from arena.model.backbone import load_tokenizer
from arena.progress import progress, warn
from arena.settings import Recipe
from arena.training.scores import token_slices

MOST_ROWS = 50_000  # whose numbers are in the page
LONGEST = 6_000  # characters of a text
TEXT_BYTES = 12 * 2**20  # of all texts together


@dataclass(frozen=True)
class HeldOut:
    """Labelled rows and what was predicted for them by folds that held them out.

    Attributes:
        folds: int (n,), the fold of each row.
        labels, predicted, prior: float64 (n, C).
        orders: float64 (orders, n, C), predictions in each order, in the classes of the row as given; NaN for rows
            without input. None where that is not known, or there is one order.
        rows: with their texts; None if the data are gone; `missing` explains what is.
        tokens: int (n,), of each row before truncation; None without `rows`, or without a tokenizer.
        slices: by property and value, which rows have it.
    """

    task: Task
    ids: list[str]
    folds: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    prior: np.ndarray
    orders: np.ndarray | None
    rows: Rows | None
    tokens: np.ndarray | None
    slices: Mapping[str, Masks]
    missing: str | None

    @property
    def losses(self) -> np.ndarray:
        """float64 (n,): the log-loss of each row, which is large where a row is confidently wrong."""
        return log_loss.terms(self.labels, self.predicted)


def moved(recipe: Recipe, data: str | None) -> Recipe:
    """The recipe with its rows in another place; None: where they were."""
    if data is None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": data})})


def read_held_out(source: Source, data: str | None) -> HeldOut:
    """The held-out rows of a run whose task has classes.

    Args:
        data: where the rows are; None: where they were in training.
    """
    task, recipe = source.task, moved(source.recipe, data)
    tables = [fold.predictions for fold in source.folds]
    lengths = [len(table) for table in tables]
    labels, predicted = (
        np.concatenate([_numbers(fold, [f"{kind}{name}" for name in task.columns]) for fold in source.folds])
        for kind in ("label_", "")
    )
    ids = [name for table in tables for name in table["id"]]
    rows, missing = _rows(recipe, task, ids, labels)
    tokens, slices = None, dict[str, Masks]()
    if rows is not None:
        tokens, by_length, missing = _lengths(rows, source, recipe)
        slices = {**by_length, **task.slices(rows.table)}
    return HeldOut(
        task=task, ids=ids, labels=labels, predicted=predicted, rows=rows, missing=missing, tokens=tokens,
        folds=np.repeat([fold.metrics["fold"] for fold in source.folds], lengths),
        prior=np.repeat([fold.prior for fold in source.folds], lengths, axis=0),
        orders=_orders(source, predicted, None if rows is None else rows.has_input),
        slices=slices,
    )  # fmt: skip


def _numbers(fold: Fold, columns: Sequence[str]) -> np.ndarray:
    """Columns of a fold's predictions, float64 (n, C). Raises `ValueError` if the file does not have them all."""
    file, table = fold.folder / "oof.csv", fold.predictions
    if missing := [name for name in ("id", *columns) if name not in table]:
        raise damaged(file, f"it has no column {missing[0]}")
    if len(table) != fold.metrics["n_eval"]:
        raise damaged(file, f"it has {len(table):,} rows, but metrics.json is of {fold.metrics['n_eval']:,}")
    numbers: np.ndarray = table[list(columns)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    if not (finite := np.isfinite(numbers)).all():
        row, column = np.argwhere(~finite)[0].tolist()
        raise damaged(file, f"row {row + 1} has no number in the column {columns[column]}")
    return numbers


def _rows(recipe: Recipe, task: Task, ids: Sequence[str], labels: np.ndarray) -> tuple[Rows | None, str | None]:
    """The rows with these ids, or why there are none: a report is worth reading without texts too."""
    try:
        rows = read_files([held_out_file(recipe.data)], task, recipe.data, "required")
        at = dict(zip(rows.ids, range(len(rows)), strict=True))
        if unknown := [name for name in ids if name not in at]:
            raise ValueError(f"{recipe.data.path} has no row with the id {unknown[0]}: name the run's own data")
        own = replace(rows, table=rows.table.select([at[name] for name in ids]))
        if not np.allclose(own.labels, labels, atol=1e-5):
            raise ValueError(f"the labels in {recipe.data.path} are not those of the run: name the run's own data")
    except (ValueError, OSError) as error:
        missing = f"The texts and slices of rows are missing here: {' '.join(str(error).split())}"
        warn(f"{missing} (--data names the place of the run's data)")
        return None, missing
    return own, None


def _lengths(rows: Rows, source: Source, recipe: Recipe) -> tuple[np.ndarray | None, dict[str, Masks], str | None]:
    """The tokens of each row before truncation, int (n,), and the slices by them; or why there are none."""
    try:
        tokenizer = load_tokenizer(str(source.folds[0].folder / "model"))
    except ValueError as error:
        missing = f"The slices by length are missing here: {' '.join(str(error).split())}"
        warn(missing)
        return None, {}, missing
    encoder = rows.task.encoder(tokenizer, recipe.prompt)
    counts = []
    with progress("counting tokens", len(rows)) as advance:
        for batch in rows.table.select_columns(list(rows.task.texts)).iter(ROWS_AT_ONCE):
            examples = list(encoder.encode(batch))
            counts += [(len(each.input_ids) + each.tokens_cut, each.tokens_cut) for each in examples]
            advance(len(examples))
    tokens, cut = np.array(counts).T
    return tokens, token_slices(tokens, cut), None


def _orders(source: Source, mean: np.ndarray, has_input: np.ndarray | None) -> np.ndarray | None:
    """Both orders: the checkpoint has the predictions as given, and the mean of both is known."""
    if source.task.orders != 2 or not source.recipe.judge.swap:
        return None
    first, start = np.full_like(mean, np.nan), 0
    for fold in source.folds:
        given, end = fold.as_given(), start + len(fold.predictions)
        scored = np.ones(end - start, dtype=bool) if has_input is None else has_input[start:end]
        if given is None or len(given) != scored.sum():
            return None
        first[start:end][scored] = given
        start = end
    return np.stack([first, 2 * mean - first])


def _text(value: Any) -> Any:
    """A text as the page shows it: whole, or its beginning with the number of characters that are left out."""
    if isinstance(value, list):
        return [_text(each) for each in value]
    return value if value is None or len(value) <= LONGEST else [value[:LONGEST], len(value) - LONGEST]


def texts(held_out: HeldOut, order: Sequence[int], most: int) -> list[list[Any]]:
    """The texts of the first rows of an order, at most so many, and no more than a page can hold."""
    found, room = list[list[Any]](), TEXT_BYTES
    for cells in _cells(held_out, order[:most]):
        room -= len(as_json(cells).encode())
        if room < 0:
            break
        found.append(cells)
    return found


def _cells(held_out: HeldOut, order: Sequence[int]) -> Iterator[list[Any]]:
    if held_out.rows is None:
        return
    names = list(held_out.task.texts)
    for batch in held_out.rows.table.select_columns(names).select(order).iter(ROWS_AT_ONCE):
        for cells in zip(*(batch[name] for name in names), strict=True):
            yield [_text(cell) for cell in cells]
