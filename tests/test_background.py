"""Items made ahead: the same, in order, and nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from arena.background import ahead


def test_items_are_made_ahead_in_order_and_no_further_than_the_depth() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for at in range(20):
            made.append(at)
            yield at

    items = ahead(source(), depth=2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.1)
    assert len(made) <= 5
    assert list(items) == list(range(3, 20))


def test_an_error_in_the_background_comes_where_the_item_would() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("a bad batch")

    items = ahead(source())
    assert next(items) == 1
    with pytest.raises(ValueError, match="a bad batch"):
        next(items)


def test_no_thread_is_left_behind_when_the_consumer_stops() -> None:
    items = ahead(iter(range(100)))
    next(items)
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
