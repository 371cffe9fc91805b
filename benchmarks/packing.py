"""How full micro-batches get: our planners and simpler ones on the same lengths. Integers only, no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from arena.packing.bins import best_fit
from arena.packing.plan import epoch_order, least_bins, plan_evaluation, plan_training
from benchmarks.workload import competition_lengths

EXAMPLES, BUDGET, STEP = 57_477, 16_384, 80  # the competition's training rows

Loads = list[int]  # tokens in each micro-batch
Packer = Callable[[np.ndarray, int], Loads]


def next_fit(lengths: np.ndarray, budget: int) -> Loads:
    """In the given order, a new micro-batch where the last one has no room."""
    loads: Loads = []
    for length in lengths.tolist():
        if not loads or loads[-1] + length > budget:
            loads.append(0)
        loads[-1] += length
    return loads


def sorted_greedy(lengths: np.ndarray, budget: int) -> Loads:
    """The longest first, a new micro-batch where the last one has no room."""
    return next_fit(np.sort(lengths)[::-1], budget)


def first_fit_decreasing(lengths: np.ndarray, budget: int) -> Loads:
    """The longest first, each to the first micro-batch that has room."""
    loads = np.zeros(len(lengths), dtype=np.int64)
    for length in np.sort(lengths)[::-1].tolist():
        loads[int(np.argmax(loads + length <= budget))] += length
    return [int(load) for load in loads[loads > 0]]


def best_fit_decreasing(lengths: np.ndarray, budget: int) -> Loads:
    """The longest first, each to the fullest micro-batch that has room."""
    return [int(lengths[members].sum()) for members in best_fit(lengths.tolist(), budget)]


def padded_slots(lengths: np.ndarray, size: int) -> int:
    """Tokens that batches of `size`, each padded to its longest example, take in the given order."""
    cuts = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return sum(len(cut) * int(cut.max()) for cut in cuts)


def measure_packing(examples: int = EXAMPLES, budget: int = BUDGET, step: int = STEP, seed: int = 0) -> dict[str, Any]:
    """Packs lengths like the competition's: the whole set as evaluation does, and step by step as training does."""
    lengths = competition_lengths(examples, seed)
    shuffled = lengths[epoch_order(examples, seed, 0)]
    return {
        "examples": examples, "budget": budget, "step": step, "tokens": int(lengths.sum()),
        "median": float(np.median(lengths)), "mean": round(float(lengths.mean()), 1),
        "whole_set": _whole_set(shuffled, budget), "in_steps": _in_steps(shuffled, budget, step),
    }  # fmt: skip


def _whole_set(lengths: np.ndarray, budget: int) -> list[dict[str, Any]]:
    """Micro-batches and the useful share of their tokens, one row a way to pack."""
    total, least = int(lengths.sum()), least_bins(lengths, budget)
    ours = plan_evaluation(lengths, np.arange(len(lengths)), budget=budget).n_micro_batches
    counts = {
        "ours: evaluation plan": ours,
        "first fit, longest first": len(first_fit_decreasing(lengths, budget)),
        "sorted, cut in order": len(sorted_greedy(lengths, budget)),
        "next fit, shuffled": len(next_fit(lengths, budget)),
    }
    rows: list[dict[str, Any]] = [
        {"way": way, "batches": count, "over_least": count / least, "fill": total / (count * budget)}
        for way, count in counts.items()
    ]
    for size in (4, 8):
        fill = total / padded_slots(lengths, size)
        rows.append(
            {"way": f"padded, {size} a batch", "batches": -(-len(lengths) // size), "over_least": None, "fill": fill}
        )
    return rows


def _in_steps(lengths: np.ndarray, budget: int, step: int) -> list[dict[str, Any]]:
    """Micro-batches over the least possible, and how evenly steps are loaded, one row a way to pack."""
    plan = plan_training(lengths, np.arange(len(lengths)), step_size=step, budget=budget)
    least = sum(least_bins(cut, budget) for cut in _steps(lengths, step))
    rows = [_row("ours: training plan", plan.n_micro_batches, least, plan.evenness)]
    rivals: dict[str, Packer] = {
        "best fit, longest first": best_fit_decreasing,
        "sorted, cut in order": sorted_greedy,
        "next fit": next_fit,
    }
    for way, packer in rivals.items():
        packed = [packer(cut, budget) for cut in _steps(lengths, step)]
        evenness = np.array([min(loads) / max(loads) for loads in packed])
        rows.append(_row(way, sum(map(len, packed)), least, evenness))
    return rows


def _row(way: str, batches: int, least: int, evenness: np.ndarray) -> dict[str, Any]:
    return {
        "way": way, "batches": batches, "over_least": batches / least,
        "evenness": float(evenness.mean()), "worst_evenness": float(evenness.min()),
    }  # fmt: skip


def _steps(lengths: np.ndarray, step: int) -> Iterable[np.ndarray]:
    return (lengths[start : start + step] for start in range(0, len(lengths), step))
