"""Reading files: every oddity of real files kept as it should be, every bad row named."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arena.data import dataset as module
from arena.data.conversion import BadRowsError
from arena.data.dataset import Rows, read_dataset, repeated
from tests.helpers import PREFERENCE, rows_of

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared"
A_WINS = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
ENDINGS = ["csv", "parquet", "jsonl"]


def a_row(**changes: Any) -> dict[str, Any]:
    """One good row in the competition's spelling, with some cells changed."""
    texts = {"prompt": '["Hi"]', "response_a": '["Hello"]', "response_b": '["Bye"]'}
    return {"id": "7", "model_a": "x", "model_b": "y", **texts, **A_WINS, **changes}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, labels: Any = "required") -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as cache:
        return read_dataset([path], Path(cache), PREFERENCE, labels=labels).table.to_list()


def complaint(paths: list[Path], labels: Any = "required") -> str:
    """The message with which these files are refused; checks that nothing is left in the cache."""
    with tempfile.TemporaryDirectory() as cache:
        with pytest.raises(ValueError) as caught:
            read_dataset(paths, Path(cache), PREFERENCE, labels=labels)
        assert list(Path(cache).iterdir()) == []
    return str(caught.value)


# What is kept


@pytest.mark.parametrize("ending", ENDINGS)
def test_one_row_by_hand(tmp_path: Path, ending: str) -> None:
    row = a_row(
        prompt=r'["a\/b \u00e9 \ud83d\ude00", null]',
        response_a='["x"]',
        response_b='["null", "two", ""]',
        winner_model_a=0,
        winner_tie=1,
    )
    assert read(write(tmp_path / f"train.{ending}", [row])) == [
        {
            "id": "7",
            "prompt": ["a/b é 😀", None, None],
            "response_a": ["x", None, None],
            "response_b": ["null", "two", ""],
            "label": [0.0, 0.0, 1.0],
        }
    ]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("cells", "texts", "expected"),
    [
        (("[null]", "[null]", "[null]"), ([None], [None], [None]), False),
        (("[]", "[]", "[]"), ([], [], []), False),
        (("[]", '["x"]', "[]"), ([None], ["x"], [None]), True),
        (('[""]', '[""]', '[""]'), ([""], [""], [""]), False),
        (('["q"]', '[" \\n\\t"]', '["\\u00a0"]'), (["q"], [" \n\t"], ["\u00a0"]), False),
        (('["q"]', '["null"]', "[null]"), (["q"], ["null"], [None]), True),
        (('["q"]', "[null]", '["yes"]'), (["q"], [None], ["yes"]), True),
        (('["q"]', '["same"]', '["same"]'), (["q"], ["same"], ["same"]), True),
        (('["NA", "nan"]', '["None"]', '["N/A"]'), (["NA", "nan"], ["None", None], ["N/A", None]), True),
        (('["a", "b"]', '[]', '["d", "e", "f"]'), (["a", "b", None], [None] * 3, ["d", "e", "f"]), True),
        (('["\\ud83d"]', '["a\\udc00b"]', '["\\ude00\\ud83d"]'), (["�"], ["a�b"], ["��"]), True),
        (('["a\\u0000b"]', '["\\u2028"]', '["\\r\\n"]'), (["a\0b"], ["\u2028"], ["\r\n"]), False),
    ],
)  # fmt: skip
def test_unusual_texts_are_read_unchanged(
    tmp_path: Path,
    ending: str,
    cells: tuple[str, str, str],
    texts: tuple[list[str | None], list[str | None], list[str | None]],
    expected: bool,
) -> None:
    names = ("prompt", "response_a", "response_b")
    row = a_row(**dict(zip(names, cells, strict=True)))
    [result] = read(write(tmp_path / f"train.{ending}", [row]))
    assert tuple(result[name] for name in names) == texts
    assert PREFERENCE.has_input(result) is expected


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_real_lists_are_read_like_json(tmp_path: Path, ending: str) -> None:
    row = a_row(prompt=["a", None], response_a=["b", "c"], response_b=[None, '["d"]'])
    [result] = read(write(tmp_path / f"train.{ending}", [row]))
    assert [result[name] for name in ("prompt", "response_a", "response_b")] == [
        ["a", None],
        ["b", "c"],
        [None, '["d"]'],
    ]


