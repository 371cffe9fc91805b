"""The machine's ceiling: how fast it multiplies matrices of the model's own shapes, and nothing else.

Measured, not looked up: what a card can sustain depends on its clock, its power and the product's shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.flops import Shapes
from benchmarks.timing import finish

WARM_UP, REPEATS = 3, 20
SUSTAINED = 2.0  # seconds; a short burst is over before the card lowers its clock to keep within its power


def measure_ceiling(
    shapes: Shapes, tokens: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, seconds: float = SUSTAINED
) -> dict[str, Any]:
    """Times the product of `tokens` rows with a weight of each shape, in short bursts and then without a pause.

    Returns:
        `tflops`: 10**12 operations a second that are sustained for `seconds`, each shape as often as the model has it:
        the ceiling. `burst_tflops`: the same of short bursts, `products`: these by shape;
        `tokens`, `dtype`.
    """
    products, layers = [], []
    burst = operations = 0.0
    for (inputs, outputs), count in sorted(shapes.items()):
        # random, as a product of zeros draws less power and so runs faster than any real one
        rows = torch.randn(tokens, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)  # as it lies in a linear layer
        once = partial(torch.mm, rows, weight.t(), out=torch.empty(tokens, outputs, device=device, dtype=dtype))
        taken, work = _burst_seconds(once, device), 2.0 * tokens * inputs * outputs
        products.append({"inputs": inputs, "outputs": outputs, "count": count, "tflops": work / taken / 1e12})
        burst, operations = burst + count * taken, operations + count * work
        layers += [once] * count
    rounds, taken = _sustained(layers, seconds, device)
    return {
        "tflops": rounds * operations / taken / 1e12, "burst_tflops": operations / burst / 1e12, "seconds": taken,
        "products": products, "tokens": tokens, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def product_speed(dtype: torch.dtype, device: torch.device) -> float:
    """10**9 operations a second of one small product: enough to tell a dtype that the machine emulates from others."""
    a, b = (torch.randn(256, 512, device=device).to(dtype) for _ in range(2))
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b.t())
        finish(device)
        taken.append(time.perf_counter() - start)
    return 2.0 * a.numel() * len(b) / min(taken) / 1e9


def _sustained(layers: Sequence[Callable[[], Tensor]], seconds: float, device: torch.device) -> tuple[int, float]:
    """How often all layers ran in at least so many seconds, and in how many; the device always has work."""
    finish(device)
    start, rounds = time.perf_counter(), 0
    mark = None
    while time.perf_counter() - start < seconds:
        for once in layers:
            once()
        if device.type == "cuda":
            before, mark = mark, torch.cuda.Event()
            mark.record()
            if before is not None:
                before.synchronize()  # one round ahead of the device, not minutes
        rounds += 1
    finish(device)
    return rounds, time.perf_counter() - start


def _burst_seconds(once: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one product, many of them one after another."""
    for _ in range(WARM_UP):
        once()
    finish(device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        once()
    finish(device)
    return (time.perf_counter() - start) / REPEATS
