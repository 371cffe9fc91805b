"""Before anything is timed: the variants must give the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arena.config import change
from arena.model.backbone import REPACKS
from arena.progress import progress
from arena.training.optimizer import trainable
from arena.training.step import accumulate
from benchmarks.cells import Cell, Settings
from benchmarks.models import CLASSIFIERS, HEAD, make_model
from benchmarks.passes import judge, work_of
from benchmarks.timing import release
from benchmarks.variants import VARIANTS, cells_of
from benchmarks.workload import Workload

EXACT = 1e-5  # relative, float32
NOISE = 2.0  # times what transformers' padded batches differ by from the same rows one by one in float32
ONE_BY_ONE = Cell(way="padded", attention="eager", checkpointing="full", batch=1)

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


def check_agreement(keys: str, workload: Workload, settings: Settings, device: torch.device) -> Agreement:
    """Compares probabilities and gradients of some variants with those of transformers one by one.

    Raises:
        ValueError: a variant differs by more than it may; says which, in what, and by how much.
    """
    precise = replace(settings, recipe=change(settings.recipe, ["model.dtype=float32"]))
    variants, padded = cells_of(keys, "train"), VARIANTS["c"][1]
    with_c = {**variants, "c": padded}
    with progress("checking that all variants agree", len(variants) + len(with_c) + 3, "passes") as advance:

        def of(cells: Mapping[str, Cell], how: Settings, quantization: Any) -> dict[str, Numbers]:
            found = {}
            for key, cell in cells.items():
                found[key] = numbers(replace(cell, quantization=quantization), workload, how, device)
                advance(1, note=key)
            return found

        one = of({"one": ONE_BY_ONE}, precise, "none")["one"]
        exact = {key: differences(each, one) for key, each in of(variants, precise, "none").items()}
        refuse(exact, dict.fromkeys(one, EXACT), "unquantised, float32")
        one = of({"one": ONE_BY_ONE}, precise, "nf4")["one"]
        found = of(with_c, settings, "nf4")
        quantised = {key: differences(each, one) for key, each in found.items()}
        limits = {name: max(EXACT, NOISE * value) for name, value in quantised["c"].items()}
        refuse(quantised, limits, f"4-bit weights, {settings.recipe.model.dtype}")
        judged = {"probabilities": probabilities(padded, _model(padded, settings, device), workload, settings, device)}
    before = {"probabilities": found["c"]["probabilities"]}
    return Agreement(exact, quantised, differences(judged, before)["probabilities"])


def numbers(cell: Cell, workload: Workload, settings: Settings, device: torch.device) -> Numbers:
    """What a variant makes of a workload, with 4-bit weights as they lie in memory."""
    model = _model(cell, settings, device)
    for module in model.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)
    judged = probabilities(cell, model, workload, settings, device)
    found = gradients(cell, model, workload, settings, device)
    del model
    release(device)
    return {"probabilities": judged, **found}


def _model(cell: Cell, settings: Settings, device: torch.device) -> Any:
    return make_model(cell, settings.recipe, device, settings.seed, stored=True)


def probabilities(cell: Cell, model: nn.Module, workload: Workload, settings: Settings, device: torch.device) -> Tensor:
    """Float64 (2 * rows, 3), both orders of each row in turn."""
    (step,) = work_of(replace(cell, task="infer", orders=2), workload, settings).steps(1)
    order = torch.cat([batch.index for batch in step])
    assert sorted(order.tolist()) == list(range(len(workload.store))), "a variant left examples out"
    logits = judge(CLASSIFIERS[cell.way](model).eval(), step, settings.recipe.model.dtype, device)
    return logits[order.argsort()].double().softmax(-1)


def gradients(cell: Cell, model: nn.Module, workload: Workload, settings: Settings, device: torch.device) -> Numbers:
    """Gradients of the step's mean loss in the head and in the adapters, each as one float32 vector on the CPU.

    Raises:
        ValueError: a trainable parameter has none.
    """
    work = work_of(cell, workload, settings)
    (step,) = work.steps(1)
    accumulate(CLASSIFIERS[cell.way](model).train(), step, work.examples, device, settings.recipe.model.dtype)
    parts: dict[str, list[Tensor]] = {"head": [], "adapters": []}
    for name, parameter in sorted(trainable(model).items()):
        if parameter.grad is None:
            raise ValueError(f"{name} got no gradient")
        parts["head" if HEAD in name else "adapters"].append(parameter.grad.detach().float().cpu().reshape(-1))
    return {name: torch.cat(found) for name, found in parts.items()}


def differences(found: Numbers, expected: Numbers) -> dict[str, float]:
    """Norm of the difference over the norm of what is expected."""
    return {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in found}


def refuse(found: Differences, limits: dict[str, float], where: str) -> None:
    """Raises where a difference is over its limit, or no number."""
    wrong = [
        f"{key} ({VARIANTS[key][0]}): {name} differ by {value:.2e}, allowed {limits[name]:.2e}"
        for key, each in found.items()
        for name, value in each.items()
        if not np.less_equal(value, limits[name])
    ]
    if wrong:
        raise ValueError(f"the variants do not agree ({where}), so their times cannot be compared; " + "; ".join(wrong))
