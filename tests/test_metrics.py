"""Metrics against scikit-learn and against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss
from sklearn.metrics import log_loss as sklearn_log_loss

from arena.metrics import (
    BINS,
    METRICS,
    accuracy,
    agreement,
    brier,
    calibration_error,
    classwise_calibration_error,
    differences,
    estimate,
    log_loss,
    softmax,
)


def test_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 200)
    classes = rng.integers(0, 3, 200)
    labels = np.eye(3)[classes]
    assert log_loss(labels, probabilities) == pytest.approx(sklearn_log_loss(classes, probabilities), rel=1e-12)
    assert accuracy(labels, probabilities) == accuracy_score(classes, probabilities.argmax(1))


@pytest.mark.parametrize("classes", [2, 3])
def test_brier_score_and_calibration_of_classes_against_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1] * classes, 40 * BINS)
    drawn = rng.integers(0, classes, len(probabilities))
    labels = np.eye(classes)[drawn]
    assert brier(labels, probabilities) == pytest.approx(brier_score_loss(drawn, probabilities), rel=1e-12)
    gaps = []
    for column in range(classes):  # without equal probabilities, all bins have the same number of rows
        curve = calibration_curve(labels[:, column], probabilities[:, column], n_bins=BINS, strategy="quantile")
        gaps.append(np.abs(curve[0] - curve[1]).mean())
    assert classwise_calibration_error(labels, probabilities) == pytest.approx(np.mean(gaps), rel=1e-9)
    shifted = np.roll(labels, 1, axis=1)  # the control: another label is another error
    assert classwise_calibration_error(shifted, probabilities) != pytest.approx(np.mean(gaps), rel=1e-3)


def test_soft_labels_of_agreement_and_brier_score() -> None:
    labels, probabilities = np.array([[0.7, 0.3, 0], [0, 0, 1.0]]), np.array([[0.5, 0.4, 0.1], [0.6, 0.2, 0.2]])
    assert agreement(labels, probabilities) == pytest.approx((0.7 + 0) / 2)
    assert accuracy(labels, probabilities) == 0.5
    assert brier(labels, probabilities) == pytest.approx(((0.04 + 0.01 + 0.01) + (0.36 + 0.04 + 0.64)) / 2)
    hard = np.eye(3)[[0, 2]]
    assert agreement(hard, probabilities) == accuracy(hard, probabilities)


def test_equal_probabilities_share_a_bin_and_a_class_may_be_missing() -> None:
    """The prior of all rows is calibrated on them, in whatever order they come; one bin each would say otherwise."""
    rng = np.random.default_rng(0)
    labels = np.eye(3)[rng.integers(0, 2, 200)]  # no ties
    prior = np.tile(labels.mean(axis=0), (200, 1))
    assert classwise_calibration_error(labels, prior) == pytest.approx(0, abs=1e-12)
    assert classwise_calibration_error(labels[:20], prior[:20]) > 0.01
    for metric in (log_loss, brier, calibration_error, classwise_calibration_error, agreement):
        probabilities, order = rng.dirichlet([1, 1, 1], 200), rng.permutation(200)
        value = metric(labels, probabilities)
        assert metric(labels[order], probabilities[order]) == pytest.approx(value, rel=1e-12)
        assert np.isfinite(value)


def test_soft_labels_and_zeros() -> None:
    assert log_loss(np.array([[0.5, 0.5, 0]]), np.array([[0.25, 0.5, 0.25]])) == pytest.approx(1.5 * np.log(2))
    assert log_loss(np.array([[1.0, 0, 0]]), np.array([[0.0, 1, 0]])) == pytest.approx(-np.log(1e-15))


def test_calibration_error_by_hand() -> None:
    # four rows at 0.8, two right: |0.5 - 0.8| x 4; one row at 0.4, wrong: 0.4 x 1; over five rows
    probabilities = np.array([[0.8, 0.1, 0.1]] * 4 + [[0.3, 0.4, 0.3]])
    labels = np.eye(3)[[0, 0, 1, 2, 0]]
    assert calibration_error(labels, probabilities) == pytest.approx((4 * 0.3 + 0.4) / 5)
    certain = np.eye(3)
    assert calibration_error(certain, certain) == 0.0


def test_refusals() -> None:
    good = np.full((2, 3), 1 / 3)
    for bad in (np.full((1, 3), 1 / 3), np.zeros((0, 3))):
        with pytest.raises(ValueError, match="cannot be compared"):
            log_loss(bad, good[:0] if len(bad) == 0 else good)
    broken = good.copy()
    broken[1, 2] = np.nan
    with pytest.raises(ValueError, match="1 rows of probabilities are not finite, first row 1"):
        log_loss(good, broken)


def test_softmax_of_large_logits() -> None:
    found = softmax(np.array([[1000.0, 1000.0, 0.0]], dtype=np.float32))
    assert found.tolist() == [[0.5, 0.5, 0.0]]
    assert found.dtype == np.float64


def test_paired_differences_are_narrower_than_those_of_two_samples() -> None:
    rng = np.random.default_rng(0)
    labels = np.eye(3)[rng.integers(0, 3, 400)]
    one = softmax(2 * labels + rng.normal(size=(400, 3)))
    other = softmax(np.log(one) + 0.3 * rng.normal(size=(400, 3)))
    first, second = ({name: (metric.terms(labels, p), np.ones(400)) for name, metric in METRICS.items()}
                     for p in (one, other))  # fmt: skip
    groups = [str(row // 2) for row in range(400)]
    apart, paired = (estimate(each, groups) for each in (first, second)), differences(first, second, groups)
    a, b = apart
    for name, found in paired.items():
        assert found.value == pytest.approx(a[name].value - b[name].value)
        assert found.low is not None and found.high is not None and found.low < found.high
    width = (paired["log_loss"].high or 0) - (paired["log_loss"].low or 0)
    assert width < 0.6 * ((a["log_loss"].high or 0) - (a["log_loss"].low or 0))
    assert {(each.value, each.low, each.high) for each in differences(first, first, groups).values()} == {(0, 0, 0)}
