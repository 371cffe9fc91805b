"""The processes of a run: device, threads, memory and seeds, for one process or several."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, set_seed

from arena.command_line import command
from arena.progress import console, format_error

CUBLAS, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # with which cuBLAS is deterministic
# The name that torch 2.8 reads, and the new name, without which newer versions print a warning.
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # the names of glibc's settings, from malloc.h
REUSED = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}  # no block is mapped on its own, and nothing is returned
# glibc's default, at the values to which its thresholds grow by themselves; setting one ends their growth
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}
ANSWER_WITHIN = timedelta(minutes=30)  # a process that waits longer for another one gives up

T = TypeVar("T")

_within: list[bool] = []  # whether a caller reuses memory already


def start(seed: int, track: str = "none", folder: str | None = None) -> Accelerator:
    """Sets threads and seeds, and finds the device and the other ranks, which `torchrun` or `accelerate launch` starts.

    Args:
        track: `none`, or the experiment tracker to report to.
        folder: for the files of trackers that write files.

    Raises:
        ValueError: the tracker's package is not installed.
    """
    if track != "none" and track not in map(str, get_available_trackers()):
        install = command("pip", "install", track)
        raise ValueError(f"train.track={track} needs a package that is not installed: `{install}`")
    fix_threads()
    let_segments_grow()
    set_seed(seed)
    patience = InitProcessGroupKwargs(timeout=ANSWER_WITHIN)
    return Accelerator(log_with=None if track == "none" else track, project_dir=folder, kwargs_handlers=[patience])


def check_at_once(at_once: int) -> None:
    """Raises `ValueError` unless there can be so many processes at once, each on a GPU of its own if there are any."""
    gpus = torch.cuda.device_count()
    if at_once < 1 or (gpus and at_once > gpus):
        raise ValueError(f"--at-once is {at_once}: give a number from 1{f' to {gpus}, the GPUs here' if gpus else ''}")


def start_process(words: Sequence[str], log: Path, gpu: int | None) -> subprocess.Popen[bytes]:
    """Starts `python -m WORDS` on one of the visible GPUs, with its output at the end of a log."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    own = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": visible.split(",")[gpu] if visible else str(gpu)}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *words], stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            env={**os.environ, **own}, start_new_session=True,
        )  # fmt: skip


def last_line(log: Path) -> str:
    """The last line of a process's output, which says why it failed, and where the rest is."""
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{said[-1] if said else 'no output'} (see {log})"


def is_main() -> bool:
    """Whether this process is the one that prints and writes for all ranks."""
    return bool(PartialState().is_main_process)


def fix_threads() -> None:
    """Uses one pool with as many threads as this process may use: pools that compete for cores are ten times slower."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    setting = os.environ.get("OMP_NUM_THREADS", "")
    threads = setting.split(",")[0].strip()  # one number for each level of nesting
    is_count = threads.isdecimal() and int(threads) > 0
    if setting.strip() and not is_count:
        console.print(f"OMP_NUM_THREADS={setting} is not a number of threads: using {free}, one per core")
    torch.set_num_threads(int(threads) if is_count else free)


def in_a_thread(work: Callable[[], T]) -> T:
    """The result of some work that is done in a thread, which then ends.

    OpenMP keeps threads for each thread that has computed. As soon as they are more than the cores, they sleep between
    any two operations (`GOMP_SPINCOUNT` in GCC's manual of libgomp), which takes longer than a small operation. Where
    one thread is to compute for long, others should therefore compute in threads that end.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    thread = Thread(target=run, daemon=True)  # so that Ctrl-C ends the process at once
    thread.start()
    found = result.result()
    thread.join()
    return found


def let_segments_grow() -> None:
    """Makes CUDA's allocator use expandable segments, unless the user has configured it; call it before CUDA is used.

    Micro-batches differ in size, so memory would otherwise be lost to fragmentation.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))


@contextmanager
def reusing_memory(device: torch.device) -> Iterator[None]:
    """Within it, freed memory is reused; what is free at its end is returned. Of effect on a CPU with glibc only.

    The C library returns large blocks to the system when they are freed, and each new tensor then costs page faults and
    zeroed pages: a sixth of an evaluation by a base of 270M parameters, and a twentieth of its training. Here freed
    blocks stay with the process instead, as torch keeps them on a GPU.
    """
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


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Makes torch, cuBLAS and flash-attn use deterministic algorithms in the block, if `on`; a CPU's are anyway.

    It must begin before cuBLAS is used. The kernels of FlexAttention and bitsandbytes are always deterministic.

    Raises:
        ValueError: an operation has no deterministic algorithm, or cuBLAS is configured otherwise.
    """
    if not on:
        yield
        return
    filling: Any = torch.utils.deterministic  # of memory that nothing has written yet, which costs time
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    if os.environ.setdefault(CUBLAS, WORKSPACES[0]) not in WORKSPACES:
        allowed = " or ".join(WORKSPACES)
        raise ValueError(f"train.deterministic=true needs {CUBLAS}={allowed}, but it is {os.environ[CUBLAS]}: unset it")
    try:
        torch.use_deterministic_algorithms(True)
        filling.fill_uninitialized_memory = False
        yield
    except RuntimeError as error:
        if "deterministic" in str(error):
            raise ValueError(f"train.deterministic=true is not possible here: {format_error(error)}") from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]


def compute_in(device: torch.device, dtype: str) -> AbstractContextManager[None]:
    """Autocast to the compute dtype of a recipe; without autocast for float32."""
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return process_memory(
            "VmHWM"
        )  # unlike `ru_maxrss` below, it does not include the process that started this one
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
    """The bytes in a line such as `VmHWM: 1234 kB` of Linux's /proc/self/status.

    Raises:
        OSError: there is no such file.
        ValueError: there is no such line.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(found) * 1024


def device_name(device: torch.device) -> str:
    """The name of a device in tables of results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device's memory is exhausted, be it torch's error or a lower library's.

    A compiled kernel that needs more shared memory than the card has raises the same class of error, with "out of
    resource" (triton's `OutOfResources`, and torch's launcher); freeing memory does not help there.
    """
    message = str(error).lower()
    if "out of resource" in message:
        return False
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in message or "alloc_failed" in message
