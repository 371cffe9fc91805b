"""The leaderboard: ratings that simulated votes were drawn from, their intervals, style, and files of votes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from arena.reporting import ratings
from arena.reporting.leaderboard import SCALE, Leaderboard, rated, write_leaderboard
from arena.reporting.ratings import Comparisons, fit
from tests.helpers import arena

TRUE = np.linspace(-1.0, 1.0, 5)  # strengths
NAMES = tuple("abcde")


def simulated(seed: Any, groups: int, each: int, copies: int = 1) -> Comparisons:
    """Votes with ties on `groups` prompts, `each` a prompt, of which each is cast `copies` times."""
    rng, n = np.random.default_rng(seed), groups * each
    a = rng.integers(0, len(TRUE), n)
    b = (a + rng.integers(1, len(TRUE), n)) % len(TRUE)
    wins = 1 / (1 + np.exp(TRUE[b] - TRUE[a]))
    tie, drawn = 0.3 * np.minimum(wins, 1 - wins), rng.random(n)
    points = np.where(drawn < wins - tie, 1.0, np.where(drawn < wins + tie, 0.5, 0.0))
    prompts = np.repeat(np.arange(groups), each).astype(str)
    columns = [np.repeat(column, copies) for column in (a, b, points, prompts)]
    return Comparisons(NAMES, *columns[:3], columns[3].tolist(), (), np.zeros((n * copies, 0)))


def by_model(board: Leaderboard) -> np.ndarray:
    """Rating, low and high of each model, (models, 3), in the order of their names."""
    return np.array([(each.rating, each.low, each.high) for each in sorted(board.standings, key=lambda s: s.model)])


def covered(simulations: int, copies: int, rounds: int, *, by_row: bool = False) -> np.ndarray:
    """The share of intervals that hold the true rating, by model."""
    found = []
    for seed in range(simulations):
        votes = simulated([7, seed], 200, 2, copies)
        if by_row:
            votes = replace(votes, groups=[str(at) for at in range(len(votes.a))])
        _, low, high = by_model(rated(votes, rounds=rounds)).T
        true = 1000 + SCALE * TRUE
        found.append((low <= true) & (true <= high))
    return np.mean(found, axis=0)


def test_the_ratings_that_votes_were_drawn_from_are_found() -> None:
    votes = simulated(0, 4000, 5)
    board = rated(votes, rounds=40)
    np.testing.assert_allclose(by_model(board)[:, 0], 1000 + SCALE * TRUE, atol=12)
    assert [each.model for each in board.standings] == list("edcba")
    assert [each.rank for each in board.standings] == [1, 2, 3, 4, 5] and not board.notes
    decided = votes.points != 0.5  # a control: without the ties, wins are more frequent
    a, b, points, groups = (np.array(each)[decided] for each in (votes.a, votes.b, votes.points, votes.groups))
    wrong = Comparisons(NAMES, a, b, points, groups.tolist(), (), votes.style[decided])
    assert np.abs(by_model(rated(wrong, rounds=40))[:, 0] - 1000 - SCALE * TRUE).max() > 24


def test_the_fit_is_that_of_a_logistic_regression() -> None:
    """Of each vote's points as a weighted win and defeat, with a tie of each model against 0."""
    votes = simulated(1, 30, 2)
    rows = np.vstack([np.eye(5)[votes.a] - np.eye(5)[votes.b], np.eye(5)])
    points = np.concatenate([votes.points, np.full(5, 0.5)])
    for ties, close in ((1.0, True), (0.5, False)):
        weights = np.concatenate([np.ones(len(votes.a)), np.full(5, ties)])
        model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000)
        each = np.concatenate([points * weights, (1 - points) * weights])
        (expected,) = model.fit(np.vstack([rows, rows]), np.repeat([1, 0], len(rows)), each).coef_
        assert np.allclose(fit(votes, 1)[0], expected - expected.mean(), atol=1e-5) == close


def test_intervals_hold_the_true_ratings_if_votes_are_drawn_by_prompt() -> None:
    assert 0.9 < covered(30, copies=3, rounds=400).mean() < 0.99
    assert covered(30, copies=3, rounds=400, by_row=True).mean() < 0.85


