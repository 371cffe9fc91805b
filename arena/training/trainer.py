"""The training loop: packed steps, evaluations on the held-out fold, checkpoints from which a run resumes exactly."""

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
from arena.inference.evaluate import predict
from arena.inference.logits_cache import LogitsCache
from arena.metrics import log_loss
from arena.model.backbone import attention_choice
from arena.model.base_files import base_digest
from arena.model.classifier import PackedClassifier
from arena.packing.batch import PackedBatch
from arena.packing.loader import PackedLoader
from arena.packing.tree import prefixes_for
from arena.progress import console, progress
from arena.stopping import Stop, Stopped
from arena.storage.manifest import damage, read_manifest
from arena.storage.mirror import Mirror
from arena.training.checkpoint import (
    Done,
    Random,
    load_checkpoint,
    load_weights,
    random_states,
    save_checkpoint,
    set_random_states,
)
from arena.training.checkpoint_manager import CheckpointManager
from arena.training.log import LINE, RunLog
from arena.training.optim import make_optimizer, make_schedule, trainable
from arena.training.order import example_labels, plan_fold
from arena.training.probe import choose_policies
from arena.training.run_directory import RUN_FILES, require_same_run, run_identity
from arena.training.scaling import LossScaling
from arena.training.step import accumulate, describe_failure, write_failure
from arena.training.tracking import track


