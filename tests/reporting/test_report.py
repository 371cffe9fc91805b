"""The table of a fold, and the advice about a judge that is not better than simple references."""

from __future__ import annotations

from typing import Any

import pytest

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
