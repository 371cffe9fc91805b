"""Demo data in the competition's format, with labels drawn from a known model, so that the best log-loss is known.

The model uses three visible features of the two answers, over all turns:

- tone: the mean tone of A's claims minus that of B's (see `synthetic_text`; no claims: tone 0);
- length: (words of A - words of B) / (words of A + words of B);
- refusal: whether A refuses minus whether B does.

Their weighted sum `d` gives the probabilities as in Davidson (1970): A, B and tie are proportional to exp(d / 2),
exp(-d / 2) and TIE. No judge can expect a log-loss below the mean entropy of these probabilities.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from arena.demo import synthetic_text as text
from arena.progress import console
from arena.settings import Recipe
from arena.storage.files import atomic_write
from arena.tasks.preference import COLUMNS

TONE, LENGTH, REFUSAL, TIE = 2.0, 2.0, 2.0, 1.0

TEST_COLUMNS = ("id", "prompt", "response_a", "response_b")
TRAIN_COLUMNS = ("id", "model_a", "model_b", *TEST_COLUMNS[1:], *COLUMNS)
MODELS = ("alder-7b", "birch-13b", "cedar-2b", "dogwood-chat", "elm-large", "fir-mini")

Answers = Sequence[str | None]


class Features(NamedTuple):
    """The label model's features, as differences between A and B."""

    tone: float
    length: float
    refusal: float


class Row(NamedTuple):
    """One conversation: the user's prompts and both models' answers, turn by turn."""

    prompt: list[str]
    response_a: list[str | None]
    response_b: list[str | None]


def features(response_a: Answers, response_b: Answers) -> Features:
    """The features of the visible text."""
    a, b = (" ".join(turn for turn in answers if turn) for answers in (response_a, response_b))
    words_a, words_b = len(a.split()), len(b.split())
    length = (words_a - words_b) / max(words_a + words_b, 1)
    refusal = float(text.REFUSAL in a) - float(text.REFUSAL in b)
    return Features(mean_tone(a) - mean_tone(b), length, refusal)


def mean_tone(answer: str) -> float:
    """The mean tone of an answer's claims, in [-1, 1]; 0 if it has none."""
    tones = text.tones(answer)
    return sum(tones) / len(tones) if tones else 0.0


def preference(response_a: Answers, response_b: Answers) -> tuple[float, float, float]:
    """The true probabilities that A is preferred, that B is, and of a tie."""
    seen = features(response_a, response_b)
    d = TONE * seen.tone + LENGTH * seen.length - REFUSAL * seen.refusal
    weights = (math.exp(d / 2), math.exp(-d / 2), TIE)
    total = sum(weights)
    return weights[0] / total, weights[1] / total, weights[2] / total


def entropy(probabilities: Sequence[float]) -> float:
    """The expected log-loss, in nats, of predicting these probabilities if they are the true ones."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def make_row(rng: Random, earlier: Sequence[str] = ()) -> Row:
    """One conversation, sometimes with an irregularity of real data; its first prompt may repeat one of `earlier`."""
    topic = rng.choice(list(text.TOPICS))
    turns = rng.choices((1, 2, 3, 4), (0.78, 0.13, 0.06, 0.03))[0]
    scripts = rng.random() < 0.12
    prompts = [_prompt(rng, topic, scripts and rng.random() < 0.5) for _ in range(turns)]
    if earlier and rng.random() < 0.08:
        prompts[0] = rng.choice(earlier)
    size = min(max(rng.lognormvariate(1.5, 0.60), 1.2), 14) / math.sqrt(turns)  # sentences in an answer
    answers = [_answers(rng, topic, turns, size, scripts) for _ in "ab"]
    return Row(prompts, *_odd(rng, *answers))


def _prompt(rng: Random, topic: str, scripts: bool) -> str:
    """A question, sometimes after a long introduction."""
    introduction = [text.talk(rng, topic) for _ in range(rng.randint(4, 9))] if rng.random() < 0.06 else []
    return " ".join([*introduction, text.question(rng, topic, scripts)])


def _answers(rng: Random, topic: str, turns: int, size: float, scripts: bool) -> list[str | None]:
    """One side's answers, with the same tendency in tone and length in all turns."""
    leaning, taste = rng.uniform(-1, 1), rng.lognormvariate(0, 0.35)
    sentences = max(1, round(size * taste))
    answers: list[str | None] = [_answer(rng, topic, sentences, leaning, scripts) for _ in range(turns)]
    if rng.random() < 0.06:
        answers[-1] = " ".join([text.REFUSAL, *[text.talk(rng, topic) for _ in range(rng.randint(0, 2))]])
    return answers


