"""Held-out rows in a file of their own, and data sets of the hub: all of the training file is trained on."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from arena.config import change, load_recipe
from arena.data.files import data_file
from arena.data.hub import is_hub_name
from arena.data.prepare import FoldData, prepare_fold
from arena.inference.infer import infer
from arena.model.backbone import load_tokenizer
from arena.settings import Recipe
from arena.tasks import task_of
from arena.training.run import run_fold
from arena.training.run_directory import recipe_fingerprint
from tests.helpers import tiny_recipe, write_rows


@pytest.fixture
def recipe(gemma2: Path, tmp_path: Path) -> Recipe:
    """60 rows to train on, and 12 others, of which two have prompts of the training file in capitals."""
    made = tiny_recipe(tmp_path, gemma2)
    dev = pd.read_csv(write_rows(tmp_path / "more", n=12, seed=1) / "train.csv", dtype=str)
    dev["prompt"] = [f'["another {at}?"]' for at in range(10)] + ['["WHICH is better 3?"]', '["which is better 40?"]']
    dev.to_csv(tmp_path / "rows/dev.csv", index=False)
    return change(made, ["data.validation=dev"])


def prepare(recipe: Recipe, fold: int = 0) -> FoldData:
    return prepare_fold(recipe, task_of(recipe), fold, load_tokenizer(recipe.model.base))


def test_all_other_rows_are_trained_on(recipe: Recipe) -> None:
    data = prepare(recipe)
    assert data.train_rows.tolist() == [row for row in range(60) if row not in (3, 40)]
    assert data.eval_rows.tolist() == list(range(60, 72))
    assert data.notes == ["2 of 12 held-out rows have a prompt of the training file, whose 2 rows with it are omitted"]
    assert [data.ids[row] for row in data.eval_rows] == data.held_out.ids == [str(at) for at in range(12)]
    assert len(data.store) == 2 * 72
    plain = prepare(change(recipe, ["data.validation=null"]))
    np.testing.assert_array_equal(data.labels[:60], plain.labels)
    np.testing.assert_allclose(data.prior, data.labels[data.train_rows].mean(axis=0))
    groups = data.rows.groups()
    assert not {groups[row] for row in data.train_rows} & {groups[row] for row in data.eval_rows}


def test_the_file_is_found_by_its_path_too(recipe: Recipe, tmp_path: Path) -> None:
    by_path = change(
        recipe, [f"data.validation={tmp_path / 'rows/dev.csv'}", f"data.path={tmp_path / 'rows/train.csv'}"]
    )
    assert prepare(by_path).fingerprint == prepare(recipe).fingerprint
    with pytest.raises(ValueError, match=r"data\.validation: there is no file dev; give its path"):
        prepare(change(by_path, ["data.validation=dev"]))
    with pytest.raises(
        ValueError, match=r"exactly one of nothing\.csv, nothing\.tsv.*; data\.validation is nothing: name"
    ):
        prepare(change(recipe, ["data.validation=nothing"]))


def test_there_is_only_fold_0(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"there is no fold 1: with data\.validation there is only fold 0"):
        prepare(recipe, 1)


def test_extra_rows_that_share_a_prompt_with_held_out_rows_are_left_out(recipe: Recipe, tmp_path: Path) -> None:
    extra = pd.read_csv(write_rows(tmp_path / "extra", n=3, seed=2) / "train.csv", dtype=str)
    extra["prompt"] = ['["Another 2?"]', '["new?"]', '["which is better 5?"]']
    extra.to_csv(tmp_path / "extra.csv", index=False)
    data = prepare(change(recipe, [f"data.extra=[{tmp_path / 'extra.csv'}]"]))
    assert data.train_rows.tolist()[-2:] == [73, 74] and 72 not in data.train_rows
    assert "0 repeat a row, 1 have a prompt of the held-out rows, and 0 nearly one" in data.notes[1]


def test_other_held_out_rows_are_another_run(recipe: Recipe, tmp_path: Path) -> None:
    before, plain = prepare(recipe), prepare(change(recipe, ["data.validation=null"]))
    assert len({each.fingerprint for each in (before, plain)}) == len({before.trained_on, plain.trained_on}) == 2
    table = pd.read_csv(tmp_path / "rows/dev.csv", dtype=str)
    table.head(11).to_csv(tmp_path / "rows/dev.csv", index=False)
    assert prepare(recipe).fingerprint != before.fingerprint
    assert recipe_fingerprint(recipe) != recipe_fingerprint(change(recipe, ["data.validation=null"]))


def test_trained_with_held_out_rows_of_their_own(recipe: Recipe, tmp_path: Path) -> None:
    metrics = run_fold(recipe, 0, tmp_path / "runs")
    assert (metrics["n_train"], metrics["n_eval"]) == (58, 12) and metrics["baseline_log_loss"] is not None
    assert pd.read_csv(tmp_path / "runs/demo/fold0/oof.csv")["id"].tolist() == list(range(12))
    assert metrics["scores"]["log_loss"]["low"] < metrics["log_loss"] < metrics["scores"]["log_loss"]["high"]


# Data sets of the hub

SETS = {"someone/films": ["default"], "someone/many": ["short", "long-1.0"]}  # and the configurations of each


def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with one data set, whose labels are those of SST-2; the names that are asked for are returned.

    A second one, `someone/many`, consists of two configurations and fails as the library does.
    """
    texts = {"train": 30, "validation": 9, "test": 5}
    label = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features({"idx": datasets.Value("int32"), "sentence": datasets.Value("string"), "label": label})
    calls: list[str] = []

    def load(name: str, part: str | None = None) -> datasets.DatasetDict:
        calls.append(name if part is None else f"{name}, {part}")
        known = names(name)
        if part is None and len(known) > 1:
            raise ValueError(f"Config name is missing.\nPlease pick one among the available configs: {known}")
        if part is not None and part not in known:
            raise ValueError(f"BuilderConfig '{part}' not found. Available: {known}")
        splits = {}
        for split, count in texts.items():
            known = [at % 2 if split != "test" else -1 for at in range(count)]
            words = [f"{split} {('bad', 'good')[at % 2]} {at}" for at in range(count)]
            splits[split] = datasets.Dataset.from_dict(
                {"idx": range(count), "sentence": words, "label": known}, features
            )
        return datasets.DatasetDict(splits)

    def names(name: str) -> list[str]:
        if name not in SETS:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return SETS[name]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", names)
    return calls


