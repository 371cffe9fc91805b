"""Freed memory is reused within `reusing_memory`, and only there."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from arena.model.memory.reuse import _glibc, reusing_memory
from tests.memory import anonymous

pytestmark = pytest.mark.skipif(sys.platform != "linux" or _glibc() is None, reason="of effect with glibc only")

CPU = torch.device("cpu")
SIZE = 2**26  # bytes, more than glibc keeps by itself


def faults() -> int:
    """Page faults of filling a tensor that is as large as one just freed; the least of several, as others may fit in
    before it."""
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(SIZE, dtype=torch.uint8)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found[1:])


def test_a_freed_tensor_is_reused() -> None:
    outside = faults()
    with reusing_memory(CPU):
        within = faults()
    assert within < outside / 10
    assert faults() > outside / 2, "it must end with the block"


def test_a_block_within_another_does_not_end_it() -> None:
    outside = faults()
    with reusing_memory(CPU):
        with reusing_memory(CPU):
            pass
        assert faults() < outside / 10


def test_memory_is_returned_at_the_end_and_after_an_error() -> None:
    before = anonymous()
    with pytest.raises(ZeroDivisionError), reusing_memory(CPU):
        torch.ones(SIZE, dtype=torch.uint8)
        assert anonymous() - before > SIZE / 2
        raise ZeroDivisionError
    assert anonymous() - before < SIZE / 4
    assert faults() > 0


def test_a_gpu_changes_nothing() -> None:
    outside = faults()
    with reusing_memory(torch.device("cuda")):
        assert faults() > outside / 2
