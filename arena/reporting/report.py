"""The report of a fold: a table on the terminal and a figure in its folder.

Figures are written to files, without a window or display and regardless of environment variables.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from arena.metrics import Score
from arena.progress import console

COMPARISONS = (
    ("bayes_log_loss", "best possible (the probabilities from which labels were drawn)"),
    ("recalibrated_log_loss", "this judge recalibrated, by a weight fitted on other held-out rows"),
    ("baseline_log_loss", "simple baseline (logistic regression on TF-IDF and lengths)"),
    ("blend_log_loss", "judge and baseline blended, by weights fitted on other held-out rows"),
    ("prior_log_loss", "predicting the training prior"),
    ("base_log_loss", "the base before training, per token"),
)
NAMES = {
    "log_loss": "log-loss",
    "brier": "Brier score",
    "ece": "calibration error",
    "classwise_ece": "class-wise calibration error",
    "agreement_base_rate": "  of the most frequent class",
    "agreement_without_ties": "agreement without ties",
    "agreement_without_ties_base_rate": "  of the more frequent class",
    "flip_rate": "flip rate",
}  # of metrics, where they are not their keys
MOST_CLASSES = 10  # of a confusion matrix that fits a terminal; a larger one is in metrics.json


def new_figure(rows: int = 1, columns: int = 1, *, sharey: bool = False, **settings: Any) -> tuple[Any, Any]:
    """A matplotlib figure without pyplot, and its axes: one, or an array (rows, columns) of a grid.

    Args:
        settings: arguments of `matplotlib.figure.Figure`.
    """
    # notebooks export a backend that may not be installed, and then matplotlib could not even be imported
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # for other figures of this process
    figure = matplotlib.figure.Figure(layout="constrained", **settings)
    return figure, figure.subplots(rows, columns, sharey=sharey, squeeze=rows == columns == 1)


def print_report(metrics: dict[str, Any]) -> None:
    """Prints the log-loss along with its references, then the other metrics and the run's size and time."""
    table = Table(
        title=f"{metrics['recipe']}, fold {metrics['fold']}: {metrics['n_eval']:,} held-out rows", title_justify="left",
        caption=f"difference: this {_kind(metrics)}'s log-loss minus the row's; negative is better",
        caption_justify="left",
    )  # fmt: skip
    table.add_column("log-loss", justify="right")
    table.add_column("difference", justify="right")
    table.add_column("")
    loss = metrics["log_loss"]
    table.add_row(f"{loss:.4f}", "", Text(f"this {_kind(metrics)}", style="bold"))
    if _is_chosen(metrics):
        last = metrics["last_step_scores"]["log_loss"]["value"]
        table.add_row(
            f"{last:.4f}", f"{loss - last:+.4f}", "the last step, which was not chosen by its score on these rows"
        )
    for key, words in COMPARISONS:
        if metrics.get(key) is not None:
            table.add_row(f"{metrics[key]:.4f}", f"{loss - metrics[key]:+.4f}", words)
    console.print(table)
    if (note := remark(metrics)) is not None:
        console.print(note)
    if "scores" in metrics:
        console.print(score_table(metrics))
        console.print(slice_table(metrics["slices"]))
    elif known := [key for key in ("perplexity", "accuracy", "brier", "ece", "classwise_ece") if key in metrics]:
        console.print(", ".join(f"{NAMES.get(key, key)} {metrics[key]:.3f}" for key in known))
    if metrics.get("kinds"):  # runs of earlier versions have none
        console.print(kind_table(metrics["kinds"]))
    if "macro_f1" in metrics:
        console.print(f"macro F1 {metrics['macro_f1']:.3f}")
        if len(metrics["confusion"]) <= MOST_CLASSES:
            console.print(confusion_table(metrics["confusion"]))
    console.print(
        f"{metrics['tokens']:,} tokens "
        f"({metrics['unique_tokens'] / metrics['tokens']:.1%} computed, the rest shared) in "
        f"{metrics['train_seconds']:.0f} s ({metrics['tokens_per_second']:,.0f} per second), fill rate "
        f"{metrics['fill_rate']:.1%}, peak memory {metrics['peak_memory_bytes'] / 2**30:.1f} GiB"
    )


def _kind(metrics: dict[str, Any]) -> str:
    return "language model" if "perplexity" in metrics else "judge"


def _is_chosen(metrics: dict[str, Any]) -> bool:
    """Whether the judge is not that of the last step, so that its figures are of the rows that chose it."""
    return "last_step_scores" in metrics and metrics["best_step"] != metrics["steps"]


def score_table(metrics: dict[str, Any]) -> Table:
    """The metrics with their intervals; beside them those of the last step, unless it is the best."""
    table = Table(
        "", title="scores, with 95% intervals", title_justify="left", caption_justify="left",
        caption="an interval of a calibration error is corrected for chance, and may lie below the value",
    )  # fmt: skip
    columns = {"best step" if _is_chosen(metrics) else "value": metrics["scores"]}
    if _is_chosen(metrics):
        columns["last step"] = metrics["last_step_scores"]
    for name in columns:
        table.add_column(name, justify="right")
        table.add_column("interval", justify="right")
    table.add_column("rows", justify="right")
    for key, score in metrics["scores"].items():
        cells = [cell for scores in columns.values() for cell in _cells(scores.get(key))]
        table.add_row(NAMES.get(key, key), *cells, f"{score['rows']:,}")
    return table


