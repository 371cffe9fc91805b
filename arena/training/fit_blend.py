"""Fits blends on labelled rows, with scores that no row's own label has touched.

A blend grows by one part at a time: a temperature, a bias for each class, a bias of special rows, a further member, or
another pool. The part that gains most, on rows that did not fit it, is taken if that is more than the gain's standard
error. Where none is, a member and a temperature are tried together: the weights of a logarithmic pool without one sum
to 1, so that a member can only take weight from the others. For the score of the result, all of this is repeated
without the rows that are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from arena.data.dataset import Rows
from arena.inference.blend import Blend, Pool, logarithms, pooled_logs
from arena.inference.kinds import names_of_kinds
from arena.metrics import log_loss

FOLDS = 5
RIDGE = 1e-9  # on the biases, so that one of a class without rows is finite
KIND_RIDGE = 0.5  # on those of special rows, which may be few: as if each were drawn from a standard normal
LEAST = 10  # groups of special rows: a standard error from fewer is often off by a third, and from one it is 0


@dataclass(frozen=True)
class Kinds:
    """The kinds of special rows, whose biases are exchanged with a row's answers.

    Attributes:
        of_rows: int (n,), the number of each row's kind; -1: none.
        names: of all kinds.
        tied: by what is fitted, such as `bias of A empty, B empty`, float64 (kinds, C, C): the matrices that make the
            bias of each kind from the same C parameters, as exchanged rows turn one into another; 0 for other kinds.
    """

    of_rows: np.ndarray
    names: tuple[str, ...] = ()
    tied: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def none(cls, rows: int) -> Kinds:
        """Those of so many rows of which no kind is known."""
        return cls(np.full(rows, -1))

    @classmethod
    def of(cls, rows: Rows, groups: np.ndarray) -> Kinds:
        """Those of rows; kinds of rows in few groups are not fitted."""
        task, tied = rows.task, dict[str, np.ndarray]()
        for kind in range(len(task.kinds)):
            orders = [task.reorder_kind(kind, order) for order in range(task.orders)]
            name = f"bias of {', '.join(task.kinds[number] for number in sorted(set(orders)))}"
            if name not in tied and len(set(groups[np.isin(rows.kinds, orders)])) >= LEAST:
                tied[name] = np.zeros((len(task.kinds), len(task.classes), len(task.classes)))
                for order, number in enumerate(orders):
                    tied[name][number] += task.reorder(np.eye(len(task.classes)), order).T / orders.count(number)
        return cls(rows.kinds, task.kinds, tied)

    def __getitem__(self, rows: np.ndarray) -> Kinds:
        return replace(self, of_rows=self.of_rows[rows])

    @property
    def shown(self) -> np.ndarray:
        """The name of each row's kind, str (n,); empty: none."""
        return names_of_kinds(self.names, self.of_rows)

    def biases(self, chosen: Sequence[str], free: np.ndarray) -> np.ndarray:
        """Those of each kind, float64 (kinds + 1, C), of parameters (len(chosen), C); of rows of no kind, the last."""
        result = np.zeros((len(self.names) + 1, free.shape[1]))
        for name, own in zip(chosen, free, strict=True):
            result[:-1] += self.tied[name] @ own
        return result


@dataclass(frozen=True)
class Parts:
    """What of a blend is fitted.

    Attributes:
        members: the numbers of the predictions that take part; the others get the weight 0.
        temperature: whether confidence is fitted; the weights of a logarithmic pool sum to 1 otherwise.
        bias: whether there is a bias for each class.
        kinds: those of special rows that have a further bias for each class.
    """

    members: tuple[int, ...]
    pool: Pool = "log"
    temperature: bool = False
    bias: bool = False
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A part that was tried.

    Attributes:
        added: `temperature`, `bias`, `linear pool`, a name in `Kinds.tied`, or the number of a member; several are
            tried together.
        gains: float64 (n,), by how much it lowers the log-loss of each row, which did not fit it.
        taken: whether the blend has it.
    """

    added: tuple[str | int, ...]
    gains: np.ndarray
    taken: bool


def fit_blend(
    labels: np.ndarray, members: np.ndarray, groups: np.ndarray, seed: int = 0, kinds: Kinds | None = None
) -> tuple[Blend, int, list[Part]]:
    """The blend whose parts all help; also the number of the best member, which it begins with, and the parts tried.

    Args:
        labels: (n, C), one-hot or probabilities.
        members: probabilities of the same rows, (k, n, C).
        groups: int64 (n,), the group of each row, from 0. Rows of a group are never fitted on for one another.
        seed: of the division into folds.
        kinds: of the rows; None: no bias of a kind is tried.
    """
    folds, kinds = divide(groups, seed), kinds or Kinds.none(len(labels))
    best = int(np.argmin([log_loss(labels, each) for each in members]))
    parts, tried = Parts((best,)), list[Part]()
    losses = _losses(labels, members[best])
    ahead = 1
    while candidates := list(_further(parts, len(members), ahead, kinds.tied)):
        found = [_losses(labels, cross_predicted(more, labels, members, folds, kinds)) for _, more in candidates]
        at = int(np.argmin([each.mean() for each in found]))
        if (gains := losses - found[at]).mean() > standard_error(gains, groups):
            tried = [each for each in tried if each.taken] + [Part(candidates[at][0], gains, True)]
            parts, losses, ahead = candidates[at][1], found[at], 1
        else:
            tried += [Part(added, losses - each, False) for (added, _), each in zip(candidates, found, strict=True)]
            ahead += 1
    return fit_parts(parts, labels, members, kinds), best, tried


def cross_fitted(
    labels: np.ndarray,
    members: np.ndarray,
    groups: np.ndarray,
    seed: int = 0,
    kinds: Kinds | None = None,
    advance: Callable[[int], None] | None = None,
) -> np.ndarray:
    """What blends that are chosen and fitted without a row's group predict for it, float64 (n, C).

    Args:
        labels, members, groups, seed, kinds: as in `fit_blend`.
        advance: is called with the number of rows that are done.
    """
    result, kinds = np.zeros(members.shape[1:]), kinds or Kinds.none(len(labels))
    for others in _each(divide(groups, seed)):
        fitted = ~others
        renumbered = np.unique(groups[fitted], return_inverse=True)[1]
        blend, _, _ = fit_blend(labels[fitted], members[:, fitted], renumbered, seed + 1, kinds[fitted])
        result[others] = blend(members[:, others], kinds[others].shown)
        if advance is not None:
            advance(int(others.sum()))
    return result


def cross_predicted(
    parts: Parts, labels: np.ndarray, members: np.ndarray, folds: np.ndarray, kinds: Kinds | None = None
) -> np.ndarray:
    """What a blend of these parts, fitted on the other folds, predicts for each row: float64 (n, C)."""
    result, kinds = np.zeros(members.shape[1:]), kinds or Kinds.none(len(labels))
    for others in _each(folds):
        blend = fit_parts(parts, labels[~others], members[:, ~others], kinds[~others])
        result[others] = blend(members[:, others], kinds[others].shown)
    return result


def divide(groups: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each row, from 0: groups are dealt out at random."""
    dealt = np.random.default_rng(seed).permutation(groups.max() + 1) % FOLDS
    return np.asarray(dealt[groups])


