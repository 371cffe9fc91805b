"""Settings that say how a run ends, saves and chooses its best checkpoint, and what it must not change."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from arena.config import load_recipe
from arena.distributed import CUBLAS, deterministic
from arena.metrics import accuracy, log_loss
from arena.packing.plan import PackPlan, plan_training
from arena.storage.manifest import damage, read_manifest
from arena.storage.mirror import Mirror
from arena.tasks.preference import Preference
from arena.training.batches import due_after
from arena.training.checkpoint_manager import CheckpointManager, Ranking, ranking_by
from arena.training.run import run_fold
from arena.training.trainer import Trainer
from tests.helpers import tiny_recipe
from tests.storage.faulty import checkpoint
from tests.training.test_trainer import log, log_lines, make, stopped_after, weights


def plan_of(examples: int, step_size: int) -> PackPlan:
    return plan_training(np.full(examples, 4), np.arange(examples), step_size=step_size, budget=16)


@pytest.mark.parametrize(
    ("examples", "step_size", "every", "size", "due"),
    [
        (40, 8, "epoch", 20, {3, 5}), (40, 8, "epoch", 16, {2, 4}), (30, 8, "epoch", 20, {3}),
        (40, 20, "epoch", 8, {1, 2}), (10, 8, "epoch", 20, set()), (40, 8, 2, 20, {2, 4}), (40, 8, 0, 20, set()),
        (40, 8, 9, 20, set()),
    ],
)  # fmt: skip
def test_an_epoch_ends_with_the_first_step_that_has_seen_all_of_it(
    examples: int, step_size: int, every: Any, size: int, due: set[int]
) -> None:
    """Also where steps straddle epochs, or hold several; an epoch that is not completed does not end."""
    assert due_after(every, plan_of(examples, step_size), size) == due


@pytest.mark.parametrize("swap", ["random", "both"])
def test_each_epoch_is_saved_and_evaluated_and_so_is_the_end(gemma2: Path, tmp_path: Path, swap: str) -> None:
    every = "train.checkpoint_every=epoch", "train.evaluate_every=epoch", "train.keep_last=9"
    trainer = make(tmp_path, gemma2, "train.epochs=2.3", f"train.swap={swap}", *every)
    trainer.run()
    size = len(trainer.data.train_rows) * (2 if swap == "both" else 1)
    ends = [-(-size // 8), -(-2 * size // 8), trainer.plan.n_steps]
    assert ends[1] < ends[2] and trainer.plan.n_steps == -(-round(2.3 * size) // 8)
    assert trainer.checkpoints.steps() == sorted(trainer.checkpoints.costs) == ends


def test_a_run_of_max_steps_is_the_run_of_as_many_examples(gemma2: Path, tmp_path: Path) -> None:
    """Its schedule ends with it, and more steps than an epoch has are taken from the next epochs."""
    rows = len(make(tmp_path / "a", gemma2).data.train_rows)
    short = make(tmp_path / "a", gemma2, "train.max_steps=2", "train.epochs=7")
    same = make(tmp_path / "b", gemma2, f"train.epochs={16 / rows}")
    assert short.plan.n_steps == 2 and short.plan.fingerprint == same.plan.fingerprint
    short.run(), same.run()
    assert torch.equal(weights(short), weights(same)) and short.schedule.get_last_lr() == [0.0, 0.0]
    longer = make(tmp_path / "c", gemma2, "train.max_steps=11")
    assert longer.plan.n_steps == 11 and len(longer.plan.examples) == 88 > 2 * rows
    assert (np.bincount(longer.plan.examples // 2, minlength=60)[longer.data.train_rows] >= 2).all()


def test_without_the_optimizer_a_run_resumes_with_a_new_one(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, counts, random states and learning rate continue; that the moments do not is visible, and said."""
    resumed = {}
    for saves in ("true", "false"):
        options = f"train.save_optimizer={saves}", "model.lora.dropout=0.1"
        cut = make(tmp_path / saves, gemma2, *options)
        stopped_after(cut, 2, monkeypatch)
        folder = cut.checkpoints.step(2)
        assert (folder / "optimizer.safetensors").exists() == (saves == "true") and damage(folder) is None
        capsys.readouterr()
        again = resumed[saves] = make(tmp_path / saves, gemma2, *options)
        again.resume()
        assert torch.equal(weights(again), weights(cut))
        rates = [[group["lr"] for group in each.optimizer.param_groups] for each in (again, cut)]
        assert rates[0] == rates[1] and min(rates[0]) > 0
        assert bool(again.optimizer.state) == (saves == "true")
        assert ("the optimizer starts anew" in capsys.readouterr().out) == (saves == "false")
        again.run()
    whole, anew = resumed.values()
    assert [line["lr"] for line in log(whole) if "lr" in line] == [line["lr"] for line in log(anew) if "lr" in line]
    losses = [[line["loss"] for line in log(each) if "loss" in line] for each in (whole, anew)]
    assert losses[0][:3] == losses[1][:3] and losses[0][3:] != losses[1][3:]
    assert not torch.equal(weights(whole), weights(anew))


