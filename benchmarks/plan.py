"""How long the parts of the benchmark at real size take on a GPU, by arithmetic, until one of the kind was measured."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.cells import Cell, Settings
from benchmarks.parts import Job

OF_WEIGHTS = 8.3e9  # in the linear layers of the model that the figures below are of
# Logical tokens a second of a 9B on an H100: its products take most of the time, at 600 of 990 TFLOP/s.
RATES = {("train", "ours"): 11_000, ("infer", "ours"): 28_000, ("train", "padded"): 3_000, ("infer", "padded"): 9_000}
SLOWER = {"flex": 1.5, "flex_attention": 2.0, "eager": 3.0, "blockwise": 12.0}  # times flash-attn's
MAKING = 40.0  # seconds until a model is there, quantised, for all kinds of cells
COMPILING = {"flash": 45.0, "flex": 100.0, "flex_attention": 60.0}  # fused parts, and FlexAttention's sizes
PROBING = 30.0  # the memory of layers, before training
MEAN_TOKENS = 1250  # of the competition's prompts
CEILING, LOSS = 10.0, 90.0  # seconds
TESTS = {"flash": 90.0, "others": 90.0, "flex": 300.0}  # of each group, in the order in which they run


def running(cell: Cell, weights: int, settings: Settings) -> float:
    """Seconds that a cell's steps or passes take on an H100; other cards take a few times as long.

    Args:
        weights: of the recipe's linear layers.
    """
    task, passes = ("train" if cell.task == "peak" else cell.task), 1 + (cell.repeats or settings.repeats)
    rows = settings.padded_rows if cell.way == "padded" else settings.rows * cell.orders
    tokens = settings.recipe.packing.budget if cell.task == "peak" else rows * MEAN_TOKENS
    return passes * tokens / RATES[task, cell.way] * SLOWER.get(cell.attention, 1.0) * weights / OF_WEIGHTS


def overhead(cell: Cell, weights: int, new_model: bool, compiles: bool) -> float:
    """Seconds that a cell takes before its first step.

    Args:
        new_model: the cell before it, in order, has another one.
        compiles: no cell before it has this task and attention.
    """
    seconds = MAKING if new_model else 0.0
    seconds += PROBING if cell.way == "ours" and cell.task == "train" and cell.checkpointing == "auto" else 0.0
    return seconds * weights / OF_WEIGHTS + (COMPILING.get(cell.attention, 0.0) if compiles else 0.0)


def in_calls(jobs: Iterable[Job], minutes: float | None) -> list[list[tuple[Job, float]]]:
    """The jobs of each call, and the seconds from its begin to the job's end, if each takes what is expected."""
    calls: list[list[tuple[Job, float]]] = []
    left = list(jobs)
    while left:
        call: list[tuple[Job, float]] = []
        spent = 0.0
        for job in list(left):
            seconds = job.expected + job.overhead
            if call and minutes is not None and spent + seconds > 60 * minutes:
                continue
            spent += seconds
            call.append((job, spent))
            left.remove(job)
        calls.append(call)
    return calls
