"""The wheel of this very package, made of the files that are imported here: neither a build nor a network is needed."""

from __future__ import annotations

import base64
import hashlib
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

import arena

NAME = "arena-judge"
TAG = "py3-none-any"
WHEEL = f"Wheel-Version: 1.0\nGenerator: arena\nRoot-Is-Purelib: true\nTag: {TAG}\n"
ENTRY_POINTS = "[console_scripts]\narena = arena.cli:main\n"


def own_wheel(folder: Path) -> Path:
    """Writes the wheel into a folder; equal files give equal bytes, so that its SHA-256 is the same each time."""
    package, stem = Path(arena.__file__).parent, f"{NAME.replace('-', '_')}-{arena.__version__}"
    files = {
        path.relative_to(package.parent).as_posix(): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)
    }
    info = f"{stem}.dist-info"
    for name, text in {"METADATA": _metadata(package), "WHEEL": WHEEL, "entry_points.txt": ENTRY_POINTS}.items():
        files[f"{info}/{name}"] = text.encode()
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD").encode()
    wheel = folder / f"{stem}-{TAG}.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        for name, content in files.items():
            opened.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # of 1980, whenever it is written
    return wheel


def _metadata(package: Path) -> str:
    """What the package needs, without its extras: by the checkout that it is in, or as it was installed."""
    project = package.with_name("pyproject.toml")
    if project.is_file():
        needed = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        needed = [each for each in requires(NAME) or () if "extra ==" not in str(Requirement(each).marker)]
    lines = ["Metadata-Version: 2.1", f"Name: {NAME}", f"Version: {arena.__version__}"]
    return "\n".join([*lines, *(f"Requires-Dist: {each}" for each in needed)]) + "\n"


def _record(files: dict[str, bytes], own: str) -> str:
    """The list of a wheel's files with their hashes, by which pip knows what it installed."""
    lines = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    return "\n".join([*lines, f"{own},,"]) + "\n"
