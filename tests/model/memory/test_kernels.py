"""The fused formulas against torch's own gradients of the plain ones, and fused decoders against transformers' code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from arena.model.backbone import backbone, load_base
from arena.model.classifier import PackedClassifier
from arena.model.memory import in_place, kernels
from arena.model.memory.fused import PARTS
from arena.model.memory.in_place import IN_PLACE, Kernels
from arena.model.memory.kernels import COMPILED, gated, rms_norm, rotary
from arena.tasks.preference import CLASSES
from tests.helpers import CONFIGS, classifier, exact, make_base, pack
from tests.model.test_classifier import logits_and_gradients, relative

LENGTHS = [40, 1, 9, 8, 33]
Formula = Callable[..., Tensor]


def plain_norm(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (offset + weight)


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def tables(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(tokens, width // 2).mul(6).repeat(1, 2)
    return angles.cos(), angles.sin()


def parts(rows: int, kernels: Kernels = COMPILED) -> dict[str, tuple[Formula, Formula, list[Tensor]]]:
    """Name to ours, the plain formula, and inputs; those that take a gradient come first."""
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 48) * 3, torch.randn(48)
    gate, up = torch.randn(rows, 40) * 2, torch.randn(rows, 40)
    cos, sin = tables(rows, 16)
    return {
        "gemma norm": (
            lambda a, b: rms_norm(a, b, 1e-6, 1.0, kernels), lambda a, b: plain_norm(a, b, 1.0), [x, weight]
        ),
        "norm": (lambda a, b: rms_norm(a, b, 1e-6, 0.0, kernels), lambda a, b: plain_norm(a, b, 0.0), [x, weight]),
        "gelu": (lambda a, b: gated(a, b, "gelu", kernels), lambda a, b: F.gelu(a, approximate="tanh") * b, [gate, up]),
        "silu": (lambda a, b: gated(a, b, "silu", kernels), lambda a, b: F.silu(a) * b, [gate, up]),
        "rotary": (
            lambda a: rotary(a, cos, sin, kernels), lambda a: plain_rotary(a, cos, sin), [torch.randn(rows, 3, 16)]
        ),
    }  # fmt: skip


def value_and_gradients(function: Formula, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [each.to(dtype, copy=True).requires_grad_() for each in inputs]
    out = function(*leaves)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("kernels", [COMPILED, IN_PLACE], ids=["compiled", "in place"])
@pytest.mark.parametrize("name", parts(2))
def test_formulas_and_their_gradients(name: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "CHUNK", 1000)  # so that there are several chunks, and the last has fewer rows
    for rows in (57, 130, 1):
        ours, plain, inputs = parts(rows, kernels)[name]
        mine, right = (value_and_gradients(each, inputs, torch.float32) for each in (ours, plain))
        assert len(mine) == len(right)
        assert max(relative(a, b) for a, b in zip(mine, right, strict=True)) <= 1e-5
        # in bfloat16 no further from the truth than the plain formula, computed there step by step
        fused, stepwise = (value_and_gradients(each, inputs, torch.bfloat16) for each in (ours, plain))
        truth = value_and_gradients(plain, [each.bfloat16().float() for each in inputs], torch.float32)
        for a, b, right_one in zip(fused, stepwise, truth, strict=True):
            assert relative(a, right_one) <= max(2 * relative(b, right_one), 4e-3)


def test_controls_fail() -> None:
    """Another offset, another activation and positions turned the other way are no rounding."""
    every = parts(57, IN_PLACE)
    pairs = [("gemma norm", "norm"), ("gelu", "silu")]
    for one, other in pairs:
        inputs = every[one][2]
        assert relative(every[one][0](*inputs), every[other][1](*inputs)) > 1e-3
    x, (cos, sin) = torch.randn(57, 3, 16), tables(57, 16)
    assert relative(rotary(x, cos, sin), plain_rotary(x, cos, -sin)) > 1e-3


@pytest.mark.parametrize("family", CONFIGS)
def test_a_fused_decoder_gives_the_same_logits_and_gradients(tmp_path: Path, family: str) -> None:
    base, batch = make_base(tmp_path, family), pack(LENGTHS)
    results = []
    for fuse in ("none", PARTS, "auto"):
        model = classifier(exact(base, fuse=fuse)).train()
        results.append(logits_and_gradients(model.model, model(batch), batch))
    for fused in results[1:]:
        assert max(relative(a, b) for a, b in zip(fused, results[0], strict=True)) <= 1e-5


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone(gemma2: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is used where it is named, and only there; its numbers are the same."""
    used: set[str] = set()
    for name, function in (("norm", "rms_norm"), ("mlp", "gated"), ("rotary", "rotary")):
        whole = globals()[function]
        monkeypatch.setattr(
            f"arena.model.memory.fused.{function}", lambda *a, _n=name, _f=whole, **k: (used.add(_n), _f(*a, **k))[1]
        )
    batch, results = pack(LENGTHS), []
    for fuse in ("none", (part,)):
        model = classifier(exact(gemma2, fuse=fuse)).train()
        assert ("_forward" in str(model.model.base_model.model.model.layers[0].mlp.up_proj.forward)) is (
            fuse == ("lora",)
        )
        results.append(logits_and_gradients(model.model, model(batch), batch))
    assert used == {part} - {"lora"}
    assert max(relative(a, b) for a, b in zip(*results, strict=True)) <= 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_other_models_and_transformers_are_left_as_they_were(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the model at hand, and a copy of it, calls the fused rotary embedding."""
    base, batch, calls = make_base(tmp_path, family), pack(LENGTHS), []
    plain = PackedClassifier(load_base(exact(base), CLASSES)).eval()
    attention = type(backbone(plain.model).layers[0].self_attn)
    modeling = sys.modules[attention.__module__]
    before, forward = dict(vars(modeling)), attention.forward
    monkeypatch.setattr(
        "arena.model.memory.fused.rotary", lambda x, *angles: (calls.append(len(x)), rotary(x, *angles))[1]
    )
    fused = classifier(exact(base, fuse=("rotary",))).eval()
    assert vars(modeling) == before and attention.forward is forward
    with torch.no_grad():
        plain(batch)
        assert not calls
        right = fused(batch)
        assert len(calls) == 2 * (3 + 1)  # queries and keys; the last layer's attention is called twice
        copied = deepcopy(fused)
        for parameter in fused.parameters():
            parameter.mul_(1.5)
        assert torch.equal(copied(batch), right)
        assert len(calls) == 4 * (3 + 1)


def test_autocast_and_gradients_are_left_as_they_were() -> None:
    """Inside, both are off: neither makes a variant of its own, and results have no history."""
    ours, _, inputs = parts(57)["norm"]
    leaves = [each.requires_grad_() for each in inputs]
    plain, variants = ours(*leaves), counters["stats"]["unique_graphs"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(*leaves), plain) and torch.is_autocast_enabled("cpu")
        assert torch.equal(kernels._norm(*leaves, 1e-6, 0.0), plain)
        assert not kernels._norm(*leaves, 1e-6, 0.0).requires_grad and torch.is_grad_enabled()
        with pytest.raises(Exception, match=r"size|shape|broadcast"):
            rms_norm(inputs[0], torch.ones(7), 1e-6)
        assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    with torch.no_grad():
        ours(*leaves)
    assert counters["stats"]["unique_graphs"] == variants > 0
