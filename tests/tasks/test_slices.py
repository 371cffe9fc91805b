"""The slices of conversations."""

from __future__ import annotations

import pytest
from datasets import Dataset

from arena.tasks.slices import COMMON, conversation_slices

ENGLISH, GERMAN = (
    "Which of these two answers is better, and why?",
    "Welche dieser beiden Antworten ist besser, und wieso?",
)


def slices(*rows: tuple[list[str | None], list[str | None], list[str | None]]) -> dict[str, dict[str, list[bool]]]:
    columns = dict(zip(("prompt", "response_a", "response_b"), map(list, zip(*rows, strict=True)), strict=True))
    found = conversation_slices(Dataset.from_dict(columns))
    return {kind: {value: mask.tolist() for value, mask in values.items()} for kind, values in found.items()}


def test_turns_and_length_gap_at_their_edges() -> None:
    found = slices(
        ([ENGLISH], ["x" * 100], ["x" * 90]),  # a tenth shorter is about equal
        ([ENGLISH] * 2, ["x" * 100, None], ["x" * 88, None]),
        ([ENGLISH] * 3, [None] * 3, ["x"] * 3),
        ([ENGLISH] * 9, [None] * 9, [None] * 9),
    )
    turns = {"1": [1, 0, 0, 0], "2": [0, 1, 0, 0], "3 or more": [0, 0, 1, 1]}
    gaps = {"A longer": [0, 1, 0, 0], "about equal": [1, 0, 0, 1], "B longer": [0, 0, 1, 0]}
    assert found["turns"] == {name: list(map(bool, each)) for name, each in turns.items()}
    assert found["length gap"] == {name: list(map(bool, each)) for name, each in gaps.items()}


@pytest.mark.parametrize(
    ("text", "is_code"),
    [
        ("```\nx\n```", True), ("so:\n  def f(x):", True), ("#include <stdio.h>", True), ("<b>x</b>", True),
        ("SELECT a FROM b", True), ("from a import b", True), ("private int x;", True),
        ("Please select one from these.", False), ("I import goods from abroad", False), ("a class of its own", False),
        ("public transport is great", False), ("import duties rose", False), ("static electricity", False),
        ("import os.path as p", True), ("public static void main", True), ("\n" * 100_000, False),
        ("", False),
    ],
)  # fmt: skip
def test_code_in_any_text(text: str, is_code: bool) -> None:
    for at in range(3):
        texts: list[list[str | None]] = [["plain"], ["plain"], [None]]
        texts[at] = [text]
        assert slices((texts[0], texts[1], texts[2]))["code"] == {"code": [is_code], "no code": [not is_code]}


def test_common_languages_have_a_slice_of_their_own() -> None:
    few, many = COMMON[0] - 1, COMMON[0]
    rows = [(ENGLISH, many + 1), (GERMAN, many), ("Quelle réponse est la meilleure, et pourquoi donc ?", few), ("?", 1)]
    found = slices(*(([text], ["x"], ["x"]) for text, count in rows for _ in range(count)))["language"]
    assert list(found) == ["en", "de", "other"]
    assert [sum(mask) for mask in found.values()] == [many + 1, many, few + 1]
