"""Checks the examples given to a collator and turns them into columns. Errors name the example and the key."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from arena.metrics import LABELS, SUM_TOLERANCE

KNOWN = {"input_ids", "label", "index", "attention_mask"}
Columns = tuple[list[np.ndarray], np.ndarray | None, np.ndarray]


class Item(TypedDict, total=False):
    """One example for `collate` and `VarlenCollator`: `input_ids` is required, the rest is optional.

    Values may be lists, numpy arrays or tensors on the CPU. `label` is three probabilities, of A, B and tie.
    `attention_mask` must be all ones, because nothing is padded.
    """

    input_ids: Sequence[int] | np.ndarray
    label: Sequence[float] | np.ndarray
    index: int
    attention_mask: Sequence[int] | np.ndarray


def read_examples(examples: Sequence[Item]) -> Columns:
    """The examples' columns.

    Returns:
        The token ids, int32 (n_tokens,) each; the labels, float32 (n, 3) with rows that sum to 1, or None if no example
        has one; and the index, int64 (n,), which defaults to the position in `examples`.

    Raises:
        ValueError: there are no examples, a key is unknown, an example is padded, ids are not one row of token ids, a
            label is not three probabilities, or only some examples have labels.
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
    return [each.astype(np.int32, copy=False) for each in ids], _labels(examples), index


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


def _labels(examples: Sequence[Item]) -> np.ndarray | None:
    given = [example.get("label") for example in examples]
    missing = [at for at, label in enumerate(given) if label is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise ValueError(
            f"example {missing[0]} has no label, but others have one: label all examples of a batch or none "
            f"({len(missing)} of {len(given)} have none)"
        )
    arrays = [_array(label, f"example {at}, label") for at, label in enumerate(given)]
    for at, label in enumerate(arrays):
        if label.shape != (3,) or label.dtype.kind not in "biuf":
            raise ValueError(
                f"example {at}, label: {str(given[at])[:60]!r} is not three probabilities, of {', '.join(LABELS)}; "
                "write [1, 0, 0] if A is better, [0, 1, 0] if B is, or [0, 0, 1] for a tie"
            )
    labels = np.stack(arrays).astype(np.float64)
    totals = labels.sum(axis=1)
    wrong = ~((labels >= 0).all(axis=1) & (np.abs(totals - 1) <= SUM_TOLERANCE))  # also for NaN
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"example {at}, label: {labels[at].tolist()} are not probabilities; give three numbers from 0 to 1 that "
            "sum to 1"
        )
    return np.asarray(labels / totals[:, None], dtype=np.float32)


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
