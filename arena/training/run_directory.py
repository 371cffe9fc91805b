"""A run's folder: which run it holds, whether that run is finished, and how another run takes its place."""

from __future__ import annotations

import datetime
import json
import platform
import time
from pathlib import Path
from typing import Any

from arena.config import save_recipe
from arena.progress import console, escape_unprintable
from arena.prompt_settings import read_yaml_file
from arena.settings import ColumnSettings, Recipe
from arena.storage.files import fingerprint, write_json, write_text
from arena.training.checkpoint_manager import CheckpointManager

RUN_FILES = ("log.jsonl", "recipe.yaml", "run.json")  # are mirrored with each checkpoint
# settings that do not change a run's numbers and so do not belong to its identity
OUTSIDE_IDENTITY = {
    "train": (
        "track",
        "tracking",
        "log_level",
        "checkpoint_every",
        "save_optimizer",
        "shard",
        "keep_last",
        "keep_best",
        "resume",
        "max_seconds",
        "mirror",
    ),
    # the content of files counts, and has its own fingerprints
    "data": ("cache", "path", "synthetic_rows", "max_row_characters", "max_turns"),
    "model": ("base", "checkpointing"),
    "judge": ("kinds",),  # changes what a finished judge predicts, not what it is or its figures
}
# settings that did not always exist: with these values, runs from before them keep their identity
LATER: dict[str, Any] = {
    "task": "preference", "classes": [], "data.columns": ColumnSettings().model_dump(), "data.validation": None,
    "data.teacher": None, "data.columns.names": {},
    "model.lora.first_layer": 0, "model.lora.layers": None, "packing.group": False,
    "prompt.template.text": "", "prompt.template.pair": "", "prompt.template.classes": "",
    "prompt.template.context": "", "prompt.template.response": "", "prompt.template.unanswerable": "unanswerable",
    "train.max_steps": None, "train.best_metric": "log_loss", "train.deterministic": False,
}  # fmt: skip

ALTERNATIVES = (
    'To keep both, give this run another name: name=mine (with make, ARGS="name=mine"). To set the unfinished run '
    'aside and start again: --fresh (with make, ARGS="--fresh")'
)


def run_identity(recipe: Recipe, data: str, base: str) -> dict[str, str]:
    """What identifies a run: the fingerprints of recipe, data and base."""
    return {"recipe": recipe_fingerprint(recipe), "data": data, "base": base}


def recipe_fingerprint(recipe: Recipe) -> str:
    """Fingerprint of the settings that determine a run's numbers."""
    return fingerprint(_identity_settings(recipe.model_dump(mode="json")))


def differences(folder: Path, saved: dict[str, str], current: dict[str, str], recipe: Recipe) -> list[str]:
    """How the run in a folder differs from this one, in words.

    Args:
        saved, current: fingerprints of recipe, data, and base or steps, from `run_identity` or a checkpoint.
        recipe: this run's recipe.
    """
    changed = {name for name in current if saved.get(name) != current[name]}
    reasons = changed_settings(folder / "recipe.yaml", recipe) if "recipe" in changed else []
    keys = {each.partition(" ")[0] for each in reasons}
    if "recipe" in changed and not reasons:
        reasons.append("its settings (its recipe.yaml was changed or is missing, or another version of arena wrote it)")
    explained = any(key.startswith(("prompt.", "data.")) for key in keys)  # they change the data's fingerprint too
    if "data" in changed and not explained:
        reasons.append(f"its rows are not those that data.path={recipe.data.path} now has")
    if "base" in changed:
        reasons.append(f"its base model is not the one that model.base={recipe.model.base} now holds")
    if changed == {"steps"}:
        reasons.append("its steps have other examples: another version of arena planned them")
    return reasons


def require_same_run(checkpoint: Path, saved: dict[str, str], current: dict[str, str], recipe: Recipe) -> None:
    """Raises `ValueError` if a checkpoint belongs to another run; the arguments are those of `differences`."""
    if saved == current:
        return
    differs = "; ".join(differences(checkpoint.parents[1], saved, current, recipe))
    named = recipe.train.resume not in ("auto", "best", "never")
    raise ValueError(
        f"{checkpoint} cannot be resumed, because its run differs from this one: {differs}. Repeat its settings to "
        f"resume it. {'To train without that checkpoint, leave train.resume out' if named else ALTERNATIVES}"
    )


