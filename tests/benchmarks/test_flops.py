"""The arithmetic of operations, against counts by hand."""

from __future__ import annotations

import pytest
import torch

from arena.model.families import ARCHITECTURES
from benchmarks.ceiling import measure_ceiling
from benchmarks.flops import flops_a_token, flops_recomputed, linear_shapes, weights


def test_gemma_2_9b_by_hand() -> None:
    shapes = linear_shapes(ARCHITECTURES["google/gemma-2-9b-it"])
    attention = 3584 * 4096 + 2 * 3584 * 2048 + 4096 * 3584  # q, k and v, o
    mlp = 3 * 3584 * 14336
    n = weights(shapes)
    assert n == 42 * (attention + mlp) == 8_323_596_288
    assert sum(shapes.values()) == 42 * 7
    assert flops_a_token(n, "infer") == pytest.approx(16.6e9, rel=0.005)
    assert flops_a_token(n, "train") == 4 * n
    assert flops_recomputed(shapes, "full") == 2 * n
    assert flops_recomputed(shapes, "elementwise_and_mlp") == 42 * 2 * 2 * 3584 * 14336
    assert flops_recomputed(shapes, "none") == flops_recomputed(shapes, "elementwise") == 0


def test_what_learns_decides_the_backward() -> None:
    assert [flops_a_token(10, "train", tune) for tune in ("head", "lora", "full")] == [20, 40, 60]
    assert [flops_a_token(10, "train", tune, frozen=0.5) for tune in ("lora", "full")] == [30, 40]
    assert {flops_a_token(10, "infer", tune) for tune in ("head", "lora", "full")} == {20}
    shapes = linear_shapes(ARCHITECTURES["google/gemma-2-2b-it"])
    assert flops_recomputed(shapes, "full", "head") == flops_recomputed(shapes, "frozen") == 0


def test_the_ceiling_is_weighed_by_how_often_a_shape_is_there() -> None:
    shapes = {(64, 128): 3, (128, 32): 1}
    found = measure_ceiling(shapes, 256, torch.device("cpu"), torch.float32, seconds=0.05)  # type: ignore[arg-type]
    by_shape = {(each["inputs"], each["outputs"]): each["tflops"] for each in found["products"]}
    assert min(by_shape.values()) > 0
    assert min(by_shape.values()) <= found["burst_tflops"] <= max(by_shape.values())
    work = {shape: shape[0] * shape[1] * count for shape, count in shapes.items()}
    expected = sum(work.values()) / sum(work[shape] / by_shape[shape] for shape in shapes)
    assert found["burst_tflops"] == pytest.approx(expected)


def test_the_ceiling_is_sustained_over_whole_rounds_of_all_layers() -> None:
    shapes = {(64, 128): 3, (128, 32): 1}
    found = measure_ceiling(shapes, 256, torch.device("cpu"), torch.float32, seconds=0.2)  # type: ignore[arg-type]
    operations = 2 * 256 * sum(shape[0] * shape[1] * count for shape, count in shapes.items())
    rounds = found["tflops"] * 1e12 * found["seconds"] / operations
    assert found["seconds"] >= 0.2 and rounds > 10 and rounds == pytest.approx(round(rounds), rel=1e-9)
