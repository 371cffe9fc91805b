"""Before anything is timed: the variants must give the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import Tensor, nn

from arena.model.backbone import REPACKS
from arena.progress import progress
from benchmarks.models import Models, gradients, load_models
from benchmarks.settings import BenchSettings
from benchmarks.variants import ONE_BY_ONE, VARIANTS, Variant, readings, work
from benchmarks.workload import Workload

EXACT = 1e-5  # relative, float32
NOISE = 2.0  # times what transformers' padded batches differ by from the same rows one by one in float32

Numbers = dict[str, Tensor]  # probabilities of both orders, gradients of the head and of the adapters
Differences = dict[str, dict[str, float]]  # by variant, then by which numbers


@dataclass(frozen=True)
class Agreement:
    """How far each variant is from transformers one example at a time in float32: norm of the difference over the norm.

    Attributes:
        exact: unquantised, float32.
        quantised: 4-bit weights, each variant in the benchmark's precision; padded batches (c) are always among them,
            for what they differ by is the measure for the others: rounding and, in float32, another padding.
        repacked: probabilities of padded batches with bitsandbytes' repacked weights, which its evaluation forward uses
            on some CPUs, against those without. They are computed in bfloat16 whatever the precision; so the other
            comparisons are made without, and transformers' variants are timed with them.
    """

    exact: Differences
    quantised: Differences
    repacked: float


def check_agreement(base: Path, workload: Workload, settings: BenchSettings, device: torch.device) -> Agreement:
    """Compares probabilities and gradients of all variants.

    Raises:
        ValueError: a variant differs by more than it may; says which, in what, and by how much.
    """
    chosen = {key: VARIANTS[key] for key in VARIANTS if key in settings.variants}
    with_c = {**chosen, "c": VARIANTS["c"]}
    with progress("checking that all variants agree", len(chosen) + len(with_c) + 2, "passes") as advance:

        def all_numbers(variants: dict[str, Variant], quantised: bool, dtype: str) -> tuple[Models, dict[str, Numbers]]:
            models = load_models(base, settings, device, quantised=quantised, dtype=dtype)
            _repack(models.stock_infer, False)
            found = {}
            for key, variant in variants.items():
                found[key] = numbers(variant, models, workload, settings, dtype, device)
                advance(1)
            return models, found

        _, found = all_numbers({**chosen, "one": ONE_BY_ONE}, False, "float32")
        one = found.pop("one")
        exact = {key: differences(each, one) for key, each in found.items()}
        _refuse(exact, dict.fromkeys(one, EXACT), "unquantised, float32")

        one = all_numbers({"one": ONE_BY_ONE}, True, "float32")[1]["one"]
        models, found = all_numbers(with_c, True, settings.dtype)
        quantised = {key: differences(each, one) for key, each in found.items()}
        limits = {name: max(EXACT, NOISE * value) for name, value in quantised["c"].items()}
        _refuse(quantised, limits, f"4-bit weights, {settings.dtype}")
    _repack(models.stock_infer, True)
    judged = probabilities(VARIANTS["c"], models, workload, settings, settings.dtype, device)
    before = found["c"]["probabilities"]
    return Agreement(exact, quantised, float((judged - before).norm() / before.norm()))


def numbers(
    variant: Variant, models: Models, workload: Workload, settings: BenchSettings, dtype: str, device: torch.device
) -> Numbers:
    """What a variant makes of a workload."""
    judged = probabilities(variant, models, workload, settings, dtype, device)
    work(variant, models, readings(variant, workload, "train", settings), "train", dtype, device)
    return {"probabilities": judged, **gradients(models.ours if variant.ours else models.stock_train)}


def probabilities(
    variant: Variant, models: Models, workload: Workload, settings: BenchSettings, dtype: str, device: torch.device
) -> Tensor:
    """Float64 (2 * rows, 3), both orders of each row in turn."""
    judged = work(variant, models, readings(variant, workload, "both", settings), "both", dtype, device)
    assert len(judged) == len(workload.store), "a variant left examples out"
    return torch.stack([judged[index] for index in range(len(judged))]).double().softmax(-1)


def differences(found: Numbers, expected: Numbers) -> dict[str, float]:
    """Norm of the difference over the norm of what is expected."""
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}


def _repack(model: nn.Module, may: bool) -> None:
    """Whether bitsandbytes may repack the model's 4-bit weights, as it does by default on CPUs with bf16 products."""
    for module in model.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, may and has_avx512bf16())


def _refuse(found: Differences, limits: dict[str, float], where: str) -> None:
    """Raises where a difference is over its limit, or no number."""
    wrong = [
        f"{key} ({VARIANTS[key].title}): {name} differ by {value:.2e}, allowed {limits[name]:.2e}"
        for key, each in found.items()
        for name, value in each.items()
        if not np.less_equal(value, limits[name])
    ]
    if wrong:
        raise ValueError(f"the variants do not agree ({where}), so their times cannot be compared; " + "; ".join(wrong))
