"""What comes after one fold, on demo data, whose best possible log-loss is known: `python -m benchmarks submission`.

Judges of all folds, their average, and a blend of them with the baseline judge the demo's test rows; so do students
that learn from judges of a few labelled rows. What is reported is the cross-entropy of the true probabilities with what
was predicted, less their entropy: 0 would be perfect, and no label's luck is in it. Every run is resumed where it was
stopped, and a finished one is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from arena.config import change, load_recipe
from arena.data.predictions import read_predictions, rows_of
from arena.demo.synthetic import ensure_demo, write_demo
from arena.inference.find import find_models
from arena.inference.infer import infer
from arena.inference.infer_blend import infer_blend
from arena.metrics import Terms, differences, estimate
from arena.progress import console
from arena.settings import Recipe
from arena.storage.files import local_path, write_json, write_text
from arena.tasks.preference import COLUMNS
from arena.training.blending import Fitted, blend_members
from arena.training.cross_validation import cross_validate
from arena.training.members import BASELINE
from arena.training.run import run_fold
from benchmarks.machine import made_by, provenance
from benchmarks.tables import table

MORE_SEED = 1000  # of the unlabelled rows, away from the seeds of training
# after one epoch a judge of the demo is far from its best, and with smaller steps it comes closer
SETTINGS = (
    "train.epochs=3", "train.batch_size=16", "train.lr=1e-3", "train.head_lr=2e-3", "train.evaluate_every=0"
)  # fmt: skip
# Of all the demo's labelled rows a judge learns what it can: it is no better on those that it was trained on. Of a few
# it learns their labels' noise too, which is what a teacher's predictions are free of.
FEW_ROWS, FEW_SETTINGS = 300, ("train.epochs=20", "train.lr=1.5e-3", "train.head_lr=2.5e-3")
ONE_ORDER = ("judge.swap=false",)  # the labels of many rows are judged in one order, for half of the time
SINGLE, AVERAGE, BLENDED = "one fold", "five folds averaged", "blended"
SOFT, MORE = "student on soft labels", "student on more rows too"
REFERENCES = {AVERAGE: SINGLE, BLENDED: AVERAGE, SOFT: SINGLE, MORE: SOFT}
MEANS = {"what": "{what}", "above the entropy, mean": "{mean:+.4f}", "seeds": "{seeds}"}
FOUND = {
    "seed": "{seed}", "what": "{what}", "above the entropy": "{value:+.4f}", "interval": "{low:+.4f} to {high:+.4f}",
    "gain": "{gain:+.4f}", "its interval": "{gain_low:+.4f} to {gain_high:+.4f}", "over": "{over}",
}  # fmt: skip
PARTS = {
    "seed": "{seed}", "part": "{part}", "gain": "{value:+.4f}", "interval": "{low:+.4f} to {high:+.4f}",
    "taken": "{taken}",
}  # fmt: skip


@dataclass
class Submission:
    """Train all folds of the demo, blend them, teach students, and compare them with the known truth."""

    seeds: Annotated[int, arg(help="How often everything is trained, each time with other seeds.")] = 3
    unlabelled: Annotated[int, arg(help="Further rows without labels that students learn from.")] = 10_000
    more_seeds: Annotated[int, arg(help="For how many of the seeds.")] = 1
    settings: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...", help="How the judges are trained.")] = SETTINGS
    runs: Annotated[Path, arg(help="The folder of the runs.")] = Path("runs/submission")
    out: Annotated[Path, arg(help="The folder for bench-submission.json and .md.")] = Path("docs")

    def run(self) -> list[Path]:
        """Trains what is not trained yet, writes the two files and gives their paths."""
        local_path(self.out, "--out")
        found = []
        for seed in range(self.seeds):
            all_rows = self._recipe("seed", seed, "demo")
            few = change(self._recipe("few", seed, "few"), [f"data.synthetic_rows=[{FEW_ROWS},1000]", *FEW_SETTINGS])
            for recipe in (all_rows, few):
                ensure_demo(change(recipe, ["seed=0"]))  # all seeds train on the same rows
            unlabelled = self.unlabelled if seed < self.more_seeds else 0
            found.append(measure(all_rows, self.runs) | {"few": distil(few, self.runs, unlabelled)})
        paths = [self.out / f"bench-submission.{ending}" for ending in ("json", "md")]
        result = {**provenance(), "unlabelled": self.unlabelled, "seeds": found}
        write_json(paths[0], result)
        write_text(paths[1], as_page(result))
        console.print(f"written: {', '.join(map(str, paths))}")
        return paths

    def _recipe(self, name: str, seed: int, rows: str) -> Recipe:
        recipe = load_recipe("demo", [f"name={name}{seed}", f"seed={seed}", f"data.fold_seed={seed}", *self.settings])
        return change(recipe, [f"data.path={self.runs / rows}", f"data.cache={self.runs / 'cache'}"])


def measure(recipe: Recipe, runs: Path) -> dict[str, Any]:
    """What all folds, their average and a blend predict with one seed, beside the truth."""
    folder = runs / recipe.name
    folds = cross_validate(recipe, runs).folds
    files = [predicted(recipe, runs, fold) for fold in range(recipe.data.folds)]
    fitted = blend_members([str(folder), BASELINE], None, folder / "blend.json", runs)
    blended = folder / "blended.csv"
    infer_blend(fitted.saved, recipe.data.path, blended, [])
    return {
        "seed": recipe.seed,
        "device": folds[0]["device"],
        "found": excesses(recipe, {SINGLE: [files[0]], AVERAGE: files, BLENDED: [blended]}),
        "parts": parts_of(fitted),
        "blend": {key: asdict(score) for key, score in fitted.scores.items()},
    }


def distil(recipe: Recipe, runs: Path, unlabelled: int) -> dict[str, dict[str, Any]]:
    """What students predict, whose first fold learns what judges say that have not seen a row, beside the truth.

    Args:
        unlabelled: the number of further rows for a second student, which all folds have judged; it takes as many steps
            as the first one. 0: there is none.
    """
    folder, steps = runs / recipe.name, cross_validate(recipe, runs).folds[0]["steps"]
    files = [predicted(recipe, runs, fold) for fold in range(recipe.data.folds)]
    taught = [f"data.teacher.path={folder / 'oof.csv'}"]
    students = {SOFT: change(recipe, [f"name={recipe.name}-soft", *taught])}
    if unlabelled:
        rows, labels = runs / f"unlabelled-{unlabelled}", folder / f"unlabelled-{unlabelled}.csv"
        if not rows.exists():
            write_demo(rows, 0, unlabelled, MORE_SEED)
        if not labels.is_file():
            infer(find_models(str(folder), runs), str(rows / "test.csv"), labels, ONE_ORDER)
        more = f"data.extra=[{{path: {rows / 'test.csv'}, labels: {labels}}}]"
        students[MORE] = change(recipe, [f"name={recipe.name}-more", f"train.max_steps={steps}", *taught, more])
    by_name = {SINGLE: [files[0]], AVERAGE: files}
    for what, student in students.items():
        run_fold(student, 0, runs)
        by_name[what] = [predicted(student, runs, 0)]
    return excesses(recipe, by_name)


def predicted(recipe: Recipe, runs: Path, fold: int) -> Path:
    """A fold's predictions of the test rows, in a file."""
    place = runs / recipe.name / f"fold{fold}"
    if not (out := place / "test.csv").is_file():
        infer([place / "model"], recipe.data.path, out)
    return out