def test_columns_have_the_promised_types(tmp_path: Path) -> None:
    rows = read_dataset([write(tmp_path / "t.csv", [a_row()])], tmp_path / "cache", PREFERENCE, labels="ignored")
    types = {name: str(rows.table.data.schema.field(name).type) for name in rows.table.column_names}
    texts = dict.fromkeys(("prompt", "response_a", "response_b"), "list<item: string>")
    assert types == {"id": "string", **texts, "label": "list<item: float>"}


def test_several_files_become_one_in_order(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{ending}.{ending}", [a_row(id=f"from {ending}")]) for ending in ENDINGS]
    rows = read_dataset(paths, tmp_path / "cache", PREFERENCE, labels="required")
    assert rows.ids == ["from csv", "from parquet", "from jsonl"]


def test_many_chunks_keep_their_order(tmp_path: Path) -> None:
    count = 2 * module.ROWS_AT_ONCE + 3
    for ending in ENDINGS:
        rows = read(write(tmp_path / f"t.{ending}", [a_row(id=str(number)) for number in range(count)]))
        assert [row["id"] for row in rows] == [str(number) for number in range(count)]


def test_a_csv_as_pandas_writes_it(tmp_path: Path) -> None:
    frame = pd.DataFrame([a_row(id=12, prompt='["a, \\"b\\"\\n"]'), a_row(id=13, response_a=f'["{"x" * 200_000}"]')])
    frame.to_csv(tmp_path / "t.csv", index_label="extra")
    assert read(tmp_path / "t.csv")[0]["id"] == "12"
    frame.to_csv(tmp_path / "t.csv", encoding="utf-8-sig", index=False)  # the mark stands before the column `id`
    first, second = read(tmp_path / "t.csv")
    assert (first["id"], first["prompt"]) == ("12", ['a, "b"\n'])
    assert second["response_a"] == ["x" * 200_000]


def test_whole_number_ids_become_plain_decimals(tmp_path: Path) -> None:
    big = 2**62 + 1
    assert [row["id"] for row in read(write(tmp_path / "t.parquet", [a_row(id=7), a_row(id=big)]))] == [
        "7",
        str(big),
    ]
    assert read(write(tmp_path / "f.parquet", [a_row(id=30192.0)]))[0]["id"] == "30192"
    assert read(write(tmp_path / "t.jsonl", [a_row(id=0)]))[0]["id"] == "0"
    assert read(write(tmp_path / "t.csv", [a_row(id="007")]))[0]["id"] == "007"


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    for ending in ("csv", "jsonl"):
        path = write(tmp_path / f"t.{ending}", [a_row(id="1"), a_row(id="2")])
        path.write_text(path.read_text().replace("\n", "\n\n"), encoding="utf-8-sig")
        assert [row["id"] for row in read(path)] == ["1", "2"]


texts_or_none = st.lists(st.none() | st.text(max_size=20), max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=texts_or_none, answer=texts_or_none, ascii_only=st.booleans(), ending=st.sampled_from(ENDINGS))
def test_any_text_comes_back_as_it_was(
    prompt: list[str | None], answer: list[str | None], ascii_only: bool, ending: str
) -> None:
    cells = {
        "prompt": json.dumps(prompt, ensure_ascii=ascii_only),
        "response_a": json.dumps(answer, ensure_ascii=ascii_only),
    }
    with tempfile.TemporaryDirectory() as folder:
        [row] = read(write(Path(folder) / f"t.{ending}", [a_row(**cells, response_b="[]")]))
    turns = max(len(prompt), len(answer))
    assert row["prompt"] == prompt + [None] * (turns - len(prompt))
    assert row["response_a"] == answer + [None] * (turns - len(answer))
    assert row["response_b"] == [None] * turns


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.sampled_from("aé😀\ud83d\ude00\udbff\udc00\ufeff\ufffd"), max_size=8),
    real_list=st.booleans(),
)
def test_halves_of_surrogate_pairs_are_replaced(text: str, real_list: bool) -> None:
    def character(pair: re.Match[str]) -> str:
        high, low = pair[0]
        return chr(0x10000 + (ord(high) - 0xD800) * 0x400 + ord(low) - 0xDC00)

    expected = re.sub("[\ud800-\udbff][\udc00-\udfff]", character, text)
    expected = re.sub("[\ud800-\udfff]", "\ufffd", expected)
    row = a_row(prompt=[text] if real_list else json.dumps([text]))
    with tempfile.TemporaryDirectory() as folder:
        [result] = read(write(Path(folder) / "t.jsonl", [row]))
    assert result["prompt"] == [expected]


