"""The subcommands of `arena`: their options, and what they run. Modules that take long to import are imported there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from arena.bundle.command import Bundle
from arena.command_line import command
from arena.config import INFER_SETTINGS, judge_settings, load_recipe, refuse_both, run_place
from arena.html_report.command import Report
from arena.inference.command import JudgeFiles
from arena.options import Data, Judged, Labels, Name, Overrides, recipe_with_rows, words_arg
from arena.progress import console, optional
from arena.reporting.evaluate_command import Evaluate
from arena.reporting.leaderboard_command import Leaderboard
from arena.serving.command import Serve
from arena.stopping import Stopped
from arena.storage.files import local_path


@dataclass
class Train:
    """Train with one fold held out, evaluate on that fold, and write runs/RECIPE/foldK."""

    overrides: Overrides = ()
    fold: Annotated[int, arg(help="The fold to hold out.")] = 0
    recipe: Name = "demo"
    data: Data = None
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")
    fresh: Annotated[bool, arg(help="Move an earlier run of this fold to runs/RECIPE/earlier and start again.")] = False

    def run(self) -> None:
        from arena.distributed import is_main
        from arena.reporting.report import draw_report, print_report
        from arena.training.run import run_fold

        if self.fresh:
            refuse_both("--fresh", self.overrides, "train.resume")
        recipe = recipe_with_rows(self.recipe, self.runs, self.data, self.overrides)
        folder = run_place(self.runs, f"{recipe.name}/fold{self.fold}")
        try:
            metrics = run_fold(recipe, self.fold, self.runs, fresh=self.fresh)
        except Stopped:
            console.print(f"everything is saved in {folder}: the same command resumes from there")
            raise
        if is_main():
            with optional("showing the result", f"see {folder / 'metrics.json'}"):
                print_report(metrics)
            with optional("drawing report.png", "run the same command again to draw it"):
                draw_report(folder)
            names = ["metrics.json", "oof.csv", "log.jsonl", "model", "report.png"]
            console.print(f"written: {folder} ({', '.join(name for name in names if (folder / name).exists())})")


@dataclass
class Cv:
    """Train and score every fold, and write the out-of-fold predictions and scores of all rows to runs/RECIPE."""

    overrides: Overrides = ()
    recipe: Name = "demo"
    data: Data = None
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")
    at_once: Annotated[int, arg(help="Folds trained at the same time, each on a GPU of its own.")] = 1
    fresh: Annotated[bool, arg(help="Move existing folds to runs/RECIPE/earlier and train all anew.")] = False

    def run(self) -> None:
        from arena.reporting.cross_validation import print_folds
        from arena.training.cross_validation import cross_validate

        if self.fresh:
            refuse_both("--fresh", self.overrides, "train.resume")
        recipe = recipe_with_rows(self.recipe, self.runs, self.data, self.overrides)
        folder = run_place(self.runs, recipe.name)
        try:
            result = cross_validate(recipe, self.runs, at_once=self.at_once, fresh=self.fresh)
        except Stopped:
            console.print(f"everything is saved in {folder}: the same command resumes from there")
            raise
        print_folds(result)
        console.print(f"written: {folder} (oof.csv, cv.json)")


@dataclass
class Infer:
    """Judge a test file with one judge, or the average of a run's finished folds, and write a checked submission."""

    overrides: Positional[
        Annotated[tuple[str, ...], words_arg("[KEY=VALUE ...]", "Settings, such as judge.swap=false.")]
    ] = ()
    recipe: Judged = "demo"
    data: Annotated[
        str | None,
        arg(metavar="PATH", help="Folder with a test file, or one file.", help_behavior_hint="(the training data's)"),
    ] = None
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")
    out: Annotated[Path, arg(help="The submission to write.")] = Path("submission.csv")
    predictions: Annotated[tuple[str, ...], arg(metavar="name=FILE ...", help="A blend's files for test rows.")] = ()
    deadline: Annotated[str | None, arg(help="Judge as much as fits into this time, such as 8.5h or 30m.")] = None
    at_once: Annotated[int | None, arg(help="Processes that share the rows; by default one for each GPU.")] = None

    def run(self) -> None:
        from arena.distributed import fix_threads
        from arena.inference.blend import is_blend, read_blend
        from arena.inference.find import find_models
        from arena.inference.infer import infer
        from arena.inference.infer_blend import infer_blend
        from arena.inference.infer_deadline import infer_within

        fix_threads()
        local_path(self.out, "--out", [".csv"])
        settings = judge_settings(self.overrides, INFER_SETTINGS)
        if self.at_once is not None and self.deadline is None:
            raise ValueError("--at-once is for work before a deadline: give one too, such as --deadline 9h")
        if is_blend(self.recipe):
            if self.deadline is not None:
                raise ValueError(f"{self.recipe} is a blend, and --deadline is for one run: name a run of it")
            infer_blend(read_blend(Path(self.recipe)), self.data, self.out, self.predictions, settings)
            return
        if self.predictions:
            raise ValueError(f"{self.recipe} is not a blend, and has no place for --predictions: leave them out")
        models = find_models(self.recipe, self.runs, self.overrides)
        if self.deadline is not None:
            infer_within(self.deadline, models, self.data, self.out, settings, self.at_once)
            return
        infer(models, self.data, self.out, settings)


