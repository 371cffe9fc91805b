"""From predictions of labelled rows to a fitted blend and its honest score: `arena blend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from arena.data.cells import FieldError
from arena.data.dataset import Rows
from arena.data.folds import load_or_assign_folds
from arena.data.limits import Limits
from arena.data.prepare import data_file, read_files
from arena.data.rows import READERS, read_rows
from arena.data.task import Task
from arena.inference.blend import Member, SavedBlend, save_blend
from arena.inference.find import find_models
from arena.inference.predictions import Table, read_labels, read_predictions, rows_of
from arena.inference.saved import check_alike, read_judge
from arena.progress import console, progress
from arena.settings import DataSettings
from arena.tasks.preference import Preference
from arena.training.fit_blend import FOLDS, Part, cross_fitted, fit_blend
from arena.training.scores import Score, estimate

BASELINE = "baseline"


@dataclass(frozen=True)
class Fitted:
    """A fitted blend, and what was measured.

    Attributes:
        alone: by member, its own log-loss.
        first: the number of the member that the blend begins with, the best one.
        parts: by each part that was tried, the gain of log-loss and whether it was taken.
        scores: the metrics of blends that were fitted without the rows that are scored.
    """

    saved: SavedBlend
    rows: int
    groups: int
    alone: dict[str, Score]
    first: int
    parts: list[tuple[str, Score, bool]]
    scores: dict[str, Score]


@dataclass(frozen=True)
class _Labelled:
    """The labelled rows: their data settings, labels and groups by id, and, if the file has texts, the rows."""

    settings: DataSettings
    file: Path
    labels: Table
    groups: dict[str, str]
    rows: Rows | None


def blend_members(words: Sequence[str], labels: str | None, out: Path, runs: Path, seed: int = 0) -> Fitted:
    """Fits a blend of members and writes it to `out`.

    Args:
        words: runs by name or path, files of predictions, or `baseline`; each may be named, as in `mine=FILE`.
        labels: a file of labelled rows, with or without texts; None: those that the first run was trained on.
        seed: of the division of rows into folds.

    Raises:
        ValueError: a member or a file cannot be used, or they have too few rows in common.
    """
    members = [_member(word, runs) for word in words]
    if repeated := {member.name for member in members if [each.name for each in members].count(member.name) > 1}:
        raise ValueError(f"{min(repeated)} names two members: name them apart, as in mine={members[0].path}")
    task, settings = _task(members)
    known = _labelled(labels, task, settings)
    members = [replace(each, path=str(known.file.resolve())) if each.kind == "baseline" else each for each in members]
    tables = [_predictions(member, task, known, seed) for member in members]
    ids = [each for each in known.labels if all(each in table for table in tables)]
    groups = np.unique([known.groups[each] for each in ids], return_inverse=True)[1]
    if len(ids) == 0 or groups.max() + 1 < 2 * FOLDS:
        raise ValueError(
            f"{len(ids):,} rows have a label and all predictions, but a blend needs at least {2 * FOLDS} with "
            f"different {task.group_by}s: check that ids are those of {known.file}"
        )
    _say_what_is_omitted(members, tables, known.labels, len(ids))
    fitted = _fit(
        task, members, rows_of(known.labels, ids), np.stack([rows_of(each, ids) for each in tables]), groups, seed
    )
    save_blend(out, fitted.saved)
    return fitted


def _member(word: str, runs: Path) -> Member:
    name, _, path = word.rpartition("=")
    if path == BASELINE:
        return Member(name or BASELINE, "baseline", "")
    if Path(path).suffix.lower() in READERS:
        return Member(name or Path(path).stem, "file", str(Path(path).resolve()))
    place = find_models(path, runs)[0].resolve().parents[1]
    return Member(name or place.name, "run", str(place))


def _task(members: Sequence[Member]) -> tuple[Task, DataSettings | None]:
    """The task of the runs, and the data of the first one; without runs it is preference."""
    judges = [
        read_judge(model) for member in members if member.kind == "run" for model in find_models(member.path, Path())
    ]
    if not judges:
        return Preference(), None
    check_alike(judges)
    return judges[0].task, judges[0].recipe.data


def _labelled(path: str | None, task: Task, settings: DataSettings | None) -> _Labelled:
    if path is None and settings is None:
        raise ValueError("name the file of labelled rows with --labels: only runs know theirs")
    settings = settings or DataSettings(path=str(path))
    file = data_file(path or settings.path, "train", settings.cache)
    if not _has_texts(file, task):
        table = read_labels(file, task)
        return _Labelled(settings, file, table, {each: each for each in table}, None)
    rows = read_files([file], task, settings, "required")
    labels = dict(zip(rows.ids, rows.labels.tolist(), strict=True))
    return _Labelled(settings, file, labels, dict(zip(rows.ids, rows.groups(), strict=True)), rows)


def _has_texts(file: Path, task: Task) -> bool:
    """Whether a file has the columns of texts, and not labels alone."""
    names: list[str] = []

    def choose(found: list[str]) -> list[str]:
        names.extend(found)
        return []

    _, cells = next(read_rows(file, choose, Limits()), ("", {}))
    names += [] if isinstance(cells, FieldError) else cells  # of JSONL, whose rows keep all keys
    return set(task.texts) <= set(names)


def _predictions(member: Member, task: Task, known: _Labelled, seed: int) -> Table:
    """A member's predictions of rows that it was not trained on, as far as that is ours to know."""
    if member.kind == "file":
        return read_predictions(Path(member.path), task.columns)
    if member.kind == "run":
        folds = [model.parent for model in find_models(member.path, Path())]
        return {name: each for fold in folds for name, each in read_predictions(fold / "oof.csv", task.columns).items()}
    rows, settings = known.rows, known.settings
    if rows is None:
        raise ValueError("the baseline is fitted on texts, but the labelled rows have none: leave it out")
    fold_of = load_or_assign_folds(rows, settings.folds, settings.fold_seed, Path(settings.cache))
    table: Table = {}
    with progress("fitting the baseline", settings.folds, "folds") as advance:
        for fold in range(settings.folds):
            train, held_out = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
            predicted = task.baseline(rows.table, rows.labels, train, held_out, seed)
            assert predicted is not None, f"{task.name} has a baseline"
            table |= zip((rows.ids[row] for row in held_out), predicted.tolist(), strict=True)
            advance(1)
    return table


