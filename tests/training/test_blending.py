"""`arena cv`, `arena blend` and `arena infer` with a blend: from folds to a blended submission."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from arena.config import save_recipe
from arena.inference.blend import Blend, SavedBlend
from arena.inference.infer_blend import infer_blend
from arena.metrics import log_loss
from arena.tasks.preference import COLUMNS
from arena.training.comparing import compare
from arena.training.cross_validation import cross_validate
from arena.training.members import read_members
from arena.training.run import run_fold
from tests.helpers import arena, tiny_recipe
from tests.tasks.test_instruction_run import tiny, write_dolly

Shown = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cross-validated run `runs/tiny` of two folds, and its recipe."""
    folder = tmp_path_factory.mktemp("cv")
    recipe = tiny_recipe(folder, gemma2, "data.folds=2", "name=tiny", "train.evaluate_every=1")
    (folder / "recipe.yaml").write_text(save_recipe(recipe))
    cross_validate(recipe, folder / "runs")
    return folder


def test_all_rows_are_scored_by_the_fold_that_held_them_out(run: Path) -> None:
    folder = run / "runs/tiny"
    table, labels = (pd.read_csv(path, dtype={"id": str}) for path in (folder / "oof.csv", run / "rows/train.csv"))
    assert sorted(table["id"]) == sorted(labels["id"]) and set(table["fold"]) == {0, 1}
    for fold, rows in table.groupby("fold"):
        own = pd.read_csv(folder / f"fold{fold}/oof.csv", dtype={"id": str})
        assert own["id"].tolist() == rows["id"].tolist()
    joined = labels.set_index("id").loc[table["id"], list(COLUMNS)].to_numpy(float)
    written = json.loads((folder / "cv.json").read_text())
    assert written["best"]["log_loss"]["value"] == pytest.approx(log_loss(joined, table[list(COLUMNS)].to_numpy()))
    assert written["best"]["log_loss"]["rows"] == len(labels) and len(written["folds"]) == 2
    last = [folder / f"fold{fold}/oof-last.csv" for fold in range(2)]
    if not any(path.is_file() for path in last):
        assert written["last"] == written["best"]


def test_a_blend_of_a_run_a_file_and_the_baseline_is_applied_to_the_test_rows(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = pd.read_csv(run / "rows/train.csv", dtype={"id": str})
    rng = np.random.default_rng(0)
    good = 0.7 * labels[list(COLUMNS)].to_numpy(float) + 0.3 * rng.dirichlet(np.ones(3), len(labels))
    theirs = pd.DataFrame(good, columns=list(COLUMNS)).astype(np.float16).assign(id=labels["id"], other=1)
    theirs[[*reversed(COLUMNS), "other", "id"]].sample(frac=1, random_state=0).to_csv("theirs.csv", index=False)
    members = [str(run / "runs/tiny"), "theirs.csv", "baseline"]
    arena(monkeypatch, "blend", *members, "--out", "blend.json")
    shown = capsys.readouterr().out
    assert "60 rows have a label and the predictions of all members" in shown and "begins the blend" in shown
    saved = json.loads(Path("blend.json").read_text())
    assert [member["name"] for member in saved["members"]] == ["tiny", "theirs", "baseline"]
    test = pd.read_csv(run / "rows/test.csv", dtype={"id": str})
    ones = pd.DataFrame(np.full((len(test), 3), 1 / 3), columns=list(COLUMNS)).assign(id=test["id"])
    ones.to_csv("for-test.csv", index=False)
    saved |= {"weights": [0.5, 0.5, 0.5], "bias": [0.1, -0.1, 0.0]}  # all members count
    Path("blend.json").write_text(json.dumps(saved))
    with pytest.raises(SystemExit):
        arena(monkeypatch, "infer", "--recipe", "blend.json", "--data", str(run / "rows"))
    assert "theirs has no predictions of the test rows: give --predictions" in capsys.readouterr().out
    words = ["--recipe", "blend.json", "--data", str(run / "rows"), "--predictions", "theirs=for-test.csv"]
    arena(monkeypatch, "infer", *words, "--out", "blended.csv")
    arena(monkeypatch, "infer", "--recipe", str(run / "runs/tiny"), "--data", str(run / "rows"), "--out", "alone.csv")
    blended, alone = (pd.read_csv(name)[list(COLUMNS)].to_numpy() for name in ("blended.csv", "alone.csv"))
    assert np.allclose(blended.sum(axis=1), 1) and not np.allclose(blended, alone)
    assert not list(tmp_path.glob("*.parts"))


def test_files_and_labels_without_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.ones(3), 400)
    labels = np.eye(3)[[rng.choice(3, p=row) for row in truth]]
    for name, values in (("labels", labels), ("sharp", truth**2 / (truth**2).sum(1, keepdims=True))):
        pd.DataFrame(values, columns=list(COLUMNS)).assign(id=range(400)).to_csv(f"{name}.csv", index=False)
    arena(monkeypatch, "blend", "sharp.csv", "--labels", "labels.csv")
    saved = json.loads(Path("blend.json").read_text())
    assert saved["weights"][0] == pytest.approx(0.5, abs=0.1)
    assert "+ temperature" in capsys.readouterr().out
    for words, message in (
        (["baseline", "--labels", "labels.csv"], "the baseline is fitted on texts"),
        (["sharp.csv"], "name the file of labelled rows with --labels"),
        (["sharp.csv", "sharp.csv", "--labels", "labels.csv"], "sharp names two members"),
        (["no.csv", "--labels", "labels.csv"], "there is no file"),
        ([], "name the members"),
    ):
        with pytest.raises(SystemExit):
            arena(monkeypatch, "blend", *words)
        assert message in " ".join(capsys.readouterr().out.split())


