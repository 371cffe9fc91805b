"""Training in float16: overflows are skipped and got over, the rest is as in float32, and a resumed run is exact."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from arena.config import save_recipe
from arena.storage.manifest import read_manifest
from arena.training import optimizer as scaling_module
from arena.training import step as step_module
from arena.training import trainer as trainer_module
from arena.training.optimizer import FIRST_SCALE, LossScaling, trainable
from arena.training.run import run_fold
from tests.helpers import tiny_recipe
from tests.training.test_trainer import CPU, free_port, log, log_lines, make, stopped_after, weights

HALF = "model.dtype=float16"
TOO_HIGH = 2.0**26
LEARNING = "train.epochs=4", "train.lr=0.003", "train.head_lr=0.01", "train.evaluate_every=0"


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in log_lines(folder / "log.jsonl") if "loss" in line]


def one_weight(gradient: float, scaling: LossScaling) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), gradient) * scaling.scale
    return weight, torch.optim.SGD([weight], lr=1.0)


def test_a_step_is_that_of_the_unscaled_gradient() -> None:
    scaling = LossScaling("float16", CPU)
    weight, optimizer = one_weight(0.25, scaling)
    assert float(scaling.scaled(torch.tensor(0.5))) == 0.5 * FIRST_SCALE
    scaling.unscale(optimizer)
    assert torch.equal(weight.grad, torch.full((3,), 0.25))
    assert scaling.step(optimizer, 0.4) == {"loss_scale": FIRST_SCALE, "skipped": False}
    assert torch.equal(weight, torch.full((3,), 0.75)) and scaling.scale == FIRST_SCALE


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_overflow_changes_nothing_but_the_scale(bad: float) -> None:
    scaling = LossScaling("float16", CPU)
    weight, optimizer = one_weight(1.0, scaling)
    weight.grad[1] = bad
    scaling.unscale(optimizer)
    assert scaling.forgives(0.5, math.inf)
    assert scaling.step(optimizer, math.inf) == {"loss_scale": FIRST_SCALE, "skipped": True, "grad_norm": None}
    assert torch.equal(weight, torch.ones(3)) and scaling.scale == FIRST_SCALE / 2


def test_which_losses_and_norms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is not finite; an overflow without scaling, or with a scale that has come down to its least."""
    scaling = LossScaling("float16", CPU)
    assert not scaling.forgives(math.nan, 1.0) and not scaling.forgives(math.inf, math.inf)
    for dtype in ("float32", "bfloat16"):
        assert not LossScaling(dtype, CPU).forgives(0.5, math.inf)
        assert LossScaling(dtype, CPU).forgives(0.5, 1.0)
    monkeypatch.setattr(scaling_module, "FIRST_SCALE", 1.0)
    assert not LossScaling("float16", CPU).forgives(0.5, math.inf)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_are_left_alone(dtype: str) -> None:
    scaling = LossScaling(dtype, CPU)
    loss = torch.tensor(0.3)
    weight, optimizer = one_weight(0.25, scaling)
    scaling.unscale(optimizer)
    assert scaling.scaled(loss) is loss
    assert scaling.step(optimizer, 0.4) == {} == scaling.state()
    assert torch.equal(weight, torch.full((3,), 0.75))


def test_float16_learns_as_float32_does(gemma2: Path, tmp_path: Path) -> None:
    """Loss and gradient norm of each step are float32's, as far as half precision goes; no step is skipped."""
    runs = [make(tmp_path / dtype, gemma2, *LEARNING, f"model.dtype={dtype}") for dtype in ("float32", "float16")]
    for run in runs:
        run.run()
    best = [min(run.checkpoints.costs.values()) for run in runs]
    full, half = (steps_of(run.folder) for run in runs)
    assert [step["loss"] for step in half[:8]] == pytest.approx([step["loss"] for step in full[:8]], rel=0.02)
    assert [step["grad_norm"] for step in half[:4]] == pytest.approx([step["grad_norm"] for step in full[:4]], rel=0.02)
    assert {(step["skipped"], step["loss_scale"]) for step in half} == {(False, FIRST_SCALE)}
    assert not any("skipped" in step or "loss_scale" in step for step in full)
    assert best[0] is not None and best[1] is not None and max(best) < 1.0
    assert {each.dtype for each in trainable(runs[1].model).values()} == {torch.float32}


