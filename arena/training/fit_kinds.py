"""Learns what the training rows say of kinds of special rows, and takes what helps on the held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from arena.data.prepare import FoldData
from arena.inference.kinds import Kind, with_kinds
from arena.metrics import log_loss
from arena.training.fit_blend import LEAST, standard_error


@dataclass(frozen=True)
class FittedKind:
    """A kind, and what it changes on the held-out rows that some order shows as of it.

    Attributes:
        held_out_rows: how many they are.
        gain: by how much the kind lowers their log-loss; None without such rows.
        standard_error: of the gain.
        taken: whether the judge uses the kind.
    """

    kind: Kind
    held_out_rows: int
    gain: float | None
    standard_error: float | None
    taken: bool


def fit_kinds(data: FoldData, probabilities: np.ndarray) -> list[FittedKind]:
    """The kinds that training rows are of.

    A kind is taken if its rows have no input, so that all are predicted alike, or if its gain is more than the gain's
    standard error. Kinds that exchanged rows turn into one another are measured, and taken, together.

    Args:
        probabilities: the judge's own, of the held-out rows.
    """
    task, rows = data.task, np.concatenate([data.train_rows, data.omitted])
    orders = {
        name: [task.reorder_kind(number, order) for order in range(task.orders)]
        for number, name in enumerate(task.kinds)
    }
    kinds = [kind for name, numbers in orders.items() if (kind := _kind(name, data, rows, numbers)) is not None]
    if not kinds:
        return []
    labels, groups = data.labels[data.eval_rows], np.unique(data.held_out.groups(), return_inverse=True)[1]
    changed = with_kinds(kinds, data.held_out, probabilities)
    gains = log_loss.terms(labels, probabilities) - log_loss.terms(labels, changed)
    found = []
    for kind in kinds:
        chosen = np.isin(data.kinds, orders[kind.name])
        held_out = chosen[data.eval_rows]
        count, own = int(held_out.sum()), groups[held_out]
        gain = float(gains[held_out].mean()) if count else None
        error = standard_error(gains[held_out], own) if count else None
        helps = gain is not None and error is not None and gain > error and len(set(own)) >= LEAST
        found.append(FittedKind(kind, count, gain, error, taken=helps or not data.has_input[chosen].any()))
    return found


def taken(found: Sequence[FittedKind]) -> tuple[Kind, ...]:
    """The kinds that the judge uses."""
    return tuple(each.kind for each in found if each.taken)


def kind_table(found: Sequence[FittedKind]) -> dict[str, dict[str, Any]]:
    """The kinds for `metrics.json`, by name."""
    table = {}
    for each in found:
        facts = {name: value for name, value in asdict(each).items() if name != "kind"}
        table[each.kind.name] = {"train_rows": each.kind.rows, "mean": list(each.kind.mean), **facts}
    return table


def _kind(name: str, data: FoldData, rows: np.ndarray, orders: Sequence[int]) -> Kind | None:
    """A kind from these rows; None if there are none.

    Args:
        orders: the kind of its rows in each order.
    """
    kinds, labels = data.kinds[rows], data.labels[rows]
    shown = [data.task.reorder(labels[kinds == kind], order) for order, kind in enumerate(orders)]
    count = int(np.isin(kinds, orders).sum())  # rows that all orders show as of the kind count once
    return Kind(name, count, tuple(np.concatenate(shown).mean(axis=0).tolist())) if count else None
