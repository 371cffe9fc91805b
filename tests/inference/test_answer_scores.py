"""Scores of answers: hand-worked cases, and a plain transcription of the published definition on random texts."""

from __future__ import annotations

import collections
import re
import string
import sys
from typing import Any

import numpy as np
import pytest

from arena.inference.answer_scores import (
    best_threshold,
    cross_fitted,
    exact_match,
    f1,
    rouge_l,
    rouge_scores,
    says,
    score_table,
    squad_scores,
)

WORDS = ["the", "a", "An", "cat", "Cat.", "dog", "dog!", "x-ray", "xray", "é", "$5", "5", "?", " ", "\n", "theatre"]


def normalised(text: str) -> str:
    """The published definition, step by step."""
    text = "".join(each for each in text.lower() if each not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def published_f1(reference: str, answer: str) -> float:
    wanted, given = normalised(reference).split(), normalised(answer).split()
    same = sum((collections.Counter(wanted) & collections.Counter(given)).values())
    if not wanted or not given:
        return int(wanted == given)
    if same == 0:
        return 0
    precision, recall = same / len(given), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def published(answers: list[str], references: list[list[str]], metric: Any) -> list[float]:
    scores = []
    for answer, each in zip(answers, references, strict=True):
        golds = [own for own in each if normalised(own)] or [""]
        scores.append(max(metric(own, answer) for own in golds))
    return scores


def published_threshold(
    answers: list[str], scores: list[float], no_answer: list[float], has_answer: list[bool]
) -> tuple[float, float]:
    """The script's sweep: from the least to the most probable row, that one and those before it are kept."""
    score = best = sum(not each for each in has_answer)
    threshold = 0.0
    for row in sorted(range(len(scores)), key=lambda row: no_answer[row]):
        score += scores[row] if has_answer[row] else (-1 if answers[row] else 0)
        if score > best + 1e-9:
            best, threshold = score, no_answer[row]
    return best / len(scores), threshold


def random_rows(seed: int, n: int = 60) -> tuple[list[str], list[list[str]], np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)

    def text(least: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(least, 6)))

    references = [[text(1) for _ in range(rng.integers(0, 4))] for _ in range(n)]
    answers = ["" if rng.random() < 0.3 else text(1) + " word" for _ in range(n)]
    return answers, references, rng.random(n), [f"g{each}" for each in rng.integers(0, 12, n)]


@pytest.mark.parametrize(
    ("reference", "answer", "exact", "shared"),
    [
        ("The cat.", "a CAT", 1, 1.0),
        ("in the year 1066", "1066", 0, 0.5),  # precision 1, recall 1/3
        ("cat cat dog", "cat dog dog", 0, 2 / 3),  # as a multiset: 2 of 3 and 2 of 3
        ("theatre", "the atre", 0, 0.0),
        ("x-ray", "xray", 1, 1.0),
        ("cat", "", 0, 0.0),
        ("", "", 1, 1.0),
        ("", "The.", 1, 1.0),  # nothing but an article
        ("", "cat", 0, 0.0),
    ],
)
def test_hand_worked_cases(reference: str, answer: str, exact: float, shared: float) -> None:
    assert exact_match(reference, answer) == exact
    assert f1(reference, answer) == pytest.approx(shared, abs=1e-12)


def test_scores_are_those_of_the_published_definition() -> None:
    for seed in range(5):
        answers, references, no_answer, groups = random_rows(seed)
        found = squad_scores(answers, references, no_answer, groups)
        has_answer = [bool(each) for each in references]
        exact = published(answers, references, lambda *each: float(normalised(each[0]) == normalised(each[1])))
        for name, values in (("exact_match", exact), ("f1", published(answers, references, published_f1))):
            for part, rows in (
                ("all", [True] * 60),
                ("with_answer", has_answer),
                ("without_answer", np.invert(has_answer)),
            ):
                own = np.array(values)[np.array(rows)]
                score = found[part][name]
                assert score["value"] == pytest.approx(own.mean(), abs=1e-12) and score["rows"] == len(own)
                assert score["low"] <= score["value"] <= score["high"]
            best, threshold = published_threshold(answers, values, no_answer.tolist(), has_answer)
            assert found["best_thresholds"][name]["value"] == pytest.approx(best, abs=1e-12)
            assert found["best_thresholds"][name]["threshold"] == threshold
            assert found["always_abstaining"][name]["value"] == np.invert(has_answer).mean()
        without_best = [each[:1] for each in references]  # the control: only the first reference counts
        assert squad_scores(answers, without_best, no_answer, groups)["all"]["f1"] != found["all"]["f1"]


