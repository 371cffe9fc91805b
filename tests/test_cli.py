"""The command line: help that reads, errors without traceback."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from arena import cli, options
from arena.config import recipe_names
from tests.helpers import arena, write_rows


def test_version_and_misspelt_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
    for words, status, shown in (
        (["--version"], 0, f"arena {declared}\n"),
        (["trian", "--fold", "0"], 2, "arena: there is no command 'trian': did you mean train?\n"),
        (["qwertz"], 2, f"the commands are {', '.join(cli.COMMANDS)}\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            arena(monkeypatch, *words)
        assert stop.value.code == status
        assert capsys.readouterr().out.endswith(shown)


def test_help_lists_the_recipes_of_the_folder() -> None:
    for name in recipe_names():
        assert name in str(options.Name.__metadata__)


def test_a_misspelt_flag_gets_the_nearest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        arena(monkeypatch, "train", "--fodl", "3")
    assert stop.value.code == 2
    assert "--fold" in capsys.readouterr().err


def test_help_names_the_commands() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "arena.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for word in ("train", "infer", "inspect", "memory"):
        assert word in shown
    shown = subprocess.run(
        [sys.executable, "-m", "arena.cli", "train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for word in ("KEY=VALUE", "--fold", "--recipe", "--data", "--fresh"):
        assert word in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--recipe", "nope"], "there is no recipe 'nope'"),
        (["train", "train.epochz=3"], "did you mean 'epochs'"),
        (["train", "--data", "no/such/folder"], "there is no folder or file no/such/folder"),
        (["train", "--fold", "9"], "there is no fold 9"),
        (["train", "--recipe", "gemma-2-9b", "--data", "data/lmsys"], "there is no folder or file data/lmsys"),
        (["train", "--recipe", "gemma-2-9b", "model.base=no/such/folder/x"], "model.base: there is no folder no/such"),
        (["infer", "--runs", "nowhere"], "there is no finished fold"),
        (["inspect", "--step", "99999"], "there is no step 99999"),
        (["train", "data.path=E"], "and data.path=E set the same thing: give one of the two"),
        (["inspect", "data.path=E"], "and data.path=E set the same thing"),
        (["train", "data.synthetic_rows=[5,5]"], "and data.synthetic_rows=[5,5] set the same thing"),
        (["train", "--fresh", "train.resume=best"], "--fresh and train.resume=best set the same thing"),
        (["train", "--runs", "s3://b/runs"], "--runs s3:/b/runs is a URL: write to a local path"),
        (["train", "data.cache=gs://b/cache"], "data.cache gs://b/cache is a URL"),
        (["infer", "--out", "s3://b/x.csv"], "--out s3:/b/x.csv is a URL"),
        (["infer", "--out", "x.parquet"], "--out x.parquet: name a file that ends in .csv"),
        (["infer", "--runs", "s3://b/runs"], "--runs s3:/b/runs is a URL"),
        (["inspect", "--out", "x.csv"], "--out x.csv: name a file that ends in"),
        (["inspect", "--out", "s3://b/x.png"], "--out s3:/b/x.png is a URL"),
    ],
)
def test_mistakes_are_reported_without_a_traceback(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows")
    if "--data" not in words:
        words = [*words, "--data", str(rows)]
    with pytest.raises(SystemExit) as stop:
        arena(monkeypatch, *words)
    assert stop.value.code == 2
    shown = capsys.readouterr().out
    assert message in shown.replace("\n", " ")
    assert "Traceback" not in shown
    assert not {"s3:", "gs:", "x.csv", "x.parquet"} & {path.name for path in tmp_path.rglob("*")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "--out", "s3://b/judge"], "--out s3:/b/judge is a URL"),
        (["export", "--runs", "s3://b/runs"], "--runs s3:/b/runs is a URL"),
    ],
)
def test_urls_are_not_written_to(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        arena(monkeypatch, *words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().out.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_used_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows")
    text = (rows / "train.csv").read_text().replace('"[""which is better 3?""]"', "which is better 3?")
    (rows / "train.csv").write_text(text)
    with pytest.raises(SystemExit):
        arena(monkeypatch, "train", "--data", "rows")
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "rows/train.csv, line 5, prompt" in shown
    assert not (tmp_path / "runs").exists()
