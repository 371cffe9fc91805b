"""What the machine has for a benchmark: the versions of packages, and what is missing."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "flash-attn", "liger-kernel")
MISSING = {
    "flash-attn": "flash-attn is not installed, so flex and eager attention take its place",
    "triton": "triton is not installed: nothing can be compiled for the GPU, so flex and fused parts do not run",
}


def versions() -> dict[str, str]:
    """Of Python and of the packages that the figures depend on; those that are not there are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def missing() -> list[str]:
    """What would make the figures better and is not there, in words."""
    known = versions()
    return [words for name, words in MISSING.items() if name not in known]


def slug(device: str) -> str:
    """A device's name as a part of a file's name, such as `nvidia-h100-80gb-hbm3`."""
    return "-".join(re.findall("[a-z0-9]+", device.lower()))
