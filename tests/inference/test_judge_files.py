"""`arena judge`: files in and out, here and at a URL, resumed after a kill, in shares, and trained on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arena import Judge
from arena.config import change
from arena.data.predictions import read_predictions
from arena.data.prepare import prepare_fold
from arena.inference import judge_inputs
from arena.inference.blend import Blend, Member, SavedBlend, save_blend
from arena.inference.judge_model import JudgeModel
from arena.model.backbone import load_tokenizer
from arena.tasks import task_of
from arena.tasks.preference import COLUMNS
from arena.training.members import read_members
from tests.helpers import Processes, status_of_arena, tiny_recipe
from tests.inference.test_judge_model import saved

SMALL = "from arena.inference import judge_inputs; judge_inputs.WINDOW_ROWS = {rows}\n"
# it waits after each part, so that there is something to be cut
SLOWED = """
import time
from arena.inference import judge_inputs
from arena.storage import parts
judge_inputs.WINDOW_ROWS = 4
write = parts.Parts.write
def slow(self, *args):
    write(self, *args)
    time.sleep(0.15)
parts.Parts.write = slow
"""
HOSTILE = ["a,b", 'say "x"', "new\nline", "lone\rreturn", "é 漢字 🎉", " spaces ", "a.b", "", "prompt.a", "__index_level_0__"]


@pytest.fixture(scope="module")
def run(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two folds, on the rows of `rows`."""
    folder = tmp_path_factory.mktemp("judge")
    recipe = tiny_recipe(folder, gemma2, "packing.budget=4096")
    for fold in range(2):
        saved(folder / "run" / f"fold{fold}", recipe, seed=fold)
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run: Path) -> np.ndarray:
    """What the judge says of the rows of `rows_of`."""
    return Judge.from_pretrained(run).predict_proba(rows_of(run))


def rows_of(run: Path) -> list[dict[str, Any]]:
    table = pd.read_csv(run.parent / "rows/test.csv", dtype=str)
    names = ("prompt", "response_a", "response_b")
    return [{**row, **{name: json.loads(row[name]) for name in names}} for row in table.to_dict("records")]


def judge(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    return status_of_arena(monkeypatch, "judge", *words)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            if path.suffix == ".tsv":
                writer.writer = csv.writer(handle, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
            writer.writeheader()
            writer.writerows({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def probabilities(path: Path, columns: tuple[str, ...] = COLUMNS) -> np.ndarray:
    return np.array([[float(row[name]) for name in columns] for row in read(path)])


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_it_says_what_the_judge_says(
    ending: str, run: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in every kind of file; nothing is left beside the result."""
    source = write(tmp_path / f"in{ending}", rows_of(run))
    for kind in (".csv", ".jsonl", ".parquet"):
        out = tmp_path / "new" / f"out{kind}"
        assert judge(monkeypatch, run, source, out) == 0
        assert np.array_equal(probabilities(out), expected)
        assert [row["id"] for row in read(out)] == [row["id"] for row in rows_of(run)]
        assert list(out.parent.iterdir()) == [out]
        shutil.rmtree(out.parent)
