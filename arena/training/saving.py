"""Saving a run between two steps and resuming it: the first rank writes, and the mirror gets a copy."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from arena.model.sharding import whole
from arena.ranks import on_every_rank, on_first_rank, together
from arena.settings import Recipe
from arena.storage.manifest import damage, read_manifest
from arena.storage.mirror import Mirror
from arena.training.checkpoint import Done, load_checkpoint, random_states, save_checkpoint
from arena.training.checkpoint_manager import CheckpointManager, Ranking
from arena.training.optimizer import LossScaling, trainable
from arena.training.run_directory import RUN_FILES, require_same_run


class Saving:
    """A run's checkpoints, and the parts of the run that they hold.

    Args:
        folder: the run's folder.
        ranking: of evaluated checkpoints.
        resume_fingerprint: what identifies the run and its steps; checkpoints with another one are refused.
        mirror: where checkpoints are copied to, on the first rank.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, accelerator: Accelerator, model: nn.Module,
        optimizer: torch.optim.Optimizer, schedule: Any, scaling: LossScaling, *,
        ranking: Ranking, resume_fingerprint: dict[str, str], mirror: Mirror | None,
    ) -> None:  # fmt: skip
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.model, self.optimizer, self.schedule, self.scaling = model, optimizer, schedule, scaling
        self.resume_fingerprint, self.mirror = resume_fingerprint, mirror
        keep = recipe.train.keep_last, recipe.train.keep_best
        self.checkpoints = CheckpointManager(folder / "checkpoints", *keep, ranking)

    def choose(self) -> Path | None:
        """The checkpoint that `train.resume` selects, if there is one.

        Raises:
            ValueError: there are checkpoints, but none is complete, or the requested one is not.
        """
        self._require_folder()
        mode = self.recipe.train.resume

        def choose() -> tuple[dict[int, float], Path | None]:
            return self.checkpoints.costs, None if mode == "never" else self.checkpoints.choose(mode)

        self.checkpoints.costs, chosen = together(self.accelerator, choose)[0]
        return chosen

    def load(self, checkpoint: Path) -> Done:
        """Restores the run as a checkpoint holds it; later checkpoints are archived if it was not the latest.

        Raises:
            ValueError: it belongs to another recipe, other data or other steps, or is damaged.
        """
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes

        def load() -> dict[str, Any]:
            saved = read_manifest(checkpoint)["resume_fingerprint"]
            require_same_run(checkpoint, saved, self.resume_fingerprint, self.recipe)
            return load_checkpoint(checkpoint, self.model, self.optimizer, self.schedule, rank=rank, ranks=ranks)

        state = on_every_rank(self.accelerator, load)
        self.scaling.restore(state["scaling"])
        done = Done(**state["done"])
        if self.recipe.train.resume != "auto":
            on_first_rank(self.accelerator, lambda: self.checkpoints.archive_after(done.step))
            costs = self.checkpoints.costs.items()
            self.checkpoints.costs = {step: cost for step, cost in costs if step <= done.step}
        return done

    def save(self, done: Done) -> None:
        """Writes the checkpoint of the last completed step, unless it exists."""
        target = self.checkpoints.step(done.step)
        self._require_folder()
        state = {"done": asdict(done), "scaling": self.scaling.state()}
        state["resume_fingerprint"] = self.resume_fingerprint
        random_of_ranks = together(self.accelerator, random_states)
        weights, optimizer = on_every_rank(self.accelerator, self._trained)

        def write() -> None:  # only the first rank checks, as others might see the checkpoint appear
            if damage(target) is None:
                return
            save_checkpoint(target, weights, optimizer, self.schedule, state, random_of_ranks=random_of_ranks)
            if self.mirror is not None:
                there = [self.folder / name for name in RUN_FILES if (self.folder / name).is_file()]
                self.mirror.push(target, files=there)
            self.checkpoints.prune()

        on_first_rank(self.accelerator, write)

    def _trained(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The trained weights and the optimizer's state, on the first rank as whole tensors."""
        keep = self.accelerator.is_main_process
        state = self.optimizer.state_dict() if self.recipe.train.save_optimizer else None
        return whole(trainable(self.model), keep), whole(state, keep)

    def _require_folder(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder} was removed while the run was using it: nothing can be saved there; "
                "run the same command again, which begins anew"
            )
