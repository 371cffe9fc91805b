"""Techniques side by side: the same rows for all, one process each, results that are kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from arena.config import change
from arena.settings import Recipe
from benchmarks import techniques as module
from benchmarks.technique_report import COLUMNS, as_page, as_result, technique_table, write_techniques
from benchmarks.techniques import SWEEP, TECHNIQUES, Technique, in_steps, measure_technique, run_techniques
from tests.helpers import tiny_recipe

FLAGS = {"full fine-tuning": "full", "head only, NF4": "head"}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Runs in this process, to save the start of many; gives the recipes that were run."""
    seen: list[Recipe] = []

    def run(recipe: Recipe, runs: Path) -> dict[str, Any]:
        seen.append(recipe)
        return measure_technique(recipe, runs)

    monkeypatch.setattr(module, "in_process", run)
    return seen


def test_all_train_on_the_same_for_equally_long(gemma2: Path, tmp_path: Path, here: list[Recipe]) -> None:
    recipe = tiny_recipe(tmp_path, gemma2)
    rows = {row["technique"]: row for row in run_techniques(recipe, 2, tmp_path / "state")}
    assert rows.keys() == TECHNIQUES.keys()
    assert {(row["status"], row["steps"]) for row in rows.values()} == {("done", 2)}
    assert len({row["tokens"] for row in rows.values()}) == 1
    trainable = {name: row["trainable_parameters"] for name, row in rows.items()}
    assert trainable["head only, NF4"] == 3 * 64
    assert trainable["LoRA, unquantised"] == trainable["QLoRA, NF4"] == trainable["LoRA, int8"]
    assert (
        trainable["head only, NF4"] < trainable["QLoRA, NF4"] < trainable["DoRA, NF4"] < trainable["full fine-tuning"]
    )
    assert len({row["log_loss"] for row in rows.values()}) == len(rows)
    for used, (name, row) in zip(here, rows.items(), strict=True):
        assert used.model.tune == FLAGS.get(name, "lora")
        assert used.seed == recipe.seed and used.train.evaluate_every == 0
        assert (row["lr"], row["head_lr"]) == (used.train.lr, used.train.head_lr)
        assert (row["lr"] == recipe.train.lr) == (name != "full fine-tuning")
    assert not list((tmp_path / "state/runs").glob("*/demo"))
    check_page(recipe, list(rows.values()), tmp_path)


def check_page(recipe: Recipe, rows: list[dict[str, Any]], folder: Path) -> None:
    """The page names every technique, and the JSON holds what it shows."""
    result = as_result(recipe, rows, [{"technique": "one, lr x 2", "status": "failed", "reason": "ValueError: no"}])
    assert [path.name for path in write_techniques(result, folder)] == ["techniques-demo.json", "techniques-demo.md"]
    page = (folder / "techniques-demo.md").read_text()
    assert page == as_page(result)
    assert all(f"| {row['technique']} | {row['trainable_parameters']:,} |" in page for row in rows)
    assert "2 steps of 8 examples" in page and "| one, lr x 2 | ValueError: no |" in page
    assert json.loads((folder / "techniques-demo.json").read_text())["rows"] == rows
    assert all(line.count("|") == len(COLUMNS) + 1 for line in technique_table(rows).splitlines())


def test_what_is_done_is_not_done_again(gemma2: Path, tmp_path: Path, here: list[Recipe]) -> None:
    recipe = tiny_recipe(tmp_path, gemma2)
    two = {name: TECHNIQUES[name] for name in ("head only, NF4", "QLoRA, NF4")}
    first = run_techniques(recipe, 1, tmp_path / "state", dict(list(two.items())[:1]))
    both = run_techniques(recipe, 1, tmp_path / "state", two)
    assert both[:1] == first and len(here) == 2
    with pytest.raises(ValueError, match="holds parts of another run"):
        run_techniques(recipe, 2, tmp_path / "state", two)


@pytest.mark.slow
def test_each_has_a_process_of_its_own(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A way that cannot be trained is said, the next is trained all the same, and its memory is its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    class Wrong(Technique):
        def of(self, recipe: Recipe) -> Recipe:
            return change(super().of(recipe), ["model.lora.targets=[nothing]"])

    held = bytearray(os.urandom(2**20)) * 400  # by this process, and by no other
    rows = run_techniques(
        tiny_recipe(tmp_path, gemma2), 1, tmp_path / "state", {"wrong": Wrong(), "head": TECHNIQUES["head only, NF4"]}
    )
    assert rows[0]["status"] == "failed" and "model.lora.targets" in rows[0]["reason"]
    assert rows[1]["status"] == "done"
    assert rows[1]["peak_bytes"] is None or 0 < rows[1]["peak_bytes"] < len(held) / 2


@pytest.mark.parametrize("swap", ["random", "both"])
def test_steps_are_whole(gemma2: Path, tmp_path: Path, swap: str) -> None:
    recipe = tiny_recipe(tmp_path, gemma2, f"train.swap={swap}")
    assert in_steps(recipe, None) == recipe
    for steps in (1, 3, 17):
        assert in_steps(recipe, steps).train.epochs > 0
    with pytest.raises(ValueError, match="one step at least"):
        in_steps(recipe, 0)


def test_the_rates_of_the_table_are_among_those_of_the_sweep() -> None:
    for name in FLAGS:
        assert TECHNIQUES[name] in SWEEP.values()
