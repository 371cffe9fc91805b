"""Bin packing: sizes in, bins of item numbers out."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

Bins = list[list[int]]


def longest_first(sizes: Sequence[int], costs: Sequence[float], capacity: int, count: int) -> Bins | None:
    """Each item, the costliest first, to the cheapest of `count` bins that has room; None when one finds no room.

    Longest-processing-time scheduling (Graham, 1969) under a hard cap.
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
    """Each item, the largest first, to the fullest bin that has room for it, a new bin where none has."""
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
