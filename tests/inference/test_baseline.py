"""The plain baseline learns what words tell, and nothing from noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arena.data.prepare import prepare_fold
from arena.inference.baseline import baseline_probabilities
from arena.metrics import log_loss
from arena.model.backbone import load_tokenizer
from tests.helpers import tiny_recipe


def test_learns_words_and_nothing_from_noise(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2)
    data = prepare_fold(recipe, 0, load_tokenizer(str(gemma2)))
    labels = data.labels[data.eval_rows]
    found = baseline_probabilities(data)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert log_loss(labels, found) < 0.3
    np.random.default_rng(0).shuffle(data.labels)
    assert log_loss(labels, baseline_probabilities(data)) > 0.8
