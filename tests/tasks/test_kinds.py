"""The kinds of special conversations."""

from __future__ import annotations

import pytest

from arena.tasks.kinds import EXCHANGED, KINDS, kind_of

Turns = list[str | None]


@pytest.mark.parametrize(
    ("a", "b", "kind"),
    [
        ([None], [" \n"], "both empty"),
        (["", None], [None, "x"], "A empty"),
        (["yes"], ["yes "], "same answers"),
        (["x", "yes"], ["y", "yes"], None),
        (["I’m sorry, but I can't."], ["Here you are."], "A refused"),
        (["Sure.", "  I apologize, but no.", None], ["Sorry, but no.", "Well: yes"], "A refused"),
        (["My apologies - but no."], ["Here you are."], "A refused"),
        (["I'm sorry, but I can't."], ["I am very sorry but no."], None),
        (["I'm sorry to hear that."], ["Here you are."], None),
        (["He said: I'm sorry, but no."], ["Here you are."], None),
        (["As an AI language model, I cannot feel, but here is a poem."], ["Roses are red."], None),
        (["x" * 8001], ["y" * 2000], "A very long"),
        (["x" * 4001, "x" * 4000], ["y", "y" * 1997], "A very long"),
        (["x" * 8000], ["y" * 1], None),
        (["x" * 8004], ["y" * 2001], None),
        (["x" * 9000], [None], "B empty"),
        (["x" * 9000], ["Sorry, but no."], "B refused"),
    ],
)
def test_the_kind_and_that_of_the_exchanged_answers(a: Turns, b: Turns, kind: str | None) -> None:
    expected = -1 if kind is None else KINDS.index(kind)
    assert kind_of(a, b) == expected
    assert kind_of(b, a) == (-1 if kind is None else EXCHANGED[expected])


def test_exchanging_twice_changes_nothing() -> None:
    assert [EXCHANGED[each] for each in EXCHANGED] == list(range(len(KINDS)))