def changed_settings(saved: Path, recipe: Recipe) -> list[str]:
    """`key is X there, Y here` for each setting of a run's identity that differs from a saved recipe's."""
    try:
        there = _flat(_identity_settings(read_yaml_file(saved)))
    except (ValueError, OSError):
        return []
    here = _flat(_identity_settings(recipe.model_dump(mode="json")))
    keys = [*here, *(key for key in there if key not in here)]
    shown = {key: [_shown(tree[key]) if key in tree else "not set" for tree in (there, here)] for key in keys}
    return [f"{key} is {old} there, {new} here" for key, (old, new) in shown.items() if old != new]


def _identity_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings without those outside a run's identity, such as paths and how often to save."""
    return {
        group: {name: value for name, value in below.items() if name not in OUTSIDE_IDENTITY.get(group, ())}
        if isinstance(below, dict)
        else below
        for group, below in _without_later(tree).items()
    }


def _without_later(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """A tree of settings without those of `LATER` that have the value of earlier runs."""
    return {
        name: _without_later(value, f"{above}{name}.") if isinstance(value, dict) else value
        for name, value in tree.items()
        if (f"{above}{name}", value) not in LATER.items()
    }


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """A tree of settings as a dictionary by dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value.strip() else json.dumps(value, ensure_ascii=False)
    return escape_unprintable(text if len(text) <= 60 else f"{text[:60]}...")


def finished_metrics(folder: Path, run: dict[str, str]) -> dict[str, Any] | None:
    """The metrics of `run` if the folder holds it and it is finished."""
    metrics = folder / "metrics.json"
    if _identity_of(folder) != run or not metrics.is_file():
        return None
    return dict(json.loads(metrics.read_text(encoding="utf-8")))


def create_run_directory(folder: Path, run: dict[str, str], recipe: Recipe, *, fresh: bool) -> None:
    """Creates the folder of a run. An interrupted run of the same identity is left there; any other is set aside.

    Args:
        fresh: set aside whatever run the folder holds.

    Raises:
        ValueError: the folder holds an unfinished run of another identity that has checkpoints.
    """
    existing = _identity_of(folder)
    if existing == run and not fresh:
        return
    is_unfinished = not (folder / "metrics.json").is_file() and CheckpointManager(folder / "checkpoints").steps()
    if existing is not None and is_unfinished and not fresh:
        differs = "; ".join(differences(folder, existing, run, recipe))
        raise ValueError(
            f"{folder} holds an unfinished run that differs from this one: {differs}. Repeat its settings to finish "
            f"it. {ALTERNATIVES}"
        )
    if folder.exists() and not _never_began(folder):
        _archive(folder)
    write_text(folder / "recipe.yaml", save_recipe(recipe))
    write_json(folder / "run.json", run)


def _never_began(folder: Path) -> bool:
    """Whether a folder holds only the files that a run writes before its first step."""
    names = {path.name for path in folder.iterdir()}
    empty = not (folder / "log.jsonl").is_file() or (folder / "log.jsonl").stat().st_size == 0
    return names <= {"recipe.yaml", "run.json", "log.jsonl"} and empty


def require_shared(folder: Path, run: dict[str, str], seconds: int = 60) -> None:
    """Raises `ValueError` unless a run's folder is seen here, as it may take a while on a disk of another machine."""
    for _ in range(seconds):
        if _identity_of(folder) == run:
            return
        time.sleep(1)
    raise ValueError(
        f"{folder} is not seen on {platform.node()}: the folder of runs must be on a disk that all machines of a run "
        "share; name it with --runs"
    )


def _identity_of(folder: Path) -> dict[str, str] | None:
    card = folder / "run.json"
    return dict(json.loads(card.read_text(encoding="utf-8"))) if card.is_file() else None


def _archive(folder: Path) -> None:
    """Moves a folder to `earlier/` beside it, so that nothing that was trained is deleted."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S-%f")
    target = folder.parent / "earlier" / f"{folder.name}-{stamp}"
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    console.print(f"the earlier run in {folder} was moved to {target}")
