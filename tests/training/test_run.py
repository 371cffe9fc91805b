"""A trained judge is saved whatever else fails; what would fail later is refused before training."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.tracking
import numpy as np
import pandas as pd
import pytest
from accelerate.utils import LoggerType

from arena.config import load_recipe
from arena.inference.saved import read_judge
from arena.reporting import report
from arena.stopping import Stopped
from arena.storage.mirror import Mirror
from arena.tasks import preference
from arena.tasks.preference import COLUMNS
from arena.tasks.preference import COLUMNS as CLASSES
from arena.training import run as run_module
from arena.training.references import _truth
from arena.training.run import run_fold
from tests.helpers import arena, make_base, tiny_recipe, write_rows

SHORT = "train.epochs=0.3"


def fails(error: BaseException) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> Any:
        raise error

    return fail


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the package, that can be made to fail; its run holds what it was given."""
    run = SimpleNamespace(logged=[], ended=0, values=[], started=None, uploaded=None)
    run.log = lambda values, step=None: (run.logged.append(step), run.values.append(values))
    run.log_artifact = lambda path, name, type: setattr(run, "uploaded", (sorted(Path(path).iterdir()), name, type))
    run.finish = lambda: setattr(run, "ended", run.ended + 1)
    module = ModuleType("wandb")
    vars(module).update(
        run=run, init=lambda **options: (setattr(run, "started", options), run)[1], Histogram=np.array,
        config=SimpleNamespace(update=lambda *_, **__: None),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB])
    return module  # type: ignore[return-value]


def test_a_tracker_gets_every_line_and_is_ended_once_all_is_saved(
    gemma2: Path, tmp_path: Path, wandb: SimpleNamespace
) -> None:
    metrics = tmp_path / "runs/demo/fold0/metrics.json"
    end, saved = wandb.run.finish, []
    wandb.run.finish = lambda: (saved.append(metrics.is_file()), end())
    run_fold(tiny_recipe(tmp_path, gemma2, SHORT, "train.track=wandb"), 0, tmp_path / "runs")
    lines = [json.loads(line) for line in (metrics.parent / "log.jsonl").read_text().splitlines()]
    assert wandb.run.logged == [line["step"] for line in lines] and len(lines) > 1
    assert wandb.run.ended == 1 and saved == [True]


def test_a_tracker_gets_what_the_settings_say(gemma2: Path, tmp_path: Path, wandb: SimpleNamespace) -> None:
    """Its name, tags and project; some steps and all evaluations; histograms of what is trained; and the judge."""
    settings = ("every=2", "project=sst2", "name=first", "tags=[a, b]", "watch=all", "upload_model=true")
    options = ["train.track=wandb", "train.max_steps=5", *(f"train.tracking.{each}" for each in settings)]
    run_fold(tiny_recipe(tmp_path, gemma2, *options), 0, tmp_path / "runs")
    run, folder = wandb.run, tmp_path / "runs/demo/fold0"
    assert run.started == {"project": "sst2", "name": "first", "tags": ["a", "b"]}
    assert run.logged == [2, 3, 4, 5] and ["loss" in each for each in run.values] == [True, False, True, False]
    assert len((folder / "log.jsonl").read_text().splitlines()) == 7  # the file has every step
    gradients = {key: each for key, each in run.values[2].items() if key.startswith("gradients/")}
    parameters = {key: each for key, each in run.values[2].items() if key.startswith("parameters/")}
    assert len(gradients) == len(parameters) > 10 and all(key.endswith("weight") for key in parameters)
    assert not any("layers" in key and "lora" not in key for key in parameters)  # no frozen weight
    norm = np.sqrt(sum(float((each.astype(np.float64) ** 2).sum()) for each in gradients.values()))
    assert norm == pytest.approx(min(1.0, run.values[2]["grad_norm"]), rel=1e-4)  # of the whole step, as it was taken
    assert run.uploaded == (sorted((folder / "model").iterdir()), "demo-fold0", "model")
    assert not any(key.startswith(("gradients/", "parameters/")) for key in run.values[1])


def test_a_tracker_gets_nothing_that_was_not_asked_for(gemma2: Path, tmp_path: Path, wandb: SimpleNamespace) -> None:
    run_fold(tiny_recipe(tmp_path, gemma2, SHORT, "train.track=wandb"), 0, tmp_path / "runs")
    assert wandb.run.started == {"project": "arena"} and wandb.run.uploaded is None
    assert not any("/" in key for values in wandb.run.values for key in values)


@pytest.mark.parametrize(("track", "taken"), [("trackio", {"name=x"}), ("tensorboard", set()), ("none", None)])
def test_settings_that_a_tracker_has_no_place_for_are_refused(track: str, taken: set[str] | None) -> None:
    """Without a tracker they wait for one."""
    for each in ("name=x", "tags=[a]", "watch=gradients", "upload_model=true"):
        settings = [f"train.track={track}", f"train.tracking.{each}", "train.tracking.every=9"]
        if taken is None or each in taken:
            load_recipe("demo", settings)
        else:
            with pytest.raises(ValueError, match=f"track={track} has no place for tracking.{each.split('=')[0]}"):
                load_recipe("demo", settings)


