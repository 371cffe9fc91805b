"""Instruction tuning from files to an exported model, on a tiny base."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import arena
from arena.config import load_recipe
from arena.data.prepare import prepare_fold
from arena.inference.export import export_judge
from arena.inference.infer import infer
from arena.inference.saved import read_judge
from arena.model.backbone import load_tokenizer
from arena.model.classifier import by_example
from arena.model.language_model import packed_model
from arena.model.tuning import load_trained
from arena.packing.loader import PackedLoader
from arena.packing.plan import plan_evaluation
from arena.packing.tree import find_prefixes
from arena.reporting.report import draw_report, print_report
from arena.settings import Recipe
from arena.stopping import Stopped
from arena.tasks import task_of
from arena.training.batches import plan_fold, step_targets, training_order
from arena.training.checkpoint_manager import CheckpointManager
from arena.training.held_out import HeldOut
from arena.training.run import run_fold
from arena.training.trainer import Trainer
from tests.helpers import SHARED, make_base, make_tokenizer, needs_shared


def write_dolly(folder: Path, n: int = 60) -> Path:
    """Instructions whose answer depends on them, some with a context, one without a response; there are no ids."""
    folder.mkdir()
    kinds = [("which is better", "good"), ("which is not", "a bad answer which is not very clear")]
    rows = [{"instruction": f"{kinds[at % 2][0]} {at // 2}?", "response": kinds[at % 2][1]} for at in range(n)]
    table = pd.DataFrame(rows).assign(context=["hello world" * (at % 7 == 0) for at in range(n)], category="open_qa")
    table.loc[5, "response"] = ""
    table.to_csv(folder / "train.csv", index=False)
    return folder


@pytest.fixture
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Recipe:
    """On a base with tied embeddings and a soft cap, or on another family with an output layer of its own."""
    family = getattr(request, "param", "gemma2")
    changes = {"final_logit_softcapping": 30.0} if family == "gemma2" else {"tie_word_embeddings": False}
    base = make_base(tmp_path / "base", family, **changes)
    if family == "gemma2":  # large enough for a tied output layer to be sure of anything
        model = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(12)
        model.save_pretrained(base)
    return tiny(tmp_path, base, write_dolly(tmp_path / "rows"))


def tiny(folder: Path, base: Path, rows: Path, *overrides: str) -> Recipe:
    settings = [
        f"model.base={base}", f"data.path={rows}", f"data.cache={folder / 'cache'}", "data.folds=3",
        "prompt.chat=auto", "prompt.max_length=128", "packing.budget=256", "train.batch_size=8", "train.epochs=6",
        "train.lr=2e-2", "train.evaluate_every=10", "train.checkpoint_every=2", "name=tiny",
    ]  # fmt: skip
    return load_recipe("gemma-3-270m-dolly", [*settings, *overrides])


def one_by_one(model: Any, data: Any) -> np.ndarray:
    """(n, 2): the summed loss of each held-out row's targets in transformers' own model, and their number."""
    found = np.zeros((len(data.eval_rows), 2))
    for at, row in enumerate(data.eval_rows.tolist()):
        ids = torch.from_numpy(data.store[row].astype(np.int64))
        places = torch.from_numpy(data.store.places.take(np.array([row]))[0].astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].float()
        losses = F.cross_entropy(logits[places], ids[places + 1], reduction="sum")
        found[at] = float(losses), len(places)
    return found


def plain(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.mark.parametrize("recipe", ["gemma2", "llama"], indirect=True)
def test_trained_saved_loaded_and_exported(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run_fold(recipe, 0, tmp_path / "runs")
    fold = tmp_path / "runs/tiny/fold0"
    assert metrics["log_loss"] < 0.5 * metrics["base_log_loss"]
    for kind in ("", "base_"):
        assert metrics[f"{kind}perplexity"] == pytest.approx(math.exp(metrics[f"{kind}log_loss"]))
    assert metrics["prior_log_loss" if "prior_log_loss" in metrics else "baseline_log_loss"] is None
    oof = pd.read_csv(fold / "oof.csv")
    assert list(oof.columns) == ["id", "nll", "tokens"] and len(oof) == metrics["n_eval"]
    assert metrics["log_loss"] == pytest.approx(oof["nll"].sum() / oof["tokens"].sum())
    lines = [json.loads(line) for line in (fold / "log.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["eval_log_loss"] for line in lines if "eval_log_loss" in line}
    assert min(logged.values()) == pytest.approx(metrics["log_loss"]) and max(logged) == metrics["steps"]
    scores = metrics["scores"]
    for end in ("value", "low", "high"):
        assert scores["perplexity"][end] == pytest.approx(math.exp(scores["log_loss"][end]))
    for scores in metrics["slices"]["length"].values():
        assert set(scores) == {"log_loss", "base_log_loss"}
    print_report(metrics)
    draw_report(fold)
    assert "the base before training" in capsys.readouterr().out

    tokenizer = load_tokenizer(str(fold / "model"))
    data = prepare_fold(recipe, task_of(recipe), 0, tokenizer)
    assert data.ids[:3] == ["1", "2", "3"] and 5 not in data.train_rows
    before = one_by_one(plain(recipe.model.base), data)
    assert before[:, 0].sum() / before[:, 1].sum() == pytest.approx(metrics["base_log_loss"], rel=1e-5)

    loaded = packed_model(load_trained(fold / "model", recipe.model, ()))
    scored = data.eval_rows[data.has_input[data.eval_rows]]
    plan = plan_evaluation(data.store.lengths, scored, budget=256)
    found = {}
    for batch in PackedLoader(data.store, None, plan).micro_batches():
        with torch.no_grad():
            found |= dict(zip(batch.index.tolist(), by_example(loaded(batch), batch).tolist(), strict=True))
    expected = oof[["nll", "tokens"]].to_numpy()
    np.testing.assert_allclose([found.get(row, [0, 0]) for row in data.eval_rows], expected, rtol=1e-5, atol=1e-5)

    export_judge(fold / "model", tmp_path / "plain", dtype="float32")
    np.testing.assert_allclose(one_by_one(plain(tmp_path / "plain"), data), expected, rtol=1e-4, atol=1e-4)
    answered = plain(tmp_path / "plain").generate(
        **AutoTokenizer.from_pretrained(tmp_path / "plain")(
            "<bos><start_of_turn>user\nwhich is not 3?<end_of_turn>\n<start_of_turn>model\n",
            add_special_tokens=False, return_tensors="pt",
        ),
        max_new_tokens=40, do_sample=False,
    )  # fmt: skip
    assert tokenizer.decode(answered[0]).endswith("model\na bad answer which is not very clear<end_of_turn>")
    with pytest.raises(ValueError, match=r"load it with AutoModelForCausalLM\.from_pretrained"):
        read_judge(tmp_path / "plain")


def test_what_needs_classes_refuses_it(recipe: Recipe, tmp_path: Path) -> None:
    run_fold(recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 0.1})}), 0, tmp_path / "runs")
    model = tmp_path / "runs/tiny/fold0/model"
    for use in (lambda: infer([model], None, tmp_path / "out.csv"), lambda: arena.Judge.from_pretrained(model)):
        with pytest.raises(ValueError, match=r"is a language model, tuned on the task instruction.*`arena generate`"):
            use()


class StopError(Exception):
    pass


def test_resumed_equals_uninterrupted(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and the base is evaluated once."""
    whole = run_fold(recipe, 0, tmp_path / "whole")
    after, evaluated = Trainer._after_step, []
    predict = HeldOut.predict_as_given

    def stop(self: Trainer) -> None:
        after(self)
        if self.done.step == 7:
            raise StopError

    def count(self: HeldOut, classifier: Any, weights: str, stop: Any) -> np.ndarray:
        evaluated.append(weights)
        return predict(self, classifier, weights, stop)

    monkeypatch.setattr(HeldOut, "predict_as_given", count)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(Trainer, "_after_step", stop)
        run_fold(recipe, 0, tmp_path / "parts")
    resumed = run_fold(recipe, 0, tmp_path / "parts")
    assert evaluated.count("base") == 1 and len(evaluated) > 2
    assert resumed["base_log_loss"] == whole["base_log_loss"] and resumed["log_loss"] == whole["log_loss"]
    first, second = (tmp_path / f"{name}/tiny/fold0/oof.csv" for name in ("whole", "parts"))
    assert first.read_bytes() == second.read_bytes()


