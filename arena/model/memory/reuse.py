"""Reuses the memory of freed tensors on a CPU.

The C library returns large blocks to the system when they are freed, and each new tensor then costs page faults and
zeroed pages: a sixth of an evaluation by a base of 270M parameters, and a twentieth of its training. Within
`reusing_memory` freed blocks stay with the process instead, as torch keeps them on a GPU.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # the names of glibc's settings, from malloc.h
REUSED = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}  # no block is mapped on its own, and nothing is returned
# glibc's default, at the values to which its thresholds grow by themselves; setting one ends their growth
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}

_within: list[bool] = []  # whether a caller reuses memory already


@contextmanager
def reusing_memory(device: torch.device) -> Iterator[None]:
    """Within it, freed memory is reused; what is free at its end is returned. Of effect on a CPU with glibc only."""
    library = _glibc() if device.type == "cpu" and not _within else None
    if library is None:
        yield
        return
    _set(library.mallopt, REUSED)
    _within.append(True)
    try:
        yield
    finally:
        _within.clear()
        _set(library.mallopt, USUAL)
        library.malloc_trim(0)


def _set(mallopt: Callable[[int, int], int], settings: dict[int, int]) -> None:
    for name, value in settings.items():
        mallopt(name, value)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version") else None
