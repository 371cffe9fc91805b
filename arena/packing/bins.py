"""Bin packing: sizes in, bins of item numbers out."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

Bins = list[list[int]]


def longest_first(sizes: Sequence[int], costs: Sequence[float], capacity: int, count: int) -> Bins | None:
    """Puts each item, the costliest first, into the least loaded of `count` bins with room; None if one does not fit.

    This is longest-processing-time scheduling (Graham, 1969) with a hard cap.
    """
    bins: Bins = [[] for _ in range(count)]
    room, loads = [capacity] * count, [0.0] * count
    places = range(count)
    for item in sorted(range(len(sizes)), key=costs.__getitem__, reverse=True):
        size = sizes[item]
        place, least = -1, float("inf")
        for at in places:
            if loads[at] < least and room[at] >= size:
                place, least = at, loads[at]
        if place < 0:
            return None
        bins[place].append(item)
        room[place] -= size
        loads[place] += costs[item]
    return bins


def best_fit(sizes: Sequence[int], capacity: int) -> Bins:
    """Best-fit decreasing: puts each item, the largest first, into the fullest bin with room, or else a new bin."""
    bins: Bins = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for item in np.argsort(-np.asarray(sizes, dtype=np.int64), kind="stable").tolist():
        size = sizes[item]
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            bins.append([])
            left, place = capacity, len(bins) - 1
        else:
            left, place = room.pop(at)
        bins[place].append(item)
        if left > size:
            bisect.insort(room, (left - size, place))
    return bins
