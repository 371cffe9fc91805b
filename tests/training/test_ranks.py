"""Two processes that share each step train as one does: judges, and language models on instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from arena.config import save_recipe
from arena.data.prepare import prepare_fold
from arena.model.backbone import load_tokenizer
from arena.settings import Recipe
from arena.tasks import task_of
from arena.training.batches import plan_fold, step_targets
from arena.training.run import run_fold
from tests.helpers import tiny_recipe
from tests.tasks.test_instruction_run import tiny, write_dolly
from tests.training.test_trainer import free_port, log_lines, relative

# the commands of each rank, one after another, as starting processes takes longest; and what each made of the base
COMMANDS = """
import hashlib, json, os, sys
from accelerate.state import AcceleratorState
from arena import cli
from arena.inference.evaluate import Evaluation, share
from arena.training.held_out import HeldOut
rank, seen = os.environ["RANK"], []
def told(name):
    whole = getattr(HeldOut, name)
    def told(self, *args):
        found = whole(self, *args)
        if name == "predict_of_base" or "base" in args:
            seen.append([name, hashlib.sha256(found.tobytes()).hexdigest()])
        return found
    return told
HeldOut.predict_of_base, HeldOut.predict_as_given = told("predict_of_base"), told("predict_as_given")
shared, same = Evaluation.by_order, []
def both(self, classifier, **options):  # as all ranks together, and as this one alone
    found = shared(self, classifier, **options)
    alone = shared(self, classifier, **options | {"accelerator": None, "logits_cache": None})
    own = len(share(self.plan, int(rank), 2).examples)
    digests = [hashlib.sha256(each.tobytes()).hexdigest() for each in (found, alone)]
    same.append([digests[0] == digests[1], digests[0], own, len(self.plan.examples)])
    return found
Evaluation.by_order = both
_, runs, *recipes = sys.argv
leave = AcceleratorState.destroy_process_group
for recipe in recipes:  # all but the last leave the group of processes to the next
    AcceleratorState.destroy_process_group = leave if recipe == recipes[-1] else lambda self: None
    sys.argv = ["arena", "train", "--fold", "0", "--recipe", recipe, "--runs", runs]
    cli.main()
with open(f"{os.path.dirname(__file__)}/base{rank}.json", "w") as file:
    json.dump({"base": seen, "evaluations": same}, file)
"""


@dataclass(frozen=True)
class Runs:
    """Runs of two processes in `folder/shared`."""

    folder: Path
    judge: Recipe
    language_model: Recipe
    shown: str


@pytest.fixture(scope="module")
def runs(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("ranks")
    judge = tiny_recipe(folder, gemma2, "model.quantization=none", "train.epochs=2")
    language_model = tiny(folder, gemma2, write_dolly(folder / "dolly"), "train.epochs=1", "train.lr=1e-3")
    places = []
    for recipe in (judge, language_model):
        places.append(folder / f"{recipe.name}.yaml")
        places[-1].write_text(save_recipe(recipe), encoding="utf-8")
    (folder / "commands.py").write_text(COMMANDS, encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command += [str(folder / "commands.py"), str(folder / "shared"), *map(str, places)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return Runs(folder, judge, language_model, done.stdout)


def alone_and_shared(runs: Runs, recipe: Recipe) -> list[Path]:
    """The folder of the fold that one process trained, here, and of that of two."""
    run_fold(recipe, 0, runs.folder / "alone")
    return [runs.folder / kind / recipe.name / "fold0" for kind in ("alone", "shared")]


def of_steps(folders: list[Path], key: str) -> list[list[Any]]:
    return [[line[key] for line in log_lines(each / "log.jsonl") if key in line] for each in folders]


def test_two_ranks_equal_one(runs: Runs) -> None:
    """Two processes that share each step end with the same weights as one process, up to rounding."""
    folders = alone_and_shared(runs, runs.judge)
    one, two = (load_file(each / "model/adapter_model.safetensors") for each in folders)
    flat = [torch.cat([adapter[name].reshape(-1) for name in sorted(one)]) for adapter in (one, two)]
    assert one.keys() == two.keys()
    assert relative(flat[1], flat[0]) < 1e-4
    for key in ("loss", "grad_norm"):  # Adam would hide a gradient of the wrong scale, these do not
        alone, shared = of_steps(folders, key)
        assert shared == pytest.approx(alone, rel=1e-5)
    assert len(alone) == 10
    metrics = json.loads((folders[1] / "metrics.json").read_text())
    assert metrics["micro_batches"] % 2 == 0
    first = runs.shown.partition(f"{runs.language_model.name}, fold 0")[0]
    assert "2 processes" in first and "training prior" in first
    assert first.count("(metrics.json, oof.csv") == 1  # one rank speaks for all


def test_two_ranks_tune_on_instructions_as_one(runs: Runs) -> None:
    """The mean is over the targets of both, of which they mostly have different numbers: a mean of means is another."""
    folders, recipe = alone_and_shared(runs, runs.language_model), runs.language_model
    for key in ("loss", "grad_norm", "eval_log_loss"):
        alone, shared = of_steps(folders, key)
        assert shared == pytest.approx(alone, rel=1e-5)
    one, two = (json.loads((each / "metrics.json").read_text()) for each in folders)
    assert two["base_log_loss"] == pytest.approx(one["base_log_loss"], rel=1e-6)
    assert two["log_loss"] < 0.99 * two["base_log_loss"] and two["steps"] == 6
    data = prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(recipe.model.base))
    plan, targets = plan_fold(recipe, data, ranks=2), data.store.places.lengths
    shares = []
    for step in range(plan.n_steps):
        shares.append([int(targets[np.concatenate(plan.step(step, rank))].sum()) for rank in range(2)])
        assert sum(shares[-1]) == step_targets(plan, data, step)
    assert sum(first != second for first, second in shares[:-1]) == 4
    assert shares[-1] == [8, 0]  # its only row leaves one of them without any


def test_evaluations_are_shared_out(runs: Runs) -> None:
    """Each rank computes its micro-batches only, and has all predictions: those of one process alone, to the bit."""
    first, second = (json.loads((runs.folder / f"base{rank}.json").read_text())["evaluations"] for rank in (0, 1))
    assert len(first) > 4 and all(same for same, *_ in first + second)
    assert [digest for _, digest, *_ in first] == [digest for _, digest, *_ in second]
    assert all(one[2] + two[2] == one[3] for one, two in zip(first, second, strict=True))
    assert sum(0 < own < every for *_, own, every in first) > 2


def test_the_base_is_evaluated_once_and_agreed_on(runs: Runs) -> None:
    """By each rank, as it evaluates all weights; both then go by what the first one saved. Judges have no such base."""
    first, second = (json.loads((runs.folder / f"base{rank}.json").read_text())["base"] for rank in (0, 1))
    assert [name for name, _ in first] == ["predict_as_given", "predict_of_base"]
    assert first == second