def test_every_metric_knows_whether_more_is_better() -> None:
    """Against what it says of right and wrong predictions."""
    labels, right = np.eye(3)[[0, 1, 2, 0]], np.eye(3)[[0, 1, 2, 0]] * 0.97 + 0.01
    for name, metric in Preference().metrics.items():
        assert (metric(labels, right) > metric(labels, right[::-1])) == metric.higher_is_better, name
        assert ranking_by(name, Preference().metrics).higher_is_better == metric.higher_is_better
    assert accuracy.higher_is_better and not log_loss.higher_is_better
    with pytest.raises(ValueError, match=r"train\.best_metric=f2: the metrics of this task are log_loss, accuracy"):
        ranking_by("f2", Preference().metrics)


def scored(gemma2: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, metric: str, *options: str) -> Trainer:
    """A trainer whose evaluations get a better accuracy and a worse log-loss each time."""
    values = {"log_loss": iter([0.5, 0.7, 0.9]), "accuracy": iter([0.6, 0.7, 0.8])}
    monkeypatch.setattr(type(accuracy), "__call__", lambda self, *_: next(values[self.__name__]))
    return make(folder, gemma2, f"train.best_metric={metric}", "train.evaluate_every=2", "train.keep_last=1", *options)


@pytest.mark.parametrize(("metric", "best"), [("log_loss", 2), ("accuracy", 5)])
def test_the_best_checkpoint_is_that_of_the_metric(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, best: int
) -> None:
    trainer = scored(gemma2, tmp_path, monkeypatch, metric)
    trained = trainer.run()
    assert trained.best_step == best and trainer.checkpoints.steps() == sorted({best, 5})
    lines = [line for line in log_lines(trainer.folder / "log.jsonl") if "eval_log_loss" in line]
    assert [line["eval_log_loss"] for line in lines] == [0.5, 0.7, 0.9]
    assert [line.get("eval_accuracy") for line in lines] == ([None] * 3 if metric == "log_loss" else [0.6, 0.7, 0.8])
    assert [line["best"] for line in lines] == ([True, False, False] if metric == "log_loss" else [True] * 3)
    facts = read_manifest(trainer.checkpoints.evaluation(5))
    assert facts["log_loss"] == 0.9 and facts.get("accuracy") == (0.8 if metric == "accuracy" else None)
    ranking = ranking_by(metric, trainer.data.task.metrics)
    again = CheckpointManager(trainer.folder / "checkpoints", ranking=ranking)
    assert again.best == best and again.choose("best") == again.step(best)


