"""`arena judge`: files in and out, here and at a URL, resumed after a kill, in shares, and trained on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arena import Judge
from arena.config import change
from arena.data.predictions import read_predictions
from arena.data.prepare import prepare_fold
from arena.inference import judge_inputs
from arena.inference.blend import Blend, Member, SavedBlend, save_blend
from arena.model.backbone import load_tokenizer
from arena.tasks import task_of
from arena.tasks.preference import COLUMNS
from arena.training.members import read_members
from arena.training.run import run_fold
from tests.helpers import Processes, status_of_arena, tiny_recipe
from tests.inference.test_judge_model import saved

# it waits after each part, so that there is something to be cut
SLOWED = """
import time
from arena.inference import judge_files, judge_inputs
from arena.storage import parts
judge_inputs.WINDOW_ROWS = 5
write = parts.Parts.write
def slow(self, *args):
    write(self, *args)
    time.sleep(0.15)
parts.Parts.write = slow
"""
LOADED: dict[tuple[str, ...], Judge] = {}
HOSTILE = [
    "a,b",
    'say "x"',
    "new\nline",
    "lone\rreturn",
    "é 漢字 🎉",
    " spaces ",
    "a.b",
    "",
    "prompt.a",
    "__index_level_0__",
]


@pytest.fixture(scope="module")
def run(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the rows of `rows`; beside it is another one."""
    folder = tmp_path_factory.mktemp("judge")
    recipe = tiny_recipe(folder, gemma2, "packing.budget=4096")
    for seed, name in enumerate(("run", "other")):
        saved(folder / name / "fold0", recipe, seed=seed)
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run: Path) -> np.ndarray:
    """What the judge says of the rows of `rows_of`."""
    return Judge.from_pretrained(run).predict_proba(rows_of(run))


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges are loaded once for all tests."""
    load = Judge.from_pretrained

    def cached(*names: Any, settings: Any = (), **more: Any) -> Judge:
        key = (*map(str, names), *settings)
        if key not in LOADED:
            LOADED[key] = load(*names, settings=settings, **more)
        return LOADED[key]

    monkeypatch.setattr(Judge, "from_pretrained", cached)


def rows_of(run: Path) -> list[dict[str, Any]]:
    table = pd.read_csv(run.parent / "rows/test.csv", dtype=str)
    names = ("prompt", "response_a", "response_b")
    return [{**row, **{name: json.loads(row[name]) for name in names}} for row in table.to_dict("records")]


def judge(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    return status_of_arena(monkeypatch, "judge", *words)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            if path.suffix == ".tsv":
                writer.writer = csv.writer(handle, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
            writer.writeheader()
            writer.writerows(
                {key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows
            )
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def probabilities(path: Path, columns: tuple[str, ...] = COLUMNS) -> np.ndarray:
    return np.array([[float(row[name]) for name in columns] for row in read(path)])


def test_it_says_what_the_judge_says(
    run: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in every kind of file; nothing is left beside the result."""
    pairs = (".csv", ".csv"), (".tsv", ".jsonl"), (".json", ".parquet"), (".jsonl", ".jsonl"), (".parquet", ".csv")
    for ending, kind in pairs:
        source, out = write(tmp_path / f"in{ending}", rows_of(run)), tmp_path / "new" / f"out{kind}"
        assert judge(monkeypatch, run, source, out) == 0
        assert np.array_equal(probabilities(out), expected)
        assert [row["id"] for row in read(out)] == [row["id"] for row in rows_of(run)]
        assert list(out.parent.iterdir()) == [out]
        shutil.rmtree(out.parent)


