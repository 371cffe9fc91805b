"""Slices of conversations, on which a judge's scores are also given: turns, length gap, language, code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from datasets import Dataset

from arena.data.task import Masks

AT_ONCE = 512
CHARACTERS = 1000  # of a prompt, by which its language is told
CONFIDENT = 0.5  # less, and the language is unknown
COMMON = 20, 0.01  # rows, and share of the rows, that a language needs for a slice of its own
EQUAL = 0.1  # answers are about equally long if the lengths differ by at most this share of the longer one
# a fenced block, a closing tag, or a line that begins like one of a program
CODE = re.compile(
    r"```|</\w+>|^[ \t]*(?:def \w+\(|class \w+[ \t]*[(:{]|import [\w.]+[ \t]*(?:;|as\b|$)|from [\w.]+ import |"
    r"#include\b|function \w*\(|(?:public|private|static) (?:class|void|int|string|String|final|static)\b|"
    r"SELECT\b.*\bFROM\b)",
    re.MULTILINE,
)


def conversation_slices(rows: Dataset) -> dict[str, Masks]:
    """For each property of a conversation, which rows have which of its values, as bool (len(rows),).

    Args:
        rows: checked rows of the preference task.
    """
    columns = ("prompt", "response_a", "response_b")
    turns, gaps, languages, codes = [], [], [], []
    for batch in rows.select_columns(list(columns)).iter(AT_ONCE):
        for fields in zip(*(batch[name] for name in columns), strict=True):
            prompt, a, b = ("\n".join(text or "" for text in field) for field in fields)
            turns.append(str(len(fields[0])) if len(fields[0]) < 3 else "3 or more")
            gaps.append(_gap(len(a), len(b)))
            languages.append(_language(prompt[:CHARACTERS]))
            codes.append("code" if any(CODE.search(text) for text in (prompt, a, b)) else "no code")
    return {
        "turns": _masks(turns, ("1", "2", "3 or more")),
        "length gap": _masks(gaps, ("A longer", "about equal", "B longer")),
        "language": _by_language(languages),
        "code": _masks(codes, ("code", "no code")),
    }


def _gap(a: int, b: int) -> str:
    if abs(a - b) <= EQUAL * max(a, b):
        return "about equal"
    return "A longer" if a > b else "B longer"


@lru_cache(maxsize=2**12)  # prompts repeat
def _language(text: str) -> str:
    """The ISO 639 code of a text's language; `unknown` for too little text, and for what is hardly in a language."""
    language = _identifier().classify(text)[0]
    return "unknown" if language == "und" else str(language)


@lru_cache(maxsize=1)  # loading takes a second
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=CONFIDENT)


def _by_language(languages: list[str]) -> Masks:
    """The common languages, the most frequent first, and the others together."""
    least = max(COMMON[0], COMMON[1] * len(languages))
    common = [name for name, count in Counter(languages).most_common() if count >= least]
    return _masks([name if name in common else "other" for name in languages], [*common, "other"])


def _masks(values: Sequence[str], names: Sequence[str]) -> Masks:
    every = np.array(values, dtype=object)
    return {name: every == name for name in names}
