"""Ways of fine-tuning side by side: what trains, how long it takes, what it holds, and how well it judges in the end.

Each is a run of `run_fold` over the same rows in the same order, for equally many steps, in a process of its own, so
that what one leaves in memory does not count for the next. `technique_report` writes the page.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from arena.config import change
from arena.data.prepare import prepare_fold
from arena.demo.synthetic import ensure_demo
from arena.model.backbone import load_tokenizer
from arena.packing.tree import prefixes_for
from arena.settings import Recipe
from arena.storage.files import fingerprint, write_json
from arena.tasks import task_of
from arena.training.batches import plan_fold
from arena.training.run import run_fold
from benchmarks.parts import Parts, Result, failed
from benchmarks.timing import reset_peak

FOLD = 0
SWEEP_SHARE = 4  # a sweep takes the steps of the table over this
KEPT = (
    "trainable_parameters", "train_seconds", "tokens_per_second", "steps", "tokens", "log_loss", "prior_log_loss",
    "bayes_log_loss", "n_train", "n_eval", "device", "attention_backend",
)  # fmt: skip


@dataclass(frozen=True)
class Technique:
    """One way of fine-tuning.

    Attributes:
        tune, quantization, dora: of the model, whose other settings are the recipe's.
        lr: times the recipe's `train.lr`, which is one for adapters.
        head_lr: times the recipe's `train.head_lr`.
    """

    tune: Literal["lora", "head", "full"] = "lora"
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    dora: bool = False
    lr: float = 1.0
    head_lr: float = 1.0

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe that trains this way. It is evaluated at its end alone: no technique gets more chances."""
        lr, head_lr = self.lr * recipe.train.lr, self.head_lr * recipe.train.head_lr
        return change(
            recipe,
            [
                f"model.tune={self.tune}", f"model.quantization={self.quantization}", f"model.lora.dora={self.dora}",
                f"train.lr={lr:.6g}", f"train.head_lr={head_lr:.6g}", "train.evaluate_every=0", "train.track=none",
            ],
        )  # fmt: skip


TECHNIQUES: Mapping[str, Technique] = {
    "QLoRA, NF4": Technique(),
    "LoRA, unquantised": Technique(quantization="none"),
    "LoRA, int8": Technique(quantization="int8"),
    "DoRA, NF4": Technique(dora=True),
    "head only, NF4": Technique("head"),
    "full fine-tuning": Technique("full", "none", lr=0.1),
}
# what the rates of these two were chosen from; adapters have the rate of the recipe
SWEEP: Mapping[str, Technique] = {
    **{f"full fine-tuning, lr x {factor}": Technique("full", "none", lr=factor) for factor in (0.03, 0.1, 0.3)},
    **{f"head only, NF4, head_lr x {factor}": Technique("head", head_lr=factor) for factor in (0.25, 1.0, 4.0)},
}


def run_techniques(
    recipe: Recipe, steps: int | None, folder: Path, techniques: Mapping[str, Technique] = TECHNIQUES
) -> list[Result]:
    """Trains fold 0 each way, one after another. Called again with the same folder it goes on where it was.

    Args:
        recipe: its data, base, seed and adapters' learning rates are those of all.
        steps: optimizer steps of each; None takes the recipe's own number.
        folder: a JSON for each way that is done; runs while they are made.

    Returns:
        A row for each: `technique`, `lr` and `head_lr`, what `KEPT` names of the run's metrics, and `peak_bytes`, the
        most that was held above what the process held before (None where the machine does not say). A way that cannot
        be trained here has `status` "failed" and a `reason` in place of figures.

    Raises:
        ValueError: the recipe's data or base cannot be used, or the folder holds results of something else.
    """
    recipe = in_steps(recipe, steps)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    parts = Parts(folder, {"recipe": fingerprint(recipe.model_dump(mode="json")), "device": device})
    parts.forget("failed")
    rows = []
    for name, technique in techniques.items():
        own = technique.of(recipe)
        key = f"{name}, {fingerprint(own.model_dump(mode='json'))}"  # so that a rate that is changed is tried anew
        result = parts.do(key, partial(in_process, own, folder / "runs"))
        rows.append({"technique": name, **result})
    return rows


def in_steps(recipe: Recipe, steps: int | None) -> Recipe:
    """The recipe with the epochs that make `steps` whole steps. Its rows and tokens are prepared by this, for all."""
    ensure_demo(recipe)
    data = prepare_fold(recipe, task_of(recipe), FOLD, load_tokenizer(recipe.model.base, recipe.model.revision))
    prefixes = prefixes_for(data.store, recipe.packing, Path(recipe.data.cache))
    if steps is None:
        return recipe
    if steps < 1:
        raise ValueError(f"steps ({steps}): a technique needs one step at least")
    of_an_epoch = len(data.train_rows) * (2 if recipe.train.swap == "both" else 1)
    found = change(recipe, [f"train.epochs={steps * recipe.train.batch_size / of_an_epoch}"])
    assert plan_fold(found, data, prefixes=prefixes).n_steps == steps
    return found


def measure_technique(recipe: Recipe, runs: Path) -> Result:
    """One run, in this process, which should be a fresh one. Its folder is removed in the end."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = reset_peak(device)
    metrics = run_fold(recipe, FOLD, runs)
    shutil.rmtree(runs)
    return {
        "status": "done",
        "lr": recipe.train.lr,
        "head_lr": recipe.train.head_lr,
        "peak_bytes": None if before is None else metrics["peak_memory_bytes"] - before,
        **{key: metrics[key] for key in KEPT},
    }


def in_process(recipe: Recipe, runs: Path) -> Result:
    """`measure_technique` in a process of its own, which ends with this one's wait for it; errors are results too."""
    place = runs / fingerprint(recipe.model_dump(mode="json"))  # an interrupted run is resumed
    place.mkdir(parents=True, exist_ok=True)
    found = place / "result.json"
    process = multiprocessing.get_context("spawn").Process(target=_measure_into, args=(found, recipe, place))
    process.start()
    try:
        process.join()
    finally:
        if process.is_alive():  # a signal or the clock ended the wait
            process.kill()
            process.join()
    if not found.is_file():
        return failed(f"its process ended with status {process.exitcode}")
    result: Result = json.loads(found.read_text(encoding="utf-8"))
    shutil.rmtree(place)
    return result


def _measure_into(found: Path, recipe: Recipe, runs: Path) -> None:
    try:
        result = measure_technique(recipe, runs / "run")
    except (ValueError, RuntimeError, FloatingPointError) as error:
        result = failed(f"{type(error).__name__}: {error}")
    write_json(found, result)
