"""Columns of many rows: what a list of texts would give, in the memory of their bytes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena.data import columns
from arena.data.columns import Texts, digest, end_to_end, numbered


def test_a_column_reads_as_a_list() -> None:
    words = ["a", "", "你好", "d", "e"]
    texts = Texts(pa.chunked_array([words[:2], words[2:]], pa.string()))
    assert texts == words and list(texts) == words and texts != words[1:] and texts != [*words[:4], "x"]
    assert (texts[2], texts[-1], texts[np.int64(1)], texts[1:4]) == ("你好", "e", "", words[1:4])
    assert pd.DataFrame({"id": texts})["id"].tolist() == words
    with pytest.raises(IndexError):
        texts[5]


@given(keys=st.lists(st.text(max_size=3), max_size=40), at_once=st.sampled_from([1, 3, 2**16]))
def test_keys_are_numbered_in_their_order(keys: list[str], at_once: int) -> None:
    """As pandas does it with Python's texts, whose order is that of their UTF-8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "KEYS_AT_ONCE", at_once)
        found = numbered(end_to_end(keys))
    assert found.tolist() == pd.factorize(np.array(keys, dtype=object), sort=True)[0].tolist()


def test_a_digest_tells_where_texts_end() -> None:
    every = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], []]
    assert len({digest(end_to_end(texts)) for texts in every}) == len(every)
    assert digest(end_to_end(["ab", "c"])) == digest(end_to_end(iter(["ab", "c"])))


def test_many_texts_take_little_more_memory_than_their_bytes() -> None:
    """A list of them, the control, takes several times as much."""
    count, peaks = 50_000, []
    for gather in (end_to_end, list):
        tracemalloc.start()
        held = gather(f"row number {number:09d}" for number in range(count))
        peaks.append(tracemalloc.get_traced_memory()[1] / count)
        tracemalloc.stop()
        assert len(held) == count
    assert peaks[0] <= 20 + 8 + 8  # the text, its end, and what growing arrays leave free
    assert peaks[1] > 2 * peaks[0]
