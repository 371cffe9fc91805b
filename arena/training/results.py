"""What a finished fold leaves beside the judge: out-of-fold predictions, scores, and reference scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from arena.config import Recipe
from arena.data.prepare import FoldData
from arena.distributed import device_name, peak_memory
from arena.metrics import log_loss
from arena.model.attention.varlen import used_backends
from arena.packing.plan import PackPlan
from arena.progress import optional
from arena.storage.files import atomic_write
from arena.training.optimizer import trainable
from arena.training.trainer import Trained

# what a judge's log-loss is compared with, besides the prior's
REFERENCES = ("baseline_log_loss", "bayes_log_loss", "bayes_log_loss_expected")


def write_oof(path: Path, data: FoldData, probabilities: np.ndarray) -> None:
    """Out-of-fold predictions in the file's order: `id`, the probabilities, the label as class and as values."""
    labels, task = data.labels[data.eval_rows], data.task
    table = pd.DataFrame(
        {
            "id": [data.ids[row] for row in data.eval_rows],
            **{name: probabilities[:, at] for at, name in enumerate(task.columns)},
            "label": [task.classes[at] for at in labels.argmax(axis=1)],
            **{f"label_{name}": labels[:, at] for at, name in enumerate(task.columns)},
        }
    )
    with atomic_write(path) as draft:
        table.to_csv(draft, index=False, lineterminator="\n")


def scores(data: FoldData, trained: Trained) -> dict[str, float]:
    """The task's metrics on the held-out rows, and the prior's log-loss for comparison."""
    labels = data.labels[data.eval_rows]
    values = {name: metric(labels, trained.probabilities) for name, metric in data.task.metrics.items()}
    return {**values, "prior_log_loss": log_loss(labels, np.tile(data.prior, (len(labels), 1)))}


def references(recipe: Recipe, data: FoldData) -> dict[str, float | None]:
    """A simple baseline's log-loss, and the best possible one if it is known; None for what cannot be computed."""
    losses: dict[str, float | None] = dict.fromkeys(REFERENCES)
    labels, rows = data.labels[data.eval_rows], data.rows
    with optional("fitting the plain baseline"):
        train_rows = data.train_rows[data.train_rows < len(rows)]  # without those of extra files
        baseline = data.task.baseline(rows.table, rows.labels, train_rows, data.eval_rows, recipe.seed)
        losses["baseline_log_loss"] = None if baseline is None else log_loss(labels, baseline)
    path = Path(recipe.data.path) / "truth.csv"
    with optional(f"reading {path}", "the report does not show the best possible log-loss"):
        truth = _truth(path, [data.ids[row] for row in data.eval_rows], data.task.columns)
        if truth is not None:
            losses |= {"bayes_log_loss": log_loss(labels, truth), "bayes_log_loss_expected": log_loss(truth, truth)}
    return losses


def effort(data: FoldData, plan: PackPlan, trained: Trained, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """The size, time and memory of the run."""
    done = trained.done
    return {
        "n_eval": len(data.eval_rows),
        "n_train": len(data.train_rows),
        "steps": done.step,
        "best_step": trained.best_step,
        "micro_batches": done.micro_batches,
        "fill_rate": plan.fill_rate,
        "tokens": done.tokens,
        "unique_tokens": done.unique_tokens,
        "tokens_per_second": done.tokens / max(done.seconds, 1e-9),
        "train_seconds": done.seconds,
        "data_wait_seconds": done.waited,
        "peak_memory_bytes": peak_memory(device),
        "trainable_parameters": sum(parameter.numel() for parameter in trainable(model).values()),
        "device": device_name(device),
        "attention_backend": used_backends(model),
    }


def _truth(path: Path, ids: list[str], columns: tuple[str, ...]) -> np.ndarray | None:
    """The probabilities from which synthetic labels were drawn; None for other rows."""
    if not path.is_file():
        return None
    table = pd.read_csv(path, dtype={"id": str})
    if "id" not in table:
        return None
    table = table.set_index("id")
    if not set(ids) <= set(table.index) or not set(columns) <= set(table.columns):
        return None
    return table.loc[ids, list(columns)].to_numpy(dtype=np.float64)
