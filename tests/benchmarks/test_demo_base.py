"""The shipped base, and that the command which makes it works."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from arena.config import load_recipe
from arena.prompt_settings import RECIPES
from arena.tasks.preference import PromptEncoder
from benchmarks.demo_base.train import make_demo_base

SHIPPED = RECIPES / "demo_base"


def usable(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert type(model).__name__ == "Gemma2ForSequenceClassification"
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(folder), load_recipe("demo").prompt)
    rows = {"prompt": [["Hello 好"]], "response_a": [["<bos> fine"]], "response_b": [[None]]}
    (example,) = encoder.encode(rows, orders=1)
    logits = model(input_ids=torch.from_numpy(example.input_ids)[None].long()).logits
    assert logits.shape == (1, 3) and torch.isfinite(logits).all()


def test_the_shipped_base_is_a_small_real_gemma2() -> None:
    usable(SHIPPED)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 8 * 2**20


def test_the_command_that_makes_it(tmp_path: Path) -> None:
    make_demo_base(tmp_path / "base", seconds=1.0, seed=0, threads=1)
    usable(tmp_path / "base")
