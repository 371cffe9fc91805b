"""Judges from Python: rows in memory, rankings, explanations, several models, threads."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from arena import Judge
from arena.config import change
from arena.data.records import BadRecordsError
from arena.inference.blend import Blend, Member, SavedBlend, save_blend
from arena.inference.infer import infer
from arena.inference.kinds import Kind
from arena.inference.verdicts import strengths
from arena.model import tuning
from tests.helpers import tiny_recipe
from tests.inference.test_judge_model import saved

ROW = {"prompt": "What is 2 + 2?", "response_a": "It is 4.", "response_b": "I believe that it is five."}
TEXTS = ("prompt", "response_a", "response_b")
KINDS = (Kind("A empty", 41, (0.02, 0.93, 0.05)),)


@pytest.fixture(scope="module")
def run(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two folds, on the rows of `rows`."""
    folder = tmp_path_factory.mktemp("judge")
    recipe = tiny_recipe(folder, gemma2, "packing.budget=4096")
    for fold in range(2):
        saved(folder / "run" / f"fold{fold}", recipe, seed=fold, kinds=KINDS)
    return folder / "run"


@pytest.fixture(scope="module")
def judge(run: Path) -> Judge:
    return Judge.from_pretrained(run)


@pytest.fixture
def table(run: Path) -> pd.DataFrame:
    return pd.read_csv(run.parent / "rows/train.csv", dtype={"id": str}).head(12)


def test_it_says_what_infer_writes(judge: Judge, run: Path, tmp_path: Path) -> None:
    """To the bit for the same micro-batches, in whatever form the rows are; the written digits are nine."""
    test, out = run.parent / "rows/test.csv", tmp_path / "out.csv"
    models = [run / f"fold{fold}" / "model" for fold in range(2)]
    infer(models, str(test), out)
    rows = pd.read_csv(test, dtype={"id": str})
    found = judge.predict_proba(rows)
    np.testing.assert_allclose(found, pd.read_csv(out).iloc[:, 1:].to_numpy(), atol=1e-9)
    arrays = {name: [np.array(json.loads(cell), dtype=object) for cell in rows[name]] for name in TEXTS}
    lists = rows.assign(**arrays)
    forms = rows.to_dict("records"), Dataset.from_pandas(rows), iter(rows.to_dict("records")), judge.read(test), lists
    for form in forms:
        assert np.array_equal(judge.predict_proba(form), found)
    alone = [Judge.from_pretrained(model).predict_proba(rows) for model in models]
    np.testing.assert_allclose(np.mean(alone, axis=0), found, rtol=1e-14)
    assert not np.allclose(*alone, atol=1e-3)
    assert judge.predict(rows).tolist() == [judge.classes_[at] for at in found.argmax(axis=1)]


