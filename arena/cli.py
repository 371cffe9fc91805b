"""The command line: `arena SUBCOMMAND --help`."""

from __future__ import annotations

import difflib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from arena import __version__
from arena.benchmark.command import Bench
from arena.benchmark.gpu import Gpu
from arena.config import Recipe, change, load_recipe, recipe_names, run_place
from arena.lock import locked
from arena.progress import console, printable, quiet
from arena.stopping import Stopped, ending_at_once

Name = Annotated[str, arg(help=f"A shipped recipe ({', '.join(recipe_names())}) or the path of a YAML file.")]
Data = Annotated[
    str | None,
    arg(metavar="PATH", help="Folder with train and test files, or one file; default: the recipe's."),
]
Overrides = Positional[
    Annotated[tuple[str, ...], arg(metavar="[KEY=VALUE ...]", help="Settings to change, such as train.batch_size=32.")]
]

INFER_SETTINGS = ("judge.", "packing.", "model.base=", "model.dtype=", "model.attention=", "data.cache=", "data.max_")


@dataclass
class Train:
    """Train one fold, score it on its held-out rows, and write runs/RECIPE/foldK."""

    overrides: Overrides = ()
    fold: Annotated[int, arg(help="The fold to hold out.")] = 0
    recipe: Name = "demo"
    data: Data = None
    runs: Annotated[Path, arg(help="Where runs are kept.")] = Path("runs")
    fresh: Annotated[bool, arg(help="Set an earlier run of this fold aside and train anew.")] = False

    def run(self) -> None:
        from arena.distributed import is_main
        from arena.reporting.report import draw_report, print_report
        from arena.training.run import run_fold

        recipe = _recipe(self.recipe, self.data, self.overrides)
        folder = run_place(self.runs, f"{recipe.name}/fold{self.fold}")
        _write_demo(recipe)
        try:
            metrics = run_fold(recipe, self.fold, self.runs, fresh=self.fresh)
        except Stopped:
            console.print(f"everything is saved in {folder}: the same command goes on from there")
            raise
        if is_main():
            print_report(metrics)
            console.print(f"written: {folder} (metrics.json, oof.csv, log.jsonl, model/, {draw_report(folder).name})")


@dataclass
class Infer:
    """Judge a test file with every finished fold of a run, averaged, and write a checked submission."""

    overrides: Positional[
        Annotated[tuple[str, ...], arg(metavar="[KEY=VALUE ...]", help="Settings, such as judge.swap=false.")]
    ] = ()
    recipe: Name = "demo"
    data: Annotated[
        str | None, arg(metavar="PATH", help="Folder with a test file, or one file; default: what was trained on.")
    ] = None
    runs: Annotated[Path, arg(help="Where runs are kept.")] = Path("runs")
    out: Annotated[Path, arg(help="The submission to write.")] = Path("submission.csv")

    def run(self) -> None:
        from arena.distributed import fix_threads
        from arena.judging.ensemble import fold_models

        fix_threads()
        odd = [each for each in self.overrides if not each.startswith(INFER_SETTINGS)]
        if odd:
            raise ValueError(f"{odd[0]} changes nothing about judging: here {', '.join(INFER_SETTINGS)} can be set")
        models = fold_models(run_place(self.runs, load_recipe(self.recipe).name))
        parts = self.out.with_name(f"{self.out.name}.parts")
        try:
            with locked(self.out):
                self._judge(models, parts)
        except (Stopped, SystemExit):
            if parts.is_dir():
                console.print(f"what was judged is kept in {parts}: the same command goes on with it")
            raise

    def _judge(self, models: list[Path], parts: Path) -> None:
        from arena.data.conversations import judgeable_rows, read_conversations
        from arena.data.limits import Limits
        from arena.data.prepare import data_file
        from arena.judging.ensemble import average
        from arena.judging.judge import read_card
        from arena.judging.submission import check_target, write_submission

        data = change(Recipe.model_validate(read_card(models[0])["recipe"]), self.overrides).data
        cache = Path(data.cache)
        if self.data is None and Path(data.path).is_file():
            raise ValueError(f"the judge was trained on the file {data.path}: name the test file with DATA= or --data")
        test = data_file(self.data or data.path, "test")
        limits = Limits(data.max_row_characters, data.max_turns)
        rows = read_conversations([test], cache, labels="ignored", limits=limits)
        sample = test.parent / "sample_submission.csv"
        known = sample if os.path.lexists(sample) else None
        check_target(self.out, rows["id"], known)
        probabilities = average(models, rows, cache, self.overrides, parts)
        write_submission(self.out, rows["id"], probabilities, known)
        shutil.rmtree(parts, ignore_errors=True)  # what is left of them costs space, and no submission
        console.print(
            f"written: {self.out}, {len(rows):,} rows from {len(models)} fold{'s' if len(models) > 1 else ''}; "
            f"{int((~judgeable_rows(rows)).sum()):,} rows have nothing to judge and got the training prior"
        )
        if known is None:
            console.print(
                f"there is no {sample} to check it against: columns and ids were checked against the test file"
            )