# Labels


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((1, 0, 0), [1, 0, 0]),
        ((0, 1, 0), [0, 1, 0]),
        ((0.25, 0.25, 0.5), [0.25, 0.25, 0.5]),
        ((0.333, 0.333, 0.3335), [0.333 / 0.9995, 0.333 / 0.9995, 0.3335 / 0.9995]),
        (("1.0", " 0", "0e0"), [1, 0, 0]),
    ],
)
def test_numeric_labels(tmp_path: Path, ending: str, numbers: tuple[Any, ...], expected: list[float]) -> None:
    cells = dict(zip(A_WINS, numbers, strict=True))
    [row] = read(write(tmp_path / f"t.{ending}", [a_row(**cells)]))
    assert row["label"] == pytest.approx(expected, abs=1e-7)
    assert sum(row["label"]) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_labels_of_true_and_false(tmp_path: Path, ending: str) -> None:
    cells = {"winner_model_a": False, "winner_model_b": True, "winner_tie": False}
    assert read(write(tmp_path / f"t.{ending}", [a_row(**cells)]))[0]["label"] == [0, 1, 0]


def worded(word: Any) -> dict[str, Any]:
    return {**{name: cell for name, cell in a_row().items() if name not in A_WINS}, "winner": word}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("word", "expected"),
    [("model_a", [1, 0, 0]), ("model_b", [0, 1, 0]), ("tie", [0, 0, 1]), ("tie (bothbad)", [0, 0, 1])],
)
def test_labels_in_one_word(tmp_path: Path, ending: str, word: str, expected: list[float]) -> None:
    assert read(write(tmp_path / f"t.{ending}", [worded(word)]))[0]["label"] == expected


@pytest.mark.parametrize("ending", ENDINGS)
def test_labels_may_be_absent_or_ignored(tmp_path: Path, ending: str) -> None:
    blank = None if ending != "csv" else ""
    rows = [worded("tie"), worded(blank) | {"id": "8"}]
    unlabelled = [{name: cell for name, cell in row.items() if name != "winner"} for row in rows]
    nonsense = write(tmp_path / f"nonsense.{ending}", [worded("?")])
    some = write(tmp_path / f"some.{ending}", rows)
    assert [row["label"] for row in read(some, "optional")] == [[0, 0, 1], None]
    assert [row["label"] for row in read(some, "ignored")] == [None, None]
    assert [r["label"] for r in read(write(tmp_path / f"no.{ending}", unlabelled), "optional")] == [
        None,
        None,
    ]
    assert read(nonsense, "ignored")[0]["label"] is None


