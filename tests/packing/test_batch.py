"""The collator's contract: keys, shapes, dtypes, boundaries."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from arena.packing.batch import PackedBatch, VarlenCollator, collate
from tests.helpers import make_tokenizer, random_family


def test_by_hand() -> None:
    items = [
        {"input_ids": [5, 6, 7], "label": [1, 0, 0], "index": 40},
        {"input_ids": np.array([8], dtype=np.int32), "label": [0.25, 0.25, 0.5], "index": 3},
        {"input_ids": [9, 10], "label": [0, 1, 0], "index": 7},
    ]
    batch = collate(items)  # type: ignore[arg-type]
    assert batch["batch_size"] == 3
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["seq_lens"] == [3, 1, 2]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 6]
    assert batch["max_seq_len"] == 3
    assert batch["label"].tolist() == [[1, 0, 0], [0.25, 0.25, 0.5], [0, 1, 0]]
    assert batch["index"].tolist() == [40, 3, 7]
    assert batch["input_text"] == []
    assert batch["cu_seqlens_q"] is batch["cu_seqlens"] is batch["cu_seqlens_k"]
    dtypes = {key: batch[key].dtype for key in ("input_ids", "position_ids", "cu_seqlens", "label")}
    assert dtypes == {
        "input_ids": torch.int64, "position_ids": torch.int64, "cu_seqlens": torch.int32, "label": torch.float32,
    }  # fmt: skip
    assert set(batch) == set(batch.keys()) >= {"batch_size", "input_text", "label"}
    assert dict(batch)["max_seq_len"] == 3


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_every_token_in_its_place(lengths: list[int]) -> None:
    ids = [np.arange(n) + 100 * at for at, n in enumerate(lengths)]
    batch = collate([{"input_ids": each} for each in ids])
    ends = batch.cu_seqlens.tolist()
    assert batch.input_ids.shape == batch.position_ids.shape == (1, sum(lengths))
    for at, (start, end) in enumerate(pairwise(ends)):
        assert batch.input_ids[0, start:end].tolist() == ids[at].tolist()
        assert batch.position_ids[0, start:end].tolist() == list(range(lengths[at]))


def test_texts_are_decoded_only_on_request(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    ids = tokenizer("hello world", add_special_tokens=False)["input_ids"]
    assert collate([{"input_ids": ids}], tokenizer)["input_text"] == ["hello world"]


def test_a_step_in_few_even_micro_batches_from_torch_dataloader() -> None:
    """The loop of the data loader: a step is a list of micro-batches, each within the budget."""
    examples = [{"input_ids": list(range(1, 2 + at % 7)), "label": [0, 0, 1], "index": at} for at in range(20)]
    loader = DataLoader(examples, batch_size=10, collate_fn=VarlenCollator(budget=25))  # type: ignore[arg-type]
    seen: list[int] = []
    for batch in loader:
        assert len(batch) == 2  # 10 examples of 37 and of 40 tokens
        for micro_batch in batch:
            assert isinstance(micro_batch, PackedBatch)
            assert micro_batch["input_ids"].shape == (1, sum(micro_batch["seq_lens"]))
            assert 15 <= micro_batch["input_ids"].shape[1] <= 25
            seen += micro_batch["index"].tolist()
    assert sorted(seen) == list(range(20))


def test_refusals() -> None:
    for call in (collate, VarlenCollator(budget=4)):
        with pytest.raises(ValueError, match="at least one example"):
            call([])
    with pytest.raises(ValueError, match="at least one token"):
        collate([{"input_ids": []}])
    with pytest.raises(ValueError, match="example 1 has 5 tokens"):
        VarlenCollator(budget=4)([{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3, 4, 5]}])
    with pytest.raises(KeyError, match="cu_seqlens_q"):
        collate([{"input_ids": [1]}])["cu_seqlens_z"]
    assert collate([{"input_ids": [1]}]).to("cpu").batch_size == 1


def test_a_shared_batch_has_no_cu_seqlens() -> None:
    """What a plain kernel would read wrongly is not there; the boundaries of segments are."""
    begin = list(range(10, 60))
    examples = [{"input_ids": [*begin, 1]}, {"input_ids": [*begin, 2, 3]}]
    plain, shared = (VarlenCollator(share=share)(examples)[0] for share in (False, True))  # type: ignore[arg-type]
    assert plain["cu_seqlens"].tolist() == plain["cu_seqlens_q"].tolist() == [0, 51, 103]
    assert "cu_seqlens" in plain and "cu_seqlens" in list(plain)
    assert shared["cu_seqlens_q"].tolist() == [0, 50, 51, 53]
    for batch in (shared, shared.to("cpu")):
        assert "cu_seqlens" not in batch and "cu_seqlens" not in list(batch) and "cu_seqlens" not in dict(batch)
        for ask in (lambda batch=batch: batch["cu_seqlens"], lambda batch=batch: batch.cu_seqlens):
            with pytest.raises(
                ValueError, match=r"packing\.share=false.*share=False.*cu_seqlens_q, cu_seqlens_k and kv"
            ):
                ask()


def test_equal_examples_that_share_one_segment_have_no_cu_seqlens() -> None:
    """Nothing comes before any segment there, but the segments are not the examples."""
    [batch] = VarlenCollator(share=True)([{"input_ids": list(range(40))}] * 2)
    assert batch.kv_index is None and batch["cu_seqlens_q"].tolist() == [0, 40] and batch.batch_size == 2
    assert "cu_seqlens" not in batch
    with pytest.raises(ValueError, match="has no cu_seqlens"):
        batch.cu_seqlens  # noqa: B018


def test_reading_the_label_of_a_batch_without_labels_is_an_error() -> None:
    batch = collate([{"input_ids": [1, 2]}, {"input_ids": [3], "label": None}])  # type: ignore[typeddict-item]
    assert "label" not in batch and "targets" not in batch and "label" not in dict(batch)
    for ask in (lambda: batch["label"], lambda: batch.label):
        with pytest.raises(ValueError, match=r"has no labels: .*data\.targets"):
            ask()


def test_a_collator_refuses_wrong_arguments_at_once() -> None:
    with pytest.raises(ValueError, match="tokenizer is a str: give a loaded tokenizer"):
        VarlenCollator("demo_base")
    for budget in ("9", 0, None):
        with pytest.raises(ValueError, match=r"budget is .*: give the most tokens in a micro-batch"):
            VarlenCollator(budget=budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [False, True])
def test_positions_are_the_tokens_that_the_head_reads(share: bool) -> None:
    """With probabilities the last token of each example, however examples end within others."""
    for seed in range(20):
        ids = random_family(seed)
        items: Any = [{"input_ids": each, "label": [1, 0]} for each in ids]
        for batch in VarlenCollator(share=share, budget=sum(map(len, ids)))(items):
            assert batch.reads_last and batch.targets is not None and batch.targets.shape == (batch.batch_size, 2)
            read = batch.input_ids[0, batch.positions].tolist()
            assert read == [int(ids[index][-1]) for index in batch.index]
            places = batch.position_ids[0, batch.positions].tolist()
            assert places == [len(ids[index]) - 1 for index in batch.index]


@pytest.mark.parametrize("share", [False, True])
def test_each_token_target_is_predicted_from_the_token_before_it(share: bool) -> None:
    """Also at the end of a shared beginning, whose last token has several next tokens."""
    shared_places = 0
    for seed in range(40):
        ids = random_family(seed)
        rng = np.random.default_rng(seed)
        labels = [np.where(rng.random(len(each)) < 0.5, each, -100) for each in ids]
        items: Any = [{"input_ids": each, "labels": own} for each, own in zip(ids, labels, strict=True)]
        for batch in VarlenCollator(share=share, budget=sum(map(len, ids)))(items):
            assert not batch.reads_last and "label" not in batch and batch.targets is not None
            wanted = [(index, at) for index in batch.index for at in np.flatnonzero(labels[index][1:] != -100) + 1]
            assert batch.targets.tolist() == [int(ids[index][at]) for index, at in wanted]
            before = [int(ids[index][at - 1]) for index, at in wanted]
            assert batch.input_ids[0, batch.positions].tolist() == before
            assert batch.position_ids[0, batch.positions].tolist() == [int(at) - 1 for _, at in wanted]
            shared_places += len(batch.positions) - len(set(batch.positions.tolist()))
    assert (shared_places > 0) is share
