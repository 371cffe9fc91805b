"""Fits blends on labelled rows, with scores that no row's own label has touched.

A blend grows by one part at a time: a temperature, a bias for each class, a further member, or another pool. The part
that gains most, on rows that did not fit it, is taken if that is more than the gain's standard error. Where none is, a
member and a temperature are tried together: the weights of a logarithmic pool without one sum to 1, so that a member
can only take weight from the others. For the score of the result, all of this is repeated without the rows that are
scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from arena.inference.blend import Blend, Pool, logarithms, pooled_logs
from arena.metrics import log_loss

FOLDS = 5
RIDGE = 1e-9  # on the biases, so that one of a class without rows is finite


@dataclass(frozen=True)
class Parts:
    """What of a blend is fitted.

    Attributes:
        members: the numbers of the predictions that take part; the others get the weight 0.
        temperature: whether confidence is fitted; the weights of a logarithmic pool sum to 1 otherwise.
        bias: whether there is a bias for each class.
    """

    members: tuple[int, ...]
    pool: Pool = "log"
    temperature: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Part:
    """A part that was tried.

    Attributes:
        added: `temperature`, `bias`, `linear pool`, or the number of a member; several are tried together.
        gains: float64 (n,), by how much it lowers the log-loss of each row, which did not fit it.
        taken: whether the blend has it.
    """

    added: tuple[str | int, ...]
    gains: np.ndarray
    taken: bool


def fit_blend(
    labels: np.ndarray, members: np.ndarray, groups: np.ndarray, seed: int = 0
) -> tuple[Blend, int, list[Part]]:
    """The blend whose parts all help; also the number of the best member, which it begins with, and the parts tried.

    Args:
        labels: (n, C), one-hot or probabilities.
        members: probabilities of the same rows, (k, n, C).
        groups: int64 (n,), the group of each row, from 0. Rows of a group are never fitted on for one another.
        seed: of the division into folds.
    """
    folds = divide(groups, seed)
    best = int(np.argmin([log_loss(labels, each) for each in members]))
    parts, tried = Parts((best,)), list[Part]()
    losses = _losses(labels, members[best])
    ahead = 1
    while candidates := list(_further(parts, len(members), ahead)):
        found = [_losses(labels, cross_predicted(more, labels, members, folds)) for _, more in candidates]
        at = int(np.argmin([each.mean() for each in found]))
        if (gains := losses - found[at]).mean() > standard_error(gains, groups):
            tried = [each for each in tried if each.taken] + [Part(candidates[at][0], gains, True)]
            parts, losses, ahead = candidates[at][1], found[at], 1
        else:
            tried += [Part(added, losses - each, False) for (added, _), each in zip(candidates, found, strict=True)]
            ahead += 1
    return fit_parts(parts, labels, members), best, tried


def cross_fitted(
    labels: np.ndarray,
    members: np.ndarray,
    groups: np.ndarray,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> np.ndarray:
    """What blends that are chosen and fitted without a row's group predict for it, float64 (n, C).

    Args:
        labels, members, groups, seed: as in `fit_blend`.
        advance: is called with the number of rows that are done.
    """
    result = np.zeros(members.shape[1:])
    for others in _each(divide(groups, seed)):
        fitted = ~others
        renumbered = np.unique(groups[fitted], return_inverse=True)[1]
        blend, _, _ = fit_blend(labels[fitted], members[:, fitted], renumbered, seed + 1)
        result[others] = blend(members[:, others])
        if advance is not None:
            advance(int(others.sum()))
    return result


def cross_predicted(parts: Parts, labels: np.ndarray, members: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """What a blend of these parts, fitted on the other folds, predicts for each row: float64 (n, C)."""
    result = np.zeros(members.shape[1:])
    for others in _each(folds):
        result[others] = fit_parts(parts, labels[~others], members[:, ~others])(members[:, others])
    return result


def divide(groups: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each row, from 0: groups are dealt out at random."""
    dealt = np.random.default_rng(seed).permutation(groups.max() + 1) % FOLDS
    return np.asarray(dealt[groups])


def standard_error(values: np.ndarray, groups: np.ndarray) -> float:
    """The standard error of the mean of rows that are alike within groups."""
    excess = np.bincount(groups, values - values.mean())
    return float(np.sqrt(excess @ excess) / len(values))


def fit_parts(parts: Parts, labels: np.ndarray, members: np.ndarray) -> Blend:
    """The blend of these parts that has the least log-loss on these rows; the arguments are as in `fit_blend`."""
    chosen, classes, rows = list(parts.members), labels.shape[1], len(labels)
    logs, k = logarithms(members[chosen]), len(chosen)

    def read(free: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        scale = float(np.exp(free[k])) if parts.temperature else 1.0
        return softmax(free[:k]), scale, free[k + 1 :] - free[k + 1 :].mean() if parts.bias else np.zeros(classes)

    def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        weights, scale, bias = read(free)
        pooled = pooled_logs(parts.pool, weights, logs)
        blended = log_softmax(scale * pooled + bias, axis=1)
        wrong = (np.exp(blended) - labels) / rows
        by_weight = scale * np.tensordot(logs if parts.pool == "log" else np.exp(logs - pooled), wrong, axes=2)
        gradient = np.zeros_like(free)
        gradient[:k] = weights * (by_weight - weights @ by_weight)
        gradient[k] = scale * (wrong * pooled).sum() * parts.temperature
        if parts.bias:
            gradient[k + 1 :] = wrong.sum(axis=0) - wrong.sum() / classes + 2 * RIDGE * bias
        return float(-(labels * blended).sum() / rows + RIDGE * bias @ bias), gradient

    found = minimize(loss, np.zeros(k + 1 + classes), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    weights, scale, bias = read(found.x)
    every = np.zeros(len(members))
    every[chosen] = weights * scale if parts.pool == "log" else weights
    return Blend(parts.pool, tuple(every.tolist()), 1.0 if parts.pool == "log" else scale, tuple(bias.tolist()))


def _further(parts: Parts, members: int, ahead: int) -> Iterator[tuple[tuple[str | int, ...], Parts]]:
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
