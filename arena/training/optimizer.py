"""The optimizer, the learning-rate schedule, and loss scaling.

Without loss scaling gradients vanish in float16 (Micikevicius et al., 2018, arXiv:1710.03740): the loss is multiplied
before the backward and the gradients are divided after it. The scale starts high; a step whose gradients overflow is
skipped and halves it, and many steps without overflow double it. Other dtypes need no scaling.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from arena.model.backbone import HEAD
from arena.settings import TrainSettings

FIRST_SCALE = 2.0**16
LEAST_SCALE = 1.0  # the gradients of a loss that is not scaled up must not overflow
GROW_AFTER = 2000  # steps without an overflow


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW over two parameter groups: the head, with its own learning rate and no weight decay, and the rest.

    A language model has no head of its own, and one group.
    """
    named = trainable(model)
    head = [parameter for name, parameter in named.items() if _is_head(name)]
    rest = [parameter for name, parameter in named.items() if not _is_head(name)]
    assert head or not any(_is_head(name) for name, _ in model.named_parameters()), "the head is frozen"
    groups: list[dict[str, Any]] = []
    if head:
        groups.append({"params": head, "lr": settings.head_lr, "weight_decay": 0.0})
    if rest:
        groups.append({"params": rest, "lr": settings.lr, "weight_decay": settings.weight_decay})
    if settings.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups)


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, n_steps: int) -> Any:
    """Linear warm-up, then the recipe's schedule, as transformers implements it."""
    warmup = round(settings.warmup * n_steps)
    return get_scheduler(settings.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=n_steps)


def _is_head(name: str) -> bool:
    return HEAD in name.split(".")


class LossScaling:
    """The scale of one run's loss; it has no effect for dtypes other than float16.

    Every rank has its own scale, and all stay equal: a step's gradients are summed over the ranks before they are
    unscaled, so a number that is not finite on one rank is not finite on any.

    Args:
        dtype: the run's autocast dtype.
    """

    def __init__(self, dtype: str, device: torch.device) -> None:
        self.on = dtype == "float16"
        self._scaler = torch.amp.GradScaler(
            device.type, init_scale=FIRST_SCALE, growth_interval=GROW_AFTER, enabled=self.on
        )  # fmt: skip
        if self.on:
            self._scaler.scale(torch.zeros((), device=device))  # a rank without a micro-batch needs a scale too
            # the schedule deliberately advances over a skipped first step
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

    @property
    def scale(self) -> float:
        """The factor of the loss; 1 without scaling."""
        return float(self._scaler.get_scale())

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss from which the backward starts."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients and notes whether all are finite; called once a step, after the sum over the ranks."""
        self._scaler.unscale_(optimizer)

    def forgives(self, loss: float, norm: float) -> bool:
        """Whether a step can be taken, or be skipped because a lower scale may still help."""
        return math.isfinite(loss) and (math.isfinite(norm) or (self.on and self.scale > LEAST_SCALE))

    def step(self, optimizer: torch.optim.Optimizer, norm: float) -> dict[str, Any]:
        """Takes the optimizer's step, or skips it if a gradient is not finite; then sets the next scale.

        Args:
            norm: of the unscaled gradients.

        Returns:
            Facts for the log: none without scaling, and no norm if the gradients have overflowed.
        """
        scale = self.scale
        self._scaler.step(optimizer)
        self._scaler.update()
        facts = {"loss_scale": scale, "skipped": self.scale < scale} if self.on else {}
        return facts if math.isfinite(norm) else {**facts, "grad_norm": None}

    def state(self) -> dict[str, Any]:
        """Plain JSON for `restore`; empty without scaling."""
        return dict(self._scaler.state_dict())

    def restore(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)
