"""Wheels for another machine: fetched with pip, checked, and complete with what is there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from arena.bundle.needed import PLATFORMS, Target, Versions, provides
from arena.progress import console


def name_of(wheel: Path) -> str:
    return parse_wheel_filename(wheel.name)[0]


def is_whole(wheel: Path) -> bool:
    try:
        with zipfile.ZipFile(wheel) as opened:
            return opened.testzip() is None
    except zipfile.BadZipFile:
        return False


def reusable(wheels: Iterable[Path], lacking: Mapping[str, Requirement], target: Target) -> list[Path]:
    """Those of an earlier call that are what is lacking now."""
    found, tags = [], target.tags()
    for wheel in wheels:
        name, version, _, own = parse_wheel_filename(wheel.name)
        if name in lacking and provides({name: version}, lacking[name]) and own & tags and is_whole(wheel):
            found.append(wheel)
    return found


def fill(folder: Path, lacking: Mapping[str, Requirement], target: Target, known: Sequence[Path]) -> list[Path]:
    """Copies wheels that are known into a folder, and fetches those of what else is lacking.

    Raises:
        ValueError: one cannot be fetched, or does not suit the target.
    """
    for wheel in known:
        shutil.copyfile(wheel, folder / wheel.name)
    names = {name_of(wheel) for wheel in known}
    if rest := sorted(str(each) for name, each in lacking.items() if name not in names):
        console.print(f"fetching {', '.join(rest)}")
        download(rest, target, folder)
    wheels = sorted(folder.iterdir())
    check_tags(wheels, target)
    return wheels


def download(wanted: Sequence[str], target: Target, folder: Path) -> None:
    """Fetches wheels with pip, which knows the index and the proxy that are set up here."""
    places = [word for place in PLATFORMS for word in ("--platform", place)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation",
        "cp", "--python-version", target.python, *places, "--dest", str(folder), *wanted,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ValueError(f"pip could not fetch the wheels for Python {target.python}: {said[-1]}")


def check_tags(wheels: Iterable[Path], target: Target) -> None:
    """Raises `ValueError` for wheels of another Python or platform, of the same package, or that are broken."""
    tags, known = target.tags(), set()
    for wheel in wheels:
        if not is_whole(wheel):
            raise ValueError(f"{wheel} is not a whole wheel: fetch or build it again")
        name, _, _, own = parse_wheel_filename(wheel.name)
        if not own & tags:
            raise ValueError(f"{wheel} is not for Python {target.python} on x86_64 Linux")
        if name in known:
            raise ValueError(f"{wheel.name}: there is another wheel of {name}")
        known.add(name)


def requirements_of(wheel: Path) -> list[str]:
    """What a wheel's own metadata asks for."""
    found = list(distributions(path=[str(wheel)]))
    if len(found) != 1:
        raise ValueError(f"{wheel} has no metadata of a package")
    return found[0].requires or []


def check_requirements(
    wheels: Sequence[Path], wanted: Iterable[Requirement], target: Target, there: Versions, *, hint: str
) -> None:
    """Raises `ValueError` where what is wanted, or what a wheel needs, is neither among the wheels nor there.

    Args:
        hint: what the user can do about it.
    """
    collected = {name_of(wheel): wheel for wheel in wheels}
    known = dict(there) | {name: parse_wheel_filename(wheel.name)[1] for name, wheel in collected.items()}
    todo = [("arena", each) for each in wanted]
    todo += [(wheel.name, each) for wheel in wheels for each in target.applying(requirements_of(wheel))]
    problems = []
    for asking, each in todo:
        name = canonicalize_name(each.name)
        if not provides(known, each):
            has = f"there is {name} {known[name]}" if name in known else "it is neither collected nor there"
            problems.append(f"{asking} needs {each}, and {has}")
        for extra in each.extras if name in collected else ():
            wheel = collected[name]
            more = [(wheel.name, new) for new in target.applying(requirements_of(wheel), extra)]
            todo += [pair for pair in more if pair not in todo]
    if problems:
        raise ValueError(f"{'; '.join(dict.fromkeys(problems))}: {hint}")
