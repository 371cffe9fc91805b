"""The subcommand `arena judge`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from arena.config import INFER_SETTINGS, judge_settings

SETTING = re.compile(r"[a-z]+\.[a-z_.]+=.*", re.DOTALL)


@dataclass
class JudgeFiles:
    """Judge files of rows of any size, here or at a URL, and write the rows with their probabilities."""

    words: Positional[
        Annotated[
            tuple[str, ...],
            arg(
                metavar="RUN IN OUT [KEY=VALUE ...]",
                help="RUN: a run, fold or blend, or several; IN: a file, folder or pattern; OUT: a file or FOLDER/.",
                help_behavior_hint="",
            ),
        ]
    ] = ()
    orders: Annotated[bool, arg(help="Write the probabilities of each order too, and whether the verdict flips.")] = (
        False
    )
    shard: Annotated[str, arg(metavar="I/N", help="Judge the I-th of N shares of the rows only.")] = "1/1"
    join: Annotated[
        int | None,
        arg(help="Write OUT from the results of so many shares, once all are judged.", help_behavior_hint=""),
    ] = None
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")

    def run(self) -> None:
        from arena.distributed import fix_threads
        from arena.inference.judge_files import judge_files

        settings = [word for word in self.words if SETTING.fullmatch(word)]
        names = [word for word in self.words if word not in settings]
        if len(names) < 3:
            given = " ".join(names) or "nothing"
            raise ValueError(f"give RUN IN OUT: a judge, what to read and what to write; given: {given}")
        parts = re.fullmatch(r"([0-9]+)/([0-9]+)", self.shard)
        share = (int(parts[1]), int(parts[2])) if parts else (0, 0)
        if not 1 <= share[0] <= share[1]:
            raise ValueError(f"--shard is {self.shard}: give a share and how many there are, such as 3/8")
        if self.join is not None and (share != (1, 1) or self.join < 1):
            raise ValueError(f"--join is {self.join}: give the number of shares, once all are judged, without --shard")
        fix_threads()
        *judges, source, out = names
        judge_files(
            judges, source, out, judge_settings(settings, (*INFER_SETTINGS, "data.columns.")), runs=self.runs,
            orders=self.orders, share=share if self.join is None else (1, self.join), joins=self.join is not None,
        )  # fmt: skip
