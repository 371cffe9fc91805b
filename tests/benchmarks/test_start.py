"""The starter for a bare machine, with made-up wheels and a made-up script."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro
from packaging.tags import Tag, sys_tags

from arena.bundle.needed import read_list
from benchmarks import start
from benchmarks.collect import Collect
from tests.benchmarks.wheels import PYTHON, make_wheel

SCRIPT = """
import json, multiprocessing, os, subprocess, sys, time
import tiny

def where():
    return tiny.__file__

def main():
    what = sys.argv[2]
    if what == "wait":
        print(tiny.__file__, flush=True)
        time.sleep(60)
    if what.isdigit():
        sys.exit(int(what))
    if what != "tell":
        __import__(what)
    child = [sys.executable, "-S", "-c", "import arena, benchmarks, tiny; print(tiny.__file__)"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = pool.apply(where)
    print(json.dumps({
        "argv": sys.argv, "path": sys.path, "tiny": tiny.__file__, "spawned": spawned,
        "child": subprocess.run(child, capture_output=True, text=True, check=True).stdout.strip(),
        "PYTHONPATH": os.environ["PYTHONPATH"], "pid": os.getpid(),
    }))
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the real starter, a script that is made up, and wheels of what it needs."""
    place = tmp_path / "checkout"
    for package in ("arena", "benchmarks"):
        (place / package).mkdir(parents=True)
    shutil.copy(start.__file__, place / "benchmarks/start.py")
    (place / "benchmarks/__main__.py").write_text(SCRIPT)
    (place / "arena/own.py").write_text("import arena.nothing")
    (place / "pyproject.toml").write_text('[project]\ndependencies = ["tiny>=1,<2", "Some_thing[x]>=2"]\n')
    make_wheel(place / "wheels", "tiny")
    for name in ("some.thing", *start.TEST_PACKAGES):
        make_wheel(place / "wheels", name)
    (tmp_path / "temporary").mkdir()
    return place


def command(checkout: Path, *words: str, flags: str = "-S") -> list[str]:
    return [sys.executable, flags, str(checkout / "benchmarks/start.py"), *words]


def environment(checkout: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"TMPDIR": str(checkout.parent / "temporary"), "PYTHONPATH": "elsewhere"}


@pytest.fixture
def run(checkout: Path) -> Run:
    """Runs the starter without site-packages, with the wheels of the checkout."""

    def begin(*words: str, flags: str = "-S", wheels: bool = True) -> subprocess.CompletedProcess[str]:
        given = ["--wheels", "wheels"] if wheels else []
        line = command(checkout, *given, *words, flags=flags)
        return subprocess.run(
            line, cwd=checkout, env=environment(checkout), capture_output=True, text=True, check=False
        )

    return begin


def leftovers(checkout: Path) -> list[Path]:
    return list((checkout.parent / "temporary").iterdir())


def test_it_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(start.__file__).read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names}
    assert len(names) > 10 and {name.split(".")[0] for name in names if name} <= sys.stdlib_module_names
    code = (
        f"import sys; sys.path.insert(0, {str(Path(start.__file__).parent)!r}); import start; "
        "sys.exit(bool({'torch', 'arena'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-I", "-S", "-c", code], check=False).returncode == 0
    beside = {path.stem for path in Path(start.__file__).parent.glob("*.py")} - {"__init__", "__main__"}
    assert beside & sys.stdlib_module_names == set()  # Python puts this folder before the standard library


@pytest.mark.parametrize("flags", ["-S", "-IS"])
def test_the_script_runs_with_the_wheels_first(run: Run, checkout: Path, flags: str) -> None:
    words = ["a=1", "--only", "train,ours*", "b=2", "--minutes=9", "--wheel", "x"]
    done = run("tell", *words, flags=flags)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["argv"] == [str(checkout / "benchmarks/start.py"), "gpu", "tell", *words]
    unpacked = Path(told["tiny"]).parent
    assert unpacked.parent == checkout.parent / "temporary"
    assert told["path"][:2] == [str(unpacked), str(checkout)]
    assert str(checkout / "benchmarks") not in told["path"]
    assert told["child"] == told["spawned"] == told["tiny"]
    assert told["PYTHONPATH"].split(os.pathsep) == [str(unpacked), str(checkout), "elsewhere"]
    assert leftovers(checkout) == []


def test_what_killed_starters_left_is_removed(run: Run, checkout: Path) -> None:
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout
    left = checkout.parent / f"temporary/{start.PREFIX}{gone.strip()}-abc"
    running = checkout.parent / f"temporary/{start.PREFIX}{os.getpid()}-abc"
    for folder in (left, running):
        folder.mkdir()
    assert run("0").returncode == 0
    assert leftovers(checkout) == [running]


@pytest.mark.parametrize(("word", "status"), [("0", 0), ("3", 3), ("arena.own", 1), ("nowhere", 2)])
def test_what_was_unpacked_is_removed_and_the_status_kept(run: Run, checkout: Path, word: str, status: int) -> None:
    assert run(word).returncode == status
    assert leftovers(checkout) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_script_and_the_folder_is_removed(checkout: Path, number: signal.Signals) -> None:
    line = command(checkout, "--wheels", "wheels", "wait")
    with subprocess.Popen(line, cwd=checkout, env=environment(checkout), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        unpacked = Path(process.stdout.readline().strip()).parent
        assert (unpacked / "tiny.py").is_file()
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert not unpacked.exists() and leftovers(checkout) == []


def test_missing_packages_are_named_with_commands_that_work(run: Run, checkout: Path) -> None:
    done = run("tell", wheels=False)
    assert done.returncode == 2 and done.stdout == ""
    said = done.stderr.splitlines()
    assert said[0].startswith("arena: this machine lacks tiny, Some_thing, pytest, hypothesis.")
    listing, collecting = (line.strip() for line in said if line.startswith("  "))
    python, flag, code, arrow, place = shlex.split(listing)
    assert (python, flag, arrow) == ("python3", "-c", ">")
    shown = subprocess.run([sys.executable, flag, code], capture_output=True, text=True, check=True).stdout
    (checkout / place).write_text(shown)
    assert {"torch", "pytest"} < read_list(checkout / place).keys()
    words = shlex.split(collecting)
    assert words[:4] == ["python", "-m", "benchmarks", "collect"]
    parsed = tyro.cli(Collect, args=words[4:])
    assert parsed.python == PYTHON and parsed.has_file == Path(place)
    assert said[-1].endswith(f"start with --wheels {parsed.out}")


def test_one_missing_wheel_is_named(run: Run, checkout: Path) -> None:
    next((checkout / "wheels").glob("some*")).unlink()
    done = run("tell")
    assert done.returncode == 2 and "this machine lacks Some_thing. List" in done.stderr
    assert "--out wheels --has-file" in done.stderr and leftovers(checkout) == []


def test_a_package_that_is_missing_deeper_down_is_named(
    run: Run, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("nowhere.deep")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "arena: nowhere cannot be imported on this machine: No module named 'nowhere'" in done.stderr
    assert "benchmarks collect" in done.stderr
    assert "Traceback" in run("arena.own").stderr  # the project's own mistake, not the machine's
    monkeypatch.setenv("ARENA_DEBUG", "1")
    assert "Traceback" in run("nowhere.deep").stderr


def test_help_names_its_own_flag(run: Run) -> None:
    assert "[--wheels FOLDER]" in run("0", "--help").stdout
    assert run("0").stdout == ""


@pytest.mark.parametrize(
    ("name", "tags", "message"),
    [
        ("tiny", "cp310-cp310-linux_x86_64", "another Python or platform than this: Python 3"),
        ("other", f"cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-win_amd64", "other-.*another Python"),
        ("other", "py3-none-manylinux_2_99_x86_64", "other-.*another Python"),
        ("Tiny", "py2.py3-none-any", "two wheels of tiny, .*iny-1.0.* and .*iny-1.0.*: remove one"),
        ("some_thing", "cp32-abi3-linux_x86_64", "two wheels of some-thing"),
        ("other", "any", "is not named like a wheel"),
    ],
)
def test_wheels_that_do_not_fit_are_named(run: Run, checkout: Path, name: str, tags: str, message: str) -> None:
    make_wheel(checkout / "wheels", name, tags=tags)
    done = run("tell")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert leftovers(checkout) == []


@pytest.mark.parametrize("cut", [0, 60, -10])
def test_a_broken_wheel_is_named(run: Run, checkout: Path, cut: int) -> None:
    wheel = make_wheel(checkout / "wheels", "tiny", files={"tiny.py": "text = 1\n" * 50})
    whole = bytearray(wheel.read_bytes())
    if cut == 60:
        whole[whole.index(b"text = 1")] ^= 1  # a bit that its checksum knows
    wheel.write_bytes(whole if cut == 60 else whole[:cut])
    done = run("tell")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{Path('wheels') / wheel.name} is broken" in done.stderr and leftovers(checkout) == []


@pytest.mark.parametrize(
    "entry", ["../evil.py", "/evil.py", "tiny/../../evil.py", "tiny-1.0.data/purelib/../../../evil"]
)
def test_entries_that_leave_the_folder_are_refused(run: Run, checkout: Path, entry: str) -> None:
    make_wheel(checkout / "wheels", "tiny", files={"tiny.py": "", entry: "evil"})
    done = run("tell")
    assert done.returncode == 2 and f"its entry {entry} leads out" in done.stderr
    assert not list(checkout.parent.rglob("evil*"))


def test_folders_without_wheels_are_refused(run: Run, checkout: Path) -> None:
    shutil.rmtree(checkout / "wheels")
    assert "no such folder" in run("tell").stderr
    (checkout / "wheels").mkdir()
    assert "no *.whl is in that folder" in run("tell").stderr


def test_all_kinds_of_entries(tmp_path: Path) -> None:
    wheel = tmp_path / "kinds.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        for place in ("kinds/", "kinds/__init__.py", "k-1.data/purelib/pure.py", "k-1.data/platlib/native/a.so"):
            opened.writestr(place, "" if place.endswith("/") else place)
        for place in ("k-1.data/scripts/run", "k-1.data/data/share/man", "k-1.data/headers/a.h"):
            opened.writestr(place, "left out")
        tool = zipfile.ZipInfo("kinds/tool")
        tool.external_attr = 0o100755 << 16
        opened.writestr(tool, "kinds/tool")
    with zipfile.ZipFile(wheel) as opened:
        start.unpack(opened, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"kinds/__init__.py", "kinds/tool", "pure.py", "native/a.so"}
    assert os.access(tmp_path / "out/kinds/tool", os.X_OK) and not os.access(tmp_path / "out/pure.py", os.X_OK)


def test_tags_suit_as_packaging_says() -> None:
    """Its rules are written out in the starter, which cannot import it."""
    right = set(sys_tags())
    pythons = [
        f"{kind}{number}"
        for kind in ("py", "cp", "pp")
        for number in ("2", "3", "27", *(f"3{n}" for n in range(2, 16)))
    ]
    abis = ["none", "abi3", *(f"cp3{n}{t}" for n in range(10, 14) for t in ("", "t"))]
    levels = ["1", "2010", "2014", *(f"_2_{n}" for n in range(5, 50)), "_3_0"]
    places = ["any", "linux_x86_64", "linux_aarch64", "win_amd64", "musllinux_1_2_x86_64", "macosx_11_0_arm64"]
    places += [f"manylinux{level}_{kind}" for level in levels for kind in ("x86_64", "aarch64")]
    checked = {True: 0, False: 0}
    for python, abi, place in itertools.product(pythons, abis, places):
        expected = Tag(python, abi, place) in right
        assert start.suits(python, abi, place) == expected, (python, abi, place)
        checked[expected] += 1
    assert checked[True] > 100 and checked[False] > 100