def excesses(recipe: Recipe, by_name: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, Any]]:
    """By name, how far the mean of files of predictions is above the entropy, and how much less than its reference.

    Intervals are 95% intervals by row.
    """
    true, terms = read_predictions(Path(recipe.data.path) / "truth.csv", COLUMNS), dict[str, Terms]()
    for name, files in by_name.items():
        ids, mean = mean_of(files)
        labels = rows_of(true, ids)
        terms[name] = (labels * np.log(labels / mean)).sum(axis=1), np.ones(len(ids))
    values, found = estimate(terms, ids), dict[str, dict[str, Any]]()
    for name, score in values.items():
        found[name] = asdict(score)
        if over := REFERENCES.get(name):
            gain = differences({"gain": terms[over]}, {"gain": terms[name]}, ids)["gain"]
            found[name] |= {"over": over, "gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
    return found


def mean_of(files: Sequence[Path]) -> tuple[list[str], np.ndarray]:
    """The ids of predicted rows, and the mean of files of predictions, float64 (n, C)."""
    tables = [read_predictions(file, COLUMNS) for file in files]
    ids = list(tables[0])
    return ids, np.mean([rows_of(each, ids) for each in tables], axis=0)


def parts_of(fitted: Fitted) -> list[dict[str, Any]]:
    """What was tried for the blend, on labelled rows that did not fit it."""
    return [{"part": name, **asdict(score), "taken": taken} for name, score, taken in fitted.parts]


def as_page(result: dict[str, Any]) -> str:
    """The Markdown page."""
    seeds = result["seeds"]
    parts = [
        {"seed": each["seed"], **part, "taken": "yes" if part["taken"] else "no"}
        for each in seeds
        for part in each["parts"]
    ]
    sections = [
        f"# From one fold to the best submission, {result['date'][:10]}", made_by(seeds[0]["device"], result),
        "The demo's test rows, scored by the probabilities that its labels are drawn from: cross-entropy above their "
        "entropy, in nats; 0 would be perfect. `gain` is what a step takes off what it is compared with. Intervals "
        "are 95% intervals by row. Each seed has other folds, another order of the rows and another head.",
        *tables([(each["seed"], each["found"]) for each in seeds]),
        "The parts that were tried for the blends, with their gains in log-loss on labelled rows that did not fit "
        "them:",
        table(PARTS, parts),
        "## Distillation",
        f"Only {FEW_ROWS} rows have labels, and judges are trained for {FEW_SETTINGS[0].partition('=')[2]} epochs. A "
        "student is trained on the rows of the first fold, with what a judge that had not seen a row predicts in place "
        f"of its label; a second one on {result['unlabelled']:,} further rows too, whose labels the five folds "
        "predicted, in as many steps. Both are compared with the first fold, whose labels are hard.",
        *tables([(each["seed"], each["few"]) for each in seeds]),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def tables(by_seed: Sequence[tuple[int, dict[str, dict[str, Any]]]]) -> list[str]:
    """The means over seeds, and what each seed gave."""
    nothing = dict.fromkeys(("over", "gain", "gain_low", "gain_high"))
    rows: list[dict[str, Any]] = [
        {"seed": seed, "what": what, **nothing, **found} for seed, by_name in by_seed for what, found in by_name.items()
    ]
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["what"], []).append(row["value"])
    means = [{"what": what, "mean": np.mean(several), "seeds": len(several)} for what, several in values.items()]
    return [table(MEANS, means), table(FOUND, rows)]
