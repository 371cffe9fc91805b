"""A judge goes with the base that it was trained on, known by its content, and is the one that was named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from arena.config import change
from arena.inference import evaluate
from arena.inference.export import export_judge
from arena.inference.infer import average
from arena.inference.judge_model import JudgeModel
from arena.inference.kinds import Kind, with_kinds
from arena.inference.saved import SavedJudge, as_json, read_judge, save_judge
from arena.model import tuning
from arena.model.backbone import load_tokenizer
from arena.model.base_files import base_digest
from arena.model.safety import WEIGHTS
from arena.settings import FORMER_POLICIES, Recipe
from arena.storage.files import write_json
from arena.tasks.preference import COLUMNS as CLASSES
from tests.helpers import arena, classifier, tiny_recipe


def other_content(base: Path) -> None:
    """Changes a base's weights, not their shapes."""
    tensors = load_file(base / WEIGHTS)
    changed = {name: each + 0.01 * torch.randn_like(each) for name, each in tensors.items()}
    save_file(changed, base / WEIGHTS, metadata={"format": "pt"})


def saved(folder: Path, recipe: Recipe, seed: int = 0, kinds: tuple[Kind, ...] = ()) -> Path:
    """A judge of random adapters in a finished fold's folder."""
    base, prior = recipe.model.base, np.array([0.3, 0.3, 0.4])
    model = classifier(recipe.model, seed).model
    save_judge(model, load_tokenizer(base), SavedJudge(folder / "model", recipe, prior, "x", base_digest(base), kinds))
    write_json(folder / "metrics.json", {})
    return folder / "model"


@pytest.fixture
def base(gemma2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gemma2, tmp_path / "base"))


@pytest.mark.parametrize("tune", ["lora", "head"])
def test_another_base_in_the_place_of_its_own_is_refused(tune: str, base: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "run", tiny_recipe(tmp_path, base, f"model.tune={tune}"))
    JudgeModel(model)  # the control
    other_content(base)
    for use in (JudgeModel, lambda judge: export_judge(judge, tmp_path / "plain")):
        with pytest.raises(ValueError, match=rf"{model} was not trained on the base that {base} now.*model\.base="):
            use(model)
    assert not (tmp_path / "plain").exists()


def test_a_moved_base_is_known_by_its_content(base: Path, tmp_path: Path) -> None:
    """An override that names a base of other content is refused as well."""
    model = saved(tmp_path / "run", tiny_recipe(tmp_path, base))
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(base, other)
    other_content(other)
    base.rename(moved)
    for override, fits in ((f"model.base={moved}", True), (f"model.base={other}", False)):
        for use in (JudgeModel, lambda judge, settings: export_judge(judge, tmp_path / "plain", overrides=settings)):
            if fits:
                use(model, [override])
            else:
                with pytest.raises(ValueError, match=f"was not trained on the base that {other} now holds"):
                    use(model, [override])


def test_a_judge_of_all_weights_needs_no_base(base: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, base, "model.tune=full", "model.quantization=none")
    model = saved(tmp_path / "run", recipe)
    shutil.rmtree(base)
    JudgeModel(model)
    export_judge(model, tmp_path / "plain")


def stretched(base: Path) -> None:
    """Makes a base's rotary embedding depend on the longest row of a batch."""
    config = json.loads((base / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64, "rope_parameters": rope}))


def test_a_judge_on_a_base_that_mixes_rows_is_refused(base: Path, tmp_path: Path) -> None:
    stretched(base)
    for length in (64, 128):
        model = saved(tmp_path / str(length), tiny_recipe(tmp_path, base, f"prompt.max_length={length}"))
        if length == 64:
            JudgeModel(model)
            continue
        with pytest.raises(
            ValueError, match=r"depend on the rows beside it.*: train the fold again with prompt\.max_length=64"
        ):
            JudgeModel(model)


def test_an_exported_judge_cannot_be_loaded_as_a_judge(base: Path, tmp_path: Path) -> None:
    """Its merged weights would be quantised again, which loses the adapter."""
    model = saved(tmp_path / "run", tiny_recipe(tmp_path, base))
    export_judge(model, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"was written by `arena export` for transformers.* or name the fold"):
        JudgeModel(tmp_path / "plain")


