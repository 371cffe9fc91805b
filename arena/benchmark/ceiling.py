"""The machine's ceiling: how fast it multiplies matrices of the model's own shapes, and nothing else.

Measured, not looked up: what a card can sustain depends on its clock, its power and the product's shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from arena.benchmark.flops import Shapes
from arena.benchmark.timing import finish

WARM_UP, REPEATS = 3, 20


def measure_ceiling(
    shapes: Shapes, tokens: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, repeats: int = REPEATS
) -> dict[str, Any]:
    """Times the product of `tokens` rows with a weight of each shape.

    Returns:
        `tflops`: 10**12 operations a second over all layers, each shape as often as the model has it, by the median of
        its times; `products`: the same by shape; `tokens`, `dtype`.
    """
    products = []
    seconds = operations = 0.0
    for (inputs, outputs), count in sorted(shapes.items()):
        taken = _product_seconds(tokens, inputs, outputs, device, dtype, repeats)
        work = 2.0 * tokens * inputs * outputs
        products.append({"inputs": inputs, "outputs": outputs, "count": count, "tflops": work / taken / 1e12})
        seconds, operations = seconds + count * taken, operations + count * work
    name = str(dtype).removeprefix("torch.")
    return {"tflops": operations / seconds / 1e12, "products": products, "tokens": tokens, "dtype": name}


def _product_seconds(
    tokens: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> float:
    """Median seconds of (tokens, inputs) @ (inputs, outputs); the weight lies as a linear layer's does."""
    # random, as a product of zeros draws less power and so runs faster than any real one
    rows = torch.randn(tokens, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    out = torch.empty(tokens, outputs, device=device, dtype=dtype)

    def once() -> Tensor:
        return torch.mm(rows, weight.t(), out=out)

    for _ in range(WARM_UP):
        once()
    return median((_gpu_seconds if device.type == "cuda" else _cpu_seconds)(once, repeats, device))


def _gpu_seconds(once: Callable[[], Tensor], repeats: int, device: torch.device) -> list[float]:
    """By events on the device, so that the time to launch a product does not count."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    finish(device)
    marks[0].record()
    for mark in marks[1:]:
        once()
        mark.record()
    finish(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]


def _cpu_seconds(once: Callable[[], Tensor], repeats: int, device: torch.device) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return seconds
