"""Experiment trackers: one that cannot start is an error; one that fails later is only a warning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from arena.config import Recipe, save_recipe
from arena.progress import console, format_error, optional


def start_tracking(accelerator: Accelerator, recipe: Recipe, fold: int) -> None:
    """Starts a run of the tracker that `train.track` names.

    Raises:
        ValueError: it cannot start, for example because there is no key.
    """
    if recipe.train.track == "none":
        return
    try:
        accelerator.init_trackers("arena", config={"recipe": save_recipe(recipe), "fold": fold})
    except Exception as error:  # whatever the library raises
        accelerator.trackers.clear()
        raise ValueError(
            f"train.track={recipe.train.track} cannot start ({format_error(error)}): log in as its documentation "
            "describes, or train without a tracker (train.track=none)"
        ) from error


def track(accelerator: Accelerator, facts: dict[str, Any]) -> None:
    """Sends a line of the log to the tracker; one that fails is not used again."""
    try:
        tracked = {key: value for key, value in facts.items() if key != "step" and value is not None}
        accelerator.log(tracked, step=facts["step"])
    except Exception as error:
        accelerator.trackers.clear()
        console.print(
            f"warning: the tracker failed ({format_error(error)}); training continues without it", style="yellow"
        )


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
