"""The process: trackers, threads, sums over one rank."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from accelerate import Accelerator

from arena.distributed import device_name, fix_threads, is_main, peak_memory, start, total


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="the tracker is installed")
def test_a_tracker_that_is_not_installed_is_said() -> None:
    with pytest.raises(ValueError, match=r"train\.track=wandb needs a package .*: `\S*pip install wandb`"):
        start(0, "wandb")


def test_threads_follow_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1,2")
    fix_threads()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_one_process_is_the_first_and_the_sum() -> None:
    assert is_main()
    assert total(Accelerator(), 1.5) == 1.5
    assert peak_memory(torch.device("cpu")) > 2**20
    assert "threads" in device_name(torch.device("cpu"))
