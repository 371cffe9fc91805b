"""Files in, submission out: the whole path on a tiny model, and the notebook."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from arena.config import load_recipe
from arena.inference.kinds import PSEUDO_COUNT
from arena.inference.saved import read_judge
from arena.metrics import log_loss
from arena.tasks.preference import COLUMNS as CLASSES
from arena.training.run import run_fold
from tests.helpers import SHARED, arena, make_base, needs_shared, tiny, tiny_recipe, write_rows

ROOT = Path(__file__).parents[1]
METRICS = {
    "log_loss", "accuracy", "ece", "prior_log_loss", "bayes_log_loss", "n_eval", "n_train", "steps", "micro_batches",
    "fill_rate", "tokens", "unique_tokens", "tokens_per_second", "train_seconds", "peak_memory_bytes",
    "trainable_parameters", "data_wait_seconds", "device", "attention_backend", "baseline_log_loss",
}  # fmt: skip


def test_two_folds_and_a_submission(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows")
    for fold in ("0", "1"):
        arena(monkeypatch, "train", "--fold", fold, "--data", "rows", *tiny(gemma2))
    run = tmp_path / "runs/demo/fold0"
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) >= METRICS
    assert metrics["bayes_log_loss"] is None
    oof = pd.read_csv(run / "oof.csv", dtype={"id": str})
    labels = oof[[f"label_{name}" for name in CLASSES]].to_numpy()
    assert log_loss(labels, oof[list(CLASSES)].to_numpy()) == pytest.approx(metrics["log_loss"])
    other = pd.read_csv(tmp_path / "runs/demo/fold1/oof.csv", dtype={"id": str})
    assert not set(oof["id"]) & set(other["id"])
    assert {path.suffix for path in (run / "model").iterdir()} == {".json", ".safetensors"}
    arena(monkeypatch, "infer", "--data", "rows")
    submission = pd.read_csv("submission.csv", dtype={"id": str})
    test = pd.read_csv("rows/test.csv", dtype={"id": str})
    assert submission["id"].tolist() == test["id"].tolist()
    assert list(submission.columns) == ["id", *CLASSES]
    alone = []
    for fold in (0, 1):
        other_fold = tmp_path / f"runs/demo/fold{1 - fold}"
        other_fold.rename(tmp_path / "away")
        arena(monkeypatch, "infer", "--data", "rows", "--out", f"{fold}.csv")
        (tmp_path / "away").rename(other_fold)
        alone.append(pd.read_csv(f"{fold}.csv")[list(CLASSES)].to_numpy())
    np.testing.assert_allclose(submission[list(CLASSES)].to_numpy(), (alone[0] + alone[1]) / 2, atol=1e-7)


def test_a_finished_run_is_left_alone_and_another_archives_it(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2)
    first = run_fold(recipe, 0, tmp_path / "runs")
    assert run_fold(recipe, 0, tmp_path / "runs") == first  # nothing is trained again, also not its seconds
    again = run_fold(recipe, 0, tmp_path / "runs", fresh=True)
    assert again["log_loss"] == first["log_loss"]  # the same seed gives the same numbers
    run_fold(tiny_recipe(tmp_path, gemma2, "train.batch_size=9"), 0, tmp_path / "runs")
    assert len(list((tmp_path / "runs/demo/earlier").iterdir())) == 2


def test_a_run_is_named_and_gets_another_fold_with_its_own_settings(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name is enough after `name=mine`: to train on, to look at a batch and to judge."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows", n=30)
    arena(monkeypatch, "train", "--data", "rows", "name=mine", *tiny(gemma2))
    arena(monkeypatch, "train", "--recipe", "mine", "--fold", "1")
    first, second = (load_recipe(f"runs/mine/fold{fold}/recipe.yaml") for fold in (0, 1))
    assert first == second and first.name == "mine" and first.data.path == "rows"
    arena(monkeypatch, "inspect", "--recipe", "mine")
    arena(monkeypatch, "infer", "--recipe", "mine")
    assert "rows from 2 folds" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        arena(monkeypatch, "train", "--recipe", "mien")
    assert "there is no recipe 'mien'" in capsys.readouterr().out
    assert [path.name for path in Path("runs").glob("*/")] == ["mine"]


def test_an_unfinished_run_of_another_recipe_is_not_touched(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2)
    run_fold(recipe, 0, tmp_path / "runs")
    (tmp_path / "runs/demo/fold0/metrics.json").unlink()
    with pytest.raises(ValueError, match=r"unfinished run.*train.batch_size is 8 there, 9 here\..*name=mine.*--fresh"):
        run_fold(tiny_recipe(tmp_path, gemma2, "train.batch_size=9"), 0, tmp_path / "runs")
    assert run_fold(recipe, 0, tmp_path / "runs")["steps"] == 5  # its own recipe goes on with it


def test_rows_that_cannot_be_judged_get_the_mean_label_of_such_rows_and_the_prior(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kind of odd row of the competition's files, in training and in the test file."""
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows")
    odd = [
        ("[null]", "[null]", "[null]"), ("[]", "[]", "[]"), ('["x"]', '[""]', '[" "]'), ('["x"]', '["null"]', "[null]"),
        ('["x","y"]', '["a"]', '["b","c"]'),
        ('["\\ud83d"]', '["a\\ud83d"]', '["<end_of_turn>"]'), ('["x"]', '["a"]', '["a"]'),
    ]  # fmt: skip
    table = pd.DataFrame(odd, columns=["prompt", "response_a", "response_b"])
    table.insert(0, "id", [f"odd{at}" for at in range(len(odd))])
    for name, labels in (("train", (0, 0, 1)), ("test", None)):
        known = pd.read_csv(rows / f"{name}.csv", dtype=str)
        extra = table if labels is None else table.assign(**dict(zip(CLASSES, labels, strict=True)))
        pd.concat([known, extra]).to_csv(rows / f"{name}.csv", index=False)
    (rows / "sample_submission.csv").unlink()
    arena(monkeypatch, "train", "--data", "rows", *tiny(gemma2))
    arena(monkeypatch, "infer", "--data", "rows")
    assert "3 rows have no response to judge" in capsys.readouterr().out
    submission = pd.read_csv("submission.csv", dtype={"id": str}).set_index("id")
    assert len(submission) == 12 + len(odd)
    judge = read_judge(Path("runs/demo/fold0/model"))
    (empty,) = [kind for kind in judge.kinds if kind.name == "both empty"]
    assert empty.mean == (0, 0, 1) and empty.rows in (2, 3)  # one may be held out
    table = json.loads(Path("runs/demo/fold0/metrics.json").read_text())["kinds"]
    assert table["both empty"]["train_rows"] == empty.rows and table["both empty"]["taken"]
    smoothed = (empty.rows * np.array(empty.mean) + PSEUDO_COUNT * judge.prior) / (empty.rows + PSEUDO_COUNT)
    for at in (0, 1, 2):
        np.testing.assert_allclose(submission.loc[f"odd{at}"], smoothed, atol=1e-8)
    assert np.abs(submission.loc["odd3"].to_numpy() - judge.prior).max() > 1e-6


