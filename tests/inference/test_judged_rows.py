"""What `arena judge` writes of rows of any type, tried without a judge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arena.config import load_recipe
from arena.data.limits import Limits
from arena.inference import judge_inputs
from arena.inference.judge_inputs import open_inputs
from arena.inference.judge_work import Work, read_windows, result_columns
from arena.inference.judged_rows import WRITERS, Added, Table, parquet_schema
from arena.tasks import task_of

RECIPE = load_recipe("demo")
TEXTS = {"prompt": '["p"]', "response_a": '["a"]', "response_b": '["b"]'}
COLUMNS = {"judged": pa.float64()}


def table_of(**columns: Any) -> pa.Table:
    n = len(next(iter(columns.values())))
    return pa.table({**{name: [text] * n for name, text in TEXTS.items()}, **columns})


def written(folder: Path, ending: str, *files: pa.Table | list[dict[str, Any]], out: tuple[int, ...] = ()) -> Path:
    """What is written of files one after another, parquet or JSONL, without the rows with these numbers."""
    (folder / "in").mkdir(exist_ok=True)
    for at, rows in enumerate(files):
        if isinstance(rows, pa.Table):
            pq.write_table(rows, folder / f"in/{at}.parquet")
        else:
            (folder / f"in/{at}.jsonl").write_text("".join(json.dumps({**TEXTS, **row}) + "\n" for row in rows))
    limits, target = Limits.of(RECIPE.data), folder / f"out{ending}"
    with open_inputs(str(folder / "in"), task_of(RECIPE), limits) as inputs:
        schema = parquet_schema(inputs, COLUMNS, limits) if ending == ".parquet" else None

        def added() -> Iterator[Added]:
            numbers = iter(range(sum(map(len, inputs))))
            for each in inputs:
                yield iter([None if (at := next(numbers)) in out else [float(at)] for _ in range(len(each))])

        WRITERS[ending](target, Table(inputs, COLUMNS, limits, schema, added()))
    return target


def column(path: Path, name: str) -> list[Any]:
    return list(pq.read_table(path).column(name).to_pylist())


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([1.0, None, 3.0]), ["1.0", "2", "3.0"]),
        (pa.array([True, None]), ["true", "2"]),
        (pa.array([Decimal("1.5"), None]), ["1.5", "2"]),
        (pa.array([0, None], pa.timestamp("s")), ["1970-01-01T00:00:00", "2"]),
        (pa.array([[1], None]), ["[1]", "2"]),
        (pa.array([None, None], pa.null()), ["1", "2"]),
        (pa.array([7, *[None] * 128], pa.int8()), ["7", *map(str, range(2, 130))]),
        (pa.array([7, *[None] * 100], pa.int8()), [7, *range(2, 102)]),
        (pa.array([2**60, None]), [2**60, 2]),
        (pa.array(["x", " "], pa.string_view()), ["x", "2"]),
        (pa.array(["x", None]).dictionary_encode(), ["x", "2"]),
        (pa.array([1.5, 2.5]), [1.5, 2.5]),
    ],
    ids=str,
)
def test_ids_of_any_type_with_gaps(tmp_path: Path, ids: pa.Array, expected: list[Any]) -> None:
    assert column(written(tmp_path, ".parquet", table_of(id=ids)), "id") == expected


def test_ids_beside_files_without_them(tmp_path: Path) -> None:
    found = written(tmp_path, ".parquet", table_of(id=pa.array([1.5])), [{}, {"id": "x"}])
    assert column(found, "id") == ["1.5", "2", "x"]
    assert column(written(tmp_path, ".parquet", table_of(id=pa.array([7])), [{}, {"id": 9}]), "id") == [7, 2, 9]


def test_rows_are_left_out_of_columns_of_any_type(tmp_path: Path) -> None:
    views = {"view": pa.array(["a", "b", "c"], pa.string_view()), "raw": pa.array([b"a", b"b", b"c"], pa.binary_view())}
    given = table_of(id=["1", "2", "3"], **views)
    for out in ((), (1,), (0, 2), (0, 1, 2)):
        found = pq.read_table(written(tmp_path, ".parquet", given, out=out))
        left = [at for at in range(3) if at not in out]
        assert found.column("view").to_pylist() == ["abc"[at] for at in left]
        assert found.column("judged").to_pylist() == left
        assert [found.schema.field(name).type for name in views] == [pa.string_view(), pa.binary_view()]


def test_whole_numbers_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They become floats only where none of them is changed by it."""
    monkeypatch.setattr(judge_inputs, "WINDOW_ROWS", 1)
    rows = [{"n": 2**60 + 1, "at": {"n": 2**60 + 1}, "few": 2}, {"n": 0.5, "at": {"n": 0.5}, "few": 0.5}]
    found = written(tmp_path, ".parquet", rows)
    assert column(found, "n") == ["1152921504606846977", "0.5"] and column(found, "few") == [2.0, 0.5]
    assert column(found, "at") == ['{"n": 1152921504606846977}', '{"n": 0.5}']
    files = table_of(n=pa.array([2**60 + 1])), table_of(n=pa.array([0.5]))
    (tmp_path / "in/0.jsonl").unlink()
    assert column(written(tmp_path, ".parquet", *files), "n") == ["1152921504606846977", "0.5"]
    files = table_of(n=pa.array([2**63 + 1], pa.uint64())), table_of(n=pa.array([-1]))
    assert column(written(tmp_path, ".parquet", *files), "n") == ["9223372036854775809", "-1"]


