"""Files of rows: found in a folder or on the hub, and read with a recipe's cache and limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arena.data.cells import Labels
from arena.data.dataset import Rows, read_dataset
from arena.data.hub import hub_folder, is_hub_name
from arena.data.limits import Limits
from arena.data.rows import READERS
from arena.data.task import Task
from arena.settings import DataSettings


def data_file(path: str | Path, kind: str, cache: str | Path | None = None) -> Path:
    """The file called `kind` (train, test) in a data folder, or `path` itself if it is a file.

    Args:
        cache: where data sets of the hub are cached; None: `path` does not name one.

    Raises:
        ValueError: there is no such file, or more than one.
    """
    place = Path(path)
    if place.is_file():
        return place
    if cache is not None and not place.is_dir() and is_hub_name(str(path)):
        place = hub_folder(str(path), Path(cache))
    if not place.is_dir():
        raise ValueError(f"data.path: there is no folder or file {place}; give one with DATA= or --data")
    files = [file for ending in READERS if (file := place / f"{kind}{ending}").is_file()]
    if len(files) != 1:
        names = ", ".join(f"{kind}{ending}" for ending in READERS)
        have = f"it has {', '.join(file.name for file in files)}" if files else "it has none of them"
        raise ValueError(f"{place} must have exactly one of {names}; {have}")
    return files[0]


def read_files(paths: Sequence[str | Path], task: Task, settings: DataSettings, labels: Labels) -> Rows:
    """`read_dataset` with a recipe's cache and limits."""
    files, limits = [Path(path) for path in paths], Limits.of(settings)
    return read_dataset(files, Path(settings.cache), task, labels=labels, limits=limits)
