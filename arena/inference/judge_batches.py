"""Judges batches of rows in a pipeline of one's own, such as one of Ray Data.

rows.map_batches(arena.JudgeBatches, fn_constructor_args=["runs/demo"], batch_format="pyarrow", num_gpus=1)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa

from arena.data.limits import Limits
from arena.data.records import cells_of, good_records
from arena.data.rows import required
from arena.distributed import fix_threads
from arena.inference.judge import Judge
from arena.inference.judge_work import INFINITE, finite, result_columns

REJECTED = "rejected"  # the column that says why a row was not judged

Batch: TypeAlias = pa.Table | pd.DataFrame


class JudgeBatches:
    """Loads a judge once, then adds its probabilities to batches of rows.

    A batch is judged as a whole: some thousand rows fill its micro-batches, and rows with the same prompt share it if
    they are in the same batch.

    Args:
        names, settings, runs: as for `Judge.from_pretrained`.

    Raises:
        ValueError: there is no such judge, or it cannot be loaded.
    """

    def __init__(self, *names: str | Path, settings: Sequence[str] = (), runs: str | Path = "runs") -> None:
        fix_threads()
        self.judge = Judge.from_pretrained(*names, settings=settings, runs=runs)
        self._limits = Limits.of(self.judge.models[0].recipe.data)

    def __call__(self, batch: Batch) -> Batch:
        """The rows of a batch, in their order, with more columns.

        Args:
            batch: a pyarrow table or a pandas data frame with the columns of a file of rows, in any layout.

        Returns:
            The same, with the probabilities of the classes (float64) under the names that `arena judge` gives them, and
            `rejected` (text): why a row could not be judged, which then has no probabilities; otherwise null.

        Raises:
            ValueError: the batch is something else, lacks a column that the task needs, or has one of the results.
        """
        names = self._names(batch)
        columns = list(result_columns(names, self.judge.task))
        cells = cells_of(batch) if isinstance(batch, pd.DataFrame) else batch.to_pylist()
        rows, problems = good_records(cells, self.judge.task, "ignored", self._limits)
        why = {number: f"{problem.field}: {problem.what}" for number, problem in problems}
        judged = [number for number in range(len(cells)) if number not in why]
        numbers = np.full((len(cells), len(columns)), np.nan)
        numbers[judged] = finite(self.judge, rows, len(columns), None)[0]
        why |= {number: ": ".join(INFINITE) for number in judged if np.isnan(numbers[number]).any()}
        return _with_columns(batch, dict(zip(columns, numbers.T, strict=True)), [*map(why.get, range(len(cells)))])

    def _names(self, batch: pa.Table | pd.DataFrame) -> list[str]:
        """The columns of a batch, which are checked."""
        if not isinstance(batch, pa.Table | pd.DataFrame):
            raise ValueError(
                f"a batch is a {type(batch).__name__}: write batch_format='pyarrow' or 'pandas' in map_batches"
            )
        names = list(map(str, batch.columns)) if isinstance(batch, pd.DataFrame) else batch.column_names
        required(self.judge.task.file_columns(names), names)
        if REJECTED in names:
            raise ValueError(f"{REJECTED} is a column of the rows, but results are written there: rename it")
        return names


def _with_columns(batch: Batch, numbers: dict[str, np.ndarray], rejected: Sequence[str | None]) -> Batch:
    if isinstance(batch, pd.DataFrame):
        columns: dict[str, Any] = {**numbers, REJECTED: pd.array(rejected, dtype="string")}
        return batch.assign(**columns)
    for name, values in numbers.items():
        batch = batch.append_column(name, pa.array(values, from_pandas=True))
    return batch.append_column(REJECTED, pa.array(rejected, pa.string()))
