"""The log of a run, `log.jsonl`, and experiment trackers, which get its lines and what `train.tracking` asks for.

The log has one line for each step and each evaluation, and is cut back to the checkpoint from which a run resumes. A
tracker that cannot start is an error; one that fails later is only a warning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from arena.config import save_recipe
from arena.progress import format_error, optional, warn
from arena.settings import Recipe, TrackingSettings
from arena.storage.files import write_text
from arena.training.optimizer import trainable

EVALUATION = "eval_log_loss"  # the key that distinguishes an evaluation's line from a step's
LINE = ("step", EVALUATION, "eval_rows", "best")  # the keys of an evaluation's line, in this order


class RunLog:
    """The log of a run, which only the first rank writes.

    Attributes:
        evaluations: the held-out log-loss of each evaluation, by step; known after `cut`.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.evaluations: dict[int, float] = {}

    def cut(self, step: int) -> None:
        """Drops the lines after a step, which will be written again, and an incomplete line."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        lines = [line for line in lines if _step_of(line) <= step]
        if self.writes:
            write_text(self.path, "".join(line + "\n" for line in lines))
        self.evaluations = {facts["step"]: facts[EVALUATION] for facts in map(json.loads, lines) if EVALUATION in facts}

    def add(self, facts: dict[str, Any]) -> None:
        if EVALUATION in facts:
            self.evaluations[facts["step"]] = facts[EVALUATION]
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")


def _step_of(line: str) -> float:
    """The step of a line; infinity for an incomplete line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def start_tracking(accelerator: Accelerator, recipe: Recipe, fold: int) -> None:
    """Starts a run of the tracker that `train.track` names.

    Raises:
        ValueError: it cannot start, for example because there is no key.
    """
    if recipe.train.track == "none":
        return
    settings = recipe.train.tracking
    named = {"name": settings.name, "tags": list(settings.tags)}
    try:
        accelerator.init_trackers(
            settings.project, config={"recipe": save_recipe(recipe), "fold": fold},
            init_kwargs={recipe.train.track: {key: value for key, value in named.items() if value}},
        )  # fmt: skip
    except Exception as error:  # whatever the library raises
        accelerator.trackers.clear()
        raise ValueError(
            f"train.track={recipe.train.track} cannot start ({format_error(error)}): log in as its documentation "
            "describes, or train without a tracker (train.track=none)"
        ) from error


def track(accelerator: Accelerator, facts: dict[str, Any], settings: TrackingSettings, model: nn.Module) -> None:
    """Sends a line of the log to the tracker, if it is a line that it gets; a tracker that fails is not used again.

    Args:
        model: with the gradients of the step, for histograms.
    """
    is_step = EVALUATION not in facts
    if not accelerator.trackers or (is_step and facts["step"] % settings.every):
        return
    try:
        tracked = {key: value for key, value in facts.items() if key != "step" and value is not None}
        if is_step and accelerator.is_main_process:
            tracked |= _histograms(model, settings.watch)
        accelerator.log(tracked, step=facts["step"])
    except Exception as error:
        accelerator.trackers.clear()
        warn(f"warning: the tracker failed ({format_error(error)}); training continues without it")


def _histograms(model: nn.Module, watch: str) -> dict[str, Any]:
    """Histograms for wandb of the trained weights alone: its own `watch` would copy frozen ones from a GPU too."""
    kinds = {"none": (), "all": ("gradients", "parameters")}.get(watch, (watch,))
    if not kinds:
        return {}
    from wandb import Histogram

    found = {}
    for name, parameter in trainable(model).items():
        for kind in kinds:
            values = parameter.grad if kind == "gradients" else parameter.detach()
            if values is not None:  # without those that overflowed in float16
                found[f"{kind}/{name}"] = Histogram(values[values.isfinite()].float().cpu().numpy())
    return found


def upload_model(accelerator: Accelerator, recipe: Recipe, fold: int, folder: Path) -> None:
    """Uploads a finished judge to wandb as an artifact of type `model`, if the recipe asks for it."""
    for tracker in accelerator.trackers if recipe.train.tracking.upload_model else ():
        with optional("uploading the judge to the tracker", f"it is in {folder}"):
            tracker.tracker.log_artifact(str(folder), name=f"{recipe.name}-fold{fold}", type="model")


@contextmanager
def tracking(accelerator: Accelerator) -> Iterator[None]:
    """Ends the tracker's run after the block, which should save everything first: a tracker may wait for a network."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            with optional("ending the tracker's run"):
                tracker.finish()
        accelerator.trackers.clear()
