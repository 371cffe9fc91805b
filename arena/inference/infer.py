"""From a test file to a checked submission, averaged over judges."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from arena.config import Recipe, change
from arena.data.conversations import read_conversations, rows_with_responses
from arena.data.limits import Limits
from arena.data.prepare import data_file
from arena.inference.ensemble import average, check_alike
from arena.inference.judge import read_card
from arena.inference.submission import check_target, write_submission
from arena.progress import console
from arena.stopping import Stopped
from arena.storage.lock import locked


def infer(models: list[Path], data: str | None, out: Path, overrides: Sequence[str] = ()) -> None:
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
    check_alike(models)
    parts = out.with_name(f"{out.name}.parts")
    try:
        with locked(out):
            _infer(models, data, out, overrides, parts)
    except (Stopped, SystemExit):
        if parts.is_dir():
            console.print(f"the results so far are saved in {parts}: the same command resumes from them")
        raise


def _infer(models: list[Path], data: str | None, out: Path, overrides: Sequence[str], parts: Path) -> None:
    trained = change(Recipe.model_validate(read_card(models[0])["recipe"]), overrides).data
    cache = Path(trained.cache)
    if data is None and Path(trained.path).is_file():
        raise ValueError(f"the judge was trained on the file {trained.path}: name the test file with DATA= or --data")
    test = data_file(data or trained.path, "test")
    limits = Limits(trained.max_row_characters, trained.max_turns)
    rows = read_conversations([test], cache, labels="ignored", limits=limits)
    sample = test.parent / "sample_submission.csv"
    known = sample if os.path.lexists(sample) else None
    check_target(out, rows["id"], known)
    write_submission(out, rows["id"], average(models, rows, cache, overrides, parts), known)
    shutil.rmtree(parts, ignore_errors=True)  # if that fails, they only take disk space
    console.print(
        f"written: {out}, {len(rows):,} rows from {len(models)} fold{'s' if len(models) > 1 else ''}; "
        f"{int((~rows_with_responses(rows)).sum()):,} rows have no response to judge and got the training prior"
    )
    if known is None:
        console.print(f"there is no {sample}, so columns and ids were checked against the test file only")
