"""Fitted blends: the best parameters, only parts that help, and none that a row's own label has set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from arena.inference.blend import Blend
from arena.metrics import log_loss, softmax
from arena.training.fit_blend import (
    KIND_RIDGE,
    LEAST,
    Kinds,
    Parts,
    cross_fitted,
    cross_predicted,
    divide,
    fit_blend,
    fit_parts,
    standard_error,
)
from tests.training.test_fit_kinds import EVEN, fold

BOTH = Parts((0, 1), temperature=True)


def make(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One-hot labels that were drawn from two independent pieces of evidence, and what each alone predicts."""
    rng = np.random.default_rng(seed)
    evidence = rng.normal(size=(2, rows, 3))
    truth = softmax(evidence.sum(axis=0))
    return np.eye(3)[[rng.choice(3, p=row) for row in truth]], softmax(evidence)


def test_independent_evidence_is_added() -> None:
    labels, members = make(20_000)
    blend = fit_parts(BOTH, labels, members)
    assert blend.weights == pytest.approx([1, 1], abs=0.1)
    assert log_loss(labels, blend(members)) < min(log_loss(labels, one) for one in members) - 0.1


@pytest.mark.parametrize("pool", ["log", "linear"])
def test_no_other_parameters_fit_better(pool: str) -> None:
    labels, members = make(300)
    labels = 0.8 * labels + 0.2 * members[0]  # soft
    best = fit_parts(Parts((0, 1), pool, temperature=True, bias=True), labels, members)  # type: ignore[arg-type]
    least, rng = log_loss(labels, best(members)), np.random.default_rng(0)
    for _ in range(300):
        weights, bias = np.array(best.weights) * np.exp(rng.normal(0, 0.2, 2)), rng.normal(0, 0.1, 3)
        weights /= weights.sum() if pool == "linear" else 1
        near = Blend(best.pool, tuple(weights), best.sharpness * np.exp(rng.normal(0, 0.2)), tuple(best.bias + bias))
        assert log_loss(labels, near(members)) > least
    assert sum(best.bias) == pytest.approx(0)


def test_what_is_not_fitted_stays_as_it_is() -> None:
    labels, members = make(2000)
    assert fit_parts(Parts((1,)), labels, members)(members) == pytest.approx(members[1])
    assert sum(fit_parts(Parts((0, 1)), labels, members).weights) == pytest.approx(1)
    against = np.stack([softmax(-np.log(members[0])), members[1]])
    assert fit_parts(BOTH, labels, against).weights[0] == pytest.approx(0, abs=1e-3)


def test_parts_are_taken_only_if_they_help() -> None:
    labels, members = make(3000)
    noise = softmax(np.random.default_rng(1).normal(size=(1, 3000, 3)))
    blend, _, tried = fit_blend(labels, np.concatenate([members, noise]), np.arange(3000))
    assert {part.added for part in tried if part.taken} >= {("temperature",)}
    assert all(part.gains.mean() > 0 for part in tried if part.taken)
    assert min(blend.weights[:2]) > 0.8 and blend.weights[2] < 0.05
    labels = np.eye(3)[[np.random.default_rng(row).choice(3, p=each) for row, each in enumerate(members[0])]]
    _, _, tried = fit_blend(labels, members[:1], np.arange(3000))  # calibrated already
    assert {part.added for part in tried} == {("temperature",), ("bias",)} and not any(part.taken for part in tried)


def test_a_member_that_needs_a_temperature_is_found() -> None:
    """Weights that sum to 1 take confidence from a calibrated member for the sake of a timid one, which loses."""
    labels, (first, second) = make(3000)
    members = np.stack([first, softmax(0.01 * np.log(second))])
    rows = np.arange(3000)
    calibrated = fit_parts(Parts((0,), temperature=True), labels, members)(members)
    members[0] = calibrated
    blend, best, tried = fit_blend(labels, members, rows)
    assert best == 0 and next(part.added for part in tried if part.taken) == (1, "temperature")
    assert log_loss(labels, blend(members)) < log_loss(labels, calibrated) - 0.05
    for alone in (Parts((0, 1)), Parts((0,), temperature=True)):
        found = log_loss(labels, cross_predicted(alone, labels, members, divide(rows, 0)))
        assert found > log_loss(labels, calibrated) - 0.002


