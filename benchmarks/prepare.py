"""Time, memory and disk of preparing rows, by their number: `python -m benchmarks prepare`.

Each number of rows is prepared in a process of its own, which is watched from outside: from the file to the plan of
training and of evaluation. What counts as memory is what the process and its children hold alone (anonymous pages):
pages of mapped files are the system's, which takes them back when it needs them.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from arena.config import load_recipe
from arena.data.files import read_files
from arena.data.folds import load_or_assign_folds
from arena.data.prepare import prepare_fold
from arena.model.backbone import load_tokenizer
from arena.packing.plan import plan_evaluation
from arena.packing.tree import prefixes_for
from arena.progress import console
from arena.settings import Recipe
from arena.storage.files import local_path, write_json, write_text
from arena.tasks import task_of
from arena.training.batches import plan_fold
from benchmarks.drawn_rows import WORKLOADS, write_rows
from benchmarks.machine import made_by, provenance
from benchmarks.tables import table

STAGES = ("reading", "folds", "tokens", "common beginnings", "training plan", "evaluation plan")
EVERY = 0.01  # seconds between two looks at the memory

COLUMNS = {
    "rows": "{rows:,}", "workload": "{workload}", "CPU seconds": "{cpu:,.0f}", "µs a row": "{us:,.0f}",
    "peak GiB": "{peak:.2f}", "bytes a row": "{each:,.0f}", "file GiB": "{file:.2f}", "cache GiB": "{cache:.2f}",
    "tokens a row": "{tokens:,.0f}", "fill rate": "{fill_rate:.1%}", "evenness": "{evenness:.3f}",
    "computed": "{unique_share:.1%}",
}  # fmt: skip


@dataclass
class Prepare:
    """Prepare drawn rows, from the file to the plans, and report time, memory and disk by stage."""

    rows: Annotated[tuple[int, ...], arg(help="Numbers of rows.")] = (20_000, 100_000)
    workload: Annotated[Literal["competition", "short"], arg(help="Lengths of the texts.")] = "competition"
    work: Annotated[Path, arg(help="The folder for the rows and what is made of them.")] = Path("runs/prepare")
    keep: Annotated[bool, arg(help="Leave the rows there; what is made of them is removed in any case.")] = False
    out: Annotated[Path, arg(help="The folder for bench-prepare.json and .md.")] = Path("docs")
    settings: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...", help="Such as model.base=FOLDER.")] = ()

    def run(self) -> None:
        """Measures, and adds the figures to those of earlier calls."""
        local_path(self.out, "--out")
        path = self.out / "bench-prepare.json"
        earlier = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else {}
        for count in self.rows:
            found = {**provenance(), **measure(self.workload, count, self.work, self.settings, keep=self.keep)}
            earlier[f"{self.workload} {count}"] = found
        runs = dict(sorted(earlier.items(), key=lambda item: (item[1]["workload"], item[1]["rows"])))
        result = {**provenance(), "runs": runs}
        write_json(path, result)
        write_text(path.with_suffix(".md"), (page := as_page(result)))
        console.print(page)


def measure(workload: str, rows: int, work: Path, settings: tuple[str, ...], *, keep: bool) -> dict[str, Any]:
    """Prepares rows of a workload in another process.

    Returns:
        `stages`: the seconds, processor seconds and peak bytes of each; `before`: the bytes that were held before; what
        the plans are like; and the bytes of the file and of the cache.
    """
    name = f"{workload}-{rows}"
    data, cache = work / name / "train.parquet", work / name / "cache"
    words = (f"data.path={data}", f"data.cache={cache}", "data.validation=null", *settings)
    words = ("prompt.max_length=40", *words) if workload == "short" else words
    recipe = load_recipe(WORKLOADS[workload], words)
    write_rows(data, workload, rows, load_tokenizer(recipe.model.base, recipe.model.revision))
    shutil.rmtree(cache, ignore_errors=True)
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_prepare, args=(recipe, there))
    process.start()
    there.close()
    try:
        found = _watch(here, int(process.pid or 0))
    finally:
        process.kill()
        process.join()
    sizes = {"file": data.stat().st_size, "cache": sum(each.stat().st_size for each in cache.iterdir())}
    shutil.rmtree(cache if keep else data.parent)
    return {"workload": workload, "rows": rows, **sizes, **found}


def _watch(connection: Connection, process: int) -> dict[str, Any]:
    """Follows the stages of `_prepare` and the memory that its process and its children hold in each."""
    stages: dict[str, dict[str, float]] = {}
    stage, before, peak = "", 0, 0
    while True:
        held = _anonymous(process)
        peak = max(peak, held)
        if not connection.poll(EVERY):
            continue
        message = connection.recv()
        if isinstance(message, dict):
            return {"stages": stages, "before": before, **message}
        name, seconds, cpu = message
        if name == "begins":
            stage, before, peak = seconds, before or held, held
        else:
            stages[stage] = {"seconds": seconds, "cpu": cpu, "peak": peak}
            console.print(f"{stage}: {seconds:,.1f} s, {peak / 2**30:.2f} GiB")


def _anonymous(process: int) -> int:
    """Bytes of anonymous memory of a process and its children; 0 if it is gone."""
    place = Path(f"/proc/{process}")
    try:
        status = (place / "status").read_text(encoding="ascii")
        children = [int(each) for task in place.glob("task/*/children") for each in task.read_text().split()]
    except OSError:
        return 0
    own = next((int(line.split()[1]) * 2**10 for line in status.splitlines() if line.startswith("RssAnon")), 0)
    return own + sum(map(_anonymous, children))


def _prepare(recipe: Recipe, connection: Connection) -> None:
    """What a training run does before it loads a base, stage by stage."""

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        connection.send(("begins", name, 0.0))
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        connection.send(("ends", time.perf_counter() - wall, time.process_time() - cpu))

    task, cache = task_of(recipe), Path(recipe.data.cache)
    tokenizer = load_tokenizer(recipe.model.base, recipe.model.revision)
    with stage("reading"):
        rows = read_files([recipe.data.path], task, recipe.data, "required")
    with stage("folds"):
        load_or_assign_folds(rows, recipe.data.folds, recipe.data.fold_seed, cache)
    del rows
    with stage("tokens"):
        data = prepare_fold(recipe, task, 0, tokenizer)
        assert data.targets is not None, "the workloads have classes"
    with stage("common beginnings"):
        prefixes = prefixes_for(data.store, recipe.packing, cache)
    with stage("training plan"):
        plan = plan_fold(recipe, data, prefixes=prefixes)
    with stage("evaluation plan"):
        examples = data.eval_rows * data.store.orders
        evaluation = plan_evaluation(data.store.lengths, examples, budget=recipe.packing.budget, prefixes=prefixes)
    connection.send(
        {
            "tokens": int(data.store.lengths.sum()), "fill_rate": plan.fill_rate, "unique_share": plan.unique_share,
            "evenness": float(plan.evenness.mean()), "evaluation_fill_rate": evaluation.fill_rate,
            "plan": plan.fingerprint, "evaluation_plan": evaluation.fingerprint,
        }
    )  # fmt: skip
    connection.close()


def as_page(result: dict[str, Any]) -> str:
    """The Markdown page."""
    runs = list(result["runs"].values())
    parts = ["# Preparing rows, by their number", made_by("one processor", result), table(COLUMNS, map(_summary, runs))]
    for run in runs:
        lines = [{"stage": name, **run["stages"][name], "rows": run["rows"]} for name in STAGES]
        columns = {
            "stage": "{stage}",
            "seconds": "{seconds:,.1f}",
            "CPU seconds": "{cpu:,.1f}",
            "peak GiB": "{gib:.2f}",
        }
        shown = [{**line, "gib": line["peak"] / 2**30} for line in lines]
        parts += [f"## {run['rows']:,} rows, {run['workload']}", f"`{run['command']}`", table(columns, shown)]
    return "\n\n".join(parts) + "\n"


def _summary(run: dict[str, Any]) -> dict[str, Any]:
    stages, rows = run["stages"].values(), run["rows"]
    cpu, peak = sum(each["cpu"] for each in stages), max(each["peak"] for each in stages)
    sizes = {name: run[name] / 2**30 for name in ("file", "cache")}
    return {
        **run, **sizes, "cpu": cpu, "us": cpu / rows * 1e6, "peak": peak / 2**30, "each": (peak - run["before"]) / rows,
        "tokens": run["tokens"] / rows,
    }  # fmt: skip
