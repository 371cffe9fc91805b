"""The attention backends, and the choice of one by a recipe's `model.attention` and the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arena.model.attention import blockwise, flash, flex, reference
from arena.model.card import Card


@dataclass(frozen=True)
class Backend:
    """A backend's two functions.

    Attributes:
        attend: computes attention; see `varlen_attention`.
        supports: why it cannot run on a card with a dtype of the products, a head size, a softcap and gradients, in a
            few words; None if it can.
    """

    attend: Callable[..., Tensor]
    supports: Callable[[Card, torch.dtype, int, float | None, bool], str | None]


BACKENDS = {
    "flash": Backend(flash.flash, flash.supports),
    "flex": Backend(flex.flex, flex.supports),
    "blockwise": Backend(blockwise.blockwise, blockwise.supports),
    "reference": Backend(reference.reference, reference.supports),
}
BEST = {"cuda": ("flash", "flex", "blockwise"), "cpu": ("blockwise",)}  # `auto` chooses the first that can run


@dataclass(frozen=True)
class Choice:
    """A backend, and the reason for the choice in one line."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_backend(
    setting: str, card: Card, dtype: torch.dtype, head_dim: int, softcap: float | None, *, training: bool = False
) -> Choice:
    """The backend for a value of `model.attention`.

    Args:
        setting: a backend's name, or `auto`: the fastest that can run.
        dtype: of the products.
        training: whether gradients will be needed.

    Raises:
        ValueError: the named backend cannot run here.
    """
    needs = card, dtype, head_dim, softcap
    if setting != "auto":
        why = BACKENDS[setting].supports(*needs, training)
        if why is not None:
            instead = choose_backend("auto", *needs, training=training).name
            raise ValueError(
                f"model.attention={setting} cannot run here: {why}. Set model.attention=auto, which is {instead} here"
            )
        return Choice(setting, f"model.attention={setting}")
    passed_over: list[str] = []
    for name in BEST[card.kind]:
        why = BACKENDS[name].supports(*needs, training)
        if why is None:
            return Choice(name, "; ".join(passed_over) or f"the fastest on {card.kind}")
        passed_over.append(f"{name}: {why}")
    raise AssertionError("blockwise runs everywhere")
