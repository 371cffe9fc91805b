"""Which judge a name, a recipe or a folder means: exactly that one, or an error that says what to do."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
from pathlib import Path

import pytest

from arena.config import load_recipe, save_recipe
from arena.inference.find import find_model, find_models, recipe_of

RUNS = Path("runs")


@functools.cache
def recipe_text(name: str) -> str:
    return save_recipe(load_recipe("demo", [f"name={name}"]))


def fold(run: str, folder: str, *, done: bool = True, judge: bool = True) -> Path:
    """A fold's folder as training leaves it, its files empty."""
    place = RUNS / run / folder
    (place / "model").mkdir(parents=True)
    (place / "recipe.yaml").write_text(recipe_text(run))
    (place / "run.json").write_text("{}")
    if judge:
        (place / "model/judge.json").write_text("{}")
    if done:
        (place / "metrics.json").write_text("{}")
    return place


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """demo: folds 0, 2 and 10, fold 3 unfinished, and an earlier fold 0; mine: fold 1; open: fold 0 unfinished."""
    monkeypatch.chdir(tmp_path)
    for folder in ("fold0", "fold2", "fold10", "earlier/fold0-2026-01-02"):
        fold("demo", folder)
    fold("demo", "fold3", done=False)
    fold("mine", "fold1")
    fold("open", "fold0", done=False, judge=False)
    (RUNS / "bench/demo").mkdir(parents=True)
    Path("recipe-of-mine.yaml").write_text(recipe_text("mine"))
    shutil.copytree(RUNS / "mine/fold1/model", "elsewhere/judge")
    shutil.copytree(RUNS / "mine", "moved/run")


def found(name: str, *overrides: str, fold: int | None = None) -> list[str]:
    return [str(model) for model in find_models(name, RUNS, overrides, fold)]


MINE = ["runs/mine/fold1/model"]
DEMO = [f"runs/demo/fold{number}/model" for number in (0, 2, 10)]


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("demo", DEMO),
        ("runs/demo", DEMO),
        ("runs/demo/fold2", DEMO[1:2]),
        ("runs/demo/fold2/model", DEMO[1:2]),
        ("runs/demo/fold2/recipe.yaml", DEMO[1:2]),
        ("runs/demo/earlier/fold0-2026-01-02", ["runs/demo/earlier/fold0-2026-01-02/model"]),
        ("runs/demo/earlier/fold0-2026-01-02/recipe.yaml", ["runs/demo/earlier/fold0-2026-01-02/model"]),
        ("runs/demo/earlier/fold0-2026-01-02/model", ["runs/demo/earlier/fold0-2026-01-02/model"]),
        ("mine", ["runs/mine/fold1/model"]),
        ("recipe-of-mine.yaml", ["runs/mine/fold1/model"]),
        ("elsewhere/judge", ["elsewhere/judge"]),
        ("moved/run", ["moved/run/fold1/model"]),
        ("moved/run/fold1/recipe.yaml", ["moved/run/fold1/model"]),
    ],
)
def test_what_each_name_means(name: str, models: list[str], tmp_path: Path) -> None:
    assert found(name) == models
    if Path(name).exists():
        absolute = str(tmp_path / name)
        if not name.endswith("of-mine.yaml"):
            assert found(absolute) == [str(tmp_path / model) for model in models]


def test_a_name_among_the_settings_means_that_run() -> None:
    assert found("demo", "name=mine") == found("gemma-2-9b", "name=mine") == ["runs/mine/fold1/model"]
    assert found("recipe-of-mine.yaml", "name=demo") == DEMO


def test_a_recipe_s_name_means_its_run_also_where_a_folder_is_called_so() -> None:
    """Which runs they are in and which is meant would be ignored otherwise; such a folder is named with a path."""
    shutil.copytree(RUNS / "demo", "demo")
    assert found("demo") == DEMO and found("demo", "name=mine") == found("demo", " name = mine") == MINE
    assert found("./demo") == [f"demo/fold{number}/model" for number in (0, 2, 10)]


def test_a_folder_that_holds_no_judge_does_not_hide_a_run() -> None:
    Path("demo").mkdir()
    Path("mine").mkdir()
    assert found("demo") == DEMO and found("mine") == ["runs/mine/fold1/model"]


def test_symbolic_links_may_be_named() -> None:
    Path("link").symlink_to("runs/demo/fold2")
    Path("away").mkdir()
    (RUNS / "mine").rename("away/mine")
    (RUNS / "mine").symlink_to(Path("away/mine").absolute())
    assert found("link") == ["link/model"]
    assert found("mine") == found("runs/mine") == ["runs/mine/fold1/model"]