@dataclass
class Inspect:
    """Show one real micro-batch: examples decoded, what was cut, boundaries; and draw who attends to whom."""

    overrides: Overrides = ()
    fold: Annotated[int, arg(help="The fold held out.")] = 0
    recipe: Name = "demo"
    data: Data = None
    step: Annotated[int, arg(help="The optimizer step to look at.")] = 0
    out: Annotated[Path, arg(help="The picture to write.")] = Path("runs/attention.png")

    def run(self) -> None:
        from arena.reporting.inspect import inspect_fold

        recipe = _recipe(self.recipe, self.data, self.overrides)
        _write_demo(recipe)
        inspect_fold(recipe, self.fold, self.step, self.out)


@dataclass
class Export:
    """Write a trained fold as a plain transformers model: adapter merged, head included."""

    fold: Annotated[int, arg(help="The fold to export.")] = 0
    recipe: Name = "demo"
    runs: Annotated[Path, arg(help="Where runs are kept.")] = Path("runs")
    out: Annotated[Path, arg(help="The folder to write.")] = Path("runs/export")
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], arg(help="Of the written weights.")] = "bfloat16"

    def run(self) -> None:
        from arena.judging.export import export_judge

        place = run_place(self.runs, f"{load_recipe(self.recipe).name}/fold{self.fold}")
        if self.out.exists():
            raise ValueError(f"{self.out} exists: name a new folder")
        export_judge(place / "model", self.out, self.dtype)
        console.print(f"written: {self.out}; load it with AutoModelForSequenceClassification.from_pretrained")


@dataclass
class Memory:
    """Show what a recipe takes and becomes on common cards: dtype, budget, what is computed again in the backward."""

    overrides: Overrides = ()
    recipe: Name = "gemma-2-9b"

    def run(self) -> None:
        from arena.model.create import known_config
        from arena.reporting.memory import print_cards

        recipe = load_recipe(self.recipe, self.overrides)
        print_cards(recipe, known_config(recipe.model))


@dataclass
class Settings:
    """List every setting of a recipe, with its type, default and meaning."""

    words: Positional[
        Annotated[
            tuple[str, ...], arg(metavar="[WORD ...]", help="Only settings about these, such as train. or memory.")
        ]
    ] = ()

    def run(self) -> None:
        from arena.reporting.settings import print_settings

        print_settings(self.words)


@dataclass
class DemoBase:
    """Make the tiny Gemma-2 that the demo recipe adapts: tokenizer and weights, trained from nothing."""

    out: Annotated[Path, arg(help="The folder to write.")]
    minutes: Annotated[float, arg(help="How long to train; 0 leaves the weights random.")] = 20.0
    seed: int = 0
    threads: Annotated[int, arg(help="Cores to use.")] = 1

    def run(self) -> None:
        from arena.demo.base import make_demo_base

        make_demo_base(self.out, self.minutes * 60, self.seed, self.threads)


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "infer": Infer,
    "inspect": Inspect,
    "export": Export,
    "bench": Bench,
    "gpu": Gpu,
    "memory": Memory,
    "settings": Settings,
    "demo-base": DemoBase,
}


def _check_command(words: list[str]) -> None:
    """Answers `--version`, and names the nearest command where the first word is none."""
    first = words[0] if words else "--help"
    if first == "--version":
        print(f"arena {__version__}")
        sys.exit(0)
    if not first.startswith("-") and first not in COMMANDS:
        near = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        console.print(f"arena: there is no command {printable(first)!r}: {hint}", style="red")
        sys.exit(2)


@ending_at_once()
def main() -> None:
    """Runs a subcommand. What the user can mend is said in one message, with status 2; ARENA_DEBUG=1 shows where."""
    about = "Train and run judges of pairwise preference on packed, padding-free batches."
    _check_command(sys.argv[1:])
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, description=about, prog="arena")
    quiet()
    try:
        command.run()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("ARENA_DEBUG"):
            raise
        console.print(f"arena: {printable(str(error))}", style="red")
        sys.exit(2)
    except KeyboardInterrupt:  # the second Ctrl-C
        console.print("ended at once")
        sys.exit(130)
    except Stopped as stopped:
        console.print(f"arena: {stopped}", style="yellow")
        sys.exit(stopped.status)


def _recipe(name: str, data: str | None, overrides: tuple[str, ...]) -> Recipe:
    """The recipe; rows of one's own are never replaced by demo rows."""
    recipe = load_recipe(name, overrides)
    if data is None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": data, "synthetic_rows": None})})


def _write_demo(recipe: Recipe) -> None:
    """Writes the demo's rows on first use, and says so."""
    from arena.data.synthetic import ensure_demo

    if ensure_demo(recipe):
        console.print(
            f"demo data written to {recipe.data.path}: labelled and unlabelled rows {recipe.data.synthetic_rows}"
        )


if __name__ == "__main__":
    main()