def test_other_columns_stay_as_they_are(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types, order, nested and null cells, in parquet and JSONL; hostile names everywhere."""
    rows = rows_of(run)
    nested = [
        {"tags": [1, None], "at": {"é": [1.5]}, "no": None, "odd": "\ud83d", "big": 2**60, "id": row["id"]}
        for row in rows
    ]
    given = [{**more, **row, "last": at % 2 == 0} for at, (more, row) in enumerate(zip(nested, rows, strict=True))]
    source = write(tmp_path / "in.jsonl", given)
    assert judge(monkeypatch, run, source, tmp_path / "out.jsonl") == 0
    found = read(tmp_path / "out.jsonl")
    assert [{name: row[name] for name in row if name not in COLUMNS} for row in found] == given
    assert all(list(row) == [*given[0], *COLUMNS] for row in found)

    n = len(rows)
    table = pa.Table.from_pylist(rows)
    columns: dict[str, Any] = {
        "ns": pa.array([1, None] * (n // 2), pa.timestamp("ns", "UTC")),
        "time": pa.array([1] * n, pa.time64("ns")),
        "raw": [b"\xff\x00"] * n,
        "money": [Decimal("1.10")] * n,
        "word": pa.array(["a", None] * (n // 2)).dictionary_encode(),
        "map": pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int8())),
        "half": pa.array([np.float16(1.5)] * n, pa.float16()),
        "struct": [{"a": [{"b": None}], "c": 1.0}] * n,
        **{name: [name] * n for name in HOSTILE},
    }
    for name, values in columns.items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    table = table.replace_schema_metadata({"who": "x"})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=5)
    assert judge(monkeypatch, run, tmp_path / "in.parquet", tmp_path / "out.parquet") == 0
    again = pq.read_table(tmp_path / "out.parquet")
    assert again.schema.names == [*table.column_names, *COLUMNS]
    assert again.drop_columns(list(COLUMNS)).equals(pq.read_table(tmp_path / "in.parquet"), check_metadata=True)

    hostile = [{**row, **dict.fromkeys(HOSTILE, 'x,"\n')} for row in rows]
    source = write(tmp_path / "in.csv", hostile)
    for kind in (".csv", ".parquet"):
        assert judge(monkeypatch, run, source, tmp_path / f"hostile{kind}") == 0
        found = read(tmp_path / f"hostile{kind}")
        assert list(found[0]) == [*hostile[0], *COLUMNS]
        assert [{name: row[name] for name in HOSTILE} for row in found] == [dict.fromkeys(HOSTILE, 'x,"\n')] * n


def test_cells_of_one_kind_of_file_in_another(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What parquet cannot hold is JSON there; what JSON cannot is text."""
    odd = [
        {"mixed": 1, "deep": {"a": 1}, "none": {}},
        {"mixed": "x", "deep": {"b": "\ud83d"}},
        {"mixed": [2], "n": 0.5},
        {"n": 1},
    ]
    source = write(tmp_path / "in.jsonl", [{**row, **more} for row, more in zip(rows_of(run), odd, strict=False)])
    monkeypatch.setattr(judge_inputs, "WINDOW_ROWS", 2)
    assert judge(monkeypatch, run, source, tmp_path / "out.parquet") == 0
    found = read(tmp_path / "out.parquet")
    assert [row["mixed"] for row in found] == ["1", "x", "[2]", None]
    assert [row["deep"] for row in found[:2]] == [{"a": 1, "b": None}, {"a": None, "b": "\ufffd"}]
    assert [row["none"] for row in found] == ["{}", None, None, None] and [row["n"] for row in found[2:]] == [0.5, 1.0]
    times = [{**row, "at": datetime(2026, 1, 2), "raw": b"\xff", "yes": True} for row in rows_of(run)[:2]]
    source = write(tmp_path / "in.parquet", times)
    for kind, yes in ((".csv", "true"), (".jsonl", True)):
        assert judge(monkeypatch, run, source, tmp_path / f"out{kind}") == 0
        row = read(tmp_path / f"out{kind}")[0]
        assert (row["at"], row["raw"], row["yes"]) == ("2026-01-02T00:00:00", "/w==", yes)


def test_rows_that_cannot_be_judged_are_beside(
    run: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad cells, and rows without finite logits, which are found among the others."""
    rows, out = rows_of(run), tmp_path / "out.jsonl"
    lines = [json.dumps(row) for row in rows]
    lines[3:3] = ["{", json.dumps({**rows[0], "response_b": 3}), json.dumps({"id": "x"})]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    verdicts = Judge.verdicts

    def poisoned(self: Judge, given: Any, parts: Path | None = None) -> Any:
        if any("better 5?" in str(turns) for turns in given.table["prompt"]):
            raise FloatingPointError
        return verdicts(self, given, parts)

    monkeypatch.setattr(Judge, "verdicts", poisoned)
    assert judge(monkeypatch, run, tmp_path / "in.jsonl", out) == 0
    good = [at for at, row in enumerate(rows) if row["prompt"] != ["which is better 5?"]]
    assert len(good) == len(rows) - 1
    assert [row["id"] for row in read(out)] == [rows[at]["id"] for at in good]
    np.testing.assert_allclose(probabilities(out), expected[good], atol=1e-6)
    beside = read(tmp_path / "out.jsonl.rejected.jsonl")
    assert [(each["row"], each["field"]) for each in beside] == [
        ("line 4", "the row"), ("line 5", "response_b"), ("line 6", "prompt, response_a, response_b"),
        ("line 9", "the row"),
    ]  # fmt: skip
    assert beside[1]["file"] == str(tmp_path / "in.jsonl") and "is 3, not a list" in beside[1]["why"]
    assert "not finite" in beside[3]["why"] and "4 were rejected" in capsys.readouterr().out
    write(tmp_path / "in.jsonl", rows[:5])
    assert judge(monkeypatch, run, tmp_path / "in.jsonl", out) == 0
    assert not (tmp_path / "out.jsonl.rejected.jsonl").exists()  # those of other rows
    monkeypatch.setattr("arena.inference.judge_work.FEWEST", 1)
    write(tmp_path / "in.jsonl", rows[5:6])
    assert judge(monkeypatch, run, tmp_path / "in.jsonl", out) == 2
    assert "none of 1 rows" in capsys.readouterr().out


def test_both_orders_of_several_judges(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in.jsonl", rows_of(run)), tmp_path / "out.parquet"
    several = run, run.with_name("other")
    assert judge(monkeypatch, *several, source, out, "--orders") == 0
    by_order = Judge.from_pretrained(*several).predict_orders(rows_of(run))
    assert not np.allclose(by_order, Judge.from_pretrained(run).predict_orders(rows_of(run)), atol=1e-3)
    for order in range(2):
        assert np.array_equal(probabilities(out, tuple(f"{name}_order{order}" for name in COLUMNS)), by_order[order])
    flips = np.ptp(by_order.argmax(axis=2), axis=0) > 0
    assert [row["flips"] for row in read(out)] == flips.tolist()
    assert judge(monkeypatch, run, source, out, "--orders", "judge.swap=false") == 2
    assert "--orders: this judge reads one order" in capsys.readouterr().out


def test_shares_joined_are_the_whole(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge_inputs, "WINDOW_ROWS", 2)
    source, whole, out = write(tmp_path / "in.csv", rows_of(run)), tmp_path / "whole.parquet", tmp_path / "out.parquet"
    assert judge(monkeypatch, run, source, whole) == 0
    assert judge(monkeypatch, run.with_name("other"), source, out, "--shard=2/3") == 0
    for share in (2, 1):
        assert judge(monkeypatch, run, source, out, f"--shard={share}/3") == 0 and not out.exists()
    assert judge(monkeypatch, run, source, out, "--join=3") == 2
    shown = capsys.readouterr().out
    assert "the first --shard 3/3" in shown and "has results that differ in judge: they are not used" in shown
    assert judge(monkeypatch, run, source, out, "--shard=3/3") == 0
    monkeypatch.setattr(Judge, "from_pretrained", {}.__getitem__)  # nothing has to be loaded to join
    assert judge(monkeypatch, run, source, out, "--join=3") == 0
    assert out.read_bytes() == whole.read_bytes()
    assert len(list(out.with_name("out.parquet.parts").iterdir())) == 1, "the other judge's share"


def test_at_urls(
    run: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    memory = fsspec.filesystem("memory")
    rows = rows_of(run)
    memory.pipe_file("/in/a/one.jsonl", write(tmp_path / "1.jsonl", rows[:7]).read_bytes())
    memory.pipe_file("/in/b/two.jsonl", write(tmp_path / "2.jsonl", rows[7:]).read_bytes() + b"{\n")
    assert judge(monkeypatch, run, "memory://in", "memory://out/every.jsonl") == 0
    found = [json.loads(line) for line in memory.cat_file("/out/every.jsonl").splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    np.testing.assert_allclose([[row[name] for name in COLUMNS] for row in found], expected, atol=1e-6)
    (rejected,) = memory.cat_file("/out/every.jsonl.rejected.jsonl").splitlines()
    assert json.loads(rejected)["file"] == "memory:///in/b/two.jsonl"
    assert judge(monkeypatch, run, "memory://in/*/*.jsonl", "memory://each/") == 0
    assert sorted(memory.find("/each")) == ["/each/a/one.jsonl", "/each/b/two.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jsonl", "2.jsonl"]
    assert judge(monkeypatch, run, "memory://in", "memory://in/out.jsonl") == 2
    assert judge(monkeypatch, run, "sftp://host/in.csv", "out.csv") == 2
    shown = capsys.readouterr().out
    assert "is among the files to read" in shown and "sftp://host/in.csv needs a package that is not installed" in shown


def test_a_folder_and_a_pattern(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, folder = [{name: row[name] for name in row if name != "id"} for row in rows_of(run)], tmp_path / "in"
    folder.mkdir()
    write(folder / "a.csv", rows[:3]), write(folder / "b.tsv", rows[3:6]), write(folder / "c.json", rows[6:])
    (folder / "read me.txt").write_text("x")
    assert judge(monkeypatch, run, folder, f"{tmp_path}/each/") == 0
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == ["a.csv", "b.csv", "c.jsonl"]
    assert [row["id"] for row in read(tmp_path / "each/c.jsonl")] == [str(at + 1) for at in range(6)]
    assert judge(monkeypatch, run, f"{folder}/*.[ctj]s*", tmp_path / "out.csv") == 0
    assert [row["id"] for row in read(tmp_path / "out.csv")] == [str(at + 1) for at in range(len(rows))]
    assert judge(monkeypatch, run, folder, folder / "out.csv") == 2
    assert "is among the files to read" in capsys.readouterr().out
    write(folder / "a.tsv", rows[:3]), write(folder / "empty.csv", [{"prompt": "x"}])
    for source, out, message in (
        (folder, f"{tmp_path}/each/", "empty.csv, the file, response_a, response_b: is missing"),
        (folder / "a.*", f"{tmp_path}/each/", "several files would be written to one"),
        (folder / "*.txt", tmp_path / "out.csv", "read me.txt: name files that end in"),
        (folder / "nothing", tmp_path / "out.csv", "there is no file that ends in"),
        (folder / "a.csv", tmp_path / "out.txt", "name a file that ends in .csv, .jsonl, .parquet, or a folder with"),
    ):
        assert judge(monkeypatch, run, source, out) == 2
        assert message in capsys.readouterr().out


def test_columns_by_other_names_and_labels(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray
) -> None:
    """Beside labels, predictions have names of their own, by which a blend finds them."""
    rows = [
        dict(zip(("id", "q", "l", "r"), row.values(), strict=True)) | dict(zip(COLUMNS, (0, 1, 0), strict=True))
        for row in rows_of(run)
    ]
    out = tmp_path / "out.csv"
    names = "data.columns.names={prompt: q, response_a: l, response_b: r}"
    assert judge(monkeypatch, run, write(tmp_path / "in.csv", rows), out, names) == 0
    assert list(read(out)[0]) == ["id", "q", "l", "r", *COLUMNS, *(f"p_{name}" for name in COLUMNS)]
    assert np.array_equal(probabilities(out), [[0, 1, 0]] * len(rows))
    predicted = read_predictions(out, COLUMNS)
    np.testing.assert_allclose([predicted[row["id"]] for row in rows], expected, atol=1e-12)
    both = read_members([f"mine={out}"], str(out), tmp_path)
    np.testing.assert_allclose(both.predictions[0], expected, atol=1e-12)
    assert np.array_equal(both.labels, [[0, 1, 0]] * len(rows))
    assert judge(monkeypatch, run, out, tmp_path / "again.csv", names) == 2  # for a third judge there is no name


def test_a_blend(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = (Member("run", "run", str(run)), Member("baseline", "baseline", str(run.parent / "rows/train.csv")))
    blend, source = tmp_path / "blend.json", write(tmp_path / "in.jsonl", rows_of(run))
    save_blend(blend, SavedBlend("preference", members, Blend("log", (0.7, 0.4), 1.0, (0.1, -0.1, 0)), {}))
    assert judge(monkeypatch, blend, source, tmp_path / "out.csv") == 0
    assert np.array_equal(probabilities(tmp_path / "out.csv"), Judge.from_pretrained(blend).predict_proba(rows_of(run)))


def test_what_it_writes_is_trained_on(
    run: Path, gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray
) -> None:
    """Rows without labels become rows with soft labels in one command."""
    rows = [{**row, "prompt": [text]} for row, text in zip(rows_of(run), ("why", "a sea", "Ελλάδα"), strict=False)]
    for row in rows:
        del row["id"]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.parquet"
    assert judge(monkeypatch, run, source, out) == 0
    for extra in (str(out), f"{{path: {out}, labels: {out}}}"):
        recipe = tiny_recipe(tmp_path, gemma2, f"data.extra=[{extra}]")
        data = prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(str(gemma2)))
        new = [row for row, name in enumerate(data.ids) if name.endswith("(out.parquet)")]
        assert len(new) == len(rows) and set(new) <= set(data.train_rows)
        np.testing.assert_allclose(data.labels[new], Judge.from_pretrained(run).predict_proba(rows), atol=1e-6)
    metrics = run_fold(change(recipe, ["train.max_steps=1", "train.evaluate_every=0"]), 0, tmp_path / "runs")
    assert metrics["n_train"] == len(data.train_rows)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    found = Processes(tmp_path_factory.mktemp("processes"), SLOWED)
    yield found
    found.close()


def windows(folder: Path) -> list[Path]:
    """The parts of windows that are saved; those of logits lie deeper."""
    return sorted(folder.glob("out.jsonl.parts/*/*/[!.]*.part"))


@pytest.mark.slow
def test_killed_and_signalled_it_resumes_to_the_same_file(
    run: Path, processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    words = [str(each) for each in (run, write(tmp_path / "in.jsonl", rows_of(run) * 2), out)]
    judged, verdicts = [], Judge.verdicts

    def count(self: Judge, rows: Any, parts: Path | None = None) -> Any:
        judged.append(len(rows))
        return verdicts(self, rows, parts)

    monkeypatch.setattr(Judge, "verdicts", count)
    monkeypatch.setattr(judge_inputs, "WINDOW_ROWS", 5)
    assert judge(monkeypatch, *words) == 0
    whole, every = out.read_bytes(), len(judged)
    assert every == 5
    out.unlink()
    for number, least in ((signal.SIGKILL, 1), (signal.SIGTERM, 2)):
        shown, until = tmp_path / "shown.txt", time.monotonic() + 60
        pid = processes.start(shown, "judge", *words)
        while len(windows(tmp_path)) < least:
            assert time.monotonic() < until and not out.exists()
            time.sleep(0.005)
        os.kill(pid, number)
        assert processes.status() == (143 if number == signal.SIGTERM else -number)
        assert not out.exists()
    assert "the same command resumes from them" in shown.read_text()
    kept = windows(tmp_path)
    judged.clear()
    damaged = bytearray(kept[0].read_bytes())
    damaged[-1] ^= 1
    kept[0].write_bytes(damaged)
    assert judge(monkeypatch, *words) == 0
    assert out.read_bytes() == whole and len(judged) == every - len(kept) + 1, "only what was missing is judged"
    assert "it is damaged; it is recomputed" in capsys.readouterr().out and not windows(tmp_path)
