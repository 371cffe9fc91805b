"""Recipes: what is accepted, what is refused and how that is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from arena.config import load_recipe, recipe_names, run_place, save_recipe


def test_shipped_recipes_are_valid() -> None:
    assert recipe_names() == [
        "demo", "gemma-1.1-2b-squad2", "gemma-1.1-2b-sst2", "gemma-2-2b", "gemma-2-9b", "gemma-2-9b-notebook",
        "gemma-3-270m", "gemma-3-270m-dolly", "gemma-3-270m-squad2", "gemma-3-270m-sst2", "gemma-7b-dolly",
    ]  # fmt: skip
    for name in recipe_names():
        assert load_recipe(name).name == name
    large = load_recipe("gemma-2-9b")
    assert (large.packing.budget, large.train.batch_size, large.prompt.max_length) == (16384, 80, 4096)
    assert large.model.quantization == "nf4" and large.model.tune == "lora"
    assert large.model.lora.targets == "all-linear"


def test_saved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe("demo", ["train.lr=0.5"])
    path = tmp_path / "recipe.yaml"
    path.write_text(save_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


def test_overrides() -> None:
    recipe = load_recipe(
        "demo",
        ["train.batch_size=7", "model.tune=full", "model.quantization=none", "data.extra=[a.csv, b.csv]", "name=mine"],
    )
    assert recipe.train.batch_size == 7 and recipe.model.tune == "full"
    assert recipe.data.extra == ("a.csv", "b.csv") and recipe.name == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=3", "train.batchsize: unknown key; did you mean 'batch_size'"),
        ("trian.lr=3", "trian: unknown key; did you mean 'train'"),
        ("model.lora.rank=3", "model.lora.rank: unknown key; known here: r, alpha"),
        ("train.lr=-1", "train.lr: Input should be greater than 0"),
        ("train.epochs=[]", "train.epochs"),
        ("model.quantization=int3", "model.quantization: Input should be 'nf4'"),
        ("name=../x", "name"),
        ("train.lr", "is not `key=value`"),
        ("train.lr.x=1", "'lr' is a single value"),
        ("train.lr={", "not YAML"),
        ("packing.budget=512", "max_length .* is larger than packing.budget"),
        ("model.tune=full", "quantised weights cannot be trained"),
        (
            "train.checkpoint_every=0",
            "train.checkpoint_every: Input should be greater than 0; train.checkpoint_every",
        ),
        ("train.evaluate_every=epochs", "train.evaluate_every: Input should be 'epoch'"),
        ("train.tracking.project=../up", "train.tracking.project: String should match pattern"),
        ("train.mirror=sftp://me:secret@host/x", "train.mirror: give a folder or a URL without a password"),
        ("train.mirror=''", "train.mirror: give a folder"),
        ("model.lora={first_layer: 1, layers: [2]}", "model.lora: first_layer and layers both choose the layers"),
        ("model.lora.layers=[]", "model.lora.layers: Tuple should have at least 1 item"),
        ("model.lora.layers=[-1]", r"model.lora.layers.0: Input should be greater than or equal to 0"),
        ("classes=[no, yes]", "classes: False is not a text in YAML: quote it"),
        ("classes=good", "classes: Input should be a valid tuple"),
        ("prompt.template=nope", "no template 'nope': name one of classify, compact, instruct, judge"),
        ("model.checkpointing=light", "model.checkpointing: light was renamed: set it to elementwise$"),
        ("model.checkpointing=mlp", "model.checkpointing: mlp was renamed: set it to elementwise_and_mlp$"),
    ],
)
def test_refusals_name_the_key_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("demo", [override])


def test_epochs_that_max_steps_would_override_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"train\.epochs has no effect .* train\.max_steps=250: pass train\.max_steps=null"
    ):
        load_recipe("gemma-3-270m-sst2", ["train.epochs=2"])
    both = load_recipe("gemma-3-270m-sst2", ["train.epochs=2", "train.max_steps=null"]).train
    assert (both.epochs, both.max_steps) == (2, None)
    assert load_recipe("demo", ["train.epochs=2"]).train.epochs == 2


def test_unknown_recipe_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe 'nope': name one of demo, gemma-1\.1-2b-squad2"):
        load_recipe("nope")
    path = tmp_path / "broken.yaml"
    for text in ("a: [", "- 1", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"broken\.yaml"):
            load_recipe(str(path))


def test_own_template_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("instruction: Which is better?\nverdict: 'Answer: '\n")
    assert load_recipe("demo", [f"prompt.template={path}"]).prompt.template.verdict == "Answer: "
    path.write_text("instruction: x\nuserr: y\n")
    with pytest.raises(ValueError, match="did you mean 'user'"):
        load_recipe("demo", [f"prompt.template={path}"])


def test_a_cache_is_local() -> None:
    with pytest.raises(ValueError, match=r"data\.cache s3://b/cache is a URL"):
        load_recipe("demo", ["data.cache=s3://b/cache"])
    with pytest.raises(ValueError, match=r"--runs s3:/b is a URL"):
        run_place(Path("s3://b"), "demo")