@pytest.mark.slow
def test_95_intervals_in_100_hold_the_true_rating() -> None:
    shares = covered(200, copies=1, rounds=1000)
    assert 0.92 < shares.mean() < 0.98
    assert shares.min() > 0.9 and shares.max() < 1  # of single models, by three standard errors


def styled(seed: int) -> tuple[Comparisons, np.ndarray]:
    """Votes between equal models, of which the last writes longer, and longer answers win; and the true weight."""
    votes = simulated(seed, 1000, 5)
    rng = np.random.default_rng(seed)
    longer = 0.4 * ((votes.a == 4).astype(float) - (votes.b == 4)) + rng.normal(0, 0.4, len(votes.a))
    points = (rng.random(len(votes.a)) < 1 / (1 + np.exp(-2.0 * longer))).astype(float)
    style = np.column_stack([longer, np.zeros_like(longer)])
    return replace(votes, points=points, features=("length", "headers"), style=style), 2.0 * np.sqrt(np.mean(longer**2))


def test_style_control_takes_off_what_length_gives() -> None:
    votes, weight = styled(2)
    board = rated(votes, rounds=100)
    assert list(board.style) == ["length"]  # no headers differ
    assert board.style["length"].value == pytest.approx(weight, abs=0.05)
    low, high = board.style["length"].low, board.style["length"].high
    assert low is not None and high is not None and low < weight < high
    np.testing.assert_allclose(by_model(board)[:, 0], 1000, atol=15)
    without = by_model(rated(replace(votes, features=(), style=votes.style[:, :0]), rounds=40))
    assert without[4, 0] > 1080


def test_exchanging_a_and_b_changes_nothing() -> None:
    votes, _ = styled(3)
    swapped = replace(votes, a=votes.b, b=votes.a, points=1 - votes.points, style=-votes.style)
    np.testing.assert_allclose(by_model(rated(swapped, rounds=40)), by_model(rated(votes, rounds=40)), rtol=1e-12)
    half = replace(votes, a=votes.b, b=votes.a)  # a control: models alone
    assert not np.allclose(by_model(rated(half, rounds=40)), by_model(rated(votes, rounds=40)), rtol=0.01)


def test_models_that_only_won_or_that_nothing_connects_are_named_and_finite() -> None:
    a, b, points = np.array([[0, 1, 1], [0, 2, 1], [1, 2, 0.5], [3, 4, 0.5]]).repeat(20, axis=0).T
    groups = [str(at) for at in range(len(a))]
    votes = Comparisons(NAMES, a.astype(int), b.astype(int), points, groups, (), np.zeros((80, 0)))
    board = rated(votes, rounds=40)
    assert "no vote limits the distance from the others of a, d, e:" in board.notes[0]
    assert np.isfinite(by_model(board)).all() and by_model(board)[:, 0].max() < 2000
    assert board.standings[0].model == "a" and board.standings[0].win_rate == 1


def test_intervals_are_the_middle_of_the_resamples_however_they_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    votes = simulated(4, 20, 3)
    _, low, high = by_model(rated(votes, rounds=400)).T
    monkeypatch.setattr(ratings, "AT_ONCE", 7 * 25)  # seven at a time
    drawn = 1000 + SCALE * fit(votes, 400)[1]
    assert ((drawn < low).sum(axis=0) == 10).all() and ((drawn > high).sum(axis=0) == 10).all()


