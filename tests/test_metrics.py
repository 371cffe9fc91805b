"""Metrics against scikit-learn and against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score
from sklearn.metrics import log_loss as sklearn_log_loss

from arena.metrics import accuracy, calibration_error, log_loss, softmax


def test_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 200)
    classes = rng.integers(0, 3, 200)
    labels = np.eye(3)[classes]
    assert log_loss(labels, probabilities) == pytest.approx(sklearn_log_loss(classes, probabilities), rel=1e-12)
    assert accuracy(labels, probabilities) == accuracy_score(classes, probabilities.argmax(1))


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
