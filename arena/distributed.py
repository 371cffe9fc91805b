"""The process a run lives in: device, rank, sums over ranks, threads, random seeds; one process or several."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, set_seed
from torch import Tensor

from arena.hints import command
from arena.progress import console

# The name that torch 2.8 reads, and that which newer versions ask for in a warning where they find the older alone.
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def start(seed: int, track: str = "none", folder: str | None = None) -> Accelerator:
    """Fixes threads and seeds, and finds the device and the other ranks (`accelerate launch` sets those up).

    Args:
        track: `none`, or the experiment tracker to report to.
        folder: where a tracker that writes files puts them.

    Raises:
        ValueError: the tracker's package is not installed.
    """
    if track != "none" and track not in map(str, get_available_trackers()):
        install = command("pip", "install", track)
        raise ValueError(f"train.track={track} needs a package that is not installed: `{install}`")
    fix_threads()
    let_segments_grow()
    set_seed(seed)
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # one rank tokenises while the others wait
    return Accelerator(log_with=None if track == "none" else track, project_dir=folder, kwargs_handlers=[patience])


def is_main() -> bool:
    """Whether this process is the one that speaks and writes for all ranks."""
    return bool(PartialState().is_main_process)


def fix_threads() -> None:
    """One pool of as many threads as this process may use: two pools that fight over cores cost ten times the time."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    asked = given.split(",")[0].strip()  # one number for each level of nesting
    is_count = asked.isdecimal() and int(asked) > 0
    if given.strip() and not is_count:
        console.print(f"OMP_NUM_THREADS={given} is not a number of threads: using {free}, one for each core")
    torch.set_num_threads(int(asked) if is_count else free)


def let_segments_grow() -> None:
    """Has CUDA's allocator grow its segments, unless the user has set it up; to be called before CUDA is first used.

    Micro-batches differ in size, and memory that falls to pieces is memory lost.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))


def sum_gradients(accelerator: Accelerator, parameters: Iterable[Tensor]) -> None:
    """Adds up the gradients of all ranks. Ranks may have had different numbers of micro-batches, or none."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = accelerator.reduce(parameter.grad, reduction="sum")


def total(accelerator: Accelerator, value: float) -> float:
    """The sum of a number over all ranks."""
    if accelerator.num_processes == 1:
        return value
    # float32 is the widest that every device can add up
    return float(accelerator.reduce(torch.tensor(value, device=accelerator.device), reduction="sum"))


def first_rank(accelerator: Accelerator, value: float) -> float:
    """The first rank's value, on all ranks: what they decide by it, they decide alike."""
    values = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(values)
    return values[0]


def compute_in(device: torch.device, dtype: str) -> AbstractContextManager[None]:
    """Autocast to the compute dtype of a recipe; float32 computes as it is."""
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")


def peak_memory(device: torch.device) -> int:
    """Most bytes ever held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return process_memory("VmHWM")  # Linux's other count, below, takes in the process that started this one
    except (OSError, ValueError):
        pass
    import psutil

    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows, which has no `resource`
        return int(memory.peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_memory(key: str) -> int:
    """Bytes of a line such as `VmHWM: 1234 kB` of Linux's /proc/self/status.

    Raises:
        OSError: there is no such file here; ValueError: no such line.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(found) * 1024


def device_name(device: torch.device) -> str:
    """What a table of results calls this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory is used up: torch's own, or one of the libraries below it.

    A compiled kernel that wants more of a card's shared memory than there is ends in the same class of error, with
    "out of resource" (triton's `OutOfResources`, and torch's launcher): no freed memory lets it run.
    """
    said = str(error).lower()
    if "out of resource" in said:
        return False
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "alloc_failed" in said
