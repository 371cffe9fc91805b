"""Everything that wants a GPU, in one go: `python -m arena.benchmark.gpu`, or `arena gpu`.

It says what the machine has, installs flash-attn if asked to, runs the tests marked `gpu`, measures the matrix at real
size and the techniques, and writes the pages. It stops in time and goes on when it is called again, so that half an
hour in parts of ten minutes is enough; whatever a part found is kept in --state and stands in the pages at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, arg

from arena.arguments import settings_first
from arena.benchmark.machine import (
    gpu_tests,
    install_flash,
    missing,
    name_of,
    run_tests,
    use_packages,
    versions,
)
from arena.benchmark.parts import BrokenDevice, Clock, Parts
from arena.config import Recipe, load_recipe
from arena.files import local_path
from arena.progress import console, guard_output, quiet
from arena.stopping import MORE_TO_DO

if TYPE_CHECKING:
    from arena.benchmark.real_run import RealBench

LEAST_SECONDS = 60.0  # that a file of tests is given, however little is left
PADDED_ROWS = 24  # six batches: a step of all rows would take padded batches half a minute


@dataclass
class Gpu:
    """Tests, benchmark and techniques of a recipe's model at its real size, resumable in parts of some minutes."""

    overrides: Positional[Annotated[tuple[str, ...], arg(metavar="[KEY=VALUE ...]", help="Settings to change.")]] = ()
    recipe: Annotated[str, arg(help="Whose model is measured.")] = "gemma-2-9b"
    minutes: Annotated[float | None, arg(help="Stop in time, with status 3; called again, it goes on.")] = 9.0
    state: Annotated[Path, arg(help="Where each part's result is kept; it may be carried elsewhere.")] = Path(
        "runs/bench"
    )
    out: Annotated[Path, arg(help="The folder for bench-gpu-9b (by device and recipe) .json, .md, .png.")] = Path(
        "docs"
    )
    install: Annotated[bool, arg(help="Install flash-attn into the state folder where it is missing.")] = False
    wheels: Annotated[Path | None, arg(help="With --install: a folder of wheels, in place of the network.")] = None
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

    def run(self) -> None:
        """All parts in order, as far as the time goes; exits with status 3 where some are left, 1 where some failed."""
        recipe = load_recipe(self.recipe, self.overrides)
        local_path(self.out, "--out")
        clock = Clock(self.minutes)
        folder = local_path(self.state, "--state") / recipe.name
        use_packages(folder)  # before torch and transformers look for what is installed
        if self.install and "flash-attn" not in versions():
            install_flash(folder, self.wheels)
        bench = self._bench(recipe)
        self.out.mkdir(parents=True, exist_ok=True)
        parts = Parts(folder, bench.about())
        for name, result in parts.all("*").items():  # how long parts take is known from those of earlier calls
            clock.expect(
                name.split(",")[0] if name.startswith(("tests,", "loss,")) else "cell", result.get("took", 0.0)
            )
        if self.again:
            console.print(f"to be measured again: {', '.join(parts.forget(self.again)) or 'nothing'}")
        self._say(bench)
        try:
            left = self._parts(bench, parts, clock)
        except BrokenDevice as error:
            left = [f"the rest, in a new process, as the device is broken in this one ({error})"]
        self._write(bench, parts)
        if left:
            stop(left)
        self._end(bench, parts)

    def _bench(self, recipe: Recipe) -> RealBench:
        import torch

        from arena.benchmark.cells import RealSettings
        from arena.benchmark.real_run import RealBench
        from arena.distributed import fix_threads

        fix_threads()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rows = recipe.train.batch_size
        settings = RealSettings(recipe, rows=rows, padded_rows=min(rows, PADDED_ROWS), repeats=self.repeats)
        return RealBench(settings, device, anyway=self.anyway)

    def _say(self, bench: RealBench) -> None:
        about = bench.about()
        console.print(f"{about['device']}; " + ", ".join(f"{name} {number}" for name, number in versions().items()))
        for each in missing() if bench.device.type == "cuda" else []:
            console.print(each)
        console.print(f"attention: {bench.best}; {len(bench.cells)} cells")

    def _parts(self, bench: RealBench, parts: Parts, clock: Clock) -> list[str]:
        """Does what there is time for, and gives the names of what is left."""
        left = self._tests(parts, clock)
        left += bench.run(parts, clock, self.only)
        return left + self._losses(parts, clock)

    def _tests(self, parts: Parts, clock: Clock) -> list[str]:
        """`pytest -m gpu`, a part a file."""
        left = []
        for name, path in self._test_files().items():
            if parts.get(name) is not None:
                continue
            if not clock.has_time("tests"):
                left.append(name)
                continue
            first, seconds = not clock.begun, clock.left()
            result = parts.do(name, partial(run_tests, path, None if seconds is None else max(seconds, LEAST_SECONDS)))
            clock.spent("tests", result["took"])
            console.print(f"{name}: {result['closing']}")
            if result["status"] == "stopped" and not first:  # with a whole part to itself it may end
                parts.forget(name)
                left.append(name)
        return left

    def _test_files(self) -> dict[str, Path]:
        return {f"tests,{name_of(path)}": path for path in gpu_tests(self.tests)} if self.tests else {}

    def _losses(self, parts: Parts, clock: Clock) -> list[str]:
        """Log-losses of the techniques after equal steps of the demo recipe, a part a technique."""
        if self.steps == 0:
            return []
        from arena.benchmark import techniques

        left = [name for name in techniques.TECHNIQUES if parts.get(f"loss,{name}") is None]
        while left and clock.has_time("loss"):
            name = left.pop(0)
            one = {name: techniques.TECHNIQUES[name]}
            train = partial(techniques.run_techniques, load_recipe("demo"), self.steps, parts.folder / "losses", one)
            result = parts.do(f"loss,{name}", lambda train=train: train()[0])  # type: ignore[misc]
            clock.spent("loss", result["took"])
            console.print(f"log-loss of {name}: {result.get('log_loss', result.get('reason'))}")
        return [f"loss,{name}" for name in left]

    def _write(self, bench: RealBench, parts: Parts) -> None:
        from arena.benchmark.real_report import write_real

        written = write_real(self._result(bench, parts), bench.tables, self.out)
        console.print(f"written: {', '.join(map(str, written))}")

    def _result(self, bench: RealBench, parts: Parts) -> dict[str, Any]:
        """All that is known so far, as it is written."""
        from arena.benchmark.flops import weights

        losses = parts.all("loss,*")
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "command": shlex.join(["python", "-m", "arena.benchmark.gpu", *sys.argv[1:]]),
            **bench.about(),
            "best_backend": bench.best,
            "linear_weights": weights(bench.shapes),
            "ceiling": parts.get("ceiling"),
            "cells": {key: found for key in bench.cells if (found := parts.get(key)) is not None},
            "losses": {name.removeprefix("loss,"): found for name, found in losses.items()},
            "tests": {name: found for name in self._test_files() if (found := parts.get(name)) is not None},
        }

    def _end(self, bench: RealBench, parts: Parts) -> None:
        """Names what failed, with status 1."""
        names = [*self._test_files(), "ceiling", *bench.cells, *parts.all("loss,*")]
        wrong = [name for name in names if (parts.get(name) or {}).get("status") in ("failed", "stopped")]
        if wrong:
            console.print(f"failed: {', '.join(wrong)}; --again failed measures them again")
            sys.exit(1)
        console.print("everything that was asked for is measured")


def stop(left: list[str]) -> None:
    """Ends the process with `MORE_TO_DO`, and says what is left."""
    shown = "; ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
    console.print(f"more to do, run it again: {shown}")
    sys.exit(MORE_TO_DO)


def main() -> None:
    """Runs the script without the `arena` command: the checkout on PYTHONPATH is enough."""
    guard_output()
    command = tyro.cli(Gpu, prog="python -m arena.benchmark.gpu", args=settings_first(Gpu, sys.argv[1:]))
    quiet()
    try:
        command.run()
    except (ValueError, OSError) as error:
        if os.environ.get("ARENA_DEBUG"):
            raise
        console.print(f"arena: {error}", style="red")
        sys.exit(2)


if __name__ == "__main__":
    main()
