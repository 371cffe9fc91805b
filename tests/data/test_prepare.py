"""What one fold trains on and is scored on: nothing in both, nothing lost, nothing of the wrong file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from arena.config import change
from arena.data.files import data_file
from arena.data.prepare import FoldData, prepare_fold
from arena.model.backbone import load_tokenizer
from arena.tasks import task_of
from tests.helpers import tiny_recipe


def prepare(folder: Path, base: Path, fold: int = 0, *overrides: str) -> FoldData:
    recipe = tiny_recipe(folder, base, *overrides)
    return prepare_fold(recipe, task_of(recipe), fold, load_tokenizer(str(base)))


def keys(data: FoldData, rows: np.ndarray) -> set[str]:
    return {data.rows.groups()[row] for row in rows}


def test_every_row_is_held_out_once_and_never_trained_on_then(gemma2: Path, tmp_path: Path) -> None:
    held_out = []
    for fold in range(3):
        data = prepare(tmp_path, gemma2, fold)
        assert sorted([*data.train_rows, *data.eval_rows]) == list(range(60))
        assert not keys(data, data.train_rows) & keys(data, data.eval_rows)
        held_out += data.eval_rows.tolist()
    assert sorted(held_out) == list(range(60))


def test_prior_is_of_the_training_rows_alone(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2)
    data = prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(str(gemma2)))
    table = pd.read_csv(data_file(recipe.data.path, "train"), dtype={"id": str})
    labels = table[["winner_model_a", "winner_model_b", "winner_tie"]].to_numpy(dtype=float)
    assert table["id"].tolist() == data.rows.ids == data.ids
    np.testing.assert_array_equal(data.labels, labels)
    np.testing.assert_allclose(data.prior, labels[data.train_rows].mean(axis=0))
    assert np.abs(data.prior - labels.mean(axis=0)).max() > 1e-3


def test_extra_rows_that_repeat_or_leak_are_left_out(gemma2: Path, tmp_path: Path) -> None:
    plain = prepare(tmp_path, gemma2)
    rows = plain.rows.table.select([int(plain.eval_rows[0]), int(plain.train_rows[0])]).to_list()
    texts = [
        (rows[0]["prompt"], ["new"], ["answers"]),  # a held-out prompt: would leak
        (rows[1]["prompt"], ["new"], ["answers"]),  # a training prompt: fine
        (rows[1]["prompt"], rows[1]["response_a"], rows[1]["response_b"]),  # a row again
        (["an unseen prompt"], ["new"], ["answers"]),
        (["an unseen prompt"], ["new"], ["answers"]),  # itself again
    ]
    lines = [
        json.dumps({"id": f"x{at}", "prompt": p, "response_a": a, "response_b": b, "winner": "tie (bothbad)"})
        for at, (p, a, b) in enumerate(texts)
    ]
    (tmp_path / "extra.jsonl").write_text("\n".join(lines))
    data = prepare(tmp_path, gemma2, 0, f"data.extra=[{tmp_path / 'extra.jsonl'}]")
    assert data.train_rows.tolist() == [*plain.train_rows.tolist(), 60 + 1, 60 + 3]
    assert data.eval_rows.tolist() == plain.eval_rows.tolist()
    assert "2 repeat a row, 1 have a prompt of the held-out rows, and 0 nearly one" in data.notes[0]
    assert data.labels[61].tolist() == [0, 0, 1]


def test_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder or file"):
        data_file(tmp_path / "nothing", "train")
    with pytest.raises(ValueError, match="it has none of them"):
        data_file(tmp_path, "train")
    (tmp_path / "train.csv").touch()
    assert data_file(tmp_path, "train") == data_file(tmp_path / "train.csv", "train") == tmp_path / "train.csv"
    (tmp_path / "train.parquet").touch()
    with pytest.raises(ValueError, match=r"it has train\.csv, train\.parquet"):
        data_file(tmp_path, "train")


def test_nothing_to_judge_in_a_fold_is_an_error_before_training(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2)
    train = data_file(recipe.data.path, "train")
    pd.read_csv(train, dtype=str).assign(response_a="[null]", response_b='[" "]').to_csv(train, index=False)
    with pytest.raises(ValueError, match=r"rows to train on|a response to judge"):
        prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(str(gemma2)))


@pytest.mark.parametrize(
    "words",
    [
        "{prompt}",
        "A: {{ response_a }}",
        "{response_b}",
        "{answer_1}",
        "{Question}",
        "{instruction}",
        "{conversation}",
        "{{text}}",
    ],
)
def test_placeholders_in_a_template_are_refused_before_anything_is_read(
    gemma2: Path, tmp_path: Path, words: str
) -> None:
    recipe = change(tiny_recipe(tmp_path, gemma2), [f"prompt.template.user={json.dumps(words)}"])
    with pytest.raises(ValueError, match=r"prompt\.template\.user has \{.*templates have no placeholders"):
        prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(str(gemma2)))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "words", ['Reply as {"verdict": "A"}.', "{a: {b}}", "{promptly}", "{ }", "{{", "the prompt", "%s $prompt"]
)
def test_other_braces_are_ordinary_text(gemma2: Path, tmp_path: Path, words: str) -> None:
    recipe = change(
        tiny_recipe(tmp_path, gemma2), ["prompt.max_length=256", f"prompt.template.user={json.dumps(words)}"]
    )
    assert len(prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(str(gemma2))).store) == 120
