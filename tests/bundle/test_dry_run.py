"""The parts of a dry run: what is laid where the notebook looks for it, and how its cells are run."""

from __future__ import annotations

import json
import os
import socket
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from arena.bundle import dry_run, wheels
from arena.bundle.dry_run import lay_base, lay_bundle, link_packages, run_notebook
from arena.bundle.needed import Target
from arena.bundle.write import requirements
from arena.config import load_recipe
from arena.storage.files import write_json
from tests.benchmarks.wheels import PYTHON, make_wheel


def notebook(folder: Path, *cells: str) -> Path:
    """Code cells, the first with the places that a dry run replaces."""
    first = 'INPUT = Path("/kaggle/input")\nOUT = Path("/kaggle/working/submission.csv")'
    sources = [f"# The first\nfrom pathlib import Path\n{first}", *cells]
    write_json(folder / "submit.ipynb", {"cells": [{"cell_type": "code", "source": each} for each in sources]})
    return folder / "submit.ipynb"


def test_cells_run_one_after_another_with_the_network_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place, values = tmp_path / "place", {"INPUT": tmp_path / "in", "OUT": tmp_path / "out.csv"}
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # the control
        seen = f"# Look\nimport os, socket\ncode = socket.socket().connect_ex(('127.0.0.1', {port}))"
        tell = "# Tell\nimport json\nOUT.write_text(json.dumps({**os.environ, 'code': code}))"
        place.mkdir()
        run_notebook(notebook(tmp_path, seen, tell), place, Path(sys.executable), values)
    found, shown = json.loads(values["OUT"].read_text()), capfd.readouterr().out
    assert "PYTHONPATH" not in found and found["PIP_CONFIG_FILE"] == os.devnull and found["HOME"] == str(place / "home")
    assert (found["code"] != 0) == ("network: off" in shown)
    assert found["https_proxy"] == dry_run.NOWHERE
    assert [line.split(" s  ")[1] for line in shown.splitlines() if " s  " in line] == ["The first", "Look", "Tell"]


def test_a_cell_that_fails_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the notebook failed \(status 1\)"):
        (tmp_path / "place").mkdir()
        cell = notebook(tmp_path, "# Fail\nraise SystemExit(1)")
        run_notebook(cell, tmp_path / "place", Path(sys.executable), {"INPUT": tmp_path, "OUT": tmp_path / "out.csv"})


def test_wheels_of_another_python_are_fetched_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle stays as it is, and what suits every Python is taken from it."""
    bundle = tmp_path / "bundle"
    held = [
        make_wheel(bundle / "wheels", "plain"),
        make_wheel(bundle / "wheels", "built", tags="cp39-cp39-linux_x86_64"),
    ]
    (bundle / "requirements.txt").write_text(requirements(held))

    def download(wanted: list[str], target: Target, folder: Path) -> None:
        assert (wanted, target) == (["built==1.0"], Target(PYTHON))
        make_wheel(folder, "built", files={"built.py": "built = True"})

    monkeypatch.setattr(wheels, "download", download)
    lay_bundle(bundle, tmp_path / "input/bundle")
    names = ["built-1.0-py3-none-any.whl", "plain-1.0-py3-none-any.whl"]
    assert sorted(path.name for path in (tmp_path / "input/bundle/wheels").iterdir()) == names
    assert sorted((bundle / "wheels").iterdir()) == sorted(held)
    before, now = (bundle / "requirements.txt").read_text(), (tmp_path / "input/bundle/requirements.txt").read_text()
    assert len(set(before.splitlines()) & set(now.splitlines())) == 1 and before != now


@pytest.mark.parametrize("base", ["gemma-2/transformers/gemma-2-9b-it/2", ""])
def test_the_base_is_laid_where_the_notebook_finds_it(base: str, gemma2: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "arena-bundle.json", {"base": base})
    lay_base(tmp_path, tmp_path / "input", load_recipe("demo", [f"model.base={gemma2}"]).model)
    found = [
        Path(folder) for folder, _, names in os.walk(tmp_path / "input", followlinks=True) if "config.json" in names
    ]
    assert [path.as_posix().endswith(f"/{base}") for path in found] == [True] * bool(base)


def test_packages_are_links_to_those_that_are_installed(tmp_path: Path) -> None:
    link_packages(["packaging", "not-installed-anywhere"], tmp_path / "there")
    linked = {path.name: path.resolve() for path in (tmp_path / "there").iterdir()}
    assert linked["packaging"] == Path(str(distribution("packaging").locate_file("packaging"))).resolve()
    assert all(name.startswith("packaging") for name in linked)
