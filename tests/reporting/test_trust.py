"""A judge on labelled rows of others: what it is told by rows whose answers a simple judge decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from arena import Judge
from arena.inference.verdicts import Verdicts
from arena.reporting.trust import notes, tables, trust
from arena.tasks.probes import OFF_TOPIC, PROBES, SAME, TWICE, make_probes
from tests.helpers import arena, status_of_arena, tiny_recipe
from tests.inference.test_judge_model import saved


@pytest.fixture(scope="module")
def folder(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    saved(folder / "runs/tiny/fold0", tiny_recipe(folder, gemma2))
    return folder


class Longest(Judge):
    """Prefers the longer answer with a probability of 0.9, and the one shown first if they are as long."""

    def verdicts(self, rows: object, parts: Path | None = None) -> Verdicts:
        table = self._checked(rows).table  # type: ignore[arg-type]
        sizes = np.array(
            [[len("".join(text or "" for text in row[name])) for name in ("response_a", "response_b")] for row in table]
        )
        a, b = sizes.reshape(-1, 2).T
        straight = np.where((a >= b)[:, None], [0.9, 0.05, 0.05], [0.05, 0.9, 0.05])
        swapped = np.where((a > b)[:, None], [0.9, 0.05, 0.05], [0.05, 0.9, 0.05])
        return Verdicts((straight + swapped) / 2, np.stack([straight, swapped]), 0, 0)

    def predict_proba(self, rows: object) -> np.ndarray:
        return self.verdicts(rows).mean


def test_biases_are_found(folder: Path, tmp_path: Path) -> None:
    """Of a judge that prefers the longer answer, on labels that do so in one of four rows."""
    rows = pd.DataFrame(
        {"id": range(8), "prompt": [f'["question {at}"]' for at in range(8)], "response_a": '["short one"]',
         "response_b": ['["the longer one"]'] * 6 + ['["other one"]'] * 2}
    )  # fmt: skip
    for at, name in enumerate(("winner_model_a", "winner_model_b", "winner_tie")):
        rows[name] = [int(label == at) for label in (1, 1, 0, 0, 0, 0, 2, 0)]
    rows.to_csv(tmp_path / "votes.csv", index=False)
    judge = Longest(Judge.from_pretrained(folder / "runs/tiny")._parts)
    found = trust(judge, tmp_path / "votes.csv", probes=5)
    scores = {name: score.value for name, score in found.scores.items()}
    assert scores["longer"] == pytest.approx(0.925) and scores["longer_label"] == pytest.approx(2 / 6)
    assert scores["flip_rate"] == pytest.approx(2 / 8) and scores["accuracy"] == pytest.approx(3 / 8)
    assert scores["agreement_without_ties_base_rate"] == pytest.approx(5 / 7)
    assert found.probes[TWICE].value == pytest.approx(0.075) and found.probes[TWICE].rows == 5
    assert found.probes[SAME].value == pytest.approx(0.05)
    assert [note.split(": ")[1][:30] for note in notes([found])] == [
        "the judge is worse than the me",
        "the judge expects the longer a",
    ]
    (_, _, cells), (_, _, pairs) = tables([found])
    assert dict(cells)["the longer answer wins"].startswith("0.925 (0.925 to ") and len(pairs) == len(PROBES)


def test_probes_keep_the_preferred_answer(folder: Path) -> None:
    rows = {"prompt": [["one"], ["two", "more"], ["one"]], "response_a": [["a"], ["c", None], [""]],
            "response_b": [["b"], ["d", "e"], [None]]}  # fmt: skip
    probes = make_probes(rows, np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]]), ["one", "two", "one"])
    assert probes[OFF_TOPIC] == [
        (0, {"prompt": ["one"], "response_a": ["a"], "response_b": ["e"]}),
        (1, {"prompt": ["two", "more"], "response_a": ["d", "e"], "response_b": ["d", "a"]}),
    ]
    assert probes[TWICE][1][1]["response_b"] == ["d", "e\n\ne"] and probes[SAME][0][1]["response_b"] == ["a"]


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    arena(monkeypatch, "evaluate", "tiny", "rows/train.csv", "--probes", "4", "--out", "trust.md")
    shown = capsys.readouterr().out
    assert "train.csv" in shown and "the same answer twice" in shown
    judge = Judge.from_pretrained(folder / "runs/tiny")
    rows = judge.read("rows/train.csv", labelled=True)
    loss = -(rows.labels * np.log(judge.predict_proba(rows))).sum(axis=1).mean()
    assert f"| log-loss | {loss:.3f} (" in (folder / "trust.md").read_text()
    assert status_of_arena(monkeypatch, "evaluate", "tiny") == 2
    assert "name a judge and labelled files, such as `arena evaluate demo data/votes.csv`" in capsys.readouterr().out
    assert status_of_arena(monkeypatch, "evaluate", "tiny", "rows/test.csv") == 2
    assert "winner_model_a: is missing; labelled rows need" in capsys.readouterr().out