def standard_error(values: np.ndarray, groups: np.ndarray) -> float:
    """The standard error of the mean of rows that are alike within groups."""
    excess = np.bincount(groups, values - values.mean())
    return float(np.sqrt(excess @ excess) / len(values))


def fit_parts(parts: Parts, labels: np.ndarray, members: np.ndarray, kinds: Kinds | None = None) -> Blend:
    """The blend of these parts that has the least log-loss on these rows; the arguments are as in `fit_blend`."""
    known = kinds or Kinds.none(len(labels))
    chosen, classes, rows = list(parts.members), labels.shape[1], len(labels)
    logs, k = logarithms(members[chosen]), len(chosen)
    own = k + 1 + classes  # where the biases of kinds begin

    def read(free: np.ndarray) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
        scale = float(np.exp(free[k])) if parts.temperature else 1.0
        bias = free[k + 1 : own] - free[k + 1 : own].mean() if parts.bias else np.zeros(classes)
        return softmax(free[:k]), scale, bias, known.biases(parts.kinds, free[own:].reshape(-1, classes))

    def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        weights, scale, bias, of_kinds = read(free)
        pooled = pooled_logs(parts.pool, weights, logs)
        blended = log_softmax(scale * pooled + bias + of_kinds[known.of_rows], axis=1)
        wrong = (np.exp(blended) - labels) / rows
        by_weight = scale * np.tensordot(logs if parts.pool == "log" else np.exp(logs - pooled), wrong, axes=2)
        gradient = np.zeros_like(free)
        gradient[:k] = weights * (by_weight - weights @ by_weight)
        gradient[k] = scale * (wrong * pooled).sum() * parts.temperature
        if parts.bias:
            gradient[k + 1 : own] = wrong.sum(axis=0) - wrong.sum() / classes + 2 * RIDGE * bias
        by_kind = np.zeros_like(of_kinds)
        np.add.at(by_kind, known.of_rows, wrong)
        ties = [np.einsum("ki,kij->j", by_kind[:-1], known.tied[name]) for name in parts.kinds]
        gradient[own:] = np.concatenate([*ties, np.zeros(0)]) + 2 * KIND_RIDGE / rows * free[own:]
        penalty = RIDGE * bias @ bias + KIND_RIDGE / rows * free[own:] @ free[own:]
        return float(-(labels * blended).sum() / rows + penalty), gradient

    start = np.zeros(own + classes * len(parts.kinds))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    weights, scale, bias, of_kinds = read(found.x)
    every = np.zeros(len(members))
    every[chosen] = weights * scale if parts.pool == "log" else weights
    named = {name: tuple(each.tolist()) for name, each in zip(known.names, of_kinds[:-1], strict=True) if each.any()}
    return Blend(parts.pool, tuple(every.tolist()), 1.0 if parts.pool == "log" else scale, tuple(bias.tolist()), named)


def _further(
    parts: Parts, members: int, ahead: int, kinds: Iterable[str]
) -> Iterator[tuple[tuple[str | int, ...], Parts]]:
    """The blends with one part more, or `ahead` parts, and what they are."""
    others = set(range(members)) - set(parts.members)
    if ahead == 2 and not parts.temperature:
        for member in others:
            yield (member, "temperature"), replace(parts, members=(*parts.members, member), temperature=True)
    if ahead > 1:
        return
    if not parts.temperature:
        yield ("temperature",), replace(parts, temperature=True)
    if not parts.bias:
        yield ("bias",), replace(parts, bias=True)
    for kind in (each for each in kinds if each not in parts.kinds):
        yield (kind,), replace(parts, kinds=(*parts.kinds, kind))
    if parts.pool == "log" and len(parts.members) > 1:
        yield ("linear pool",), replace(parts, pool="linear")
    for member in others:
        yield (member,), replace(parts, members=(*parts.members, member))


def _losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The cross entropy of each row in nats."""
    return np.asarray(-(labels * logarithms(probabilities)).sum(axis=1))


def _each(folds: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of each fold, bool (n,)."""
    return (folds == fold for fold in range(FOLDS) if (folds == fold).any())
