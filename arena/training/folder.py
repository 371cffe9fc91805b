"""A run's folder: whose it is, whether it is finished, and how another run takes its place."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from arena.config import Recipe, save_recipe
from arena.files import fingerprint, write_json, write_text
from arena.plain_yaml import read_yaml_file
from arena.progress import console, printable
from arena.training.shelf import Shelf

APART = {
    "train": ("track", "checkpoint_every", "keep_last", "keep_best", "resume", "max_seconds", "mirror"),
    # of files the content counts, which has fingerprints of its own
    "data": ("cache", "path", "synthetic_rows", "max_row_characters", "max_turns"),
    "model": ("base", "checkpointing"),
}


OTHERWISE = (
    'To keep both, give this run a name of its own: name=mine (with make, ARGS="name=mine"). To set the unfinished run '
    'aside and train anew: --fresh (with make, ARGS="--fresh")'
)


def identity(recipe: Recipe, data: str, base: str) -> dict[str, str]:
    """What makes two runs the same: recipe, data and base, each by its fingerprint."""
    return {"recipe": of_recipe(recipe), "data": data, "base": base}


def of_recipe(recipe: Recipe) -> str:
    """Fingerprint of what of a recipe decides the numbers: not where things lie, nor how a run is watched and kept."""
    return fingerprint(_deciding(recipe.model_dump(mode="json")))


def differences(folder: Path, theirs: dict[str, str], ours: dict[str, str], recipe: Recipe) -> list[str]:
    """In words, what makes the run that stands in a folder another one than ours.

    Args:
        theirs, ours: fingerprints of recipe, data, and base or plan: an `identity`, or what a checkpoint holds.
        recipe: ours.
    """
    changed = {name for name in ours if theirs.get(name) != ours[name]}
    found = changed_settings(folder / "recipe.yaml", recipe) if "recipe" in changed else []
    keys = {each.partition(" ")[0] for each in found}
    if "recipe" in changed and not found:
        found.append("its settings (its recipe.yaml was changed or is missing, or another version of arena wrote it)")
    decided = any(key.startswith(("prompt.", "data.")) for key in keys)  # which change the fingerprint of the data too
    if "data" in changed and not decided:
        found.append(f"its rows are not those of data.path={recipe.data.path} now")
    if "base" in changed:
        found.append(f"its base model is not model.base={recipe.model.base} as it is now")
    if changed == {"plan"}:
        found.append("it was packed for another number of processes, or by another version of arena")
    return found


def require_same_run(checkpoint: Path, theirs: dict[str, str], ours: dict[str, str], recipe: Recipe) -> None:
    """Raises `ValueError` where a checkpoint belongs to another run than ours; arguments as in `differences`."""
    if theirs == ours:
        return
    differs = "; ".join(differences(checkpoint.parents[1], theirs, ours, recipe))
    named = recipe.train.resume not in ("auto", "best", "never")
    raise ValueError(
        f"{checkpoint} cannot be resumed, because its run differs from this one: {differs}. Repeat its settings to "
        f"resume it. {'To train this run without it, leave train.resume out' if named else OTHERWISE}"
    )


def changed_settings(saved: Path, recipe: Recipe) -> list[str]:
    """`key is X there, Y here` for each setting that decides the numbers and differs from a saved recipe's."""
    try:
        there = _flat(_deciding(read_yaml_file(saved)))
    except (ValueError, OSError):
        return []
    here = _flat(_deciding(recipe.model_dump(mode="json")))
    keys = [*here, *(key for key in there if key not in here)]
    shown = {key: [_shown(tree[key]) if key in tree else "not set" for tree in (there, here)] for key in keys}
    return [f"{key} is {theirs} there, {ours} here" for key, (theirs, ours) in shown.items() if theirs != ours]


def _deciding(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what does not decide the numbers: where things lie, and how a run is watched and kept."""
    return {
        group: {name: value for name, value in below.items() if name not in APART.get(group, ())}
        if isinstance(below, dict)
        else below
        for group, below in tree.items()
    }


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """A tree of settings by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return found


def _shown(value: Any, width: int = 60) -> str:
    text = value if isinstance(value, str) and value.strip() else json.dumps(value, ensure_ascii=False)
    return printable(text if len(text) <= width else f"{text[:width]}...")


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
    is_unfinished = not (folder / "metrics.json").is_file() and Shelf(folder / "checkpoints").steps()
    if owner is not None and is_unfinished and not fresh:
        differs = "; ".join(differences(folder, owner, run, recipe))
        raise ValueError(
            f"{folder} holds an unfinished run that differs from this one: {differs}. Repeat its settings to finish "
            f"it. {OTHERWISE}"
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