def test_a_run_that_is_stopped_ends_its_tracker(gemma2: Path, tmp_path: Path, wandb: SimpleNamespace) -> None:
    recipe = tiny_recipe(tmp_path, gemma2, "train.track=wandb", "train.max_seconds=0.001")
    with pytest.raises(Stopped):
        run_fold(recipe, 0, tmp_path / "runs")
    assert wandb.run.ended == 1


def test_a_tracker_without_a_key_is_refused_and_what_was_there_stays(
    gemma2: Path, tmp_path: Path, wandb: SimpleNamespace
) -> None:
    first = run_fold(tiny_recipe(tmp_path, gemma2, SHORT), 0, tmp_path / "runs")
    wandb.init = fails(RuntimeError("api_key not configured (no-tty)"))
    with pytest.raises(ValueError, match=r"train\.track=wandb cannot start \(RuntimeError: api_key not configured"):
        run_fold(tiny_recipe(tmp_path, gemma2, SHORT, "train.track=wandb", "seed=1"), 0, tmp_path / "runs")
    assert json.loads((tmp_path / "runs/demo/fold0/metrics.json").read_text()) == first


def test_the_judge_is_saved_even_if_everything_after_it_fails(
    gemma2: Path, tmp_path: Path, wandb: SimpleNamespace, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = tiny_recipe(tmp_path, gemma2, SHORT, "train.track=wandb", f"train.mirror={tmp_path / 'away'}")
    (Path(recipe.data.path) / "truth.csv").write_bytes("id,é\n1,2\n".encode("latin-1"))
    wandb.run.log = fails(ConnectionError("unreachable"))
    monkeypatch.setattr(preference, "fit_baseline", fails(MemoryError("sparse matrix")))
    monkeypatch.setattr(Mirror, "push_files", fails(RuntimeError("can't start new thread")))
    monkeypatch.setattr(Mirror, "close", fails(RuntimeError("no answer")))
    metrics = run_fold(recipe, 0, tmp_path / "runs")
    folder = tmp_path / "runs/demo/fold0"
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["baseline_log_loss"] is metrics["bayes_log_loss"] is None and metrics["log_loss"] > 0
    assert read_judge(folder / "model") and len(pd.read_csv(folder / "oof.csv")) == metrics["n_eval"]
    shown = capsys.readouterr().out
    for words in (
        "the tracker failed (ConnectionError: unreachable)", "baseline failed (MemoryError: sparse matrix)",
        "truth.csv", "away failed (RuntimeError: can't start new thread)", "mirror", "no answer",
    ):  # fmt: skip
        assert shown.count(words) >= 1, words
    assert shown.count("the tracker failed") == 1  # and not at every step
    assert wandb.run.ended == 0


@pytest.mark.parametrize("every", [0, 1])
def test_a_finished_run_is_mirrored_with_all_its_files(gemma2: Path, tmp_path: Path, every: int) -> None:
    """Also without predictions of a last step that was not the best."""
    recipe = tiny_recipe(tmp_path, gemma2, SHORT, f"train.mirror={tmp_path / 'away'}", f"train.evaluate_every={every}")
    run_fold(recipe, 0, tmp_path / "runs")
    folder = tmp_path / "runs/demo/fold0"
    (away,) = (tmp_path / "away/demo/fold0").iterdir()
    for name in ("metrics.json", "oof.csv", "recipe.yaml", "log.jsonl"):
        assert (away / "files" / name).read_bytes() == (folder / name).read_bytes()
    assert (away / "files/oof-last.csv").is_file() == (folder / "oof-last.csv").is_file()
    assert "scores" in json.loads((away / "files/metrics.json").read_text())


def test_the_result_stands_before_what_it_is_compared_with(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, gemma2, SHORT)
    monkeypatch.setattr(preference, "fit_baseline", fails(SystemExit(137)))  # as when memory runs out
    with pytest.raises(SystemExit):
        run_fold(recipe, 0, tmp_path / "runs")
    monkeypatch.setattr(run_module, "save_judge", fails(AssertionError))
    metrics = run_fold(recipe, 0, tmp_path / "runs")
    assert metrics["log_loss"] > 0 and metrics["baseline_log_loss"] is None


@pytest.mark.parametrize("kind", ["none", "folder", "other columns", "other ids"])
def test_without_truth_there_is_no_floor(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "truth.csv"
    if kind == "folder":
        path.mkdir()
    elif kind != "none":
        table = pd.DataFrame({"id": ["1"], **dict.fromkeys(CLASSES, 1 / 3)})
        (table.drop(columns="id") if kind == "other columns" else table.assign(id="9")).to_csv(path, index=False)
    assert _truth(path, ["1"], COLUMNS) is None


def train(monkeypatch: pytest.MonkeyPatch, folder: Path, base: Path, *words: str) -> None:
    small = [f"model.base={base}", "prompt.max_length=128", "packing.budget=512", "data.folds=3", SHORT]
    monkeypatch.chdir(folder)
    arena(monkeypatch, "train", *small, *words)


def test_a_picture_that_fails_is_a_warning_also_of_a_finished_run_and_settings_stand_around_flags(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "rows")
    monkeypatch.setattr(report, "draw_report", fails(ValueError("no backend")))
    for _ in range(2):
        train(monkeypatch, tmp_path, gemma2, "name=mine", "--data", "rows", "train.batch_size=9")
        shown = capsys.readouterr().out
        assert (
            "warning: drawing report.png failed (ValueError: no backend); run the same command again to draw it"
            in shown
        )
        assert "written: runs/mine/fold0 (metrics.json, oof.csv, log.jsonl, model)" in shown
    assert "batch_size: 9" in (tmp_path / "runs/mine/fold0/recipe.yaml").read_text()


def test_all_that_is_written_follows_the_umask(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        write_rows(tmp_path / "rows")
        train(monkeypatch, tmp_path, gemma2, "--data", "rows", f"train.mirror={tmp_path / 'away'}")
        arena(monkeypatch, "infer")
        arena(monkeypatch, "export", "--out", "exported")
    finally:
        os.umask(before)
    found = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {"submission.csv", "exported/model.safetensors", "runs/demo/fold0/report.png"} < found.keys()
    odd = {name: oct(mode) for name, mode in found.items() if mode != (0o750 if (tmp_path / name).is_dir() else 0o640)}
    assert not odd


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 alone")
def test_a_path_that_is_not_utf8_is_refused_before_anything_is_done(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = write_rows(tmp_path / os.fsdecode(b"K\xf6ln"))
    plain = write_rows(tmp_path / "rows")
    for words in (
        ["--data", str(odd)], ["--data", str(plain), "--runs", str(odd)], [f"data.extra=[{odd}/train.csv]"],
        [f"train.mirror={odd}"], [f"data.cache={odd}"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            train(monkeypatch, tmp_path, gemma2, *words)
        shown = capsys.readouterr().out
        assert end.value.code == 2 and r"K\udcf6ln" in shown and "is not UTF-8: rename" in shown, words
    with pytest.raises(ValueError, match="is not UTF-8"):
        run_fold(tiny_recipe(tmp_path, gemma2), 0, odd)
    assert sorted(path.name for path in tmp_path.iterdir() if path != odd) == ["rows"]
    assert np.all([path.suffix == ".csv" for path in odd.iterdir()])


def test_a_base_that_mixes_rows_is_refused_before_preparing(gemma2: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(gemma2, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 127, "rope_parameters": rope}))
    with pytest.raises(ValueError, match=r"depend on the rows beside it.*: set prompt\.max_length=127"):
        run_fold(tiny_recipe(tmp_path, base, SHORT), 0, tmp_path / "runs")
    assert not list((tmp_path / "cache").glob("*"))
    run_fold(tiny_recipe(tmp_path, base, SHORT, "prompt.max_length=127"), 0, tmp_path / "runs")


def test_a_layer_that_the_base_lacks_is_refused_before_preparing(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2, "model.lora.first_layer=3")
    with pytest.raises(ValueError, match=r"model\.lora\.first_layer names layer 3, but the base has 3 layers"):
        run_fold(recipe, 0, tmp_path / "runs")
    assert not list(Path(recipe.data.cache).glob("*"))


def test_a_checkpoint_goes_with_its_base_and_its_place_is_not_saved(gemma2: Path, tmp_path: Path) -> None:
    """One of another base of the same shape is refused; a judge does not depend on where its run resumed."""
    run_fold(tiny_recipe(tmp_path, gemma2, SHORT), 0, tmp_path / "runs")
    checkpoint = next((tmp_path / "runs/demo/fold0/checkpoints").glob("step-*"))
    resume, again = (SHORT, f"train.resume={checkpoint}"), tmp_path / "again"
    with pytest.raises(ValueError, match=r"its base model is not the one that model\.base="):
        run_fold(tiny_recipe(tmp_path, make_base(tmp_path / "other", seed=1), *resume), 0, again)
    run_fold(tiny_recipe(tmp_path, gemma2, *resume), 0, again)
    shutil.rmtree(tmp_path / "runs")
    assert read_judge(again / "demo/fold0/model").recipe.train.resume == "auto"
    with pytest.raises(ValueError, match=r"train\.resume=.*: write auto, best, never, or the path of a checkpoint"):
        run_fold(tiny_recipe(tmp_path, gemma2, *resume), 0, again)