def test_a_run_that_ends_within_its_first_step_resumes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same numbers: what the base predicts is no checkpoint that could be the best, or be removed as one."""
    short = {"epochs": 0.1, "evaluate_every": 1, "keep_last": 1}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=short)})
    whole = run_fold(recipe, 0, tmp_path / "whole")

    def end(*args: object) -> None:
        raise Stopped("ended within a step", 143)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("arena.training.trainer.accumulate", end)
        run_fold(recipe, 0, tmp_path / "parts")
    checkpoints = CheckpointManager(tmp_path / "parts/tiny/fold0/checkpoints")
    assert checkpoints.steps() == [0] and checkpoints.best is None
    resumed = run_fold(recipe, 0, tmp_path / "parts")
    for key in ("log_loss", "base_log_loss", "best_step", "steps"):
        assert resumed[key] == whole[key]
    assert (tmp_path / "parts/tiny/fold0/checkpoints/base").is_dir()


@pytest.mark.parametrize("budget", [128, 4096])
def test_a_step_is_divided_by_its_targets(tmp_path: Path, budget: int) -> None:
    """However it is cut: the logged loss is the mean over all of a step's targets, not a mean of means."""
    base = make_base(tmp_path / "base", "llama", tie_word_embeddings=False)
    rows = write_dolly(tmp_path / "rows")
    recipe = tiny(tmp_path, base, rows, f"packing.budget={budget}", "train.epochs=0.5", "train.lr=1e-9")
    run_fold(recipe, 0, tmp_path / "runs")
    data = prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(str(base)))
    plan = plan_fold(recipe, data)
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/fold0/log.jsonl").read_text().splitlines()]
    steps, model, apart = [line for line in lines if "loss" in line], plain(base), []
    assert len(steps) == plan.n_steps
    for number, line in enumerate(steps):
        members = np.concatenate(plan.step(number))
        each = one_by_one(model, type("Rows", (), {"eval_rows": members, "store": data.store}))
        assert step_targets(plan, data, number) == each[:, 1].sum()
        assert line["loss"] == pytest.approx(each[:, 0].sum() / each[:, 1].sum(), rel=1e-4)
        apart.append(abs((each[:, 0] / each[:, 1]).mean() - line["loss"]))
    assert max(apart) > 1e-2


