"""Two members on the same labelled rows: what differs in their settings and in their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arena.config import load_recipe
from arena.data.task import Masks
from arena.inference.blend import Member
from arena.inference.find import find_models
from arena.metrics import Score, Terms, differences, estimate
from arena.training.members import read_members
from arena.training.run_directory import changed_settings


@dataclass(frozen=True)
class Comparison:
    """Two members, and the metrics of the first minus those of the second.

    Attributes:
        settings: what differs between two runs, in words.
        scores: by metric, of the first and of the second.
        slices: by property and value, the difference of log-loss on the rows that have it.
    """

    names: tuple[str, str]
    rows: int
    settings: list[str]
    scores: dict[str, tuple[Score, Score]]
    differences: dict[str, Score]
    slices: dict[tuple[str, str], Score]


def compare(words: Sequence[str], labels: str | None, runs: Path) -> Comparison:
    """Compares two members on the labelled rows that both predict.

    Args:
        words, labels, runs: as in `read_members`.

    Raises:
        ValueError: there are not two members, or they cannot be read.
    """
    if len(words) != 2:
        raise ValueError("name two members to compare: runs, files of predictions, or baseline")
    known = read_members(words, labels, runs)
    names, groups = [member.name for member in known.members], known.groups.astype(str).tolist()
    ones, metrics = np.ones(len(known.labels)), known.task.metrics
    one, other = (
        {name: (metric.terms(known.labels, each), ones) for name, metric in metrics.items()}
        for each in known.predictions
    )
    masks: Mapping[str, Masks] = {} if known.rows is None else known.task.slices(known.rows.table)
    of_one, of_other = (_sliced(terms["log_loss"], masks) for terms in (one, other))
    first, second = estimate(one, groups), estimate(other, groups)
    return Comparison(
        names=(names[0], names[1]),
        rows=len(known.labels),
        settings=_settings(known.members),
        scores={name: (first[name], second[name]) for name in first},
        differences=differences(one, other, groups),
        slices=differences(of_one, of_other, groups),
    )


def _sliced(terms: Terms, slices: Mapping[str, Masks]) -> dict[tuple[str, str], Terms]:
    values, weights = terms
    return {
        (kind, value): (values * mask, weights * mask)
        for kind, masks in slices.items()
        for value, mask in masks.items()
    }


def _settings(members: Sequence[Member]) -> list[str]:
    """How the settings of two runs differ; nothing if one is no run."""
    if any(member.kind != "run" for member in members):
        return []
    one, other = (find_models(member.path, Path())[0].parent / "recipe.yaml" for member in members)
    return changed_settings(one, load_recipe(str(other)))
