"""Judges of people's votes on a small pre-trained base, beside references: `python -m benchmarks votes FILE ...`.

Each file is a set of votes. Settings were chosen on fold 0; what is reported is fold 1. Every run is resumed where it
was stopped, and a finished one is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from tyro.conf import Positional, arg

from arena.config import change, load_recipe
from arena.progress import console
from arena.reporting.report import new_figure
from arena.storage.files import atomic_write, local_path, write_json, write_text
from arena.training.run import run_fold
from benchmarks.machine import made_by, provenance
from benchmarks.tables import table

# By a file's name, what differs from the recipe: by epochs or steps, as many tokens as about half an hour takes.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "mtbench_human": ("train.epochs=0.75",),
    "hh_helpful": (
        "data.folds=20",
        "prompt.template=pointwise",
        "prompt.max_length=256",
        "train.batch_size=32",
        "train.max_steps=150",
        "train.evaluate_every=50",
    ),
    "qa_feedback": (
        "prompt.template=pointwise",
        "prompt.max_length=256",
        "train.batch_size=32",
        "train.max_steps=160",
        "train.evaluate_every=80",
    ),
    "llmfao_soft": ("train.epochs=0.65",),
}
COLUMNS = {
    "votes": "{votes}", "rows trained": "{n_train:,}", "held out": "{n_eval:,}", "steps": "{steps}",
    "minutes": "{minutes:.0f}", "prior": "{prior_log_loss:.3f}", "baseline": "{baseline_log_loss:.3f}",
    "judge": "{log_loss:.3f}", "interval": "{low:.3f} to {high:.3f}",
    "recalibrated": "{recalibrated_log_loss:.3f}", "both blended": "{blend_log_loss:.3f}",
    "accuracy": "{accuracy:.3f}", "flips": "{flip_rate:.3f}",
}  # fmt: skip
LINES = {
    "prior_log_loss": ("predicting the prior", "C3"),
    "baseline_log_loss": ("baseline", "C1"),
    "blend_log_loss": ("judge and baseline blended", "C4"),
}


SMOOTHED = 16  # steps over which the training loss is averaged: a step of 8 examples says little


@dataclass
class Votes:
    """Train a judge on each file of votes, and write a table and learning curves."""

    files: Positional[Annotated[tuple[Path, ...], arg(metavar="FILE ...", help="Files of labelled votes.")]]
    recipe: Annotated[str, arg(help="A shipped recipe or the path of a YAML file.")] = "gemma-3-270m"
    fold: Annotated[int, arg(help="The fold to hold out.")] = 1
    runs: Annotated[Path, arg(help="The folder of the runs.")] = Path("runs/votes")
    out: Annotated[Path, arg(help="The folder for votes.json, .md and .png.")] = Path("docs")
    settings: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...", help="Settings to change in all runs.")] = ()

    def run(self) -> list[Path]:
        """Trains what is not trained yet, writes the three files and gives their paths.

        Raises:
            ValueError: no file is named, or one cannot be used.
        """
        if not self.files:
            raise ValueError("name at least one file of labelled votes, such as data/votes.csv")
        local_path(self.out, "--out")
        base = load_recipe(self.recipe, self.settings)
        found = {}
        for file in self.files:
            recipe = change(base, [f"name={file.stem}", f"data.path={file}", *SETTINGS.get(file.stem, ())])
            metrics = run_fold(recipe, self.fold, self.runs)
            folder = self.runs / recipe.name / f"fold{self.fold}"
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            points = {
                key: [(each["step"], each[key]) for each in log if key in each] for key in ("eval_log_loss", "loss")
            }
            curves = {"curve": points["eval_log_loss"], "train_curve": points["loss"]}
            found[file.stem] = {**metrics, "settings": SETTINGS.get(file.stem, ()), **curves}
        paths = write_votes({**provenance(), "recipe": base.model_dump(mode="json"), "votes": found}, self.out)
        console.print(f"written: {', '.join(map(str, paths))}")
        return paths


def write_votes(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `votes.json`, `.md` and `.png` and gives their paths."""
    paths = [folder / f"votes.{ending}" for ending in ("json", "md", "png")]
    write_json(paths[0], result)
    write_text(paths[1], as_page(result, paths[2].name))
    draw_curves(result, paths[2])
    return paths


def as_page(result: dict[str, Any], picture: str) -> str:
    """The Markdown page that shows `picture`."""
    rows = [row_of(name, metrics) for name, metrics in result["votes"].items()]
    device = str(next(iter(result["votes"].values()))["device"])
    changed = [
        f"- `{name}`: {', '.join(f'`{each}`' for each in metrics['settings'])}"
        for name, metrics in result["votes"].items()
        if metrics["settings"]
    ]
    parts = [
        f"# Judges of people's votes, {result['date'][:10]}", made_by(device, result),
        f"Recipe {result['recipe']['name']}, log-loss on the rows of the fold that was held out, after the last step. "
        "`baseline` is a logistic regression on TF-IDF and lengths; `both blended` is the product of its probabilities "
        "and the judge's, with weights that are fitted on other held-out prompts. Intervals are 95% intervals by "
        "prompt. `minutes` are of training steps. Verdicts on answers that are read one by one cannot flip, and "
        "nothing is fitted on rows of fewer than five prompts: these cells are empty.",
        table(COLUMNS, rows), f"![learning curves]({picture})",
    ]  # fmt: skip
    if changed:
        parts += ["Settings that differ from the recipe's:", "\n".join(changed)]
    return "\n\n".join(parts) + "\n"


def row_of(name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows of a run."""
    scores = metrics["last_step_scores"]
    loss = scores["log_loss"]
    # answers that are read one by one have no order
    values = {key: scores[key]["value"] if key in scores else None for key in ("accuracy", "flip_rate")}
    return {
        **metrics, "votes": name, "minutes": metrics["train_seconds"] / 60, "log_loss": loss["value"],
        "low": loss["low"], "high": loss["high"], **values,
    }  # fmt: skip


def draw_curves(result: dict[str, Any], path: Path) -> None:
    """A panel for each set: the log-loss of the held-out rows by step, and the references as lines."""
    every = result["votes"]
    figure, axes = new_figure(-(-len(every) // 2), min(2, len(every)), figsize=(11, 3.6 * -(-len(every) // 2)))
    flat = list(axes.flat) if len(every) > 1 else [axes]
    for axis, (name, metrics) in zip(flat, every.items(), strict=False):
        shown = pd.DataFrame(metrics["train_curve"], columns=["step", "loss"]).rolling(SMOOTHED, on="step").mean()
        axis.plot(shown["step"], shown["loss"], color="0.75", label=f"judge, training, mean of {SMOOTHED} steps")
        steps, losses = zip(*metrics["curve"], strict=True)
        axis.plot(steps, losses, "o-", label="judge, held out, one order")
        axis.plot([metrics["steps"]], [row_of(name, metrics)["log_loss"]], "C0*", label="judge, held out, both orders")
        for key, (words, colour) in LINES.items():
            if metrics[key] is not None:
                axis.axhline(metrics[key], color=colour, linestyle="--", label=words)
        axis.set(title=name, xlabel="step", ylabel="log-loss")
        axis.legend(fontsize="small")
    for axis in flat[len(every) :]:
        axis.set_visible(False)
    with atomic_write(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
