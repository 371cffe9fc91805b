"""The submission: complete and right, or absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from arena.inference.infer import check_submission, write_submission

COLUMNS = ["winner_model_a", "winner_model_b", "winner_tie"]
IDS = ["7", "007", "3"]
GOOD = np.array([[0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3], [1e-12, 1.0, 0.0]])


def sample(folder: Path, ids: list[str] = IDS) -> Path:
    path = folder / "sample_submission.csv"
    pd.DataFrame({"id": ids, "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}).to_csv(path, index=False)
    return path


def test_written_in_the_order_given(tmp_path: Path) -> None:
    out = tmp_path / "submission.csv"
    write_submission(out, IDS, GOOD, COLUMNS, sample(tmp_path))
    table = pd.read_csv(out, dtype={"id": str})
    assert list(table.columns) == ["id", "winner_model_a", "winner_model_b", "winner_tie"]
    assert table["id"].tolist() == IDS
    assert np.abs(table.iloc[:, 1:].to_numpy() - GOOD).max() < 1e-8


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (["7", "7", "3"], GOOD, "ids more than once, such as '7'"),
        (["7", "8", "3"], GOOD, "lacks 1 ids, such as '007'"),
        (IDS[:2], GOOD[:2], "lacks 1 ids, such as '3'"),
        ([*IDS, "9"], np.vstack([GOOD, GOOD[:1]]), "should not have 1 ids, such as '9'"),
        (IDS, GOOD * 0.9, "3 rows are not probabilities, the first with id '7'"),
        (IDS, np.where(GOOD > 0.9, np.nan, GOOD), "1 rows are not probabilities, the first with id '3'"),
        (IDS, GOOD + np.array([-0.4, 0.4, 0]), "not probabilities"),
    ],
)
def test_what_a_scorer_would_refuse_is_not_written(
    tmp_path: Path, ids: list[str], values: np.ndarray, message: str
) -> None:
    out = tmp_path / "submission.csv"
    out.write_text("an older submission")
    with pytest.raises(ValueError, match=message):
        write_submission(out, ids, values, COLUMNS, sample(tmp_path))
    assert out.read_text() == "an older submission"


def test_columns_are_those_of_the_sample(tmp_path: Path) -> None:
    path = sample(tmp_path)
    path.write_text(path.read_text().replace("winner_tie", "tie"))
    with pytest.raises(ValueError, match="it must have"):
        write_submission(tmp_path / "submission.csv", IDS, GOOD, COLUMNS, path)


def test_without_a_sample_the_ids_of_the_test_file_count(tmp_path: Path) -> None:
    out = tmp_path / "submission.csv"
    write_submission(out, IDS, GOOD, COLUMNS, None)
    with pytest.raises(ValueError, match="lacks 1 ids, such as '5'"):
        check_submission(out, [*IDS, "5"], COLUMNS, None)
