"""The device that a model runs on: what it is, how much it holds, and the dtype that it multiplies in."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Card:
    """A device, as far as choices depend on it; made up in tests, found by `card_of` elsewhere.

    Attributes:
        name: as its maker calls it.
        capability: CUDA compute capability, such as (9, 0); (0, 0) on a CPU.
        memory: bytes in all, used or not.
        shared: bytes of shared memory that a block of threads may use; None: not told.
        index: its number among the CUDA devices here; None for a CPU, and for a card that is made up.
    """

    kind: Kind
    name: str
    capability: tuple[int, int]
    memory: int
    shared: int | None = None
    index: int | None = None

    @property
    def bfloat16(self) -> bool:
        """Whether bfloat16 products are computed as such: from Ampere on; a CPU computes in any dtype."""
        return self.kind == "cpu" or self.capability >= (8, 0)


def card_of(device: torch.device | str) -> Card:
    """What stands behind a torch device.

    Raises:
        ValueError: neither a CUDA device nor a CPU.
    """
    found = torch.device(device)
    if found.type == "cpu":
        return _cpu()
    if found.type == "cuda":
        return _cuda(torch.cuda.current_device() if found.index is None else found.index)
    raise ValueError(f"device {found}: this package runs on CUDA devices and CPUs")


def product_dtype(*states: Tensor) -> torch.dtype:
    """The dtype to multiply in: that of autocast where it is on, as in torch's own attention, else the widest."""
    device = states[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype = states[0].dtype
    for each in states[1:]:
        dtype = torch.promote_types(dtype, each.dtype)
    return dtype


@cache
def _cuda(index: int) -> Card:
    facts = torch.cuda.get_device_properties(index)
    shared = getattr(facts, "shared_memory_per_block_optin", None)  # not in every version of torch
    return Card("cuda", facts.name, (facts.major, facts.minor), facts.total_memory, shared, index)


@cache
def _cpu() -> Card:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Card("cpu", platform.processor() or platform.machine(), (0, 0), memory)
