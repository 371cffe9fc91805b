"""Manifests of folders: the size and SHA-256 of each file, and the SHA-256 of the manifest itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arena.storage.files import file_digest

NAME = "manifest.json"
FORMAT = 4  # 4: `resume_fingerprint`, and evaluations in folders called `evaluation-<n>`
OWN = "sha256"  # the key of the digest of the manifest without this entry
LARGEST = 2**24  # bytes; a larger manifest is refused


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of the files in a folder; it must be the last file written there.

    Args:
        facts: plain JSON to save with it; `format`, `files` and `sha256` are added.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {**facts, "format": FORMAT, "files": files}
    (folder / NAME).write_text(_text({**content, OWN: _digest(content)}), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a manifest, which must be byte for byte as `write_manifest` wrote it.

    Raises:
        ValueError: it is missing, was changed, or was written by another version of this package.
    """
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {NAME}: it was never completed")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is larger than any manifest")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        rest = dict(content)
        own = rest.pop(OWN)
    except (ValueError, KeyError, TypeError, RecursionError):  # not JSON, or JSON of another kind
        raise ValueError(f"{path} is damaged") from None
    # the text must be exactly as it was written, or a changed blank would go unnoticed
    if own != _digest(rest) or text != _text(content):
        raise ValueError(f"{path} is damaged")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{folder} was written by another version of arena (format {content.get('format')}, this one reads "
            f"{FORMAT}): use that version, or start again"
        )
    return dict(content)


def damage(folder: Path, digest: Callable[[Path], str] = file_digest) -> str | None:
    """How a folder differs from its manifest; None if all of its files, and no others, are there and unchanged.

    Args:
        digest: the SHA-256 of a file; `remembered_digest` reads it once per process.
    """
    try:
        files = read_manifest(folder)["files"]
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {NAME}
        for name in sorted(present ^ files.keys()):
            return f"{name} is missing" if name in files else f"{name} does not belong to it"
        for name, facts in files.items():
            path = folder / name
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {facts['bytes']:,}"
            if digest(path) != facts["sha256"]:
                return f"{name} is damaged: its SHA-256 differs"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
