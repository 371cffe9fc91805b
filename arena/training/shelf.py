"""The checkpoints of a run: which are whole, which is best, which one to resume from, which may go."""

from __future__ import annotations

import datetime
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from arena.manifest import damage, read_manifest
from arena.progress import console
from arena.training.checkpoint import load_judged, save_judged

STEP, JUDGED = "step-", "judged-"


class Shelf:
    """The folder `checkpoints` of a run.

    Args:
        keep_last, keep_best: the latest checkpoints, and those with the least log-loss, that `tidy` leaves. The limits
            are apart: the best stays, however many follow it.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_best: int = 1) -> None:
        self.folder, self.keep_last, self.keep_best = folder, keep_last, keep_best

    def step(self, number: int) -> Path:
        """Where the checkpoint of a step stands, or would."""
        return self.folder / f"{STEP}{number:08d}"

    def steps(self) -> list[int]:
        """The checkpoints that are there, whole or not, the latest last."""
        return sorted(number for path in self.folder.glob(f"{STEP}*") if (number := _number(path)) is not None)

    @cached_property
    def losses(self) -> dict[int, float]:
        """The log-loss of each step that was judged and whose checkpoint is whole."""
        found = {}
        for path in self.folder.glob(f"{JUDGED}*"):
            number = _number(path)
            if number is not None and damage(path) is None and damage(self.step(number)) is None:
                found[number] = float(read_manifest(path)["log_loss"])
        return found

    @property
    def best(self) -> int | None:
        """The step with the least log-loss; the earlier one of equals."""
        return min(self.losses, key=lambda step: (self.losses[step], step), default=None)

    def judge(self, number: int, facts: dict[str, Any], probabilities: np.ndarray) -> None:
        """Keeps what the weights of a step made of the held-out rows; `facts` with the `log_loss`."""
        save_judged(self.judged(number), facts, probabilities)
        self.losses[number] = facts["log_loss"]

    def judged(self, number: int) -> Path:
        """Where the judgement of a step stands, or would."""
        return self.folder / f"{JUDGED}{number:08d}"

    def judgement(self, number: int) -> tuple[dict[str, Any], np.ndarray]:
        """Facts and probabilities (n, 3) of a judged step."""
        return read_manifest(self.judged(number)), load_judged(self.judged(number))

    def tidy(self) -> None:
        """Removes the checkpoints that neither limit keeps."""
        steps = self.steps()
        best = sorted(self.losses, key=lambda step: (self.losses[step], step))[: self.keep_best]
        for number in set(steps[: -self.keep_last]) - set(best):
            shutil.rmtree(self.step(number))
            shutil.rmtree(self.judged(number), ignore_errors=True)
            self.losses.pop(number, None)

    def choose(self, mode: str) -> Path | None:
        """The checkpoint to resume from; damaged ones are named and passed over.

        Args:
            mode: `auto`, the latest; `best`; or the path of one.

        Raises:
            ValueError: checkpoints are there, but none is whole; or the one asked for is not.
        """
        if mode not in ("auto", "best"):
            return _whole(Path(mode))
        if mode == "best":
            if self.best is None:
                raise ValueError(
                    f"{self.folder} holds no checkpoint that was judged: train.resume=auto takes the latest"
                )
            return _whole(self.step(self.best))
        steps, reasons = self.steps(), []
        for number in reversed(steps):
            why = damage(self.step(number))
            if why is None:
                return self.step(number)
            reasons.append(f"{self.step(number)}: {why}")
            console.print(f"passed over {reasons[-1]}")
        if reasons:
            raise ValueError(
                f"no checkpoint in {self.folder} is whole ({'; '.join(reasons)}): train anew with --fresh, or bring "
                "one back and name it with train.resume=PATH"
            )
        return None

    def leave_after(self, number: int) -> None:
        """Sets aside the checkpoints after a step, from which a run resumes another way; nothing is deleted."""
        later = [each for each in self.steps() if each > number]
        if not later:
            return
        stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S-%f")
        aside = self.folder / f"aside-{stamp}"
        aside.mkdir()
        for each in later:
            for path in (self.step(each), self.judged(each)):
                if path.is_dir():
                    path.rename(aside / path.name)
            self.losses.pop(each, None)
        console.print(f"{len(later)} later checkpoints are now in {aside}")


def _number(path: Path) -> int | None:
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() and path.is_dir() else None


def _whole(path: Path) -> Path:
    why = damage(path) if path.is_dir() else "there is no such folder"
    if why is not None:
        raise ValueError(f"train.resume={path}: {why}")
    return path