class Trainer:
    """One fold's training.

    Args:
        model: as returned by `tuning.adapt`.
        folder: the run's folder, for the log and the checkpoints.
        stop: is checked between micro-batches.
        mirror: where checkpoints are copied to, on the first rank.

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
        self.recompute_plan = choose_policies(self.classifier, self._loader(), recipe)
        self.held_out_probabilities: np.ndarray | None = None  # by the best weights, in straight order, once trained
        base = base_digest(recipe.model.base, recipe.model.revision)
        self.resume_fingerprint = run_identity(recipe, data.fingerprint, base) | {"plan": self.plan.fingerprint}
        self.stop, self.mirror = stop or Stop(), mirror
        self.checkpoints = CheckpointManager(folder / "checkpoints", recipe.train.keep_last, recipe.train.keep_best)
        self.held_out: dict[int, float] = {}  # log-losses by step
        self.log = RunLog(folder / "log.jsonl", writes=accelerator.is_main_process)

    def run(self) -> Done:
        """Trains from a checkpoint, or from the beginning, to the end; leaves the best weights in the model.

        Raises:
            Stopped: a stop was requested; everything is saved, and the same call resumes.
            FloatingPointError: a loss, gradient or logit is not finite; the run is saved as it was before.
        """
        self.resume()
        self.classifier.train()
        with progress("training", self.plan.n_steps, "steps", self.done.step) as advance:
            if self._evaluates() and self.done.step not in self.checkpoints.losses:  # stopped before or within it
                self._save()  # in case the checkpoint it resumes from is in another folder
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
        """Resumes from the checkpoint that `train.resume` selects, if there is one.

        Raises:
            ValueError: it belongs to another recipe, other data or another plan, or no checkpoint is complete.
        """
        self._require_folder()
        mode = self.recipe.train.resume
        assert self.checkpoints.losses is not None  # read on all ranks before the first one writes
        self.accelerator.wait_for_everyone()
        chosen = None if mode == "never" else self.checkpoints.choose(mode)
        if chosen is not None:
            require_same_run(chosen, read_manifest(chosen)["resume_fingerprint"], self.resume_fingerprint, self.recipe)
            state = load_checkpoint(chosen, self.model, self.optimizer, self.schedule)
            self.scaling.restore(state["scaling"])
            self.done = Done(**state["done"])
            console.print(f"resuming after step {self.done.step:,} of {self.plan.n_steps:,} ({chosen})")
            if mode != "auto":
                self._on_main(lambda: self.checkpoints.archive_after(self.done.step))
                losses = self.checkpoints.losses.items()
                self.checkpoints.losses = {step: loss for step, loss in losses if step <= self.done.step}
        self.log.cut(self.done.step)
        if self.done.step in self.checkpoints.losses and self.done.step not in self.log.evaluated():
            line = self.checkpoints.load_evaluation(self.done.step)[0]["line"]
            self._log({key: line[key] for key in LINE})
        self.held_out = self.log.evaluated()

    def _note(self, loss: float) -> str:
        """The loss of the last step and the latest held-out log-loss."""
        held_out = f", held-out {self.held_out[max(self.held_out)]:.4f}" if self.held_out else ""
        return f"loss {loss:.4f}{held_out}"

    def _evaluates(self) -> bool:
        """Whether the held-out rows are evaluated after the last completed step."""
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
        """Loads the best weights into the model, along with their held-out predictions."""
        best = self.checkpoints.best
        assert best is not None, "the last step is always evaluated"
        why = damage(self.checkpoints.step(best))
        if why is not None:
            raise ValueError(f"the best checkpoint is damaged ({why}): run the same command again to evaluate anew")
        load_weights(self.checkpoints.step(best), self.model)
        self.held_out_probabilities = self.checkpoints.load_evaluation(best)[1]

    def _loader(self) -> PackedLoader:
        labels = example_labels(self.data.labels, self.data.store)
        rank = self.accelerator.process_index
        pin = self.accelerator.device.type == "cuda"
        return PackedLoader(self.data.store, labels, self.plan, rank=rank, start=self.done.step, pin=pin)

    def _step(self, batch: list[PackedBatch], start: float) -> dict[str, Any]:
        """Takes one optimizer step; its time counts from `start`, before its data were loaded.

        In float16 a step whose gradients overflow changes no weight but counts as done: its examples are used, and the
        learning rate, which depends only on the position in the plan, advances.

        Raises:
            FloatingPointError: a number is not finite; no weight was changed.
            Stopped: a stop was requested within the step, which starts anew when the run resumes.
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
            self._on_main(lambda: write_failure(*failed))
            raise FloatingPointError(describe_failure(*failed))
        facts = {"loss": loss, "grad_norm": norm, "lr": self.schedule.get_last_lr()[-1]}
        facts |= self.scaling.step(self.optimizer, norm)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._count(size, facts, time.monotonic() - start)

    def _give_up_step(self, before: Random) -> None:
        """Saves the run as it was before a step that was started but not taken."""
        self.optimizer.zero_grad(set_to_none=True)
        set_random_states(before)
        self._save()

    def _count(self, size: int, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Counts a step and logs it along with `facts`."""
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
        """Evaluates the held-out rows in their given order and saves the result beside the checkpoint."""
        rows = self.data.eval_rows[self.data.has_responses[self.data.eval_rows]]
        recipe, step = self.recipe, self.done.step
        found = predict(
            self.classifier, self.data.store, rows,
            budget=recipe.packing.budget, orders=[0], dtype=recipe.model.dtype, prefixes=self.prefixes,
            title="evaluating", ids=self.data.ids, logits_cache=self.logits_cache("evaluation", step),
            stop=self.stop if self.alone else None,
        )  # fmt: skip
        loss = first_rank(self.accelerator, log_loss(self.data.labels[rows], found))
        best = min(self.checkpoints.losses.values(), default=math.inf)
        line = dict(zip(LINE, (step, loss, len(rows), loss < best), strict=True))
        self._on_main(lambda: self.checkpoints.save_evaluation(step, {"log_loss": loss, "line": line}, found))
        self.checkpoints.losses[step] = self.held_out[step] = loss
        self._log(line)
        if self.mirror is not None:
            if self.checkpoints.best == step:
                self.mirror.push(self.checkpoints.step(step), best=True)
            self.mirror.push(self.checkpoints.evaluation(step))
        self._on_main(self.checkpoints.prune)

    def logits_cache(self, name: str, step: int) -> LogitsCache | None:
        """The cache from which an evaluation of a checkpoint's weights resumes; None with several processes."""
        if not self.alone:
            return None
        weights = read_manifest(self.checkpoints.step(step))["files"]["weights.safetensors"]["sha256"]
        identity = {**self.resume_fingerprint, "weights": weights}
        return LogitsCache(self.folder / "logits" / name, identity, device_name(self.device))

    def _save(self) -> None:
        """Writes the checkpoint of the last completed step, unless it exists."""
        target = self.checkpoints.step(self.done.step)
        self._require_folder()
        state = {"done": asdict(self.done), "scaling": self.scaling.state()}
        state["resume_fingerprint"] = self.resume_fingerprint

        def write() -> None:  # only the first rank checks, as others might see the checkpoint appear
            if damage(target) is None:
                return
            save_checkpoint(target, self.model, self.optimizer, self.schedule, state)
            if self.mirror is not None:
                there = [self.folder / name for name in RUN_FILES if (self.folder / name).is_file()]
                self.mirror.push(target, files=there)
            self.checkpoints.prune()

        self._on_main(write)

    def _require_folder(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} was removed while the run was using it: nothing can be saved there")

    def _on_main(self, work: Callable[[], None]) -> None:
        if self.accelerator.is_main_process:
            work()
        self.accelerator.wait_for_everyone()

    def _log(self, facts: dict[str, Any]) -> None:
        self.log.add(facts)
        track(self.accelerator, facts)
