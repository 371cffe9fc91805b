"""Folds, tokens, common beginnings and plans of a small file are the same from version to version, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from arena.config import change
from arena.data.folds import load_or_assign_folds
from arena.data.prepare import prepare_fold
from arena.model.backbone import load_tokenizer
from arena.packing import tree
from arena.packing.plan import plan_evaluation
from arena.packing.tree import prefixes_for
from arena.settings import Recipe
from arena.storage.files import fingerprint
from arena.tasks import task_of
from arena.training.batches import plan_fold
from tests.helpers import tiny_recipe

ROWS = 400
PINNED = {
    "evaluation": "23dfb53d02f0bbdf",
    "folds": "64560ee61e253271",
    "groups": "b39b01cf5526b781",
    "identity": "0d59715b7fc437ad",
    "ids": "152cce380d75c53b",
    "plan": "42ecb058601471be",
    "rank": "6dfad932f6b269eb",
    "shared": "1cd56ea471549ce8",
    "targets": "5f2280b45c15497a",
    "tokens": "295150cf8c3078c3",
}


def write_rows(path: Path) -> None:
    """Prompts that repeat in other spellings, scripts and turns; answers that begin alike; soft labels too."""
    rng = np.random.default_rng(7)
    words = "the judge is not very clear good bad Hello ＷＯＲＬＤ straße 你好 ﬁne which better ?".split()  # noqa: SIM905

    def text(longest: int) -> str:
        return " ".join(rng.choice(words, rng.integers(1, longest)).tolist())

    prompts = [text(12) for _ in range(ROWS // 3)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            prompt = prompts[rng.integers(len(prompts))]
            prompt = prompt.upper() if number % 5 == 0 else prompt
            turns = 1 + int(number % 7 == 0)
            label = rng.dirichlet([0.3, 0.3, 0.3]).round(3)
            label[2] = 1 - label[:2].sum()
            cells: dict[str, object] = {"id": f"row {number * 7 % ROWS}", "prompt": [prompt, "and then?"][:turns]}
            for name in ("response_a", "response_b"):
                cells[name] = [text(30) if rng.random() > 0.05 else None for _ in range(turns)]
            names = ("winner_model_a", "winner_model_b", "winner_tie")
            file.write(json.dumps(cells | dict(zip(names, label.tolist(), strict=True))) + "\n")


def digests(recipe: Recipe, base: Path) -> dict[str, str]:
    task, cache = task_of(recipe), Path(recipe.data.cache)
    data = prepare_fold(recipe, task, 1, load_tokenizer(str(base)))
    prefixes = prefixes_for(data.store, recipe.packing, cache)
    assert prefixes is not None and data.targets is not None and data.groups is not None
    examples = data.eval_rows * 2
    evaluation = plan_evaluation(data.store.lengths, examples, budget=512, prefixes=prefixes)
    folds = load_or_assign_folds(data.rows, 3, recipe.data.fold_seed, cache)
    tokens = [data.store[at].tobytes() for at in range(len(data.store))]
    return {
        "folds": fingerprint(folds.tobytes()), "ids": fingerprint(list(data.ids)), "tokens": fingerprint(*tokens),
        "groups": fingerprint(data.groups.astype(np.int64).tobytes()), "targets": fingerprint(data.targets.tobytes()),
        "rank": fingerprint(prefixes.rank.tobytes()), "shared": fingerprint(prefixes.shared[0].tobytes()),
        "identity": data.trained_on, "plan": plan_fold(recipe, data, prefixes=prefixes).fingerprint,
        "evaluation": evaluation.fingerprint,
    }  # fmt: skip


@pytest.mark.parametrize("few", [2**16, 16, 2])
def test_the_same_as_ever(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    """However many examples are sorted at once."""
    monkeypatch.setattr(tree, "FEW", few, raising=False)
    write_rows(tmp_path / "train.jsonl")
    recipe = change(tiny_recipe(tmp_path, gemma2), [f"data.path={tmp_path / 'train.jsonl'}", "packing.group=true"])
    assert digests(recipe, gemma2) == PINNED
