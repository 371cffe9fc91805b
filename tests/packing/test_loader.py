"""The loader: the plan's steps as lists of micro-batches, from any step on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from arena.data.tokens import TokenStore, tokenise
from arena.packing.loader import PackedLoader
from arena.packing.plan import epoch_order, plan_evaluation, plan_training
from arena.packing.tree import find_prefixes
from arena.training.batches import training_order
from tests.helpers import make_tokenizer, prompt_settings, rows_of


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    column = [["hello world " * (1 + at % 5)] for at in range(23)]
    rows = Dataset.from_dict({"prompt": column, "response_a": column, "response_b": column})
    return tokenise(rows_of(rows), make_tokenizer(tmp_path), prompt_settings(), tmp_path, orders=2)


def test_the_loop_over_steps_and_micro_batches(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer(tmp_path)
    plan = plan_training(store.lengths, epoch_order(len(store), 0, 0), step_size=10, budget=512)
    labels = np.eye(3)[np.arange(len(store)) % 3]
    dataloader = PackedLoader(store, labels, plan, tokenizer)
    seen = []
    for batch in dataloader:
        for micro_batch in batch:
            print(micro_batch["input_ids"], micro_batch["position_ids"], micro_batch["cu_seqlens"])
            print(micro_batch["seq_lens"], micro_batch["input_text"][0])
            assert micro_batch["input_ids"].shape[1] == sum(micro_batch["seq_lens"]) <= 512
            for at, index in enumerate(micro_batch["index"].tolist()):
                start, end = micro_batch["cu_seqlens"][at : at + 2].tolist()
                assert np.array_equal(micro_batch["input_ids"][0, start:end].numpy(), store[index])
                assert micro_batch["label"][at].tolist() == labels[index].tolist()
            seen += micro_batch["index"].tolist()
    assert sorted(seen) == list(range(len(store)))
    assert len(dataloader) == 5
    assert "verdict is: [[" in capsys.readouterr().out


def test_resumed_anywhere_it_gives_the_rest(store: TokenStore) -> None:
    plan = plan_training(store.lengths, epoch_order(len(store), 0, 0), step_size=10, budget=512)
    whole = [[micro.index.tolist() for micro in step] for step in PackedLoader(store, None, plan)]
    for start in range(plan.n_steps + 1):
        loader = PackedLoader(store, None, plan, start=start)
        assert [[micro.index.tolist() for micro in step] for step in loader] == whole[start:]
        assert len(loader) == plan.n_steps - start


def test_labels_are_those_of_the_examples_or_are_not_there(store: TokenStore) -> None:
    plan = plan_training(store.lengths, np.arange(len(store)), step_size=10, budget=512)
    rows = np.eye(3)[np.arange(23) % 3]
    with pytest.raises(ValueError, match=r"there are 23 targets, but the store has 46 examples: pass data\.targets"):
        PackedLoader(store, rows, plan)
    [step, *_] = PackedLoader(store, np.repeat(rows, 2, axis=0), plan)
    assert all(torch.isfinite(micro["label"]).all() for micro in step)
    [step, *_] = PackedLoader(store, None, plan)
    with pytest.raises(ValueError, match="has no labels"):
        step[0]["label"]


def test_ranks_together_have_each_example_once(store: TokenStore) -> None:
    plan = plan_training(store.lengths, np.arange(len(store)), step_size=10, budget=512, ranks=3)
    seen = [
        index
        for rank in range(3)
        for step in PackedLoader(store, None, plan, rank=rank)
        for micro in step
        for index in micro.index.tolist()
    ]
    assert sorted(seen) == list(range(len(store)))


@pytest.mark.parametrize(("swap", "each"), [("never", 1), ("random", 1), ("both", 2)])
def test_order_of_training(swap: str, each: int) -> None:
    rows = np.array([4, 7, 9])
    order = training_order(rows, 2, epochs=2, swap=swap, seed=1)
    assert len(order) == 2 * 3 * each
    for epoch in np.split(order, 2):
        assert sorted(epoch // 2) == sorted(np.repeat(rows, each))
    if swap == "never":
        assert (order % 2 == 0).all()
    assert training_order(rows, 2, epochs=2, swap=swap, seed=1).tolist() == order.tolist()
    if swap != "never":
        with pytest.raises(ValueError, match=f"train.swap={swap} needs both orders"):
            training_order(rows, 1, epochs=2, swap=swap, seed=1)
    assert len(training_order(rows, 2, epochs=0.5, swap=swap, seed=1)) == round(1.5 * each)


def test_random_swaps_are_even_and_change_each_epoch() -> None:
    order = training_order(np.arange(2000), 2, epochs=2, swap="random", seed=0)
    drawn = [np.zeros(2000, dtype=int), np.zeros(2000, dtype=int)]
    for epoch, part in enumerate(np.split(order, 2)):
        drawn[epoch][part // 2] = part % 2
        assert 0.45 < drawn[epoch].mean() < 0.55
    assert 0.4 < (drawn[0] != drawn[1]).mean() < 0.6


def test_micro_batches_one_by_one(store: TokenStore) -> None:
    plan = plan_evaluation(store.lengths, np.arange(len(store)), budget=512)
    alone = [micro.index.tolist() for micro in PackedLoader(store, None, plan).micro_batches()]
    assert alone == [micro.index.tolist() for step in PackedLoader(store, None, plan) for micro in step]


def test_a_shared_plan_gives_the_tokens_it_counted(store: TokenStore) -> None:
    prefixes = find_prefixes(store)
    plan = plan_training(
        store.lengths, epoch_order(len(store), 0, 0), step_size=10, budget=512, ranks=2, prefixes=prefixes
    )
    counted = [
        micro.tokens for rank in range(2) for step in PackedLoader(store, None, plan, rank=rank) for micro in step
    ]
    assert sorted(counted) == sorted(plan.tokens[plan.tokens > 0].tolist())
    assert sum(counted) == plan.tokens.sum() < 0.6 * plan.logical_tokens.sum()
