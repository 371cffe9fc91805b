"""Pictures need no backend, whatever the environment names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DRAW = """
import os, sys
from arena.reporting.report import new_figure
figure, axes = new_figure(figsize=(2, 2))
axes.plot([1, 2])
figure.savefig(sys.argv[1])
assert new_figure(1, 2)[1].shape == (1, 2)
import matplotlib
print(os.environ["MPLBACKEND"], matplotlib.rcParams["backend"])
"""

MAKES_FIGURES = r"^\s*(import matplotlib|from matplotlib import|from matplotlib\.(pyplot|backends))"


@pytest.mark.parametrize("backend", ["module://no.such.package", "nonsense", "svg"])
def test_a_figure_is_drawn_whatever_backend_is_named(tmp_path: Path, backend: str) -> None:
    command = [sys.executable, "-c", DRAW, str(tmp_path / "x.png")]
    environment = {**os.environ, "MPLBACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    if backend != "nonsense":  # what this process draws besides goes where it was to go
        assert shown.split() == [backend, backend]


def test_figures_are_made_in_one_place() -> None:
    """pyplot and backends read the environment when they are imported."""
    modules = (Path(__file__).parents[2] / "arena").rglob("*.py")
    importing = [
        path.name for path in modules if re.search(MAKES_FIGURES, path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert importing == ["report.py"]
