"""Collects wheels for a bare GPU machine: `python -m benchmarks collect --python 3.12 --out wheels/cp312`.

The folder holds what a machine with torch, transformers and peft lacks, in the versions that are installed here, and
no more. `benchmarks/start.py --wheels` runs from it without pip or a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from tyro.conf import UseAppendAction, arg

from arena.bundle.needed import Target, Versions, closure, read_list
from arena.bundle.wheels import check_requirements, check_tags, fill, name_of, requirements_of, reusable
from arena.progress import console
from arena.storage.files import atomic_write, local_path
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
        wheels = fill(draft, lacking, target, [*reusable(before, lacking, target), *added])
        check_requirements(wheels, wanted, target, there, hint="--extra adds a package")
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
