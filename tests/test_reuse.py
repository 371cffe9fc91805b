"""Freed memory is reused within `reusing_memory`, and returned at its end.

Measured in a process of its own: where a heap has a large hole already, blocks are reused without it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arena.distributed import _glibc, reusing_memory
from tests.memory import anonymous

pytestmark = pytest.mark.skipif(sys.platform != "linux" or _glibc() is None, reason="of effect with glibc only")

ROOT = Path(__file__).parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZE = 2**26  # bytes, more than glibc keeps by itself


def faults() -> int:
    """Page faults of filling a tensor that is as large as one just freed; the least of many.

    An aligned block leaves a small fragment before it, which glibc holds back from its neighbours until it has seven
    of the size: so long a freed block may be too small for the next aligned one.
    """
    found = []
    for _ in range(30):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(SIZE, dtype=torch.uint8)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found[1:])


def measure() -> dict[str, int]:
    """Page faults, and bytes that the process holds."""
    found = {"outside": faults()}
    with reusing_memory(GPU):
        found["for a GPU"] = faults()
    found["held before"] = anonymous()
    try:
        with reusing_memory(CPU):
            found["within"] = faults()
            found["held within"] = anonymous()
            with reusing_memory(CPU):
                pass
            found["within, after another"] = faults()
            raise ZeroDivisionError
    except ZeroDivisionError:
        found["held after"] = anonymous()
    return found


def test_freed_memory_is_reused_within_and_returned_at_the_end() -> None:
    code = "import json, tests.test_reuse as test; print(json.dumps(test.measure()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["outside"] > 1000 and found["for a GPU"] > found["outside"] / 2
    assert found["within"] < found["outside"] / 10
    assert found["within, after another"] < found["outside"] / 10, "a block within another does not end it"
    assert found["held within"] - found["held before"] > SIZE / 2
    assert found["held after"] - found["held before"] < SIZE / 4
