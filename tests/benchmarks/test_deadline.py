"""The simulated passes before a deadline: nothing but the order differs from rule to rule, and it matters."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

from arena.inference.by_worth import worth
from arena.metrics import log_loss
from benchmarks.deadline import RULES, TIMES, as_page, first_come, simulate


def test_the_order_matters_in_between_and_at_the_ends_it_does_not() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (2000, 3))
    truth, found = softmax(logits, axis=1), softmax(logits + rng.normal(0, 0.7, (3, 2000, 3)), axis=2)
    costs = rng.lognormal(7, 1, (3, 2000))
    rules = {**RULES, "the least first": lambda p, costs: -worth(p, costs)}
    points = {name: simulate(truth, found, costs, rule) for name, rule in rules.items()}
    for at, point in enumerate(points["first come"]):
        losses = {name: each[at]["log_loss"] for name, each in points.items()}
        if point["time"] in (0, 1):
            known = int(point["pass"]) - (point["time"] == 0)
            assert all(np.isclose(loss, log_loss(truth, found[:known].mean(axis=0))) for loss in losses.values())
        else:
            assert losses["expected gain by time"] < losses["first come"] < losses["the least first"]  # the control
    assert len(points["first come"]) == 2 * len(TIMES)
    result = {"passes": ["fold0, order 0", "fold0, order 1", "fold1, order 0"], "rules": points, "rows": 2000}
    page = as_page({**result, "device": "none", "versions": {}, "command": "", "date": ""})
    assert f"| fold0, order 1 | 50% | {points['first come'][2]['log_loss']:.4f} |" in page


def test_time_counts_and_not_rows() -> None:
    """Within half of the time one long row is judged, or three short ones."""
    truth, found = np.eye(2)[[0, 0, 0, 0]], np.full((2, 4, 2), 0.5)
    found[1] = [0.9, 0.1]
    losses = [point["log_loss"] for point in simulate(truth, found, np.array([[1.0] * 4, [3, 1, 1, 1]]), first_come)]
    after = -np.log(0.7)
    np.testing.assert_allclose(losses[2], (after + 3 * -np.log(0.5)) / 4)
    reverse = simulate(truth, found, np.array([[1.0] * 4, [1, 1, 1, 3]]), first_come)
    np.testing.assert_allclose(reverse[2]["log_loss"], (3 * after - np.log(0.5)) / 4)
