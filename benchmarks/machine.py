"""What the machine has for a benchmark: the versions of packages, what is missing, and whether flash-attn is usable."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from arena.storage.files import write_json

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "flash-attn", "liger-kernel")
MISSING = {
    "flash-attn": "flash-attn is not installed, so flex and eager attention take its place",
    "triton": "triton is not installed: nothing can be compiled for the GPU, so flex and fused parts do not run",
}
TRIAL_SECONDS = 180


def versions() -> dict[str, str]:
    """Of Python and of the packages that the figures depend on; those that are not there are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def provenance() -> dict[str, Any]:
    """When, with which versions and by which command something was measured, for the head of a page."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }


def made_by(device: str, result: dict[str, Any]) -> str:
    """The same in words."""
    names = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"{device}; {names}. Made by `{result['command']}` at {result['date']}."


def missing() -> list[str]:
    """What would make the figures better and is not there, in words."""
    known = versions()
    return [words for name, words in MISSING.items() if name not in known]


def slug(device: str) -> str:
    """A device's name as a part of a file's name, such as `nvidia-h100-80gb-hbm3`."""
    return "-".join(re.findall("[a-z0-9]+", device.lower()))


def why_not_flash(words: list[str], kept: Path) -> str | None:
    """Why flash-attn must not even be tried in this process, found by trying it in another; None where it may be.

    A build that does not suit the card can end the process that calls it, or hang.

    Args:
        words: the script's arguments that say which model it is.
        kept: a JSON file of what was found; where it exists nothing is tried.
    """
    if not kept.is_file():
        command = [sys.executable, "-m", "benchmarks", "gpu", "--plan", "--tests", "", *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TRIAL_SECONDS)
            told = (done.stdout + done.stderr).strip().splitlines()[-1:]
            status = f"status {done.returncode}" + (f" ({told[0][:300]})" if told else "")
            why = None if done.returncode == 0 else f"its trial in another process ended with {status}"
        except subprocess.TimeoutExpired:
            why = f"its trial in another process did not end within {TRIAL_SECONDS} s"
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"why_not": why})
    found: str | None = json.loads(kept.read_text(encoding="utf-8"))["why_not"]
    return found