def test_the_batches_of_a_fold(recipe: Recipe) -> None:
    for step in arena.open_fold(recipe):
        for batch in step:
            assert "label" not in batch and batch["targets"].shape == batch["positions"].shape
            assert batch["targets_each"].sum() == len(batch["targets"])
            assert all(text.endswith(("good<end_of_turn>", "clear<end_of_turn>")) for text in batch["input_text"])


def test_rows_of_a_group_are_adjacent_in_training() -> None:
    rows, groups = np.arange(20, 60), np.arange(40) % 7
    orders = [training_order(rows, 1, epochs=2, swap="never", seed=seed, groups=groups) for seed in (0, 1)]
    for order in orders:
        for epoch in np.split(order, 2):
            assert sorted(epoch) == rows.tolist()
            own = groups[epoch - 20]
            assert (np.diff(own) != 0).sum() == 6
    first, second = np.split(orders[0], 2)
    assert first.tolist() != second.tolist() and orders[0].tolist() != orders[1].tolist()


@needs_shared
def test_questions_share_their_texts_in_training(tmp_path: Path) -> None:
    """Of SQuAD 2.0, less than half of the tokens are computed; with rows shuffled alone, nearly all are."""
    squad = pd.read_parquet(SHARED / "data/squad2/train.parquet").head(2000)
    (tmp_path / "rows").mkdir()
    squad.to_parquet(tmp_path / "rows/train.parquet")
    tokenizer, shares = make_tokenizer(tmp_path / "tokenizer"), []
    for group in ("true", "false"):
        places = [f"data.path={tmp_path / 'rows'}", f"data.cache={tmp_path / 'cache'}"]
        sizes = ["prompt.max_length=2048", "packing.budget=16384", f"packing.group={group}"]
        recipe = load_recipe("gemma-3-270m-squad2", [*places, *sizes])
        data = prepare_fold(recipe, task_of(recipe), 0, tokenizer)
        shares.append(plan_fold(recipe, data, prefixes=find_prefixes(data.store)).unique_share)
    assert shares[0] <= 0.5 < 0.8 < shares[1]
