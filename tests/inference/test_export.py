"""A merged judge loads with plain transformers and says the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from arena import Judge
from arena.inference.export import export_judge
from arena.inference.saved import SavedJudge, save_judge
from arena.model.backbone import load_tokenizer
from arena.model.base_files import base_digest
from arena.storage.files import write_json
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


ALONE = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
sys.path.insert(0, sys.argv[1])
from judge_prompt import prompt_ids
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], dtype="float32", attn_implementation="eager")
rows = [prompt_ids(tokenizer, turns) for turns in json.loads(sys.argv[2])]
assert not any(name.split(".")[0] == "arena" for name in sys.modules)
print(json.dumps([model(input_ids=torch.tensor([ids])).logits.softmax(-1)[0].tolist() for ids in rows]))
"""
TURNS = [[["What is 2 + 2?", "It is 4.", "Five"]], [["Hello <eos>", None, "Hi"], ["  More?\n", "yes", "no\u00e9"]]]


def test_the_helper_writes_the_prompt_and_the_card_says_what_is_known(gemma2: Path, tmp_path: Path) -> None:
    """Without this package; the judge itself reads the same rows in one order."""
    recipe = tiny_recipe(tmp_path, gemma2, "model.quantization=none", "judge.swap=false", "prompt.max_length=256")
    folder, base = tmp_path / "fold0/model", str(gemma2)
    save_judge(
        classifier(recipe.model).model, load_tokenizer(base),
        SavedJudge(folder, recipe, np.full(3, 1 / 3), "x", base_digest(base)),
    )  # fmt: skip
    export_judge(folder, tmp_path / "plain", dtype="float32")
    assert "They are not known here" in (tmp_path / "plain/README.md").read_text()
    write_json(tmp_path / "fold0/metrics.json", {"log_loss": 0.98765, "n_train": 1234, "n_eval": 56, "steps": 7})
    export_judge(folder, tmp_path / "known", dtype="float32")
    card = (tmp_path / "known/README.md").read_text()
    assert "| log-loss | 0.9877 |" in card and "1,234 rows" in card and "0 A, 1 B, 2 tie" in card
    shown = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "known"), json.dumps(TURNS)],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    ).stdout  # fmt: skip
    rows = [dict(zip(("prompt", "response_a", "response_b"), zip(*turns, strict=True), strict=True)) for turns in TURNS]
    expected = Judge.from_pretrained(folder).predict_proba([{k: list(v) for k, v in row.items()} for row in rows])
    np.testing.assert_allclose(json.loads(shown), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    namespace: dict[str, Any] = {"__file__": str(tmp_path / "known/judge_prompt.py")}
    exec((tmp_path / "known/judge_prompt.py").read_text(), namespace)
    tokenizer = load_tokenizer(base)
    with pytest.raises(ValueError, match=r"the prompt has [0-9,]+ tokens, more than"):
        namespace["prompt_ids"](tokenizer, [("long " * 2000, "a", "b")])
    prompt = json.loads((tmp_path / "known/judge_prompt.json").read_text())
    write_json(tmp_path / "known/judge_prompt.json", {**prompt, "control": [tokenizer("Five")["input_ids"][-1]]})
    with pytest.raises(ValueError, match="a text holds the control token"):
        namespace["prompt_ids"](tokenizer, TURNS[0])