@dataclass
class Blend:
    """Fit a blend of runs and of files of predictions on labelled rows, and write it for `arena infer`."""

    members: Positional[
        Annotated[tuple[str, ...], words_arg("MEMBER ...", "Runs, files of predictions, baseline; or name=MEMBER.")]
    ] = ()
    labels: Labels = None
    out: Annotated[Path, arg(help="The blend to write.")] = Path("blend.json")
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")
    seed: Annotated[int, arg(help="The seed of the division of rows into folds.")] = 0

    def run(self) -> None:
        from arena.reporting.blend import print_blend
        from arena.training.blending import blend_members

        local_path(self.out, "--out", [".json"])
        if not self.members:
            raise ValueError("name the members, such as `arena blend demo baseline`")
        print_blend(blend_members(self.members, self.labels, self.out, self.runs, self.seed))
        console.print(f"written: {self.out}; apply it with `{command('arena', 'infer', '--recipe', str(self.out))}`")


@dataclass
class Compare:
    """Compare two runs or files of predictions on the labelled rows of both: settings, metrics and slices."""

    members: Positional[Annotated[tuple[str, ...], words_arg("ONE OTHER", "Two members, as for `arena blend`.")]] = ()
    labels: Labels = None
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")

    def run(self) -> None:
        from arena.reporting.blend import print_comparison
        from arena.training.comparing import compare

        print_comparison(compare(self.members, self.labels, self.runs))


@dataclass
class Inspect:
    """Show one real micro-batch: its decoded examples, truncation and boundaries, and a picture of its attention."""

    overrides: Overrides = ()
    fold: Annotated[int, arg(help="The held-out fold.")] = 0
    recipe: Name = "demo"
    data: Data = None
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")
    step: Annotated[int, arg(help="The optimizer step to show.")] = 0
    out: Annotated[Path, arg(help="The picture to write.")] = Path("runs/attention.png")

    def run(self) -> None:
        from arena.reporting.inspect import inspect_fold, picture_endings

        local_path(self.out, "--out", picture_endings())
        recipe = recipe_with_rows(self.recipe, self.runs, self.data, self.overrides)
        inspect_fold(recipe, self.fold, self.step, self.out)


