"""Everything that wants a GPU, in one go: `python -m benchmarks gpu`.

It measures the matrix at real size, runs the tests marked `gpu` and the techniques, and writes the pages. The most
valuable figures come first. A call ends in time, and the next one resumes. Each result is written to the pages at once,
and to one archive, from which another machine can resume.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

from arena.config import load_recipe
from arena.distributed import device_name, fix_threads, let_segments_grow
from arena.model.attention.trial import rule_out
from arena.progress import console
from arena.settings import Recipe
from arena.stopping import MORE_TO_DO, ending_at_once
from arena.storage.files import local_path, remove_scratch
from benchmarks import STARTED, plan, techniques
from benchmarks.archive import pack, unpack
from benchmarks.cells import Settings
from benchmarks.clock import Clock, OutOfTime
from benchmarks.flops import weights
from benchmarks.gpu_plugin import GROUPS, read_outcomes
from benchmarks.gpu_tests import gpu_tests, run_group, summary
from benchmarks.machine import missing, provenance, slug, versions, why_not_flash
from benchmarks.parts import BrokenDevice, Job, Parts, Result, run_jobs
from benchmarks.real_report import with_shares, write_real
from benchmarks.real_run import RealBench

PADDED_ROWS = 24  # six batches: a step of all rows would take padded batches half a minute


@dataclass
class Gpu:
    """Tests, benchmark and techniques of a recipe's model at its real size, resumable in parts of some minutes."""

    overrides: Positional[Annotated[tuple[str, ...], arg(metavar="[KEY=VALUE ...]", help="Settings to change.")]] = ()
    recipe: Annotated[str, arg(help="Whose model is measured.")] = "gemma-2-9b"
    minutes: Annotated[float | None, arg(help="Stop after about this long, with status 3; run again, it resumes.")] = (
        9.0
    )
    state: Annotated[Path, arg(help="Where each part's result is kept, a folder for each recipe and device.")] = Path(
        "runs/bench"
    )
    archive: Annotated[
        Path | None,
        arg(
            help="All results in one file, from which another machine resumes.", help_behavior_hint="(STATE/RECIPE.zip)"
        ),
    ] = None
    out: Annotated[Path, arg(help="The folder for bench-<device>-<size> .json, .md and .png.")] = Path("docs")
    tests: Annotated[str, arg(help="Test files marked gpu are run below this folder; empty runs none.")] = "tests"
    only: Annotated[str, arg(help="A pattern of the cells to measure, such as 'train,ours*'.")] = "*"
    again: Annotated[
        str, arg(help="Forget the results whose name or status matches, such as failed, or 'cannot run'.")
    ] = ""
    repeats: Annotated[int, arg(help="Timed steps of each cell.")] = 3
    steps: Annotated[
        int | None, arg(help="Of each technique on the demo task; default: the demo's; 0 leaves log-losses out.")
    ] = None
    anyway: Annotated[bool, arg(help="Measure a large model on a CPU too.")] = False
    plan: Annotated[bool, arg(help="Only show the order of all parts, and the times expected on an H100.")] = False

    def run(self) -> None:
        """All parts in order, as far as the time goes; exits with status 3 where some are left, 1 where some failed."""
        recipe = load_recipe(self.recipe, self.overrides)
        local_path(self.out, "--out")
        clock = Clock(self.minutes, since=float(os.environ.get("ARENA_STARTED", STARTED)))
        place = local_path(self.state, "--state") / recipe.name
        archive = place.with_name(f"{place.name}.zip") if self.archive is None else self.archive
        local_path(archive, "--archive", [".zip"])
        if archive.is_file() and not self.plan:
            console.print(f"{archive}: {len(unpack(archive, place))} files of results taken from it")
        with clock.ending_what_hangs(), ending_at_once():
            bench = self._bench(recipe, place)  # with --plan, one that measures nothing
            if self.plan:
                show_plan(self._jobs(bench, Path()), self.minutes)
                return
            self.out.mkdir(parents=True, exist_ok=True)
            left = self._do(bench, place, archive, clock)
        if left:
            stop(left)

    def _do(self, bench: RealBench, place: Path, archive: Path, clock: Clock) -> list[str]:
        """Does what there is time for, and gives the names of what is left."""
        parts = Parts(place / slug(bench.about()["device"]), bench.about())
        remove_scratch(parts.folder)
        jobs = self._jobs(bench, parts.folder)
        write = partial(self._write, bench, parts, archive)
        parts.changed = partial(write, picture=False)
        if self.again:
            console.print(f"to be measured again: {', '.join(self._forget(parts)) or 'nothing'}")
        self._say(bench)
        write(picture=False)
        try:
            left = run_jobs(jobs, parts, clock)
        except (OutOfTime, BrokenDevice) as end:
            left = [job.name for job in jobs if parts.get(job.name) is None]
            if isinstance(end, BrokenDevice):
                console.print(f"the device is broken in this process, run the command again: {end}")
        console.print(f"written: {', '.join(map(str, write(picture=True)))}")
        if not left:
            self._end(jobs, parts)
        return left

    def _bench(self, recipe: Recipe, place: Path) -> RealBench:
        fix_threads()
        let_segments_grow()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and "flash-attn" in versions() and not self.plan:
            kept = place / slug(device_name(device)) / "flash.json"
            if (why := why_not_flash(["--recipe", self.recipe, *self.overrides], kept)) is not None:
                rule_out("flash", why)
        rows = recipe.train.batch_size
        settings = Settings(recipe, rows=rows, padded_rows=min(rows, PADDED_ROWS), repeats=self.repeats)
        return RealBench(settings, device, anyway=self.anyway, plan=self.plan)

    def _say(self, bench: RealBench) -> None:
        about = bench.about()
        console.print(f"{about['device']}; " + ", ".join(f"{name} {number}" for name, number in versions().items()))
        for each in missing() if bench.device.type == "cuda" else []:
            console.print(each)
        console.print(f"attention: {bench.best}; {len(bench.cells)} cells")

    def _jobs(self, bench: RealBench, folder: Path) -> list[Job]:
        """The main cells, the tests of the kernels that they used, then everything else."""
        cells, tests = bench.jobs(self.only), self._tests(bench, folder)
        main = 1 + sum(job.name in bench.main for job in cells)  # and the ceiling
        return [*cells[:main], *tests[:2], *cells[main:], *self._losses(bench, folder), *tests[2:]]

    def _tests(self, bench: RealBench, folder: Path) -> list[Job]:
        """`pytest -m gpu`, flash-attn's tests first, FlexAttention's, which compile for minutes, last."""
        if not self.tests:
            return []
        files = gpu_tests(self.tests)
        known = float(bench.kind == "cuda")
        return [
            Job(name, name, known * seconds, bench.alone(partial(run_group, group, files, folder)), resumes=True)
            for group, seconds in plan.TESTS.items()
            for name in [f"tests,{group}"]
        ]

    def _losses(self, bench: RealBench, folder: Path) -> list[Job]:
        """Log-losses of the techniques after equal steps of the demo recipe, a part a technique."""
        if self.steps == 0:
            return []

        def train(technique: techniques.Technique) -> Result:
            recipe = techniques.in_steps(load_recipe("demo"), self.steps)
            return techniques.in_process(technique.of(recipe), folder / "runs")

        expected = plan.LOSS if bench.kind == "cuda" else 0.0
        return [
            Job(f"loss,{name}", "loss", expected, bench.alone(partial(train, technique)))
            for name, technique in techniques.TECHNIQUES.items()
        ]

    def _forget(self, parts: Parts) -> list[str]:
        """Removes what is to be measured again."""
        found = parts.forget(self.again)
        for name in found:
            (parts.folder / f"{name}.jsonl").unlink(missing_ok=True)  # of tests, each one's outcome
        return found

    def _write(self, bench: RealBench, parts: Parts, archive: Path, *, picture: bool) -> list[Path]:
        pages = write_real(self._result(bench, parts), bench.tables, self.out, picture=picture)
        pack(parts.folder.parent, pages, archive)
        return [*pages, archive]

    def _result(self, bench: RealBench, parts: Parts) -> dict[str, Any]:
        """All that is known so far, as it is written."""
        losses, ceiling = parts.all("loss,*"), parts.get("ceiling")
        cells = {key: with_shares(found, ceiling) for key in bench.cells if (found := parts.get(key)) is not None}
        return {
            **provenance(),
            **bench.about(),
            "best_backend": bench.best,
            "linear_weights": weights(bench.shapes),
            "ceiling": ceiling,
            "cells": cells,
            "losses": {name.removeprefix("loss,"): found for name, found in losses.items()},
            "tests": {group: found for group in GROUPS if (found := _tested(parts, group)) is not None},
        }

    def _end(self, jobs: list[Job], parts: Parts) -> None:
        """Names what failed, with status 1."""
        wrong = {
            status: [job.name for job in jobs if (parts.get(job.name) or {}).get("status") == status]
            for status in ("failed", "too slow")
        }
        for status, names in wrong.items():
            if names:
                console.print(f"{status}: {', '.join(names)}; --again '{status}' measures them again")
        if any(wrong.values()):
            sys.exit(1)
        console.print("everything that was asked for is measured")


def _tested(parts: Parts, group: str) -> Result | None:
    """What is known of a group of tests, also where it has not come to its end."""
    log = parts.folder / f"tests,{group}.jsonl"
    found = parts.get(f"tests,{group}")
    if (found is not None and "closing" in found) or (found is None and not log.is_file()):
        return found
    so_far = summary(read_outcomes(log))
    return {**so_far, **(found or {}), "closing": f"{so_far['closing']} so far"}


def show_plan(jobs: list[Job], minutes: float | None) -> None:
    """Prints the jobs of each call and when they end, by what is expected."""
    for number, call in enumerate(plan.in_calls(jobs, minutes), start=1):
        console.print(f"call {number}")
        for job, end in call:
            console.print(f"  until {end / 60:4.1f} min  {job.name}")


def stop(left: list[str]) -> None:
    """Ends the process with `MORE_TO_DO`, and says what is left."""
    shown = "; ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
    console.print(f"more to do, run it again: {shown}")
    sys.exit(MORE_TO_DO)
