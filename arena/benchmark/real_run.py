"""The benchmark at real size: measures the cells of the matrix one by one, each kept as it comes."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from arena.benchmark.ceiling import measure_ceiling
from arena.benchmark.cells import Cell, RealSettings
from arena.benchmark.flops import flops_a_token, flops_recomputed, weights
from arena.benchmark.matrix import in_order, tables
from arena.benchmark.parts import BrokenDevice, Clock, Parts, Result, failed
from arena.benchmark.real_models import CannotRun, Holder, architecture, best_backend, set_checkpointing, shapes_of
from arena.benchmark.real_passes import Times, Work, infer, train, work_of
from arena.benchmark.timing import peak, release, reserved_peak, reset_peak
from arena.benchmark.workload import Workload, field_lengths, make_workload
from arena.distributed import device_name, is_out_of_memory
from arena.model.attention import used_backends
from arena.model.card import card_of
from arena.model.memory import fit
from arena.model.precision import with_dtype
from arena.progress import console
from arena.training.optim import trainable

CEILING = "ceiling"
LARGE = 10**9  # weights of the linear layers from which on a CPU would take hours


class RealBench:
    """One benchmark at real size.

    Args:
        anyway: measure a large model on a CPU too.

    Raises:
        ValueError: a large model without a GPU, or an architecture that is not known.
    """

    def __init__(self, settings: RealSettings, device: torch.device, *, anyway: bool = False) -> None:
        self.base = settings.recipe.model.base
        self.shapes = shapes_of(self.base)
        if device.type != "cuda" and weights(self.shapes) >= LARGE and not anyway:
            raise ValueError(
                f"{settings.recipe.name} has {weights(self.shapes) / 1e9:.1f} billion weights in its linear layers and "
                "there is no CUDA device here: run it on a GPU, or with --anyway, which can take days"
            )
        card = card_of(device)
        recipe = fit(with_dtype(settings.recipe, card), architecture(self.base), card)
        self.settings, self.device = replace(settings, recipe=recipe), device
        self.best = best_backend(self.base, recipe.model.dtype, device)
        self.tables = tables(self.best, self.base)
        self.cells = in_order(self.tables)
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

    def run(self, parts: Parts, clock: Clock, only: str = "*") -> list[str]:
        """Measures the ceiling and the cells that have not been measured, as long as there is time.

        Args:
            only: a pattern of the keys to measure, such as `train,*`.

        Returns:
            The keys that are left.
        """
        wanted = [key for key in (CEILING, *self.cells) if key == CEILING or fnmatch(key, only)]
        left = [key for key in wanted if parts.get(key) is None]
        while left and clock.has_time("cell"):
            key = left.pop(0)
            work = self.ceiling if key == CEILING else partial(self.cell, self.cells[key], parts)
            result = parts.do(key, work)
            clock.spent("cell", result.get("took", 0.0))
            console.print(f"{key}: {_in_words(result)}")
            if result.get("broken"):
                raise BrokenDevice(f"{key}: {result['reason']}")
        if not left:
            self.holder.drop()
        return left

    def ceiling(self) -> Result:
        """The part in which the ceiling is measured."""
        dtype = getattr(torch, self.settings.recipe.model.dtype)
        found = measure_ceiling(self.shapes, self.settings.recipe.packing.budget, self.device, dtype)
        release(self.device)
        return {"status": "done", **found}

    def cell(self, cell: Cell, parts: Parts) -> Result:
        """Measures a cell; what keeps it from being measured is its result then."""
        facts = {"cell": asdict(cell), "at": datetime.now(UTC).isoformat(timespec="seconds")}
        try:
            return {**facts, "status": "done", **self._measure(cell, parts)}
        except (CannotRun, NotImplementedError) as error:
            return {**facts, **failed(str(error).splitlines()[0], "cannot run")}
        except Exception as error:  # an hour of other cells must not be lost for one
            result = _told(error)
        if not result.get("broken"):  # a broken device does not even give memory back
            self.holder.drop()  # the error is gone here, and with it the tensors that its frames held
        return {**facts, **result}

    def _measure(self, cell: Cell, parts: Parts) -> Result:
        work = work_of(cell, self._workload(cell), self.settings, pin=self.device.type == "cuda")
        classifier = self.holder.take(cell)
        model: Any = classifier.get_submodule("model")
        policies = None if cell.task == "infer" else self._policies(classifier, cell, work)
        release(self.device)  # what earlier cells left in the allocator's cache would count as reserved
        known = reset_peak(self.device) is not None
        run = infer if cell.task == "infer" else train
        times = run(classifier, work, self.settings, cell.repeats or self.settings.repeats, self.device)
        ceiling = parts.get(CEILING)
        return {
            "backend": used_backends(model) if cell.way == "ours" else cell.attention,
            "policies": None if policies is None else dict(Counter(policies)),
            "trainable_parameters": sum(each.numel() for each in trainable(model).values()),
            "peak_allocated": peak(self.device) if known else None,
            "peak_reserved": reserved_peak(self.device),
            **figures(work, times),
            **self._of_ceiling(cell, work, times, policies, None if ceiling is None else ceiling["tflops"]),
        }

    def _policies(self, classifier: nn.Module, cell: Cell, work: Work) -> list[str]:
        return set_checkpointing(classifier, cell, self.settings.recipe, work.loader)

    def _of_ceiling(
        self, cell: Cell, work: Work, times: Times, policies: list[str] | None, ceiling: float | None
    ) -> Result:
        """How much of what the machine can multiply the cell makes use of, recomputation counted apart."""
        shapes = shapes_of(cell.base) if cell.base else self.shapes
        task = "infer" if cell.task == "infer" else "train"
        needed = flops_a_token(weights(shapes), task, cell.tune)
        per_layer = [flops_recomputed(shapes, each, cell.tune) for each in policies or []]
        again = sum(per_layer) / len(per_layer) if per_layer else 0.0
        rate = work.unique / median(times.seconds) / 1e12
        return {
            "flops_a_token": needed, "flops_recomputed_a_token": again, "tflops": needed * rate,
            "share_of_ceiling": None if ceiling is None else needed * rate / ceiling,
            "share_with_recomputed": None if ceiling is None else (needed + again) * rate / ceiling,
        }  # fmt: skip

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


def figures(work: Work, times: Times) -> Result:
    """What the times and counts of a cell come to."""
    middle = median(times.seconds)
    return {
        "seconds": times.seconds, "median": middle, "least": min(times.seconds), "most": max(times.seconds),
        "examples": work.examples, "micro_batches": work.micro_batches, "logical_tokens": work.logical,
        "unique_tokens": work.unique, "computed_tokens": work.computed, "fill_rate": work.computed / work.slots,
        "useful": work.logical / work.computed, "logical_per_second": work.logical / middle,
        "unique_per_second": work.unique / middle, "data_wait": sum(times.waited) / sum(times.seconds),
    }  # fmt: skip


def _told(error: Exception) -> Result:
    """An error as a result."""
    said = " ".join((str(error).strip() or type(error).__name__).split())[:500]
    if is_out_of_memory(error):
        return failed(said, "out of memory")
    broken = "CUDA error" in said or type(error).__name__ == "AcceleratorError"
    return {**failed(f"{type(error).__name__}: {said}"), **({"broken": True} if broken else {})}


def _in_words(result: Result) -> str:
    if result["status"] != "done":
        return f"{result['status']}: {result['reason'][:200]}"
    if "median" not in result:
        return f"{result['tflops']:.3g} TFLOP/s"
    return (
        f"{result['median']:.2f} s, {result['logical_per_second']:,.0f} logical tokens/s, took {result['took']:.0f} s"
    )
