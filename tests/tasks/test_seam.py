"""The seam for tasks: a second task is its own file, its recipe and a line in the dictionary."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import arena
from arena.config import load_recipe
from arena.inference.export import export_judge
from arena.inference.infer import infer
from arena.inference.saved import read_judge
from arena.settings import Recipe
from arena.tasks import TASKS, task_of
from arena.training.run import run_fold
from tests.tasks.sentiment import Sentiment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GOOD, BAD = ("a good answer", "very clear", "hello world good"), ("a bad answer", "not very clear", "bad world")


def write(folder: Path, n: int = 90) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    labels = rng.integers(0, 2, n)
    texts = [f"{rng.choice((BAD, GOOD)[label])} {at}" for at, label in enumerate(labels)]
    rows = pd.DataFrame({"id": [f"r{at}" for at in range(n)], "sentence": texts, "label": labels})
    rows.loc[7, "sentence"] = ""  # a row without input
    rows.to_csv(folder / "train.csv", index=False)
    test = rows.tail(20).drop(columns="label").assign(id=[f"t{at}" for at in range(20)])
    test.loc[test.index[3], "sentence"] = " "
    test.to_csv(folder / "test.csv", index=False)
    return folder


@pytest.fixture
def recipe(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setitem(TASKS, "sentiment", Sentiment)
    places = [f"data.path={write(tmp_path / 'rows')}", f"data.cache={tmp_path / 'cache'}"]
    return load_recipe(str(HERE / "sentiment.yaml"), [f"model.base={gemma2}", *places])


def test_trained_evaluated_saved_and_inferred(recipe: Recipe, tmp_path: Path) -> None:
    metrics = run_fold(recipe, 0, tmp_path / "runs")
    assert metrics["log_loss"] < 0.5 < 0.65 < metrics["prior_log_loss"] and metrics["accuracy"] > 0.8
    assert metrics["baseline_log_loss"] is None
    fold = tmp_path / "runs/sentiment/fold0"
    oof = pd.read_csv(fold / "oof.csv")
    assert list(oof.columns) == ["id", "p_negative", "p_positive", "label", "label_p_negative", "label_p_positive"]
    assert set(oof["label"]) == {"negative", "positive"} and len(oof) == metrics["n_eval"]
    logged = [json.loads(line) for line in (fold / "log.jsonl").read_text().splitlines()]
    assert min(line["eval_log_loss"] for line in logged if "eval_log_loss" in line) < 0.5

    out = tmp_path / "predictions.csv"
    infer([fold / "model"], None, out)
    found = pd.read_csv(out).set_index("id")
    assert list(found.columns) == ["p_negative", "p_positive"] and len(found) == 20
    np.testing.assert_allclose(found.loc["t3"], read_judge(fold / "model").prior, atol=1e-8)  # nothing to predict from

    judge = arena.Judge.from_pretrained(fold / "model")
    rows = judge.read([tmp_path / "rows/test.csv"])
    np.testing.assert_allclose(judge.predict_proba(rows), found.to_numpy(), atol=1e-6)

    export_judge(fold / "model", tmp_path / "plain", dtype="float32")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain", attn_implementation="eager")
    assert plain.config.id2label == {0: "negative", 1: "positive"}
    ids = next(iter(rows.task.encoder(judge.models[0].tokenizer, recipe.prompt).encode(rows.table[:1])))
    logits = plain(input_ids=torch.from_numpy(ids.input_ids)[None].long()).logits
    np.testing.assert_allclose(logits.softmax(-1)[0].tolist(), found.to_numpy()[0], atol=1e-4)


def test_the_batches_of_a_fold(recipe: Recipe) -> None:
    for step in arena.open_fold(recipe):
        for micro_batch in step:
            assert micro_batch["label"].shape == (micro_batch["batch_size"], 2)
            assert all(text.startswith("<bos>") and text.endswith("it is") for text in micro_batch["input_text"])


def test_bad_rows_are_named_in_the_words_of_the_task(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "rows/train.csv"
    path.write_text("id,sentence,label\n1,good,2\n2,bad,0\n")
    with pytest.raises(ValueError, match=r"train\.csv, line 2, label: is \"2\"; write 0 or 1"):
        run_fold(recipe, 0, tmp_path / "runs")
    path.write_text("id,text,label\n1,good,1\n")
    with pytest.raises(ValueError, match="sentence: is missing; the columns found are"):
        run_fold(recipe, 0, tmp_path / "runs")


def test_a_task_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="task is 'sentimental': name one of preference"):
        task_of(load_recipe("demo", ["task=sentimental"]))


def test_only_tasks_and_demo_know_what_a_preference_is() -> None:
    """Names of its columns and classes, and its module, occur nowhere else in the package."""
    known = {"response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"}
    for path in sorted((ROOT / "arena").rglob("*.py")):
        room = path.relative_to(ROOT / "arena").parts[0]
        if room in ("tasks", "demo"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not texts & known, path
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "arena.tasks.preference" not in imported, path
