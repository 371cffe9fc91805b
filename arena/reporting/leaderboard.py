"""A leaderboard of the models in files of votes: ratings on the Elo scale, with intervals and ranks.

Votes are people's, or a judge's predictions of them. With style control, ratings are as if all answers had the same
length and Markdown ("Does style matter?", https://lmsys.org/blog/2024-08-28-style-control/). A feature's difference is
(a - b) / (a + b + 1), as in the Arena's code, in units of its root mean square. Its mean is not taken off, so that
ratings do not depend on which answer is A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pandas as pd

from arena.data.files import read_files
from arena.data.predictions import read_predictions, rows_of
from arena.metrics import LEVEL, RESAMPLES, Score
from arena.progress import escape_unprintable
from arena.reporting.ratings import Comparisons, fit, separated
from arena.reporting.report import score_cells
from arena.reporting.tables import Sheet, write_tables
from arena.settings import DataSettings
from arena.storage.files import atomic_write
from arena.tasks.votes import MODELS, STYLE, Votes, models_of, points_of, style_differences

SCALE, MEAN = 400 / math.log(10), 1000.0  # 400 points of rating are odds of 10 to 1
FEWEST_ROUNDS = 40  # so that at least one of them lies outside of the interval at each end
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Standing:
    """A model's row: `low` and `high` are the ends of the rating's interval, a tie counts as half in `win_rate`."""

    rank: int
    model: str
    rating: float
    low: float
    high: float
    votes: int
    win_rate: float


@dataclass(frozen=True)
class Leaderboard:
    """Rated models, the best first.

    Attributes:
        style: by feature, the change in the log-odds of winning with a standard deviation more of it; none if ratings
            are not controlled for style.
        votes, groups: how many votes count, and how many prompts they are about.
        notes: what was left out, and what limits the ratings.
    """

    standings: tuple[Standing, ...]
    style: dict[str, Score]
    votes: int
    groups: int
    notes: tuple[str, ...]


def leaderboard(
    files: Sequence[str | Path], predictions: Path | None = None, *, style: bool = False, anchor: str | None = None,
    rounds: int = RESAMPLES,
) -> Leaderboard:  # fmt: skip
    """Rates the models in files of votes.

    Args:
        files: preferences in any layout, with the names of the models.
        predictions: a file with a judge's probabilities, which are used in place of labels.
        style: whether to control for the style of answers.
        anchor: `NAME=RATING`, the model by which ratings are shifted; None: their mean is 1,000.
        rounds: resamples for the intervals.

    Raises:
        ValueError: a file, the anchor or the number of rounds cannot be used, or there are no votes to compare.
    """
    if rounds < FEWEST_ROUNDS:
        raise ValueError(f"--rounds {rounds} gives no intervals: ask for {FEWEST_ROUNDS} or more, such as {RESAMPLES}")
    shift = None if anchor is None else _anchor(anchor)
    votes, notes = read_votes(files, predictions, style=style)
    board = rated(votes, shift, rounds)
    return replace(board, notes=(*notes, *board.notes))


def _anchor(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        rating = float(number)
    except ValueError:
        rating = math.nan
    if not name or not math.isfinite(rating):
        raise ValueError(f"--anchor {text}: write a model and its rating, such as gpt-4=1200")
    return name, rating


def read_votes(
    files: Sequence[str | Path], predictions: Path | None, *, style: bool
) -> tuple[Comparisons, list[str]]:  # fmt: skip
    """The votes between two named models in files, and what was left out."""
    if not files:
        raise ValueError("name the files of votes, such as `arena leaderboard votes.csv`")
    settings = DataSettings(path=str(files[0]))
    rows = read_files(files, Votes(), settings, "required" if predictions is None else "ignored")
    table = None if predictions is None else read_predictions(predictions, rows.task.columns)
    pairs = models_of(rows.table)
    named = np.array([None not in pair for pair in pairs])
    differ = np.array([a != b for a, b in pairs])
    known = np.array([table is None or each in table for each in rows.ids])
    omitted = {
        "do not name both models": ~named, "compare a model with itself": named & ~differ, "have no prediction": ~known
    }  # fmt: skip
    notes = [f"{mask.sum():,} of {len(rows):,} rows {why}" for why, mask in omitted.items() if mask.any()]
    used = np.flatnonzero(named & differ & known)
    if not len(used):
        raise ValueError(f"no votes are left: {'; '.join(notes)}. The columns {' and '.join(MODELS)} name the models")
    rows = replace(rows, table=rows.table.select(used))
    probabilities = rows.labels if table is None else rows_of(table, rows.ids)
    numbers, names = pd.factorize(np.array([pairs[at] for at in used], dtype=object).reshape(-1), sort=True)
    a, b = numbers.reshape(-1, 2).T
    features, differences = (STYLE, style_differences(rows.table)) if style else ((), np.zeros((len(used), 0)))
    return Comparisons(tuple(names), a, b, points_of(probabilities), rows.groups(), features, differences), notes


def rated(votes: Comparisons, anchor: tuple[str, float] | None = None, rounds: int = RESAMPLES) -> Leaderboard:
    """The leaderboard of votes. A feature in which no answers differ is left out.

    Args:
        anchor: a model and its rating; None: the mean rating is 1,000.
    """
    if anchor is not None and anchor[0] not in votes.models:
        near = get_close_matches(anchor[0], votes.models, n=SHOWN) or votes.models
        raise ValueError(f"--anchor: there is no model {anchor[0]}; name one such as {_names(near)}")
    if (groups := len(set(votes.groups))) < 2:
        raise ValueError("all votes are about one prompt, but intervals take several: add votes about other prompts")
    deviations = np.sqrt(np.mean(votes.style**2, axis=0))
    varied = deviations > 0
    names = [name for name, each in zip(votes.features, varied, strict=True) if each]
    values, drawn = fit(replace(votes, style=votes.style[:, varied] / deviations[varied]), rounds)
    ends = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    strengths, weights = np.split(np.vstack([values, ends]), [len(votes.models)], axis=1)
    ratings = SCALE * strengths
    ratings += MEAN if anchor is None else anchor[1] - ratings[0, votes.models.index(anchor[0])]
    style = {
        name: Score(value, low, high, len(votes.a))
        for name, (value, low, high) in zip(names, weights.T.tolist(), strict=True)
    }
    notes = []
    if limited := separated(votes):
        notes.append(
            f"no vote limits the distance from the others of {_names(limited)}: they were not compared with them, or "
            "only won or only lost, alone or as a set. Their ratings are guesses, and their intervals too narrow"
        )
    return Leaderboard(_standings(votes, ratings), style, len(votes.a), groups, tuple(notes))


def _standings(votes: Comparisons, ratings: np.ndarray) -> tuple[Standing, ...]:
    """The rows of a leaderboard, given each model's rating and the ends of its interval, (3, models)."""
    models = np.concatenate([votes.a, votes.b])
    counts = np.bincount(models)
    rates = np.bincount(models, np.concatenate([votes.points, 1 - votes.points])) / counts
    rating, low, high = ratings
    ranks = 1 + (low[:, None] > high).sum(axis=0)
    columns = (each.tolist() for each in (ranks, np.array(votes.models, dtype=object), *ratings, counts, rates))
    rows = [Standing(*cells) for cells in zip(*columns, strict=True)]
    return tuple(rows[at] for at in np.lexsort((-rating, ranks)))


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def write_leaderboard(path: Path, board: Leaderboard) -> None:
    """Writes the ratings as CSV or, if the name ends in .md, all that is printed as Markdown."""
    if path.suffix.lower() == ".csv":
        with atomic_write(path) as draft:
            pd.DataFrame([asdict(each) for each in board.standings]).to_csv(draft, index=False)
    else:
        write_tables(path, tables(board), board.notes)


def tables(board: Leaderboard) -> Iterator[Sheet]:
    """The ratings, and the weights of style if there are any."""
    rows = [
        (
            str(each.rank), escape_unprintable(each.model), f"{each.rating:,.0f}", f"{each.low:,.0f}",
            f"{each.high:,.0f}", f"{each.votes:,}", f"{each.win_rate:.1%}",
        )
        for each in board.standings
    ]  # fmt: skip
    title = (
        f"{board.votes:,} votes on {board.groups:,} prompts, with 95% intervals; the rank is 1 plus the number "
        "of models whose interval lies above"
    )
    yield title, ("rank", "model", "rating", "low", "high", "votes", "win rate"), rows
    if board.style:
        weights = [(name, *score_cells(score, sign="+")) for name, score in board.style.items()]
        yield (
            "style: what a standard deviation more of a feature adds to the log-odds of winning",
            ("feature", "weight", "interval"),
            weights,
        )
