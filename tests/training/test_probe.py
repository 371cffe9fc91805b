"""Choosing what layers keep: by a card that is made up, and on this machine by arithmetic."""

from __future__ import annotations

from itertools import pairwise

import pytest

from arena.model.memory import LADDER
from arena.training.probe import choose

KEPT = {"full": 1.0, "mlp": 8.0, "light": 16.0, "none": 22.0}
AGAIN = {"full": 1.0, "mlp": 0.55, "light": 0.05, "none": 0.0}


class MadeUpCard:
    """Peaks of made-up runs: a fixed part, and what each layer keeps; out of memory above `size`."""

    def __init__(self, size: float, fixed: float = 50.0, late: float = 1.0) -> None:
        self.size, self.fixed, self.late = size, fixed, late
        self.runs: list[list[str]] = []

    def peak(self, policies: list[str]) -> float | None:
        self.runs.append(policies)
        later = sum(KEPT[each] * (1.0 if at < 2 else self.late) for at, each in enumerate(policies))
        total = self.fixed + later
        return None if total > self.size else total


@pytest.mark.parametrize("limit", [60.0, 61.0, 80.0, 120.0, 200.0, 500.0])
def test_what_is_chosen_fits_and_no_layer_more_would(limit: float) -> None:
    card = MadeUpCard(size=limit)
    policies, peak = choose(card.peak, AGAIN, 10, limit)
    assert peak is not None and peak <= limit
    assert peak == card.fixed + sum(KEPT[each] for each in policies)
    steps = [KEPT[after] - KEPT[before] for before, after in pairwise(LADDER) if before in policies]
    assert not steps or limit - peak < max(steps)


def test_where_later_layers_keep_more_it_steps_back() -> None:
    card = MadeUpCard(size=200.0, late=1.15)
    policies, peak = choose(card.peak, AGAIN, 10, 200.0)
    assert peak is not None and peak <= 200.0 and set(policies) != {"full"}
    assert len(card.runs) > 5, "the first mix did not fit, so another was run"


def test_nothing_fits() -> None:
    assert choose(MadeUpCard(size=55.0).peak, AGAIN, 10, 55.0)[1] is None


def test_a_policy_that_cannot_be_measured_is_not_used() -> None:
    policies, peak = choose(MadeUpCard(size=75.0).peak, AGAIN, 10, 75.0)
    assert set(policies) <= {"full", "mlp"} and peak is not None
