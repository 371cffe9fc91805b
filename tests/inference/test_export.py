"""A merged judge loads with plain transformers and says the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from arena.inference.saved import SavedJudge, export_judge, save_judge
from arena.model.backbone import load_tokenizer
from arena.model.base_files import base_digest
from tests.helpers import classifier, pack, tiny_recipe

LENGTHS = [20, 3, 11]

PLAIN = """
import sys, torch
from transformers import AutoModelForSequenceClassification
assert not any(name.split(".")[0] == "arena" for name in sys.modules)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], dtype="float32", attn_implementation="eager")
print(tuple(model(input_ids=torch.arange(10, 20)[None]).logits.shape), model.config.id2label)
"""


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_plain_transformers_gives_the_same_logits(gemma2: Path, tmp_path: Path, quantization: str) -> None:
    """Also after an evaluation forward, which on some CPUs would repack 4-bit weights in place."""
    recipe = tiny_recipe(tmp_path, gemma2, f"model.quantization={quantization}")
    model = classifier(recipe.model).eval()
    batch = pack(LENGTHS)
    with torch.no_grad():
        ours = model(batch)
    tokenizer = load_tokenizer(str(gemma2))
    save_judge(
        model.model, tokenizer, SavedJudge(tmp_path / "judge", recipe, np.full(3, 1 / 3), "x", base_digest(str(gemma2)))
    )
    export_judge(tmp_path / "judge", tmp_path / "plain", dtype="float32")
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "plain", dtype="float32", attn_implementation="eager"
    )
    rows = batch.input_ids[0].split(batch.seq_lens)
    with torch.no_grad():
        theirs = torch.cat([plain(input_ids=row[None]).logits for row in rows])
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert ours.abs().max() > 0.1
    shown = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "plain")], capture_output=True, text=True, check=True
    )
    assert "(1, 3) {0: 'A', 1: 'B', 2: 'tie'}" in shown.stdout
