"""Several folds as one judge: each fold's probabilities, averaged."""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from arena.judging.judge import Judge, read_card
from arena.progress import console


def fold_models(run: Path) -> list[Path]:
    """The models of the finished folds of a run, in the order of the folds.

    Raises:
        ValueError: there is none, or they were trained on different data.
    """
    folds = [path.parent for path in run.glob("fold*/metrics.json") if re.fullmatch(r"fold\d+", path.parent.name)]
    models = [fold / "model" for fold in sorted(folds, key=lambda fold: int(fold.name.removeprefix("fold")))]
    if not models:
        raise ValueError(
            f"there is no finished fold under {run}: run `make train FOLD=0 RECIPE={run.name}` first, or "
            "name the run's recipe or folder"
        )
    cards = [read_card(model) for model in models]
    odd = [model for model, card in zip(models, cards, strict=True) if card["trained_on"] != cards[0]["trained_on"]]
    if odd:
        raise ValueError(
            f"{models[0].parent} and {odd[0].parent} were trained on different data or splits: "
            "train them alike, or move one away"
        )
    if any({**card["recipe"], "data": None} != {**cards[0]["recipe"], "data": None} for card in cards):
        console.print(f"the folds of {run} were not all trained with the same settings; they are averaged all the same")
    return models


def average(
    models: list[Path], rows: Dataset, cache: Path, overrides: Sequence[str] = (), parts: Path | None = None
) -> np.ndarray:
    """Mean probabilities over the models, float64 (len(rows), 3), in the order of the rows; see `Judge`.

    Args:
        parts: a folder in which the logits of each model are kept as they come, and from which the same call goes on.
    """
    total = np.zeros((len(rows), 3))
    for model in models:
        judge = Judge(model, overrides)
        console.print(f"{model.parent.name} ({judge.recipe.model.base}): judging {len(rows):,} rows")
        total += judge.probabilities(rows, cache, parts / model.parent.name if parts else None)
        del judge  # two large models at once may not fit
        gc.collect()  # a model's layers and their forwards refer to one another
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return total / len(models)
