"""The load test of the server on a tiny judge: every client is answered, and many are judged together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serve import Serve
from tests.helpers import tiny_recipe
from tests.inference.test_judge_model import saved


@pytest.mark.slow
def test_one_client_and_many(gemma2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(tmp_path, gemma2, "packing.budget=4096")
    saved(tmp_path / "run/fold0", recipe)
    test = str(tmp_path / "rows/test.csv")
    paths = Serve(str(tmp_path / "run"), data=test, clients=8, seconds=1.0, out=tmp_path).run()
    python, one, many = json.loads(paths[0].read_text())["found"]
    assert one["together"] == 1 < many["together"] <= 8 and one["rows"] > 1 and many["rows"] >= 8
    assert python["rows"] > 1 and many["memory_early"] > 0 and len(many["by_round"]) == 5
    assert "POST" not in capsys.readouterr().out and "| 8 clients |" in paths[1].read_text()
