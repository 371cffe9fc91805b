"""Folds for cross-validation, stratified by label, with all rows of the same first prompt in one fold."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from arena.data.cached import reading_cached
from arena.data.cells import excerpt
from arena.storage.files import atomic_write, fingerprint

FORMAT = 1  # part of the cached file's name: increase it when keys or folds would be different
ROWS_AT_ONCE = 1_000

Folds = NDArray[np.int8]


def prompt_key(prompt: Sequence[str | None]) -> str:
    """The key by which prompts are equal: the first turn that is not blank, regardless of case and white space.

    Compatibility forms are normalised too (NFKC). The key of a prompt without text is "".
    """
    first = next((turn for turn in prompt if turn and turn.strip()), "")
    folded = unicodedata.normalize("NFKC", first).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())  # casefold can undo the composed form


def assign_folds(rows: Dataset, n_folds: int, seed: int, keys: list[str] | None = None) -> Folds:
    """The fold of each row, int8 (len(rows),), from 0 to n_folds - 1.

    Rows with the same prompt key share a fold, and each fold gets its share of every label (the class with the largest
    probability). The fold of a prompt does not depend on the order of the rows.

    Args:
        keys: the `prompt_keys` of the rows, if they are already known.

    Raises:
        ValueError: a row has no label, or there are too few prompts to fill the folds.
    """
    if not 2 <= n_folds <= np.iinfo(np.int8).max:
        raise ValueError(f"n_folds is {n_folds}; it must be from 2 to {np.iinfo(np.int8).max}")
    every_key = np.array(prompt_keys(rows) if keys is None else keys, dtype=object)
    groups, distinct = pd.factorize(every_key, sort=True)  # sorted, so that the order of the rows does not matter
    if len(distinct) < n_folds:
        raise ValueError(f"{len(distinct)} different prompts cannot fill {n_folds} folds; use fewer folds or more data")
    classes = _labels(rows).argmax(axis=1)
    if np.bincount(classes).max() < n_folds:
        raise ValueError(f"no label has {n_folds} rows, one for each fold; use fewer folds or more data")
    folds = np.full(len(rows), -1, dtype=np.int8)
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(classes, classes, groups)):
        folds[held_out] = fold
    _check_filled(folds, n_folds)
    return folds


def load_or_assign_folds(rows: Dataset, n_folds: int, seed: int, cache_dir: Path) -> Folds:
    """The cached folds of the same ids, prompts, labels, `n_folds` and `seed`; assigned and cached if there are none.

    Returns int8 (len(rows),). The cache is a parquet file in `cache_dir` (`id` string, `fold` int8) in the order of the
    rows. Raises `ValueError` as `assign_folds` does, and if the cached file does not fit the rows.
    """
    ids = _column(rows, "id").to_pylist()
    keys = prompt_keys(rows)
    content = fingerprint(FORMAT, n_folds, seed, ids, keys, _labels(rows).tobytes())
    stored = cache_dir / f"folds-{content}.parquet"
    if not stored.exists():
        assigned = assign_folds(rows, n_folds, seed, keys)
        with atomic_write(stored) as draft:
            pq.write_table(pa.table({"id": ids, "fold": assigned}), draft)
    with reading_cached(stored):
        table = pq.read_table(stored, columns=["id", "fold"])
    if table["id"].to_pylist() != ids:
        raise ValueError(f"{stored} does not have the ids of these rows; delete it to assign the folds again")
    folds: Folds = table["fold"].to_numpy().astype(np.int8)  # a copy, which the caller may change
    _check_filled(folds, n_folds)
    check_no_leak(rows, folds, keys)
    return folds


def check_no_leak(rows: Dataset, folds: Folds, keys: list[str] | None = None) -> None:
    """Raises `ValueError` if rows with the same prompt key are in different folds; the message names the first.

    Args:
        keys: the `prompt_keys` of the rows, if they are already known.
    """
    if len(folds) != len(rows):
        raise ValueError(f"{len(folds)} folds were given for {len(rows)} rows; give one for each row")
    fold_of: dict[str, int] = {}
    for index, (key, fold) in enumerate(zip(prompt_keys(rows) if keys is None else keys, folds.tolist(), strict=True)):
        if fold_of.setdefault(key, fold) != fold:
            raise ValueError(
                f"the prompt {excerpt(key)} is in folds {fold_of[key]} and {fold} (row with id {rows[index]['id']}): a "
                "judge would be evaluated on a prompt that it was trained on; group rows by prompt"
            )


def leaking(extra: Dataset, held_out: Dataset) -> NDArray[np.bool_]:
    """bool (len(extra),): rows whose prompt key occurs in `held_out`."""
    held_out_keys = set(prompt_keys(held_out))
    return np.fromiter((key in held_out_keys for key in prompt_keys(extra)), dtype=np.bool_, count=len(extra))


def prompt_keys(rows: Dataset) -> list[str]:
    """The `prompt_key` of every row; the key of a repeated prompt is computed once."""
    keys: dict[tuple[str | None, ...], str] = {}
    result = []
    for batch in rows.select_columns("prompt").iter(ROWS_AT_ONCE):
        for prompt in map(tuple, batch["prompt"]):
            if prompt not in keys:
                keys[prompt] = prompt_key(prompt)
            result.append(keys[prompt])
    return result


def _column(rows: Dataset, name: str) -> pa.ChunkedArray:
    return rows.select_columns(name).with_format("arrow")[:][name]


def _labels(rows: Dataset) -> NDArray[np.float32]:
    """float32 (len(rows), 3)."""
    labels = _column(rows, "label").combine_chunks()
    if labels.null_count:
        first = rows[labels.is_null().index(True).as_py()]["id"]
        raise ValueError(f"{labels.null_count} rows have no label, the first with id {first}; folds need labelled rows")
    return np.asarray(labels.flatten(), dtype=np.float32).reshape(-1, 3)


def _check_filled(folds: Folds, n_folds: int) -> None:
    counts = np.bincount(folds[folds >= 0], minlength=n_folds)
    if folds.min() < 0 or len(counts) > n_folds or not counts.all():
        raise ValueError(f"the rows per fold are {counts.tolist()}, not {n_folds} filled folds; use fewer folds")
