"""All that a run has found so far in one file, which is enough to go on in an empty folder on another machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from zipfile import ZIP_DEFLATED, BadZipFile, ZipFile

from arena.storage.files import atomic_write

STATE, PAGES = "state", "pages"
ENDINGS = (".json", ".jsonl", ".txt")  # of results; what else lies there is made again
LEFT_OUT = "runs"  # folders of unfinished trainings, which are large


def pack(folder: Path, pages: Iterable[Path], archive: Path) -> None:
    """Writes the results below `folder` and the pages into one zip, whole or not at all."""
    with atomic_write(archive) as draft, ZipFile(draft, "w", ZIP_DEFLATED) as out:
        for path in sorted(folder.rglob("*")):
            within = path.relative_to(folder)
            draft_or_run = any(part == LEFT_OUT or part.startswith(".") for part in within.parts)
            if path.suffix in ENDINGS and not draft_or_run and path.is_file():
                out.write(path, f"{STATE}/{within.as_posix()}")
        for page in pages:
            out.write(page, f"{PAGES}/{page.name}")


def unpack(archive: Path, folder: Path) -> list[str]:
    """Puts the results of an archive that are not in the folder there, and gives their names.

    Raises:
        ValueError: the file is damaged, or is no such archive.
    """
    added = []
    try:
        with ZipFile(archive) as given:
            for info in given.infolist():
                parts = PurePosixPath(info.filename).parts
                if parts[:1] != (STATE,) or ".." in parts or info.is_dir():
                    continue
                target = folder.joinpath(*parts[1:])
                if target.exists():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(target) as draft, given.open(info) as source, draft.open("wb") as out:
                    shutil.copyfileobj(source, out)  # its CRC is checked at its end
                added.append("/".join(parts[1:]))
    except (BadZipFile, EOFError) as error:
        raise ValueError(
            f"{archive} is damaged or no archive of results ({error}): remove it, or name another"
        ) from None
    return added
