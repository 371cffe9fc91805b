"""The device that a model runs on: its kind, its memory, and the dtype that a run computes in there."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from arena.settings import Recipe

Kind = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Card:
    """The properties of a device that choices depend on, as returned by `card_of` or made up.

    Attributes:
        name: the manufacturer's name.
        capability: CUDA compute capability, such as (9, 0); (0, 0) on a CPU.
        memory: total bytes, used or not.
        shared: bytes of shared memory that a block of threads may use; None: unknown.
        index: its index among the CUDA devices; None for a CPU and for a made-up card.
    """

    kind: Kind
    name: str
    capability: tuple[int, int]
    memory: int
    shared: int | None = None
    index: int | None = None

    @property
    def bfloat16(self) -> bool:
        """Whether bfloat16 products are supported: on a GPU from Ampere on, and on any CPU."""
        return self.kind == "cpu" or self.capability >= (8, 0)


def card_of(device: torch.device | str) -> Card:
    """The properties of a torch device.

    Raises:
        ValueError: it is neither a CUDA device nor a CPU.
    """
    resolved = torch.device(device)
    if resolved.type == "cpu":
        return _cpu()
    if resolved.type == "cuda":
        return _cuda(torch.cuda.current_device() if resolved.index is None else resolved.index)
    raise ValueError(f"device {resolved}: this package runs on CUDA devices and CPUs")


def product_dtype(*states: Tensor) -> torch.dtype:
    """The dtype of products: autocast's if it is on, as in torch's own attention, or else the widest dtype."""
    device = states[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype = states[0].dtype
    for each in states[1:]:
        dtype = torch.promote_types(dtype, each.dtype)
    return dtype


def resolve_dtype(setting: str, card: Card) -> str:
    """The dtype that a model computes in on a card: `bfloat16`, `float16` or `float32`.

    Args:
        setting: `model.dtype` of a recipe; `auto` is bfloat16 if the card supports it, else float16.

    Raises:
        ValueError: the card does not support bfloat16.
    """
    if setting == "auto":
        return "bfloat16" if card.bfloat16 else "float16"
    if setting == "bfloat16" and not card.bfloat16:
        raise ValueError(
            f"model.dtype is bfloat16, which {card.name} (compute capability {card.capability[0]}."
            f"{card.capability[1]}) does not support: pass model.dtype=float16"
        )
    return setting


def with_dtype(recipe: Recipe, card: Card) -> Recipe:
    """The recipe with its dtype resolved for a card. Raises the same errors as `resolve_dtype`."""
    model = recipe.model.model_copy(update={"dtype": resolve_dtype(recipe.model.dtype, card)})
    return recipe.model_copy(update={"model": model})


@cache
def _cuda(index: int) -> Card:
    facts = torch.cuda.get_device_properties(index)
    shared = getattr(facts, "shared_memory_per_block_optin", None)  # not in every version of torch
    return Card("cuda", facts.name, (facts.major, facts.minor), facts.total_memory, shared, index)


@cache
def _cpu() -> Card:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Card("cpu", platform.processor() or platform.machine(), (0, 0), memory)