def _answer(rng: Random, topic: str, sentences: int, leaning: float, scripts: bool) -> str:
    """Claims that tend to one tone, mixed with talk that has none."""
    parts = []
    for _ in range(sentences):
        tone = 1 if rng.random() < (1 + leaning) / 2 else -1
        parts.append(text.claim(rng, tone) if rng.random() < 0.6 else text.talk(rng, topic))
    if scripts:
        parts.insert(rng.randint(0, len(parts)), rng.choice(text.OTHER_SCRIPTS))
    joint = "\n" if rng.random() < 0.1 else " "
    return joint.join(parts)


def _odd(rng: Random, a: list[str | None], b: list[str | None]) -> tuple[list[str | None], list[str | None]]:
    """Irregularities of real data, each in about one row of a hundred: nulls, blanks, equal answers, a missing turn."""
    luck, side, turn = rng.random(), rng.choice((a, b)), rng.randrange(len(a))
    if luck < 0.012:
        side[turn] = None
    elif luck < 0.018:
        a, b = [None] * len(a), [None] * len(b)
    elif luck < 0.030:
        b = list(a)
    elif luck < 0.038:
        side[turn] = rng.choice(("", " ", "null"))
    elif luck < 0.050 and len(a) > 1:
        side.pop()
    elif luck < 0.056:
        side[turn] = f"{side[turn]} \ud83d"  # half of an emoji, as a cut at 16-bit units leaves it
    return a, b


def make_rows(rng: Random, count: int) -> list[Row]:
    """`count` conversations, some of which repeat the first prompt of an earlier one."""
    rows: list[Row] = []
    earlier: list[str] = []
    for _ in range(count):
        rows.append(make_row(rng, earlier))
        earlier.append(rows[-1].prompt[0])
    return rows


def ensure_demo(recipe: Recipe) -> bool:
    """Writes a recipe's demo rows if their folder does not exist, and returns whether it did.

    Raises:
        ValueError: the folder has demo rows in other numbers than the recipe asks for.
    """
    folder, rows = Path(recipe.data.path), recipe.data.synthetic_rows
    if rows is None:
        return False
    if not folder.exists():
        write_demo(folder, *rows, recipe.seed)
        console.print(f"demo data written to {folder}: {rows} labelled and unlabelled rows")
        return True
    if (folder / "truth.csv").is_file():  # which only demo rows have
        there = tuple(_count(folder / name) for name in ("train.csv", "test.csv"))
        if None not in there and there != rows:
            raise ValueError(
                f"{folder} has demo data of {there[0]:,} and {there[1]:,} rows, but data.synthetic_rows asks for "
                f"{rows[0]:,} and {rows[1]:,}: remove that folder, or name another with data.path="
            )
    return False


def _count(path: Path) -> int | None:
    """The number of rows of a CSV file; None if it cannot be read, which is reported when its rows are needed."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return sum(1 for _ in csv.reader(file)) - 1
    except (OSError, ValueError, csv.Error):
        return None


def write_demo(folder: Path, n_train: int, n_test: int, seed: int) -> None:
    """Writes a folder atomically: `train.csv`, `test.csv`, `sample_submission.csv` and, for all rows, `truth.csv`.

    `truth.csv` has the probabilities that the labels were drawn from; the mean of their `entropy` is the best possible
    log-loss.
    """
    rng = Random(seed)
    rows = make_rows(rng, n_train + n_test)
    ids = [str(10_000 + 37 * number) for number in range(len(rows))]
    truth = [preference(row.response_a, row.response_b) for row in rows]
    cells = [[_cell(row.prompt), _cell(row.response_a), _cell(row.response_b)] for row in rows]
    train = [[ids[i], *rng.sample(MODELS, 2), *cells[i], *_draw(rng, truth[i])] for i in range(n_train)]
    test = [[ids[i], *cells[i]] for i in range(n_train, len(rows))]
    answers = [[name, *map(repr, chances)] for name, chances in zip(ids, truth, strict=True)]
    with atomic_write(folder) as draft:
        draft.mkdir()
        _write(draft / "train.csv", TRAIN_COLUMNS, train)
        _write(draft / "test.csv", TEST_COLUMNS, test)
        _write(draft / "sample_submission.csv", ("id", *COLUMNS), [[row[0], *["0.333333"] * 3] for row in test])
        _write(draft / "truth.csv", ("id", *COLUMNS), answers)


def _draw(rng: Random, probabilities: Sequence[float]) -> list[str]:
    """A label drawn from `probabilities`, in the competition's format: three cells, one of which is 1."""
    winner = rng.choices(range(3), probabilities)[0]
    return ["1" if index == winner else "0" for index in range(3)]


def _cell(turns: Sequence[str | None]) -> str:
    """A JSON list with the competition's escapes: no spaces, ASCII only, `/` as `\\/`."""
    return json.dumps(list(turns), separators=(",", ":")).replace("/", "\\/")


def _write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
