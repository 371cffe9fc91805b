"""Tab-separated values, in which nothing is quoted, and rows without ids, which have their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arena.config import load_recipe
from arena.data.dataset import Rows, read_dataset
from arena.data.task import Task
from arena.tasks import task_of
from tests.helpers import PREFERENCE, SHARED, needs_shared

TASK = task_of(load_recipe("demo", ["task=classification", "classes=[negative, positive]"]))


def read(folder: Path, *paths: Path, task: Task = TASK, labels: Any = "required") -> Rows:
    return read_dataset(paths, folder / "cache", task, labels=labels)


def tsv(folder: Path, *lines: str, name: str = "train.tsv") -> Path:
    (folder / name).write_text("\n".join(lines), newline="")
    return folder / name


def test_quotes_are_characters_like_any_other(tmp_path: Path) -> None:
    texts = ['"', 'a "good" film', '"never quoted, not even here"', '""', "it 's , fine", " spaced ", "a \\ b"]
    path = tsv(tmp_path, "sentence\tlabel\tother", *(f"{text}\t1\tx" for text in texts))
    assert read(tmp_path, path).table["sentence"] == texts
    as_csv = tmp_path / "train.csv"  # the control: in CSV the same lines mean something else
    as_csv.write_text(path.read_text().replace("\t", ","))
    with pytest.raises(ValueError, match=r"train\.csv"):
        read(tmp_path, as_csv)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_rows(tmp_path: Path, end: str) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(end.join(["\ufeffsentence\tlabel", "good\t1", "", "bad\t0"]).encode())
    rows = read(tmp_path, path)
    assert rows.table["sentence"] == ["good", "bad"] and rows.labels.argmax(axis=1).tolist() == [1, 0]


def test_bad_rows_are_named(tmp_path: Path) -> None:
    path = tsv(tmp_path, "sentence\tlabel", "a\tb\t1", "fine\t1", '"two', 'lines"\t0', "odd\t7")
    with pytest.raises(ValueError, match="3 problems in the data") as error:
        read(tmp_path, path)
    message = str(error.value)
    assert "line 2, the row: has 3 fields, but the header has 2; remove tabs and line breaks in a field" in message
    assert "line 4, the row: has 1 fields" in message and 'line 6, label: is "7"; write one of' in message
    # "lines" is a text like any other: only the number of fields shows that the file was quoted
    with pytest.raises(ValueError, match=r"train\.tsv, the file, sentence: is missing; the columns found are"):
        read(tmp_path, tsv(tmp_path, "text\tlabel", "a\t1"))


def test_the_competitions_rows_in_tabs(tmp_path: Path) -> None:
    columns = "id\tprompt\tresponse_a\tresponse_b\twinner"
    (row,) = read(tmp_path, tsv(tmp_path, columns, '7\t["Hi"]\t["a, b"]\t[null]\ttie'), task=PREFERENCE).table
    assert (row["id"], row["response_a"], row["label"]) == ("7", ["a, b"], [0, 0, 1])


# Rows without ids


def test_rows_are_numbered_over_all_files(tmp_path: Path) -> None:
    rows = [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": 0}]
    jsonl, parquet = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    jsonl.write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    tabs = tsv(tmp_path, "sentence\tlabel", "good\t1")
    assert read(tmp_path, jsonl, parquet, tabs).ids == ["1", "2", "3", "4", "5"]
    assert read(tmp_path, parquet).ids == ["1", "2"]


def test_ids_that_are_there_are_read(tmp_path: Path) -> None:
    named = tsv(tmp_path, "id\tsentence\tlabel", "x\tgood\t1", "1\tbad\t0")
    assert read(tmp_path, named).ids == ["x", "1"]
    numbered = tsv(tmp_path, "sentence\tlabel", "good\t1", name="more.tsv")
    assert read(tmp_path, named, numbered).ids == ["x", "1", "3"]
    with pytest.raises(ValueError, match=r'named.tsv, line 3, id: "1" also occurs earlier, in .*more.tsv'):
        read(tmp_path, numbered, named.rename(tmp_path / "named.tsv"))


def test_ids_of_some_rows_only_are_an_error(tmp_path: Path) -> None:
    first, second = {"sentence": "good", "label": 1}, {"id": "x", "sentence": "bad", "label": 0}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, (first, second))))
    with pytest.raises(ValueError, match="line 2, id: is there, but the first row has none"):
        read(tmp_path, path)
    path.write_text("\n".join(map(json.dumps, (second, first))))
    with pytest.raises(ValueError, match="line 2, id: is blank or missing"):
        read(tmp_path, path)


def test_a_preference_needs_an_id(tmp_path: Path) -> None:
    path = tsv(tmp_path, "prompt\tresponse_a\tresponse_b\twinner", '["Hi"]\t["a"]\t["b"]\ttie')
    with pytest.raises(ValueError, match="id: is missing; the columns found are"):
        read(tmp_path, path, task=PREFERENCE)


def test_texts_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"sentence": 5, "label": 1}, {"text": "good", "label": 1}, {"sentence": None, "label": 1}]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="2 problems") as error:
        read(tmp_path, path)
    assert "line 1, sentence: is 5; write a text or null" in str(error.value)
    assert "line 2, sentence: is missing; write a text or null, or name another column" in str(error.value)
    path.write_text(json.dumps({"sentence": " ", "label": 0}) + '\n{"sentence": "\\ud800", "label": 1}')
    rows = read(tmp_path, path)
    assert rows.table["sentence"] == [None, "\ufffd"] and rows.has_input.tolist() == [False, True]


@needs_shared
def test_sst2_as_it_is_published(tmp_path: Path) -> None:
    dev = read(tmp_path, SHARED / "data/sst2/dev.tsv")
    lines = (SHARED / "data/sst2/dev.tsv").read_text().splitlines()[1:]
    assert len(dev) == 872 and dev.ids[-1] == "872"
    assert [f"{text}\t{label.argmax()}" for text, label in zip(dev.table["sentence"], dev.labels, strict=True)] == lines
    assert dev.labels.sum(axis=0).tolist() == [428, 444]
