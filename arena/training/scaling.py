"""Loss scaling, without which gradients vanish in float16 (Micikevicius et al., 2018, arXiv:1710.03740).

The loss is multiplied before the backward and the gradients divided after it. The scale starts high, is halved by each
step whose gradients overflow, which is skipped, and doubled after many that do not. Other dtypes need none of this.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

FIRST = 2.0**16
LEAST = 1.0  # the gradients of a loss that is not scaled up must not overflow
GROW_AFTER = 2000  # steps without an overflow


class LossScaling:
    """The scale of one run's loss; for any dtype but float16 it changes nothing.

    Every rank has its own, and all stay equal: a step's gradients are summed over the ranks before they are unscaled,
    so that what is not finite on one is not finite on any.

    Args:
        dtype: of the run's autocast.
    """

    def __init__(self, dtype: str, device: torch.device) -> None:
        self.on = dtype == "float16"
        self._scaler = torch.amp.GradScaler(
            device.type, init_scale=FIRST, growth_interval=GROW_AFTER, enabled=self.on
        )  # fmt: skip
        if self.on:
            self._scaler.scale(torch.zeros((), device=device))  # a rank without a micro-batch has a scale all the same
            # the schedule goes on over a skipped first step, on purpose
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

    @property
    def scale(self) -> float:
        """By which the loss is multiplied; 1 without scaling."""
        return float(self._scaler.get_scale())

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to start the backward from."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients, and notes whether all are finite. Once a step, after the sum over the ranks."""
        self._scaler.unscale_(optimizer)

    def forgives(self, loss: float, norm: float) -> bool:
        """Whether a step may go on: to be taken, or, where a lower scale may still help, to be skipped."""
        return math.isfinite(loss) and (math.isfinite(norm) or (self.on and self.scale > LEAST))

    def step(self, optimizer: torch.optim.Optimizer, norm: float) -> dict[str, Any]:
        """Takes the optimizer's step, or skips it where a gradient is not finite; then sets the next scale.

        Args:
            norm: of the unscaled gradients.

        Returns:
            What the log is to say of it: nothing without scaling, and no norm of gradients that have overflowed.
        """
        scale = self.scale
        self._scaler.step(optimizer)
        self._scaler.update()
        facts = {"loss_scale": scale, "skipped": self.scale < scale} if self.on else {}
        return facts if math.isfinite(norm) else {**facts, "grad_norm": None}

    def state(self) -> dict[str, Any]:
        """Plain JSON that `restore` takes; empty without scaling."""
        return dict(self._scaler.state_dict())

    def restore(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)
