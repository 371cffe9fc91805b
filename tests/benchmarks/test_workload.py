"""The benchmark's rows: lengths, what examples share, labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.workload import (
    AROUND,
    HEADINGS,
    INSTRUCTION,
    SUFFIX,
    competition_lengths,
    field_lengths,
    make_workload,
)

FIELDS = np.array([[3, 4, 2], [1000, 10, 700]])


def test_examples_by_hand(tmp_path: Path) -> None:
    workload = make_workload("hand", FIELDS, tmp_path, vocabulary=100, longest=AROUND + 100, seed=0)
    assert workload.store.lengths.tolist() == [AROUND + 9] * 2 + [AROUND + 100] * 2
    assert workload.examples(1).tolist() == [1, 3]
    given, swapped, other, _ = (workload.store[index] for index in range(4))
    assert (given[:INSTRUCTION] == other[:INSTRUCTION]).all() and (given[-SUFFIX:] == other[-SUFFIX:]).all()
    answers = INSTRUCTION + HEADINGS[0] + 3 + HEADINGS[1]  # where answer A begins
    assert (given[:answers] == swapped[:answers]).all()
    assert (given[answers : answers + 4] == swapped[-SUFFIX - 4 : -SUFFIX]).all()
    assert (given[-SUFFIX - 2 : -SUFFIX] == swapped[answers : answers + 2]).all()
    assert min(given) >= 10 and max(given) < 100  # never padding
    assert workload.labels.shape == (4, 3) and np.allclose(workload.labels.sum(1), 1)


def test_the_same_seed_gives_the_same_rows(tmp_path: Path) -> None:
    one, two, other = (
        make_workload(str(at), FIELDS, tmp_path, vocabulary=100, longest=400, seed=seed)
        for at, seed in enumerate((0, 0, 1))
    )
    assert (one.store[0] == two.store[0]).all() and (one.store[0] != other.store[0]).any()


def test_lengths_are_like_the_real_ones() -> None:
    known = field_lengths("autoj", 160, 0)
    totals = np.minimum(known.sum(1) + AROUND, 4096)
    assert known.shape == (160, 3) and 650 < np.median(totals) < 750 and 780 < totals.mean() < 950
    drawn = competition_lengths(50_000, 0)
    assert abs(np.median(drawn) - 897) < 15 and abs(drawn.mean() - 1250) < 15 and drawn.max() == 4096
    fields = field_lengths("competition", 500, 0)
    assert fields.min() >= 1 and abs(np.median(fields.sum(1) + AROUND) - 897) < 100


def test_wrong_names_and_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no workload 'other'"):
        field_lengths("other", 3, 0)
    with pytest.raises(ValueError, match="160 rows, not of 161"):
        field_lengths("autoj", 161, 0)
    with pytest.raises(ValueError, match="tokens at least"):
        make_workload("short", FIELDS, tmp_path, vocabulary=100, longest=AROUND, seed=0)
