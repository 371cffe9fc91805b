"""What ranks share is timed by real ranks, and the rows are those of training's evaluation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers import write_rows
from tests.training.ranks import forking

CODE = """
from benchmarks import ranks as measuring
measuring.ROUNDS = 1
shares = []
plain = measuring.Evaluation.probabilities
def told(self, classifier, **options):
    shares.append("accelerator" in options)
    return plain(self, classifier, **options)
measuring.Evaluation.probabilities = told
measuring.main()
print("alone and shared:", shares)
"""


def test_an_evaluation_is_timed_by_one_rank_and_by_all(gemma2: Path, tmp_path: Path) -> None:
    settings = [
        f"model.base={gemma2}", f"data.path={write_rows(tmp_path / 'rows')}", f"data.cache={tmp_path / 'cache'}",
        "data.synthetic_rows=null", "data.folds=3", "prompt.max_length=128", "packing.budget=512",
        "model.quantization=none",
    ]  # fmt: skip
    with forking(tmp_path) as ranks:
        assert ranks.ends(ranks.start(2, "evaluation", *settings, code=CODE)) == [0, 0], ranks.shown(0)
        shown = ranks.shown(0)
        assert re.search(
            r"^2 processes of \d+ threads on .*: \d+ micro-batches of 20 held-out rows, 1 rounds$", shown, re.M
        )
        one, every, ratio = map(
            float, re.findall(r"one process ([\d.]+) s, by all ([\d.]+) s.*\nratio ([\d.]+);", shown)[0]
        )
        assert ratio == pytest.approx(every / one, abs=0.1) and one > 0
        assert "alone and shared: [False, True, False, True]" in shown
        assert "alone and shared: [True, True]" in ranks.shown(1), "it waits while the first one works alone"
        assert ranks.ends(ranks.start(1, "evaluations", code=CODE)) == [1]
        assert "say what to time, gradients or evaluation, not 'evaluations'" in ranks.shown(0)
        assert ranks.ends(ranks.start(1, "evaluation", *settings, code=CODE)) == [1]
        assert "start several processes" in ranks.shown(0)