def test_an_unfinished_fold_beside_finished_ones_is_skipped_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    found("demo")
    assert capsys.readouterr().out == "runs/demo/fold3 is not finished and is not used\n"
    found("mine")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "overrides", "fold", "message"),
    [
        ("runs/demo/fold3", [], None, r"is not finished: resume it with `\S*arena train --fold 3 --recipe runs/demo/f"),
        ("runs/demo/fold3/recipe.yaml", [], None, r"fold3 is not finished: resume it"),
        ("demo", [], 3, r"fold3 is not finished: resume it"),
        ("open", [], None, r"no finished fold under runs/open: resume it with `\S*arena train --fold 0 --recipe"),
        ("demo", [], 4, r"runs/demo has no fold 4: it has 0, 2, 3, 10"),
        ("gemma-2-9b", [], None, r"fold under runs/gemma-2-9b: train one with `\S*arena train --recipe gemma-2-9b`"),
        ("demo", ["name=new"], None, r"under runs/new: train one with `\S*arena train --recipe demo name=new`"),
        ("demo", ["name=../mine"], None, r"recipe demo: name"),
        ("runs/demo", ["name=mine"], None, r"name=mine names another one"),
        ("runs/demo/fold2/recipe.yaml", ["name=demo"], None, r"name=demo names another one"),
        ("elsewhere/judge", ["name=mine"], None, r"name=mine names another one"),
        ("mine", ["name=demo"], None, r"name=demo names another one"),
        ("runs/demo/fold2", [], 0, r"fold2 is one judge, but --fold 0 asks for another"),
        ("runs/demo/fold2/model", [], 0, r"is one judge, but --fold 0 asks for another"),
        ("elsewhere/judge", [], 0, r"is one judge, but --fold 0 asks for another"),
        ("elsewhere", [], None, r"elsewhere is not a judge: name a run, a fold"),
        ("runs/demo/earlier", [], None, r"earlier is not a judge"),
        ("mien", [], None, r"no run, recipe or folder 'mien': name a run in runs \(demo, mine, open\), a recipe"),
        ("bench", [], None, r"no run, recipe or folder 'bench'"),
        ("../mine", [], None, r"no run, recipe or folder"),
    ],
)  # fmt: skip
def test_names_that_refer_to_nothing_are_refused(
    name: str, overrides: list[str], fold: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_models(name, RUNS, overrides, fold)


def test_the_fold_of_a_single_judge_may_be_named() -> None:
    assert found("runs/demo/fold2", fold=2) == found("runs/demo/fold2/model", fold=2) == DEMO[1:2]
    assert found("runs/demo/earlier/fold0-2026-01-02", fold=0) == ["runs/demo/earlier/fold0-2026-01-02/model"]
    assert found("demo", fold=10) == DEMO[2:]


def test_the_fold_must_be_named_if_there_are_several() -> None:
    assert str(find_model("mine", RUNS)) == "runs/mine/fold1/model"
    assert str(find_model("demo", RUNS, fold=2)) == DEMO[1]
    with pytest.raises(ValueError, match=r"runs/demo has the finished folds 0, 2, 10: name one with --fold"):
        find_model("demo", RUNS)


def test_the_hint_resumes_the_fold_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for runs elsewhere and from within a run; a fold that was moved is not resumed by any command."""

    def hint(name: str) -> str:
        with pytest.raises(ValueError, match="not finished") as caught:
            find_models(name, RUNS)
        return str(caught.value)

    def place(words: list[str]) -> Path:
        """Where `arena train` with these words works."""
        options = dict(zip(words[2::2], words[3::2], strict=True))
        name = load_recipe(options["--recipe"]).name
        return (Path(options.get("--runs", "runs")) / name / f"fold{options['--fold']}").resolve()

    shutil.copytree(RUNS / "demo", "other runs/demo")
    monkeypatch.chdir(tmp_path)
    for where, name in ((".", "runs/demo/fold3"), (".", "other runs/demo/fold3"), ("runs/demo", "fold3")):
        monkeypatch.chdir(tmp_path / where)
        command = re.search("`(.*)`", hint(name))
        assert command is not None
        assert place(shlex.split(command[1])) == Path(name).resolve()
    monkeypatch.chdir(tmp_path)
    fold("demo", "earlier/fold3-2026", done=False)
    shutil.copytree("runs/demo/fold3", "moved/fold3")
    for name in ("runs/demo/earlier/fold3-2026", "moved/fold3"):
        assert "only be resumed in its original place: move it back" in hint(name)


def test_the_models_alone_are_a_run_too() -> None:
    """Copied without the files of their training; a fold that is being trained has some of those."""
    for number in (0, 2):
        shutil.copytree(RUNS / f"demo/fold{number}/model", f"copied/fold{number}/model")
    assert found("copied") == ["copied/fold0/model", "copied/fold2/model"]
    assert found("copied/fold2") == found("copied", fold=2) == ["copied/fold2/model"]
    Path("copied/fold0/run.json").write_text("{}")
    assert found("copied") == ["copied/fold2/model"]


def test_a_run_is_trained_on_with_its_own_recipe() -> None:
    assert recipe_of("mine", RUNS) == recipe_of("runs/mine", RUNS) == "runs/mine/fold1/recipe.yaml"
    for name in ("demo", "gemma-2-9b", "recipe-of-mine.yaml", "nope", "bench", "runs/mine/fold1/recipe.yaml"):
        expected = "runs/mine/fold1/recipe.yaml" if name.startswith("runs") else name
        assert recipe_of(name, RUNS) == expected
    with pytest.raises(ValueError, match=r"moved/run has a run called mine: rename its folder to mine, or give"):
        recipe_of("moved/run", RUNS)
