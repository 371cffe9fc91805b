"""The benchmark at real size: measures the cells of the matrix one by one, each kept as it comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from arena.distributed import device_name, is_out_of_memory
from arena.model.attention.varlen import used_backends
from arena.model.card import Kind, card_of, with_dtype
from arena.model.lora import first_trained_layer
from arena.model.memory.estimate import fit
from arena.training.optimizer import trainable
from benchmarks import plan
from benchmarks.ceiling import measure_ceiling
from benchmarks.cells import Cell, Settings
from benchmarks.clock import OutOfTime
from benchmarks.flops import flops_a_token, flops_recomputed, weights
from benchmarks.matrix import in_order, main_cells, tables
from benchmarks.models import CannotRun, Holder, architecture, best_backend, set_checkpointing, shapes_of
from benchmarks.parts import Job, Result, failed
from benchmarks.passes import Taken, Work, infer, train, work_of
from benchmarks.timing import peak, release, reserved_peak, reset_peak
from benchmarks.workload import Workload, field_lengths, make_workload

CEILING = "ceiling"
LARGE = 10**9  # weights of the linear layers from which on a CPU would take hours


class RealBench:
    """One benchmark at real size.

    Args:
        anyway: measure a large model on a CPU too.
        plan: only tell what would be measured, without a GPU as with one that runs flash-attn.

    Raises:
        ValueError: a large model without a GPU, or an architecture that is not known.
    """

    def __init__(self, settings: Settings, device: torch.device, *, anyway: bool = False, plan: bool = False) -> None:
        self.base = settings.recipe.model.base
        self.shapes = shapes_of(self.base)
        if device.type != "cuda" and weights(self.shapes) >= LARGE and not (anyway or plan):
            raise ValueError(
                f"{settings.recipe.name} has {weights(self.shapes) / 1e9:.1f} billion weights in its linear layers and "
                "there is no CUDA device here: run it on a GPU, or with --anyway, which can take days"
            )
        card = card_of(device)
        recipe = fit(with_dtype(settings.recipe, card), architecture(self.base), card)
        self.settings, self.device = replace(settings, recipe=recipe), device
        as_if = plan and device.type != "cuda"
        self.kind: Kind = "cuda" if as_if else card.kind
        self.best = "flash" if as_if else best_backend(self.base, recipe.model.dtype, device)
        self.tables = tables(self.best, self.base, self.kind)
        self.cells = in_order(self.tables, self.best)
        self.main = [cell.key for cell in main_cells(self.best).values()]
        self.holder = Holder(recipe, device, settings.seed)
        self.workloads: dict[str, Workload] = {}
        self.folder = TemporaryDirectory(prefix="arena-bench-")

    def about(self) -> Result:
        """What every result depends on."""
        recipe = self.settings.recipe
        return {
            "device": device_name(self.device), "recipe": recipe.model_dump(mode="json"),
            **{name: getattr(self.settings, name) for name in ("rows", "padded_rows", "repeats", "seed")},
        }  # fmt: skip

    def jobs(self, only: str = "*") -> list[Job]:
        """The cells and the ceiling as jobs, in the order of their worth.

        Args:
            only: a pattern of the keys to measure, such as `train,*`; the ceiling is always measured.
        """
        cells = {key: cell for key, cell in self.cells.items() if fnmatch(key, only)}
        known = float(self.kind == "cuda")  # what is known beforehand is of GPUs
        jobs: list[Job] = []
        model: tuple[object, ...] | None = None
        compiled: set[tuple[str, str]] = set()
        for key, cell in cells.items():
            kernels = ("infer" if cell.task == "infer" else "train", cell.attention)
            running = plan.running(cell, weights(self.shapes), self.settings)
            overhead = plan.overhead(cell, weights(self.shapes), cell.model_key != model, kernels not in compiled)
            jobs.append(Job(key, cell.kind, known * running, partial(self.cell, cell), known * overhead))
            model = cell.model_key
            compiled.add(kernels)
        ceiling = Job(CEILING, CEILING, known * plan.CEILING, self.ceiling)
        at = sum(key in cells for key in self.main[:-1])
        return [*jobs[:at], ceiling, *jobs[at:]]

    def ceiling(self) -> Result:
        """The part in which the ceiling is measured."""
        dtype = getattr(torch, self.settings.recipe.model.dtype)
        found = measure_ceiling(self.shapes, self.settings.recipe.packing.budget, self.device, dtype)
        release(self.device)
        return {"status": "done", **found}

    def alone(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Work that starts a process, with no model here, as both may not fit on the device."""

        def run() -> Result:
            self.holder.drop()
            return work()

        return run

    def cell(self, cell: Cell) -> Result:
        """Measures a cell; what keeps it from being measured is its result then."""
        facts = {"cell": asdict(cell), "at": datetime.now(UTC).isoformat(timespec="seconds")}
        try:
            return {**facts, "status": "done", **self._measure(cell)}
        except (CannotRun, NotImplementedError) as error:
            return {**facts, **failed(str(error).splitlines()[0], "cannot run")}
        except OutOfTime:
            self.holder.drop()  # the state in which an interrupted step left it is unknown
            raise
        except Exception as error:  # an hour of other cells must not be lost for one
            result = _told(error)
        if not result.get("broken"):  # a broken device does not even give memory back
            self.holder.drop()  # the error is gone here, and with it the tensors that its frames held
        return {**facts, **result}

    def _measure(self, cell: Cell) -> Result:
        work = work_of(cell, self._workload(cell), self.settings, pin=self.device.type == "cuda")
        classifier = self.holder.take(cell)
        model: Any = classifier.get_submodule("model")
        policies = None
        if cell.task != "infer":
            policies = set_checkpointing(classifier, cell, self.settings.recipe, work.loader)
        release(self.device)  # what earlier cells left in the allocator's cache would count as reserved
        known = reset_peak(self.device) is not None
        run = infer if cell.task == "infer" else train
        repeats = cell.repeats or self.settings.repeats
        times = list(run(classifier, work, self.settings, repeats + 1, self.device))[1:]  # the first one warms up
        return {
            "backend": used_backends(model) if cell.way == "ours" else cell.attention,
            "policies": None if policies is None else dict(Counter(policies)),
            "trainable_parameters": sum(each.numel() for each in trainable(model).values()),
            "peak_allocated": peak(self.device) if known else None,
            "peak_reserved": reserved_peak(self.device),
            "running": sum(each.seconds for each in times) * (1 + 1 / repeats),  # the first one too
            **figures(work, times),
            **self._operations(cell, policies),
        }

    def _operations(self, cell: Cell, policies: list[str] | None) -> Result:
        """Floating-point operations of a unique token, recomputation counted apart."""
        shapes = shapes_of(cell.base) if cell.base else self.shapes
        per_layer = [flops_recomputed(shapes, each, cell.tune) for each in policies or []]
        task, depth = (
            "infer" if cell.task == "infer" else "train",
            architecture(cell.base or self.base).num_hidden_layers,
        )
        frozen = first_trained_layer(cell.settings(self.settings.recipe), depth) / depth
        return {
            "flops_a_token": flops_a_token(weights(shapes), task, cell.tune, frozen),
            "flops_recomputed_a_token": sum(per_layer) / len(per_layer) if per_layer else 0.0,
        }

    def _workload(self, cell: Cell) -> Workload:
        """Rows with lengths like the competition's and the vocabulary of the cell's base."""
        base = cell.base or self.base
        if base not in self.workloads:
            settings = self.settings
            self.workloads[base] = make_workload(
                "competition", field_lengths("competition", settings.rows, settings.seed), Path(self.folder.name),
                vocabulary=architecture(base).vocab_size, longest=settings.recipe.prompt.max_length, seed=settings.seed,
            )  # fmt: skip
        return self.workloads[base]


def figures(work: Work, times: list[Taken]) -> Result:
    """What the times and counts of a cell come to."""
    seconds = [each.seconds for each in times]
    middle = median(seconds)
    return {
        "seconds": seconds, "median": middle, "least": min(seconds), "most": max(seconds),
        "examples": work.examples, "micro_batches": work.micro_batches, "logical_tokens": work.logical,
        "unique_tokens": work.unique, "computed_tokens": work.computed, "fill_rate": work.computed / work.slots,
        "useful": work.logical / work.computed, "logical_per_second": work.logical / middle,
        "unique_per_second": work.unique / middle, "data_wait": sum(each.waited for each in times) / sum(seconds),
    }  # fmt: skip


def _told(error: Exception) -> Result:
    """An error as a result."""
    said = " ".join((str(error).strip() or type(error).__name__).split())[:500]
    if is_out_of_memory(error):
        return failed(said, "out of memory")
    broken = "CUDA error" in said or type(error).__name__ == "AcceleratorError"
    return {**failed(f"{type(error).__name__}: {said}"), **({"broken": True} if broken else {})}
