"""What cross-validation found, as a table on the terminal."""

from __future__ import annotations

from statistics import mean, stdev

from rich.table import Table

from arena.progress import console
from arena.reporting.report import score_cells
from arena.training.cross_validation import CrossValidated

REFERENCES = {
    "prior_log_loss": "prior", "baseline_log_loss": "baseline", "base_log_loss": "base", "blend_log_loss": "blend"
}  # fmt: skip


def print_folds(result: CrossValidated) -> None:
    """Prints the log-loss of each fold, their mean and spread, and the scores of all rows together."""
    shown = {key: name for key, name in REFERENCES.items() if all(fold.get(key) is not None for fold in result.folds)}
    last = [
        fold["last_step_scores"]["log_loss"]["value"] if "last_step_scores" in fold else fold["log_loss"]
        for fold in result.folds
    ]
    columns = {"log-loss": [fold["log_loss"] for fold in result.folds], "last step": last}
    columns |= {name: [fold[key] for fold in result.folds] for key, name in shown.items()}
    table = Table(
        "fold",
        title="log-loss by fold",
        title_justify="left",
        caption_justify="left",
        caption="the last step was not chosen by its score on these rows; blend: of judge and baseline",
    )
    for name in ("rows", *columns):
        table.add_column(name, justify="right")
    for at, fold in enumerate(result.folds):
        table.add_row(str(fold["fold"]), f"{fold['n_eval']:,}", *(f"{each[at]:.4f}" for each in columns.values()))
    table.add_section()
    table.add_row("mean", "", *(f"{mean(each):.4f}" for each in columns.values()))
    table.add_row("spread", "", *(f"{stdev(each):.4f}" for each in columns.values()))
    console.print(table)
    console.print(_of_all_rows(result))


def _of_all_rows(result: CrossValidated) -> Table:
    table = Table("", title="all rows, each by the fold that held it out, with 95% intervals", title_justify="left")
    for name in ("best step", "interval", "last step", "interval"):
        table.add_column(name, justify="right")
    for name, score in result.best.items():
        table.add_row(name, *score_cells(score), *score_cells(result.last[name]))
    return table
