"""The structure in CONTRIBUTING.md: rooms import downwards only, modules stay small and say what they are."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("arena", "benchmarks")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# each room imports only from itself and from those before it
ROOMS = [
    "hints",
    "background",
    "progress",
    "stopping",
    "arguments",
    "storage",
    "plain_yaml",
    "overrides",
    "config",
    "metrics",
    "distributed",
    "data",
    "tasks",
    "demo",
    "packing",
    "model",
    "inference",
    "training",
    "reporting",
    "cli",
    "benchmarks",
]


def room(path: Path) -> str:
    """The room of a module; the benchmarks, which stand above the package, are one."""
    package, *within = path.relative_to(ROOT).with_suffix("").parts
    return within[0] if package == "arena" else package


def imported(path: Path) -> set[str]:
    """Modules of the checkout's packages that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}", *(f"{node.module}.{each.name}" for each in node.names)}
        elif isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
    names -= {"arena"}  # each of its modules may import the package itself
    return {name for name in names if name.split(".")[0] in PACKAGES and is_module(as_path(name))}


def as_path(name: str) -> Path:
    return ROOT / Path(*name.split("."))


def is_module(path: Path) -> bool:
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_every_kind_of_import_is_seen(tmp_path: Path) -> None:
    for text in (
        "from arena import cli",
        "import arena.cli",
        "from arena.cli import main",
        "def f():\n import arena.cli",
    ):
        (tmp_path / "module.py").write_text(text)
        assert imported(tmp_path / "module.py") == {"arena.cli"}
    for text in ("import benchmarks", "from benchmarks import nothing"):
        (tmp_path / "module.py").write_text(text)
        assert imported(tmp_path / "module.py") == {"benchmarks"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards_only(path: Path) -> None:
    if path == ROOT / "arena/__init__.py":
        return
    here = ROOMS.index(room(path))
    above = {name for name in imported(path) if ROOMS.index(room(as_path(name))) > here}
    assert above == set()


def test_no_cycles() -> None:
    modules = [path for path in MODULES if path != ROOT / "arena/__init__.py"]  # imports nothing before it is asked to
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imported(path) for path in modules}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join([*trail, name])}"
        if name not in done:
            for below in graph.get(name, ()):
                visit(below, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert text.count("\n") <= 300
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize(
    "module", ["arena.data.prepare", "arena.tasks.preference", "arena.packing.plan", "arena.demo.synthetic"]
)
def test_data_and_plans_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_pickle_and_no_remote_code() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in text and "torch.load" not in text and "trust_remote_code=True" not in text, path
