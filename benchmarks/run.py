"""The benchmark: the same weights, rows and precision read in several ways, timed in turn.

Variants take turns (a, b, c, d, e, a, b, ...), so that a machine that slows down slows all of them; medians are
compared. First they must agree on the numbers.
"""

from __future__ import annotations

import gc
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arena.distributed import device_name, fix_threads
from arena.progress import progress
from benchmarks.agreement import check_agreement
from benchmarks.models import Models, load_models, make_base
from benchmarks.packing import measure_packing
from benchmarks.settings import ONCE, TASKS, WORKLOADS, BenchSettings
from benchmarks.timing import measure
from benchmarks.variants import VARIANTS, Reading, readings, work
from benchmarks.workload import Workload, field_lengths, make_workload

WARM_UP_ROWS = 2


@dataclass(frozen=True)
class Measured:
    """One variant on one task of one workload.

    Attributes:
        seconds: of each repeat.
        logical_tokens: tokens of the examples; computed_tokens: those the model was given, padding included.
        peak_bytes: the most that was held above what was held before, models included in the latter; None where the
            machine does not tell.
    """

    workload: str
    task: str
    variant: str
    title: str
    seconds: list[float]
    batches: int
    logical_tokens: int
    computed_tokens: int
    peak_bytes: int | None


def run_bench(settings: BenchSettings, packing_examples: int | None = None) -> dict[str, Any]:
    """Checks that the variants agree, times them, packs lengths; everything that `write_bench` writes.

    Args:
        packing_examples: lengths in the packing tables, where not the competition's number.

    Raises:
        ValueError: variants that do not agree.
    """
    fix_threads()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = {each: field_lengths(each, settings.rows_of(each), settings.seed) for each in settings.workloads}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "base", settings.size, settings.seed)
        half = -(-settings.check_rows // 2)
        fields = np.concatenate([field_lengths(each, half, settings.seed) for each in WORKLOADS])
        agreement = check_agreement(base, _workload("check", fields, folder, settings), settings, device)
        models = load_models(base, settings, device, quantised=True, dtype=settings.dtype)
        few = _workload("warm-up", fields[:WARM_UP_ROWS], folder, settings)
        measured: list[Measured] = []
        for each in settings.workloads:
            workload = _workload(each, lengths[each], folder, settings)
            for task in TASKS:
                measured += time_task(workload, few, task, models, settings, device)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "peft")},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": {**asdict(settings), "workloads": list(settings.workloads)},
        "agreement": asdict(agreement),
        "measured": [asdict(each) for each in measured],
        "packing": measure_packing(**({} if packing_examples is None else {"examples": packing_examples})),
    }


def time_task(
    workload: Workload, few: Workload, task: str, models: Models, settings: BenchSettings, device: torch.device
) -> list[Measured]:
    """Times a task by all variants in turn, after each has done it on a `few` rows.

    What a real run does once for its whole data (planning, finding what is shared) is done beforehand; batches are made
    within the time.
    """
    keys = [key for key in settings.variants if task != "both" or VARIANTS[key].ours]  # for the others twice one order
    passes = {key: readings(VARIANTS[key], workload, task, settings) for key in keys}
    seconds: dict[str, list[float]] = {key: [] for key in passes}
    peaks: dict[str, list[int | None]] = {key: [] for key in passes}
    title = f"{workload.name}, {TASKS[task]}"
    times = sum(2 if key in ONCE else settings.repeats + 1 for key in passes)
    with progress(title, times, "passes") as advance:
        for key in passes:
            warm = readings(VARIANTS[key], few, task, settings)
            work(VARIANTS[key], models, warm, task, settings.dtype, device)
            advance(1, note=key)
        gc.collect()  # what the warm-up left would count as freed by the first variant
        for repeat in range(settings.repeats):
            for key, each in passes.items():
                if repeat and key in ONCE:
                    continue
                once = _once(key, models, each, task, settings.dtype, device)
                taken, peak = measure(once, device)
                seconds[key].append(taken)
                peaks[key].append(peak)
                advance(1, note=f"{key} {taken:.1f} s")
    return [
        Measured(
            workload.name, task, key, VARIANTS[key].title, seconds[key],
            batches=sum(reading.batches for reading in each),
            logical_tokens=sum(reading.logical for reading in each),
            computed_tokens=sum(reading.computed for reading in each),
            peak_bytes=max((peak for peak in peaks[key] if peak is not None), default=None),
        )
        for key, each in passes.items()
    ]  # fmt: skip


def _once(
    key: str, models: Models, passes: list[Reading], task: str, dtype: str, device: torch.device
) -> Callable[[], Any]:
    return lambda: work(VARIANTS[key], models, passes, task, dtype, device)


def _workload(name: str, fields: np.ndarray, folder: Path, settings: BenchSettings) -> Workload:
    size = settings.size
    return make_workload(
        name, fields, folder, vocabulary=size.vocabulary, longest=settings.longest, seed=settings.seed
    )  # fmt: skip
