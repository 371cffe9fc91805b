"""What the README promises of the demo, at its real size. Run with `pytest -m slow` (a few minutes)."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from arena.metrics import log_loss
from tests.helpers import arena

pytestmark = pytest.mark.slow


def test_demo_comes_near_the_floor_and_beats_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("train", "infer"):
        arena(monkeypatch, command)
    metrics = json.loads((tmp_path / "runs/demo/fold0/metrics.json").read_text())
    assert 0.80 <= metrics["bayes_log_loss_expected"] <= 0.95
    assert metrics["log_loss"] <= metrics["bayes_log_loss"] + 0.05
    assert metrics["log_loss"] <= metrics["baseline_log_loss"] - 0.03
    assert metrics["baseline_log_loss"] < metrics["prior_log_loss"]
    submission = pd.read_csv("submission.csv", dtype={"id": str}).set_index("id")
    truth = pd.read_csv("data/demo/truth.csv", dtype={"id": str}).set_index("id").loc[submission.index].to_numpy()
    assert len(submission) == 1000
    # against the probabilities themselves, rows never seen in training: expected log-loss and its least possible value
    assert log_loss(truth, submission.to_numpy()) <= log_loss(truth, truth) + 0.05