# What is refused: the file, the row and the field are named


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("changes", "field", "what"),
    [
        ({"prompt": "hello"}, "prompt", 'is "hello", which is not JSON'),
        ({"prompt": '"hello"'}, "prompt", "not a list"),
        ({"prompt": "null"}, "prompt", "is null, not a list"),
        ({"prompt": ""}, "prompt", "is empty or missing"),
        ({"response_a": " "}, "response_a", "not JSON"),
        ({"response_a": "{}"}, "response_a", "is a dict, not a list"),
        ({"response_a": '["x", 3]'}, "response_a", "has 3 as turn 2"),
        ({"response_b": '[{"text": "x"}]'}, "response_b", "has a dict as turn 1"),
        ({"response_b": '[["x"]]'}, "response_b", "has a list as turn 1"),
        ({"response_b": "[true]"}, "response_b", "has true as turn 1"),
        ({"response_b": "[NaN]"}, "response_b", "has NaN as turn 1"),
        ({"response_b": '["x"'}, "response_b", "not JSON"),
        ({"response_b": "['x']"}, "response_b", "not JSON"),
        ({"response_b": "__import__('os')"}, "response_b", "not JSON"),
        ({"response_b": '{"a": 1, "a": 2}'}, "response_b", '"a" appears twice'),
        ({"response_b": "[" * 200_000}, "response_b", "nested too deeply"),
        ({"response_b": f"[{'9' * 5000}]"}, "response_b", "not JSON"),
        ({"id": " "}, "id", "is blank"),
        ({"winner_model_a": "2"}, "winner_model_a, winner_model_b, winner_tie", "which sum to 2"),
        ({"winner_model_a": "0"}, "winner_model_a, winner_model_b, winner_tie", "which sum to 0"),
        ({"winner_model_a": "0.998"}, "winner_model_a, winner_model_b, winner_tie", "which sum to 0.998"),
        ({"winner_model_b": "-1"}, "winner_model_b", "is -1"),
        ({"winner_model_b": "nan"}, "winner_model_b", "is nan"),
        ({"winner_tie": "inf"}, "winner_tie", "is inf"),
        ({"winner_tie": "yes"}, "winner_tie", 'is "yes"'),
        ({"winner_tie": ""}, "winner_tie", 'is ""'),
        (dict.fromkeys(A_WINS, ""), "winner_model_a", "is blank"),
    ],
)
def test_bad_cells_are_named(tmp_path: Path, ending: str, changes: dict[str, str], field: str, what: str) -> None:
    good = {name: str(cell) for name, cell in a_row(id="6").items()}
    bad = {name: str(cell) for name, cell in a_row(**changes).items()}
    path = write(tmp_path / f"t.{ending}", [good, bad])
    where = {"csv": "line 3", "parquet": "row 2", "jsonl": "line 2"}[ending]
    message = complaint([path])
    assert message.startswith("1 problem in the data; nothing was written:")
    assert f"{path}, {where}, {field}: " in message
    assert what in message
    assert len(message) < 1000


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("changes", "field", "what"),
    [
        ({"prompt": None}, "prompt", "is empty or missing"),
        ({"prompt": 3}, "prompt", "is 3, not a list"),
        ({"response_b": [1, 2]}, "response_b", "has 1 as turn 1"),
        ({"id": None}, "id", "is blank"),
        ({"id": True}, "id", "is true"),
        ({"id": 1.5}, "id", "is 1.5"),
        ({"id": 1e300}, "id", "is 1e+300"),
        ({"winner_model_a": [1]}, "winner_model_a", "is a list"),
        ({"winner_model_a": None}, "winner_model_a", "is null"),
    ],
)
def test_cells_of_a_wrong_type_are_named(
    tmp_path: Path, ending: str, changes: dict[str, Any], field: str, what: str
) -> None:
    path = write(tmp_path / f"t.{ending}", [a_row(**changes)])
    message = complaint([path])
    assert f"{path}, {'row' if ending == 'parquet' else 'line'} 1, {field}: {what}" in message


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("word", ["A", "model_c", "1"])
def test_unknown_words_for_labels_are_named(tmp_path: Path, ending: str, word: str) -> None:
    path = write(tmp_path / f"t.{ending}", [worded(word)])
    assert f'winner: is "{word}"; write one of model_a, model_b, tie' in complaint([path])


