"""What the machine has for a benchmark: versions, what is missing, installing flash-attn, and the tests of the GPU."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]  # of the checkout: tests and pyproject.toml stand there
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "flash-attn", "liger-kernel")
MARKED = re.compile(r"^\s*(?:@|pytestmark\b.*)pytest\.mark\.gpu\b|^[^\"']*marks=.*pytest\.mark\.gpu\b", re.MULTILINE)
INSTALLED = "packages"  # where flash-attn is put, so that it travels with the results


def versions() -> dict[str, str]:
    """Of Python and of the packages that the figures depend on; those that are not there are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def use_packages(folder: Path) -> None:
    """Makes what an earlier part installed in `folder` importable, here and in processes that this one starts."""
    place = (folder / INSTALLED).absolute()
    if place.is_dir() and str(place) not in sys.path:
        sys.path.insert(0, str(place))
    paths = [str(place), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))


def missing() -> list[str]:
    """What would make the figures better and is not there, in words."""
    known = versions()
    words = {
        "flash-attn": "flash-attn is not installed, so flex and eager take its place (--install installs it)",
        "triton": "triton is not installed: nothing can be compiled for the GPU, so flex and fused parts do not run",
    }
    return [said for name, said in words.items() if name not in known]


def install_flash(folder: Path, wheels: Path | None) -> None:
    """Installs flash-attn into `folder`: from a folder of wheels without the network, or built by pip.

    Raises:
        ValueError: pip could not, or the folder has no wheel of it.
    """
    target = ["--target", str((folder / INSTALLED).absolute())]
    if wheels is None:
        how = ["--no-build-isolation", "--no-deps", "flash-attn", "einops"]
    else:
        found = sorted(wheels.glob("flash_attn-*.whl")) + sorted(wheels.glob("einops-*.whl"))
        if not any(path.name.startswith("flash_attn") for path in found):
            raise ValueError(f"--wheels {wheels}: there is no flash_attn-*.whl in that folder")
        how = ["--no-index", "--no-deps", *map(str, found)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", *target, *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"flash-attn could not be installed: {_last_line(done.stderr or done.stdout)}")
    use_packages(folder)


def gpu_tests(place: str) -> list[Path]:
    """The test files below `place`, or `place` itself, that have tests marked `gpu`."""
    where = ROOT / place
    files = sorted(where.rglob("test_*.py")) if where.is_dir() else [where]
    if not where.exists():
        raise ValueError(f"--tests {place}: there is no such file or folder in {ROOT}")
    return [path for path in files if MARKED.search(path.read_text(encoding="utf-8"))]


def name_of(path: Path) -> str:
    """A test file's name that no other has, such as `model.test_gpu`."""
    within = path.relative_to(ROOT / "tests") if path.is_relative_to(ROOT / "tests") else Path(path.name)
    return ".".join(within.with_suffix("").parts)


def run_tests(path: Path, seconds: float | None) -> dict[str, Any]:
    """`pytest -m gpu` of one file, in a process of its own.

    Returns:
        `status` (`done` where all that ran passed, else `failed`), `closing`: pytest's last line, and for a failure
        the `reason` and the end of what was printed.
    """
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-c", str(ROOT / "pyproject.toml"), str(path)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        said = f"stopped after {seconds:.0f} s"
        return {"status": "stopped", "closing": said, "reason": said}
    said = done.stdout.strip() or done.stderr.strip()
    closing = _last_line(said).strip("= ")
    if done.returncode == 0:
        return {"status": "done", "closing": closing}
    return {"status": "failed", "closing": closing, "reason": closing, "end": said[-4000:]}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1]
