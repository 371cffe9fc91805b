"""Metrics of probabilities: log-loss, accuracy and calibration error."""

from __future__ import annotations

import numpy as np
from scipy import special

SMALLEST = 1e-15  # probabilities are clipped to at least this, as the competition's scorer does


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean cross entropy in nats.

    Args:
        labels: (n, C), one-hot or probabilities.
        probabilities: (n, C), rows that sum to 1.

    Raises:
        ValueError: there are no rows, the shapes differ, or a number is not finite.
    """
    _check(labels, probabilities)
    return float(-(labels * np.log(np.clip(probabilities, SMALLEST, 1.0))).sum(axis=1).mean())


def accuracy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The share of rows whose most probable class is the label's most probable class."""
    _check(labels, probabilities)
    return float((labels.argmax(axis=1) == probabilities.argmax(axis=1)).mean())


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the top class, in equal-width bins (Guo et al., 2017, arXiv:1706.04599)."""
    _check(labels, probabilities)
    confidence = probabilities.max(axis=1)
    right = labels[np.arange(len(labels)), probabilities.argmax(axis=1)]
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def softmax(logits: np.ndarray) -> np.ndarray:
    """The float64 probabilities of logits along the last axis."""
    return np.asarray(special.softmax(logits.astype(np.float64), axis=-1))


def sum_tolerance(classes: int) -> float:
    """How far the sum of that many probabilities may be from 1 if each is rounded to three digits."""
    return classes * 0.0005 + 1e-6


def _check(labels: np.ndarray, probabilities: np.ndarray) -> None:
    if labels.shape != probabilities.shape or labels.ndim != 2 or len(labels) == 0:
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape} cannot be compared")
    for name, values in (("labels", labels), ("probabilities", probabilities)):
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise ValueError(f"{len(bad)} rows of {name} are not finite, first row {bad[0]}: {values[bad[0]].tolist()}")
