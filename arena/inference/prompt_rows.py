"""Reads the rows of a file that are to be answered, and what their answers are compared with."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from arena.data.cells import FieldError, read_answers, read_id, read_text
from arena.data.conversion import BadRowsError
from arena.data.extra import read_extra
from arena.data.limits import Limits
from arena.data.prepare import held_out_file, split_identity, split_rows
from arena.data.rows import read_rows
from arena.data.task import Task
from arena.inference.generate import Generator
from arena.inference.prompts import PROMPT
from arena.inference.sampling import Sampling
from arena.inference.saved import read_judge
from arena.settings import DataSettings
from arena.storage.files import file_digest, fingerprint
from arena.tasks import task_of

# the columns of reference answers by score; of several the first one counts
REFERENCES = {"squad": ("answers",), "rouge": ("response", "messages", "answers")}


@dataclass(frozen=True)
class Wanted:
    """Which rows of a file are answered, and how their answers are scored.

    Attributes:
        score: a key of `REFERENCES`; None: they are not scored.
        held_out: only the rows that the model's fold held out.
        limit: only so many of the first rows.
    """

    score: str | None = None
    held_out: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit is {self.limit}: give the number of rows to answer, such as 200")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are added to the file's own."""
        return ("answer", "finish", *(["no_answer"] if self.score == "squad" else []))


@dataclass(frozen=True)
class Prompts:
    """The rows to answer.

    Attributes:
        rows: their numbers in the file, from 0.
        ids: the token ids of their prompts.
        references: the right answers of each, none if there is no answer to a question; None: the row does not say.
        groups: rows with the same context are one group.
    """

    rows: list[int] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    references: list[list[str] | None] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)


def read_prompts(source: Path, generator: Generator, sampling: Sampling, wanted: Wanted) -> Prompts:
    """The rows of a file that are to be answered.

    Raises:
        BadRowsError: rows or the file cannot be used.
        ValueError: no row has a reference to compare with, or the model holds out no rows of this file.
    """
    held_out = _held_out_ids(generator.folder, source, generator.recipe.data) if wanted.held_out else None
    limits = generator.encoder.limits
    columns, task = REFERENCES.get(wanted.score or "", ()), task_of(generator.recipe)
    room, found, bad = _room(generator, sampling, wanted), Prompts(), BadRowsError()

    def choose(names: list[str]) -> list[str]:
        _check_free(names, wanted)
        own = generator.encoder.columns(_asked(names, wanted))
        if source.suffix.lower() != ".parquet":
            return names
        needed = {*own, *columns, *(["context"] if columns else []), *(["id"] if wanted.held_out else [])}
        return [name for name in names if name in needed]  # other columns are passed on unread

    for number, (where, cells) in enumerate(read_rows(source, choose, limits)):
        if len(found.rows) == wanted.limit:
            break
        try:
            if isinstance(cells, FieldError):
                raise cells
            if held_out is not None and _id(cells, number) not in held_out:
                continue
            _check_free(cells, wanted)
            ids = generator.encode({name: cells[name] for name in _asked(cells, wanted)}, room)
            references = _references(cells, columns, task, limits) if columns else None
        except FieldError as problem:
            bad.add(source, where, problem)
            continue
        context = cells.get("context")
        found.rows.append(number)
        found.ids.append(ids)
        found.references.append(references)
        found.groups.append(task.group(context if isinstance(context, str) else None) or f"row {number}")
    if bad.count:
        raise bad
    if columns and all(each is None for each in found.references):
        raise ValueError(
            f"{source}: no row has a reference answer in a column {' or '.join(columns)}, with which --score "
            f"{wanted.score} compares: name a file that has them, or leave --score out"
        )
    return found


def _room(generator: Generator, sampling: Sampling, wanted: Wanted) -> Sampling:
    """With the tokens that may follow a prompt: an answer, or the phrase whose probability is computed."""
    if wanted.score != "squad":
        return sampling
    phrase = generator.encoder.answer(generator.recipe.prompt.template.unanswerable)
    return replace(sampling, max_new_tokens=max(sampling.max_new_tokens, len(phrase) - 1))


def _check_free(names: Iterable[str], wanted: Wanted) -> None:
    for name in wanted.columns:
        if name in names:
            raise FieldError(name, "is a column of the file, but answers are written there; rename it")


def _asked(names: Iterable[str], wanted: Wanted) -> list[str]:
    """The columns that a prompt may be made of; a held-out row's are those of training, which knows no `prompt`."""
    return [name for name in names if not (wanted.held_out and name == PROMPT)]


def _id(cells: Mapping[str, Any], number: int) -> str:
    """The id of a row as in training."""
    return read_id(cells["id"]) if "id" in cells else str(number + 1)


def _references(cells: Mapping[str, Any], columns: tuple[str, ...], task: Task, limits: Limits) -> list[str] | None:
    column = next((name for name in columns if name in cells), None)
    if column == "answers":
        answers = read_answers(cells)
    elif column == "messages":
        answers = task.read_texts({"messages": cells["messages"]}, limits)["response"][-1:]
    else:
        answers = [cells.get("response")]
    name = column or "response"
    texts = [text for each in answers or [] if (text := read_text({name: each}, name)) is not None]
    return texts if texts or answers == [] else None


def _held_out_ids(folder: Path | None, source: Path, settings: DataSettings) -> set[str]:
    """The ids of the rows of a file that a fold held out.

    Args:
        folder: the fold's `model` folder.
        settings: where its data are now.

    Raises:
        ValueError: it is not in a fold, which holds out other rows or had other data.
    """
    predictions = None if folder is None else folder.parent / "oof.csv"
    if folder is None or predictions is None or not predictions.is_file():
        raise ValueError(
            f"--held-out: {folder or 'a base'} is not in the folder of a fold, whose oof.csv names its held-out rows: "
            "name a run or a fold, or leave --held-out out"
        )
    saved = read_judge(folder, exported=True)
    task = saved.task
    try:
        own = held_out_file(settings)
        is_same = file_digest(own) == file_digest(source)
        parts = (
            [split_rows(settings, task, 0)[0], *(each.rows for each in read_extra(settings, task))] if is_same else []
        )
    except ValueError as error:
        raise ValueError(
            f"--held-out needs the data that {folder.parent} was trained on; name where they are now with "
            f"data.path=PLACE ({error})"
        ) from None
    if not is_same:
        raise ValueError(f"--held-out: {folder.parent} holds out rows of {own}, not of {source}: name that file")
    if fingerprint(split_identity(parts, settings)) != saved.trained_on:
        raise ValueError(f"--held-out: {own} is no longer what {folder.parent} was trained on: restore its data")
    with predictions.open(encoding="utf-8", newline="") as handle:
        return {row["id"] for row in csv.DictReader(handle)}
