"""The training loop: packed steps, evaluations on the held-out fold, checkpoints from which a run resumes exactly."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from arena.data.prepare import FoldData
from arena.distributed import reusing_memory
from arena.model.backbone import attention_choice
from arena.model.language_model import packed_model
from arena.model.sharding import is_sharded, place, whole
from arena.packing.batch import PackedBatch
from arena.packing.loader import PackedLoader
from arena.packing.tree import Prefixes
from arena.progress import ahead, console, progress
from arena.ranks import in_turns, on_first_rank, sum_gradients, together
from arena.settings import Recipe
from arena.stopping import Stop, Stopped
from arena.storage.manifest import damage, read_manifest
from arena.storage.mirror import Mirror
from arena.training.batches import due_after, epoch_size, plan_fold, step_targets, steps_fingerprint
from arena.training.checkpoint import Done, Random, load_weights, random_states, set_random_states
from arena.training.checkpoint_manager import ranking_by
from arena.training.held_out import HeldOut, Predictions
from arena.training.log import LINE, RunLog, track
from arena.training.optimizer import LossScaling, make_optimizer, make_schedule, trainable
from arena.training.probe import choose_policies
from arena.training.saving import Saving
from arena.training.step import accumulate, count_step, describe_failure, without_loss, write_failure


@dataclass(frozen=True)
class Trained:
    """What a finished training gives, besides the best weights in the model.

    Attributes:
        done: the size and time of the run.
        best_step: the step whose weights are the best.
        best: what these weights predict.
        last: what those of the last step predict, which were not chosen by their score on the same rows.
        base: float64 (n, C), what the base predicts; None if the task has classes.
    """

    done: Done
    best_step: int
    best: Predictions
    last: Predictions
    base: np.ndarray | None


class Trainer:
    """One fold's training.

    Args:
        model: as returned by `tuning.adapt`.
        folder: the run's folder, for the log and the checkpoints.
        prefixes: what the examples share (`prefixes_for`).
        identity: of the run (`run_identity`).
        accelerator: of the ranks that share each step and each evaluation.
        stop: is checked between micro-batches.
        mirror: where checkpoints are copied to, on the first rank.

    Raises:
        ValueError: the recipe names an attention backend that cannot train here.
    """

    def __init__(
        self, recipe: Recipe, data: FoldData, model: nn.Module, folder: Path, accelerator: Accelerator, *,
        prefixes: Prefixes | None, identity: dict[str, str], stop: Stop | None = None, mirror: Mirror | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.data, self.folder, self.accelerator = recipe, data, folder, accelerator
        self.device = accelerator.device
        self.model, self.classifier = model, packed_model(model)
        place(self.classifier, accelerator, recipe)
        self.attention = attention_choice(model, recipe.model.dtype, training=True)
        self.plan = plan_fold(recipe, data, accelerator.num_processes, prefixes)
        self.evaluate_after, self.save_after = (
            due_after(every, self.plan, epoch_size(recipe, data))
            for every in (recipe.train.evaluate_every, recipe.train.checkpoint_every)
        )
        self.optimizer = make_optimizer(model, recipe.train)
        self.schedule = make_schedule(self.optimizer, recipe.train, self.plan.n_steps)
        self.scaling = LossScaling(recipe.model.dtype, accelerator.device)
        self.done = Done()
        self.idle = without_loss(self._loader())
        self.recompute_plan = choose_policies(self.classifier, self._loader(), recipe)
        resume_fingerprint = identity | {"steps": steps_fingerprint(self.plan)}
        self.stop, self.mirror = stop or Stop(), mirror
        self.saving = Saving(
            recipe, folder, accelerator, model, self.optimizer, self.schedule, self.scaling,
            ranking=ranking_by(recipe.train.best_metric, data.task.metrics), resume_fingerprint=resume_fingerprint,
            mirror=mirror,
        )  # fmt: skip
        self.checkpoints = self.saving.checkpoints
        self.held_out = HeldOut(recipe, data, prefixes, accelerator, folder / "logits", resume_fingerprint)
        self.log = RunLog(folder / "log.jsonl", writes=accelerator.is_main_process)

    def run(self) -> Trained:
        """Trains from a checkpoint, or from the beginning, to the end; leaves the best weights in the model.

        Raises:
            Stopped: a stop was requested; everything is saved, and the same call resumes.
            FloatingPointError: a loss, gradient or logit is not finite; the run is saved as it was before.
        """
        base = None
        if not self.data.task.classes:
            base = self.held_out.predict_of_base(self.checkpoints.base, self.classifier, self.stop)
        self.resume()
        self.classifier.train()
        with (
            reusing_memory(self.device),
            progress("training", self.plan.n_steps, "steps", self.done.step) as advance,
        ):
            if self._evaluates() and self.done.step not in self.checkpoints.costs:  # stopped before or within it
                self.saving.save(self.done)  # in case the checkpoint it resumes from is in another folder
                self._evaluate()
            start = time.monotonic()
            for batch in ahead(self._loader()):
                self.done.waited += time.monotonic() - start
                facts = self._step(batch, start)
                self._after_step()
                advance(1, note=self._note(facts["loss"]))
                start = time.monotonic()
        return self._finish(base)

    def resume(self) -> None:
        """Resumes from the checkpoint that `train.resume` selects, if there is one.

        Raises:
            ValueError: it belongs to another recipe, other data or other steps, or no checkpoint is complete.
        """
        chosen = self.saving.choose()
        if chosen is not None:
            self.done = self.saving.load(chosen)
            console.print(f"resuming after step {self.done.step:,} of {self.plan.n_steps:,} ({chosen})")
        self.log.cut(self.done.step)
        if self.done.step in self.checkpoints.costs and self.done.step not in self.log.evaluations:
            line = self.checkpoints.load_evaluation(self.done.step)[0]["line"]
            self._log(dict.fromkeys(LINE) | line)  # in the order of an uninterrupted run

    def _note(self, loss: float) -> str:
        """The loss of the last step and the latest held-out log-loss."""
        evaluations = self.log.evaluations
        return f"loss {loss:.4f}" + (f", held-out {evaluations[max(evaluations)]:.4f}" if evaluations else "")

    def _evaluates(self) -> bool:
        """Whether the held-out rows are evaluated after the last completed step."""
        return self.done.step == self.plan.n_steps or self.done.step in self.evaluate_after

    def _after_step(self) -> None:
        if self._evaluates():
            self.saving.save(self.done)  # before, so that a run that ends within an evaluation loses no step
            self._evaluate()
        elif self.done.step in self.save_after:
            self.saving.save(self.done)
        if self.done.step == self.plan.n_steps:
            return
        try:
            together(self.accelerator, self._check_stop)
        except Stopped:
            self.saving.save(self.done)
            raise

    def _check_stop(self) -> None:
        if self.stop():
            raise self.stop.stopped()

    def _finish(self, base: np.ndarray | None) -> Trained:
        """Predicts the held-out rows in the orders that are left, and leaves the best weights in the model."""
        best, last = self.checkpoints.best, self.done.step
        assert best is not None, "the last step is always evaluated"
        why = damage(self.checkpoints.step(best))
        if why is not None:
            raise ValueError(f"the best checkpoint is damaged ({why}): run the same command again to evaluate anew")
        of_last = self._predictions(last) if best != last else None
        load_weights(self.checkpoints.step(best), self.model)
        of_best = self._predictions(best)
        return Trained(self.done, best, of_best, of_last or of_best, base)

    def _predictions(self, step: int) -> Predictions:
        """The predictions of an evaluated step, whose weights are in the model."""
        as_given = self.checkpoints.load_evaluation(step)[1]
        return self.held_out.predict_averaged(as_given, self.classifier, self._weights(step), self.stop)

    def _loader(self) -> PackedLoader:
        rank = self.accelerator.process_index
        pin = self.accelerator.device.type == "cuda"
        return PackedLoader(self.data.store, self.data.targets, self.plan, rank=rank, start=self.done.step, pin=pin)

    def _step(self, batch: list[PackedBatch], start: float) -> dict[str, Any]:
        """Takes one optimizer step; its time counts from `start`, before its data were loaded.

        In float16 a step whose gradients overflow changes no weight but counts as done: its examples are used, and the
        learning rate, which depends only on the position in the plan, advances.

        Raises:
            FloatingPointError: a number is not finite; no weight was changed.
            Stopped: a stop was requested within the step, which starts anew when the run resumes.
        """
        size, before = step_targets(self.plan, self.data, self.done.step), random_states()
        device, dtype = self.device, self.recipe.model.dtype
        try:
            joined = self.data.task if self.data.task.joins(self.recipe.prompt) else None
            options = size, device, dtype, self.scaling, self.stop, joined
            own, idle = (partial(accumulate, self.classifier, each, *options) for each in (batch, [self.idle]))
            loss = sum(together(self.accelerator, lambda: in_turns(self.classifier, own, idle)))
        except Stopped:
            self._give_up_step(before)
            raise
        parameters = list(trainable(self.model).values())
        if not is_sharded(self.classifier):  # the backward has summed them
            sum_gradients(self.accelerator, parameters)
        self.scaling.unscale(self.optimizer)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.train.max_grad_norm)))
        if not self.scaling.forgives(loss, norm):
            self._give_up_step(before)
            rows = np.unique(self.plan.step_examples(self.done.step) // self.data.store.orders).tolist()
            failed = self.folder, self.done.step + 1, loss, norm, [self.data.ids[row] for row in rows]
            on_first_rank(self.accelerator, lambda: write_failure(*failed))
            raise FloatingPointError(describe_failure(*failed))
        facts = {"loss": loss, "grad_norm": norm, "lr": self.schedule.get_last_lr()[-1]}
        facts |= self.scaling.step(self.optimizer, norm)
        self.schedule.step()
        facts = count_step(self.done, self.plan, facts, time.monotonic() - start)
        self._log(facts)  # with the step's gradients, for the tracker
        self.optimizer.zero_grad(set_to_none=True)
        return facts

    def _give_up_step(self, before: Random) -> None:
        """Saves the run as it was before a step that was started but not taken."""
        self.optimizer.zero_grad(set_to_none=True)
        set_random_states(before)
        self.saving.save(self.done)

    def _evaluate(self) -> None:
        """Evaluates the held-out rows as given and saves the result beside the checkpoint."""
        step, best = self.done.step, self.checkpoints.best
        probabilities = self.held_out.predict_as_given(self.classifier, self._weights(step), self.stop)
        scores = self.held_out.scores(probabilities)
        cost = self.checkpoints.ranking.cost(scores)
        is_best = best is None or cost < self.checkpoints.costs[best]
        line = dict(zip(LINE, (step, scores["log_loss"], len(self.held_out.scored), is_best), strict=True))
        line |= {f"eval_{name}": score for name, score in scores.items()}
        facts = {**scores, "line": line}
        on_first_rank(self.accelerator, lambda: self.checkpoints.save_evaluation(step, facts, probabilities))
        self.checkpoints.costs[step] = cost
        self._log(line)
        if self.mirror is not None:
            if is_best:
                self.mirror.push(self.checkpoints.step(step), best=True)
            self.mirror.push(self.checkpoints.evaluation(step))
        on_first_rank(self.accelerator, self.checkpoints.prune)

    def _weights(self, step: int) -> str:
        """The digest of a checkpoint's weights, for the cache of logits."""
        return str(read_manifest(self.checkpoints.step(step))["files"]["weights.safetensors"]["sha256"])

    def _log(self, facts: dict[str, Any]) -> None:
        self.log.add(facts)
        track(self.accelerator, facts, self.recipe.train.tracking, self.model)