def test_no_row_sets_its_own_weights() -> None:
    """Of pure noise, weights of the same rows look better than equal probabilities, and those of other rows do not."""
    gains, chosen, unfair = [], [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        labels, members = np.eye(3)[rng.integers(0, 3, 40)], softmax(rng.normal(0, 0.3, size=(2, 40, 3)))
        groups = np.arange(40) // 2
        losses = [
            log_loss(labels, cross_predicted(BOTH, labels, members, divide(groups, seed))),
            log_loss(labels, cross_fitted(labels, members, groups, seed)),
            log_loss(labels, fit_parts(BOTH, labels, members)(members)),
        ]
        for found, loss in zip((gains, chosen, unfair), losses, strict=True):
            found.append(np.log(3) - loss)
    assert max(np.mean(gains), np.mean(chosen)) <= 0 < np.mean(unfair)
    assert min(unfair) >= -1e-3


def test_a_row_of_the_same_group_is_not_fitted_on() -> None:
    labels, members = make(100)
    groups = np.arange(100) // 10
    before = cross_fitted(labels, members, groups)
    labels[30:40] = np.roll(labels[30:40], 1, axis=1)
    after = cross_fitted(labels, members, groups)
    assert np.array_equal(after[30:40], before[30:40]) and not np.array_equal(after, before)


def test_rows_that_are_alike_make_a_mean_less_certain() -> None:
    values = np.random.default_rng(0).normal(size=400)
    alone = standard_error(values, np.arange(400))
    assert alone == pytest.approx(values.std() / 20)
    assert standard_error(np.repeat(values, 3), np.repeat(np.arange(400), 3)) == pytest.approx(alone)
    assert standard_error(np.repeat(values, 3), np.arange(1200)) == pytest.approx(alone / np.sqrt(3))


def special(rows: int, kinds: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray, Kinds]:
    """Rows of kinds in turn, of which those with an empty answer lose far more often than the one member says."""
    rng = np.random.default_rng(seed)
    names = [kinds[at % len(kinds)] for at in range(rows)]
    shift = {"A empty": (-1.5, 1.0, 0.5), "B empty": (1.0, -1.5, 0.5)}
    judged = softmax(rng.normal(size=(rows, 3)))
    truth = softmax(np.log(judged) + np.array([shift.get(name, (0, 0, 0)) for name in names]))
    labels = np.eye(3)[[rng.choice(3, p=each) for each in truth]]
    return labels, judged[None], Kinds.of(fold([], [(name, EVEN) for name in names]).rows, np.arange(rows))


def test_what_special_rows_need_is_fitted_and_exchanged_with_their_answers() -> None:
    labels, members, kinds = special(6000, ["A empty", "B empty", ""])
    blend, _, tried = fit_blend(labels, members, np.arange(6000), kinds=kinds)
    assert [part.added for part in tried if part.taken] == [("bias of A empty, B empty",)]
    a, b = (np.array(blend.kinds[name]) for name in ("A empty", "B empty"))
    assert a == pytest.approx([-1.5, 1.0, 0.5], abs=0.15) and np.array_equal(a[[1, 0, 2]], b)
    plain = kinds.shown == ""
    found = blend(members, kinds.shown)
    np.testing.assert_allclose(found[plain], members[0][plain], rtol=1e-12)
    assert log_loss(labels, found) < log_loss(labels, members[0]) - 0.1


def test_special_rows_that_the_members_judge_well_get_no_bias() -> None:
    """Control: of a member that is wrong about the same rows they get one."""
    labels, members, kinds = special(3000, ["same", ""])
    assert list(kinds.tied) == ["bias of same answers"]
    assert not fit_blend(labels, members, np.arange(3000), kinds=kinds)[0].kinds
    too_few_ties = softmax(np.log(members) - np.array([0, 0, 1.0]))
    wrong = np.where((kinds.shown == "same answers")[:, None], too_few_ties, members)
    blend = fit_blend(labels, wrong, np.arange(3000), kinds=kinds)[0]
    bias = blend.kinds["same answers"]
    assert bias[0] == pytest.approx(bias[1]) and bias[2] - bias[0] == pytest.approx(1, abs=0.2)


def test_no_other_biases_of_special_rows_fit_better() -> None:
    labels, members, kinds = special(90, ["A empty", "B empty", ""])
    rows, rng = kinds.shown, np.random.default_rng(1)
    best = fit_parts(Parts((0,), kinds=tuple(kinds.tied), bias=True), labels, members, kinds)

    def penalised(blend: Blend) -> float:
        return 90 * log_loss(labels, blend(members, rows)) + KIND_RIDGE * float(np.square(blend.kinds["A empty"]).sum())

    for _ in range(300):
        a = np.array(best.kinds["A empty"]) + rng.normal(0, 0.1, 3)
        near = replace(best, kinds={"A empty": tuple(a), "B empty": tuple(a[[1, 0, 2]])})
        assert penalised(near) > penalised(best)


def test_kinds_of_few_rows_are_not_fitted() -> None:
    rows = fold([], [("A empty", EVEN)] * (LEAST - 1) + [("", EVEN)] * 40).rows
    assert not Kinds.of(rows, np.arange(len(rows))).tied
    rows = fold([], [("A empty", EVEN)] * (LEAST - 1) + [("B empty", EVEN)]).rows
    assert Kinds.of(rows, np.arange(len(rows))).tied and not Kinds.of(rows, np.zeros(len(rows), dtype=int)).tied
