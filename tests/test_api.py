"""What `import arena` offers: a few names, imported when they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import arena
from arena.data.prepare import prepare_fold
from arena.model.backbone import load_tokenizer
from arena.packing.loader import PackedLoader
from arena.settings import Recipe
from arena.tasks import task_of
from arena.training.batches import plan_fold
from tests.helpers import tiny_recipe


def test_every_public_name_is_there() -> None:
    assert set(arena.__all__) == set(arena._PLACES) <= set(dir(arena))
    for name in arena.__all__:
        found = getattr(arena, name)
        assert found.__name__ == name and found.__module__ == arena._PLACES[name] and found.__doc__
    with pytest.raises(
        AttributeError, match="module 'arena' has no attribute 'judge': it has Generator, Judge, JudgeBatches, Packed"
    ):
        arena.judge  # noqa: B018


def test_importing_arena_imports_nothing_heavy() -> None:
    code = "import sys, arena; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("PASSIVE", "2000")),
        ({"GOMP_SPINCOUNT": "7"}, ("PASSIVE", "7")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
    ],
)
def test_threads_wait_for_a_moment_unless_the_user_says_how(given: dict[str, str], expected: tuple[str, ...]) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    code = f"import os, sys, arena; assert 'torch' not in sys.modules; print([os.environ.get(n) for n in {names}])"
    others = {name: value for name, value in os.environ.items() if name not in names}
    said = subprocess.run([sys.executable, "-c", code], env=others | given, check=True, capture_output=True, text=True)
    assert said.stdout.strip() == str(list(expected))


@pytest.fixture
def recipe(gemma2: Path, tmp_path: Path) -> Recipe:
    return tiny_recipe(tmp_path, gemma2)


def test_open_fold_gives_the_batches_of_training(recipe: Recipe) -> None:
    loader = arena.open_fold(recipe, 1)
    tokenizer = load_tokenizer(recipe.model.base)
    data = prepare_fold(recipe, task_of(recipe), 1, tokenizer)
    by_hand = PackedLoader(data.store, data.targets, plan_fold(recipe, data), tokenizer)
    assert len(loader) == len(by_hand) > 1
    for batch, expected in zip(loader, by_hand, strict=True):
        for micro_batch, same in zip(batch, expected, strict=True):
            assert isinstance(micro_batch, arena.PackedBatch)
            assert torch.equal(micro_batch["input_ids"], same["input_ids"])
            assert torch.equal(micro_batch["label"], same["label"])
            assert micro_batch["input_text"] == same["input_text"] and micro_batch["input_text"][0]
    assert loader.plan.fingerprint != arena.open_fold(recipe, 0).plan.fingerprint


def test_open_fold_gives_the_held_out_rows_once(recipe: Recipe) -> None:
    loader = arena.open_fold(recipe, 1, held_out=True)
    data = prepare_fold(recipe, task_of(recipe), 1, load_tokenizer(recipe.model.base))
    (step,) = loader
    found = np.concatenate([micro_batch["index"].numpy() for micro_batch in step])
    assert sorted(found) == sorted(data.eval_rows * data.store.orders)
    labels = torch.cat([micro_batch["label"] for micro_batch in step]).numpy()
    np.testing.assert_allclose(labels, data.labels[found // data.store.orders], atol=1e-6)


def test_there_is_no_such_fold(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="fold"):
        arena.open_fold(recipe, 99)
