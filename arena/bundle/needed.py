"""Which packages another machine lacks: requirements as they apply to its Python, less what is there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

# the lowest level first, as pip prefers it: such a wheel runs with every newer glibc too
LEVELS = ["manylinux1", "manylinux2010", "manylinux2014", *(f"manylinux_2_{minor}" for minor in range(5, 35))]
PLATFORMS = [f"{level}_x86_64" for level in LEVELS]
LISTED = re.compile(r"([A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)(?:(?:={2,3}|\s+)(\d\S*)(?:\s.*)?|\s+@\s.*)?")
Versions = Mapping[str, Version | None]  # None: not known, and taken for a right one


@dataclass(frozen=True)
class Target:
    """The Python that wheels are for, on Linux with glibc on x86_64."""

    python: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"3\.\d+", self.python) or int(self.python[2:]) < 11:
            raise ValueError(f"--python {self.python}: name a version such as 3.12, at least 3.11")

    @property
    def environment(self) -> dict[str, str]:
        """What markers of requirements ask about."""
        return {
            "python_version": self.python, "python_full_version": f"{self.python}.0", "os_name": "posix",
            "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64",
            "implementation_name": "cpython", "platform_python_implementation": "CPython",
        }  # fmt: skip

    def tags(self) -> set[Tag]:
        """Of wheels that suit it; linux_x86_64 is what wheels built by hand have."""
        version, places = (3, int(self.python[2:])), [*PLATFORMS, "linux_x86_64"]
        interpreter = f"cp3{version[1]}"
        return {*cpython_tags(version, platforms=places), *compatible_tags(version, interpreter, places)}

    def applying(self, requirements: Iterable[str], extra: str = "") -> list[Requirement]:
        """Those whose marker is true there, with an extra asked for or with none."""
        asked = self.environment | {"extra": extra}
        found = map(Requirement, requirements)
        return [each for each in found if each.marker is None or each.marker.evaluate(asked)]


def read_list(path: Path) -> Versions:
    """The packages that `pip list` or `pip freeze` printed, with their versions where they are shown.

    Raises:
        ValueError: a line is neither, or there is none.
    """
    found: dict[str, Version | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith(("#", "-")) or line.split()[:2] == ["Package", "Version"]:
            continue
        parts = LISTED.fullmatch(line.strip())
        try:
            version = Version(parts[2]) if parts and parts[2] else None
        except InvalidVersion:
            parts = None
        if parts is None:
            raise ValueError(f"{path}, line {number}: {line!r} is not a line of `pip list` or `pip freeze`")
        found[canonicalize_name(parts[1])] = version
    if not found:
        raise ValueError(f"{path} lists no packages")
    return found


def provides(known: Versions, requirement: Requirement) -> bool:
    """Whether a package is known, in a version that is asked for."""
    name = canonicalize_name(requirement.name)
    version = known.get(name)
    return name in known and (version is None or requirement.specifier.contains(version, prereleases=True))


def closure(wanted: Iterable[Requirement], target: Target, there: Versions) -> dict[str, Requirement]:
    """By name, what `wanted` needs, itself included, and `there` does not have.

    Returns:
        Requirements of the very versions that are installed here. What is not installed stands as it was asked for, and
        what it needs in turn is not known.
    """
    todo, lacking = [*wanted], dict[str, Requirement]()
    seen: set[tuple[str, str]] = set()
    while todo:
        each = todo.pop()
        name = canonicalize_name(each.name)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            installed = None
        extras = set(each.extras)  # which what is there may lack too
        if not provides(there, each):
            lacking[name] = Requirement(f"{name}=={installed.version}" if installed else f"{name}{each.specifier}")
            extras.add("")
        for extra in extras:
            if installed and (name, extra) not in seen:
                seen.add((name, extra))
                todo += target.applying(installed.requires or [], extra)
    return lacking
