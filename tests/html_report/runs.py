"""Finished folds without training: real rows, scores and files, but predictions that are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from arena.config import save_recipe
from arena.data.prepare import prepare_fold
from arena.inference.saved import SavedJudge, as_json
from arena.settings import Recipe
from arena.storage.files import write_json, write_text
from arena.tasks import task_of
from arena.training.checkpoint_manager import CheckpointManager
from arena.training.held_out import Predictions, scores, write_oof
from arena.training.scores import score_tables
from tests.helpers import make_tokenizer

EFFORT = {
    "steps": 30, "best_step": 30, "micro_batches": 60, "fill_rate": 0.75, "tokens": 6000, "unique_tokens": 4500,
    "tokens_per_second": 500.0, "train_seconds": 12.0, "peak_memory_bytes": 2**30, "trainable_parameters": 123456,
    "device": "CPU", "attention_backend": "blockwise", "bayes_log_loss": 0.5,
}  # fmt: skip


def write_fold(recipe: Recipe, runs: Path, fold: int, seed: int = 0) -> dict[str, Any]:
    """Writes the folder of a finished fold of a task with classes, and returns its metrics."""
    folder, task, rng = runs / recipe.name / f"fold{fold}", task_of(recipe), np.random.default_rng([seed, fold])
    tokenizer = make_tokenizer(folder / "model")
    data = prepare_fold(recipe, task, fold, tokenizer)
    labels, has_input = data.labels[data.eval_rows], data.has_input[data.eval_rows]
    orders = [0.4 * labels + 0.6 * rng.dirichlet(np.ones(len(task.classes)), len(labels)) for _ in range(task.orders)]
    flipped = orders[0].argmax(axis=1) != orders[-1].argmax(axis=1) if task.orders > 1 else None
    predicted = np.where(has_input[:, None], np.mean(orders, axis=0), data.prior)
    found = Predictions(predicted, flipped)
    metrics = {"recipe": recipe.name, "fold": fold, "n_eval": len(labels), "n_train": len(data.train_rows), **EFFORT}
    metrics |= scores(data, predicted, None) | score_tables(data, found, found)
    judge = SavedJudge(folder / "model", recipe, data.prior, data.trained_on, base="")
    write_json(folder / "model" / "judge.json", as_json(judge))
    write_oof(folder / "oof.csv", data, predicted)
    checkpoints = CheckpointManager(folder / "checkpoints")
    checkpoints.save_evaluation(30, {"log_loss": 1.0}, orders[0][has_input])
    write_rest(folder, recipe, metrics)
    return metrics


def write_rest(folder: Path, recipe: Recipe, metrics: dict[str, Any]) -> None:
    """Writes what does not depend on the rows: metrics, recipe and log."""
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 1 + 1 / step, "lr": 1e-3 / step, "grad_norm": float("inf") if step == 2 else 1.0}
        for step in range(1, 31)
    ]
    lines.append({"step": 30, "eval_log_loss": 1.05, "eval_rows": 10, "best": True})
    write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_text(folder / "recipe.yaml", save_recipe(recipe))
    write_json(folder / "metrics.json", metrics)
