"""A run's folder: what tells two runs apart, and how an error says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from arena.config import load_recipe, save_recipe
from arena.settings import Recipe
from arena.storage.files import fingerprint, write_json, write_text
from arena.training.run_directory import (
    OUTSIDE_IDENTITY,
    _identity_settings,
    create_run_directory,
    differences,
    recipe_fingerprint,
    require_same_run,
    run_identity,
)

USED_LATER = ("max_steps=9", "best_metric=accuracy", "deterministic=true")


def unfinished(folder: Path, recipe: Recipe, data: str = "rows", base: str = "base") -> Path:
    """A run with a checkpoint and without metrics."""
    write_text(folder / "recipe.yaml", save_recipe(recipe))
    write_json(folder / "run.json", run_identity(recipe, data, base))
    (folder / "checkpoints/step-00000002").mkdir(parents=True)
    return folder


def test_settings_outside_the_identity_do_not_change_it() -> None:
    tree = load_recipe("demo").model_dump(mode="json")
    assert all(name in tree[group] for group, names in OUTSIDE_IDENTITY.items() for name in names)
    for key in (
        "train.checkpoint_every=7", "data.cache=elsewhere", "model.checkpointing=full", "train.save_optimizer=false",
        "train.tracking.name=x", "train.log_level=error", "train.checkpoint_every=epoch",
    ):  # fmt: skip
        assert run_identity(load_recipe("demo", [key]), "", "") == run_identity(load_recipe("demo"), "", "")
    assert run_identity(load_recipe("demo", ["train.lr=0.1"]), "", "") != run_identity(load_recipe("demo"), "", "")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["train.lr=1e-2"], ["train.lr is 0.003 there, 0.01 here"]),
        (
            ["model.lora.r=8", "train.keep_last=9", "train.max_seconds=5", "data.extra=[more.csv]"],
            ['data.extra is [] there, ["more.csv"] here', "model.lora.r is 16 there, 8 here"],
        ),
        (["prompt.max_length=64"], ["prompt.max_length is 1024 there, 64 here"]),
    ],
)
def test_each_setting_that_differs_is_named(tmp_path: Path, changes: list[str], told: list[str]) -> None:
    """With both values; those that change no number are not, nor rows that differ by the settings named."""
    asked = load_recipe("demo", changes)
    data = "others" if any(each.startswith(("prompt", "data")) for each in told) else "rows"
    folder = unfinished(tmp_path / "fold0", load_recipe("demo"))
    with pytest.raises(ValueError, match=r"name=mine.*--fresh") as error:
        create_run_directory(folder, run_identity(asked, data, "base"), asked, fresh=False)
    assert f"differs from this one: {'; '.join(told)}. Repeat its settings" in str(error.value)


def test_other_rows_another_base_and_a_lost_recipe_are_told_apart(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    folder = unfinished(tmp_path / "fold0", recipe)
    ours, other = (
        run_identity(recipe, "rows", "base"),
        run_identity(load_recipe("demo", ["train.lr=1"]), "rows", "base"),
    )
    assert differences(folder, {**ours, "data": "others"}, ours, recipe) == [
        "its rows are not those that data.path=data/demo now has"
    ]
    assert differences(folder, {**ours, "base": "x"}, ours, recipe) == [
        "its base model is not the one that model.base=demo_base now holds"
    ]
    (folder / "recipe.yaml").write_text("train: {epochs: 1}\nmore: 3\n")  # of another version
    found = differences(folder, other, ours, recipe)
    assert "train.lr is not set there, 0.003 here" in found and "more is 3 there, not set here" in found
    for text in ("- no settings", save_recipe(recipe)):
        (folder / "recipe.yaml").write_text(text)
        (told,) = differences(folder, other, ours, recipe)
        assert told.startswith("its settings (its recipe.yaml was changed")


def test_a_checkpoint_of_another_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    recipe = load_recipe("demo", ["train.lr=0.5"])
    checkpoint = unfinished(tmp_path / "fold0", load_recipe("demo")) / "checkpoints/step-00000002"
    ours = {"recipe": "a", "data": "b", "steps": "c"}
    require_same_run(checkpoint, dict(ours), ours, recipe)
    with pytest.raises(ValueError, match=r"train.lr is 0.003 there, 0.5 here\..*--fresh"):
        require_same_run(checkpoint, {**ours, "recipe": "x", "steps": "x"}, ours, recipe)
    with pytest.raises(ValueError, match="its steps have other examples"):
        require_same_run(checkpoint, {**ours, "steps": "x"}, ours, recipe)
    named = load_recipe("demo", ["train.lr=0.5", f"train.resume={checkpoint}"])
    with pytest.raises(ValueError, match=r"train.lr is.*leave train.resume out"):
        require_same_run(checkpoint, {**ours, "recipe": "x"}, ours, named)


def test_the_first_task_has_the_identity_of_runs_from_before_there_were_tasks() -> None:
    recipe = load_recipe("demo")
    tree = recipe.model_dump(mode="json")
    before = fingerprint(_identity_settings({name: tree[name] for name in tree if name != "task"}))
    assert recipe_fingerprint(recipe) == before != recipe_fingerprint(load_recipe("demo", ["task=other"]))


def test_settings_that_came_later_change_the_identity_only_where_they_are_used(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    tree = recipe.model_dump(mode="json")
    del tree["task"], tree["model"]["lora"]["first_layer"], tree["model"]["lora"]["layers"], tree["packing"]["group"]
    del tree["train"]["max_steps"], tree["train"]["best_metric"], tree["train"]["deterministic"]
    del tree["classes"], tree["data"]["columns"], tree["data"]["validation"], tree["data"]["teacher"]
    for name in ("text", "pair", "classes", "context", "response", "unanswerable"):
        del tree["prompt"]["template"][name]
    groups = {
        name: {key: each for key, each in tree[name].items() if key not in keys}
        for name, keys in OUTSIDE_IDENTITY.items()
    }
    assert recipe_fingerprint(recipe) == fingerprint({**tree, **groups})
    upper = load_recipe("demo", ["model.lora.first_layer=1"])
    listed = load_recipe("demo", ["model.lora.layers=[1, 3]"])
    others = [load_recipe("demo", [f"train.{each}"]) for each in USED_LATER]
    assert len({recipe_fingerprint(each) for each in (recipe, upper, listed, *others)}) == 3 + len(USED_LATER)
    ours = run_identity(recipe, "rows", "base")
    (told,) = differences(unfinished(tmp_path / "fold0", upper), run_identity(upper, "rows", "base"), ours, recipe)
    assert told == "model.lora.first_layer is 1 there, not set here"
