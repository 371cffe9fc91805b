"""Folds for cross-validation, stratified by label, with all rows of the same group (prompt) in one fold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from arena.data.cells import excerpt
from arena.data.columns import digest, end_to_end, numbered
from arena.data.dataset import Rows, reading_cached
from arena.storage.files import atomic_write, fingerprint

FORMAT = 3  # part of the cached file's name: increase it when keys or folds would be different

Folds = NDArray[np.int8]


def assign_folds(rows: Rows, n_folds: int, seed: int, groups: NDArray[np.int64] | None = None) -> Folds:
    """The fold of each row, int8 (len(rows),), from 0 to n_folds - 1.

    Rows of the same group share a fold, and each fold gets its share of every label (the class with the largest
    probability), or of all rows if the task has no classes. The fold of a group does not depend on the order of the
    rows.

    Args:
        groups: `group_numbers` of the rows, if they are already known.

    Raises:
        ValueError: a row has no label, or there are too few groups to fill the folds.
    """
    if not 2 <= n_folds <= np.iinfo(np.int8).max:
        raise ValueError(f"n_folds is {n_folds}; it must be from 2 to {np.iinfo(np.int8).max}")
    numbers = group_numbers(rows) if groups is None else groups
    if (distinct := int(numbers.max(initial=-1)) + 1) < n_folds:
        raise ValueError(
            f"{distinct} groups of rows (by {rows.task.group_by}) cannot fill {n_folds} folds: lower data.folds, "
            "or use more data"
        )
    classes = rows.labels.argmax(axis=1) if rows.task.classes else np.zeros(len(rows), dtype=np.int64)
    if np.bincount(classes).max() < n_folds:
        raise ValueError(f"no label has {n_folds} rows, one for each fold; use fewer folds or more data")
    folds = np.full(len(rows), -1, dtype=np.int8)
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(classes, classes, numbers)):
        folds[held_out] = fold
    _check_filled(folds, n_folds)
    return folds


def load_or_assign_folds(rows: Rows, n_folds: int, seed: int, cache_dir: Path) -> Folds:
    """The cached folds of the same ids, groups, labels, `n_folds` and `seed`; assigned and cached if there are none.

    Returns int8 (len(rows),). The cache is a parquet file in `cache_dir` (`id` string, `fold` int8) in the order of the
    rows. Raises `ValueError` as `assign_folds` does, and if the cached file does not fit the rows.
    """
    keys = end_to_end(rows.group_keys())
    content = fingerprint(FORMAT, n_folds, seed, digest(end_to_end(rows.ids)), digest(keys), rows.labels.tobytes())
    groups = numbered(keys)
    del keys
    stored = cache_dir / f"folds-{content}.parquet"
    if not stored.exists():
        assigned = assign_folds(rows, n_folds, seed, groups)
        with atomic_write(stored) as draft:
            pq.write_table(pa.table({"id": rows.ids.column, "fold": assigned}), draft)
    with reading_cached(stored):
        table = pq.read_table(stored, columns=["id", "fold"])
    if not table["id"].equals(rows.ids.column):
        raise ValueError(f"{stored} does not have the ids of these rows; delete it to assign the folds again")
    folds: Folds = table["fold"].to_numpy().astype(np.int8)  # a copy, which the caller may change
    _check_filled(folds, n_folds)
    check_no_leak(rows, folds, groups)
    return folds


def group_numbers(rows: Rows) -> NDArray[np.int64]:
    """int64 (len(rows),): the place of each row's group among all in the order of their keys, whatever the rows'."""
    return numbered(end_to_end(rows.group_keys()))


def check_no_leak(rows: Rows, folds: Folds, groups: NDArray[np.int64] | None = None) -> None:
    """Raises `ValueError` if rows of the same group are in different folds; the message names the first."""
    if len(folds) != len(rows):
        raise ValueError(f"{len(folds)} folds were given for {len(rows)} rows; give one for each row")
    numbers = group_numbers(rows) if groups is None else groups
    fold_of = folds[np.unique(numbers, return_index=True)[1]]  # of each group's first row
    if len(wrong := np.flatnonzero(fold_of[numbers] != folds)):
        index, name = int(wrong[0]), rows.task.group_by
        key = rows.task.group(rows.table[index][name])
        raise ValueError(
            f"the {name} {excerpt(key)} is in folds {fold_of[numbers[index]]} and {folds[index]} (row with id "
            f"{rows.ids[index]}): a model would be evaluated on a {name} that it was trained on; group rows by {name}"
        )


def leaking(extra: Rows, rows: Rows, held_out: np.ndarray) -> NDArray[np.bool_]:
    """bool (len(extra),): rows whose group is that of one of the rows `held_out`, int64 indices into `rows`."""
    held_out_keys = end_to_end(rows.group_keys()).take(pa.array(held_out))
    found = pc.is_in(end_to_end(extra.group_keys()), value_set=held_out_keys)
    return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.bool_)


def _check_filled(folds: Folds, n_folds: int) -> None:
    counts = np.bincount(folds[folds >= 0], minlength=n_folds)
    if folds.min() < 0 or len(counts) > n_folds or not counts.all():
        raise ValueError(f"the rows per fold are {counts.tolist()}, not {n_folds} filled folds; use fewer folds")
