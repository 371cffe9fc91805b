"""Seconds and memory of a call, on a GPU or a CPU."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from arena.distributed import process_memory


def finish(device: torch.device) -> None:
    """Waits for what the device was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> int | None:
    """Forgets the peak so far and gives the bytes held now; None where the machine does not keep them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory that an earlier variant freed would count as held
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        return process_memory("VmRSS")
    except (OSError, AttributeError):
        return None


def peak(device: torch.device) -> int:
    """The most bytes held since `reset_peak`: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_memory("VmHWM")


def reserved_peak(device: torch.device) -> int | None:
    """The most bytes that the process took from the GPU since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Gives back the memory of what is no longer referred to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
