"""The blend of a judge and the baseline: the best weights, and none that a row's own label has set."""

from __future__ import annotations

import numpy as np
import pytest

from arena.metrics import log_loss, softmax
from arena.training.references import blend, blend_weights, blended_across


def make(rows: int, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """One-hot labels that were drawn from two independent pieces of evidence, and what each alone predicts."""
    rng = np.random.default_rng(seed)
    evidence = rng.normal(size=(2, rows, 3))
    truth = softmax(evidence.sum(axis=0))
    labels = np.eye(3)[[rng.choice(3, p=row) for row in truth]]
    return labels, [softmax(each) for each in evidence]


def test_independent_evidence_is_added() -> None:
    labels, each = make(20_000)
    assert blend_weights(labels, each) == pytest.approx([1, 1], abs=0.1)
    blended = log_loss(labels, blend(each, blend_weights(labels, each)))
    assert blended < min(log_loss(labels, one) for one in each) - 0.1


def test_the_weights_are_the_least_of_a_grid() -> None:
    labels, each = make(300)
    labels = 0.8 * labels + 0.2 * each[0]  # soft
    grid = [log_loss(labels, blend(each, [a, b])) for a in np.arange(0, 2, 0.05) for b in np.arange(0, 2, 0.05)]
    assert log_loss(labels, blend(each, blend_weights(labels, each))) <= min(grid)


def test_a_prediction_that_is_worse_than_nothing_gets_no_weight_and_a_weight_of_one_changes_nothing() -> None:
    labels, each = make(2000)
    against = softmax(-np.log(each[0]))
    assert blend_weights(labels, [against, each[1]])[0] == 0
    assert blend(each, [1, 0]) == pytest.approx(each[0])


def test_no_row_sets_its_own_weights() -> None:
    """Of pure noise, weights of the same rows look better than equal probabilities, and those of other rows do not."""
    gains, unfair = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels, each = np.eye(3)[rng.integers(0, 3, 60)], [softmax(rng.normal(size=(60, 3))) for _ in range(2)]
        groups = [str(row // 2) for row in range(60)]
        gains.append(np.log(3) - log_loss(labels, blended_across(labels, each, groups)))
        unfair.append(np.log(3) - log_loss(labels, blend(each, blend_weights(labels, each))))
    assert np.mean(gains) <= 0 < np.mean(unfair)
    assert min(unfair) >= -1e-9


def test_a_row_of_the_same_group_is_not_fitted_on() -> None:
    labels, each = make(100)
    groups = [str(row // 10) for row in range(100)]
    before = blended_across(labels, each, groups)
    labels[30:40] = np.roll(labels[30:40], 1, axis=1)
    after = blended_across(labels, each, groups)
    assert np.array_equal(after[30:40], before[30:40]) and not np.array_equal(after, before)
