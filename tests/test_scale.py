"""The size of the real thing: 57,477 rows through the real tokenizer. Run with `pytest -m slow` (a minute or two)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import SHARED, needs_shared

pytestmark = [pytest.mark.slow, needs_shared]


def test_preparing_and_planning_the_whole_set(tmp_path: Path) -> None:
    """Steps of 80 in few and even micro-batches; at most 2.5 GB resident while reading, splitting and tokenising."""
    rows, base = SHARED / "data/alpaca_57k.parquet", SHARED / "tokenizers/gemma-2"
    command = [sys.executable, "-m", "arena.cli", "inspect", "--recipe", "gemma-2-9b", "--data", str(rows)]
    shown = subprocess.run(
        [*command, f"model.base={base.resolve()}", "train.batch_size=80"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    ).stdout  # fmt: skip
    assert "tokenising: 57,477 conversations" in shown
    found = re.search(r"\(([\d.]+) x the least.*step ([\d.]+) on average, ([\d.]+) at worst", shown)
    memory = re.search(r"peak memory ([\d.]+) GiB", shown)
    assert found is not None and memory is not None
    ratio, evenness, worst = map(float, found.groups())
    assert ratio <= 1.005
    assert evenness >= 0.97 and worst >= 0.94
    assert float(memory.group(1)) * 2**30 <= 2.5e9