def _say_what_is_omitted(members: Sequence[Member], tables: Sequence[Table], labels: Table, used: int) -> None:
    for member, table in zip(members, tables, strict=True):
        without, unlabelled = len(labels.keys() - table.keys()), len(table.keys() - labels.keys())
        if without or unlabelled:
            console.print(
                f"{member.name}: {without:,} labelled rows have no prediction, {unlabelled:,} predictions have no label"
            )
    console.print(f"{used:,} rows have a label and the predictions of all members")


def _fit(
    task: Task, members: Sequence[Member], labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, seed: int
) -> Fitted:
    blend, first, tried = fit_blend(labels, predicted, groups, seed)
    with progress("scoring blends that were fitted without the rows", len(labels), "rows") as advance:
        held_out = cross_fitted(labels, predicted, groups, seed, advance)
    keys, ones, losses = [str(group) for group in groups], np.ones(len(labels)), task.metrics["log_loss"]
    alone = {at: (losses.terms(labels, each), ones) for at, each in enumerate(predicted)}
    gains = {("gain", at): (part.gains, ones) for at, part in enumerate(tried)}
    own = {name: (metric.terms(labels, held_out), ones) for name, metric in task.metrics.items()}
    found = estimate({**alone, **gains, **own}, keys)
    scores = {name: found[name] for name in task.metrics}
    saved = SavedBlend(
        task.name,
        tuple(members),
        blend,
        {"rows": len(labels), "seed": seed, **{key: asdict(score) for key, score in scores.items()}},
    )
    parts = [(_words(part, members), found["gain", at], part.taken) for at, part in enumerate(tried)]
    return Fitted(
        saved,
        len(labels),
        int(groups.max()) + 1,
        {m.name: found[at] for at, m in enumerate(members)},
        first,
        parts,
        scores,
    )


def _words(part: Part, members: Sequence[Member]) -> str:
    return part.added if isinstance(part.added, str) else members[part.added].name