def test_a_judge_of_an_older_format_is_refused(base: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "run", tiny_recipe(tmp_path, base))
    write_json(model / "judge.json", {**as_json(read_judge(model)), "format": 1})
    with pytest.raises(
        ValueError, match=r"another version of arena \(format 1, this one reads 2\): train the fold again"
    ):
        JudgeModel(model)


@pytest.mark.parametrize(("former", "present"), FORMER_POLICIES.items())
def test_a_judge_with_a_former_name_of_a_recompute_policy_is_read(
    base: Path, tmp_path: Path, former: str, present: str
) -> None:
    model = saved(tmp_path / "run", tiny_recipe(tmp_path, base, f"model.checkpointing={present}"))
    card = as_json(read_judge(model))
    earlier = json.loads(json.dumps(card))
    earlier["recipe"]["model"]["checkpointing"] = former
    write_json(model / "judge.json", earlier)
    assert as_json(read_judge(model)) == card
    earlier["recipe"]["model"]["checkpointing"] = "heavy"  # control: a name that never existed
    write_json(model / "judge.json", earlier)
    with pytest.raises(ValueError, match="is damaged"):
        read_judge(model)


KINDS = Kind("both empty", 3, (0.0, 0.25, 0.75)), Kind("A empty", 41, (0.02, 0.93, 0.05))


