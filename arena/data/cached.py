"""Reading of cached files, with a clear error if one is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an Arrow stream; a stream cut between two batches lacks only this


@contextmanager
def reading_cached(path: Path) -> Iterator[None]:
    """Wraps the reading of a cached file.

    Raises:
        ValueError: the file is damaged; the message names it and says how to recreate it.
    """
    try:
        if path.suffix == ".arrow" and not _is_whole(path):
            raise ValueError("its end is missing")
        yield
    except (ValueError, KeyError, OSError, TypeError, pa.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}): delete it, and it is created again") from error


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(END)))
        return file.read() == END
