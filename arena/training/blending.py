"""A blend of members, fitted on labelled rows and written with its honest score: `arena blend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from arena.inference.blend import Member, SavedBlend, save_blend
from arena.metrics import Score, estimate
from arena.progress import progress
from arena.training.fit_blend import FOLDS, Kinds, Part, cross_fitted, fit_blend
from arena.training.members import Predicted, read_members


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


def blend_members(words: Sequence[str], labels: str | None, out: Path, runs: Path, seed: int = 0) -> Fitted:
    """Fits a blend of members and writes it to `out`.

    Args:
        words, labels, runs: as in `read_members`.
        seed: of the division of rows into folds.

    Raises:
        ValueError: a member or a file cannot be used, or they have too few rows in common.
    """
    known = read_members(words, labels, runs, seed)
    if known.groups.max() + 1 < 2 * FOLDS:
        raise ValueError(
            f"{len(known.labels):,} rows have a label and all predictions, but a blend needs at least {2 * FOLDS} with "
            f"different {known.task.group_by}s: label more rows"
        )
    fitted = _fit(known, seed)
    save_blend(out, fitted.saved)
    return fitted


def _fit(known: Predicted, seed: int) -> Fitted:
    labels, predictions, groups, metrics = known.labels, known.predictions, known.groups, known.task.metrics
    kinds = None if known.rows is None else Kinds.of(known.rows, groups)
    blend, first, tried = fit_blend(labels, predictions, groups, seed, kinds)
    with progress("scoring blends that were fitted without the rows", len(labels), "rows") as advance:
        held_out = cross_fitted(labels, predictions, groups, seed, kinds, advance)
    ones = np.ones(len(labels))
    alone = {("alone", at): (metrics["log_loss"].terms(labels, each), ones) for at, each in enumerate(predictions)}
    gains = {("gain", at): (part.gains, ones) for at, part in enumerate(tried)}
    own = {name: (metric.terms(labels, held_out), ones) for name, metric in metrics.items()}
    found = estimate({**alone, **gains, **own}, groups.astype(str).tolist())
    scores = {name: found[name] for name in metrics}
    said = {"rows": len(labels), "seed": seed, **{name: asdict(score) for name, score in scores.items()}}
    return Fitted(
        SavedBlend(known.task.name, known.members, blend, said),
        rows=len(labels),
        groups=int(groups.max()) + 1,
        alone={member.name: found["alone", at] for at, member in enumerate(known.members)},
        first=first,
        parts=[(_words(part, known.members), found["gain", at], part.taken) for at, part in enumerate(tried)],
        scores=scores,
    )


def _words(part: Part, members: Sequence[Member]) -> str:
    return " and ".join(each if isinstance(each, str) else members[each].name for each in part.added)
