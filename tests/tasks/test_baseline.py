"""The plain baseline learns what words tell, and nothing from noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arena.data.prepare import prepare_fold
from arena.metrics import log_loss
from arena.model.backbone import load_tokenizer
from arena.tasks import task_of
from arena.tasks.baseline import fit_baseline
from tests.helpers import tiny_recipe


def test_learns_words_and_nothing_from_noise(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2)
    data = prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(str(gemma2)))
    labels = data.labels[data.eval_rows]

    def judged(known: np.ndarray) -> np.ndarray:
        rows = data.rows.table
        return fit_baseline(rows.select(data.train_rows), known[data.train_rows])(rows.select(data.eval_rows))

    found = judged(data.labels)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert log_loss(labels, found) < 0.3
    shuffled = np.random.default_rng(0).permutation(data.labels)
    assert log_loss(labels, judged(shuffled)) > 0.8