@pytest.mark.parametrize("ending", ENDINGS)
def test_missing_columns_are_named(tmp_path: Path, ending: str) -> None:
    def without(*names: str) -> Path:
        row = {name: cell for name, cell in a_row().items() if name not in names}
        return write(tmp_path / f"{'-'.join(names)}.{ending}", [row])

    for name in ("id", "prompt", "response_a", "response_b"):
        message = complaint([without(name)])
        assert str(tmp_path / f"{name}.{ending}") in message and f", {name}: is" in message
    assert "winner_tie: is missing, but winner_model_a, winner_model_b is there" in complaint([without("winner_tie")])
    assert "winner_tie: is missing" in complaint([without("winner_tie")], "optional")
    assert "winner_model_a: is missing; labelled rows need" in complaint([without(*A_WINS)])
    both = write(tmp_path / f"both.{ending}", [a_row(winner="tie")])
    assert 'winner: is "tie", but winner_model_a, winner_model_b, winner_tie are [1.0, 0.0, 0.0]' in complaint([both])


def test_repeated_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [a_row()])
    path.write_text(path.read_text().replace("model_b", "prompt", 1))
    assert f'{path}, the file, column "prompt": appears twice' in complaint([path])
    table = pa.Table.from_pylist([a_row()])
    renamed = ["id" if name == "model_a" else name for name in table.column_names]
    pq.write_table(table.rename_columns(renamed), tmp_path / "t.parquet")
    assert 'column "id": appears twice' in complaint([tmp_path / "t.parquet"])
    lines = tmp_path / "t.jsonl"
    lines.write_text(json.dumps(a_row()).replace("model_a", "id", 1))
    assert f"{lines}, line 1, the row: is " in complaint([lines])
    assert '"id" appears twice in an object' in complaint([lines])


@pytest.mark.parametrize("ending", ENDINGS)
def test_repeated_ids_are_named_within_and_across_files(tmp_path: Path, ending: str) -> None:
    first = write(tmp_path / f"a.{ending}", [a_row(id="1"), a_row(id="2")])
    second = write(tmp_path / f"b.{ending}", [a_row(id="3"), a_row(id="3"), a_row(id="1")])
    message = complaint([first, second])
    lines = {"csv": ("line 3", "line 4"), "parquet": ("row 2", "row 3"), "jsonl": ("line 2", "line 3")}[ending]
    assert message.startswith("2 problems")
    assert f'{second}, {lines[0]}, id: "3" also occurs earlier, in {second}' in message
    assert f'{second}, {lines[1]}, id: "1" also occurs earlier, in {first}' in message


def test_ragged_rows_are_named_by_the_line_on_which_they_begin(tmp_path: Path) -> None:
    header = ",".join(a_row())
    good = '7,x,y,"[""a""]","[""b"",\n""b""]","[""c""]",1,0,0'  # on two lines
    short = '8,x,y,"[""a""]","[""b""]","[""c""]",1,0'
    long = '9,x,y,"[""a""]","[""b""]","[""c""]",1,0,0,0'
    path = tmp_path / "t.csv"
    path.write_text("\n".join([header, good, short, "", long]) + "\n")
    message = complaint([path])
    assert message.startswith("2 problems")
    assert f"{path}, line 4, the row: has 8 fields, but the header has 9" in message
    assert f"{path}, line 6, the row: has 10 fields, but the header has 9" in message


