"""Any bytes and any cells: valid rows or a `ValueError`, never another exception."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arena.data.cells import FieldError, excerpt, read_id, read_json, read_turns
from arena.data.dataset import read_dataset
from arena.data.limits import Limits
from tests.data.bad_files import CSV, GOOD, LABELS, PARQUET, TEXTS, table
from tests.helpers import PREFERENCE

slow_start = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SMALL = Limits(max_row_characters=200, max_turns=3)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
json_like = st.text(st.sampled_from('[]{}",:\\ud8null0123456789.eE+-NaInfity \n\té\x00'), max_size=40)
csv_like = st.text(st.sampled_from('",\n\r;ab1[]\t\\ \x00é\ud800'), max_size=120)


@settings(max_examples=300, deadline=None)
@given(st.one_of(json_like, st.text(), anything))
def test_any_cell_is_turns_or_a_field_error(cell: Any) -> None:
    try:
        turns = read_turns({"prompt": cell}, "prompt")
    except FieldError as error:
        assert error.field == "prompt" and error.what
        return
    assert all(turn is None or turn.encode() is not None for turn in turns)


@settings(max_examples=200, deadline=None)
@given(st.one_of(json_like, st.text()))
def test_any_text_is_json_or_a_field_error(text: str) -> None:
    try:
        value = read_json(text, "it")
    except FieldError as error:
        try:
            json.loads(text)
        except ValueError:
            return
        assert "appears twice" in error.what  # what the library lets pass
        return
    assert repr(value) == repr(json.loads(text))


@settings(max_examples=200, deadline=None)
@given(anything)
def test_any_id_is_one_line_or_a_field_error(value: Any) -> None:
    try:
        found = read_id(value)
    except FieldError:
        return
    assert found.strip() and len(found.splitlines()) == 1 and found.encode()
    assert len(excerpt(value)) < 1_000


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(anything, st.floats(0, 1), st.sampled_from(["1", "0", "1e308", "-0.0", "0x1"])),
        min_size=3,
        max_size=3,
    )
)
def test_any_label_is_probabilities_or_a_field_error(values: list[Any]) -> None:
    try:
        found = PREFERENCE.read_label(dict(zip(LABELS, values, strict=True)), "optional")
    except FieldError:
        return
    assert found is None or (math.isclose(sum(found), 1, abs_tol=1e-9) and all(0 <= each <= 1 for each in found))


def outcome(name: str, data: bytes, limits: Limits = SMALL) -> list[dict[str, Any]] | None:
    """The rows that bytes give as a file; None for a `ValueError`, which must name the file and leave nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / name, Path(folder) / "cache"
        path.write_bytes(data)
        try:
            rows = read_dataset([path], cache, PREFERENCE, labels="optional", limits=limits).table.to_list()
        except ValueError as error:
            assert str(path) in str(error)
            assert not cache.exists() or list(cache.iterdir()) == []
            return None
    for row in rows:
        assert row["id"].strip() and len({len(row[name]) for name in TEXTS}) == 1 and len(row["prompt"]) <= 3
    return rows


@slow_start
@given(
    st.one_of(st.binary(max_size=200), csv_like.map(lambda text: text.encode("utf-8", "surrogatepass"))), st.booleans()
)
def test_any_bytes_as_csv_and_jsonl(data: bytes, with_header: bool) -> None:
    header = CSV.splitlines(keepends=True)[0].encode() if with_header else b""
    outcome("it.csv", header + data)
    outcome("it.jsonl", data)


@slow_start
@given(st.integers(0, len(CSV) - 1), st.text(st.sampled_from('",\n\r[]a'), max_size=3), st.integers(0, 3))
def test_a_good_csv_with_a_few_characters_changed(at: int, put: str, drop: int) -> None:
    rows = outcome("it.csv", (CSV[:at] + put + CSV[at + drop :]).encode())
    assert rows is None or len(rows) <= len(GOOD) + 1


@slow_start
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=6), st.integers(0, 40))
def test_a_good_parquet_file_with_a_few_bytes_changed(at: int, put: bytes, drop: int) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(PARQUET, buffer)
    data = buffer.getvalue().to_pybytes()
    at %= len(data)
    outcome("it.parquet", data[:at] + put + data[at + drop :])


@slow_start
@given(st.lists(st.tuples(*[anything] * 3), min_size=1, max_size=3))
def test_any_objects_as_jsonl(cells: list[tuple[Any, ...]]) -> None:
    objects = [dict(zip(TEXTS, each, strict=True)) | {"id": at} for at, each in enumerate(cells)]
    outcome("it.jsonl", "\n".join(json.dumps(each, default=str) for each in objects).encode())


@pytest.mark.parametrize("size", [SMALL.max_row_characters - 1, SMALL.max_row_characters, 201, 202, 203, 400, 10_000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_limit_holds_to_the_character(size: int, end: str) -> None:
    """A row of exactly as many characters as are allowed is read; one more is too many. Line ends do not count."""
    names = [*TEXTS, "id"]
    head = '["{}"],[],[],7'
    row = head.format("x" * (size - len(head) + 2))
    assert len(row) == size
    text = end.join([",".join(names), row.replace('["', '"[""').replace('"]', '""]"'), ""])
    quoted = len(text.split(end)[1])
    rows = outcome("it.csv", text.encode(), Limits(quoted, 3))
    assert rows is not None and len(rows[0]["prompt"][0]) == size - len(head) + 2
    assert outcome("it.csv", text.encode(), Limits(quoted - 1, 3)) is None
    line = json.dumps({"id": 7, "prompt": ["x" * size], "response_a": [], "response_b": []})
    assert outcome("it.jsonl", (line + end).encode(), Limits(len(line), 3)) is not None
    assert outcome("it.jsonl", (line + end).encode(), Limits(len(line) - 1, 3)) is None


def test_the_limit_counts_a_row_of_many_lines_whole_and_each_row_anew() -> None:
    row = GOOD[0] | {"response_a": "[" + "\n" * 90 + "]"}
    assert outcome("it.csv", table([row, GOOD[1]]).encode()) is not None
    assert outcome("it.csv", table([row | {"response_a": "[" + "\n" * 190 + "]"}]).encode()) is None
    many = [GOOD[0] | {"id": str(at)} for at in range(100)]
    assert len(outcome("it.csv", table(many).encode()) or []) == 100


def test_turns_are_counted_in_every_field() -> None:
    for name in TEXTS:
        for turns, good in ((3, True), (4, False)):
            data = table([GOOD[0] | {name: json.dumps(["x"] * turns)}]).encode()
            assert (outcome("it.csv", data) is not None) is good


@pytest.mark.parametrize(
    ("numbers", "right"),
    [
        ((0.333, 0.333, 0.333), True), ((0.167, 0.167, 0.667), True), ((0.1, 0.2, 0.699), True),
        ((0.5, 0.25, 0.2485), True), ((0.5, 0.25, 0.2515), True), ((0.5, 0.25, 0.2484), False),
        ((0.5, 0.25, 0.2516), False), ((0.4, 0.4, 0.198), False), ((0.4, 0.4, 0.202), False),
    ],
)  # fmt: skip
def test_three_digits_may_miss_1_by_their_rounding(numbers: tuple[float, ...], right: bool) -> None:
    record = dict(zip(LABELS, map(str, numbers), strict=True))
    if right:
        assert sum(PREFERENCE.read_label(record, "required") or []) == pytest.approx(1, abs=1e-12)
    else:
        with pytest.raises(FieldError, match="sum to"):
            PREFERENCE.read_label(record, "required")
