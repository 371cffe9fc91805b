"""Kinds of special conversations, of which there are few, and of which labels say more than a judge may have learned.

The limits were chosen on labelled sets of several sources. An apology with "but" nearly always begins a refusal, which
loses two times in three or more; openings such as "As an AI language model" often precede a full answer. An answer that
is several times as long as the other one is preferred, until about 6,000 characters; above 8,000 it loses four times
in five.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

KINDS = ("both empty", "A empty", "B empty", "same answers", "A refused", "B refused", "A very long", "B very long")
EXCHANGED = (0, 2, 1, 3, 5, 4, 7, 6)  # the kind of the same conversation with A and B exchanged
LONG = 4, 8000  # a very long answer has more than so many times the other's characters, and more than so many
REFUSAL = re.compile(
    r"\W*(?:(?:I['’]?m|I am)(?: so| very| really)? sorry|sorry|I apologi[sz]e|my apologies)\b\W{0,3}but\b",
    re.IGNORECASE,
)


def kind_of(answers_a: Sequence[str | None], answers_b: Sequence[str | None]) -> int:
    """The number in `KINDS` of a conversation with these answers, the first that applies; -1: none."""
    a, b = ("\n".join(text or "" for text in turns).strip() for turns in (answers_a, answers_b))
    refused = _refuses(answers_a), _refuses(answers_b)
    times, least = LONG
    applies = (
        not a and not b, not a, not b, a == b, refused == (True, False), refused == (False, True),
        len(a) > max(least, times * len(b)), len(b) > max(least, times * len(a)),
    )  # fmt: skip
    return applies.index(True) if any(applies) else -1


def _refuses(answers: Sequence[str | None]) -> bool:
    """Whether the last answer that has any text begins with a refusal; votes are on how a conversation ended."""
    last = next((text for text in reversed(answers) if text and text.strip()), "")
    return REFUSAL.match(last) is not None
