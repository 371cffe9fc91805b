"""Folders whose every byte is accounted for: a manifest with the size and SHA-256 of each file, and of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from arena.files import file_digest

NAME = "manifest.json"
FORMAT = 3
OWN = "sha256"  # of the manifest without this entry
LARGEST = 2**24  # bytes of a manifest that is read at all


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of the files that stand in a folder, as its last file.

    Args:
        facts: plain JSON that is kept with it; `format`, `files` and `sha256` are added.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {**facts, "format": FORMAT, "files": files}
    (folder / NAME).write_text(_text({**content, OWN: _digest(content)}), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote, byte for byte.

    Raises:
        ValueError: there is none, it was changed, or it is of another version of this package.
    """
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {NAME}: it was never completed")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is larger than any manifest")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        kept = dict(content)
        own = kept.pop(OWN)
    except (ValueError, KeyError, TypeError, RecursionError):  # a broken text, or JSON of another kind
        raise ValueError(f"{path} is damaged") from None
    # the text itself must be as it was written, or a changed blank would go unnoticed
    if own != _digest(kept) or text != _text(content):
        raise ValueError(f"{path} is damaged")
    if content.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {content.get('format')}, this version reads {FORMAT}: train anew")
    return dict(content)


def damage(folder: Path) -> str | None:
    """Why a folder is not what its manifest says; None where every file is there, whole, and no other."""
    try:
        files = read_manifest(folder)["files"]
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {NAME}
        for name in sorted(present ^ files.keys()):
            return f"{name} is missing" if name in files else f"{name} does not belong to it"
        for name, facts in files.items():
            path = folder / name
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {facts['bytes']:,}"
            if file_digest(path) != facts["sha256"]:
                return f"{name} is damaged: its SHA-256 is another"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