def test_two_members_are_compared(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown) -> None:
    monkeypatch.chdir(tmp_path)
    oof = pd.read_csv(run / "runs/tiny/oof.csv", dtype={"id": str})
    oof.assign(**dict.fromkeys(COLUMNS, 1 / 3)).to_csv("even.csv", index=False)
    found = compare([str(run / "runs/tiny"), "even.csv"], None, tmp_path)
    one, other = found.scores["log_loss"]
    assert other.value == pytest.approx(np.log(3)) and found.rows == 60
    assert found.differences["log_loss"].value == pytest.approx(one.value - other.value)
    mean = sum(each.value * each.rows for name, each in found.slices.items() if name[0] == "turns") / found.rows
    assert mean == pytest.approx(found.differences["log_loss"].value)
    arena(monkeypatch, "compare", run / "runs/tiny", "even.csv")
    assert "differences: tiny minus even" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        arena(monkeypatch, "compare", "even.csv")
    assert "name two members" in capsys.readouterr().out


def test_language_models_are_cross_validated_too(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny(tmp_path, gemma2, write_dolly(tmp_path / "rows"), "train.max_steps=2")
    found = cross_validate(recipe, tmp_path / "runs")
    sums = pd.read_csv(tmp_path / "runs/tiny/oof.csv")[["nll", "tokens"]].sum()
    assert found.best["log_loss"].value == pytest.approx(sums["nll"] / sums["tokens"])
    assert found.best["perplexity"].value == pytest.approx(np.exp(sums["nll"] / sums["tokens"]))


def test_a_fold_that_is_named_is_one_member_and_a_run_all_of_its_folds(run: Path) -> None:
    whole, one = (read_members([str(run / f"runs/tiny{name}")], None, run) for name in ("", "/fold1"))
    assert (len(whole.labels), whole.members[0].path) == (60, str(run / "runs/tiny"))
    assert len(one.labels) == len(pd.read_csv(run / "runs/tiny/fold1/oof.csv")) < 60
    assert Path(one.members[0].path).name == "fold1"


def test_runs_of_a_blend_may_have_other_data_than_each_other(run: Path, gemma2: Path, tmp_path: Path) -> None:
    """Whatever `arena blend` takes, `arena infer` applies."""
    other = tiny_recipe(run, gemma2, "data.folds=2", "data.fold_seed=1", "name=other", "train.max_steps=1")
    run_fold(other, 0, tmp_path / "runs")
    members = read_members([str(run / "runs/tiny"), str(tmp_path / "runs/other")], None, run).members
    blend = SavedBlend("preference", members, Blend("log", (0.5, 0.5), 1.0, (0.0, 0.0, 0.0)), {})
    infer_blend(blend, str(run / "rows"), tmp_path / "blended.csv", ())
    assert len(pd.read_csv(tmp_path / "blended.csv")) == 12


@pytest.mark.slow
def test_folds_side_by_side_give_the_same(run: Path, gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(run, gemma2, "data.folds=2", "name=tiny", "train.evaluate_every=1")
    cross_validate(recipe, tmp_path / "runs", at_once=2)
    for name in ("oof.csv", "fold1/oof.csv"):
        assert (tmp_path / "runs/tiny" / name).read_bytes() == (run / "runs/tiny" / name).read_bytes()
    assert "held-out rows" in (tmp_path / "runs/tiny/fold0.log").read_text()
