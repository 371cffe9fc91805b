"""What the package says it needs: every import declared, floors that can be installed, pins within the ranges."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(each) for each in PROJECT["dependencies"]]
MODULES = {"yaml": "pyyaml", "sklearn": "scikit-learn"}  # where the module's name is not the package's
EXTRA = {  # of the extras: imported where installed
    "altair", "fastapi", "flash_attn", "gguf", "prometheus_client", "ray", "rouge_score", "starlette", "uvicorn",
    "vl_convert", "wandb",
}  # fmt: skip


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").split()
    return {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}


def test_every_import_is_declared() -> None:
    found = set()
    for path in (path for package in ("arena", "benchmarks") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {each.name.split(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    others = found - set(sys.stdlib_module_names) - {"arena", "benchmarks"} - EXTRA
    packages = {MODULES.get(each, each) for each in others}
    assert packages == {each.name for each in NEEDED}


@pytest.mark.parametrize("needed", NEEDED, ids=lambda each: each.name)
def test_floors_are_those_that_are_tested(needed: Requirement) -> None:
    (floor,) = (Version(each.version) for each in needed.specifier if each.operator == ">=")
    assert pins("constraints-oldest.txt")[canonicalize_name(needed.name)] == floor


@pytest.mark.parametrize("needed", NEEDED, ids=lambda each: each.name)
def test_pins_are_within_the_ranges(needed: Requirement) -> None:
    assert pins("constraints.txt")[canonicalize_name(needed.name)] in needed.specifier
