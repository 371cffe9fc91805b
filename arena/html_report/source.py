"""What a finished run left in its folder: metrics, log and predictions of a fold, or of all after `arena cv`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from arena.command_line import command
from arena.config import load_recipe
from arena.data.task import Task
from arena.inference.find import find_models
from arena.inference.saved import read_judge
from arena.settings import Recipe
from arena.storage.manifest import damage
from arena.tasks import task_of
from arena.training.checkpoint_manager import CheckpointManager

REFERENCES = (
    "prior_log_loss", "base_log_loss", "baseline_log_loss", "blend_log_loss", "recalibrated_log_loss", "bayes_log_loss"
)  # fmt: skip
NEEDED = (
    "fold", "n_eval", "n_train", "log_loss", "fill_rate", "tokens_per_second", "peak_memory_bytes",
    "trainable_parameters", "device", "attention_backend"
)  # fmt: skip
SUMS = ("n_eval", "micro_batches", "tokens", "unique_tokens", "train_seconds", "steps")


@dataclass(frozen=True)
class Fold:
    """One finished fold.

    Attributes:
        log: the lines of its log.
        prior: (C,), what it predicts for rows without input.
        predictions: its `oof.csv`.
    """

    folder: Path
    metrics: dict[str, Any]
    log: list[dict[str, Any]]
    prior: np.ndarray
    predictions: pd.DataFrame

    def as_given(self) -> np.ndarray | None:
        """Predictions of the rows with input in their first order, (n, C); None where no checkpoint has them."""
        checkpoints = CheckpointManager(self.folder / "checkpoints")
        step = self.metrics.get("best_step")
        if step is None or damage(checkpoints.evaluation(step)) is not None:
            return None
        return checkpoints.load_evaluation(step)[1]


@dataclass(frozen=True)
class Source:
    """A finished fold, or all folds of a run.

    Attributes:
        folder: of the fold or the run.
        metrics: as in the `metrics.json` of a fold; of all rows together if there are several folds.
    """

    folder: Path
    recipe: Recipe
    folds: tuple[Fold, ...]
    metrics: dict[str, Any]

    @property
    def task(self) -> Task:
        return task_of(self.recipe)

    @property
    def name(self) -> str:
        return self.recipe.name if len(self.folds) > 1 else f"{self.recipe.name}, fold {self.metrics['fold']}"


def read_source(name: str, runs: Path) -> Source:
    """The fold or run of that name or path.

    Raises:
        ValueError: there is none, it is not finished, or its folds were not joined by `arena cv`.
    """
    models = find_models(name, runs)
    folds = tuple(_read_fold(model) for model in models)
    recipe = load_recipe(str(folds[0].folder / "recipe.yaml"))
    if len(folds) == 1:
        return Source(folds[0].folder, recipe, folds, folds[0].metrics)
    run = folds[0].folder.parent
    if not (run / "cv.json").is_file():
        one = command("arena", "report", str(folds[0].folder))
        raise ValueError(
            f"{run} has {len(folds)} finished folds, but no cv.json: name one, as in `{one}`, or finish all with "
            f"`{command('arena', 'cv', '--recipe', recipe.name)}`"
        )
    cv = json.loads((run / "cv.json").read_text(encoding="utf-8"))
    metrics = [fold.metrics for fold in folds]
    if cv["folds"] != metrics:
        again = command("arena", "cv", "--recipe", recipe.name)
        raise ValueError(f"{run}/cv.json is not of the folds that are there now: run `{again}` again, which joins them")
    return Source(run, recipe, folds, _of_all(metrics, cv))


def _read_fold(model: Path) -> Fold:
    folder = model.parent
    for name in ("metrics.json", "recipe.yaml", "log.jsonl", "oof.csv"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}, from which the report is made: name a fold with all its files")
    return Fold(
        folder, metrics=_metrics(folder / "metrics.json"), log=_log(folder / "log.jsonl"),
        prior=read_judge(model).prior, predictions=_predictions(folder / "oof.csv"),
    )  # fmt: skip


def damaged(file: Path, what: str) -> ValueError:
    """The error of a file of a fold that cannot be used: `what` is wrong with it."""
    return ValueError(f"{file} is damaged: {what}; copy it anew from where the fold was trained, or train that again")


def _metrics(file: Path) -> dict[str, Any]:
    metrics = _object(file, "it", file.read_bytes())
    if missing := [name for name in (*NEEDED, *SUMS) if name not in metrics]:
        raise damaged(file, f"it has no {missing[0]}")
    return metrics


def _log(file: Path) -> list[dict[str, Any]]:
    return [_object(file, f"line {number}", line) for number, line in enumerate(file.read_bytes().splitlines(), 1)]


def _object(file: Path, where: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise damaged(file, f"{where} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise damaged(file, f"{where} is not a JSON object")
    return value


def _predictions(file: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(file, dtype={"id": str}, keep_default_na=False)
    except ValueError as error:  # of pandas too
        raise damaged(file, f"it is not a CSV file with a header ({' '.join(str(error).split())})") from None
    if table.empty:
        raise damaged(file, "it has no rows")
    return table


def _of_all(folds: Sequence[dict[str, Any]], cv: dict[str, Any]) -> dict[str, Any]:
    """The metrics of all rows: those of `cv.json`, and means over the rows of what only folds have."""
    rows = np.array([fold["n_eval"] for fold in folds])
    joined = {key: sum(fold[key] for fold in folds) for key in SUMS}
    known = [key for key in REFERENCES if all(fold.get(key) is not None for fold in folds)]
    joined |= {key: float(np.average([fold[key] for fold in folds], weights=rows)) for key in known}
    joined["fill_rate"] = float(
        np.average([fold["fill_rate"] for fold in folds], weights=[fold["micro_batches"] for fold in folds])
    )
    joined["tokens_per_second"] = joined["tokens"] / joined["train_seconds"]
    scores = dict(cv["best"])
    if all("flip_rate" in fold["scores"] for fold in folds):
        flips = [fold["scores"]["flip_rate"] for fold in folds]
        counts = [each["rows"] for each in flips]
        mean = float(np.average([each["value"] for each in flips], weights=counts))
        scores["flip_rate"] = {"value": mean, "low": None, "high": None, "rows": sum(counts)}
    joined |= {"scores": scores, "log_loss": scores["log_loss"]["value"], "recipe": cv["recipe"]}
    joined |= {key: folds[0][key] for key in ("device", "attention_backend", "trainable_parameters")}
    return joined | {"peak_memory_bytes": max(fold["peak_memory_bytes"] for fold in folds), "n_train": None}
