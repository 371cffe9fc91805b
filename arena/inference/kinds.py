"""What the training rows say of kinds of special rows, such as those with an empty answer, and predictions with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from arena.data.dataset import Rows
from arena.progress import console

# of training rows that a judge's own prediction counts like. With a simple model for a judge, one of four kinds of rows
# in people's votes lost with 3 or fewer, none with 5 or 10, and three of them gained less with 20 or more
PSEUDO_COUNT = 10


@dataclass(frozen=True)
class Kind:
    """The labels of the training rows of a kind, in whatever order shows a row as of it.

    Attributes:
        name: one of `Task.kinds`.
        rows: how many they are.
        mean: (C,), their mean label.
    """

    name: str
    rows: Annotated[int, Field(ge=1)]
    mean: tuple[float, ...]


def with_kinds(
    kinds: Sequence[Kind], rows: Rows, probabilities: np.ndarray, which: np.ndarray | None = None
) -> np.ndarray:
    """A judge's probabilities of rows, of which those of the kinds are drawn to the kind's mean label.

    That is the mean of the kind's training rows and of `PSEUDO_COUNT` rows that are labelled as the judge predicts:
    the more rows are known, the less the judge counts. Rows of no kind keep their probabilities.

    Args:
        which: the rows that the probabilities are of; None: all.
    """
    result, numbers = probabilities.copy(), rows.kinds if which is None else rows.kinds[which]
    for kind in kinds:
        found = numbers == rows.task.kinds.index(kind.name)
        known = kind.rows * np.array(kind.mean) + PSEUDO_COUNT * probabilities[found]
        result[found] = known / (kind.rows + PSEUDO_COUNT)
    return result


def names_of_kinds(names: Sequence[str], kinds: np.ndarray) -> np.ndarray:
    """str (n,): the names of rows' kinds, of which `names` has all, by number; "" for -1, which is none."""
    return np.asarray(np.array([*names, ""])[kinds])


def print_kinds(kinds: Sequence[Kind], rows: Rows) -> None:
    """Prints how many rows are of each kind, and what is known of it."""
    for kind in kinds:
        if count := int((rows.kinds == rows.task.kinds.index(kind.name)).sum()):
            mean = " ".join(f"{each:.2f}" for each in kind.mean)
            rows_of = f"{count:,} row{'s' if count > 1 else ''} of kind `{kind.name}`"
            console.print(f"{rows_of}: {mean} from {kind.rows:,} training row{'s' if kind.rows > 1 else ''}")
