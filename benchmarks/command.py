"""The comparison on a small model, or with --recipe a recipe's own model at its real size."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from arena.files import local_path
from arena.progress import console

SMALL_ONLY = ("rows", "check_rows", "layers", "budget", "dtype", "variants", "workloads")


@dataclass
class Small:
    """Time our packed batches beside transformers' own, on the same weights, rows and precision."""

    overrides: Positional[
        Annotated[tuple[str, ...], arg(metavar="[KEY=VALUE ...]", help="With --recipe: settings to change.")]
    ] = ()
    recipe: Annotated[
        str | None, arg(help="Measure this recipe's model at its real size, with random weights, on a GPU.")
    ] = None
    rows: Annotated[int, arg(help="Auto-J conversations in a step, a multiple of 8, at most 160.")] = 32
    repeats: Annotated[int, arg(help="How often each variant is timed, in turn; (e) is timed once.")] = 3
    check_rows: Annotated[int, arg(help="Conversations on which all variants must agree first.")] = 2
    layers: Annotated[int, arg(help="Of the random Gemma-2.")] = 4
    budget: Annotated[int, arg(help="Tokens in a packed micro-batch at most.")] = 8192
    dtype: Annotated[Literal["bfloat16", "float32"], arg(help="Precision, the same for all.")] = "bfloat16"
    variants: Annotated[str, arg(help="Some of the letters abcde; times are compared with the first.")] = "abcde"
    workloads: Annotated[tuple[str, ...], arg(help="Whose lengths: autoj, competition.")] = ("autoj", "competition")
    out: Annotated[Path, arg(help="The folder for bench-cpu (or bench-gpu) .json, .md and .png.")] = Path("docs")
    minutes: Annotated[
        float | None, arg(help="With --recipe: stop in time, with status 3; called again, it goes on.")
    ] = None
    state: Annotated[Path, arg(help="With --recipe: where each part's result is kept.")] = Path("runs/bench")
    anyway: Annotated[bool, arg(help="With --recipe: measure a large model on a CPU too.")] = False

    def run(self) -> None:
        local_path(self.out, "--out")
        if self.recipe is not None:
            self._run_real(self.recipe)
            return
        from benchmarks.report import print_bench, write_bench
        from benchmarks.run import run_bench
        from benchmarks.settings import BenchSettings, Size

        self._refuse(("overrides", "minutes", "anyway"), "needs --recipe")
        settings = BenchSettings(
            rows=self.rows, repeats=self.repeats, check_rows=self.check_rows, budget=self.budget, dtype=self.dtype,
            variants=self.variants, workloads=self.workloads, size=Size(layers=self.layers),
        )  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)  # half an hour later would be late to find that it cannot be
        result = run_bench(settings)
        print_bench(result)
        console.print(f"written: {', '.join(map(str, write_bench(result, self.out)))}")

    def _run_real(self, recipe: str) -> None:
        from benchmarks.gpu import Gpu

        self._refuse(SMALL_ONLY, "is of the small model: with --recipe change its settings, as in train.batch_size=40")
        Gpu(
            self.overrides, recipe=recipe, repeats=self.repeats, minutes=self.minutes, state=self.state, out=self.out,
            anyway=self.anyway, tests="",
        ).run()  # fmt: skip

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        """Raises `ValueError` where a flag is given that would change nothing."""
        default = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != default[name]:
                raise ValueError(f"--{name.replace('_', '-')} {why}")
