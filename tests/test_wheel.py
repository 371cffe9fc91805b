"""The wheel holds the whole package: whoever installs it needs no checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]


def test_everything_in_the_package_is_in_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".ipynb_checkpoints")
    shutil.copytree(ROOT / "arena", source / "arena", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = ZipFile(wheel).namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    packed = {name for name in names if ".dist-info/" not in name}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "arena").rglob("*") if path.is_file()}
    assert packed == {name for name in package if "__pycache__" not in name}
    for name in ("py.typed", "recipes/demo.yaml", "recipes/demo_base/model.safetensors"):
        assert f"arena/{name}" in packed
