"""How far a judge can be trusted on other labelled rows: scores, position and length bias, and constructed pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from arena.data.dataset import Rows
from arena.inference.judge import Judge
from arena.metrics import Score, Terms, estimate, log_loss
from arena.progress import progress
from arena.reporting.tables import Sheet
from arena.tasks.probes import PROBES, make_probes
from arena.tasks.votes import points_of, style_differences
from arena.training.scores import score_terms

AT_ONCE = 1000  # rows judged at once
LENGTH_BIAS = 0.1  # by which the longer answer is expected to win more often than it does, that is worth a note
SCORES = {
    "log_loss": "log-loss", "prior_log_loss": "log-loss of the prior", "accuracy": "accuracy", "brier": "Brier score",
    "ece": "calibration error", "agreement": "agreement",
    "agreement_base_rate": "agreement, of the most frequent class",
    "agreement_without_ties": "agreement without ties",
    "agreement_without_ties_base_rate": "agreement without ties, of the more frequent class", "flip_rate": "flip rate",
    "longer": "the longer answer wins", "longer_label": "the longer answer wins, by label",
}  # fmt: skip


@dataclass(frozen=True)
class Trust:
    """A judge on one file.

    Attributes:
        scores: by metric, with intervals by prompt. `longer` is how often the judge expects the answer with more
            characters to win, where one has more, and `longer_label` how often it does; a tie is half a win.
        probes: by what the preferred answer was compared with, the share of points that the judge gives to it, or the
            probability of a tie between equal answers; empty for tasks that compare no answers.
    """

    name: str
    rows: int
    scores: dict[str, Score]
    probes: dict[str, Score]


def trust(judge: Judge, file: str | Path, probes: int) -> Trust:
    """Tries a judge on the labelled rows of a file.

    Args:
        probes: the number of rows, at most, of which pairs are made.

    Raises:
        ValueError: the file cannot be read, or has rows without labels.
    """
    rows = judge.read(file, labelled=True)
    groups, labels, name = rows.groups(), rows.labels, Path(file).name
    mean, by_order = _judged(judge, rows, name)
    prior = labels.mean(axis=0)
    terms = score_terms(judge.task, labels, mean, prior)
    terms["prior_log_loss"] = log_loss.terms(labels, np.tile(prior, (len(rows), 1))), np.ones(len(rows))
    if len(by_order) > 1:
        chosen = by_order.argmax(axis=2)
        terms["flip_rate"] = (chosen != chosen[0]).any(axis=0), rows.has_input
    found: dict[str, Score] = {}
    if judge.task.orders > 1:  # rows have two answers
        terms |= _length_terms(rows, mean, labels)
        found = _probed(judge, rows, groups, probes)
    return Trust(name, len(rows), estimate(terms, groups), found)


def _judged(judge: Judge, rows: Rows, title: str) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities, float64 (n, C), and those in each order, (orders, n, C)."""
    parts = []
    with progress(f"judging {title}", len(rows)) as advance:
        for first in range(0, len(rows), AT_ONCE):
            which = range(first, min(first + AT_ONCE, len(rows)))
            some = replace(rows, table=rows.table.select(which), fingerprint=f"{rows.fingerprint}-{first}")
            found = judge.verdicts(some)
            parts.append((found.mean, found.by_order))
            advance(len(which))
    means, by_order = zip(*parts, strict=True)
    return np.concatenate(means), np.concatenate(by_order, axis=1)


def _length_terms(rows: Rows, probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Terms]:
    """How often the longer answer wins, by the judge and by the labels."""
    longer = np.sign(style_differences(rows.table)[:, 0])
    weights = np.abs(longer)
    judged, labelled = (np.where(longer > 0, points, 1 - points) for points in map(points_of, (probabilities, labels)))
    return {"longer": (judged * weights, weights), "longer_label": (labelled * weights, weights)}


def _probed(judge: Judge, rows: Rows, groups: list[str], most: int) -> dict[str, Score]:
    """The scores of pairs made of the first rows."""
    some = min(most, len(rows))
    if not some:
        return {}
    first = rows.table.select(range(some))
    made = make_probes({name: first[name] for name in rows.task.texts}, rows.labels[:some], groups)
    scores: dict[str, Score] = {}
    with progress("judging constructed pairs", sum(map(len, made.values()))) as advance:
        for name, pairs in made.items():
            if not pairs:
                continue
            found = judge.predict_proba([pair for _, pair in pairs])
            points = found[:, 2] if PROBES[name][2] == 1 else points_of(found)
            scores |= estimate({name: (points, np.ones(len(points)))}, [groups[row] for row, _ in pairs])
            advance(len(pairs))
    return scores


def tables(trusted: Sequence[Trust]) -> Iterator[Sheet]:
    """The scores on each file, and those of constructed pairs, with 95% intervals."""
    names = [each.name for each in trusted]
    known = [key for key in SCORES if any(key in each.scores for each in trusted)]
    rows = [[SCORES[key], *(_cell(each.scores.get(key)) for each in trusted)] for key in known]
    yield (
        "a judge on labelled rows, with 95% intervals; prior and base rates are those of a file's own labels",
        ("score", *names), [["rows", *(f"{each.rows:,}" for each in trusted)], *rows],
    )  # fmt: skip
    if any(each.probes for each in trusted):
        yield (
            "preferred answers beside others: the points that they get, a tie being half a win; beside the same "
            "answer, the probability of a tie",
            ("beside", *names),
            [[name, *(_cell(each.probes.get(name)) for each in trusted)] for name in PROBES],
        )


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    interval = "" if score.low is None else f" ({score.low:.3f} to {score.high:.3f})"
    return f"{score.value:.3f}{interval}"


def notes(trusted: Sequence[Trust]) -> list[str]:
    """What the figures warn of, in words."""
    found = []
    for each in trusted:
        scores = each.scores
        if scores["log_loss"].value > scores["prior_log_loss"].value:
            found.append(f"{each.name}: the judge is worse than the mean label of these rows")
        if "longer" in scores and scores["longer"].value - scores["longer_label"].value > LENGTH_BIAS:
            found.append(f"{each.name}: the judge expects the longer answer to win more often than it does")
    return found
