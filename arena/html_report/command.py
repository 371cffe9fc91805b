"""The subcommand `arena report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from arena.command_line import command
from arena.options import words_arg
from arena.progress import console
from arena.storage.files import local_path


@dataclass
class Report:
    """Write one HTML file about a finished fold, or all folds of a run, with the held-out rows behind every bar."""

    names: Positional[
        Annotated[tuple[str, ...], words_arg("RUN [OTHER]", "A run or a fold, and another one to compare it with.")]
    ] = ()
    data: Annotated[
        str | None, arg(metavar="PATH", help="Where the run's data are now.", help_behavior_hint="(where they were)")
    ] = None
    out: Annotated[Path | None, arg(help="The file to write.", help_behavior_hint="(report.html in RUN)")] = None
    texts: Annotated[int, arg(help="How many rows have their texts in the file: the most confidently wrong.")] = 2000
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")

    def run(self) -> None:
        from arena.html_report.report import write_report

        if not 1 <= len(self.names) <= 2:
            raise ValueError(f"name a run, and perhaps another one, as in `{command('arena', 'report', 'demo')}`")
        if self.texts < 0:
            raise ValueError(f"--texts {self.texts}: give 0 or more")
        out = None if self.out is None else local_path(self.out, "--out", [".html"])
        console.print(f"written: {write_report(self.names, self.runs, out, self.data, self.texts)}")