def write(folder: Path) -> tuple[Path, Path]:
    """Ninety votes and five rows that are none, and a file with the same labels as predictions."""
    votes, path = simulated(5, 30, 3), folder / "votes.jsonl"
    rows: list[dict[str, Any]] = [
        {
            "id": str(at), "prompt": f"prompt {group}", "response_a": "x" * (5 + a), "response_b": "- x\n" * (1 + b),
            "model_a": NAMES[a], "model_b": NAMES[b], "winner": {1.0: "model_a", 0.0: "model_b"}.get(points, "tie"),
        }
        for at, (a, b, points, group) in enumerate(zip(votes.a, votes.b, votes.points, votes.groups, strict=True))
    ]  # fmt: skip
    rows += [rows[0] | {"id": f"none {at}", "model_a": None} for at in range(3)]
    rows += [rows[0] | {"id": f"same {at}", "model_a": "a", "model_b": "a"} for at in range(2)]
    path.write_text("\n".join(map(json.dumps, rows)))
    labels = pd.DataFrame(
        [[row["id"], *(float(row["winner"] == name) for name in ("model_a", "model_b", "tie"))] for row in rows]
    )
    labels.columns = pd.Index(["id", "winner_model_a", "winner_model_b", "winner_tie"])
    labels.to_csv(folder / "same.csv", index=False)
    return path, folder / "same.csv"


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path, same = write(tmp_path)
    words = ["leaderboard", path.name, "--rounds", "60", "--style"]
    arena(monkeypatch, *words, "--out", "board.csv", "--anchor", "c=1200")
    shown = capsys.readouterr().out
    assert "90 votes on 30 prompts" in shown and "lists" in shown and "headers" not in shown
    assert "3 of 95 rows do not name both models" in shown and "2 of 95 rows compare a model with itself" in shown
    table = pd.read_csv("board.csv")
    assert list(table.columns) == ["rank", "model", "rating", "low", "high", "votes", "win_rate"]
    assert table["votes"].sum() == 180 and table.set_index("model").loc["c", "rating"] == pytest.approx(1200)
    assert all(f"{rating:,.0f}" in shown for rating in table["rating"])

    arena(monkeypatch, *words, "--out", "same.md", "--predictions", same.name)
    arena(monkeypatch, *words, "--out", "board.md")
    assert Path("same.md").read_text() == Path("board.md").read_text()
    assert "| rank | model | rating | low | high | votes | win rate |\n| --- |" in Path("board.md").read_text()

    soft = pd.read_csv(same).tail(60)
    soft[["winner_model_a", "winner_model_b", "winner_tie"]] = 0.2, 0.7, 0.1
    soft.to_csv("soft.csv", index=False)
    arena(monkeypatch, *words, "--out", "soft.md", "--predictions", "soft.csv")
    assert "35 of 95 rows have no prediction" in Path("soft.md").read_text()
    assert Path("soft.md").read_text() != Path("board.md").read_text()


def test_names_cannot_break_out_of_a_table(tmp_path: Path) -> None:
    votes = replace(simulated(6, 20, 2), models=("a|b", "<b>", "c\nd", "[red]", "\x1b[1m"))
    write_leaderboard(tmp_path / "board.md", rated(votes, rounds=40))
    lines = (tmp_path / "board.md").read_text().splitlines()
    cells = {line.split(" | ")[1] for line in lines if line.startswith("| ")}
    assert cells == {"model", "---", "a\\|b", "&lt;b&gt;", "c d", "[red]", "\\x1b[1m"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the files of votes"),
        (["votes.jsonl", "--rounds", "5"], "--rounds 5 gives no intervals: ask for 40 or more"),
        (["votes.jsonl", "--anchor", "c"], "--anchor c: write a model and its rating"),
        (["votes.jsonl", "--anchor", "c=nan"], "--anchor c=nan: write a model and its rating"),
        (["votes.jsonl", "--anchor", "f=1"], "--anchor: there is no model f; name one such as a, b, c, d, e"),
        (["votes.jsonl", "--out", "board.html"], "name a file that ends in .csv, .md"),
        (["votes.jsonl", "--predictions", "none.csv"], "there is no file none.csv"),
        (["none.csv"], "none.csv, the file, any row: cannot be read (No such file or directory)"),
        (["one.jsonl"], "all votes are about one prompt"),
        (["same.jsonl"], "no votes are left: 2 of 2 rows compare a model with itself. The columns model_a and model_b"),
    ],
)
def test_mistakes_are_named(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = write(tmp_path)[0].read_text().splitlines()
    Path("one.jsonl").write_text("\n".join(lines[:3]))
    Path("same.jsonl").write_text("\n".join(lines[-2:]))
    with pytest.raises(SystemExit):
        arena(monkeypatch, "leaderboard", *words)
    assert message in capsys.readouterr().out.replace("\n", " ")
    assert not list(tmp_path.glob("board.*"))
