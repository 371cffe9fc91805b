"""The benchmark of a real base on real rows: arena beside padded batches of transformers, on a CPU.

Nothing is recomputed in the backward, and transformers attends with torch's own attention, which is what suits it best.
What the matrix products alone would take is measured in each round, so that times of different machines and hours can
be compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from tyro.conf import arg

from arena.config import change, load_recipe
from arena.data.files import read_files
from arena.distributed import device_name, fix_threads, reusing_memory
from arena.model.backbone import load_tokenizer
from arena.progress import console, progress
from arena.settings import Recipe
from arena.storage.files import local_path
from arena.tasks import task_of
from benchmarks.agreement import EXACT, NOISE, ONE_BY_ONE, differences, numbers, refuse
from benchmarks.ceiling import measure_ceiling, product_speed
from benchmarks.cells import Settings
from benchmarks.flops import flops_a_token, weights
from benchmarks.machine import provenance
from benchmarks.models import CLASSIFIERS, make_model, set_checkpointing, shapes_of
from benchmarks.passes import Taken, Work, infer, train, work_of
from benchmarks.real_base_report import as_text, write_real_base
from benchmarks.variants import BATCH, VARIANTS
from benchmarks.workload import Workload, workload_of

CPU = torch.device("cpu")
Timed = Literal["train", "infer"]
TASKS: tuple[Timed, ...] = get_args(Timed)
PRODUCT_TOKENS = 2048  # rows of the products whose speed is measured
FEW_ROWS = 2  # on which the variants must agree and are warmed up
WAYS = {True: "a", False: "c"}  # by whether the model is ours; sorted batches take the model of those in given order
KINDS = (
    "products of weights", "products of attention", "products of adapters", "unpacking 4-bit weights", "all else"
)  # fmt: skip
_CELLS = {key: replace(VARIANTS[key][1], checkpointing="none") for key in "acd"}
CELLS = {key: cell if cell.way == "ours" else replace(cell, attention="sdpa") for key, cell in _CELLS.items()}


@dataclass
class RealBase:
    """Time our packed batches beside transformers' padded ones, on a real base and real rows, on a CPU."""

    data: Annotated[Path, arg(help="A file of labelled conversations; see docs/data.md.")]
    base: Annotated[str, arg(help="As model.base: such as a folder.")] = "gemma-3-270m"
    rows: Annotated[int, arg(help="Conversations in a step, drawn from the file.")] = 24
    repeats: Annotated[int, arg(help="How often each variant is timed, in turn; the least time counts.")] = 2
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        arg(help="Precision, the same for all; auto: the one whose products are faster on this machine."),
    ] = "auto"
    tasks: Annotated[tuple[Timed, ...], arg(help="What is timed.")] = TASKS
    longest: Annotated[int, arg(help="Tokens at which examples are cut.")] = 1024
    budget: Annotated[int, arg(help="Tokens in a packed micro-batch at most.")] = 8192
    seed: Annotated[int, arg(help="By which rows are drawn.")] = 3
    out: Annotated[Path, arg(help="The folder for bench-real-base.json and .md.")] = Path("docs")

    def check(self) -> None:
        """Raises `ValueError` for a setting that cannot be measured."""
        if self.rows < FEW_ROWS or self.repeats < 1:
            raise ValueError(f"--rows must be {FEW_ROWS} at least, and --repeats 1")
        if self.longest > self.budget:
            raise ValueError(f"--budget {self.budget} cannot hold an example of {self.longest} tokens")
        if not self.tasks:
            raise ValueError("--tasks names nothing to time")

    def run(self) -> None:
        """Measures, prints and writes."""
        local_path(self.out, "--out")
        self.check()
        self.out.mkdir(parents=True, exist_ok=True)
        result = run_real_base(self)
        console.print(as_text(result), soft_wrap=True, markup=False, highlight=False)
        console.print(f"written: {', '.join(map(str, write_real_base(result, self.out)))}")