def test_extra_rows_are_trained_on_but_never_scored(gemma2: Path, tmp_path: Path) -> None:
    """Repeats of known rows and rows with a held-out prompt are left out."""
    recipe = tiny_recipe(tmp_path, gemma2)
    plain = run_fold(recipe, 0, tmp_path / "a")
    new = write_rows(tmp_path / "new", n=20, seed=5) / "train.csv"
    table = pd.read_csv(new, dtype=str)
    table["id"] = "new" + table["id"]
    table["prompt"] = table["prompt"].str.replace("which is better", "and which of these")
    known = pd.read_csv(tmp_path / "rows/train.csv", dtype=str).assign(id=lambda rows: "again" + rows["id"])
    pd.concat([table, known]).to_csv(new, index=False)
    more = run_fold(tiny_recipe(tmp_path, gemma2, f"data.extra=[{new}]"), 0, tmp_path / "b")
    assert more["n_train"] == plain["n_train"] + 20
    assert more["n_eval"] == plain["n_eval"]


@needs_shared
def test_real_rows_run_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The competition-shaped real files, a few steps on a tiny model: 285 rows out, in order."""
    monkeypatch.chdir(tmp_path)
    base = make_base(tmp_path / "base", num_hidden_layers=1)
    data = str(SHARED / "data/autoj")
    words = [f"model.base={base}", "prompt.max_length=256", "train.epochs=0.1", "judge.swap=false", "train.swap=never"]
    arena(monkeypatch, "train", "--data", data, *words)
    arena(monkeypatch, "infer", "--data", data)
    submission = pd.read_csv("submission.csv", dtype={"id": str})
    assert submission["id"].tolist() == pd.read_csv(f"{data}/test.csv", dtype=str)["id"].tolist()
    assert len(submission) == 285


def test_the_floor_is_that_of_the_held_out_rows(gemma2: Path, tmp_path: Path) -> None:
    """`truth.csv` is read by id, in any order; one that lacks rows, or is something else, is no floor."""
    recipe = tiny_recipe(tmp_path, gemma2)
    rows = Path(recipe.data.path)
    ids = pd.read_csv(rows / "train.csv", dtype={"id": str})["id"]
    truth = pd.DataFrame(np.random.default_rng(0).dirichlet([1, 1, 1], len(ids)), columns=list(CLASSES))
    truth.insert(0, "id", ids)
    truth.sample(frac=1, random_state=1).to_csv(rows / "truth.csv", index=False)
    metrics = run_fold(recipe, 0, tmp_path / "runs")
    oof = pd.read_csv(tmp_path / "runs/demo/fold0/oof.csv", dtype={"id": str})
    best = truth.set_index("id").loc[oof["id"], list(CLASSES)].to_numpy()
    labels = oof[[f"label_{name}" for name in CLASSES]].to_numpy()
    assert metrics["bayes_log_loss"] == pytest.approx(log_loss(labels, best))
    for other in (truth.head(3), pd.DataFrame({"anything": [1]})):
        other.to_csv(rows / "truth.csv", index=False)
        assert run_fold(recipe, 0, tmp_path / "runs", fresh=True)["bayes_log_loss"] is None


def test_a_baseline_that_cannot_be_fitted_costs_nothing(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2)
    train = Path(recipe.data.path) / "train.csv"
    pd.read_csv(train, dtype=str).assign(response_a='["!"]', response_b='["?"]').to_csv(train, index=False)
    metrics = run_fold(recipe, 0, tmp_path / "runs")
    assert metrics["baseline_log_loss"] is None and metrics["log_loss"] > 0


def test_a_run_that_cannot_be_trained_does_not_replace_the_earlier_one(gemma2: Path, tmp_path: Path) -> None:
    first = run_fold(tiny_recipe(tmp_path, gemma2), 0, tmp_path / "runs")
    with pytest.raises(ValueError, match=r"model\.lora\.targets"):
        run_fold(tiny_recipe(tmp_path, gemma2, "model.lora.targets=[nope]"), 0, tmp_path / "runs")
    assert json.loads((tmp_path / "runs/demo/fold0/metrics.json").read_text()) == first


def test_another_base_in_the_same_place_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows")
    base = make_base(tmp_path / "base")
    arena(monkeypatch, "train", "--data", "rows", *tiny(base))
    make_base(tmp_path / "base", seed=1)
    with pytest.raises(SystemExit):
        arena(monkeypatch, "infer")
    assert "was not trained on the base that" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        arena(monkeypatch, "infer", f"model.base={base}")  # naming it does not make it another
    assert "was not trained on the base that" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        arena(monkeypatch, "export", "--out", "plain")
    assert "was not trained on the base that" in capsys.readouterr().out and not Path("plain").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "folder"], "is a folder: name the file"),
        (["train.lr=3"], "does not apply to a trained judge"),
        (["--data", "other"], "differ in 1 ids"),
    ],
)
def test_infer_reports_mistakes_before_it_judges(
    words: list[str], message: str, gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows")
    other = write_rows(tmp_path / "other") / "sample_submission.csv"
    other.write_text("\n".join(other.read_text().splitlines()[:-1]))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/precious").touch()
    arena(monkeypatch, "train", "--data", "rows", *tiny(gemma2), "train.epochs=0.2")
    with pytest.raises(SystemExit):
        arena(monkeypatch, "infer", *words)
    shown = capsys.readouterr().out
    assert message in shown.replace("\n", " ") and "judging" not in shown.split(message)[0].split("written")[-1]
    assert (tmp_path / "folder/precious").exists()


def test_notebook_runs(tmp_path: Path) -> None:
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(ROOT / "notebooks/collated_batches.py")
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "verdict is: [[" in outputs and "fill rate" in outputs


def test_inspect_prints_and_draws(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows")
    arena(monkeypatch, "inspect", "--data", "rows", *tiny(gemma2))
    shown = capsys.readouterr().out
    assert "cu_seqlens_q [0, " in shown and "fill rate" in shown and "[[" in shown
    assert Path("runs/attention.png").read_bytes().startswith(b"\x89PNG")
