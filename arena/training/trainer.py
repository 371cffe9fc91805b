"""The training loop: packed steps to an adapter, the best on the held-out fold kept, resumable at any checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from arena.background import ahead
from arena.config import Recipe
from arena.data.prepare import FoldData
from arena.distributed import device_name, first_rank, sum_gradients, total
from arena.judging.inference import predict
from arena.judging.shards import Shards
from arena.manifest import damage, read_manifest
from arena.metrics import log_loss
from arena.mirror.mirror import Mirror
from arena.model.backbone import attention_choice
from arena.model.base_files import base_digest
from arena.model.classifier import PackedClassifier
from arena.packing.batch import PackedBatch
from arena.packing.loader import PackedLoader
from arena.packing.tree import prefixes_for
from arena.progress import console, progress
from arena.stopping import Stop, Stopped
from arena.training.checkpoint import (
    Random,
    load_checkpoint,
    load_weights,
    random_states,
    save_checkpoint,
    set_random_states,
)
from arena.training.done import RUN_FILES, Done
from arena.training.failure import describe_failure, note_failure
from arena.training.folder import identity, require_same_run
from arena.training.log import LINE, RunLog
from arena.training.optim import make_optimizer, make_schedule, trainable
from arena.training.order import example_labels, plan_fold
from arena.training.probe import keep_what_fits
from arena.training.scaling import LossScaling
from arena.training.shelf import Shelf
from arena.training.step import accumulate
from arena.training.tracking import track


class Trainer:
    """One fold's training.

    Args:
        model: what `backbone.adapt` gave.
        folder: the run's folder; the log and the checkpoints go there.
        stop: asked between micro-batches whether the run is to end.
        mirror: where checkpoints go besides, on the first rank.

    Raises:
        ValueError: the recipe names an attention backend that cannot train here.
    """

    def __init__(
        self, recipe: Recipe, data: FoldData, model: nn.Module, folder: Path, accelerator: Accelerator,
        stop: Stop | None = None, mirror: Mirror | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.data, self.folder, self.accelerator = recipe, data, folder, accelerator
        self.device, self.alone = accelerator.device, accelerator.num_processes == 1
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
        base = base_digest(recipe.model.base, recipe.model.revision)
        base = base_digest(recipe.model.base, recipe.model.revision)
        self.pledge = identity(recipe, data.fingerprint, base) | {"plan": self.plan.fingerprint}
        self.stop, self.mirror = stop or Stop(), mirror
        self.shelf = Shelf(folder / "checkpoints", recipe.train.keep_last, recipe.train.keep_best)
        self.held_out: dict[int, float] = {}  # log-losses by step
        self.log = RunLog(folder / "log.jsonl", writes=accelerator.is_main_process)

    def run(self) -> Done:
        """Trains from a checkpoint, or the beginning, to the end; leaves the best weights in the model.

        Raises:
            Stopped: the run was asked to end; everything is saved, and the same call resumes from there.
            FloatingPointError: a loss, gradient or judgement is not finite; what was before it is saved.
        """
        self.resume()
        self.classifier.train()
        with progress("training", self.plan.n_steps, "steps", self.done.step) as advance:
            if self._evaluates() and self.done.step not in self.shelf.losses:  # it was ended before or within it
                self._save()  # where it resumes from a checkpoint that stands elsewhere
                self._evaluate()
            start = time.monotonic()
            for batch in ahead(self._loader()):
                self.done.waited += time.monotonic() - start
                facts = self._step(batch, start)
                self._after_step()
                advance(1, note=self._note(facts["loss"]))
                start = time.monotonic()
        self._take_best()
        return self.done

    def resume(self) -> None:
        """Goes on from the checkpoint that `train.resume` names, if there is one.

        Raises:
            ValueError: it belongs to another recipe, other data or another plan, or none is whole.
        """
        self._require_folder()
        mode = self.recipe.train.resume
        assert self.shelf.losses is not None  # read on all ranks before the first one writes
        self.accelerator.wait_for_everyone()
        found = None if mode == "never" else self.shelf.choose(mode)
        if found is not None:
            require_same_run(found, read_manifest(found)["pledge"], self.pledge, self.recipe)
            state = load_checkpoint(found, self.model, self.optimizer, self.schedule)
            self.scaling.restore(state["scaling"])
            self.done = Done(**state["done"])
            console.print(f"resuming after step {self.done.step:,} of {self.plan.n_steps:,} ({found})")
            if mode != "auto":
                self._on_main(lambda: self.shelf.leave_after(self.done.step))
                self.shelf.losses = {step: loss for step, loss in self.shelf.losses.items() if step <= self.done.step}
        self.log.cut(self.done.step)
        if self.done.step in self.shelf.losses and self.done.step not in self.log.evaluated():
            line = self.shelf.judgement(self.done.step)[0]["line"]
            self._log({key: line[key] for key in LINE})
        self.held_out = self.log.evaluated()

    def _note(self, loss: float) -> str:
        """The loss of the last step, and the held-out log-loss that was measured last."""
        held_out = f", held-out {self.held_out[max(self.held_out)]:.4f}" if self.held_out else ""
        return f"loss {loss:.4f}{held_out}"

    def _evaluates(self) -> bool:
        """Whether the held-out rows are judged after the step that was done last."""
        step, every = self.done.step, self.recipe.train.evaluate_every
        return step == self.plan.n_steps or (every > 0 and step > 0 and step % every == 0)

    def _after_step(self) -> None:
        if self._evaluates():
            self._save()  # before, so that a run that ends within an evaluation loses no step
            self._evaluate()
        elif self.done.step % self.recipe.train.checkpoint_every == 0:
            self._save()
        asked = float(self.stop())
        if total(self.accelerator, asked) > 0 and self.done.step < self.plan.n_steps:
            self._save()
            raise self.stop.stopped()

    def _take_best(self) -> None:
        """Leaves the best weights in the model, and what they made of the held-out rows."""
        best = self.shelf.best
        assert best is not None, "the last step is always judged"
        why = damage(self.shelf.step(best))
        if why is not None:
            raise ValueError(f"the best checkpoint was damaged since it was written ({why}): call again to judge anew")
        load_weights(self.shelf.step(best), self.model)
        self.judged = self.shelf.judgement(best)[1]

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
            Stopped: the run was asked to end within the step, which is begun anew when it resumes.
        """
        size, before = self.plan.step_size(self.done.step), random_states()
        device, dtype = self.device, self.recipe.model.dtype
        stop = self.stop if self.alone else None  # several ranks end after the same step
        try:
            loss = accumulate(self.classifier, batch, size, device, dtype, self.scaling, stop)
        except Stopped:
            self._give_up_step(before)
            raise
        parameters = list(trainable(self.model).values())
        sum_gradients(self.accelerator, parameters)
        self.scaling.unscale(self.optimizer)
        loss = total(self.accelerator, loss)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.train.max_grad_norm))
        if not self.scaling.forgives(loss, norm):
            self._give_up_step(before)
            rows = sorted({int(index) // self.data.store.orders for each in batch for index in each.index})
            failed = self.folder, self.done.step + 1, loss, norm, [self.data.ids[row] for row in rows]
            self._on_main(lambda: note_failure(*failed))
            raise FloatingPointError(describe_failure(*failed))
        facts = {"loss": loss, "grad_norm": norm, "lr": self.schedule.get_last_lr()[-1]}
        facts |= self.scaling.step(self.optimizer, norm)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._count(size, facts, time.monotonic() - start)

    def _give_up_step(self, before: Random) -> None:
        """Saves the run as it was before a step that was begun and not taken."""
        self.optimizer.zero_grad(set_to_none=True)
        set_random_states(before)
        self._save()

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
        """Judges the held-out rows in their given order, and keeps what came of it beside the checkpoint."""
        rows = self.data.eval_rows[self.data.judgeable[self.data.eval_rows]]
        recipe, step = self.recipe, self.done.step
        found = predict(
            self.classifier, self.data.store, rows,
            budget=recipe.packing.budget, orders=[0], dtype=recipe.model.dtype, prefixes=self.prefixes,
            title="evaluating", ids=self.data.ids, keep=self.keep("evaluation", step),
            stop=self.stop if self.alone else None,
        )  # fmt: skip
        loss = first_rank(self.accelerator, log_loss(self.data.labels[rows], found))
        best = min(self.shelf.losses.values(), default=math.inf)
        line = dict(zip(LINE, (step, loss, len(rows), loss < best), strict=True))
        self._on_main(lambda: self.shelf.judge(step, {"log_loss": loss, "line": line}, found))
        self.shelf.losses[step] = self.held_out[step] = loss
        self._log(line)
        if self.mirror is not None:
            if self.shelf.best == step:
                self.mirror.push(self.shelf.step(step), best=True)
            self.mirror.push(self.shelf.judged(step))
        self._on_main(self.shelf.tidy)

    def keep(self, name: str, step: int) -> Shards | None:
        """Where a judging by the weights of a checkpoint keeps what it has, to go on if it is ended; alone only."""
        if not self.alone:
            return None
        weights = read_manifest(self.shelf.step(step))["files"]["weights.safetensors"]["sha256"]
        return Shards(self.folder / "judging" / name, {**self.pledge, "weights": weights}, device_name(self.device))

    def _save(self) -> None:
        """Writes the checkpoint of the step that was done last, if it is not there."""
        target = self.shelf.step(self.done.step)
        self._require_folder()
        state = {"done": asdict(self.done), "pledge": self.pledge, "scaling": self.scaling.state()}

        def write() -> None:  # whether it is there the first rank decides alone: another might see it come
            if damage(target) is None:
                return
            save_checkpoint(target, self.model, self.optimizer, self.schedule, state)
            if self.mirror is not None:
                there = [self.folder / name for name in RUN_FILES if (self.folder / name).is_file()]
                self.mirror.push(target, files=there)
            self.shelf.tidy()

        self._on_main(write)

    def _require_folder(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is gone, and with it the run: nothing more can be saved there")

    def _on_main(self, work: Callable[[], None]) -> None:
        if self.accelerator.is_main_process:
            work()
        self.accelerator.wait_for_everyone()

    def _log(self, facts: dict[str, Any]) -> None:
        self.log.add(facts)
        track(self.accelerator, facts)
