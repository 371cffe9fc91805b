"""The table of a fold, and the advice about a judge that is not better than simple references."""

from __future__ import annotations

from typing import Any

import pytest

from arena.progress import console
from arena.reporting.report import print_report, remark

METRICS = {
    "recipe": "demo", "fold": 0, "n_eval": 10, "accuracy": 0.5, "ece": 0.1, "tokens": 10, "unique_tokens": 9,
    "train_seconds": 1.0, "tokens_per_second": 10.0, "fill_rate": 0.9, "peak_memory_bytes": 2**30,
    "bayes_log_loss": 0.8, "log_loss": 1.0, "baseline_log_loss": 1.05, "prior_log_loss": 1.09,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, None),
        ({"baseline_log_loss": None}, None),
        ({"baseline_log_loss": 0.99}, "no better than the simple baseline:"),
        ({"prior_log_loss": 0.9, "baseline_log_loss": None}, "no better than predicting the training prior:"),
        ({"log_loss": 1.2}, "no better than predicting the training prior and the simple baseline:"),
    ],
)
def test_a_judge_that_is_no_better_gets_a_remark(
    changes: dict[str, Any], named: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = remark(METRICS | changes)
    assert found is None if named is None else named in (found or "")
    print_report(METRICS | changes)
    assert ("usually help" in capsys.readouterr().out) == (named is not None)


def score(value: float, low: float | None = 0.25, high: float | None = 0.75) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "rows": 1234}


@pytest.mark.parametrize("best_step", [3, 5])
def test_scores_and_slices_are_shown_and_the_last_step_beside_another_best(
    best_step: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_width", 160)
    parts = {"log_loss": score(0.9), "prior_log_loss": score(1.08), "accuracy": score(0.6), "prior_accuracy": score(0)}
    tables = {
        "scores": {"log_loss": score(1.0), "flip_rate": score(0.125, None, None), "new_metric": score(0.5)},
        "last_step_scores": {"log_loss": score(1.0875)},
        "slices": {"turns": {"1": parts, "3 or more": parts}},
    }
    print_report(METRICS | {"best_step": best_step, "steps": 5} | tables)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert ("the last step, which was not chosen" in "".join(shown)) == (best_step == 3)
    (loss,) = [line for line in shown if line.strip("│ ").startswith("log-loss") and "1,234" in line]
    assert "0.250 to 0.750" in loss and ("1.087" in loss) == (best_step == 3)
    (flips,) = [line for line in shown if "flip rate" in line]
    assert "0.125" in flips and " to " not in flips
    (part,) = [line for line in shown if "3 or more" in line]
    assert "turns" not in part and "0.900 ± 0.250" in part and "0.600 ± 0.250" in part and "1.080" in part
    assert any("new_metric" in line for line in shown)


def test_kinds_of_special_rows_are_shown_if_there_are_any(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_width", 160)
    kind = {"train_rows": 1041, "mean": [0.021, 0.93, 0.049], "held_out_rows": 10, "gain": 0.25, "standard_error": 0.01}
    nothing = {"held_out_rows": 0, "gain": None, "standard_error": None}
    print_report(METRICS | {"kinds": {"A empty": kind | {"taken": True}, "last": kind | nothing | {"taken": False}}})
    lines = capsys.readouterr().out.splitlines()
    (first,), (last,) = ([line for line in lines if name in line] for name in ("A empty", "last"))
    assert all(each in first for each in ("1,041", "0.02 0.93 0.05", "+0.2500 ± 0.0100", "yes"))
    assert "no" in last and "±" not in last
    for none in ({}, {"kinds": {}}):  # of an earlier version, and without such rows
        print_report(METRICS | none)
        assert "special rows" not in capsys.readouterr().out