def test_the_best_threshold_keeps_equal_rows_together() -> None:
    """Of two rows at 0.5 the script would keep the one that is right, which no threshold does."""
    values, emptied = np.array([1.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0])
    assert best_threshold(values, emptied, np.array([0.2, 0.9, 0.4])) == (1.0, 0.4)
    assert best_threshold(values, emptied, np.array([0.5, 0.5, 0.2])) == (pytest.approx(2 / 3), 0.2)
    assert best_threshold(values, emptied, np.array([0.0, 0.9, 0.0])) == (1.0, 0.0)
    assert best_threshold(np.zeros(2), np.ones(2), np.array([0.3, 0.6])) == (1.0, 0.0)  # all become empty


def test_a_cross_fitted_threshold_is_of_the_other_groups() -> None:
    values, emptied = np.array([1.0, 0.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0, 1.0])
    no_answer, groups = np.array([0.2, 0.4, 0.1, 0.9]), ["a", "a", "b", "b"]
    # best for b: 0.0 (both become empty), by which a scores 0 and 1; best for a: 0.2, by which b scores 0 and 1
    assert cross_fitted(values, emptied, no_answer, groups).tolist() == [0, 1, 0, 1]
    assert best_threshold(values, emptied, no_answer) == (0.75, 0.2)  # the control: chosen on all of them
    order = [3, 1, 0, 2]
    shuffled = cross_fitted(values[order], emptied[order], no_answer[order], [groups[at] for at in order])
    assert shuffled.tolist() == [1, 1, 0, 0]


def test_a_threshold_chosen_on_the_same_rows_flatters() -> None:
    """Probabilities that say nothing: the best threshold gains by chance, the cross-fitted one does not."""
    rng = np.random.default_rng(0)
    best, fitted = [], []
    for _ in range(200):
        values, no_answer = (rng.random(40) < 0.5).astype(float), rng.random(40)
        best.append(best_threshold(values, 1 - values, no_answer)[0])
        fitted.append(cross_fitted(values, 1 - values, no_answer, [str(row) for row in range(40)]).mean())
    assert np.mean(best) > 0.55 and abs(np.mean(fitted) - 0.5) < 0.03


def test_a_phrase_is_recognised_whatever_its_case_and_final_full_stop() -> None:
    for answer in ("unanswerable", " Unanswerable.\n", "UNANSWERABLE ."):
        assert says(answer, "unanswerable")
    for answer in ("", "unanswerable..", "unanswerable, I think", "answerable"):
        assert not says(answer, "unanswerable")


def test_rouge_l_by_hand() -> None:
    metric = rouge_l()
    assert metric("the cats sat on the mat", "the cat is on a mat") == pytest.approx(4 / 6)  # the cat on mat
    assert metric("x", "") == 0
    found = rouge_scores(["good answer", "bad"], [["bad", "Good answers"], ["good"]], ["a", "b"])
    assert found["all"]["rouge_l"]["value"] == 0.5 and found["all"]["rouge_l"]["rows"] == 2


def test_without_the_package_rouge_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match=r"needs the package rouge-score .*pip install rouge-score"):
        rouge_l()


def test_the_table_names_every_part() -> None:
    scores = squad_scores(*random_rows(0))
    cells = list(score_table(scores).columns[0].cells)
    assert len(cells) == 6 and cells[-1] == "best threshold"
    assert "chosen on these rows" in str(score_table(scores).caption)
    alone = squad_scores(["", ""], [[], []], np.zeros(2), ["a", "a"])  # one group, none with an answer
    assert set(alone) == {"all", "without_answer", "always_abstaining", "best_thresholds"}
    assert list(score_table(alone).columns[2].cells) == [""] * 4
