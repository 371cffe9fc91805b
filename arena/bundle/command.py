"""The subcommand `arena bundle`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from arena.command_line import command
from arena.options import words_arg
from arena.storage.files import local_path

COMPETITION = "llm-classification-finetuning"


@dataclass
class Bundle:
    """Write a folder to upload to Kaggle: wheels, judges, and a notebook that judges offline; or try one out."""

    judges: Positional[Annotated[tuple[str, ...], words_arg("[RUN|FOLD|MODEL ...]", "Judges to average.")]] = ()
    out: Annotated[Path, arg(help="The folder to write.")] = Path("bundle")
    owner: Annotated[str | None, arg(help="Your name on Kaggle.", help_behavior_hint="(required)")] = None
    name: Annotated[
        str | None,
        arg(help="The name of the dataset and of the notebook.", help_behavior_hint="(arena- and the run's)"),
    ] = None
    competition: Annotated[str, arg(help="The competition, as in its address.")] = COMPETITION
    deadline: Annotated[str, arg(help="How long the notebook may judge; Kaggle stops it after 9 hours.")] = "8.5h"
    base: Annotated[
        str | None,
        arg(
            metavar="PLACE",
            help="Where Kaggle has the base: OWNER/MODEL/FRAMEWORK/VARIATION/VERSION, or a dataset OWNER/NAME.",
            help_behavior_hint="(known for Gemma-2-9B)",
        ),
    ] = None
    python: Annotated[str, arg(help="Kaggle's version of Python.")] = "3.12"
    has_file: Annotated[
        Path | None, arg(help="What `pip freeze` printed on Kaggle.", help_behavior_hint="(the image of mid 2026)")
    ] = None
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")
    dry_run: Annotated[bool, arg(help="Run the notebook here, in a fresh environment with the network off.")] = False
    data: Annotated[
        str | None,
        arg(metavar="PATH", help="The test file of the dry run.", help_behavior_hint="(a few rows of the demo)"),
    ] = None

    def run(self) -> None:
        from arena.bundle.dry_run import dry_run
        from arena.bundle.write import Asked, write_bundle
        from arena.inference.find import find_models

        out = local_path(self.out, "--out")
        if self.data is not None and not self.dry_run:
            raise ValueError("--data names the test file of a dry run: leave it out, or add --dry-run")
        if self.judges:
            if self.owner is None:
                raise ValueError(
                    "--owner is missing: give your name on Kaggle, where the bundle goes, as in --owner NAME"
                )
            models = [model for name in self.judges for model in find_models(name, self.runs)]
            asked = Asked(self.owner, self.name, self.competition, self.deadline, self.base, self.python, self.has_file)
            write_bundle(models, out, asked)
        elif not self.dry_run:
            tried = command("arena", "bundle", "--dry-run", "--out", str(out))
            written = command("arena", "bundle", "demo", "--owner", "NAME")
            raise ValueError(f"name the judges, as in `{written}`, or try out a bundle with `{tried}`")
        if self.dry_run:
            dry_run(out, self.data, self.has_file)
