"""Applies a fitted blend to a test file: judges its rows with the runs, and takes the files' predictions of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from arena.data.dataset import Rows
from arena.data.files import read_files
from arena.data.predictions import Table, read_predictions, rows_of
from arena.data.task import Baseline, Task
from arena.inference.blend import Member, SavedBlend
from arena.inference.find import find_models
from arena.inference.infer import average, predict_file
from arena.inference.kinds import names_of_kinds
from arena.inference.saved import SavedJudge, check_alike, read_judge
from arena.settings import DataSettings
from arena.tasks import TASKS

AS_FITTED = "judge.kinds=false"  # out-of-fold predictions are the judges' own


def infer_blend(
    saved: SavedBlend, data: str | None, out: Path, predictions: Sequence[str], overrides: Sequence[str] = ()
) -> None:
    """Writes a blend's probabilities of a test file's rows to `out`; `data`, `out` and errors are as in `infer`.

    Args:
        predictions: `name=FILE` for each member that is a file: its predictions of the test rows.
        overrides: settings of the judges to change.
    """
    used = [member for member, weight in zip(saved.members, saved.blend.weights, strict=True) if weight > 0]
    files = {member.name for member in used if member.kind == "file"}
    named = {name: Path(path) for name, _, path in (word.partition("=") for word in predictions)}
    if odd := files ^ named.keys():
        name = min(odd)
        what = "is not one of its files" if name in named else "has no predictions of the test rows"
        raise ValueError(
            f"{name} {what}: give --predictions name=FILE for each of {', '.join(sorted(files)) or 'none'}"
        )
    judges = judges_of(used, overrides)
    every = [judge for folds in judges.values() for judge in folds]
    if not every and data is None:
        raise ValueError("a blend without runs does not know where test rows are: name them with --data")
    task: Task = every[0].task if every else TASKS[saved.task]()
    settings = every[0].recipe.data if every else DataSettings(path=str(data))
    tables = {name: read_predictions(path, task.columns) for name, path in named.items()}

    def predict(rows: Rows, parts: Path) -> np.ndarray:
        found = np.full((len(saved.members), len(rows), len(task.columns)), 1 / len(task.columns))
        for at, member in enumerate(saved.members):
            if member.name in judges:
                found[at] = average(judges[member.name], rows, parts / member.name)
            elif member.name in tables:
                found[at] = _of_file(member, tables[member.name], rows)
            elif member in used:
                found[at] = baseline_of(member, task, settings)(rows.table)
        return saved.blend(found, names_of_kinds(task.kinds, rows.kinds))

    predict_file(task, settings, data, out, predict, f"a blend of {', '.join(member.name for member in used)}")


def _of_file(member: Member, table: Table, rows: Rows) -> np.ndarray:
    if missing := [each for each in rows.ids if each not in table]:
        raise ValueError(f"{member.name} has no prediction of {len(missing):,} test rows, such as {missing[0]!r}")
    return rows_of(table, rows.ids)


def judges_of(members: Sequence[Member], overrides: Sequence[str] = ()) -> dict[str, list[SavedJudge]]:
    """The judges of each run among the members of a blend, as they were when it was fitted."""
    judges = {
        member.name: [read_judge(model, [*overrides, AS_FITTED]) for model in find_models(member.path, Path())]
        for member in members
        if member.kind == "run"
    }
    for folds in judges.values():  # different runs may have been trained on different data
        check_alike(folds)
    return judges


def baseline_of(member: Member, task: Task, settings: DataSettings) -> Baseline:
    """The simple model, fitted on all labelled rows."""
    known = read_files([member.path], task, settings, "required")
    fitted = task.fit_baseline(known.table, known.labels, seed=0)
    assert fitted is not None, f"{task.name} has a baseline"
    return fitted
