"""The structure in CONTRIBUTING.md: rooms import downwards only, modules stay small and say what they are."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("arena", "benchmarks")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_MODULES = 177  # of arena, without `__init__`
MOST_LINES, LONGEST_FUNCTION, NINE_OF_TEN = 300, 60, 25  # lines of a module, of a function, of nine functions in ten
# each room imports only from itself and from those before it
ROOMS = [
    "command_line",
    "progress",
    "stopping",
    "storage",
    "prompt_settings",
    "settings",
    "config",
    "metrics",
    "distributed",
    "ranks",
    "data",
    "tasks",
    "demo",
    "packing",
    "model",
    "inference",
    "training",
    "reporting",
    "options",
    "bundle",
    "html_report",
    "serving",
    "commands",
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


def test_imports_go_downwards_only() -> None:
    upwards = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        if path != ROOT / "arena/__init__.py"
        for name in sorted(imported(path))
        if ROOMS.index(room(as_path(name))) > ROOMS.index(room(path))
    ]
    assert not upwards, "\n".join(upwards)


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


def test_modules_are_small_and_say_what_they_are() -> None:
    found = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if not ast.get_docstring(ast.parse(text)):
            found.append(f"{path.relative_to(ROOT)} has no docstring")
        if (lines := text.count("\n")) > MOST_LINES:
            found.append(f"{path.relative_to(ROOT)} has {lines} lines")
    assert not found, "\n".join(found)


def test_functions_are_short() -> None:
    lengths = {where: lines for path in MODULES for where, lines in functions(path)}
    long = [f"{where} has {lines} lines" for where, lines in lengths.items() if lines > LONGEST_FUNCTION]
    assert not long, "\n".join(long)
    ours = sorted(lines for where, lines in lengths.items() if where.startswith("arena/"))
    assert ours[len(ours) * 9 // 10] <= NINE_OF_TEN, "the 90th percentile"


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Where each function of a module is, and its lines, docstring included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_there_are_few_modules() -> None:
    assert len([path for path in MODULES if room(path) != "benchmarks" and path.stem != "__init__"]) <= MOST_MODULES


def test_data_and_plans_need_no_torch() -> None:
    modules = "arena.data.prepare, arena.tasks.preference, arena.packing.plan, arena.demo.synthetic"
    code = f"import sys, {modules}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
