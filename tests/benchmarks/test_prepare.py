"""Preparing drawn rows: what the benchmark draws and reports, and that memory hardly grows with the rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from arena.model.backbone import load_tokenizer
from benchmarks.drawn_rows import write_rows
from benchmarks.prepare import STAGES, _anonymous, as_page, measure


def test_the_same_rows_are_drawn_again(gemma2: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(gemma2))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_rows(tmp_path / f"{name}.parquet", "competition", 200, tokenizer, seed)
    first, again, other = (pq.read_table(tmp_path / f"{name}.parquet") for name in "abc")
    assert first.equals(again) and not first.equals(other)
    assert len(first) == 200 and len(set(first["id"].to_pylist())) == 200
    assert 150 < len(set(first["prompt"].to_pylist())) < 200


def test_memory_that_is_held_is_seen() -> None:
    def of_process_with(held: int) -> int:
        script = f"import sys; held = b'x' * {held}; print(flush=True); sys.stdin.read()"
        process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with process as child:
            assert child.stdin is not None and child.stdout is not None
            child.stdout.readline()
            found = _anonymous(child.pid)
            child.stdin.close()
        return found

    assert of_process_with(2**27) - of_process_with(1) > 0.9 * 2**27


@pytest.mark.slow
def test_memory_hardly_grows_with_the_rows(gemma2: Path, tmp_path: Path) -> None:
    """What is held more for 40,000 more rows, much of it what is remembered of texts, which has a limit."""
    settings = (f"model.base={gemma2}",)
    few, many = (measure("short", rows, tmp_path, settings, keep=True) for rows in (10_000, 50_000))
    assert set(many["stages"]) == set(STAGES) and "50,000" in as_page({**_made(), "runs": {"a": {**_made(), **many}}})
    few_peak, peak = (max(each["peak"] for each in run["stages"].values()) for run in (few, many))
    assert (peak - few_peak) / 40_000 < 1_500


def _made() -> dict[str, object]:
    return {"versions": {}, "command": "", "date": ""}
