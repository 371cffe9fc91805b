"""What is learned of special rows, and what of it is taken."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from arena.data.prepare import FoldData
from arena.inference.kinds import PSEUDO_COUNT, Kind, with_kinds
from arena.training.fit_kinds import LEAST, fit_kinds, kind_table, taken
from tests.helpers import PREFERENCE, rows_of

A, B, TIE = np.eye(3)
EVEN = np.full(3, 1 / 3)
TEXTS = {
    "A empty": ("", "yes"), "B empty": ("no", " "), "both empty": ("", ""), "same": ("x", "x"), "": ("good", "bad"),
}  # fmt: skip
Row = tuple[str, np.ndarray]  # the kind, and the label


def fold(train: list[Row], held_out: list[Row], prompts: int | None = None) -> FoldData:
    """A fold of rows; the held-out ones have their own prompts, or share a number of them."""
    rows = [*train, *held_out]
    turns = {name: [[TEXTS[kind][at]] for kind, _ in rows] for at, name in enumerate(("response_a", "response_b"))}
    shared = [[f"prompt {at % (prompts or len(rows))}"] for at in range(len(rows))]
    found = rows_of(Dataset.from_dict({"id": [str(at) for at in range(len(rows))], "prompt": shared, **turns}))
    labels, is_train = np.array([label for _, label in rows]), np.arange(len(rows)) < len(train)
    return FoldData(
        rows=found, ids=found.ids, labels=labels, store=None,  # type: ignore[arg-type]
        train_rows=np.flatnonzero(is_train & found.has_input), eval_rows=np.flatnonzero(~is_train),
        has_input=found.has_input, prior=EVEN, fingerprint="", trained_on="", notes=[],
        omitted=np.flatnonzero(is_train & ~found.has_input),
    )  # fmt: skip


def drawn(kind: str, count: int, chances: np.ndarray, seed: int = 0) -> list[Row]:
    return [(kind, np.eye(3)[at]) for at in np.random.default_rng(seed).choice(3, count, p=chances)]


LOST: list[Row] = [*[("A empty", B)] * 20, *[("B empty", A)] * 10]


def test_rows_that_always_lose_are_learned_and_taken_with_their_mirror_image() -> None:
    data = fold([*LOST, *drawn("", 50, EVEN)], [*LOST, *drawn("", 50, EVEN, 1)])
    found = fit_kinds(data, np.tile(EVEN, (80, 1)))
    assert taken(found) == (Kind("A empty", 30, (0, 1, 0)), Kind("B empty", 30, (1, 0, 0)))
    expected = np.log((30 + PSEUDO_COUNT / 3) / (30 + PSEUDO_COUNT) * 3)
    for each in kind_table(found).values():
        assert (each["train_rows"], each["held_out_rows"], each["taken"]) == (30, 30, True)
        assert each["gain"] == pytest.approx(expected) and each["standard_error"] < 1e-9


@pytest.mark.parametrize("chances", [(0.5, 0.3, 0.2), (0.04, 0.9, 0.06)])
def test_what_the_judge_knows_already_is_not_taken(chances: tuple[float, ...]) -> None:
    """Control: of a judge that is wrong about the same rows it is."""
    data = fold(drawn("A empty", 40, np.array(chances)), drawn("A empty", 100, np.array(chances), 1))
    assert not taken(fit_kinds(data, np.tile(chances, (100, 1))))
    wrong = fit_kinds(data, np.tile(np.roll(chances, 1), (100, 1)))
    assert [each.name for each in taken(wrong)] == ["A empty", "B empty"]


def test_a_gain_within_its_standard_error_is_not_taken() -> None:
    for others, is_taken in ((8, False), (1, True)):
        data = fold(LOST, [*[("A empty", B)] * 13, *[("A empty", A)] * others])
        found = fit_kinds(data, np.tile(EVEN, (13 + others, 1)))[0]
        assert found.gain is not None and found.gain > 0 and found.taken == is_taken


@pytest.mark.parametrize(("prompts", "is_taken"), [(LEAST, True), (LEAST - 1, False)])
def test_few_prompts_are_too_few_however_many_rows(prompts: int, is_taken: bool) -> None:
    assert bool(taken(fit_kinds(fold(LOST, LOST, prompts), np.tile(EVEN, (30, 1))))) == is_taken


def test_rows_without_input_are_always_taken_and_equal_answers_count_once() -> None:
    data = fold([*[("both empty", TIE)] * 4, ("same", A), ("same", TIE)], [("", A)])
    both, same = fit_kinds(data, EVEN[None])
    assert (both.kind, both.taken, both.gain) == (Kind("both empty", 4, (0, 0, 1)), True, None)
    assert (same.kind, same.taken) == (Kind("same answers", 2, (0.25, 0.25, 0.5)), False)
    assert fit_kinds(fold([("", A)], [("", A)]), EVEN[None]) == []


def test_rows_of_extra_files_count_as_others_do() -> None:
    data = fold([("", A)], [("", A)])
    more = fold([("A empty", B)], [])
    joined = FoldData(
        **{**vars(data), "extra": (more.rows,), "labels": np.concatenate([data.labels, more.labels])}
        | {"train_rows": np.array([0, 2]), "has_input": np.ones(3, dtype=bool)}
    )
    assert [each.kind.rows for each in fit_kinds(joined, EVEN[None])] == [1, 1]


def test_predictions_are_drawn_to_the_mean_and_exchanged_with_the_answers() -> None:
    rows = fold([], [("A empty", A), ("", A), ("B empty", A)]).rows
    judged = np.array([[0.2, 0.5, 0.3], [0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])
    kinds = [Kind("A empty", 30, (0.1, 0.8, 0.1)), Kind("B empty", 30, (0.8, 0.1, 0.1))]
    found = with_kinds(kinds, rows, judged)
    expected = (30 * np.array([0.1, 0.8, 0.1]) + PSEUDO_COUNT * judged[0]) / (30 + PSEUDO_COUNT)
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)
    assert np.array_equal(found[2], PREFERENCE.reorder(found[0], 1)) and not np.array_equal(found[0], judged[0])
    assert np.array_equal(found[1], judged[1])  # to the bit
    assert np.array_equal(with_kinds(kinds[:1], rows, judged)[1:], judged[1:])
