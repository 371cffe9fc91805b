"""Collects wheels for a bare GPU machine: `python -m benchmarks collect --python 3.12 --out wheels/cp312`.

The folder holds what a machine with torch, transformers and peft lacks, in the versions that are installed here, and
no more. `benchmarks/start.py --wheels` runs from it without pip or a network.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version
from tyro.conf import UseAppendAction, arg

from arena.progress import console
from arena.storage.files import atomic_write, local_path
from benchmarks.needed import PLATFORMS, Target, Versions, closure, provides, read_list
from benchmarks.start import dependencies

THERE = ("torch", "transformers", "peft")


@dataclass
class Collect:
    """Fetch the wheels that a bare GPU machine lacks, for benchmarks/start.py --wheels."""

    python: Annotated[str, arg(help="The version of Python there, such as 3.12.")]
    out: Annotated[Path, arg(help="The folder of wheels to write; wheels in it that are not needed are removed.")]
    has: UseAppendAction[
        Annotated[
            tuple[str, ...],
            arg(
                metavar="NAME",
                help="A package that is there, with all that it needs. May be given several times.",
                help_behavior_hint=f"(default: {', '.join(THERE)}, or the list of --has-file)",
            ),
        ]
    ] = ()
    has_file: Annotated[Path | None, arg(help="What `pip list` or `pip freeze` printed there.")] = None
    extra: UseAppendAction[
        Annotated[
            tuple[str, ...],
            arg(
                metavar="NAME|WHEEL",
                help="A package to add, or the file of a wheel, such as flash-attn's. May be given several times.",
                help_behavior_hint="",
            ),
        ]
    ] = ()

    def run(self) -> None:
        """Finds what is lacking, fetches it, checks the set and lists it."""
        target = Target(self.python)
        check_folder(local_path(self.out, "--out"))
        added = [Path(each) for each in self.extra if each.endswith(".whl")]
        check_tags(added, target)
        named = [Requirement(each) for each in self.extra if not each.endswith(".whl")]
        wanted = [*target.applying(dependencies()), *named]
        wanted += [each for wheel in added for each in target.applying(requirements_of(wheel))]
        there = self._there(target)
        for each in named:
            there.pop(canonicalize_name(each.name), None)
        lacking = closure(wanted, target, there)
        for wheel in added:
            lacking.pop(name_of(wheel), None)
        if "torch" in lacking:
            asked = next(each for each in wanted if each.name == "torch")
            raise ValueError(f"the GPU machine needs {asked} of its own, built for its driver: it is not collected")
        if not lacking and not added:
            console.print("that machine has all that is needed: start there without --wheels")
            return
        collect(lacking, added, wanted, target, there, self.out)

    def _there(self, target: Target) -> dict[str, Version | None]:
        listed = read_list(self.has_file) if self.has_file else {}
        names = self.has or (() if self.has_file else THERE)
        closed = closure([Requirement(name) for name in names], target, {})
        return {**dict.fromkeys(closed), **listed}


def collect(
    lacking: Mapping[str, Requirement],
    added: Sequence[Path],
    wanted: Sequence[Requirement],
    target: Target,
    there: Versions,
    out: Path,
) -> None:
    """Makes `out` the folder of these wheels, or leaves it as it was."""
    before = sorted(out.glob("*.whl"))
    with atomic_write(out) as draft:
        draft.mkdir()
        kept = reusable(before, lacking, target)
        for wheel in [*kept.values(), *added]:
            shutil.copyfile(wheel, draft / wheel.name)
        if rest := [str(each) for name, each in lacking.items() if name not in kept]:
            console.print(f"fetching {', '.join(sorted(rest))}")
            download(rest, target, draft)
        wheels = sorted(draft.iterdir())
        check_tags(wheels, target)
        check_requirements(wheels, wanted, target, there)
    for wheel in (out / wheel.name for wheel in wheels):
        console.print(f"{wheel.stat().st_size / 2**20:8.2f} MiB  {wheel.name}", soft_wrap=True)
    if gone := sorted({wheel.name for wheel in before} - {wheel.name for wheel in wheels}):
        console.print(f"removed: {', '.join(gone)}")
    size = sum((out / wheel.name).stat().st_size for wheel in wheels) / 2**20
    console.print(f"{len(wheels)} wheels for Python {target.python} in {out}, {size:.1f} MiB")


def check_folder(out: Path) -> None:
    """Refuses to write where something else than wheels is, as the whole folder is written anew."""
    others = [path.name for path in (out.iterdir() if out.exists() else []) if path.suffix != ".whl"]
    if others:
        raise ValueError(f"--out {out} holds {others[0]}, which is no wheel: name a folder for wheels alone")


def name_of(wheel: Path) -> str:
    return parse_wheel_filename(wheel.name)[0]


def is_whole(wheel: Path) -> bool:
    try:
        with zipfile.ZipFile(wheel) as opened:
            return opened.testzip() is None
    except zipfile.BadZipFile:
        return False


def reusable(wheels: Iterable[Path], lacking: Mapping[str, Requirement], target: Target) -> dict[str, Path]:
    """Those of an earlier call that are what is lacking now."""
    found, tags = {}, target.tags()
    for wheel in wheels:
        name, version, _, own = parse_wheel_filename(wheel.name)
        if name in lacking and provides({name: version}, lacking[name]) and own & tags and is_whole(wheel):
            found[str(name)] = wheel
    return found


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
            raise ValueError(f"{wheel} is no whole wheel: fetch or build it again")
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


def check_requirements(wheels: Sequence[Path], wanted: Iterable[Requirement], target: Target, there: Versions) -> None:
    """Raises `ValueError` where what is wanted, or what a wheel needs, is neither among the wheels nor there."""
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
        raise ValueError(f"{'; '.join(dict.fromkeys(problems))}: --extra adds a package")