def test_broken_quotes_are_named_by_the_line_on_which_the_row_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [a_row(id="1"), a_row(id="2"), a_row(id="3")])
    whole = path.read_text()
    path.write_text(whole[: whole.rindex('"')])  # the file ends within a quoted field
    assert f"{path}, line 4, the row: is broken CSV" in complaint([path])
    path.write_text(whole.replace('2,x,y,"', '2,x,y,"["a"]'))
    assert f"{path}, line 3, the row: is broken CSV" in complaint([path])


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(write(table, [a_row()]).read_bytes().replace(b"Bye", b"caf\xe9"))
    assert f"{table}, line 2, response_b: is not UTF-8" in complaint([table])
    table.write_bytes(write(table, [a_row()]).read_text().encode("utf-16"))
    assert f"{table}, the file, a column name: is not UTF-8" in complaint([table])
    lines = tmp_path / "t.jsonl"
    lines.write_bytes(write(lines, [a_row()]).read_bytes().replace(b"Bye", b"\xed\xa0\xbd"))
    assert f"{lines}, line 1, the row: is not UTF-8" in complaint([lines])


@pytest.mark.parametrize("kind", ["text", "list"])
def test_parquet_bytes_that_are_not_utf8_are_named(tmp_path: Path, kind: str) -> None:
    cells = [b'["ok"]', b'["caf\xe9"]']
    broken = pa.array(cells, pa.binary()).view(pa.string())
    if kind == "list":
        broken = pa.ListArray.from_arrays([0, 1, 2], broken)
    good = pa.Table.from_pylist([a_row(id="1"), a_row(id="2")])
    path = tmp_path / "t.parquet"
    pq.write_table(good.set_column(good.column_names.index("prompt"), "prompt", broken), path)
    assert f"{path}, row 2, prompt: is not UTF-8" in complaint([path])


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("empty.csv", b"", "the file is empty"),
        ("empty.parquet", b"", "the file is empty"),
        ("empty.jsonl", b"", "the file is empty"),
        ("header.csv", ",".join(a_row()).encode() + b"\n", "is missing, because the file has none"),
        ("blank.csv", b"\n\n", "id, prompt, response_a, response_b: is missing"),
        ("blank.jsonl", b"\n \n", "is missing, because the file has none"),
        ("text.parquet", b"id,prompt", "cannot be read"),
        ("list.jsonl", b"[1, 2]", "line 1, the row: is not an object"),
        ("text.jsonl", b"hello", "line 1, the row: is "),
        ("semicolons.csv", b"id;prompt\n1;2\n", 'the columns found are "id;prompt"'),
        ("table.xlsx", b"PK", "must end in one of .csv, .tsv, .parquet, .jsonl"),
        ("table", b"id", "must end in one of .csv, .tsv, .parquet, .jsonl"),
    ],
)
def test_useless_files_are_named(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = complaint([path])
    assert str(path) in message and what in message


def test_parquet_without_rows_or_with_its_end_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.Table.from_pylist([a_row()])
    pq.write_table(table.slice(0, 0), path)
    assert f"{path}, the file, any row: is missing, because the file has none" in complaint([path])
    pq.write_table(table, path)
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}, the file, any row: cannot be read" in complaint([path])


def test_every_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    message = complaint([tmp_path / "none.csv", folder, tmp_path / "none.zip"])
    assert message.startswith("3 problems")
    assert f"{tmp_path / 'none.csv'}, the file, any row: cannot be read (No such file" in message
    assert f"{folder}, the file, any row: cannot be read (Is a directory" in message
    assert "name at least one" in complaint([])


def test_all_bad_rows_are_counted_and_twenty_are_listed(tmp_path: Path) -> None:
    bad = 2 * module.ROWS_AT_ONCE  # spread over three chunks, so that counting goes on after the first
    rows = [a_row(id=str(number), prompt="[0]" if number >= 10 else "[]") for number in range(bad + 10)]
    path = write(tmp_path / "t.csv", rows)
    lines = complaint([path]).splitlines()
    assert lines[0] == f"{bad:,} problems in the data; nothing was written:"
    assert [line.split(", ")[1] for line in lines[1:-1]] == [f"line {number}" for number in range(12, 32)]
    assert lines[-1].strip() == f"and {bad - 20:,} more"


