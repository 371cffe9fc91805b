"""Rows with weights, soft labels and teachers: what training aims at, and what is left out as nearly held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from arena.data.extra import near, tempered
from arena.data.prepare import FoldData, prepare_fold
from arena.model.backbone import load_tokenizer
from arena.tasks import task_of
from arena.tasks.preference import COLUMNS
from tests.helpers import tiny_recipe


def prepare(folder: Path, base: Path, *overrides: str) -> FoldData:
    recipe = tiny_recipe(folder, base, *overrides)
    return prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(str(base)))


def test_extra_rows_with_predictions_a_weight_and_smoothing(gemma2: Path, tmp_path: Path) -> None:
    texts = {"prompt": ["something new"], "response_a": ["x"], "response_b": ["y"]}
    (tmp_path / "more.jsonl").write_text(json.dumps({"id": "m", **texts}))
    pd.DataFrame([{"id": "m", **dict(zip(COLUMNS, (0.25, 0.25, 0.5), strict=True))}]).to_csv(tmp_path / "p.csv")
    entry = (
        f"path: {tmp_path / 'more.jsonl'}, labels: {tmp_path / 'p.csv'}, weight: 2, smoothing: 0.1, temperature: 0.5"
    )
    data = prepare(tmp_path, gemma2, f"data.extra=[{{{entry}}}]")
    row = len(data.labels) - 1
    assert row in data.train_rows and data.ids[row] == "m (more.jsonl)"
    assert data.labels[row] == pytest.approx([0.25, 0.25, 0.5])
    soft = np.array([1, 1, 4]) / 6
    assert data.targets is not None
    first, swapped = data.targets[row * data.store.orders :][:2]
    assert first == pytest.approx(2 * (0.9 * soft + 0.1 / 3), abs=1e-6)
    assert swapped == pytest.approx(first[[1, 0, 2]])
    assert data.prior == pytest.approx(data.labels[data.train_rows].mean(axis=0))  # weights do not change the prior
    plain = prepare(tmp_path, gemma2, f"data.extra=[{{path: {tmp_path / 'more.jsonl'}, labels: {tmp_path / 'p.csv'}}}]")
    assert plain.fingerprint != data.fingerprint and plain.trained_on != data.trained_on


def test_a_teacher_changes_what_is_taught_and_not_what_is_scored(gemma2: Path, tmp_path: Path) -> None:
    plain = prepare(tmp_path, gemma2)
    rng, path = np.random.default_rng(0), tmp_path / "oof.csv"
    predicted = rng.dirichlet(np.ones(3), len(plain.ids))
    table = pd.DataFrame(predicted, columns=list(COLUMNS)).assign(id=plain.ids)
    table.drop(index=plain.eval_rows).sample(frac=1, random_state=0).to_csv(path, index=False)
    data = prepare(tmp_path, gemma2, f"data.teacher={{path: {path}, weight: 0.75, temperature: 2}}")
    assert np.array_equal(data.labels, plain.labels) and data.taught is not None
    expected = 0.25 * plain.labels + 0.75 * tempered(predicted, 2)
    assert data.taught[data.train_rows] == pytest.approx(expected[data.train_rows], abs=1e-6)
    assert np.array_equal(data.taught[data.eval_rows], plain.labels[data.eval_rows])
    table.iloc[:3].to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"has no prediction of .* rows, the first with id"):
        prepare(tmp_path, gemma2, f"data.teacher.path={path}")


def test_temperature_makes_even() -> None:
    p = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    assert tempered(p, 1) is p
    assert tempered(p, 2)[0] == pytest.approx(np.sqrt(p[0]) / np.sqrt(p[0]).sum())
    assert np.isfinite(tempered(p, 3)).all() and tempered(p, 100)[0] == pytest.approx([1 / 3] * 3, abs=0.01)


def test_near_duplicates_of_prompts() -> None:
    long = "explain in simple words how a steam engine turns the heat of burning coal into motion"
    groups = [long.replace("simple", "simpler"), long[:40], "what is the capital of france?", "", long + "!"]
    assert near(groups, [long, "who wrote faust?", ""]).tolist() == [True, False, False, False, True]
    assert not near(groups, []).any()
