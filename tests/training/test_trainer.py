"""The loop: gradients that do not depend on the cut, exact resume, the best kept, no step on a NaN."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from arena import progress as progress_module
from arena.config import save_recipe
from arena.data.prepare import prepare_fold
from arena.model.backbone import load_base, load_tokenizer
from arena.model.tuning import adapt
from arena.packing.batch import PackedBatch, collate
from arena.storage.manifest import damage
from arena.tasks import task_of
from arena.tasks.preference import CLASSES
from arena.training import held_out as held_out_module
from arena.training import step as step_module
from arena.training.batches import plan_fold, training_order
from arena.training.checkpoint import load_weights
from arena.training.optimizer import trainable
from arena.training.step import accumulate
from arena.training.trainer import Trainer
from tests.helpers import classifier, exact, pack, tiny_recipe, trainer_for, write_rows

CPU = torch.device("cpu")
LENGTHS = [30, 4, 11, 9, 17, 2, 25, 8]


def split(batch: PackedBatch, parts: list[list[int]]) -> list[PackedBatch]:
    rows = batch.input_ids[0].split(batch.seq_lens)
    return [
        collate([{"input_ids": rows[at].numpy(), "label": batch.label[at].numpy()} for at in part]) for part in parts
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
    data = prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(str(base)))
    model = adapt(load_base(recipe.model, CLASSES), recipe.model)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    return trainer_for(recipe, data, model, run)


def test_attention_that_cannot_train_here_is_an_error_before_the_first_step(gemma2: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention=flex cannot run here: it has no backward on a CPU"):
        make(tmp_path, gemma2, "model.attention=flex")
    assert make(tmp_path, gemma2).attention.name == "blockwise"


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in trainable(trainer.model).values()])


def log(trainer: Trainer) -> list[dict[str, Any]]:
    lines = log_lines(trainer.folder / "log.jsonl")
    return [{key: line[key] for key in line if "second" not in key} for line in lines]


def tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


class StopError(Exception):
    pass


def stopped_after(trainer: Trainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a trainer up to the checkpoint of a step."""
    take = trainer._step

    def stop(batch: Any, start: float) -> dict[str, Any]:
        if trainer.done.step == step:
            raise StopError
        return take(batch, start)

    monkeypatch.setattr(trainer, "_step", stop)
    with pytest.raises(StopError):
        trainer.run()


