"""Intervals of scores, and the tables in metrics.json."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from arena import metrics as metrics_module
from arena.data.prepare import FoldData, prepare_fold
from arena.metrics import accuracy, calibration_error, classwise_calibration_error, estimate, log_loss
from arena.model.backbone import load_tokenizer
from arena.tasks import task_of
from arena.training import held_out as held_out_module
from arena.training import scores as scores_module
from arena.training.held_out import Predictions
from arena.training.run import run_fold
from arena.training.scores import score_tables
from tests.helpers import tiny_recipe


def names(groups: np.ndarray) -> list[str]:
    return [f"g{each}" for each in groups]


def test_intervals_cover_the_mean_of_grouped_rows_and_those_of_rows_alone_would_not() -> None:
    """Rows of a group are alike. Of 300 intervals 95% should hold the mean; those that ignore groups hold far fewer."""
    rng = np.random.default_rng(0)
    groups, ones = np.repeat(np.arange(60), 10), np.ones(600)
    draws = {at: (5 + rng.normal(size=60)[groups] + 0.5 * rng.normal(size=600), ones) for at in range(300)}
    covered = []
    for drawn_together in (groups, np.arange(600)):
        scores = estimate(draws, names(drawn_together)).values()
        assert all(score.low < score.value < score.high for score in scores)  # type: ignore[operator]
        covered.append(np.mean([score.low <= 5 <= score.high for score in scores]))  # type: ignore[operator]
    assert 0.90 <= covered[0] <= 0.98 and covered[1] < 0.7


def test_the_interval_of_a_calibration_error_is_not_of_its_noise() -> None:
    """Most percentile intervals of a nearly calibrated judge lie above its error without noise: the control."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([4, 4, 3], 4000)
    truth = probabilities**1.3 / (probabilities**1.3).sum(axis=1, keepdims=True)
    ones, groups = np.ones(4000), names(np.arange(4000))
    error = classwise_calibration_error(truth, probabilities)
    terms = {}
    for at in range(20):
        labels = np.eye(3)[np.minimum((truth.cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1), 2)]
        terms[at] = classwise_calibration_error.terms(labels, probabilities), ones
    covered, below = 0, 0
    for score in estimate(terms, groups).values():
        assert score.low is not None and score.high is not None and score.low >= 0
        covered += score.low <= error <= score.high
        below += 2 * score.value - score.high > error  # the lower end of the percentile interval
    assert covered >= 16 and below >= 10


def test_neither_the_order_of_rows_nor_how_many_are_drawn_at_once_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = np.eye(3)[rng.integers(0, 3, 300)], rng.dirichlet([1, 1, 1], 300)
    groups, metrics = rng.integers(0, 80, 300), (log_loss, calibration_error)

    def found(order: np.ndarray) -> list[float]:
        terms = {
            each.__name__: (each.terms(labels[order], probabilities[order]), np.ones(300))  # type: ignore[attr-defined]
            for each in metrics
        }
        every = estimate(terms, names(groups[order])).values()
        return [number for score in every for number in (score.value, score.low or 0, score.high or 0)]

    given = found(np.arange(300))
    assert found(rng.permutation(300)) == pytest.approx(given, rel=1e-12)
    monkeypatch.setattr(metrics_module, "AT_ONCE", 80 * 7)
    assert found(np.arange(300)) == pytest.approx(given, rel=1e-12)
    monkeypatch.setattr(metrics_module, "SEED", 1)  # the control
    assert found(np.arange(300)) != pytest.approx(given, rel=1e-12)


def test_one_group_has_no_interval_and_no_row_no_score() -> None:
    values, ones, first = np.arange(6.0), np.ones(6), np.arange(6) < 2
    terms = {"all": (values, ones), "first": (values * first, first), "none": (values * 0, ones * 0)}
    alone = estimate(terms, ["a"] * 6)
    assert (alone["all"].value, alone["all"].low, alone["all"].high, alone["all"].rows) == (2.5, None, None, 6)
    found = estimate(terms, [*"aabbcc"])
    assert found["all"].low is not None and set(found) == {"all", "first"}
    assert (found["first"].value, found["first"].low, found["first"].rows) == (0.5, None, 2)
    assert estimate({"none": terms["none"]}, [*"aabbcc"]) == {}


def test_a_small_slice_is_scored_on_the_resamples_that_have_it() -> None:
    """Two of forty groups: one resample in eight has neither."""
    part = np.arange(40) < 2
    score = estimate({"part": (np.arange(40.0) * part, part)}, names(np.arange(40)))["part"]
    assert (score.value, score.low, score.high) == (0.5, 0.0, 1.0)