def test_a_data_set_of_the_hub_is_fetched_once(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch)
    settings = ["data.path=someone/films", f"data.cache={tmp_path / 'cache'}", f"model.base={gemma2}"]
    recipe = load_recipe(
        "gemma-3-270m-sst2", [*settings, "train.max_steps=4", "train.batch_size=8", "prompt.max_length=192"]
    )
    metrics = run_fold(recipe, 0, tmp_path / "runs")
    assert (metrics["n_train"], metrics["n_eval"]) == (30, 9) and calls == ["someone/films"]
    infer([tmp_path / "runs/gemma-3-270m-sst2/fold0/model"], None, tmp_path / "out.csv")
    assert len(pd.read_csv(tmp_path / "out.csv")) == 5 and calls == ["someone/films"]
    folder = tmp_path / "cache/hub-someone--films"
    assert sorted(path.name for path in folder.iterdir()) == ["test.parquet", "train.parquet", "validation.parquet"]


def test_a_data_set_that_cannot_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch)
    with pytest.raises(
        ValueError, match=r"no folder or file someone/none, and no data set .* \(Dataset 'someone/none'"
    ):
        data_file("someone/none", "train", tmp_path)
    monkeypatch.undo()  # tests have no network
    with pytest.raises(ValueError, match=r"no data set of that name can be fetched from the Hugging Face hub \("):
        data_file("someone/none", "train", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_is_named_after_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch)
    for _ in range(2):
        found = data_file("someone/many:long-1.0", "train", tmp_path)
        assert found == tmp_path / "hub-someone--many--long-1.0/train.parquet" and len(pd.read_parquet(found)) == 30
    assert calls == ["someone/many, long-1.0"]
    assert data_file("someone/films:default", "test", tmp_path).is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "someone/many",
            "data.path: the data set someone/many consists of several configurations: name one after a colon, as in "
            "data.path=someone/many:short; there are short, long-1.0",
        ),
        ("someone/many:long", "someone/many has no configuration 'long': .*; there are short, long-1.0$"),
        ("someone/films:short", "films has no configuration 'short': .*=someone/films:default; there are default$"),
        ("someone/none:short", r"no folder or file someone/none:short, and no data set .* \(Dataset 'someone/none' "),
    ],
)
def test_a_configuration_that_is_missing_or_unknown(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch)
    with pytest.raises(ValueError, match=message):
        data_file(name, "train", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_failures_of_a_data_set_keep_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations that are right, or cannot be listed, are not blamed."""
    hub(monkeypatch)

    def fail(*_: object) -> None:
        raise ValueError("this file is damaged")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    for name in ("someone/films", "someone/many:short"):
        with pytest.raises(ValueError, match=r"can be fetched from the Hugging Face hub \(this file is damaged\)"):
            data_file(name, "train", tmp_path)
    monkeypatch.setattr(datasets, "get_dataset_config_names", fail)
    with pytest.raises(ValueError, match=r"hub \(this file is damaged\)"):
        data_file("someone/many", "train", tmp_path)


def test_an_error_without_words_is_named_by_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of the library's own kinds; a data set with a default configuration needs none to be named."""
    hub(monkeypatch)
    monkeypatch.setitem(SETS, "someone/films", ["default", "other"])
    for error in (datasets.exceptions.DatasetGenerationError(), ValueError("  ")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(ValueError, match=rf"Hugging Face hub \({type(error).__name__}\)"):
            data_file("someone/films", "train", tmp_path)


def test_what_may_be_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("stanfordnlp/sst2", "a.b/c-d_e", "nyu-mll/glue:sst2", "a/b:20220301.en"):
        assert is_hub_name(name)
    for path in (
        "data/glue:sst2",
        "a/b:",
        "a/b:c:d",
        "a/b:c/d",
        "a:b/c",
        "a/b:c\n",
        "data/lmsys",
        "sst2",
        "a/b/c",
        "/a/b",
        "./a",
        "../a",
        "a/../b",
        "~/a",
        "a/b\n",
        "ä/b",
        "a/",
    ):
        assert not is_hub_name(path)
    with pytest.raises(ValueError, match="there is no folder or file data/lmsys; give one"):
        data_file("data/lmsys", "train", tmp_path)