def test_overflows_are_skipped_and_got_over(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a scale that is too high: each skipped step halves it, counts, and leaves the schedule as it is."""
    monkeypatch.setattr(scaling_module, "FIRST_SCALE", TOO_HIGH)
    runs = [make(tmp_path / dtype, gemma2, *LEARNING, f"model.dtype={dtype}") for dtype in ("float32", "float16")]
    runs[1].run()
    best = min(runs[1].checkpoints.costs.values())
    runs[0].run()
    full, half = (steps_of(run.folder) for run in runs)
    skipped = [step["skipped"] for step in half]
    assert 2 < sum(skipped) < len(half) / 2
    for step, after in pairwise(half):
        assert after["loss_scale"] == step["loss_scale"] / (2 if step["skipped"] else 1)
    assert [step["grad_norm"] is None for step in half] == skipped
    for key in ("step", "lr", "examples", "tokens"):
        assert [step[key] for step in half] == [step[key] for step in full]
    assert best is not None and best < 1.0


def test_without_scaling_small_gradients_vanish(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a loss as small as an almost certain answer's, in float16, with a scale and without."""
    norms = {}
    loss_sum = step_module.loss_sum
    monkeypatch.setattr(step_module, "loss_sum", lambda logits, label: 1e-6 * loss_sum(logits, label))
    for name, dtype, first in (("float32", "float32", 1.0), ("scaled", "float16", 2.0**16), ("bare", "float16", 1.0)):
        monkeypatch.setattr(scaling_module, "FIRST_SCALE", first)
        trainer = make(tmp_path / name, gemma2, "model.quantization=none", "train.head_lr=1e-3", f"model.dtype={dtype}")
        with torch.no_grad():
            for key, each in trainable(trainer.model).items():
                each.add_(torch.randn(each.shape, generator=torch.Generator().manual_seed(len(key))) * 0.05)
        (batch, *_) = trainer._loader()
        step_module.accumulate(trainer.classifier, batch, 8, CPU, dtype, trainer.scaling)
        trainer.scaling.unscale(trainer.optimizer)
        grads = [each.grad.reshape(-1) for key, each in trainable(trainer.model).items() if "score" not in key]
        norms[name] = float(torch.cat(grads).norm())
    assert norms["scaled"] == pytest.approx(norms["float32"], rel=0.02)
    assert norms["bare"] != pytest.approx(norms["float32"], rel=0.05)


@pytest.mark.parametrize("stop_after", [2, 3])
def test_resumed_equals_uninterrupted(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """Cut amid the skipped steps; the scale and its count of good steps come back from the checkpoint."""
    monkeypatch.setattr(scaling_module, "FIRST_SCALE", TOO_HIGH)
    monkeypatch.setattr(scaling_module, "GROW_AFTER", 2)
    options = HALF, "train.epochs=2"
    straight = make(tmp_path / "a", gemma2, *options)
    straight.run()
    cut = make(tmp_path / "b", gemma2, *options)
    stopped_after(cut, stop_after, monkeypatch)
    again = make(tmp_path / "b", gemma2, *options)
    again.run()
    assert log(straight) == log(again)
    assert torch.equal(weights(straight), weights(again))
    assert straight.scaling.state() == again.scaling.state()
    scales = [each["loss_scale"] for each in steps_of(straight.folder)]
    assert any(later > earlier for earlier, later in pairwise(scales))  # it has grown again
    saved = read_manifest(straight.checkpoints.step(straight.checkpoints.steps()[-1]))["scaling"]
    assert saved == straight.scaling.state() and saved["scale"] == straight.scaling.scale


def test_an_overflow_that_no_scale_helps_ends_the_run(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_module, "FIRST_SCALE", 4.0)
    trainer = make(tmp_path, gemma2, HALF)
    before = weights(trainer).clone()

    def overflow(accelerator: Any, parameters: list[torch.Tensor]) -> None:
        parameters[0].grad.fill_(math.inf)

    monkeypatch.setattr(trainer_module, "sum_gradients", overflow)
    with pytest.raises(FloatingPointError, match=r"step 3: loss .*gradient norm (inf|nan)"):
        trainer.run()
    assert [step["skipped"] for step in steps_of(trainer.folder)] == [True, True]
    assert torch.equal(weights(trainer), before)


def test_a_loss_that_is_not_finite_is_an_error_at_once(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, gemma2, HALF)
    monkeypatch.setattr(step_module, "loss_sum", lambda logits, label: (logits * float("nan")).sum())
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan"):
        trainer.run()


def test_auto_is_resolved_before_it_is_used_and_saved(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2, "model.dtype=auto", "train.evaluate_every=0")
    first = run_fold(recipe, 0, tmp_path / "runs")
    card = json.loads((tmp_path / "runs/demo/fold0/model/judge.json").read_text())
    assert card["recipe"]["model"]["dtype"] == "bfloat16"
    assert "dtype: bfloat16" in (tmp_path / "runs/demo/fold0/recipe.yaml").read_text()
    assert run_fold(recipe, 0, tmp_path / "runs") == first  # and is known again


@pytest.mark.slow
def test_ranks_skip_alike(gemma2: Path, tmp_path: Path) -> None:
    """Two processes that share each step skip the same steps as one, and take the others alike."""
    recipe = tiny_recipe(tmp_path, gemma2, HALF, "model.quantization=none", "train.epochs=3")
    (tmp_path / "recipe.yaml").write_text(save_recipe(recipe), encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from arena.training import optimizer, run; from arena.config import "
        "load_recipe; optimizer.FIRST_SCALE = 2.0**24; run.run_fold(load_recipe(sys.argv[1]), 0, Path(sys.argv[2]))"
    )
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path.cwd())}
    for ranks in ("1", "2"):
        command = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", str(free_port())]
        command += [str(tmp_path / "train.py"), str(tmp_path / "recipe.yaml"), str(tmp_path / ranks)]
        subprocess.run([sys.executable, *command], check=True, env=environment, capture_output=True)
    one, two = (steps_of(tmp_path / ranks / "demo/fold0") for ranks in ("1", "2"))
    skipped = [step["skipped"] for step in one]
    assert any(skipped) and not all(skipped)
    assert [step["skipped"] for step in two] == skipped
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], rel=1e-2)
