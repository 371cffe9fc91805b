"""Averages the probabilities of several folds."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from arena.inference.judge import Judge, read_card
from arena.progress import console


def check_alike(models: list[Path]) -> None:
    """Checks that judges can be averaged.

    Raises:
        ValueError: one is damaged, or they were trained on different data.
    """
    cards = [read_card(model) for model in models]
    odd = [model for model, card in zip(models, cards, strict=True) if card["trained_on"] != cards[0]["trained_on"]]
    if odd:
        raise ValueError(
            f"{models[0].parent} and {odd[0].parent} were trained on different data or splits: train them on the same, "
            "or name only one of these folders"
        )
    if any({**card["recipe"], "data": None} != {**cards[0]["recipe"], "data": None} for card in cards):
        console.print(
            f"the folds of {models[0].parent.parent} were not all trained with the same settings; they are averaged "
            "nevertheless"
        )


def average(
    models: list[Path], rows: Dataset, cache: Path, overrides: Sequence[str] = (), parts: Path | None = None
) -> np.ndarray:
    """The mean probabilities of the models, float64 (len(rows), 3), in the order of the rows; see `Judge`.

    Args:
        parts: a folder that caches the logits of each model, from which the same call resumes.
    """
    total = np.zeros((len(rows), 3))
    for model in models:
        judge = Judge(model, overrides)
        console.print(f"{model} ({judge.recipe.model.base}): judging {len(rows):,} rows")
        total += judge.probabilities(rows, cache, parts / model.resolve().parent.name if parts else None)
        del judge  # two large models may not fit at once
        gc.collect()  # a model's layers and their forwards form reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return total / len(models)
