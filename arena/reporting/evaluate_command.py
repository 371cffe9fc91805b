"""The subcommand `arena evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from arena.progress import console
from arena.storage.files import local_path


@dataclass
class Evaluate:
    """Score a judge on labelled files that it was not trained on: metrics, biases and constructed pairs."""

    words: Positional[
        Annotated[
            tuple[str, ...],
            arg(
                metavar="RUN FILE ... [KEY=VALUE]",
                help="A judge; files of labelled rows; settings.",
                help_behavior_hint="",
            ),
        ]
    ] = ()
    probes: Annotated[int, arg(help="Construct pairs from at most so many rows of each file; 0 for none.")] = 200
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")
    out: Annotated[Path | None, arg(metavar="NAME", help="A .md file to write.", help_behavior_hint="(none)")] = None

    def run(self) -> None:
        from arena.config import INFER_SETTINGS, judge_settings
        from arena.distributed import fix_threads
        from arena.inference.judge import Judge
        from arena.reporting.tables import print_tables, write_tables
        from arena.reporting.trust import notes, tables, trust

        fix_threads()
        if self.out is not None:
            local_path(self.out, "--out", [".md"])
        names = [word for word in self.words if "=" not in word or Path(word).is_file()]
        if len(names) < 2:
            raise ValueError("name a judge and labelled files, such as `arena evaluate demo data/votes.csv`")
        changed = [word for word in self.words if word not in names]
        if renamed := [word for word in changed if word.partition("=")[0].strip() == "name"]:
            raise ValueError(f"{renamed[0]} would name another run: write that run's name first")
        settings = judge_settings(changed, INFER_SETTINGS)
        judge = Judge.from_pretrained(names[0], settings=settings, runs=self.runs)
        trusted = [trust(judge, file, self.probes) for file in names[1:]]
        sheets = list(tables(trusted))
        print_tables(sheets, notes(trusted))
        if self.out is not None:
            write_tables(self.out, sheets, notes(trusted))
            console.print(f"written: {self.out}")
