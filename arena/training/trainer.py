"""The training loop: packed steps to an adapter, the best on the held-out fold kept, resumable at any checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from arena.background import ahead
from arena.config import Recipe
from arena.data.prepare import FoldData
from arena.distributed import compute_in, first_rank, sum_gradients, total
from arena.files import write_text
from arena.judging.inference import predict
from arena.metrics import log_loss
from arena.model.backbone import attention_choice
from arena.model.classifier import PackedClassifier, loss_sum
from arena.packing.batch import PackedBatch
from arena.packing.loader import PackedLoader
from arena.packing.plan import PackPlan, plan_training
from arena.packing.tree import Prefixes, prefixes_for
from arena.progress import progress
from arena.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    load_weights,
    read_state,
    save_checkpoint,
    save_weights,
)
from arena.training.optim import make_optimizer, make_schedule, trainable
from arena.training.order import example_labels, training_order
from arena.training.probe import keep_what_fits
from arena.training.scaling import LossScaling


@dataclass
class Done:
    """How far a run is; kept in every checkpoint."""

    step: int = 0
    tokens: int = 0
    unique_tokens: int = 0
    micro_batches: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of these seconds, for data
    best_step: int = -1
    best_log_loss: float | None = None


class Trainer:
    """One fold's training.

    Args:
        model: what `backbone.adapt` gave.
        folder: the run's folder; the log and the checkpoints go there.

    Raises:
        ValueError: the recipe names an attention backend that cannot train here.
    """

    def __init__(
        self, recipe: Recipe, data: FoldData, model: nn.Module, folder: Path, accelerator: Accelerator
    ) -> None:
        self.recipe, self.data, self.folder, self.accelerator = recipe, data, folder, accelerator
        self.model = model
        self.classifier = PackedClassifier(model).to(accelerator.device)
        self.attention = attention_choice(model, recipe.model.dtype, training=True)
        self.prefixes = prefixes_for(data.store, recipe.packing, Path(recipe.data.cache))
        self.plan = plan_fold(recipe, data, accelerator.num_processes, self.prefixes)
        self.optimizer = make_optimizer(model, recipe.train)
        self.schedule = make_schedule(self.optimizer, recipe.train, self.plan.n_steps)
        self.scaling = LossScaling(recipe.model.dtype, accelerator.device)
        self.done = Done()
        self.kept = keep_what_fits(self.classifier, self._loader(), recipe)
        self.judged: np.ndarray | None = None  # by the best weights, once trained: held-out rows in straight order
        self.pledge = {"data": data.fingerprint, "plan": self.plan.fingerprint}

    def run(self) -> Done:
        """Trains from the latest checkpoint, or the beginning, to the end; leaves the best weights in the model."""
        self.resume()
        self._start_log()
        settings = self.recipe.train
        self.classifier.train()
        with progress("training", self.plan.n_steps, "steps") as advance:
            advance(self.done.step)
            start = time.monotonic()
            for batch in ahead(self._loader()):
                self.done.waited += time.monotonic() - start
                facts = self._step(batch, start)
                advance(1, note=f"loss {facts['loss']:.4f}")
                last = self.done.step == self.plan.n_steps
                if last or (settings.evaluate_every and self.done.step % settings.evaluate_every == 0):
                    self._evaluate()
                    self._save()
                elif self.done.step % settings.checkpoint_every == 0:
                    self._save()
                start = time.monotonic()
        self.judged = load_weights(self.best_folder, self.model)
        return self.done

    def resume(self) -> None:
        """Goes on from the latest checkpoint, if there is one.

        Raises:
            ValueError: it belongs to other data or another plan.
        """
        found = checkpoints(self.folder / "checkpoints")
        if not found:
            return
        state = read_state(found[-1])
        changed = [name for name, value in self.pledge.items() if state["pledge"][name] != value]
        if changed:
            raise ValueError(
                f"{found[-1]} was made with another {' and '.join(changed)}: give the settings, files and "
                "number of processes of that run to go on with it, or --fresh to set it aside and train anew"
            )
        load_checkpoint(found[-1], self.model, self.optimizer, self.schedule)
        self.scaling.restore(state.get("scaling", {}))
        self.done = Done(**state["done"])

    @property
    def best_folder(self) -> Path:
        return self.folder / "checkpoints" / "best"

    def _loader(self) -> PackedLoader:
        labels = example_labels(self.data.labels, self.data.store)
        rank = self.accelerator.process_index
        pin = self.accelerator.device.type == "cuda"
        return PackedLoader(self.data.store, labels, self.plan, rank=rank, start=self.done.step, pin=pin)

    def _step(self, batch: list[PackedBatch], start: float) -> dict[str, Any]:
        """One optimizer step; its time counts from `start`, before its data were loaded.

        In float16 a step whose gradients overflow changes no weight, but counts as done: its examples are used up, and
        the learning rate goes on, which depends on the place in the plan alone.

        Raises:
            FloatingPointError: a number is not finite; no weight was changed.
        """
        size = self.plan.step_size(self.done.step)
        device, dtype = self.accelerator.device, self.recipe.model.dtype
        loss = accumulate(self.classifier, batch, size, device, dtype, self.scaling)
        parameters = list(trainable(self.model).values())
        sum_gradients(self.accelerator, parameters)
        self.scaling.unscale(self.optimizer)
        loss = total(self.accelerator, loss)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.train.max_grad_norm))
        if not self.scaling.forgives(loss, norm):
            rows = sorted({int(index) // self.data.store.orders for each in batch for index in each.index})
            raise FloatingPointError(
                f"step {self.done.step + 1}: loss {loss}, gradient norm {norm}; the step was not taken. "
                f"Rows of the step: {rows[:20]}. "
                "The checkpoints are intact; look at these rows, or train anew with a lower learning rate (--fresh)"
            )
        facts = {"loss": loss, "grad_norm": norm, "lr": self.schedule.get_last_lr()[-1]}
        facts |= self.scaling.step(self.optimizer, norm)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._count(size, facts, time.monotonic() - start)

    def _count(self, size: int, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Books a step and logs it with `facts` about it."""
        ends = self.plan.step_ends
        micro = slice(int(ends[self.done.step - 1]) if self.done.step else 0, int(ends[self.done.step]))
        unique, tokens = self.plan.tokens[micro], int(self.plan.logical_tokens[micro].sum())
        used = int((unique > 0).sum())
        self.done.step += 1
        self.done.tokens += tokens
        self.done.unique_tokens += int(unique.sum())
        self.done.micro_batches += used
        self.done.seconds += seconds
        facts = {
            "step": self.done.step, **facts, "examples": size,
            "micro_batches": used, "tokens": tokens, "unique_tokens": int(unique.sum()),
            "fill_rate": float(unique.sum() / (len(unique) * self.plan.budget)),
            "seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1),
        }  # fmt: skip
        self._log(facts)
        return facts

    def _evaluate(self) -> None:
        """Scores the held-out rows in their given order and keeps the weights if they are the best so far."""
        rows = self.data.eval_rows[self.data.judgeable[self.data.eval_rows]]
        recipe = self.recipe
        found = predict(
            self.classifier, self.data.store, rows,
            budget=recipe.packing.budget, orders=[0], dtype=recipe.model.dtype, prefixes=self.prefixes,
            title="evaluating",
        )  # fmt: skip
        loss = first_rank(self.accelerator, log_loss(self.data.labels[rows], found))
        better = self.done.best_log_loss is None or loss < self.done.best_log_loss
        if better:
            self.done.best_log_loss, self.done.best_step = loss, self.done.step
            facts = {"step": self.done.step, "log_loss": loss}
            self._on_main(lambda: save_weights(self.best_folder, self.model, facts, found))
        self._log({"step": self.done.step, "eval_log_loss": loss, "eval_rows": len(rows), "best": better})

    def _save(self) -> None:
        state = {"done": asdict(self.done), "pledge": self.pledge, "scaling": self.scaling.state()}
        self._on_main(
            lambda: save_checkpoint(
                self.folder / "checkpoints", self.done.step, self.model, self.optimizer, self.schedule, state
            )
        )

    def _on_main(self, work: Callable[[], None]) -> None:
        if self.accelerator.is_main_process:
            work()
        self.accelerator.wait_for_everyone()

    def _start_log(self) -> None:
        """Drops the lines that an interrupted run wrote after its last checkpoint: those steps are done again."""
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= self.done.step]
        self._on_main(lambda: write_text(path, "".join(line + "\n" for line in kept)))

    def _log(self, facts: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")
        tracked = {key: value for key, value in facts.items() if key != "step" and value is not None}
        self.accelerator.log(tracked, step=facts["step"])


def plan_fold(recipe: Recipe, data: FoldData, ranks: int = 1, prefixes: Prefixes | None = None) -> PackPlan:
    """The plan of a whole training: the same for the same recipe and data.

    Args:
        prefixes: what the store's examples share (`prefixes_for`); looked up where not given.
    """
    settings = recipe.train
    order = training_order(
        data.train_rows, data.store.orders, epochs=settings.epochs, swap=settings.swap, seed=recipe.seed
    )
    return plan_training(
        data.store.lengths, order, step_size=settings.batch_size, budget=recipe.packing.budget, ranks=ranks,
        prefixes=prefixes or prefixes_for(data.store, recipe.packing, Path(recipe.data.cache)),
    )  # fmt: skip


def accumulate(
    classifier: nn.Module, batch: list[PackedBatch], size: int, device: torch.device, dtype: str,
    scaling: LossScaling | None = None,
) -> float:  # fmt: skip
    """Adds the gradient of the step's mean loss, a micro-batch at a time, and gives this rank's share of that loss.

    Each micro-batch's summed loss is divided by `size`, the examples of the whole step over all its micro-batches and
    ranks, so that the gradient does not depend on how the step was cut. With `scaling` it is scaled up,
    the loss that is given is not.
    """
    sums: list[Tensor] = []
    for micro_batch in batch:
        placed = micro_batch.to(device)
        with compute_in(device, dtype):
            logits = classifier(placed)
        loss = loss_sum(logits, placed.label) / size
        (loss if scaling is None else scaling.scaled(loss)).backward()
        sums.append(loss.detach())
    return float(torch.stack(sums).sum()) if sums else 0.0


def _step_of(line: str) -> float:
    """The step of a line of the log; infinity for a line that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf
