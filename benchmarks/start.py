"""Starts the GPU script on a bare machine: `python3 benchmarks/start.py --wheels FOLDER [ARGUMENTS ...]`.

Such a machine has Python and torch, but no network and not all that arena needs. `python -m benchmarks collect`
fetches the rest elsewhere. This file unpacks those wheels, puts them first on the path, and then runs
`python -m benchmarks gpu` in this process with the other arguments. It has to come before everything else, because
transformers looks at what is installed only once, when it is imported; so it uses the standard library alone.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import zipfile
import zlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]  # of the checkout: pyproject.toml and the tests are there
SCRIPT = "benchmarks.__main__"
TEST_PACKAGES = ["pytest", "hypothesis"]  # the script also runs the tests that are marked gpu
WHEEL = re.compile(r"([^-]+)-([^-]+)(?:-\d[^-]*)?-([^-]+)-([^-]+)-([^-]+)\.whl")
MANYLINUX = re.compile(r"manylinux(?:(1|2010|2014)|_(\d+)_(\d+))_(.+)")
GLIBC = {"1": (2, 5), "2010": (2, 12), "2014": (2, 17)}  # that the older names of manylinux stand for
PREFIX = "arena-wheels-"  # and the process's number, of the folder that wheels are unpacked into
LIST = 'import importlib.metadata as m; [print(d.metadata["Name"], d.version) for d in m.distributions()]'
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)  # what zipfile raises


def main() -> None:
    """Prepares the path and runs the script; mistakes and missing packages are reported with status 2."""
    os.environ["ARENA_STARTED"] = str(time.time())  # the script's minutes count from here
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is missing is not to be waited for
    if sys.version_info < (3, 11):  # noqa: UP036 - nothing has checked the Python of that machine
        fail(f"arena needs Python 3.11 or newer, and this is {platform.python_version()}")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--wheels", type=Path)
    given, words = parser.parse_known_args()
    if {"-h", "--help"} & set(words):
        print(f"usage: {sys.argv[0]} [--wheels FOLDER], followed by the arguments of the script:\n")
    end_on_signals()
    try:
        unpacked = [unpack_all(check_wheels(given.wheels))] if given.wheels else []
    except (ValueError, OSError) as error:
        fail(str(error))
    use_first([*unpacked, ROOT])
    if lacking := missing():
        fail(f"this machine lacks {', '.join(lacking)}{how_to_collect(given.wheels)}")
    sys.argv[1:] = ["gpu", *words]
    run_script(given.wheels)


def run_script(wheels: Path | None) -> None:
    """Runs the script; a package that it cannot import is reported like the missing ones."""
    try:
        importlib.import_module(SCRIPT).main()
    except ImportError as error:
        name = (error.name or "arena").partition(".")[0]
        if name in ("arena", "benchmarks") or name in sys.stdlib_module_names or os.environ.get("ARENA_DEBUG"):
            raise
        fail(f"{name} cannot be imported on this machine: {error}{how_to_collect(wheels)}")


def end_on_signals() -> None:
    """Makes SIGTERM and SIGHUP raise `SystemExit` until the script has handlers of its own: the wheels are removed."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is signal.SIG_DFL:
            signal.signal(each, end)


def check_wheels(folder: Path) -> list[Path]:
    """The wheels of a folder: one of each package, all for this Python and platform.

    Raises:
        ValueError: there is none, or one that does not fit.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ValueError(f"--wheels {folder}: {'no *.whl is in that folder' if folder.is_dir() else 'no such folder'}")
    known: dict[str, Path] = {}
    for wheel in wheels:
        parts = WHEEL.fullmatch(wheel.name)
        if parts is None:
            raise ValueError(f"{wheel} is not named like a wheel")
        if not any(
            suits(python, abi, place)
            for python in parts[3].split(".")
            for abi in parts[4].split(".")
            for place in parts[5].split(".")
        ):
            here = f"Python {platform.python_version()} on {sysconfig.get_platform()} {' '.join(platform.libc_ver())}"
            raise ValueError(f"{wheel} is for another Python or platform than this: {here.strip()}")
        name = normalized(parts[1])
        if name in known:
            raise ValueError(f"{folder} has two wheels of {name}, {known[name].name} and {wheel.name}: remove one")
        known[name] = wheel
    return wheels


def normalized(name: str) -> str:
    """A package's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def suits(python: str, abi: str, place: str) -> bool:
    """Whether a wheel's tags, such as cp312, cp312 and manylinux_2_28_x86_64, suit this interpreter."""
    minor, threads = sys.version_info.minor, "t" if "t" in sys.abiflags else ""
    own = f"cp3{minor}"
    older = [f"3{number}" for number in range(minor + 1)]
    if abi == "none":
        fits = python in (own, "py3") or (python[:2] == "py" and python[2:] in older)
    elif abi == "abi3":
        fits = not threads and python[:2] == "cp" and python[2:] in older[2:]  # abi3 began with 3.2
    else:
        fits = (python, abi) == (own, own + threads)
    return fits and (abi == "none" if place == "any" else suits_platform(place))


def suits_platform(place: str) -> bool:
    """Whether the platform of a wheel is this one, with a C library that is not too old."""
    here = re.sub(r"[-.]", "_", sysconfig.get_platform())
    if place == here:
        return True
    parts = MANYLINUX.fullmatch(place)
    library, version = platform.libc_ver()
    if parts is None or f"linux_{parts[4]}" != here or library != "glibc":
        return False
    wanted = GLIBC[parts[1]] if parts[1] else (int(parts[2]), int(parts[3]))
    return tuple(map(int, version.split(".")[:2])) >= wanted


def unpack_all(wheels: list[Path]) -> Path:
    """Unpacks wheels into a temporary folder, which is removed when the process ends."""
    remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # the first to register is the last to be called
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as opened:
                unpack(opened, folder)
        except BROKEN as error:
            raise ValueError(f"{wheel} is broken, fetch it again: {error}") from error
        except ValueError as error:
            raise ValueError(f"{wheel}: {error}") from error
    return folder


def remove_leftovers() -> None:
    """Removes what starters that were killed have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}[0-9]*-*"):
        if (
            not Path("/proc", folder.name.removeprefix(PREFIX).partition("-")[0]).exists()
            and Path("/proc/self").exists()
        ):
            shutil.rmtree(folder, ignore_errors=True)


def unpack(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Unpacks what can be imported; scripts, headers and data are left out."""
    for entry in wheel.infolist():
        if entry.is_dir():
            continue
        parts = PurePosixPath(entry.filename).parts
        if entry.filename.startswith("/") or ".." in parts:
            raise ValueError(f"its entry {entry.filename} leads out of the folder")
        if parts[0].endswith(".data"):
            if parts[1:2] not in (("purelib",), ("platlib",)):
                continue
            parts = parts[2:]
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with wheel.open(entry) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        if entry.external_attr >> 16 & 0o111:
            target.chmod(target.stat().st_mode | 0o111)


def use_first(folders: list[Path]) -> None:
    """Puts folders first on the path, here and in processes that are started from here.

    The folder of this file, which Python puts there itself, is taken away: its modules are not to be imported by their
    bare names.
    """
    first, beside = [str(each.absolute()) for each in folders], Path(__file__).resolve().parent
    sys.path[:] = [*first, *(each for each in sys.path if each not in first and Path(each).resolve() != beside)]
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*first, *filter(None, others)]))


def dependencies() -> list[str]:
    """What the script needs, as pyproject.toml and the tests ask for it."""
    import tomllib  # new in 3.11, which is checked above

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *TEST_PACKAGES]


def missing() -> list[str]:
    """The names of packages that are needed and not installed."""
    lacking = []
    for each in dependencies():
        name = re.split(r"[^\w.-]", each, maxsplit=1)[0]
        try:
            distribution(name)
        except PackageNotFoundError:
            lacking.append(name)
    return lacking


def how_to_collect(wheels: Path | None) -> str:
    """The end of a message about packages that are missing."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    out = wheels or f"wheels/cp{python.replace('.', '')}"
    return (
        ". List what is here, and take the list to where arena is installed and there is a network:\n"
        f"  python3 -c '{LIST}' > there.txt\n"
        f"  python -m benchmarks collect --python {python} --out {out} --has-file there.txt\n"
        f"Bring that folder here and start with --wheels {out}"
    )


def fail(message: str) -> NoReturn:
    print(f"arena: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