def run_real_base(real: RealBase) -> dict[str, Any]:
    """Checks that the variants agree and times them; everything that `write_real_base` writes.

    Raises:
        ValueError: the file or the base cannot be used, or variants do not agree.
    """
    fix_threads()
    speeds = {name: product_speed(getattr(torch, name), CPU) for name in ("float32", "bfloat16")}
    dtype = max(speeds, key=lambda name: speeds[name]) if real.dtype == "auto" else real.dtype
    settings = settings_of(real, dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        examples = draw(real.data, real.rows, settings.recipe, folder, real.seed)
        few = replace(settings, rows=FEW_ROWS, padded_rows=FEW_ROWS)
        some = workload_of("few", examples[: 2 * FEW_ROWS], folder, real.seed)
        agreement = check_agreement(some, few)
        workload = workload_of("all", examples, folder, real.seed)
        measured = [each for task in real.tasks for each in time_task(task, workload, some, settings)]
    given = {**asdict(real), "data": real.data.name, "out": str(real.out), "dtype": dtype}
    return {
        **provenance(), "device": device_name(CPU), "settings": {**given, "tasks": list(real.tasks), "batch": BATCH},
        "product_gflops": speeds, "agreement": agreement, "measured": measured,
    }  # fmt: skip


def settings_of(real: RealBase, dtype: str) -> Settings:
    """The settings of all cells: NF4 with LoRA on all linear layers, as the recipe of the large bases has them."""
    overrides = [
        f"model.base={real.base}", f"model.dtype={dtype}", "model.quantization=nf4", f"packing.budget={real.budget}",
        f"prompt.max_length={real.longest}",
    ]  # fmt: skip
    return Settings(load_recipe("gemma-2-9b", overrides), real.rows, real.rows, real.repeats)


def draw(file: Path, count: int, recipe: Recipe, folder: Path, seed: int) -> list[np.ndarray]:
    """The token ids of rows drawn from a file, as the recipe's prompts, both orders of each row in turn.

    Raises:
        ValueError: the file cannot be read, or has too few rows.
    """
    task = task_of(recipe)
    rows = read_files([file], task, recipe.data.model_copy(update={"cache": str(folder)}), "ignored")
    if len(rows) < count:
        raise ValueError(f"--rows {count}: {file} has only {len(rows)} rows")
    drawn = pd.Series(range(len(rows))).sample(count, random_state=seed)
    encoder = task.encoder(load_tokenizer(recipe.model.base), recipe.prompt)
    texts = rows.table.select_columns(list(task.texts))[drawn.tolist()]
    return [each.input_ids for each in encoder.encode(texts, orders=task.orders)]


def check_agreement(workload: Workload, settings: Settings) -> dict[str, dict[str, float]]:
    """How far variants are from transformers one example at a time in float32, on the same 4-bit weights.

    Raises:
        ValueError: ours differ by more than `NOISE` times what padded batches differ by.
    """
    precise = replace(settings, recipe=change(settings.recipe, ["model.dtype=float32"]))
    with progress("checking that the variants agree", 3, "passes") as advance:
        one = numbers(replace(ONE_BY_ONE, attention="sdpa"), workload, precise, CPU)
        advance(1)
        found = {}
        for key in "ac":
            found[key] = differences(numbers(CELLS[key], workload, settings, CPU), one)
            advance(1, note=key)
    limits = {name: max(EXACT, NOISE * value) for name, value in found["c"].items()}
    refuse(found, limits, f"4-bit weights, {settings.recipe.model.dtype}")
    return found


def time_task(task: Timed, workload: Workload, few: Workload, settings: Settings) -> list[dict[str, Any]]:
    """Times a task by all variants in turn, after each has done it on a `few` rows.

    Models are made anew for each task: on some CPUs bitsandbytes repacks 4-bit weights in place in an evaluation
    forward, after which a training step of transformers' model reads garbage.

    Returns:
        For each variant `seconds` of each round, `computed_tokens` and so on; and `products`, the seconds that the
        linear layers' products take for as many tokens, at the highest speed of any round.
    """
    made = {way: make_model(CELLS[key], settings.recipe, CPU, settings.seed, stored=True) for way, key in WAYS.items()}
    cells = {key: replace(cell, task=task) for key, cell in CELLS.items()}
    works = {key: work_of(cell, workload, settings) for key, cell in cells.items()}

    def begin(key: str, work: Work, count: int) -> Iterator[Taken]:
        classifier = CLASSIFIERS[cells[key].way](made[cells[key].way == "ours"])
        if task == "train":
            set_checkpointing(classifier, cells[key], settings.recipe, None)
        return (train if task == "train" else infer)(classifier, work, settings, count, CPU)

    shapes, dtype = shapes_of(settings.recipe.model.base), getattr(torch, settings.recipe.model.dtype)
    gflops, seconds = 0.0, {key: list[float]() for key in cells}
    with progress(f"timing {task}", len(cells) * (1 + settings.repeats), "passes") as advance:
        for key, cell in cells.items():
            list(begin(key, work_of(cell, few, replace(settings, rows=FEW_ROWS, padded_rows=FEW_ROWS)), 1))
            advance(1, note=key)
        # ours are done twice in each round: only a first step faults in the memory that all later ones reuse
        times = {key: 2 if cell.way == "ours" else 1 for key, cell in cells.items()}
        runs = {key: begin(key, work, times[key] * settings.repeats) for key, work in works.items()}
        for _ in range(settings.repeats):
            gflops = max(gflops, 1000 * measure_ceiling(shapes, PRODUCT_TOKENS, CPU, dtype)["tflops"])
            for key, run in runs.items():
                with reusing_memory(CPU) if cells[key].way == "ours" else nullcontext():
                    *_, last = islice(run, times[key])
                seconds[key].append(last.seconds)
                advance(1, note=f"{key} {seconds[key][-1]:.1f} s")
    needed = flops_a_token(weights(shapes), task)
    kinds = {"a": kinds_of_time(begin("a", works["a"], 2), settings.recipe.model.lora.r)}
    return [
        {
            "task": task, "variant": key, "title": VARIANTS[key][0], "seconds": seconds[key], "gflops": gflops,
            "batches": work.micro_batches, "logical_tokens": work.logical, "computed_tokens": work.computed,
            "products": needed * work.computed / gflops / 1e9, "kinds": kinds.get(key),
        }
        for key, work in works.items()
    ]  # fmt: skip


def kinds_of_time(run: Iterator[Taken], rank: int) -> dict[str, float]:
    """The shares of the time of a run's second pass by kinds of operation, from torch's profiler.

    Args:
        rank: of the adapters, by which their products are told from those of the weights.
    """
    with reusing_memory(CPU):
        next(run)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as taken:
            next(run)
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in taken.key_averages(group_by_input_shape=True):
        seconds[_kind(event.key, event.input_shapes, rank)] += event.self_cpu_time_total / 1e6
    return {kind: each / sum(seconds.values()) for kind, each in seconds.items()}


def _kind(name: str, shapes: list[Any], rank: int) -> str:
    """The kind of an operation, by its name and the shapes of its inputs."""
    if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
        return "products of adapters" if any(rank in shape for shape in shapes) else "products of weights"
    if name in ("aten::bmm", "aten::baddbmm", "aten::baddbmm_"):
        return "products of attention"
    return "unpacking 4-bit weights" if name.startswith("bitsandbytes::") else "all else"
