"""Where `arena judge` writes: never to what it reads, and nothing of other work is removed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from arena import Judge
from arena.inference.judge_files import _parts_folder
from tests.helpers import tiny_recipe
from tests.inference.test_judge_files import judge, rows_of, write
from tests.inference.test_judge_model import saved


@pytest.fixture(scope="module")
def run(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    saved(folder / "run" / "fold0", tiny_recipe(folder, gemma2, "packing.budget=4096"))
    return folder / "run"


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "from_pretrained", {}.__getitem__)


@pytest.mark.usefixtures("never_loaded")
def test_what_is_read_is_not_replaced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However its place is spelled, and also by the rejected rows."""
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    one = write(folder / "a.jsonl", rows_of(run))
    rejected = write(tmp_path / "x.csv.rejected.jsonl", rows_of(run))
    (tmp_path / "c.jsonl").symlink_to(one)
    content = one.read_bytes()
    monkeypatch.chdir(folder)
    for source, out in (
        (one, "../in/a.jsonl"),
        (one, tmp_path / "link/a.jsonl"),
        (tmp_path / "link/a.jsonl", one),
        (tmp_path / "c.jsonl", one),
        (folder, tmp_path / "link/out.jsonl"),
        (folder, "../in/"),
        (tmp_path / "link", folder / "new/out.jsonl"),
        (rejected, tmp_path / "x.csv"),
    ):
        assert judge(monkeypatch, run, source, out) == 2
        assert "is among the files to read: name another place" in capsys.readouterr().out
    assert one.read_bytes() == rejected.read_bytes() == content and list(folder.iterdir()) == [one]


@pytest.mark.usefixtures("never_loaded")
def test_a_place_that_cannot_be_written_is_refused_at_the_start(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", rows_of(run))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "r.csv.rejected.jsonl").mkdir()
    for out, message in (
        (tmp_path / "folder.csv", "folder.csv is a folder: name a file"),
        (tmp_path / "r.csv", "r.csv.rejected.jsonl is a folder: name a file"),
        (f"{tmp_path}/notes.txt/", "notes.txt is not a folder: name another place"),
        (tmp_path / "notes.txt/new/out.csv", "notes.txt is not a folder: name another place"),
        ("/", "/ is the root of all folders there: name a file or a folder in it"),
    ):
        assert judge(monkeypatch, run, source, out) == 2
        assert message in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 4


def test_results_of_other_work_stay(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of URLs that end in the same name."""
    source, out = write(tmp_path / "in.jsonl", rows_of(run)), tmp_path / "out.csv"
    assert judge(monkeypatch, run, source, out, "--shard=2/2", "packing.budget=2048") == 0
    assert list((tmp_path / "out.csv.parts").rglob("*.part"))
    (tmp_path / "out.csv.parts/notes.txt").write_text("of a user")
    before = sorted((tmp_path / "out.csv.parts").rglob("*"))
    assert judge(monkeypatch, run, source, out) == 0
    assert sorted((tmp_path / "out.csv.parts").rglob("*")) == before
    shutil.rmtree(tmp_path / "out.csv.parts")
    assert judge(monkeypatch, run, source, out) == 0
    assert not (tmp_path / "out.csv.parts").exists()
    places = [_parts_folder(f"memory://b/{day}/judged.parquet") for day in ("mon", "tue")]
    assert places[0] != places[1] and all(len(each.parts) == 1 for each in places)
    assert _parts_folder("memory://b/mon/") == _parts_folder("memory://b/mon")


def test_joining_what_was_joined(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in.jsonl", rows_of(run)), tmp_path / "out.csv"
    assert judge(monkeypatch, run, source, out, "--join=2") == 2
    assert "of 2 shares none is finished, the first --shard 1/2: run them" in capsys.readouterr().out
    for words in ("--shard=1/2", "--shard=2/2", "--join=2"):
        assert judge(monkeypatch, run, source, out, words) == 0
    capsys.readouterr()
    assert judge(monkeypatch, run, source, out, "--join=2") == 2
    assert "out.csv is there, and" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.csv"]
