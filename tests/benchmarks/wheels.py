"""Wheels that are made up, and a real machine that has torch, transformers and peft and nothing else."""

from __future__ import annotations

import sys
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from arena.bundle.dry_run import link_packages
from arena.bundle.needed import Target, closure
from benchmarks.collect import THERE

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def metadata(name: str, version: str, requires: Sequence[str] = ()) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    return "\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires)]) + "\n"


def make_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    requires: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
    tags: str = "py3-none-any",
) -> Path:
    """A wheel of a module of that name, or of other files."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-{tags}.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.writestr(f"{name}-{version}.dist-info/METADATA", metadata(name, version, requires))
        for place, text in ({f"{name}.py": ""} if files is None else files).items():
            opened.writestr(place, text)
    return wheel


def install(site: Path, name: str, version: str = "1.0", requires: Sequence[str] = ()) -> None:
    """The metadata of an installed package, in a folder that is on the path."""
    place = site / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(metadata(name, version, requires))


def bare_machine(folder: Path) -> Path:
    """A Python that has torch, transformers and peft with what they need, and neither pip nor anything else.

    Returns:
        The interpreter of a virtual environment, in which the installed packages are links to those of this one.
    """
    venv.create(folder, symlinks=True)
    site = folder / "lib" / f"python{PYTHON}" / "site-packages"
    link_packages(closure([Requirement(each) for each in THERE], Target(PYTHON), {}), site)
    return folder / "bin" / "python"
