"""Judges of several sets of votes: what is trained once is read again, and the page shows the last step's figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from arena.config import save_recipe
from benchmarks.votes import COLUMNS, Votes
from tests.helpers import tiny_recipe


def test_sets_are_trained_once_and_written_to_a_page(
    gemma2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, gemma2, "train.evaluate_every=1")
    (tmp_path / "tiny.yaml").write_text(save_recipe(recipe))
    rows = next(Path(recipe.data.path).glob("train.*"))
    files = tuple(Path(shutil.copy(rows, tmp_path / f"{name}{rows.suffix}")) for name in ("mine", "llmfao_soft"))
    votes = Votes(files, recipe=str(tmp_path / "tiny.yaml"), fold=1, runs=tmp_path / "runs", out=tmp_path / "docs")
    paths = votes.run()
    assert [path.name for path in paths] == ["votes.json", "votes.md", "votes.png"]
    result, page = json.loads(paths[0].read_text()), paths[1].read_text()
    assert result["votes"]["llmfao_soft"]["n_train"] == result["votes"]["mine"]["n_train"]
    assert result["votes"]["llmfao_soft"]["steps"] < result["votes"]["mine"]["steps"]  # of a share of the rows
    assert "- `llmfao_soft`: `train.epochs=0.65`" in page and "- `mine`" not in page
    for name, metrics in result["votes"].items():
        assert f"| {name} | {metrics['n_train']:,} |" in page
        assert f"| {metrics['last_step_scores']['log_loss']['value']:.3f} |" in page
        assert metrics["curve"][-1][0] == metrics["steps"] and metrics["fold"] == 1
    assert all(line.count("|") == len(COLUMNS) + 1 for line in page.splitlines() if line.startswith("|"))
    capsys.readouterr()
    votes.run()
    assert capsys.readouterr().out.count("there is nothing to train") == 2
    assert json.loads(paths[0].read_text())["votes"] == result["votes"]
