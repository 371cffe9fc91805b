"""The subcommand `arena judge`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from arena.command_line import command
from arena.config import INFER_SETTINGS, judge_settings

if TYPE_CHECKING:
    from arena.inference.judge_files import Engine

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
    engine: Annotated[Literal["local", "ray"], arg(help="Judge in this process, or on a Ray cluster.")] = "local"
    cpus: Annotated[int, arg(help="The cores of each actor, on a Ray cluster without GPUs.")] = 1
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
        if self.join is not None and self.engine != "local":
            raise ValueError("--join judges nothing: leave out --engine")
        if self.cpus < 1 or (self.cpus > 1 and self.engine != "ray"):
            raise ValueError(f"--cpus is {self.cpus}: give the cores of each actor, with --engine ray")
        fix_threads()
        *judges, source, out = names
        chosen = judge_settings(settings, (*INFER_SETTINGS, "data.columns."))
        judge_files(
            judges, source, out, chosen, runs=self.runs, orders=self.orders,
            share=share if self.join is None else (1, self.join), joins=self.join is not None, engine=self._engine(),
        )  # fmt: skip

    def _engine(self) -> Engine:
        from arena.inference.judge_work import judge_windows

        if self.engine == "local":
            return judge_windows
        if find_spec("ray") is None:
            install = command("pip", "install", "ray[data]")
            raise ValueError(f"--engine ray needs a package that is not installed: `{install}`")
        from arena.inference.judge_on_ray import judge_windows_on_ray

        return partial(judge_windows_on_ray, cpus=self.cpus)
