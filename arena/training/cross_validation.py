"""Cross-validation: every fold trained and scored, one file of out-of-fold predictions, and the score of all rows."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from arena.config import run_place, save_recipe
from arena.data.files import data_file, read_files
from arena.distributed import check_at_once, last_line, start_process
from arena.metrics import Score, estimate
from arena.progress import console
from arena.settings import Recipe
from arena.stopping import MORE_TO_DO, Stopped, stopping
from arena.storage.files import atomic_write, write_json, write_text
from arena.tasks import task_of
from arena.training.run import run_fold
from arena.training.scores import of_means

WAIT = 0.2  # seconds between two looks at processes


@dataclass(frozen=True)
class CrossValidated:
    """All folds of a run.

    Attributes:
        folds: the `metrics.json` of each.
        best: the metrics of all rows, each predicted by the best checkpoint of the fold that held it out. Those
            checkpoints were chosen on the same rows.
        last: the same of the last checkpoints, which were not chosen.
    """

    folds: list[dict[str, Any]]
    best: dict[str, Score]
    last: dict[str, Score]


def cross_validate(recipe: Recipe, runs: Path, *, at_once: int = 1, fresh: bool = False) -> CrossValidated:
    """Trains every fold that is not finished, and writes `oof.csv` and `cv.json` into the run's folder.

    Args:
        at_once: folds that are trained at the same time, each in a process of its own; on a machine with GPUs, each on
            one of them.
        fresh: set aside the folds that there are and train all again.

    Raises:
        ValueError: a fold cannot be trained, or the recipe holds out a file and has no folds.
        Stopped: a signal or `train.max_seconds` ended it; everything is saved, and the same call resumes.
    """
    if recipe.data.validation is not None:
        raise ValueError("data.validation holds out a file, so there are no folds: leave it out, or use `arena train`")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("start `arena cv` as one process: --at-once trains folds on several GPUs")
    check_at_once(at_once)
    if at_once > 1:
        _train_side_by_side(recipe, runs, at_once, fresh, torch.cuda.device_count())
        fresh = False  # the folds are there, and are only read
    folds = [run_fold(recipe, fold, runs, fresh=fresh) for fold in range(recipe.data.folds)]
    return _union(recipe, run_place(runs, recipe.name), folds)


def _union(recipe: Recipe, folder: Path, folds: list[dict[str, Any]]) -> CrossValidated:
    """Joins the folds' predictions and scores them."""
    task = task_of(recipe)
    rows = read_files([data_file(recipe.data.path, "train", recipe.data.cache)], task, recipe.data, "required")
    places = [folder / f"fold{fold}" for fold in range(recipe.data.folds)]
    best = [place / "oof.csv" for place in places]
    last = [path if (path := place / "oof-last.csv").is_file() else place / "oof.csv" for place in places]
    groups, scored, whole = rows.groups(), [], [_joined(files) for files in (best, last)]
    for table in whole:
        predicted = table.set_index("id").loc[list(rows.ids), list(task.columns)].to_numpy(dtype=np.float64)
        terms = {
            name: (metric.terms(rows.labels, predicted), metric.weights(predicted))
            for name, metric in task.metrics.items()
        }
        scored.append(of_means(task, estimate(terms, groups)))
    with atomic_write(folder / "oof.csv") as draft:
        whole[0].to_csv(draft, index=False, lineterminator="\n")
    result = CrossValidated(folds, *scored)
    shown = {
        name: {key: asdict(score) for key, score in each.items()}
        for name, each in (("best", result.best), ("last", result.last))
    }
    write_json(folder / "cv.json", {"recipe": recipe.name, "folds": folds, **shown})
    return result


def _joined(files: Sequence[Path]) -> pd.DataFrame:
    """The folds' own files of predictions, with the number of the fold."""
    tables = [pd.read_csv(file, dtype={"id": str}, keep_default_na=False) for file in files]
    return pd.concat([table.assign(fold=fold) for fold, table in enumerate(tables)])


def _train_side_by_side(recipe: Recipe, runs: Path, at_once: int, fresh: bool, gpus: int) -> None:
    """Trains the folds in processes of their own, whose output goes to `foldK.log`. If one fails, the others stop."""
    folder = run_place(runs, recipe.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "cv-recipe.yaml", save_recipe(recipe))
    waiting, running = list(range(recipe.data.folds)), dict[int, tuple[int, subprocess.Popen[bytes]]]()
    with stopping() as stop:
        try:
            while waiting or running:
                for slot in [each for each in range(at_once) if each not in running][: len(waiting)]:
                    fold = waiting.pop(0)
                    running[slot] = fold, _start(folder, runs, fold, slot if gpus else None, fresh)
                time.sleep(WAIT)
                for slot, (fold, process) in list(running.items()):
                    if (status := process.poll()) is not None:
                        del running[slot]
                        _check(fold, status, folder)
                if stop():
                    raise stop.stopped()
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()


def _check(fold: int, status: int, folder: Path) -> None:
    """Raises an error if a fold's process has not finished it."""
    if status == MORE_TO_DO:
        raise Stopped(f"fold {fold} reached train.max_seconds", MORE_TO_DO)
    if status != 0:
        raise ValueError(f"fold {fold} ended with status {status}: {last_line(folder / f'fold{fold}.log')}")
    console.print(f"fold {fold} is finished")


def _start(folder: Path, runs: Path, fold: int, gpu: int | None, fresh: bool) -> subprocess.Popen[bytes]:
    console.print(
        f"fold {fold} begins{'' if gpu is None else f' on GPU {gpu}'}: its output is in {folder}/fold{fold}.log"
    )
    words = ["train", "--recipe", str(folder / "cv-recipe.yaml"), "--fold", str(fold), "--runs", str(runs)]
    words += ["--fresh"] if fresh else []
    return start_process(["arena.cli", *words], folder / f"fold{fold}.log", gpu)
