"""Columns of many rows without a Python object for each: their ids, and the groups that they belong to."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from operator import eq
from typing import SupportsIndex, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

KEYS_AT_ONCE = 2**16  # compared at once


class Texts(Sequence[str]):
    """The texts of an Arrow column, which are read where they are, as a sequence.

    Attributes:
        column: of strings.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __iter__(self) -> Iterator[str]:
        for chunk in self.column.chunks:
            yield from chunk.to_pylist()

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return str(self.column[int(index)].as_py())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return f"Texts({self[:3]}, {len(self):,} in all)"


def end_to_end(texts: Iterable[str]) -> pa.LargeStringArray:
    """Texts as one Arrow array, in as much memory as their UTF-8 takes."""
    data, ends = bytearray(), array("q", [0])
    for text in texts:
        data += text.encode()
        ends.append(len(data))
    return pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(data))


def digest(texts: pa.LargeStringArray) -> str:
    """SHA-256 of texts and of where each ends, in hexadecimal."""
    found = hashlib.sha256()
    for buffer in texts.buffers()[1:]:
        found.update(buffer)
    return found.hexdigest()


def numbered(keys: pa.LargeStringArray) -> NDArray[np.int64]:
    """int64 (n,): the place of each key among the distinct ones in their order, the same for equal keys."""
    order = pc.sort_indices(keys).to_numpy()
    places = np.zeros(len(keys), dtype=np.int64)
    for start in range(0, len(keys) - 1, KEYS_AT_ONCE):
        some = keys.take(pa.array(order[start : start + KEYS_AT_ONCE + 1]))
        places[start + 1 : start + len(some)] = pc.not_equal(some[1:], some[:-1]).to_numpy(zero_copy_only=False)
    np.cumsum(places, out=places)
    numbers = np.empty_like(places)
    numbers[order] = places
    return numbers
