"""Pairs whose better answer is known, made of the answers in labelled rows, to try a judge on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arena.data.rows import Cells

OFF_TOPIC, TWICE, SAME = "an answer to another prompt", "the same answer twice", "the same answer"
TIE = 2  # its number among the classes
PROBES = {  # what an answer is compared with, and the probabilities that a person would give
    OFF_TOPIC: (1.0, 0.0, 0.0),
    TWICE: (1.0, 0.0, 0.0),
    SAME: (0.0, 0.0, 1.0),
}


Probe = tuple[int, Cells]  # the number of a row, and what was made of it


def make_probes(rows: Mapping[str, list[Any]], labels: np.ndarray, groups: list[str]) -> dict[str, list[Probe]]:
    """By what it is compared with, the preferred answer of each row beside that; the preferred one is A.

    Rows whose most probable label is a tie are left out. Of several turns, the last one that has the answer is changed,
    and later ones are left out.

    Args:
        rows: the columns of checked rows.
        labels: float64 (n, 3).
        groups: of each row; an answer to another prompt is of another group.
    """
    probes: dict[str, list[Probe]] = {name: [] for name in PROBES}
    answers = [
        rows["response_a" if label[0] >= label[1] else "response_b"][at] for at, label in enumerate(labels.tolist())
    ]
    last = [max((turn for turn, text in enumerate(each) if text and text.strip()), default=-1) for each in answers]
    for at, (turns, end) in enumerate(zip(answers, last, strict=True)):
        if end < 0 or labels[at].argmax() == TIE:
            continue
        better = turns[: end + 1]
        worse = {TWICE: f"{better[end]}\n\n{better[end]}", SAME: better[end]}
        others = (each for each in _after(at, len(answers)) if groups[each] != groups[at] and last[each] >= 0)
        if (other := next(others, None)) is not None:
            worse[OFF_TOPIC] = answers[other][last[other]]
        for name, text in worse.items():
            prompt = rows["prompt"][at][: end + 1]
            probes[name].append((at, {"prompt": prompt, "response_a": better, "response_b": [*better[:end], text]}))
    return probes


def _after(at: int, n: int) -> list[int]:
    return [*range(at + 1, n), *range(at)]
