"""Experiment trackers: they may refuse before training, and then only warn; a run never depends on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from arena.config import Recipe, save_recipe
from arena.progress import console, optional, said


def start_tracking(accelerator: Accelerator, recipe: Recipe, fold: int) -> None:
    """Begins a run of the tracker that `train.track` names.

    Raises:
        ValueError: it cannot start, for example without a key.
    """
    if recipe.train.track == "none":
        return
    try:
        accelerator.init_trackers("arena", config={"recipe": save_recipe(recipe), "fold": fold})
    except Exception as error:  # whatever the library raises
        accelerator.trackers.clear()
        raise ValueError(
            f"train.track={recipe.train.track} cannot start ({said(error)}): log in as its documentation says, or "
            "train without it (train.track=none)"
        ) from error


def track(accelerator: Accelerator, facts: dict[str, Any]) -> None:
    """Reports a line of the log; a tracker that fails is left out from then on."""
    try:
        tracked = {key: value for key, value in facts.items() if key != "step" and value is not None}
        accelerator.log(tracked, step=facts["step"])
    except Exception as error:
        accelerator.trackers.clear()
        console.print(f"warning: the tracker failed ({said(error)}); training continues without it", style="yellow")


@contextmanager
def tracking(accelerator: Accelerator) -> Iterator[None]:
    """Ends the tracker's run after the block, in which all is to be saved: it may wait for a network."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            with optional("ending the tracker's run"):
                tracker.finish()
        accelerator.trackers.clear()
