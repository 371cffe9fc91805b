"""The table of fine-tuning techniques as JSON and Markdown; `python -m benchmarks techniques` makes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from arena.config import load_recipe
from arena.progress import console
from arena.settings import Recipe
from arena.storage.files import local_path, write_json, write_text
from benchmarks.machine import made_by, provenance
from benchmarks.parts import Result
from benchmarks.tables import gib, table
from benchmarks.techniques import SWEEP, SWEEP_SHARE, run_techniques

COLUMNS = {
    "technique": "{technique}", "trainable": "{trainable_parameters:,}", "lr": "{lr:.2g}", "head lr": "{head_lr:.2g}",
    "seconds": "{train_seconds:.0f}", "tokens/s": "{tokens_per_second:,.0f}", "peak GiB": "{peak:.2f}",
    "log-loss": "{log_loss:.4f}", "over the floor": "{over_floor:+.4f}",
}  # fmt: skip

ON_CPU = (
    "On a CPU bitsandbytes' 8-bit layers round their inputs in evaluation but not in training; on a GPU they do so in "
    "both: here such a judge is trained a little beside what it is judged by."
)


@dataclass
class Techniques:
    """Train fold 0 of a recipe in each way of fine-tuning, for equally many steps, and write a table."""

    overrides: Positional[
        Annotated[tuple[str, ...], arg(metavar="[KEY=VALUE ...]", help="Settings of the recipe to change.")]
    ] = ()
    recipe: Annotated[str, arg(help="A shipped recipe or the path of a YAML file.")] = "demo"
    steps: Annotated[int | None, arg(help="Optimizer steps of each; default: the recipe's own number.")] = None
    folder: Annotated[Path, arg(help="Where results are kept, so that a stopped run goes on.")] = Path(
        "runs/techniques"
    )
    out: Annotated[Path, arg(help="The folder for techniques-RECIPE.json and .md.")] = Path("docs")

    def run(self) -> list[Path]:
        """Does what is not done yet, writes both files and gives their paths."""
        local_path(self.out, "--out")
        local_path(self.folder, "--folder")
        recipe = load_recipe(self.recipe, self.overrides)
        rows = run_techniques(recipe, self.steps, self.folder / "table")
        steps = next((row["steps"] for row in rows if row["status"] == "done"), SWEEP_SHARE)
        sweep = run_techniques(recipe, max(1, steps // SWEEP_SHARE), self.folder / "sweep", SWEEP)
        written = write_techniques(as_result(recipe, rows, sweep), self.out)
        console.print(f"written: {', '.join(map(str, written))}")
        return written


def as_result(recipe: Recipe, rows: list[Result], sweep: list[Result]) -> dict[str, Any]:
    """What is written: the rows of `run_techniques`, and all that they were measured with."""
    return {**provenance(), "recipe": recipe.model_dump(mode="json"), "rows": rows, "sweep": sweep}


def write_techniques(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `techniques-RECIPE.json` and `.md` and gives their paths."""
    paths = [folder / f"techniques-{result['recipe']['name']}.{ending}" for ending in ("json", "md")]
    write_json(paths[0], result)
    write_text(paths[1], as_page(result))
    return paths


def as_page(result: dict[str, Any]) -> str:
    """The result as a Markdown page."""
    done = [row for row in result["rows"] if row["status"] == "done"]
    device = str(done[0]["device"]) if done else "no technique could be trained"
    parts = [f"# Techniques of fine-tuning, {result['date'][:10]}", made_by(device, result)]
    parts += [_legend(result["recipe"], done), technique_table(result["rows"])]
    if result["sweep"]:
        parts += [
            "## The learning rates",
            "Adapters have the recipe's. Those of full fine-tuning and of a head alone are these factors of it, at "
            f"{_steps(result['sweep'])} steps each, judged by the same held-out rows, which flatters both a little:",
            technique_table(result["sweep"]),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def technique_table(rows: list[Result]) -> str:
    """Rows of `run_techniques` as a Markdown table."""
    shown = []
    for row in rows:
        if row["status"] != "done":
            shown.append({**row, "why": row["reason"].splitlines()[0]})
            continue
        floor = row["bayes_log_loss"]
        over_floor = None if floor is None else row["log_loss"] - floor
        shown.append({**row, "peak": gib(row["peak_bytes"]), "over_floor": over_floor})
    return table(COLUMNS, shown)


def _legend(recipe: dict[str, Any], done: list[Result]) -> str:
    if not done:
        return ""
    first, model = done[0], recipe["model"]
    floor = (
        "" if first["bayes_log_loss"] is None else f"; the best possible (the floor) is {first['bayes_log_loss']:.4f}"
    )
    return (
        f"Recipe {recipe['name']}, fold 0: {first['steps']} steps of {recipe['train']['batch_size']} examples, the "
        f"same in the same order for all; base {model['base']}, {model['dtype']}; adapters of rank "
        f"{model['lora']['r']} on {model['lora']['targets']}. `log-loss` is of {first['n_eval']:,} held-out rows "
        f"after the last step; predicting the training prior gives {first['prior_log_loss']:.4f}{floor}. `seconds` and "
        "`tokens/s` are of training steps alone; `peak GiB` is the most held above what the process held before the "
        "base was loaded. " + (ON_CPU if first["device"].startswith("CPU") else "")
    ).strip()


def _steps(rows: list[Result]) -> int:
    return next((int(row["steps"]) for row in rows if row["status"] == "done"), 0)