def test_rows_of_a_kind_are_drawn_to_its_mean_label_unless_that_is_switched_off(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others, and all of a judge that knows no kinds, are to the bit what the model says."""
    recipe = tiny_recipe(tmp_path, base, "model.quantization=none")
    path = tmp_path / "rows/test.csv"
    table = pd.read_csv(path, dtype=str)
    table.loc[[2, 5], "response_a"] = '[""]'
    table.loc[[3, 5], "response_b"] = "[null]"
    table.to_csv(path, index=False)
    cards = [read_judge(saved(tmp_path / f"{len(kinds)}", recipe, kinds=kinds)) for kinds in ((), KINDS)]
    judge = JudgeModel(cards[0])
    rows = judge.read(path)
    own = judge.probabilities(rows)
    silent = judge.beside(replace(cards[1], recipe=change(recipe, ["judge.kinds=false"])))
    assert np.array_equal(silent.probabilities(rows), own) and "of kind" not in capsys.readouterr().out
    found = judge.beside(cards[1]).probabilities(rows)
    assert np.array_equal(found, with_kinds(KINDS, rows, own))
    assert np.flatnonzero((found != own).any(axis=1)).tolist() == [2, 5]
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    shown = capsys.readouterr().out
    assert "1 row of kind `A empty`: 0.02 0.93 0.05 from 41 training rows" in shown and shown.count("of kind") == 2


def test_kinds_are_read_as_they_were_written_and_an_earlier_judge_has_none(base: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "run", tiny_recipe(tmp_path, base), kinds=KINDS)
    assert read_judge(model).kinds == KINDS
    card = as_json(read_judge(model))
    write_json(model / "judge.json", {name: value for name, value in card.items() if name != "kinds"})
    assert read_judge(model).kinds == ()
    good = card["kinds"][0]
    for odd in (
        {"name": "A green"},
        {"mean": [0.5, 0.6, -0.1]},
        {"mean": [0.5, 0.5]},
        {"rows": 0},
        {"rows": "many"},
    ):
        write_json(model / "judge.json", {**card, "kinds": [good | odd]})
        with pytest.raises(ValueError, match=r"judge\.json is damaged"):
            read_judge(model)


def test_infer_and_export_take_exactly_what_is_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(tmp_path, base, "model.quantization=none")
    now = saved(tmp_path / "runs/demo/fold0", recipe, seed=0)
    earlier = saved(tmp_path / "runs/demo/earlier/fold0-2026-01-02", recipe, seed=1)
    (earlier.parent / "recipe.yaml").write_text("name: demo\n")

    def submission(*words: str) -> np.ndarray:
        arena(monkeypatch, "infer", *words)
        return pd.read_csv("submission.csv")[list(CLASSES)].to_numpy()

    current = submission()
    expected = submission("--recipe", str(earlier))
    assert np.abs(current - expected).max() > 0.01
    assert f"{earlier} ({base}): judging" in capsys.readouterr().out
    recipe_file = str(earlier.parent.relative_to(tmp_path) / "recipe.yaml")
    for name in (recipe_file, str(earlier.parent)):
        assert np.array_equal(submission("--recipe", name), expected)
    assert np.array_equal(submission("--recipe", "demo"), current)

    arena(monkeypatch, "export", "--recipe", recipe_file, "--out", "old")
    arena(monkeypatch, "export", "--fold", "0", "--out", "new")
    export_judge(earlier, tmp_path / "old-again")
    export_judge(now, tmp_path / "new-again")
    weights = {name: Path(name, WEIGHTS).read_bytes() for name in ("old", "new", "old-again", "new-again")}
    assert weights["old"] == weights["old-again"] != weights["new"] == weights["new-again"]
    with pytest.raises(SystemExit):
        arena(monkeypatch, "export", "--recipe", recipe_file, "--fold", "1", "--out", "other")
    assert "--fold 1 asks for another" in capsys.readouterr().out and not Path("other").exists()


def test_settings_that_would_be_ignored_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        arena(monkeypatch, "export", "model.dtype=float32", "--out", "x")
    assert "model.dtype does not apply to a trained judge: only model.base can be set" in capsys.readouterr().out


@pytest.mark.parametrize("kinds", [("lora", "lora", "lora"), ("lora", "head", "lora")])
def test_judges_on_one_base_load_it_once_and_plan_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...]
) -> None:
    """To the bit what each gives on its own; a judge with all weights trained in between is loaded by itself."""
    options = "model.quantization=none", "prompt.max_length=128"
    recipes = [tiny_recipe(tmp_path, base, *options, f"model.tune={kind}") for kind in kinds]
    folders = [saved(tmp_path / f"fold{at}", recipe, seed=at) for at, recipe in enumerate(recipes)]
    cards = [read_judge(folder) for folder in folders]
    alone = [JudgeModel(folder) for folder in folders]
    rows = alone[0].read([tmp_path / "rows/test.csv"])
    expected = [judge.probabilities(rows) for judge in alone]
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    loaded, planned = [], []
    monkeypatch.setattr(tuning, "load_base", lambda *given, real=tuning.load_base: loaded.append(1) or real(*given))
    plan = evaluate.plan_evaluation
    monkeypatch.setattr(evaluate, "plan_evaluation", lambda *given, **more: planned.append(1) or plan(*given, **more))
    assert np.array_equal(average(cards, rows), np.sum(expected, axis=0) / 3)
    assert (len(loaded), len(planned)) == (1, 1)
    whole = saved(tmp_path / "fold9", tiny_recipe(tmp_path, base, *options, "model.tune=full"), seed=5)
    between = JudgeModel(whole).probabilities(rows)
    loaded.clear()
    found = average([cards[0], read_judge(whole), cards[2]], rows)
    assert np.array_equal(found, (expected[0] + between + expected[2]) / 3) and len(loaded) == 3


def test_exchanged_answers_exchange_the_probabilities(base: Path, tmp_path: Path) -> None:
    """To the bit in one batch, where both orders of a row are those of its exchanged twin, and 1e-5 in another."""
    recipe = tiny_recipe(tmp_path, base, "packing.budget=4096")
    straight = pd.read_csv(tmp_path / "rows" / "test.csv").assign(id=lambda rows: "s" + rows["id"].astype(str))
    swapped = straight.rename(columns={"response_a": "response_b", "response_b": "response_a"})
    swapped = swapped.assign(id=swapped["id"].str.replace("s", "x"))
    files = {"one": straight, "other": swapped, "both": pd.concat([straight, swapped])}
    for name, rows in files.items():
        rows.to_csv(tmp_path / f"{name}.csv", index=False)
    judge = JudgeModel(saved(tmp_path / "run", recipe))
    one, other, both = (judge.probabilities(judge.read(tmp_path / f"{name}.csv")) for name in files)
    exchanged = [1, 0, 2]
    assert np.array_equal(both[len(one) :], both[: len(one)][:, exchanged])
    assert other == pytest.approx(one[:, exchanged], rel=1e-5)
    single = JudgeModel(tmp_path / "run" / "model", ["judge.swap=false"])  # control: one order has a position bias
    alone = single.probabilities(single.read(tmp_path / "both.csv"))
    assert np.abs(alone[len(one) :] - alone[: len(one)][:, exchanged]).max() > 1e-3