@pytest.fixture(scope="module")
def data(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> FoldData:
    """A fold with a row that has no answers, which is held out, and one with two turns."""
    folder = tmp_path_factory.mktemp("data")
    recipe = tiny_recipe(folder, gemma2, "prompt.max_length=130", "data.folds=2")
    path = Path(recipe.data.path) / "train.csv"
    rows = pd.read_csv(path, dtype=str)
    rows.loc[:1, ["response_a", "response_b"]] = "[null]"
    path.write_text(rows.to_csv(index=False))
    folds = [prepare_fold(recipe, task_of(recipe), fold, load_tokenizer(str(gemma2))) for fold in (0, 1)]
    return max(folds, key=lambda each: (~each.has_input[each.eval_rows]).sum())


def predicted(data: FoldData) -> Predictions:
    flipped = np.arange(len(data.eval_rows)) % 3 == 0
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], len(data.eval_rows))
    return Predictions(probabilities, flipped & data.has_input[data.eval_rows])


def test_the_tables_of_a_fold(data: FoldData) -> None:
    predictions = predicted(data)
    tables = score_tables(data, predictions, replace(predictions, flipped=None))
    scores, labels, n = tables["scores"], data.labels[data.eval_rows], len(data.eval_rows)
    for name, metric in data.task.metrics.items():
        assert scores[name]["value"] == pytest.approx(metric(labels, predictions.probabilities)), name
        assert scores[name]["rows"] == n
    answered = data.has_input[data.eval_rows]
    assert (~answered).sum() > 0 and scores["flip_rate"]["rows"] == answered.sum()
    assert scores["flip_rate"]["value"] == pytest.approx(predictions.flipped[answered].mean())  # type: ignore[index]
    assert "flip_rate" not in tables["last_step_scores"]
    truth, votes = labels.argmax(axis=1), predictions.probabilities.argmax(axis=1)
    assert scores["agreement"]["value"] == pytest.approx((truth == votes).mean())
    assert scores["agreement_base_rate"]["value"] == pytest.approx((truth == data.prior.argmax()).mean())
    both = (truth < 2) & (votes < 2)  # neither says tie
    assert scores["agreement_without_ties"]["value"] == pytest.approx((truth == votes)[both].mean())
    assert scores["agreement_without_ties"]["rows"] == both.sum() < n
    base = (truth == data.prior[:2].argmax())[both].mean()
    assert scores["agreement_without_ties_base_rate"]["value"] == pytest.approx(base)


def test_slices_of_a_fold_cover_its_rows(data: FoldData) -> None:
    predictions = predicted(data)
    slices, n = score_tables(data, predictions, predictions)["slices"], len(data.eval_rows)
    assert set(slices) == {"length", "truncation", "turns", "length gap", "language", "code"}
    labels, prior = data.labels[data.eval_rows], np.tile(data.prior, (n, 1))
    for kind, values in slices.items():
        assert sum(each["log_loss"]["rows"] for each in values.values()) == n, kind
        for metric, probabilities, prefix in (
            (log_loss, predictions.probabilities, ""), (accuracy, predictions.probabilities, ""),
            (log_loss, prior, "prior_"), (accuracy, prior, "prior_"),
        ):  # fmt: skip
            name = prefix + metric.__name__  # type: ignore[attr-defined]
            mean = sum(each[name]["value"] * each[name]["rows"] for each in values.values()) / n
            assert mean == pytest.approx(metric(labels, probabilities)), (kind, name)
    assert set(slices["turns"]) == {"1"}, "slices without rows are left out"
    cut = data.store.tokens_cut[data.eval_rows * data.store.orders] > 0
    assert slices["truncation"]["cut"]["log_loss"]["rows"] == cut.sum() > 0


def test_the_last_step_stands_beside_the_best(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best was chosen on the rows that it is scored on. Without intervals a run is finished all the same."""
    losses = iter([0.5, 0.9])
    monkeypatch.setattr(held_out_module.HeldOut, "scores", lambda *_: {"log_loss": next(losses)})
    metrics = run_fold(tiny_recipe(tmp_path, gemma2), 0, tmp_path / "runs")
    assert (metrics["best_step"], metrics["steps"]) == (3, 5)
    folder = tmp_path / "runs/demo/fold0"
    for name, table in (("oof", "scores"), ("oof-last", "last_step_scores")):
        oof = pd.read_csv(folder / f"{name}.csv")
        columns = ["winner_model_a", "winner_model_b", "winner_tie"]
        found = log_loss(oof[[f"label_{column}" for column in columns]].to_numpy(), oof[columns].to_numpy())
        assert metrics[table]["log_loss"]["value"] == pytest.approx(found)
    assert metrics["scores"]["log_loss"]["value"] == pytest.approx(metrics["log_loss"])
    assert abs(metrics["last_step_scores"]["log_loss"]["value"] - metrics["log_loss"]) > 1e-4
    assert 0 <= metrics["scores"]["flip_rate"]["value"] <= 1

    def fails(*_: object) -> None:
        raise MemoryError("resamples")

    monkeypatch.undo()
    monkeypatch.setattr(scores_module, "estimate", fails)
    once = run_fold(tiny_recipe(tmp_path, gemma2, "train.evaluate_every=0"), 0, tmp_path / "once")
    assert "scores" not in once and once["log_loss"] > 0
    assert "computing intervals and slices failed (MemoryError: resamples)" in capsys.readouterr().out
    assert not (tmp_path / "once/demo/fold0/oof-last.csv").exists()
