"""What the order of work before a deadline is worth: `python -m benchmarks deadline`.

Every judge of a run predicts rows that none of them was trained on, in each order of A and B. Then the passes of `arena
infer --deadline` are played through: at any time some rows have the mean of one pass more than the others. Which rows
these are differs from rule to rule, and the time that they took does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from arena.data.files import data_file, read_files
from arena.data.predictions import read_predictions, rows_of
from arena.distributed import device_name
from arena.inference.by_worth import in_order, passes_of, worth
from arena.inference.find import find_models
from arena.inference.infer import LoadedJudge
from arena.inference.saved import check_alike, read_judge
from arena.metrics import log_loss
from arena.packing.bins import cost
from arena.progress import console
from arena.storage.files import local_path, write_json, write_text
from benchmarks.machine import made_by, provenance
from benchmarks.tables import table

TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a pass

Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]  # probabilities (n, C), costs (n,) -> (n,), the largest first


def first_come(probabilities: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The order of the file."""
    return np.zeros(len(probabilities))


def shortest(probabilities: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Whatever they are."""
    return -costs


def gap(probabilities: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """How close the two most probable classes are."""
    ranked = np.sort(probabilities, axis=1)
    return np.asarray(ranked[:, -2] - ranked[:, -1])


def closest(probabilities: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The expected gain, however long it takes."""
    return worth(probabilities, np.ones(len(probabilities)))


RULES: Mapping[str, Rule] = {
    "first come": first_come, "shortest": shortest, "gap of the two best": gap, "expected gain": closest,
    "expected gain by time": worth,
}  # fmt: skip


def simulate(truth: np.ndarray, found: np.ndarray, costs: np.ndarray, rule: Rule) -> list[dict[str, float]]:
    """The log-loss at some times of each pass after the first one.

    Args:
        truth: float64 (n, C), the labels, which may be soft.
        found: float64 (passes, n, C), what each pass predicts.
        costs: float64 (passes, n), the time that each row takes.
    """
    points = []
    for number in range(1, len(found)):
        before = found[:number].mean(axis=0)
        after = found[: number + 1].mean(axis=0)
        order = np.argsort(-rule(before, costs[number]), kind="stable")
        done_by = np.cumsum(costs[number, order]) / costs[number].sum()
        for time in TIMES:
            judged = order[done_by <= time + 1e-9]
            probabilities = before.copy()
            probabilities[judged] = after[judged]
            points.append({"pass": number + 1, "time": time, "log_loss": float(log_loss(truth, probabilities))})
    return points


@dataclass
class Deadline:
    """Compare the order of `arena infer --deadline` with others, on rows that a run was not trained on."""

    recipe: Annotated[str, arg(help="A run or its recipe.")] = "demo"
    data: Annotated[str | None, arg(help="A folder with a test file, or one file.")] = None
    truth: Annotated[Path | None, arg(help="The labels of its rows by id; by default truth.csv beside it.")] = None
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")
    out: Annotated[Path, arg(help="The folder for bench-deadline.json and .md.")] = Path("docs")

    def run(self) -> None:
        """Judges, plays the passes through, and writes and prints the table."""
        local_path(self.out, "--out")
        judges = [read_judge(model) for model in find_models(self.recipe, self.runs)]
        check_alike(judges)
        settings, task = judges[0].recipe.data, judges[0].task
        test = data_file(self.data or settings.path, "test", settings.cache)
        rows = read_files([test], task, settings, "ignored")
        which = np.flatnonzero(rows.has_input)
        truth = rows_of(read_predictions(self.truth or test.with_name("truth.csv"), task.columns), rows.ids)[which]
        passes, loaded = passes_of(judges), LoadedJudge(settings)
        found, costs = [], []
        for fold, order in passes:
            judge = loaded.become(judges[fold])
            lengths, evaluation = in_order(judge, rows, order)
            found.append(evaluation(which).probabilities(judge.classifier, dtype=judge.recipe.model.dtype))
            costs.append(cost(np.zeros_like(which), lengths[which]))
            device = device_name(judge.device)
            del judge  # before the next one is loaded
        points = {name: simulate(truth, np.array(found), np.array(costs), rule) for name, rule in RULES.items()}
        named = [f"{judges[fold].folder.resolve().parent.name}, order {order}" for fold, order in passes]
        result = {**provenance(), "device": device, "rows": len(which), "passes": named, "rules": points}
        write_json(self.out / "bench-deadline.json", result)
        write_text(self.out / "bench-deadline.md", (page := as_page(result)))
        console.print(page)


def as_page(result: dict[str, Any]) -> str:
    """The Markdown page."""
    columns = {"pass": "{pass}", "time": "{time:.0%}"} | {name: f"{{{name}:.4f}}" for name in result["rules"]}
    first = next(iter(result["rules"].values()))
    lines = [
        {"pass": result["passes"][point["pass"] - 1], "time": point["time"]}
        | {name: points[at]["log_loss"] for name, points in result["rules"].items()}
        for at, point in enumerate(first)
    ]
    parts = [
        "# What the order of work before a deadline is worth", made_by(result["device"], result),
        f"Log-loss of {result['rows']:,} rows that the judges were not trained on, after so much of the time of each "
        "pass, all earlier passes being complete. The expected gain is 1 - sum(p^2); arena begins "
        "with the rows where it is largest for the time that they take.",
        table(columns, lines),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"
