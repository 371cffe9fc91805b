"""The checkpoints of a run: which are complete, which is best, which one to resume from, which may be removed."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from arena.metrics import Metric
from arena.progress import console, warn
from arena.storage.manifest import damage, read_manifest
from arena.training.checkpoint import read_evaluation, write_evaluation

STEP, EVALUATION = "step-", "evaluation-"


@dataclass(frozen=True)
class Ranking:
    """What decides which of several evaluations is better: a metric of the held-out rows."""

    metric: str = "log_loss"
    higher_is_better: bool = False

    def cost(self, facts: Mapping[str, Any]) -> float:
        """Of the facts of an evaluation: less is better."""
        score = float(facts[self.metric])
        return -score if self.higher_is_better else score


def ranking_by(name: str, metrics: Mapping[str, Metric]) -> Ranking:
    """The ranking by one of a task's metrics. Raises `ValueError` if there is none of that name."""
    if name not in metrics:
        raise ValueError(f"train.best_metric={name}: the metrics of this task are {', '.join(metrics)}")
    return Ranking(name, metrics[name].higher_is_better)


class CheckpointManager:
    """The folder `checkpoints` of a run.

    Args:
        keep_last, keep_best: how many of the latest checkpoints, and of the best by `ranking`, `prune` keeps.
            The limits are independent: the best is kept, however many follow it.
    """

    def __init__(
        self, folder: Path, keep_last: int = 2, keep_best: int = 1, ranking: Ranking | None = None
    ) -> None:  # fmt: skip
        self.folder, self.keep_last, self.keep_best = folder, keep_last, keep_best
        self.ranking = ranking or Ranking()

    def step(self, number: int) -> Path:
        """The folder of a step's checkpoint, whether it exists or not."""
        return self.folder / f"{STEP}{number:08d}"

    def steps(self) -> list[int]:
        """The steps of all checkpoints, complete or not, in ascending order."""
        return sorted(number for path in self.folder.glob(f"{STEP}*") if (number := _number(path)) is not None)

    @cached_property
    def costs(self) -> dict[int, float]:
        """The cost (`Ranking.cost`) of each step that was evaluated and whose checkpoint is complete."""
        costs = {}
        for path in self.folder.glob(f"{EVALUATION}*"):
            number = _number(path)
            if number is not None and damage(path) is None and damage(self.step(number)) is None:
                costs[number] = self.ranking.cost(read_manifest(path))
        return costs

    @property
    def best(self) -> int | None:
        """The best step that was evaluated; of equals, the earliest."""
        return next(iter(self._best_first()), None)

    def save_evaluation(self, number: int, facts: dict[str, Any], probabilities: np.ndarray) -> None:
        """Saves a step's predictions for the held-out rows; `facts` must include the metric of the ranking."""
        write_evaluation(self.evaluation(number), facts, probabilities)
        self.costs[number] = self.ranking.cost(facts)

    def evaluation(self, number: int) -> Path:
        """The folder of a step's evaluation, whether it exists or not."""
        return self.folder / f"{EVALUATION}{number:08d}"

    @property
    def base(self) -> Path:
        """The folder of the evaluation of the base before training, which ranks no checkpoint."""
        return self.folder / "base"

    def load_evaluation(self, number: int) -> tuple[dict[str, Any], np.ndarray]:
        """The facts and the (n, C) probabilities of an evaluated step."""
        return read_manifest(self.evaluation(number)), read_evaluation(self.evaluation(number))

    def prune(self) -> None:
        """Removes the checkpoints that neither limit keeps."""
        steps = self.steps()
        for number in set(steps[: -self.keep_last]) - set(self._best_first()[: self.keep_best]):
            shutil.rmtree(self.step(number))
            shutil.rmtree(self.evaluation(number), ignore_errors=True)
            self.costs.pop(number, None)

    def _best_first(self) -> list[int]:
        return sorted(self.costs, key=lambda step: (self.costs[step], step))

    def choose(self, mode: str) -> Path | None:
        """The checkpoint to resume from; damaged ones are reported and passed over. None if there is no checkpoint.

        Args:
            mode: `auto`, the latest; `best`; or the path of a checkpoint.

        Raises:
            ValueError: there are checkpoints, but none is complete, or the requested one is not.
        """
        if mode not in ("auto", "best"):
            return _whole(Path(mode))
        if mode == "best":
            if self.best is None:
                raise ValueError(
                    f"{self.folder} has no checkpoint that was evaluated: train.resume=auto resumes from the latest"
                )
            return _whole(self.step(self.best))
        steps, reasons = self.steps(), []
        for number in reversed(steps):
            why = damage(self.step(number))
            if why is None:
                return self.step(number)
            reasons.append(f"{self.step(number)}: {why}")
            warn(f"passed over {reasons[-1]}")
        if reasons:
            raise ValueError(
                f"no checkpoint in {self.folder} can be resumed ({'; '.join(reasons)}): start again with --fresh, or "
                "restore one and name it with train.resume=PATH"
            )
        return None

    def archive_after(self, number: int) -> None:
        """Moves the checkpoints after a step, from which a run resumes, to an archive folder; nothing is deleted."""
        later = [each for each in self.steps() if each > number]
        if not later:
            return
        stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S-%f")
        archive = self.folder / f"archive-{stamp}"
        archive.mkdir()
        for each in later:
            for path in (self.step(each), self.evaluation(each)):
                if path.is_dir():
                    path.rename(archive / path.name)
            self.costs.pop(each, None)
        console.print(f"{len(later)} later checkpoints are now in {archive}")


def _number(path: Path) -> int | None:
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() and path.is_dir() else None


def _whole(path: Path) -> Path:
    why = damage(path) if path.is_dir() else "there is no such folder"
    if why is not None:
        raise ValueError(f"train.resume={path}: {why}")
    return path
