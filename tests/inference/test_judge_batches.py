"""Batches of a pipeline: rows keep their columns and order, and one that cannot be judged says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from arena import JudgeBatches
from arena.settings import MAX_TURNS
from arena.tasks.preference import COLUMNS
from tests.helpers import tiny_recipe
from tests.inference.test_judge_files import rows_of
from tests.inference.test_judge_model import saved


def test_batches_of_a_pipeline(gemma2: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run / "fold0", tiny_recipe(tmp_path, gemma2, "packing.budget=4096"))
    rows: list[dict[str, Any]] = [{**row, "more": at} for at, row in enumerate(rows_of(run))]
    rows[2]["response_a"] = ["x"] * (MAX_TURNS + 1)
    table, judge = pa.Table.from_pylist(rows), JudgeBatches(run)
    found = judge(table)
    assert found.drop_columns([*COLUMNS, "rejected"]).equals(table)
    good = [row for row in range(len(rows)) if row != 2]
    expected = judge.judge.predict_proba([rows[row] for row in good])
    numbers = np.column_stack([found[name].take(good).to_numpy() for name in COLUMNS])
    np.testing.assert_allclose(numbers, expected, atol=1e-6)
    assert [found[name][2].as_py() for name in COLUMNS] == [None] * 3
    assert found["rejected"][2].as_py().startswith("response_a") and found["rejected"].null_count == len(good)
    frame = judge(table.to_pandas())
    np.testing.assert_array_equal(frame[list(COLUMNS)].to_numpy()[good], numbers)
    assert frame["rejected"].notna().tolist() == [row == 2 for row in range(len(rows))]
    labelled = judge(found.rename_columns([*table.column_names, *COLUMNS, "before"]))
    assert labelled.column_names[-4:] == [*(f"p_{name}" for name in COLUMNS), "rejected"]
    assert judge(table.slice(0, 0)).num_rows == 0
    with pytest.raises(ValueError, match="response_b: is missing"):
        judge(table.drop_columns(["response_b"]))
    with pytest.raises(ValueError, match="rejected is a column of the rows"):
        judge(found)
    with pytest.raises(ValueError, match="batch_format='pyarrow'"):
        judge({"prompt": np.array(["x"])})
