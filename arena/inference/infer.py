"""From a test file to a checked file of predictions, averaged over judges."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from arena.data.dataset import Rows
from arena.data.prepare import data_file, read_files
from arena.inference.card import JudgeCard, check_alike, read_card
from arena.inference.judge import Judge
from arena.inference.submission import check_target, write_submission
from arena.progress import console
from arena.stopping import Stopped
from arena.storage.lock import locked


def infer(models: Sequence[Path], data: str | None, out: Path, overrides: Sequence[str] = ()) -> None:
    """Writes the judges' mean probabilities of a test file's rows to `out`.

    Args:
        models: the judges' folders.
        data: a folder with a test file, or the file; None: the folder that the first judge was trained on.
        out: the submission to write. Until it is complete, logits are cached in `OUT.parts`, from which the same call
            resumes.
        overrides: settings to change, as in `Judge`.

    Raises:
        ValueError: the judges were trained on different data, the test file cannot be used, or another process is
            writing `out`.
        Stopped: a signal ended it; the logits computed so far are saved.
    """
    cards = [read_card(model, overrides) for model in models]
    check_alike(cards)
    parts = out.with_name(f"{out.name}.parts")
    try:
        with locked(out):
            _infer(cards, data, out, parts)
    except (Stopped, SystemExit):
        if parts.is_dir():
            console.print(f"the results so far are saved in {parts}: the same command resumes from them")
        raise


def _infer(cards: list[JudgeCard], data: str | None, out: Path, parts: Path) -> None:
    task, trained = cards[0].task, cards[0].recipe.data
    if data is None and Path(trained.path).is_file():
        raise ValueError(f"the judge was trained on the file {trained.path}: name the test file with DATA= or --data")
    test = data_file(data or trained.path, "test")
    rows = read_files([test], task, trained, "ignored")
    sample = test.parent / "sample_submission.csv"
    known = sample if os.path.lexists(sample) else None
    columns = ["id", *task.columns]
    check_target(out, rows.ids, columns, known)
    write_submission(out, rows.ids, average(cards, rows, parts), columns, known)
    shutil.rmtree(parts, ignore_errors=True)  # if that fails, they only take disk space
    console.print(
        f"written: {out}, {len(rows):,} rows from {len(cards)} fold{'s' if len(cards) > 1 else ''}; "
        f"{int((~rows.has_input).sum()):,} rows have no {task.missing} and got the training prior"
    )
    if known is None:
        console.print(f"there is no {sample}, so columns and ids were checked against the test file only")


def average(cards: Sequence[JudgeCard], rows: Rows, parts: Path | None = None) -> np.ndarray:
    """The mean probabilities of judges, float64 (len(rows), C), in the order of the rows; see `Judge`.

    A base that several judges in a row share is loaded once.

    Args:
        parts: a folder that caches the logits of each judge, from which the same call resumes.
    """
    total = np.zeros((len(rows), len(rows.task.classes)))
    judge: Judge | None = None
    for card in cards:
        if judge is None or not judge.switch(card):
            judge = None  # two large models may not fit at once
            _free_memory()
            judge = Judge(card)
        console.print(f"{card.folder} ({judge.recipe.model.base}): judging {len(rows):,} rows")
        total += judge.probabilities(rows, parts=parts / card.folder.resolve().parent.name if parts else None)
    return total / len(cards)


def _free_memory() -> None:
    gc.collect()  # a model's layers and their forwards form reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