@dataclass
class Export:
    """Write a trained fold as a plain transformers model, with the adapter merged and the head included."""

    overrides: Positional[
        Annotated[tuple[str, ...], words_arg("[KEY=VALUE ...]", "model.base=FOLDER if the base was moved.")]
    ] = ()
    fold: Annotated[int | None, arg(help="The fold of a run; required if several are finished.")] = None
    recipe: Judged = "demo"
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")
    out: Annotated[Path, arg(help="The folder to write.")] = Path("runs/export")
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], arg(help="The dtype of the weights.")] = "bfloat16"

    def run(self) -> None:
        from arena.inference.export import export_judge
        from arena.inference.find import find_model
        from arena.inference.saved import auto_class, read_judge

        if local_path(self.out, "--out").exists():
            raise ValueError(f"{self.out} already exists: name a new folder")
        settings = judge_settings(self.overrides, ("model.base",))
        model = find_model(self.recipe, self.runs, self.overrides, self.fold)
        export_judge(model, self.out, self.dtype, settings)
        kind = auto_class(read_judge(model).task)
        console.print(f"written: {self.out}, from {model}; load it with {kind}.from_pretrained")


@dataclass
class Generate:
    """Answer the prompts of a file, or one prompt, with an instruction-tuned model or any base."""

    words: Positional[
        Annotated[
            tuple[str, ...],
            words_arg("MODEL [IN OUT] [KEY=VALUE ...]", "A run, export or base; files to read and write; settings."),
        ]
    ] = ()
    prompt: Annotated[str | None, arg(help="One prompt, in place of IN and OUT.", help_behavior_hint="")] = None
    max_new_tokens: Annotated[int, arg(help="The most tokens of an answer.")] = 256
    temperature: Annotated[float, arg(help="Tokens are drawn; with 0 the most probable ones are taken.")] = 0.0
    top_p: Annotated[float, arg(help="Draw from the fewest tokens that have this much probability.")] = 1.0
    top_k: Annotated[int | None, arg(help="Draw from this many most probable tokens.")] = None
    seed: Annotated[int, arg(help="The seed of the draws.")] = 0
    batch: Annotated[int, arg(help="The most tokens of a batch, with answers and padding.")] = 16_384
    score: Annotated[Literal["squad", "rouge"] | None, arg(help="Score the answers by those of the file.")] = None
    held_out: Annotated[bool, arg(help="Answer only the rows that the run's fold held out.")] = False
    limit: Annotated[int | None, arg(help="Answer only so many of the first rows.")] = None
    fold: Annotated[int | None, arg(help="The fold of a run; required if several are finished.")] = None
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")

    def run(self) -> None:
        from arena.inference.answers import answer
        from arena.inference.prompt_rows import Wanted
        from arena.inference.sampling import Sampling

        sampling = Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.seed)
        wanted = Wanted(self.score, self.held_out, self.limit)
        answer(self.words, self.prompt, sampling, wanted, tokens=self.batch, runs=self.runs, fold=self.fold)


@dataclass
class Memory:
    """Estimate the memory that a recipe needs on common GPUs, and the dtype, token budget and recomputation it uses."""

    overrides: Overrides = ()
    recipe: Name = "gemma-2-9b"

    def run(self) -> None:
        from arena.reporting.memory import known_config, print_cards
        from arena.tasks import task_of

        recipe = load_recipe(self.recipe, self.overrides)
        task_of(recipe)
        print_cards(recipe, known_config(recipe.model))


@dataclass
class Settings:
    """List every setting of a recipe, with its type, default and meaning."""

    words: Positional[
        Annotated[tuple[str, ...], words_arg("[WORD ...]", "Only settings whose text contains all of these words.")]
    ] = ()

    def run(self) -> None:
        from arena.reporting.settings import print_settings

        print_settings(self.words)


Commands = dict[str, Callable[..., Any]]
COMMANDS: Commands = {
    "train": Train,
    "cv": Cv,
    "infer": Infer,
    "judge": JudgeFiles,
    "blend": Blend,
    "compare": Compare,
    "evaluate": Evaluate,
    "leaderboard": Leaderboard,
    "report": Report,
    "inspect": Inspect,
    "export": Export,
    "bundle": Bundle,
    "serve": Serve,
    "generate": Generate,
    "memory": Memory,
    "settings": Settings,
}
