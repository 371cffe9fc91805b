"""Costs by hand."""

from __future__ import annotations

import pytest

from benchmarks.costs import Costs


def test_costs_by_hand() -> None:
    line = Costs(mean_tokens=36, price=2.0, efficiency=0.5).line("any", 4, 1_000, rate=10.0)
    assert line["gpu_hours"] == pytest.approx(2.0)  # 36,000 tokens at 5 a second
    assert (line["hours"], line["price"]) == pytest.approx((0.5, 4.0))
    both = Costs().lines()[2]
    assert both["tokens"] == 2 * 100_000_000 * 1250
