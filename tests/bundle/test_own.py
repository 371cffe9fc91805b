"""The wheel of the package itself: whole, small, and the same bytes each time."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path

from arena.bundle.own import ENTRY_POINTS, own_wheel
from arena.bundle.wheels import is_whole, requirements_of

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_it_holds_the_package_and_what_the_project_needs(tmp_path: Path) -> None:
    wheel = own_wheel(tmp_path)
    assert is_whole(wheel) and wheel.stat().st_size < 8 * 2**20
    assert requirements_of(wheel) == PROJECT["dependencies"]
    ((name, place),) = PROJECT["scripts"].items()
    assert ENTRY_POINTS.splitlines()[1] == f"{name} = {place}"
    with zipfile.ZipFile(wheel) as opened:
        packed = {each for each in opened.namelist() if ".dist-info/" not in each}
        (record,) = (each for each in opened.namelist() if each.endswith("/RECORD"))
        assert {each.date_time[0] for each in opened.infolist()} == {1980}  # not of now: the same hash each time
        assert len(opened.read(record).splitlines()) == len(opened.namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "arena").rglob("*") if path.is_file()}
    assert packed == {each for each in package if "__pycache__" not in each}
