"""Prefetching: items are made in a background thread before they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yields the same items, up to `depth` of which are made in a background thread before they are needed.

    An error in making an item is raised in that item's place. This pays if making an item releases Python's global
    lock for a while (a tokenizer, large copies) or if the caller waits for another device.
    """
    source = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as maker:
        waiting: list[Future[list[T]]] = [maker.submit(lambda: list(islice(source, 1))) for _ in range(depth)]
        while made := waiting.pop(0).result():
            waiting.append(maker.submit(lambda: list(islice(source, 1))))
            yield made[0]
