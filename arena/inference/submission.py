"""The submission: one finite row of probabilities for every id of a test file, checked and written atomically."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from arena.data.cells import excerpt
from arena.storage.files import atomic_write

TOLERANCE = 1e-6  # for the sum of a row


def write_submission(
    path: Path, ids: Sequence[str], probabilities: np.ndarray, columns: Sequence[str], sample: Path | None
) -> None:
    """Writes ids and probabilities, in the order given.

    Args:
        probabilities: (n, C).
        columns: their names: that of the ids, then one for each class.
        sample: the competition's sample submission, with the required columns and ids; None if there is none.

    Raises:
        ValueError: the submission would not be accepted; nothing is written.
    """
    names = columns[1:]
    table = pd.DataFrame({columns[0]: list(ids), **{name: probabilities[:, at] for at, name in enumerate(names)}})
    with atomic_write(path) as draft:
        table.to_csv(draft, index=False, float_format="%.9f", lineterminator="\n")
        check_submission(draft, ids, columns, sample)


def check_target(path: Path, ids: Sequence[str], columns: Sequence[str], sample: Path | None) -> None:
    """Raises `ValueError` for errors that can be found before anything is judged: in the path or the sample's rows."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file to write")
    if sample is None:
        return
    table = _read(sample)
    if list(table.columns) != list(columns):
        raise ValueError(
            f"{sample} has the columns {_few(table.columns)}, but a submission has {list(columns)}: fetch it again"
        )
    if repeated := table["id"][table["id"].duplicated()].tolist():
        raise ValueError(
            f"{sample} has {len(repeated)} ids more than once, such as {excerpt(repeated[0])}: fetch it again"
        )
    if odd := set(table["id"]) ^ set(ids):
        raise ValueError(
            f"{sample} and the test file differ in {len(odd)} ids, such as {excerpt(min(odd))}: use files that belong "
            "together"
        )


def check_submission(path: Path, ids: Sequence[str], columns: Sequence[str], sample: Path | None) -> None:
    """Reads a submission back as a scorer would.

    Raises:
        ValueError: a column, an id or a number is invalid.
    """
    table = _read(path)
    expected = list(_read(sample).columns) if sample else list(columns)
    if list(table.columns) != expected:
        raise ValueError(f"the submission has the columns {list(table.columns)}, but it must have {expected}")
    if repeated := table["id"][table["id"].duplicated()].tolist():
        raise ValueError(f"the submission has {len(repeated)} ids more than once, such as {repeated[0]!r}")
    wanted = set(map(str, _read(sample)["id"])) if sample else set(map(str, ids))
    for name, odd in (("lacks", wanted - set(table["id"])), ("should not have", set(table["id"]) - wanted)):
        if odd:
            raise ValueError(
                f"the submission {name} {len(odd)} ids, such as {min(odd)!r}; check that the sample and the test file "
                "belong together"
            )
    values = table[list(columns[1:])].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
    bad = ~np.isfinite(values).all(axis=1) | (values < 0).any(axis=1) | (values > 1).any(axis=1)
    bad |= np.abs(values.sum(axis=1) - 1) > TOLERANCE
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{bad.sum()} rows are not probabilities, the first with id {table['id'].iloc[first]!r}: "
            f"{values[first].tolist()}"
        )


def _read(path: Path) -> pd.DataFrame:
    """The file's columns as text. Raises `ValueError` if it is not CSV."""
    if not path.is_file():  # reading a pipe or a device may never end
        raise ValueError(f"{path} is not a regular file: remove it, or put a CSV file in its place")
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OverflowError) as error:  # ValueError: also not UTF-8, empty, or rows that are too long
        raise ValueError(f"{path} cannot be read as CSV: {str(error).strip()}; fetch or write it again") from None


def _few(names: pd.Index) -> str:
    return excerpt(", ".join(map(str, names)), 200)
