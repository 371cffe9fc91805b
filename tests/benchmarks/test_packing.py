"""The packers that ours are compared with, on lengths packed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from arena.packing.plan import plan_evaluation
from benchmarks.packing import (
    Packer,
    best_fit_decreasing,
    first_fit_decreasing,
    measure_packing,
    next_fit,
    padded_slots,
    sorted_greedy,
)

LENGTHS = np.array([4, 8, 1, 4, 2, 1])


def test_packers_by_hand() -> None:
    assert next_fit(LENGTHS, 10) == [4, 9, 7]
    assert sorted_greedy(LENGTHS, 10) == [8, 10, 2]
    assert first_fit_decreasing(LENGTHS, 10) == [10, 10]
    assert best_fit_decreasing(LENGTHS, 10) == [10, 10]


def test_first_fit_and_best_fit_differ() -> None:
    lengths = np.array([5, 60, 45, 50])  # 60 | 50 + 45, then the 5 to the first or to the fullest
    assert first_fit_decreasing(lengths, 100) == [65, 95]
    assert best_fit_decreasing(lengths, 100) == [60, 100]


def test_padded_slots_by_hand() -> None:
    assert padded_slots(LENGTHS, 4) == 4 * 8 + 2 * 2
    assert padded_slots(LENGTHS, 1) == LENGTHS.sum()


def test_ours_packs_as_well_as_first_fit() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 500)
    ours = plan_evaluation(lengths, np.arange(500), budget=1000)
    assert ours.n_micro_batches <= len(first_fit_decreasing(lengths, 1000))


@pytest.mark.parametrize("packer", [next_fit, sorted_greedy, first_fit_decreasing, best_fit_decreasing])
def test_every_token_is_packed_within_the_budget(packer: Packer) -> None:
    lengths = np.random.default_rng(1).integers(1, 100, 200)
    loads = packer(lengths, 100)
    assert sum(loads) == lengths.sum() and max(loads) <= 100


def test_tables() -> None:
    found = measure_packing(examples=800)
    assert found["examples"] == 800 and 850 < found["median"] < 950 and 1150 < found["mean"] < 1350
    ways = {each["way"]: each for each in found["whole_set"]}
    assert ways["ours: evaluation plan"]["batches"] == min(each["batches"] for each in found["whole_set"])
    assert ways["padded, 8 a batch"]["fill"] < ways["padded, 4 a batch"]["fill"] < 0.7
    ours, *rivals = found["in_steps"]
    assert all(ours["over_least"] <= each["over_least"] for each in rivals)
    assert all(ours["evenness"] > each["evenness"] for each in rivals)
