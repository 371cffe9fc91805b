"""Judges that are shown one answer at a time: a row's two examples share a micro-batch, and their logits are added."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from arena import Judge
from arena.config import change
from arena.data.prepare import prepare_fold
from arena.inference.infer import infer
from arena.inference.infer_deadline import infer_within
from arena.model.backbone import load_tokenizer
from arena.packing.loader import PackedLoader
from arena.packing.plan import plan_training
from arena.packing.tree import find_prefixes
from arena.training.batches import plan_fold
from arena.training.run import run_fold
from arena.training.step import accumulate
from tests.helpers import PREFERENCE, classifier, random_family, tiny_recipe

POINTWISE = "prompt.template=pointwise"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("share", [True, False])
def test_the_examples_of_a_row_share_a_micro_batch(ranks: int, share: bool) -> None:
    """In every step, within the budget; separate planning parts them."""
    rng = np.random.default_rng(0)
    examples = [each for seed in range(40) for each in random_family(seed)][:400]
    lengths = np.array([len(each) for each in examples])
    order = (2 * rng.permutation(len(examples) // 2)[:, None] + np.arange(2)).reshape(-1)
    prefixes = find_prefixes(examples) if share else None

    def parted(together: int) -> int:
        plan = plan_training(
            lengths, order, step_size=40, budget=128, ranks=ranks, prefixes=prefixes, together=together
        )
        assert plan.tokens.max() <= 128 and sorted(plan.examples.tolist()) == sorted(order.tolist())
        batches = [plan.micro_batch(at) // 2 for at in range(plan.n_micro_batches)]
        return sum(int((np.unique(rows, return_counts=True)[1] == 1).sum()) for rows in batches if len(rows))

    assert parted(2) == 0 < parted(1)
    with pytest.raises(ValueError, match=r"of one row have \d+ tokens together, more than the budget of 60: raise"):
        plan_training(lengths, order, step_size=40, budget=60, together=2)


def test_gradients_equal_those_of_rows_one_by_one(gemma2: Path, tmp_path: Path) -> None:
    """The loss is that of the added logits; the control counts each example for itself."""
    recipe = tiny_recipe(tmp_path, gemma2, POINTWISE, "train.batch_size=8", "packing.budget=250")
    data = prepare_fold(recipe, PREFERENCE, 0, load_tokenizer(recipe.model.base))
    plan = plan_fold(recipe, data)
    batch = next(iter(PackedLoader(data.store, data.targets, plan)))
    assert len(batch) > 1
    model, alone = classifier(recipe.model, 3).train(), classifier(recipe.model, 3).train()
    loss = accumulate(model, batch, 8, torch.device("cpu"), "float32", joined=data.task)

    logits = {}
    single = plan_training(data.store.lengths, plan.step(0)[0], step_size=1, budget=250)
    rows = sorted({int(each) // 2 for members in plan.step(0) for each in members})
    single = plan_training(data.store.lengths, np.repeat(rows, 2) * 2 + [0, 1] * len(rows), step_size=1, budget=250)
    for (micro_batch,) in PackedLoader(data.store, data.targets, single):
        logits[int(micro_batch.index[0])] = alone(micro_batch)[0]
    added = torch.stack([logits[2 * row] + logits[2 * row + 1][[1, 0, 2]] for row in rows])
    labels = torch.from_numpy(data.labels[rows])
    expected = F.cross_entropy(added, labels.float())
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    grads = [[p.grad for p in each.parameters() if p.grad is not None] for each in (model, alone)]
    distance = sum(float((a - b).norm()) for a, b in zip(*grads, strict=True)) / sum(float(b.norm()) for b in grads[1])
    assert distance < 1e-5
    assert abs(accumulate(classifier(recipe.model, 3), batch, 8, torch.device("cpu"), "float32") - loss) > 1e-3


def test_a_step_may_have_a_row_of_two_epochs_twice(gemma2: Path, tmp_path: Path) -> None:
    """Its loss then counts twice."""
    recipe = tiny_recipe(tmp_path, gemma2, POINTWISE, "train.batch_size=70", "train.epochs=2", "packing.budget=8192")
    data = prepare_fold(recipe, PREFERENCE, 0, load_tokenizer(recipe.model.base))
    plan = plan_fold(recipe, data)
    (members,) = plan.step(1)
    assert len(np.unique(members)) < len(members), "the step has the end of one epoch and the beginning of the next"
    batch = list(PackedLoader(data.store, data.targets, plan))[1]
    loss = accumulate(classifier(recipe.model, 3), batch, 70, torch.device("cpu"), "float32", joined=data.task)
    alone, model = {}, classifier(recipe.model, 3)
    for row in np.unique(members // 2).tolist():
        both = 2 * row + np.arange(2)
        single = plan_training(data.store.lengths, both, step_size=2, budget=8192, together=2)
        (one,) = PackedLoader(data.store, data.targets, single)
        alone[row] = accumulate(model, one, 2, torch.device("cpu"), "float32", joined=data.task)
    assert loss == pytest.approx(np.mean([alone[row] for row in (members // 2).tolist()]), rel=1e-5)
    assert loss != pytest.approx(np.mean(list(alone.values())), rel=1e-5)  # the control counts each row once


def test_what_all_rows_share_counts_once_for_a_micro_batch() -> None:
    """The plan has about as many micro-batches as one that may part the examples of a row."""
    rng = np.random.default_rng(0)
    begin = rng.integers(0, 99, 300)
    examples = [
        np.concatenate([begin, rng.integers(0, 99, size)]).astype(np.int32) for size in rng.integers(20, 60, 400)
    ]
    lengths, order, prefixes = np.array([len(each) for each in examples]), np.arange(400), find_prefixes(examples)
    counts = [
        plan_training(lengths, order, step_size=400, budget=1024, prefixes=prefixes, together=k).n_micro_batches
        for k in (1, 2)
    ]
    assert (
        counts[1] <= 1.1 * counts[0] < 0.5 * plan_training(lengths, order, step_size=400, budget=1024).n_micro_batches
    )


def test_trained_and_judged(gemma2: Path, tmp_path: Path) -> None:
    """Each answer is scored by itself, so that A and B can be exchanged to the bit and no order matters."""
    recipe = tiny_recipe(tmp_path, gemma2, POINTWISE, "train.epochs=1", "train.batch_size=16")
    run_fold(recipe, 0, tmp_path / "runs")
    fold = tmp_path / "runs" / recipe.name / "fold0"
    judge, rows = Judge.from_pretrained(fold), pd.read_csv(tmp_path / "rows/test.csv", dtype={"id": str})
    found = judge.predict_proba(rows)
    swapped = rows.rename(columns={"response_a": "response_b", "response_b": "response_a"})
    np.testing.assert_allclose(judge.predict_proba(swapped)[:, [1, 0, 2]], found, atol=1e-6)
    assert judge.position_flip_rate(rows) == 0 and np.abs(found[:, 0] - found[:, 1]).max() > 1e-4
    row = rows.iloc[0].to_dict()
    shown = judge.explain(row).orders
    for order, answer in zip(shown, ("response_a", "response_b"), strict=True):
        text = json.loads(row[answer])[0]
        assert text in order.prompt
    assert shown[0].prompt.count("### Assistant:") == 1
    ranked = judge.rank("Which is best?", ["one", "two or more", "three", "four"])
    assert ranked.tokens < 0.5 * ranked.logical_tokens
    infer([fold / "model"], str(tmp_path / "rows/test.csv"), tmp_path / "out.csv")
    np.testing.assert_allclose(pd.read_csv(tmp_path / "out.csv").iloc[:, 1:], found, atol=1e-6)
    infer_within("1h", [fold / "model"], str(tmp_path / "rows/test.csv"), tmp_path / "late.csv", (), None)
    np.testing.assert_allclose(pd.read_csv(tmp_path / "late.csv").iloc[:, 1:], found, atol=1e-6)


def test_what_does_not_fit(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2, POINTWISE, "train.batch_size=7")
    data = prepare_fold(recipe, PREFERENCE, 0, load_tokenizer(recipe.model.base))
    with pytest.raises(ValueError, match=r"train\.batch_size is 7, but a prompt .* set an even number, such as 8"):
        plan_fold(recipe, data)
    plain = change(recipe, ["prompt.template=compact"])
    assert "answer" not in plain.prompt.identity()["template"]  # runs of earlier versions are the same runs
