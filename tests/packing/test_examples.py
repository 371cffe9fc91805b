"""What people bring to the collator: taken as it is meant, or refused with the example and the key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from arena.packing.batch import VarlenCollator, collate
from arena.packing.examples import read_examples

A = [1.0, 0.0, 0.0]


@pytest.mark.parametrize("door", [VarlenCollator(), VarlenCollator(share=True), collate])
@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input_ids": [5], "labels": A}, "example 1 has no label, but others have one"),
        ({"input_ids": [5], "lable": A}, "example 1: unknown key 'lable'; did you mean 'label'?"),
        (
            {"input_ids": [5], "pixel_values": 1},
            "example 1: unknown key 'pixel_values'; known keys: attention_mask, index, input_ids, label, labels",
        ),
        ({"ids": [5], "label": A}, "example 1: unknown key 'ids'"),
        ({"label": A}, "example 1 has no input_ids"),
        ([5, 6], "example 1 is a list"),
        (
            {"input_ids": [5, 0], "attention_mask": [1, 0], "label": A},
            "example 1, attention_mask: .*remove the padding",
        ),
        ({"input_ids": [5, 6], "attention_mask": [1], "label": A}, "example 1, attention_mask"),
        ({"input_ids": torch.tensor([[5, 6]]), "label": A}, r"example 1, input_ids: the shape is \(1, 2\)"),
        ({"input_ids": 5, "label": A}, r"example 1, input_ids: the shape is \(\)"),
        ({"input_ids": [[5], [6, 7]], "label": A}, "example 1, input_ids"),
        ({"input_ids": [], "label": A}, "example 1, input_ids: it is empty"),
        ({"input_ids": [1.5], "label": A}, "example 1, input_ids: the dtype is float64; give whole numbers"),
        ({"input_ids": ["a"], "label": A}, "example 1, input_ids"),
        ({"input_ids": [5, -100], "label": A}, "example 1, input_ids: -100 to 5 are not token ids"),
        ({"input_ids": [2**31], "label": A}, "example 1, input_ids: 2147483648"),
        ({"input_ids": [5], "label": 2}, "example 1, label: '2' is not a list of probabilities.*write .1, 0, 0."),
        ({"input_ids": [5], "label": [0.5, 0.5]}, "example 1, label: it has 2 classes, but example 0 has 3"),
        ({"input_ids": [5], "label": [1.0]}, "example 1, label: .* is not a list of probabilities"),
        ({"input_ids": [5], "label": ["A", "B", "tie"]}, "example 1, label"),
        ({"input_ids": [5], "label": [float("nan")] * 3}, "example 1, label"),
        ({"input_ids": [5], "label": [1.5, -0.5, 0]}, "example 1, label"),
        ({"input_ids": [5], "label": [1, 1, 0]}, "example 1, label: .*sum to 1"),
        ({"input_ids": [5]}, "example 1 has no label, but others have one"),
        ({"input_ids": [5], "label": A, "index": "x"}, "example 1, index"),
        ({"input_ids": [5], "label": A, "index": 1.5}, "example 1, index"),
        ({"input_ids": [5], "label": A, "index": 2**70}, "example 1, index: it has more than 64 bits"),
        (
            {"input_ids": [5], "label": torch.tensor([1.0, 0, 0], requires_grad=True)},
            "example 1, label: .*requires grad",
        ),
    ],
)
def test_invalid_examples_are_refused(door: Any, example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        door([{"input_ids": [1], "label": A}, example])


def test_lists_arrays_and_tensors_mean_the_same() -> None:
    lists = {"input_ids": [5, 6], "attention_mask": [1, 1], "label": [0.2, 0.3, 0.5], "index": 7}
    arrays = {key: np.asarray(value) for key, value in lists.items()}
    tensors = {key: torch.tensor(value) for key, value in lists.items()}
    for examples in ([lists], [arrays], [tensors]):
        batch = collate(examples)  # type: ignore[arg-type]
        assert batch.input_ids.tolist() == [[5, 6]] and batch.index.tolist() == [7]
        torch.testing.assert_close(batch.label, torch.tensor([[0.2, 0.3, 0.5]]))


@pytest.mark.parametrize(("total", "right"), [(0.9984, False), (0.9985, True), (1.0015, True), (1.0016, False)])
def test_labels_of_three_digits_may_miss_1_by_their_rounding(total: float, right: bool) -> None:
    example: Any = {"input_ids": [5], "label": [0.25, 0.25, total - 0.5]}
    if right:
        targets = read_examples([example]).targets
        assert targets is not None and abs(targets.sum() - 1) < 1e-6
    else:
        with pytest.raises(ValueError, match="sum to 1"):
            read_examples([example])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([5, 6], "example 0, labels: give one whole number for each of the 3 input_ids; probabilities .* label"),
        ([0.5, 0.2, 0.3], "example 0, labels: give one whole number"),
        ([-100, 7, -100], "example 0, labels: each must be -100 or the id of its own token.*do not shift"),
    ],
)
def test_invalid_token_targets_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate([{"input_ids": [5, 6, 7], "labels": labels}])


def test_the_first_token_is_never_a_target() -> None:
    """As in transformers, where labels are often a copy of the input."""
    batch = collate([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    assert batch.targets is not None and batch.targets.tolist() == [6, 7] and batch.positions.tolist() == [0, 1]


def test_one_kind_of_target() -> None:
    with pytest.raises(ValueError, match="both label and labels"):
        collate([{"input_ids": [5, 6], "label": A, "labels": [-100, 6]}])