@pytest.mark.parametrize("stop_after", [2, 3, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_resumed_equals_uninterrupted(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, optimizer: str
) -> None:
    """Cut after a step and started again from the last checkpoint: the same weights, bit for bit, and the same log."""
    # matrices of 4,096 weights and more, which the 8-bit optimizer does keep in 8 bits
    options = f"train.optimizer={optimizer}", "model.lora.dropout=0.1", "model.lora.r=64"
    straight = make(tmp_path / "a", gemma2, *options)
    straight.run()
    eight_bit = any(each.dtype == torch.uint8 for state in straight.optimizer.state.values() for each in tensors(state))
    assert eight_bit == (optimizer == "adamw8bit")
    cut = make(tmp_path / "b", gemma2, *options)
    stopped_after(cut, stop_after, monkeypatch)
    again = make(tmp_path / "b", gemma2, *options)
    again.run()
    assert straight.plan.n_steps == 5
    assert torch.equal(weights(straight), weights(again))
    assert log(straight) == log(again)


def test_other_data_is_not_resumed(gemma2: Path, tmp_path: Path) -> None:
    first = make(tmp_path, gemma2)
    (first.folder / "recipe.yaml").write_text(save_recipe(first.recipe))
    first.run()
    with pytest.raises(ValueError, match=r"train.batch_size is 8 there, 9 here.*--fresh"):
        make(tmp_path, gemma2, "train.batch_size=9").run()
    with pytest.raises(ValueError, match=r"data.fold_seed is 0 there, 5 here"):
        make(tmp_path, gemma2, "data.fold_seed=5").run()


def test_lines_show_the_latest_held_out_log_loss(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "PLAIN_INTERVAL", 0.0)
    trainer = make(tmp_path, gemma2)
    trainer.run()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training:")]
    found = {int(line.split()[1]): line.partition("held-out ")[2] for line in lines[:-1]}
    third = f"{trainer.log.evaluations[3]:.4f}"
    assert found == {1: "", 2: "", 3: third, 4: third}
    assert all(" left, loss " in line for line in lines[:-1])


def test_the_best_weights_are_loaded_at_the_end(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out loss gets worse after the first evaluation: its weights are what the run ends with."""
    losses = iter([0.5, 0.9])
    monkeypatch.setattr(held_out_module.HeldOut, "scores", lambda *_: {"log_loss": next(losses)})
    trainer = make(tmp_path, gemma2)
    trained = trainer.run()
    assert (trained.best_step, trainer.checkpoints.costs, trained.done.step) == (3, {3: 0.5, 5: 0.9}, 5)
    kept = weights(trainer).clone()
    load_weights(trainer.checkpoints.step(3), trainer.model)
    assert torch.equal(weights(trainer), kept)
    straight = trainer.checkpoints.load_evaluation(3)[1]
    weights_of_best = trainer._weights(3)
    again = trainer.held_out.predict_as_given(trainer.classifier, weights_of_best, None)
    np.testing.assert_allclose(straight, again, atol=1e-5)  # those of the best step, not of the last
    averaged = trainer.held_out.predict_averaged(straight, trainer.classifier, weights_of_best, None)
    np.testing.assert_allclose(trained.best.probabilities, averaged.probabilities, atol=1e-5)
    assert trainer.checkpoints.steps() == [3, 4, 5], "the best stays beside the last two"


@pytest.mark.parametrize("swap", ["random", "both"])
def test_sharing_changes_nothing_but_the_work(gemma2: Path, tmp_path: Path, swap: str) -> None:
    """Loss and gradient norm of every step, and the end weights, are those of the run that shares nothing."""
    options = "model.quantization=none", f"train.swap={swap}"
    runs = [make(tmp_path / share, gemma2, *options, f"packing.share={share}") for share in ("true", "false")]
    shared, plain = (run.run().done for run in runs)
    assert shared.unique_tokens < 0.9 * shared.tokens
    assert plain.unique_tokens == plain.tokens == shared.tokens
    steps = [[line for line in log_lines(run.folder / "log.jsonl") if "loss" in line] for run in runs]
    for one, other in zip(*steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert relative(weights(runs[0]), weights(runs[1])) <= 1e-3
    assert 0 <= shared.waited < shared.seconds


def test_both_orders_of_a_row_stand_side_by_side() -> None:
    rows = np.array([4, 7, 9, 2, 5])
    order = training_order(rows, 2, epochs=2, swap="both", seed=0)
    assert (order[::2] + 1 == order[1::2]).all() and (order[::2] % 2 == 0).all()
    assert sorted(order[:10:2] // 2) == sorted(order[10::2] // 2) == sorted(rows)
    assert order[:10].tolist() != order[10:].tolist()


def test_no_step_is_taken_on_a_loss_that_is_not_finite(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, gemma2)
    before = weights(trainer).clone()
    monkeypatch.setattr(step_module, "loss_sum", lambda logits, label: (logits * float("nan")).sum())
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan.*Rows of the step: \d+, \d+") as error:
        trainer.run()
    noted = json.loads((trainer.folder / "failure.json").read_text())
    assert noted["step"] == 1 and len(noted["ids"]) == 8 and ", ".join(noted["ids"]) in str(error.value)
    assert trainer.checkpoints.steps() == [0] and damage(trainer.checkpoints.step(0)) is None
    assert torch.equal(weights(trainer), before)


def test_a_failed_step_names_rows_of_other_files_too(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pd.read_csv(write_rows(tmp_path / "other", n=90, seed=1) / "train.csv", dtype=str)
    rows["prompt"] = rows["prompt"].str.replace("better", "worse")
    rows.to_csv(tmp_path / "more.csv", index=False)
    trainer = make(tmp_path, gemma2, f"data.extra=[{tmp_path / 'more.csv'}]", "train.batch_size=64")
    monkeypatch.setattr(step_module, "loss_sum", lambda logits, label: (logits * float("nan")).sum())
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan"):
        trainer.run()
    noted = set(json.loads((trainer.folder / "failure.json").read_text())["ids"])
    known = [str(index) for index in range(60)] + [f"{index} (more.csv)" for index in range(90)]
    assert trainer.data.ids == known and noted < set(known)
    assert any("more.csv" in each for each in noted) and any("more.csv" not in each for each in noted)


def test_training_learns_what_the_rows_say(gemma2: Path, tmp_path: Path) -> None:
    """The label is told by a word: training must find it. A run on shuffled labels is the control that must not."""
    options = "train.epochs=8", "train.lr=0.003", "train.head_lr=0.01", "train.evaluate_every=0"
    learned = make(tmp_path / "a", gemma2, *options)
    learned.run()
    shuffled = make(tmp_path / "b", gemma2, *options)
    np.random.default_rng(0).shuffle(shuffled.data.labels)
    shuffled.run()
    (found,), (control,) = (list(run.checkpoints.costs.values()) for run in (learned, shuffled))
    assert found < 0.6 < control


def test_plan_depends_on_ranks_only_in_its_cut(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2)
    data = prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(str(gemma2)))
    one, two = plan_fold(recipe, data), plan_fold(recipe, data, ranks=2)
    for step in range(one.n_steps):
        alone = sorted(int(index) for part in one.step(step) for index in part)
        shared = sorted(int(index) for rank in range(2) for part in two.step(step, rank) for index in part)
        assert alone == shared


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def log_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
