"""The process: trackers, threads, sums over one rank."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator

from arena import distributed
from arena.distributed import (
    ALLOCATOR,
    device_name,
    fix_threads,
    is_main,
    is_out_of_memory,
    let_segments_grow,
    peak_memory,
    start,
)
from arena.ranks import together


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="the tracker is installed")
def test_a_tracker_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"train\.track=wandb needs a package .*: `\S*pip install wandb`"):
        start(0, "wandb")


def test_a_folder_called_as_a_tracker_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio").mkdir()  # as trackers make one where they run
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("trackio") is not None
    with pytest.raises(ValueError, match="pip install trackio"):
        start(0, "trackio")


@pytest.mark.parametrize(
    ("given", "threads", "message"),
    [
        ("1,2", 1, ""),
        (" 3 ", 3, ""),
        ("", 2, ""),
        ("0", 2, "OMP_NUM_THREADS=0 is not a number of threads: using 2"),
        ("3500m", 2, "OMP_NUM_THREADS=3500m is not"),
        ("-1", 2, "OMP_NUM_THREADS=-1 is not"),
    ],
)
def test_threads_follow_openmp(
    given: str, threads: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    try:
        fix_threads()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    shown = capsys.readouterr().out
    assert message in shown and bool(message) == bool(shown)


def test_memory_is_known_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(key: str) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(distributed, "process_memory", refuse)
    memory = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7))
    monkeypatch.setattr(psutil, "Process", lambda: memory)
    assert peak_memory(torch.device("cpu")) == 7
    monkeypatch.undo()
    monkeypatch.setattr(distributed, "process_memory", refuse)
    assert peak_memory(torch.device("cpu")) > 2**20  # where there is neither: by `resource`


WINDOWS = """
import signal, sys
import filelock  # which has a lock for Windows
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.SIGHUP
import arena.cli, arena.distributed
from arena.storage.lock import locked
from arena.stopping import ending_at_once, stopping
from pathlib import Path
with ending_at_once(), stopping() as stop, locked(Path(sys.argv[1])):
    signal.raise_signal(signal.SIGINT)
print(stop.stopped().status)
"""


def test_the_commands_can_be_imported_without_what_windows_lacks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WINDOWS, str(tmp_path / "x")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert shown.returncode == 0 and shown.stdout.split()[-1] == "130", shown.stderr


def test_one_process_is_the_first_and_the_sum() -> None:
    assert is_main()
    assert together(Accelerator(), lambda: 1.5) == [1.5]
    assert peak_memory(torch.device("cpu")) > 2**20
    assert "threads" in device_name(torch.device("cpu"))


@pytest.mark.parametrize("set_by_user", [{}, {ALLOCATOR[0]: "backend:native"}, {ALLOCATOR[1]: "backend:native"}])
def test_expandable_segments_are_set_unless_the_user_configured_the_allocator(
    set_by_user: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    let_segments_grow()
    left = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    assert left == (set_by_user or dict.fromkeys(ALLOCATOR, "expandable_segments:True"))


USED_UP = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("No valid triton configs. OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: out of memory"),
]
CANNOT_RUN = [
    # triton's own; torch's launcher of compiled kernels, whose class is that of used-up memory; as inductor hands it on
    RuntimeError(
        "out of resource: shared memory, Required: 131074, Hardware limit: 101376. Reducing block sizes or `num_stages`"
        " may help."
    ),
    torch.OutOfMemoryError(
        "out of resource: triton_tem_fused_0 Required: 151552 Hardware limit:101376 Reducing block sizes or "
        "`num_stages` may help."
    ),
    RuntimeError(
        "No valid triton configs. OutOfMemoryError: out of resource: triton_tem_fused_flex_attention_0 Required: "
        "139776 Hardware limit:101376 Reducing block sizes or `num_stages` may help."
    ),
    RuntimeError("InductorError: RuntimeError: No valid triton configs. OutOfResources: out of resource: threads"),
    RuntimeError("PTXASError: ptxas error : Entry function uses too much shared data (0x25000 bytes, 0x18c00 max)"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    ValueError("This flash attention build does not support headdim 32."),
]


@pytest.mark.parametrize("error", USED_UP)
def test_exhausted_memory_is_recognised_by_its_error(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", CANNOT_RUN)
def test_a_kernel_that_cannot_run_is_not_exhausted_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_threads_of_finished_work_are_gone() -> None:
    """OpenMP's threads of the caller would make those of the next thread sleep between any two operations."""
    script = """
import os, time, torch
from arena.distributed import in_a_thread
torch.set_num_threads(2)
def count():
    return len(os.listdir("/proc/self/task"))
def work():
    torch.ones(2**22).exp_()
    return count()
before = count()
within = in_a_thread(work)
ended = time.monotonic() + 10
while count() > before and time.monotonic() < ended:
    time.sleep(0.01)  # the system ends threads a little later than Python
after = count()
work()
print(within - before, after - before, count() - before)
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("this system does not list threads")
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["2", "0", "1"]  # the thread and its helper; none is left; the caller's own helper stays


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        distributed.in_a_thread(lambda: 1 // 0)