def slice_table(slices: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Log-loss and accuracy on each slice, with their intervals, and the prior's; without classes, the base's."""
    table = Table("", title="slices, ± half of the 95% interval", title_justify="left")
    known = {key for values in slices.values() for scores in values.values() for key in scores}
    other, names = "base" if "base_log_loss" in known else "prior", {"log_loss": "log-loss", "accuracy": "accuracy"}
    shown = {key: name for key, name in names.items() if key in known}
    for column in ("rows", *(each for name in shown.values() for each in (name, f"{other}'s"))):
        table.add_column(column, justify="right")
    for kind, values in slices.items():
        table.add_row(kind)
        for at, (value, scores) in enumerate(values.items()):
            cells = [f"{scores['log_loss']['rows']:,}"]
            for key in shown:
                cells += [_short_cell(scores[key]), _cells(scores[f"{other}_{key}"])[0]]
            table.add_row(f"  {value}", *cells, end_section=at == len(values) - 1)
    return table


def _short_cell(score: dict[str, Any]) -> str:
    """A score and half of its interval as text: the table has to fit a terminal of 80 columns."""
    half = "" if score["low"] is None else f" ± {(score['high'] - score['low']) / 2:.3f}"
    return f"{score['value']:.3f}{half}"


def kind_table(kinds: dict[str, dict[str, Any]]) -> Table:
    """What training rows say of kinds of special rows, and what that gains on the held-out ones."""
    table = Table(
        "kind", title="special rows: their labels in training, and by how much these lower the log-loss",
        title_justify="left", caption_justify="left",
        caption="rows are those that are of the kind in any order; scores are of the judge alone",
    )  # fmt: skip
    for name in ("rows", "mean label", "held out", "gain ± standard error", "taken"):
        table.add_column(name, justify="right")
    for name, each in kinds.items():
        gain = "" if each["gain"] is None else f"{each['gain']:+.4f} ± {each['standard_error']:.4f}"
        mean = " ".join(f"{value:.2f}" for value in each["mean"])
        counts = f"{each['train_rows']:,}", mean, f"{each['held_out_rows']:,}"
        table.add_row(name, *counts, gain, "yes" if each["taken"] else "no")
    return table


def confusion_table(counts: dict[str, dict[str, int]]) -> Table:
    """How many rows of each class were predicted as which."""
    table = Table("label", title="confusion matrix: rows with a label, by what was predicted", title_justify="left")
    for name in counts:
        table.add_column(name, justify="right")
    for name, row in counts.items():
        table.add_row(name, *(f"{count:,}" for count in row.values()))
    return table


def _cells(score: dict[str, Any] | None) -> tuple[str, str]:
    """A score and its interval as text; nothing where there is none."""
    if score is None:
        return "", ""
    interval = "" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"
    return f"{score['value']:.3f}", interval


def score_cells(score: Score, sign: str = "") -> tuple[str, str]:
    """A score and its interval as text, to four digits; `sign` is + where a plus is shown."""
    interval = "" if score.low is None or score.high is None else f"{score.low:{sign}.4f} to {score.high:{sign}.4f}"
    return f"{score.value:{sign}.4f}", interval


def remark(metrics: dict[str, Any]) -> str | None:
    """Advice if the model is not better than the prior and the simple baseline, or its base; None if it is."""
    names = {
        "prior_log_loss": "predicting the training prior", "baseline_log_loss": "the simple baseline",
        "base_log_loss": "the base before training",
    }  # fmt: skip
    known = {name: metrics[key] for key, name in names.items() if metrics.get(key) is not None}
    beaten_by = [name for name, loss in known.items() if loss <= metrics["log_loss"]]
    if not beaten_by:
        return None
    return (
        f"This {_kind(metrics)} is no better than {' and '.join(beaten_by)}: more rows, more steps (train.epochs), a "
        "larger base (model.base) or another learning rate (train.lr, train.head_lr) usually help."
    )


def draw_report(folder: Path) -> Path:
    """Draws the losses of a training run, with references, to `report.png` in its folder."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    steps = [line for line in lines if "loss" in line]
    scores = [line for line in lines if "eval_log_loss" in line]
    figure, axes = new_figure(figsize=(8, 4.5))
    axes.plot(
        [line["step"] for line in steps], [line["loss"] for line in steps], color="0.7", label="training, each step"
    )
    axes.plot([s["step"] for s in scores], [s["eval_log_loss"] for s in scores], "o-", label="held out, one order")
    axes.axhline(metrics["log_loss"], color="C0", label=f"held out, final: {metrics['log_loss']:.4f}")
    for colour, (key, words) in zip(("C2", "C5", "C1", "C4", "C3", "C6"), COMPARISONS, strict=True):
        if metrics.get(key) is not None:
            axes.axhline(
                metrics[key], color=colour, linestyle="--", label=f"{words.split(' (')[0]}: {metrics[key]:.4f}"
            )
    axes.set(xlabel="step", ylabel="log-loss", title=f"{metrics['recipe']}, fold {metrics['fold']}")
    axes.legend(fontsize="small")
    path = folder / "report.png"
    figure.savefig(path, dpi=120)
    return path
