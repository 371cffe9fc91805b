"""What the demo's base learns: words that a reader might note at the claims of a judge prompt, and at its end.

At the end of each claim these are its mark, its negation, its tone, the speaker, and how A and B compare so far; after
the verdict suffix, how they compare overall. Preferences (weights, ties, labels) are never among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from arena.data.cells import whole_characters
from arena.demo import synthetic
from arena.demo import synthetic_text as text
from arena.tasks.preference import PromptEncoder

FACTS_SHARE = 0.4  # of what is noted after a claim

# What may be noted after a claim: its mark, whether it is negated, its tone (their XOR), the speaker.
FACTS = (" Praise", " Blame", " Stated", " Denied", " Hooray", " Alas", " A", " B")
# Comparisons of the two sides, each on a scale of words from -1 to 1, with its share of the notes.
SCALES = (
    (0.26, "dismal poor glum gloomy dim level bright sunny cheerful rich superb"),  # tone of A against B
    (0.16, "sour bitter stern plain mild kind sweet"),  # tone of A
    (0.16, "black grey brown white pink orange golden"),  # tone of B
    (0.24, "tiny brief short slim even wide long ample huge"),  # length of A against B
    (0.18, "open both shut"),  # refusals of A against B
)
WORDS = (*FACTS, *(f" {word}" for _, scale in SCALES for word in scale.split()))


class Lesson(NamedTuple):
    """A judge prompt, the positions of notes (the ends of claims, then of the suffix), and the possible notes."""

    ids: np.ndarray  # int64, shape (n_tokens,)
    places: list[int]
    notes: np.ndarray  # float32, shape (len(places), len(WORDS)): in each row a distribution


class Reader:
    """Finds the claims in a judge prompt's tokens, and what may be noted at the end of each."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self.encoder = encoder
        self.words = [self._ids(word)[0] for word in WORDS]
        good, bad, negators = ([self._ids(f" {w}")[0] for w in words] for words in (text.GOOD, text.BAD, text.NEGATORS))
        self.marks, self.negators = dict.fromkeys(good, 1) | dict.fromkeys(bad, -1), set(negators)
        self.stop = self._ids(".")[0]
        self.refusal = self._ids(text.REFUSAL)
        if len({*self.words, *self.marks, *self.negators}) < len(WORDS) + len(self.marks) + len(self.negators):
            raise ValueError("the tokenizer splits some of the words that this module relies on; enlarge VOCABULARY")

    def _ids(self, words: str) -> list[int]:
        return list(self.encoder.tokenizer(words, add_special_tokens=False)["input_ids"])

    def lessons(self, rows: Sequence[synthetic.Row]) -> list[Lesson]:
        """One lesson for each conversation."""
        columns = {name: [_padded(getattr(row, name), len(row.prompt)) for row in rows] for name in rows[0]._fields}
        return [self._lesson(example.input_ids.tolist()) for example in self.encoder.encode(columns)]

    def _lesson(self, ids: list[int]) -> Lesson:
        tones: tuple[list[int], list[int]] = ([], [])
        tokens, refused = [0, 0], [0, 0]
        places: list[int] = []
        notes: list[list[float]] = []
        who, sign, negated = -1, 0, False  # who: 0 for A, 1 for B, -1 for the user
        headings = list(enumerate(self.encoder.headings, start=-1))
        for place, token in enumerate(ids[: len(ids) - len(self.encoder.suffix)]):
            who = next((speaker for speaker, heading in headings if _ends(ids, place, heading)), who)
            if who < 0:
                continue
            tokens[who] += 1
            refused[who] |= _ends(ids, place, self.refusal)
            negated |= token in self.negators and not sign
            sign = self.marks.get(token, sign)
            if token == self.stop:
                if sign:
                    tones[who].append(-sign if negated else sign)
                    places.append(place)
                    notes.append(_facts(sign, negated, who) + _standing(tones, tokens, refused))
                sign, negated = 0, False
        notes.append([0.0] * len(FACTS) + _standing(tones, tokens, refused))
        shares = np.array(notes, dtype=np.float32)
        shares[:-1] *= [FACTS_SHARE] * len(FACTS) + [1 - FACTS_SHARE] * (len(WORDS) - len(FACTS))
        return Lesson(np.array(ids, dtype=np.int64), [*places, len(ids) - 1], shares)


def _padded(turns: Sequence[str | None], count: int) -> list[str | None]:
    return [turn and whole_characters(turn) for turn in turns] + [None] * (count - len(turns))


def _ends(ids: list[int], place: int, phrase: list[int]) -> bool:
    return ids[place] == phrase[-1] and ids[max(place + 1 - len(phrase), 0) : place + 1] == phrase


def _facts(sign: int, negated: bool, who: int) -> list[float]:
    """The distribution over `FACTS` after a claim; tone counts twice."""
    mark, denied, speaker = 0.2 * (sign > 0), 0.2 * negated, 0.2 * (who == 0)
    tone = 0.4 * ((sign > 0) != negated)
    return [mark, 0.2 - mark, 0.2 - denied, denied, tone, 0.4 - tone, speaker, 0.2 - speaker]


def _standing(tones: Sequence[list[int]], tokens: Sequence[int], refused: Sequence[int]) -> list[float]:
    """The distribution over the words of `SCALES`, from the answers of A and B so far."""
    a, b = (sum(side) / max(len(side), 1) for side in tones)
    length = (tokens[0] - tokens[1]) / max(sum(tokens), 1)
    values = ((a - b) / 2, a, b, length, refused[0] - refused[1])
    scales = zip(SCALES, values, strict=True)
    return [share * p for (share, words), value in scales for p in _graded(len(words.split()), value)]


def _graded(levels: int, value: float) -> list[float]:
    """Probabilities of a scale's words for a value in [-1, 1]: a bell curve, about one word wide, around the value."""
    place = (value + 1) / 2 * (levels - 1)
    bell = [math.exp(-((level - place) ** 2) / (2 * 0.7**2)) for level in range(levels)]
    return [each / sum(bell) for each in bell]


def brief_row(rng: Random) -> synthetic.Row:
    """A short conversation of claims only, used first because it teaches tone fastest."""
    a, b = (" ".join(text.claim(rng, rng.choice((1, -1))) for _ in range(rng.randint(1, 4))) for _ in "ab")
    return synthetic.Row([text.question(rng, rng.choice(list(text.TOPICS)))], [a], [b])
