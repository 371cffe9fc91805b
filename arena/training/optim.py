"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from arena.config import TrainSettings
from arena.model.backbone import HEAD


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW over two parameter groups: the head, with its own learning rate and no weight decay, and the rest."""
    named = trainable(model)
    head = [parameter for name, parameter in named.items() if _is_head(name)]
    rest = [parameter for name, parameter in named.items() if not _is_head(name)]
    assert head, "the head is frozen"
    groups: list[dict[str, Any]] = [{"params": head, "lr": settings.head_lr, "weight_decay": 0.0}]
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
