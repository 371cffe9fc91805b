"""Folds: no prompt in two, each with its share of every label, the same whatever the order of the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from arena.data import folds as folds_module
from arena.data.dataset import Rows, read_dataset
from arena.data.folds import (
    assign_folds,
    check_no_leak,
    leaking,
    load_or_assign_folds,
)
from tests.helpers import PREFERENCE, rows_of

SHARED = Path(__file__).parents[2].parent / "shared"


def dataset(prompts: list[str], classes: list[int] | None = None) -> Rows:
    labels = np.eye(3, dtype=np.float32)[classes if classes is not None else [0] * len(prompts)].tolist()
    ids = [f"row {number}" for number in range(len(prompts))]
    return rows_of(Dataset.from_dict({"id": ids, "prompt": [[prompt] for prompt in prompts], "label": labels}))


def random_rows(count: int = 3_000, prompts: int = 2_000) -> tuple[Rows, np.ndarray]:
    """Labelled rows, some of which share a prompt, and their classes."""
    rng = np.random.default_rng(5)
    classes = rng.choice(3, size=count, p=[0.5, 0.4, 0.1])
    return dataset([f"prompt {number}" for number in rng.integers(0, prompts, count)], classes.tolist()), classes


# Keys


@pytest.mark.parametrize(
    ("prompt", "key"),
    [
        (["Hello"], "hello"),
        (["  Hello \n\t World\u00a0! "], "hello world !"),
        ([None, "", " \n", "Second", "third"], "second"),
        (["first", "second"], "first"),
        (["ＡＢＣ ﬁne Straße"], "abc fine strasse"),
        (["Cafe\u0301"], "caf\u00e9"),
        (["\u210ci"], "hi"),
        (["null"], "null"),
        ([None], ""),
        ([], ""),
    ],
)
def test_keys_by_hand(prompt: list[str | None], key: str) -> None:
    assert PREFERENCE.group(prompt) == key


@given(st.text(), st.lists(st.text(" \t\n\r\u2003\u3000", min_size=1), min_size=1))
def test_white_space_and_case_do_not_change_a_key(text: str, spaces: list[str]) -> None:
    words = text.split()
    spread = "".join(word + spaces[place % len(spaces)] for place, word in enumerate(words))
    assert PREFERENCE.group([spaces[0] + spread]) == PREFERENCE.group([" ".join(words)])
    if text.isascii():
        assert PREFERENCE.group([text.upper()]) == PREFERENCE.group([text.lower()])


# Folds


def test_prompts_stay_together_and_labels_are_spread() -> None:
    rows, classes = random_rows()
    folds = assign_folds(rows, 5, seed=1)
    assert folds.dtype == np.int8 and folds.shape == (3_000,)
    assert sorted(set(folds.tolist())) == [0, 1, 2, 3, 4]
    fold_of: dict[str, set[int]] = {}
    for [prompt], fold in zip(rows.table["prompt"], folds.tolist(), strict=True):
        fold_of.setdefault(prompt, set()).add(fold)
    assert {len(found) for found in fold_of.values()} == {1}
    for label in range(3):
        share = np.bincount(folds[classes == label], minlength=5) / (classes == label).sum()
        assert np.abs(share - 0.2).max() < 0.005


def test_spellings_of_one_prompt_share_a_fold() -> None:
    spellings = [spelling for n in range(30) for spelling in (f"Ask {n}", f"ask  {n}\n", f"ＡＳＫ {n}")]
    folds = assign_folds(dataset(spellings), 3, seed=0).reshape(30, 3)
    assert (folds == folds[:, :1]).all()


def test_soft_labels_count_as_their_largest_share() -> None:
    rows = dataset([f"p{number}" for number in range(40)])
    soft = [[0.5, 0.2, 0.3] if number % 4 else [0.3, 0.3, 0.4] for number in range(40)]
    folds = assign_folds(rows_of(rows.table.remove_columns("label").add_column("label", soft)), 2, seed=0)
    assert np.bincount(folds[::4]).tolist() == [5, 5]
    assert np.bincount(folds).tolist() == [20, 20]


def test_the_same_seed_gives_the_same_folds_in_any_row_order() -> None:
    rows, _ = random_rows(400, 300)
    folds = assign_folds(rows, 4, seed=3)
    order = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(assign_folds(rows, 4, seed=3), folds)
    assert np.array_equal(assign_folds(rows_of(rows.table.select(order)), 4, seed=3), folds[order])
    assert not np.array_equal(assign_folds(rows, 4, seed=4), folds)


def test_too_little_to_fill_the_folds_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"2 groups of rows \(by prompt\) cannot fill 3 folds: lower data.folds"):
        assign_folds(dataset(["a", "A", "b", " b"]), 3, seed=0)
    with pytest.raises(ValueError, match="no label has 3 rows"):
        assign_folds(dataset(["a", "b", "c"], [0, 1, 2]), 3, seed=0)
    for n_folds in (0, 1, 128):
        with pytest.raises(ValueError, match=f"n_folds is {n_folds}"):
            assign_folds(dataset(["a", "b"]), n_folds, seed=0)


def test_a_row_without_a_label_is_an_error() -> None:
    labelled = dataset(["a", "b", "c", "d"]).table
    rows = rows_of(labelled.map(lambda row: {"label": None if row["id"] > "row 1" else row["label"]}))
    with pytest.raises(ValueError, match="2 rows have no label, the first with id row 2"):
        assign_folds(rows, 2, seed=0)


# Kept folds


def test_folds_are_cached_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = random_rows(100, 80)
    folds = load_or_assign_folds(rows, 4, 0, tmp_path)
    assert np.array_equal(folds, assign_folds(rows, 4, 0))
    [stored] = tmp_path.iterdir()
    table = pq.read_table(stored)
    assert table.schema.names == ["id", "fold"]
    assert table["id"].to_pylist() == rows.ids and table["fold"].to_pylist() == folds.tolist()

    def refuse(*arguments: object) -> None:
        raise AssertionError("assigned again")

    monkeypatch.setattr(folds_module, "assign_folds", refuse)
    again = load_or_assign_folds(rows, 4, 0, tmp_path)
    assert again.dtype == np.int8 and np.array_equal(again, folds)
    again[0] = 0  # the array belongs to the caller
    relabelled = dataset([prompt for [prompt] in rows.table["prompt"]], [1] * 100)
    renamed = rows_of(rows.table.map(lambda row: {"id": row["id"] + "x"}))
    reworded = rows_of(rows.table.map(lambda row: {"prompt": [row["prompt"][0] + "x"]}))
    for changed in ((relabelled, 4, 0), (renamed, 4, 0), (reworded, 4, 0), (rows, 3, 0), (rows, 4, 1)):
        with pytest.raises(AssertionError, match="assigned again"):
            load_or_assign_folds(*changed, tmp_path)


def test_a_cached_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    rows = dataset(["a", "a", "b", "c", "d"])
    folds = load_or_assign_folds(rows, 2, 0, tmp_path).tolist()
    [stored] = tmp_path.iterdir()
    ids = rows.ids
    leaking = [1 - folds[0], *folds[1:]]
    for table, what in [
        ({"id": [*ids[:-1], "other"], "fold": folds}, "does not have the ids"),
        ({"id": ids, "fold": leaking}, "is in folds"),
        ({"id": ids, "fold": [0] * 5}, "not 2 filled folds"),
        ({"id": ids, "fold": [0, 0, 1, 1, 2]}, "not 2 filled folds"),
        ({"id": ids, "fold": [0, 0, 1, 1, -1]}, "not 2 filled folds"),
    ]:
        pq.write_table(pa.table(table), stored)
        with pytest.raises(ValueError, match=what):
            load_or_assign_folds(rows, 2, 0, tmp_path)


# Leaks


def test_a_prompt_in_two_folds_is_named() -> None:
    rows = dataset(["one", "two", " ONE", "three"])
    check_no_leak(rows, np.array([0, 1, 0, 1], dtype=np.int8))
    with pytest.raises(ValueError, match=r'the prompt "one" is in folds 0 and 1 \(row with id row 2\)'):
        check_no_leak(rows, np.array([0, 0, 1, 1], dtype=np.int8))
    with pytest.raises(ValueError, match="3 folds were given for 4 rows"):
        check_no_leak(rows, np.array([0, 0, 1], dtype=np.int8))


def test_extra_rows_whose_prompt_is_held_out_are_found() -> None:
    extra = dataset(["seen", "new", "SEEN ", "newer"])
    flags = leaking(extra, dataset(["other", "Seen", "new"]), np.array([0, 1]))
    assert flags.dtype == np.bool_
    assert flags.tolist() == [True, False, True, False]
    assert leaking(extra, dataset(["other"]), np.array([0])).tolist() == [False] * 4


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data are not at {SHARED}")
def test_folds_of_real_data(tmp_path: Path) -> None:
    rows = read_dataset([SHARED / "data/autoj/train.csv"], tmp_path, PREFERENCE, labels="required")
    folds = load_or_assign_folds(rows, 5, 42, tmp_path)
    classes = rows.labels.argmax(axis=1)
    for label in range(3):
        counts = np.bincount(folds[classes == label], minlength=5)
        assert counts.max() - counts.min() <= 4
    training = rows_of(rows.table.select(np.flatnonzero(folds != 0)))
    assert not leaking(training, rows, np.flatnonzero(folds == 0)).any()