def test_a_refusal_keeps_what_the_cache_held(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    read_dataset([write(tmp_path / "good.csv", [a_row()])], cache, PREFERENCE, labels="required")
    kept = list(cache.iterdir())
    with pytest.raises(BadRowsError) as caught:
        read_dataset([write(tmp_path / "bad.csv", [a_row(prompt="")])], cache, PREFERENCE, labels="required")
    assert caught.value.count == 1
    assert list(cache.iterdir()) == kept


# The stored file


def test_the_same_content_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    path = write(tmp_path / "t.csv", [a_row()])
    first = read_dataset([path], cache, PREFERENCE, labels="required")
    assert [file["filename"] for file in first.table.cache_files] == [str(next(cache.iterdir()))]

    def refuse(*arguments: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(module, "Conversion", refuse)
    moved = path.rename(tmp_path / "moved.csv")
    assert read_dataset([moved], cache, PREFERENCE, labels="required").table.to_list() == first.table.to_list()
    with pytest.raises(AssertionError, match="converted again"):
        read_dataset([moved], cache, PREFERENCE, labels="optional")
    write(moved, [a_row(id="8")])
    with pytest.raises(AssertionError, match="converted again"):
        read_dataset([moved], cache, PREFERENCE, labels="required")


# Repeats


def dataset(*texts: tuple[str, str, str]) -> Rows:
    names = ("prompt", "response_a", "response_b")
    columns = {name: [[row[place]] for row in texts] for place, name in enumerate(names)}
    return rows_of(Dataset.from_dict({"id": [str(number) for number in range(len(texts))], **columns}))


def test_repeats_of_content_are_found() -> None:
    against = dataset(("p", "a", "b"))
    extra = dataset(("p", "a", "b"), ("p", "b", "a"), ("q", "a", "b"), ("q", "a", "b"), ("P", "a", "b"))
    flags = repeated(extra, against)
    assert flags.dtype == np.bool_
    assert flags.tolist() == [True, False, False, True, False]


def test_texts_that_only_look_alike_together_are_no_repeats() -> None:
    rows = dataset(("p", "a", "b"), ("pa", "", "b"), ("p", "ab", ""), ("p", 'a", "b', ""))
    assert repeated(rows, rows_of(rows.table.select([]))).tolist() == [False] * 4
    assert repeated(rows, rows).tolist() == [True] * 4


# Real data

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data are not at {SHARED}")


@needs_shared
def test_real_competition_files(tmp_path: Path) -> None:
    train = read_dataset([SHARED / "data/autoj/train.csv"], tmp_path, PREFERENCE, labels="required")
    test = read_dataset([SHARED / "data/autoj/test.csv"], tmp_path, PREFERENCE, labels="optional")
    assert (len(train), len(test)) == (1107, 285)
    assert set(test.table["label"]) == {None}
    frame = pd.read_csv(SHARED / "data/autoj/train.csv", dtype=str, keep_default_na=False)
    assert train.ids == frame["id"].tolist()
    assert list(train.table["response_b"]) == [json.loads(cell) for cell in frame["response_b"]]
    assert np.array_equal(train.labels, frame[list(A_WINS)].astype(float).to_numpy())


@needs_shared
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_real_data_of_full_size_take_little_memory(tmp_path: Path) -> None:
    # VmHWM, because ru_maxrss begins with the memory of the process that started this one.
    script = """
import re, sys
from pathlib import Path
from arena.data.dataset import read_dataset
from arena.tasks import TASKS
rows = read_dataset([Path(sys.argv[1])], Path(sys.argv[2]), TASKS["preference"](), labels="required")
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(len(rows), int(peak) // 1024, "torch" in sys.modules)
"""
    arguments = [sys.executable, "-c", script, str(SHARED / "data/alpaca_57k.parquet"), str(tmp_path)]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    count, peak_mib, torch_imported = done.stdout.split()[-3:]
    assert count == "57477"
    assert int(peak_mib) < 500
    assert torch_imported == "False"