def test_one_row_is_explained(judge: Judge, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = judge.explain(ROW)
    assert list(found.probabilities) == ["A", "B", "tie"]
    assert list(found.probabilities.values()) == judge.predict_proba(ROW)[0].tolist()
    in_orders = judge.predict_orders(ROW)[:, 0]
    assert [list(order.probabilities.values()) for order in found.orders] == in_orders.tolist()
    straight, swapped = (order.prompt for order in found.orders)
    assert straight.index("It is 4.") < straight.index("it is five")
    assert swapped.index("it is five") < swapped.index("It is 4.")
    assert found.flips == (len(set(in_orders.argmax(axis=1))) > 1) and found.is_read and found.kind is None
    assert found.tokens < sum(order.tokens for order in found.orders)  # the common beginning counts once
    long = judge.explain({**ROW, "response_b": "word " * 400})
    assert [order.tokens_cut > 0 for order in long.orders] == [True, True] and found.orders[0].tokens_cut == 0
    empty = judge.explain({**ROW, "response_a": ""})
    assert empty.kind == "A empty" and empty.probabilities["B"] > found.probabilities["B"]
    unread = judge.explain({**ROW, "response_a": " ", "response_b": ""})
    assert not unread.is_read and list(unread.probabilities.values()) == pytest.approx([0.3, 0.3, 0.4])
    assert capsys.readouterr().out == ""


def test_answers_are_ranked_by_all_pairs(judge: Judge) -> None:
    """The wins are the pairs' probabilities, and the strengths explain them."""
    prompt, answers = ["Hello!", "Name a colour."], [["Hi.", "Blue."], ["Hi.", "Red, I would say."], ["Hello", None]]
    found = judge.rank(prompt, answers)
    rows = [{"prompt": prompt, "response_a": a, "response_b": b} for a, b in combinations(answers, 2)]
    pairs = judge.predict_proba(rows)
    assert [*found.wins[0, 1:].tolist(), found.wins[1, 2]] == (pairs[:, 0] + pairs[:, 2] / 2).tolist()
    np.testing.assert_allclose(found.wins + found.wins.T, 1)
    assert found.order.tolist() == np.argsort(-found.strengths).tolist()
    won = 1 / (1 + np.exp(found.strengths - found.strengths[:, None]))  # the likelihood's maximum: as many wins
    np.testing.assert_allclose(won.sum(axis=1), found.wins.sum(axis=1), atol=1e-6)
    assert found.tokens < 0.8 * found.logical_tokens
    blank = judge.rank("Name a colour.", iter(["", "Red.", " "]))
    assert blank.wins[0, 2] == blank.wins[2, 0] == 0.5 and blank.wins[0, 1] != 0.5


def test_texts_are_plain_unless_all_are_lists(judge: Judge) -> None:
    """Each row for itself: an answer may begin like JSON."""
    rows = [{**ROW, "response_a": text} for text in ('{"a": 1}', "[see here](x)", '["a", "b"]', "", None)]
    written = [{name: [text or None] for name, text in row.items()} for row in rows]
    assert np.array_equal(judge.predict_proba(rows), judge.predict_proba(written))
    assert np.array_equal(judge.predict_proba(rows[:1])[0], judge.predict_proba(written[:1])[0])
    as_lists = {name: json.dumps([text]) for name, text in ROW.items()}
    np.testing.assert_allclose(judge.predict_proba([as_lists]), judge.predict_proba([ROW]), atol=1e-12)


def test_strengths_are_those_that_made_the_wins() -> None:
    true = np.array([1.5, -0.5, 0.25, -1.25])
    wins = 1 / (1 + np.exp(true - true[:, None]))
    np.testing.assert_allclose(strengths(wins), true, atol=1e-6)
    assert np.abs(strengths(wins.T) - true).max() > 1  # the control: who lost
    sure = np.where(true[:, None] > true, 1 - 1e-4, 1e-4) * (1 - np.eye(4)) + 0.5 * np.eye(4)
    found = strengths(sure)
    won = 1 / (1 + np.exp(found - found[:, None]))
    np.testing.assert_allclose(won.sum(axis=1), sure.sum(axis=1), atol=1e-8)
    certain = strengths((true[:, None] > true) + 0.5 * np.eye(4))
    assert np.isfinite(certain).all() and np.argsort(certain).tolist() == np.argsort(true).tolist()


def test_eight_answers_share_most_of_their_tokens(judge: Judge) -> None:
    """28 pairs in both orders: at most 0.55 of the tokens of their prompts."""
    texts = [
        f"{name} words of an answer " * 4 for name in ("one", "two", "three", "four", "five", "six", "seven", "ate")
    ]
    found = judge.rank("A question of some words, which all pairs have in common. " * 3, texts)
    assert found.tokens <= 0.55 * found.logical_tokens


def test_scores_and_flips(judge: Judge, table: pd.DataFrame) -> None:
    labels = table[["winner_model_a", "winner_model_b", "winner_tie"]].to_numpy()
    right = labels.argmax(axis=1) == judge.predict_proba(table).argmax(axis=1)
    assert judge.score(table) == pytest.approx(right.mean())
    straight, swapped = judge.predict_orders(table).argmax(axis=2)
    assert judge.position_flip_rate(table) == (straight != swapped).mean()


def test_a_blend_judges_as_it_was_fitted(judge: Judge, run: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    """Also with a baseline, which is fitted once; a member without weight is left out."""
    members = (
        Member("run", "run", str(run)), Member("baseline", "baseline", str(run.parent / "rows/train.csv")),
        Member("other", "file", "nowhere.csv"),
    )  # fmt: skip
    for at, weights in enumerate(((0.7, 0.4, 0.0), (0.7, 0.0, 0.3))):
        save_blend(
            tmp_path / f"{at}.json", SavedBlend("preference", members, Blend("log", weights, 1.0, (0.1, -0.1, 0)), {})
        )
    blended = Judge.from_pretrained(tmp_path / "0.json")
    infer_free = Judge.from_pretrained(run, settings=["judge.kinds=false"]).predict_proba(table)
    bare = Blend("log", (1.0, 0.0, 0.0), 1.0, (0, 0, 0))
    save_blend(tmp_path / "bare.json", SavedBlend("preference", members, bare, {}))
    np.testing.assert_allclose(
        Judge.from_pretrained(tmp_path / "bare.json").predict_proba(table), infer_free, atol=1e-12
    )
    assert not np.allclose(blended.predict_proba(table), infer_free, atol=1e-2)
    np.testing.assert_allclose(blended.predict_proba(table).sum(axis=1), 1)
    with pytest.raises(ValueError, match="needs a file of predictions, other: blend runs only"):
        Judge.from_pretrained(tmp_path / "1.json")
    with pytest.raises(ValueError, match="is a blend, which is a whole judge: name it alone"):
        Judge.from_pretrained(tmp_path / "0.json", run)


def test_a_base_is_loaded_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []
    monkeypatch.setattr(tuning, "load_base", lambda *given, real=tuning.load_base: loaded.append(1) or real(*given))
    both = Judge.from_pretrained(run / "fold0", run / "fold1" / "model")
    assert len(both.models) == 2 and len(loaded) == 1


def test_judges_beside_others_share_their_base(run: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "load_base", lambda *given: pytest.fail("the base is loaded again"))
    first = judge.predict_proba(ROW)
    beside = Judge.from_pretrained(run / "fold1", beside=[judge])
    assert beside.models[0].shares_base(judge.models[0])
    np.testing.assert_array_equal(
        beside.predict_proba(ROW), judge.models[1].in_memory(judge._checked(ROW)).by_order.mean(0)
    )
    np.testing.assert_array_equal(judge.predict_proba(ROW), first)


def test_rows_are_explained_together(judge: Judge, table: pd.DataFrame) -> None:
    found = judge.explain_all(table, prompts=False)
    assert [list(each.probabilities.values()) for each in found] == judge.predict_proba(table).tolist()
    assert len({(each.tokens, each.logical_tokens) for each in found}) == 1 and found[0].orders[1].prompt == ""
    assert found[0].tokens < found[0].logical_tokens == sum(order.tokens for each in found for order in each.orders)


def test_threads_take_turns(judge: Judge, table: pd.DataFrame) -> None:
    """Two models on one base: each call gets its own rows' probabilities, with the right weights active."""
    parts = [table.iloc[at : at + 3] for at in range(0, 12, 3)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(judge.predict_proba, parts))
    for part, each in zip(parts, found, strict=True):
        np.testing.assert_allclose(each, judge.predict_proba(part), atol=1e-12)


def test_a_row_of_a_data_frame_is_a_row(judge: Judge) -> None:
    turns = {"prompt": ["Hi", "And?"], "response_a": ["Yes", None], "response_b": ["No", "Why?"]}
    for row in (ROW, turns):
        series = pd.DataFrame([row]).iloc[0]
        assert judge.predict_proba(series).tolist() == judge.predict_proba([row]).tolist()
        assert judge.explain(series) == judge.explain([series]) == judge.explain(row)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ({"prompt": "Hi", "response_a": "Yes"}, "row 0, response_b: is missing; the columns found are"),
        ([ROW, {**ROW, "response_a": 7}], r"row 1, response_a: is 7, not a text"),
        ([{**ROW, "response_b": 1}, {**ROW, "prompt": 2}], r"row 0 \(and 1 other\), response_b: is 1"),
        ([ROW, "text"], 'row 1 is "text": give a dict of its columns'),
        ({name: [text] for name, text in ROW.items()}, "a dict of lists is given: put it into a list if they are the"),
        (pd.DataFrame([[1, 2]]), "the data frame has the column 0: give each column a text as its name"),
        ("text", 'rows is "text": give dicts, a data frame or a data set'),
        (None, "rows is null: give dicts"),
        (pd.Series(["Hi"]), "row 0 is a Series: give a dict of its columns"),
    ],
)
def test_bad_rows_are_named(judge: Judge, rows: object, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        judge.predict_proba(rows)  # type: ignore[arg-type]


def test_what_cannot_be_asked(judge: Judge, run: Path) -> None:
    with pytest.raises(BadRecordsError, match="row 0, winner_model_a: is missing") as caught:
        judge.score([ROW])
    assert [number for number, _ in caught.value.problems] == [0]
    for use, what in (
        (lambda: judge.rank("Hi", ["one"]), "two or more answers"),
        (lambda: judge.rank("Hi", "one"), "two or more answers"),
        (lambda: judge.explain([ROW, ROW]), "2 rows are given: explain one"),
        (lambda: judge.position_flip_rate([]), "no row can flip: none has anything to read"),
        (lambda: judge.rank("Hi", {"m": "a", "n": "b"}), "two or more answers"),
        (lambda: Judge.from_pretrained(), "name a judge"),
        (lambda: Judge(str(run)), r"write arena\.Judge\.from_pretrained\("),
        (lambda: Judge.from_pretrained(run / "fold7"), "there is no run, recipe or folder"),
    ):
        with pytest.raises(ValueError, match=what):
            use()
    single = Judge.from_pretrained(run / "fold0", settings=["judge.swap=false"])
    assert single.predict_orders(ROW).shape == (1, 1, 3)
    with pytest.raises(ValueError, match=r"reads one order: set judge\.swap=true"):
        single.position_flip_rate([ROW])
    with pytest.raises(ValueError, match="cannot be compared fairly: this judge reads one order"):
        single.rank("Hi", ["one", "two"])
    assert change(single.models[0].recipe, []).judge.swap is False
    assert judge.predict_proba([]).shape == (0, 3)
