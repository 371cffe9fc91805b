"""The subcommand `arena leaderboard`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from arena.progress import console
from arena.storage.files import local_path


@dataclass
class Leaderboard:
    """Rate the models in files of votes, by people's labels or a judge's predictions, with intervals and ranks."""

    files: Positional[
        Annotated[
            tuple[str, ...],
            arg(metavar="FILE ...", help="Preferences that name both models.", help_behavior_hint=""),
        ]
    ] = ()
    predictions: Annotated[
        Path | None,
        arg(metavar="FILE", help="Probabilities to use in place of the labels.", help_behavior_hint="(the labels)"),
    ] = None
    style: Annotated[bool, arg(help="Rate models as if answers had the same length and Markdown.")] = False
    anchor: Annotated[
        str | None,
        arg(metavar="NAME=RATING", help="A model and its rating.", help_behavior_hint="(a mean of 1,000)"),
    ] = None
    rounds: Annotated[int, arg(help="Resamples of the prompts, for the intervals.")] = 1000
    out: Annotated[
        Path | None, arg(metavar="NAME", help="A .csv or .md file to write.", help_behavior_hint="(none)")
    ] = None

    def run(self) -> None:
        from arena.reporting.leaderboard import leaderboard, tables, write_leaderboard
        from arena.reporting.tables import print_tables

        if self.out is not None:
            local_path(self.out, "--out", [".csv", ".md"])
        board = leaderboard(self.files, self.predictions, style=self.style, anchor=self.anchor, rounds=self.rounds)
        print_tables(tables(board), board.notes)
        if self.out is not None:
            write_leaderboard(self.out, board)
            console.print(f"written: {self.out}")