def test_a_column_without_nulls_beside_a_file_without_it(tmp_path: Path) -> None:
    given = table_of(x=[1], at=[{"y": 1}])
    inner = pa.struct([pa.field("y", pa.int64(), nullable=False)])
    fields = [*list(given.schema)[:3], pa.field("x", pa.int64(), nullable=False), pa.field("at", inner, nullable=False)]
    found = written(tmp_path, ".parquet", given.cast(pa.schema(fields)), [{"id": "b"}])
    assert column(found, "x") == [1, None] and column(found, "at") == [{"y": 1}, None]


def test_names_with_half_a_character(tmp_path: Path) -> None:
    found = written(tmp_path, ".parquet", [{"\ud83d": 1, "at": {"\ud83d": "\ud83d"}}])
    assert column(found, "\ufffd") == [1] and column(found, "at") == [{"\ufffd": "\ufffd"}]
    with pytest.raises(ValueError, match="have the same name"):
        written(tmp_path, ".parquet", [dict.fromkeys(("\ud83d", "\ufffd"), 1)])


@pytest.mark.parametrize("depth", [20, 60, 120, 900])
def test_deep_cells(tmp_path: Path, depth: int) -> None:
    """What is nested too deeply for readers of parquet is JSON there."""
    deep: Any = 1
    for _ in range(depth):
        deep = {"a": [deep]} if depth < 100 else {"a": deep}
    (cell,) = column(written(tmp_path, ".parquet", [{"deep": deep}]), "deep")
    assert (cell if depth == 20 else json.loads(cell)) == deep


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    given = table_of(id=["1"], x=[float("nan")], at=[{"y": [float("inf"), 1.5]}])
    (row,) = written(tmp_path, ".jsonl", given).read_text().splitlines()
    found = json.loads(row, parse_constant=pytest.fail)
    assert found["x"] is None and found["at"] == {"y": [None, 1.5]}
    assert ',NaN,"{""y"": [null, 1.5]}",' in written(tmp_path, ".csv", given).read_text()


def test_results_beside_labels_of_any_form() -> None:
    task = task_of(RECIPE)
    for labels, first in (
        (["winner"], "p_winner_model_a"),
        ([*task.columns], "p_winner_model_a"),
        ([], "winner_model_a"),
    ):
        assert next(iter(result_columns([*TEXTS, *labels], task))) == first


def test_rows_that_change_while_they_are_judged_are_not_taken(tmp_path: Path) -> None:
    """Although the file is restored in the end."""
    path = tmp_path / "in.jsonl"
    path.write_text((json.dumps(TEXTS) + "\n") * 3)
    limits, task, right = Limits.of(RECIPE.data), task_of(RECIPE), path.read_bytes()
    with open_inputs(str(path), task, limits) as inputs:
        work = Work(inputs, task, limits, 0, tmp_path / "parts", {})
        assert len(list(read_windows(work, [0]))) == 1
        path.write_bytes(right.replace(b"p", b"q"))
        with pytest.raises(ValueError, match="was changed meanwhile"):
            list(read_windows(work, [0]))
        path.write_bytes(right)
        assert len(list(read_windows(work, [0]))) == 1
