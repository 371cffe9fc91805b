"""Checks the examples given to a collator and turns them into columns. Errors name the example and the key."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np

from arena.metrics import sum_tolerance

KNOWN = {"input_ids", "label", "labels", "index", "attention_mask"}
IGNORED = -100  # in `labels`: the token is no target, as in transformers and torch


class Item(TypedDict, total=False):
    """One example for `collate` and `VarlenCollator`: `input_ids` is required, the rest is optional.

    Values may be lists, numpy arrays or tensors on the CPU. An example has one kind of target: `label`, the probability
    of each class, which the head predicts from the last token; or `labels`, which like transformers' has for each token
    its own id if it is to be predicted from the tokens before it, else -100. `attention_mask` must be all ones, because
    nothing is padded.
    """

    input_ids: Sequence[int] | np.ndarray
    label: Sequence[float] | np.ndarray
    labels: Sequence[int] | np.ndarray
    index: int
    attention_mask: Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Columns:
    """The columns of n examples.

    Attributes:
        ids: int32 (n_tokens,) each.
        index: int64 (n,), the index of each example in its data set.
        targets: float32 (n, C), rows that sum to 1; or int64 (m,) token ids; None if no example has any.
        places: for token ids, the positions in each example from which they are predicted, int64, m in all; None: the
            last one of each example.
    """

    ids: list[np.ndarray]
    index: np.ndarray
    targets: np.ndarray | None = None
    places: list[np.ndarray] | None = None

    def take(self, members: np.ndarray) -> Columns:
        """Some of the examples."""
        ids = [self.ids[at] for at in members]
        if self.targets is None or self.places is None:
            return Columns(ids, self.index[members], None if self.targets is None else self.targets[members])
        ends = np.cumsum([0, *map(len, self.places)])
        chosen = np.concatenate([self.targets[ends[at] : ends[at + 1]] for at in members])
        return Columns(ids, self.index[members], chosen, [self.places[at] for at in members])


def read_examples(examples: Sequence[Item]) -> Columns:
    """The examples' columns; an example's index defaults to its position in `examples`.

    Raises:
        ValueError: there are no examples, a key is unknown, an example is padded, ids are not one row of token ids, a
            target is invalid, or only some examples have one.
    """
    if not len(examples):
        raise ValueError("a batch needs at least one example")
    for at, example in enumerate(examples):
        _check_keys(example, at)
    ids = [_token_ids(example, at) for at, example in enumerate(examples)]
    if (flat := np.concatenate(ids)).min() < 0 or flat.max() > np.iinfo(np.int32).max:
        at, worst = next((at, each) for at, each in enumerate(ids) if each.min() < 0 or each.max() >= 2**31)
        raise ValueError(f"example {at}, input_ids: {worst.min()} to {worst.max()} are not token ids")
    index = np.array([_index(example.get("index"), at) for at, example in enumerate(examples)], dtype=np.int64)
    columns = Columns([each.astype(np.int32, copy=False) for each in ids], index)
    label, labels = _values(examples, "label"), _values(examples, "labels")
    if label is not None and labels is not None:
        raise ValueError("the examples have both label and labels: give one kind of target")
    if label is not None:
        return replace(columns, targets=_probabilities(label))
    if labels is not None:
        places = [_places(each, own, at) for at, (each, own) in enumerate(zip(labels, columns.ids, strict=True))]
        return token_targets(columns.ids, columns.index, places)
    return columns


def token_targets(ids: list[np.ndarray], index: np.ndarray, places: list[np.ndarray]) -> Columns:
    """The columns of examples of which the tokens after these places are predicted, each from those before it."""
    following = [own[where + 1] for own, where in zip(ids, places, strict=True)]
    return Columns(ids, index, np.concatenate(following).astype(np.int64), places)


def _check_keys(example: Item, at: int) -> None:
    if not isinstance(example, Mapping):
        raise ValueError(f"example {at} is a {type(example).__name__}: give a dictionary with input_ids and label")
    if unknown := set(example) - KNOWN:
        key = min(map(str, unknown))
        near = difflib.get_close_matches(key, KNOWN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(KNOWN))}"
        raise ValueError(f"example {at}: unknown key {key!r}; {hint}")
    if example.get("input_ids") is None:
        raise ValueError(f"example {at} has no input_ids: give its token ids")


def _token_ids(example: Item, at: int) -> np.ndarray:
    ids = _array(example["input_ids"], f"example {at}, input_ids")
    if ids.ndim != 1:
        raise ValueError(f"example {at}, input_ids: the shape is {ids.shape}; give one row of token ids, shape (n,)")
    if not len(ids):
        raise ValueError(f"example {at}, input_ids: it is empty; every example needs at least one token")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"example {at}, input_ids: the dtype is {ids.dtype}; give whole numbers")
    if example.get("attention_mask") is not None:
        mask = _array(example["attention_mask"], f"example {at}, attention_mask")
        if mask.shape != ids.shape or not (mask == 1).all():
            raise ValueError(
                f"example {at}, attention_mask: it is not one 1 for each of the {len(ids)} input_ids; examples are not "
                "padded here: remove the padding from input_ids, and leave attention_mask out"
            )
    return ids


def _values(examples: Sequence[Item], key: str) -> list[Any] | None:
    """The values of a key of all examples; None if no example has it."""
    values = [example.get(key) for example in examples]
    missing = [at for at, value in enumerate(values) if value is None]
    if len(missing) == len(values):
        return None
    if missing:
        raise ValueError(
            f"example {missing[0]} has no {key}, but others have one: give all examples of a batch a {key} or none "
            f"({len(missing)} of {len(values)} have none)"
        )
    return values


def _probabilities(given: list[Any]) -> np.ndarray:
    """float32 (n, C), rows that sum to 1."""
    arrays = [_array(label, f"example {at}, label") for at, label in enumerate(given)]
    for at, label in enumerate(arrays):
        if label.ndim != 1 or len(label) < 2 or label.dtype.kind not in "biuf":
            raise ValueError(
                f"example {at}, label: {str(given[at])[:60]!r} is not a list of probabilities, one for each class; "
                "write [1, 0, 0] for the first of three classes"
            )
        if len(label) != len(arrays[0]):
            raise ValueError(f"example {at}, label: it has {len(label)} classes, but example 0 has {len(arrays[0])}")
    labels = np.stack(arrays).astype(np.float64)
    totals = labels.sum(axis=1)
    close = np.abs(totals - 1) <= sum_tolerance(labels.shape[1])
    wrong = ~((labels >= 0).all(axis=1) & close)  # also for NaN
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"example {at}, label: {labels[at].tolist()} are not probabilities; give numbers from 0 to 1 that sum to 1"
        )
    return np.asarray(labels / totals[:, None], dtype=np.float32)


def _places(given: Any, ids: np.ndarray, at: int) -> np.ndarray:
    """int64: the positions from which an example's targets are predicted, each one before its target's."""
    labels = _array(given, f"example {at}, labels")
    if labels.shape != ids.shape or labels.dtype.kind not in "iu":
        raise ValueError(
            f"example {at}, labels: give one whole number for each of the {len(ids)} input_ids; probabilities of "
            "classes are called label"
        )
    targets = np.flatnonzero(labels[1:] != IGNORED) + 1  # nothing comes before the first token
    if (labels[targets] != ids[targets]).any():
        raise ValueError(
            f"example {at}, labels: each must be {IGNORED} or the id of its own token; a model's output is compared "
            "with the next token here, so do not shift them"
        )
    return targets - 1


def _index(value: Any, at: int) -> int:
    if value is None:
        return at
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"example {at}, index: {str(value)[:60]!r} is not a whole number") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"example {at}, index: it has more than 64 bits; write a smaller number")
    return number


def _array(value: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # rows of several lengths; a tensor on a GPU
        raise ValueError(f"{where}: {error}") from None
