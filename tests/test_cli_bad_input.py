"""Hostile input by the command line, end to end: status 2 and one message, or finite rows; nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from arena.tasks.preference import COLUMNS as CLASSES
from tests.bad_settings import COMMANDS, SAMPLES
from tests.data.bad_files import KINDS, Kind, summary
from tests.helpers import arena, done_within, tiny, write_rows

SECONDS = 60
BY_NAME = {kind.name: kind for kind in KINDS}
TRAINED_ON = [
    "Latin-1", "a quote never closed", "one line of 30 MB", "parquet: cut short", "JSONL: a broken line",
    "label: two winners", "a cell: nested 100,000 deep", "train.csv is a zip archive", "id: that of an earlier row",
]  # fmt: skip
JUDGED = [
    "control tokens in every field", "nothing in any field", "a cell: 999 turns", "a cell: a lone surrogate",
    "a cell: a word of 120,000 characters", "a cell: right to left, zero width, unassigned", "formulas in cells",
    "id: quotes and commas", "id: 1.0", "id: the word nan", "line breaks within cells", "CR at the ends of lines",
    "parquet: a column of lists", "parquet: float ids", "JSONL: lone surrogates",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_hanging() -> Iterator[None]:
    with done_within(SECONDS):
        yield


@pytest.fixture(scope="module")
def trained(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one fold was trained, with `runs` and `rows`."""
    place = tmp_path_factory.mktemp("trained")
    rows = str(write_rows(place / "rows"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        arena(patch, "train", "--data", rows, *tiny(gemma2), "train.epochs=0.2")
    return place


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message with which a command is refused: status 2, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        arena(monkeypatch, *words)
    shown = capsys.readouterr()
    assert stop.value.code == 2
    assert "arena: " in shown.out and "Traceback" not in shown.out + shown.err
    assert len(shown.out) < 5_000
    return shown.out


def written(folder: Path) -> set[str]:
    """Everything under a folder that a command may have written: not the cache's complete files, nor locks."""
    kept = ("conversations-", "tokens-", "folds-", "prefixes-")
    every = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.name.startswith(".")}
    return {str(path) for path in every if not path.name.startswith(kept) and path.suffix != ".lock"}


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.name)
def test_settings_recipes_templates_and_bases(
    kind: Kind, gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows", n=30, n_test=3)
    if kind.group == "base folders":
        shutil.copytree(gemma2, tmp_path / "good_base")
    words = ["train", *tiny(gemma2), "train.epochs=0.2", *kind.write(tmp_path)]
    if "data.path" not in words[-1]:
        words += ["--data", "rows"]
    before = written(tmp_path)
    if kind.outcome == "error":
        message = refusal(monkeypatch, capsys, *words)
        for part in kind.says:
            assert part in message
        assert written(tmp_path) == before
    else:
        arena(monkeypatch, *words)
        oof = pd.read_csv("runs/demo/fold0/oof.csv")
        assert np.isfinite(oof[list(CLASSES)].to_numpy()).all()
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("name", TRAINED_ON)
def test_training_refuses_bad_files(
    name: str, gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    path = BY_NAME[name].write(tmp_path / "rows")
    before = written(tmp_path)
    for command in ("train", "inspect"):
        message = refusal(monkeypatch, capsys, command, "--data", "rows", *tiny(gemma2))
        assert f"rows/{path.name}" in message and "nothing was written" in message
        assert written(tmp_path) == before


@pytest.mark.parametrize("name", JUDGED)
def test_inference_gives_every_row_its_probabilities(
    name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    path = BY_NAME[name].write(tmp_path)
    test = path.rename(path.with_stem("test"))
    arena(monkeypatch, "infer", "--data", str(test), "--out", str(tmp_path / "out.csv"), "judge.swap=false")
    table = pd.read_csv(tmp_path / "out.csv", dtype={"id": str}, keep_default_na=False)
    values = table[list(CLASSES)].to_numpy(dtype=float)
    assert len(table) > 0 and table["id"].is_unique and np.isfinite(values).all()
    assert np.abs(values.sum(axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.name)
def test_sample_submissions_that_do_not_fit(
    kind: Kind, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    shutil.copytree(trained / "rows", tmp_path / "rows")
    kind.write(tmp_path / "rows")
    out = tmp_path / "out.csv"
    message = refusal(monkeypatch, capsys, "infer", "--data", str(tmp_path / "rows"), "--out", str(out))
    for part in kind.says:
        assert part in message
    assert "judging" not in message and not out.exists()


@pytest.mark.parametrize("place", ["runs/demo", "runs/demo/fold0"])
def test_a_link_that_leaves_the_runs_is_not_followed(
    place: str, gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows", n=30)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/precious").write_text("mine")
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).symlink_to(tmp_path / "elsewhere")
    message = refusal(monkeypatch, capsys, "train", "--data", "rows", *tiny(gemma2))
    assert "leads out of runs" in message
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["precious"]
    (tmp_path / place).unlink()
    (tmp_path / "elsewhere").rename(tmp_path / place)  # the control: a folder in its place is taken, or set aside
    arena(monkeypatch, "train", "--data", "rows", *tiny(gemma2), "train.epochs=0.2")
    assert (tmp_path / "runs/demo/fold0/metrics.json").is_file()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"7", b"\xff\xfe{}", b"[" * 100_000, b'{"format": 1}', b'{"format": 1, "recipe": {}}',
        b'{"format": 999}',
    ],
)  # fmt: skip
def test_a_damaged_judge_is_named(
    content: bytes, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    card = Path("runs/demo/fold0/model/judge.json")
    card.write_bytes(content)
    message = refusal(monkeypatch, capsys, "infer", "--data", "rows")
    assert str(card) in message and "train the fold again" in message
    assert not Path("submission.csv").exists()


def test_the_whole_corpus_in_figures() -> None:
    every = [*KINDS, *COMMANDS, *SAMPLES]
    names = [kind.name for kind in every]
    assert len(names) == len(set(names)) >= 60
    shown = summary(every)
    print(shown)
    assert shown.splitlines()[-1].startswith(f"| all | {len(every)} |")
