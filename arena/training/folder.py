"""A run's folder: whose it is, whether it is finished, and how another run takes its place."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from arena.config import Recipe, save_recipe
from arena.files import fingerprint, write_json, write_text
from arena.progress import console
from arena.training.shelf import Shelf

APART = {
    "train": ("track", "checkpoint_every", "keep_last", "keep_best", "resume", "max_seconds", "mirror"),
    # of files the content counts, which has fingerprints of its own
    "data": ("cache", "path", "synthetic_rows", "max_row_characters", "max_turns"),
    "model": ("base", "checkpointing"),
}


def identity(recipe: Recipe, data: str, base: str) -> dict[str, str]:
    """What makes two runs the same: recipe, data and base, each by its fingerprint."""
    return {"recipe": of_recipe(recipe), "data": data, "base": base}


def of_recipe(recipe: Recipe) -> str:
    """Fingerprint of what of a recipe decides the numbers: not where things lie, nor how a run is watched and kept."""
    tree = recipe.model_dump(mode="json")
    for group, names in APART.items():
        for name in names:
            del tree[group][name]
    return fingerprint(tree)


def finished(folder: Path, run: dict[str, str]) -> dict[str, Any] | None:
    """The metrics of `run` if it stands in the folder and came to its end."""
    metrics = folder / "metrics.json"
    if _owner(folder) != run or not metrics.is_file():
        return None
    return dict(json.loads(metrics.read_text(encoding="utf-8")))


def claim(folder: Path, run: dict[str, str], recipe: Recipe, *, fresh: bool) -> None:
    """Makes the folder this run's own. An interrupted run of the same identity stays; a finished one is set aside.

    Args:
        fresh: set aside whatever stands there.

    Raises:
        ValueError: the folder holds an unfinished run of another identity, with checkpoints.
    """
    owner = _owner(folder)
    if owner == run and not fresh:
        return
    unfinished = owner is not None and not (folder / "metrics.json").is_file() and Shelf(folder / "checkpoints").steps()
    if unfinished and not fresh:
        raise ValueError(
            f"{folder} holds an unfinished run of another recipe, other data or another base: run that one to its end, "
            "or set it aside and train this one with --fresh (ARGS=--fresh)"
        )
    if folder.exists() and not _never_began(folder):
        _set_aside(folder)
    write_text(folder / "recipe.yaml", save_recipe(recipe))
    write_json(folder / "run.json", run)


def _never_began(folder: Path) -> bool:
    """Whether a folder holds only what a run that failed before its first step leaves."""
    names = {path.name for path in folder.iterdir()}
    empty = not (folder / "log.jsonl").is_file() or (folder / "log.jsonl").stat().st_size == 0
    return names <= {"recipe.yaml", "run.json", "log.jsonl"} and empty


def _owner(folder: Path) -> dict[str, str] | None:
    card = folder / "run.json"
    return dict(json.loads(card.read_text(encoding="utf-8"))) if card.is_file() else None


def _set_aside(folder: Path) -> None:
    """Moves a folder to `earlier/` beside it: nothing that was trained is deleted."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S-%f")
    target = folder.parent / "earlier" / f"{folder.name}-{stamp}"
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    console.print(f"the run that stood in {folder} is now in {target}")