def test_a_store_keeps_the_best_of_the_metric(tmp_path: Path) -> None:
    ranking = Ranking("accuracy", higher_is_better=True)
    for cost, best in ((ranking.cost, 30), (Ranking().cost, 10)):
        store = tmp_path / f"store{best}"
        store.mkdir()
        mirror = Mirror(str(store), "run", tmp_path / "staging", cost=cost)
        for step, share in ((10, 0.5), (20, 0.6), (30, 0.9), (40, 0.7)):
            folder = checkpoint(tmp_path / f"run{best}", step, loss=None)
            manager = CheckpointManager(folder.parent, ranking=ranking)
            manager.save_evaluation(step, {"log_loss": share, "accuracy": share}, np.full((2, 3), 1 / 3))
            mirror.push(folder, best=step == best)
            mirror.push(manager.evaluation(step))
        mirror.close(10)
        fresh = tmp_path / f"fresh{best}"
        Mirror(str(store), "run", tmp_path / "other", cost=cost).pull(fresh)
        assert sorted(path.name for path in (fresh / "checkpoints").glob("step-*")) == [
            f"step-{each:08d}" for each in sorted({best, 40})
        ]


def test_an_unknown_metric_is_refused_before_anything_is_loaded(gemma2: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.best_metric=f2"):
        run_fold(tiny_recipe(tmp_path, gemma2, "train.best_metric=f2"), 0, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_last_resumes_as_auto_does() -> None:
    assert load_recipe("demo", ["train.resume=last"]) == load_recipe("demo", ["train.resume=auto"])


def test_deterministic_changes_nothing_on_a_cpu(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; while it trains, torch's setting is on, which flash-attn's backward follows."""
    monkeypatch.setenv(CUBLAS, "")  # so that it is put back
    monkeypatch.delenv(CUBLAS)
    seen = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        "torch.nn.utils.clip_grad_norm_",
        lambda *args: (seen.append(torch.are_deterministic_algorithms_enabled()), clip(*args))[1],
    )
    for on in ("true", "false"):
        recipe = tiny_recipe(tmp_path, gemma2, "train.max_steps=2", f"train.deterministic={on}")
        run_fold(recipe, 0, tmp_path / on)
    assert seen == [True, True, False, False] and not torch.are_deterministic_algorithms_enabled()
    files = [tmp_path / on / "demo/fold0/model/adapter_model.safetensors" for on in ("true", "false")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_cannot_be_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def put() -> None:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    monkeypatch.setenv(CUBLAS, "")  # so that it is put back
    monkeypatch.delenv(CUBLAS)
    put()  # the control
    refused = pytest.raises(ValueError, match=r"train\.deterministic=true is not possible here: RuntimeError: put_")
    with refused, deterministic(True):
        put()
    assert os.environ[CUBLAS] == ":4096:8" and not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(CUBLAS, ":0:0")
    with deterministic(False):
        put()
    with pytest.raises(ValueError, match=rf"needs {CUBLAS}=:4096:8 or :16:8, but it is :0:0"), deterministic(True):
        pass


def test_a_quiet_run_shows_warnings_and_errors_only(
    gemma2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("sparse matrix")

    monkeypatch.setattr("arena.tasks.preference.fit_baseline", fail)
    shown = {}
    for level in ("info", "warning", "error"):
        recipe = tiny_recipe(tmp_path, gemma2, "train.max_steps=1", f"train.log_level={level}")
        run_fold(recipe, 0, tmp_path / level)
        shown[level] = capsys.readouterr().out
    assert "training: 1 step " in shown["info"] and "rows to train on" in shown["info"]
    (line,) = shown["warning"].splitlines()
    assert line.startswith("warning: fitting the plain baseline failed") and line in shown["info"]
    assert shown["error"] == ""
    assert json.loads((tmp_path / "error/demo/fold0/metrics.json").read_text())["steps"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_deterministic_run_has_the_same_bits_on_a_gpu(gemma2: Path, tmp_path: Path) -> None:
    found = []
    for again in ("a", "b"):
        recipe = tiny_recipe(tmp_path, gemma2, "train.max_steps=5", "train.deterministic=true")
        run_fold(recipe, 0, tmp_path / again)
        found.append((tmp_path / again / "demo/fold0/model/adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
