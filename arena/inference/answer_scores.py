"""Scores of answers against reference answers: exact match and F1 as of SQuAD 2.0, and ROUGE-L.

The formulas are those of SQuAD 2.0's evaluation (Rajpurkar et al., 2018, arXiv:1806.03822). Unlike its script, a
threshold is one that can be applied: rows that are equally likely to have no answer are kept or emptied together.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table

from arena.command_line import command
from arena.metrics import Terms, estimate

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
NAMES = {"exact_match": "exact match", "f1": "F1", "rouge_l": "ROUGE-L"}
PARTS = {
    "all": "all rows",
    "with_answer": "with an answer",
    "without_answer": "without an answer",
    "always_abstaining": "always abstaining",
    "cross_fitted_threshold": "threshold of the other half",
}


def says(answer: str, phrase: str) -> bool:
    """Whether an answer is a phrase, whatever its case, the space around it and a final full stop."""
    bare, wanted = (text.strip().casefold().removesuffix(".").rstrip() for text in (answer, phrase))
    return bare == wanted


def words(text: str) -> list[str]:
    """The words that are compared: in lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split()


def exact_match(reference: str, answer: str) -> float:
    """1 if the words are the same, else 0."""
    return float(words(reference) == words(answer))


def f1(reference: str, answer: str) -> float:
    """The harmonic mean of precision and recall of an answer's words, each as often as it occurs."""
    wanted, given = words(reference), words(answer)
    if not wanted or not given:
        return float(wanted == given)
    return 2 * (Counter(wanted) & Counter(given)).total() / (len(wanted) + len(given))


def squad_scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], no_answer: np.ndarray, groups: Sequence[str]
) -> dict[str, Any]:
    """Scores from 0 to 1 with intervals, of all rows and of those with and without an answer.

    Args:
        answers: empty where none is given.
        references: all that are right, of which the nearest one counts; none if the question has no answer.
        no_answer: float64 (rows,), how probable the model finds it that there is no answer.
        groups: the group of each row, such as its context.
    """
    has_answer, ones = np.array([len(each) > 0 for each in references]), np.ones(len(answers))
    terms: dict[tuple[str, str], Terms] = {}
    best = {}
    for name, metric in (("exact_match", exact_match), ("f1", f1)):
        pairs = zip(answers, references, strict=True)
        values = np.array([max(metric(own, answer) for own in _compared(each)) for answer, each in pairs])
        found, threshold = best_threshold(values, ~has_answer, no_answer)
        best[name] = {"value": found, "threshold": threshold}
        terms["all", name] = values, ones
        terms["with_answer", name] = values * has_answer, has_answer
        terms["without_answer", name] = values * ~has_answer, ~has_answer
        terms["always_abstaining", name] = (~has_answer).astype(float), ones
        if len(set(groups)) > 1:
            terms["cross_fitted_threshold", name] = cross_fitted(values, ~has_answer, no_answer, groups), ones
    parts: dict[str, Any] = {}
    for (part, name), score in estimate(terms, groups).items():
        parts.setdefault(part, {})[name] = asdict(score)
    note = "chosen on the rows that they are scored on, so these figures are too high for other rows"
    return {**parts, "best_thresholds": {"note": note, **best}}


def _compared(references: Sequence[str]) -> Sequence[str]:
    """The references with words; the empty answer if there are none."""
    return [each for each in references if words(each)] or [""]


def best_threshold(values: np.ndarray, emptied: np.ndarray, no_answer: np.ndarray) -> tuple[float, float]:
    """The best mean score when rows with a larger `no_answer` than a threshold become empty, and the smallest such.

    Args:
        values: the scores of rows as answered.
        emptied: the scores of empty answers.
    """
    order = np.argsort(no_answer, kind="stable")
    gains = np.concatenate([[0.0], np.cumsum((values - emptied)[order])])  # of keeping the first rows
    thresholds = np.unique(np.concatenate([[0.0], no_answer]))
    totals = gains[np.searchsorted(no_answer[order], thresholds, side="right")]
    best = int(np.argmax(np.round(totals, 9)))  # sums in another order differ in the last bits
    return float((emptied.sum() + totals[best]) / len(values)), float(thresholds[best])


def cross_fitted(values: np.ndarray, emptied: np.ndarray, no_answer: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """The scores of rows at the threshold that is best for the other half of the groups."""
    half = np.unique(np.array(groups, dtype=object), return_inverse=True)[1] % 2 == 0
    scores = np.empty(len(values))
    for own, other in ((half, ~half), (~half, half)):
        _, threshold = best_threshold(values[other], emptied[other], no_answer[other])
        scores[own] = np.where(no_answer[own] > threshold, emptied[own], values[own])
    return scores


def rouge_l() -> Callable[[str, str], float]:
    """The F1 of the longest common subsequence of stemmed words, from a reference and an answer.

    Raises:
        ValueError: the package is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        install = command("pip", "install", "rouge-score")
        raise ValueError(f"--score rouge needs the package rouge-score ({error}): run `{install}`") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda reference, answer: float(scorer.score(reference, answer)["rougeL"].fmeasure)


def rouge_scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], groups: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The mean ROUGE-L from 0 to 1 with its interval; of several references the nearest one counts."""
    metric = rouge_l()
    values = [max(metric(own, answer) for own in each) for answer, each in zip(answers, references, strict=True)]
    scores = estimate({"rouge_l": (np.array(values), np.ones(len(values)))}, groups)
    return {"all": {name: asdict(score) for name, score in scores.items()}}


def score_table(scores: dict[str, Any]) -> Table:
    """The scores of each part of the rows, with their intervals."""
    parts = {part: scores[part] for part in PARTS if part in scores}
    table = Table("", title="scores of the answers, with 95% intervals", title_justify="left", caption_justify="left")
    for column in (*(each for name in parts["all"] for each in (NAMES[name], "interval")), "rows"):
        table.add_column(column, justify="right", no_wrap=True)
    for part, metrics in parts.items():
        cells = []
        for score in metrics.values():
            cells += [f"{score['value']:.3f}"]
            cells += ["" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"]
        table.add_row(PARTS[part], *cells, f"{score['rows']:,}")
    if best := scores.get("best_thresholds"):
        cells = [cell for name in parts["all"] for cell in (f"{best[name]['value']:.3f}", "")]
        table.caption = "the best threshold was chosen on these rows, so its figures are too high for others"
        table.add_row("best threshold", *cells, f"{scores['all']['f1']['rows']:,}")
    return table
