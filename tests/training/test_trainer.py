"""The loop: gradients that do not depend on the cut, exact resume, the best kept, no step on a NaN."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from arena.data.prepare import prepare_fold
from arena.model.backbone import adapt, load_base, load_tokenizer
from arena.packing.batch import PackedBatch, VarlenCollator
from arena.training import trainer as trainer_module
from arena.training.checkpoint import checkpoints, load_weights
from arena.training.optim import trainable
from arena.training.trainer import Trainer, accumulate, plan_fold
from tests.helpers import classifier, exact, pack, tiny_recipe

CPU = torch.device("cpu")
LENGTHS = [30, 4, 11, 9, 17, 2, 25, 8]


def split(batch: PackedBatch, parts: list[list[int]]) -> list[PackedBatch]:
    rows = batch.input_ids[0].split(batch.seq_lens)
    return [
        VarlenCollator()([{"input_ids": rows[at].numpy(), "label": batch.label[at].numpy()} for at in part])
        for part in parts
    ]


def gradients(base: Path, parts: list[list[int]], size: int = len(LENGTHS)) -> tuple[float, Tensor]:
    model = classifier(exact(base))
    loss = accumulate(model, split(pack(LENGTHS), parts), size, CPU, "float32")
    return loss, torch.cat([parameter.grad.reshape(-1) for parameter in trainable(model.model).values()])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 1, 2, 3], [4, 5, 6, 7]], [[0], [1, 2, 3, 4, 5, 6, 7]], [[at] for at in range(8)],
        [[7, 2], [0, 1], [3, 4, 5, 6]],
    ],
)  # fmt: skip
def test_the_same_gradient_however_the_step_is_cut(gemma2: Path, parts: list[list[int]]) -> None:
    whole_loss, whole = gradients(gemma2, [list(range(8))])
    loss, cut = gradients(gemma2, parts)
    assert relative(cut, whole) <= 1e-6
    assert loss == pytest.approx(whole_loss, rel=1e-6)


def test_mean_of_means_would_be_seen(gemma2: Path) -> None:
    """The control: dividing by the micro-batch's own size gives another gradient."""
    _, whole = gradients(gemma2, [list(range(8))])
    parts = [[0], [1, 2, 3, 4, 5, 6, 7]]
    model = classifier(exact(gemma2))
    for part, batch in zip(parts, split(pack(LENGTHS), parts), strict=True):
        accumulate(model, [batch], len(part) * len(parts), CPU, "float32")
    wrong = torch.cat([parameter.grad.reshape(-1) for parameter in trainable(model.model).values()])
    assert relative(wrong, whole) > 0.05


def make(folder: Path, base: Path, *overrides: str) -> Trainer:
    recipe = tiny_recipe(folder, base, *overrides)
    torch.manual_seed(0)
    data = prepare_fold(recipe, 0, load_tokenizer(str(base)))
    model = adapt(load_base(recipe.model), recipe.model)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    return Trainer(recipe, data, model, run, Accelerator())


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in trainable(trainer.model).values()])


def log(trainer: Trainer) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (trainer.folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if "second" not in key} for line in lines]


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [2, 3, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_resumed_equals_uninterrupted(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, optimizer: str
) -> None:
    """Cut after a step and started again from the last checkpoint: the same weights, bit for bit, and the same log."""
    options = f"train.optimizer={optimizer}", "model.lora.dropout=0.1"
    straight = make(tmp_path / "a", gemma2, *options)
    straight.run()
    cut = make(tmp_path / "b", gemma2, *options)
    step = cut._step

    def stop(batch: list[PackedBatch]) -> dict[str, Any]:
        if cut.done.step == stop_after:
            raise StopError
        return step(batch)

    monkeypatch.setattr(cut, "_step", stop)
    with pytest.raises(StopError):
        cut.run()
    again = make(tmp_path / "b", gemma2, *options)
    again.run()
    assert straight.plan.n_steps == 5
    assert torch.equal(weights(straight), weights(again))
    assert log(straight) == log(again)


def test_other_data_is_not_gone_on_with(gemma2: Path, tmp_path: Path) -> None:
    make(tmp_path, gemma2).run()
    with pytest.raises(ValueError, match=r"another plan.*--fresh"):
        make(tmp_path, gemma2, "train.batch_size=9").run()


def test_best_weights_are_kept(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out loss gets worse after the first evaluation: its weights are what the run ends with."""
    losses = iter([0.5, 0.9])
    monkeypatch.setattr(trainer_module, "log_loss", lambda *_: next(losses))
    trainer = make(tmp_path, gemma2)
    done = trainer.run()
    assert (done.best_step, done.best_log_loss, done.step) == (3, 0.5, 5)
    kept = weights(trainer).clone()
    load_weights(trainer.best_folder, trainer.model)
    assert torch.equal(weights(trainer), kept)
    assert [path.name for path in checkpoints(trainer.folder / "checkpoints")] == ["step-00000004", "step-00000005"]


def test_no_step_is_taken_on_a_loss_that_is_not_finite(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, gemma2)
    before = weights(trainer).clone()
    monkeypatch.setattr(trainer_module, "loss_sum", lambda logits, label: (logits * float("nan")).sum())
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan.*Rows of the step: \["):
        trainer.run()
    assert torch.equal(weights(trainer), before)


def test_training_learns_what_the_rows_say(gemma2: Path, tmp_path: Path) -> None:
    """The label is told by a word: training must find it. A run on shuffled labels is the control that must not."""
    options = "train.epochs=8", "train.lr=0.003", "train.head_lr=0.01", "train.evaluate_every=0"
    learned = make(tmp_path / "a", gemma2, *options).run()
    shuffled = make(tmp_path / "b", gemma2, *options)
    np.random.default_rng(0).shuffle(shuffled.data.labels)
    control = shuffled.run()
    assert learned.best_log_loss is not None and control.best_log_loss is not None
    assert learned.best_log_loss < 0.6 < control.best_log_loss


def test_plan_depends_on_ranks_only_in_its_cut(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2)
    data = prepare_fold(recipe, 0, load_tokenizer(str(gemma2)))
    one, two = plan_fold(recipe, data), plan_fold(recipe, data, ranks=2)
    for step in range(one.n_steps):
        alone = sorted(int(index) for part in one.step(step) for index in part)
        shared = sorted(int(index) for rank in range(2) for part in two.step(step, rank) for index in part)
        assert alone == shared


RANKS = """
import os, sys, torch
from pathlib import Path
from accelerate import Accelerator
from tests.training.test_trainer import make, weights
torch.set_num_threads(1)
folder, base, rank = Path(sys.argv[1]), Path(sys.argv[2]), os.environ["RANK"]
Accelerator(cpu=True)
trainer = make(folder / f"rank{rank}", base, "model.quantization=none", "train.evaluate_every=0")
trainer.folder = folder / "run"
trainer.run()
torch.save(weights(trainer), folder / f"weights{rank}.pt")
"""


def test_two_ranks_equal_one(gemma2: Path, tmp_path: Path) -> None:
    """Two processes that share each step end with the same weights as one process, up to rounding."""
    alone = make(tmp_path / "alone", gemma2, "model.quantization=none", "train.evaluate_every=0")
    alone.run()
    (tmp_path / "run").mkdir()
    settings = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
        "ACCELERATE_USE_CPU": "true",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(tmp_path), str(gemma2)],
            env={**settings, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=180) for rank in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"weights{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(*found)
    assert relative(found[0], weights(alone)) < 1e-4
