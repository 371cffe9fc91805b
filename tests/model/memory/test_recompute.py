"""Results made anew in the backward: the same gradients, less kept, each made once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from arena.model.backbone import backbone
from arena.model.classifier import PackedClassifier, loss_sum
from arena.model.memory.fused import PARTS, POLICIES, set_policies
from arena.model.memory.recompute import ELEMENTWISE, PRODUCT, recomputable, recomputing
from tests.helpers import classifier, exact, make_base, pack, random_family
from tests.model.test_classifier import logits_and_gradients, shared_batch

LENGTHS = [40, 1, 9, 8, 33]


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.function(*inputs)


def chain(most: int | None) -> tuple[Tensor, int, int]:
    """Gradient of a chain of two results, used three times; calls of the cheap and of the costly one."""
    x = torch.linspace(0.1, 1.0, 8, requires_grad=True)
    cheap, costly = Counted(torch.exp), Counted(lambda a: a * a.sum())
    with nullcontext() if most is None else recomputing(most):
        first = recomputable(cheap, x * 1)
        second = recomputable(costly, first, cost=PRODUCT)
        end = (second * second).sum() + second.view(2, 4).square().sum() + first.sin().sum()
    end.backward()
    assert x.grad is not None
    return x.grad, cheap.calls, costly.calls


def test_each_result_is_recomputed_once_and_the_gradient_is_the_same() -> None:
    plain, *calls = chain(None)
    assert calls == [1, 1]
    light, *calls = chain(ELEMENTWISE)
    assert calls == [2, 1]
    all_again, *calls = chain(PRODUCT)
    assert calls == [2, 2]
    assert torch.equal(plain, light) and torch.equal(plain, all_again)


def test_a_function_that_gives_other_numbers_is_seen_in_the_gradient() -> None:
    """The control: what `recomputable` is given is what the backward uses."""
    calls = iter([1.0, 2.0])
    x = torch.ones(4, requires_grad=True)
    with recomputing(ELEMENTWISE):
        result = recomputable(lambda a: a * next(calls), x * 1)
        (result * result).sum().backward()
    assert not torch.equal(x.grad, torch.full((4,), 2.0))  # type: ignore[arg-type]


def test_a_result_changed_in_place_is_saved_with_the_change() -> None:
    x = torch.linspace(0.1, 1.0, 8, requires_grad=True)
    with recomputing(ELEMENTWISE):
        result = recomputable(torch.sin, x * 1)
        result.add_(1.0)
        (result * result).sum().backward()
    expected = 2 * (x.detach().sin() + 1) * x.detach().cos()
    torch.testing.assert_close(x.grad, expected)


def test_nothing_is_noted_without_gradients_or_outside() -> None:
    made = Counted(torch.exp)
    with torch.no_grad(), recomputing(PRODUCT):
        recomputable(made, torch.ones(3))
    x = torch.ones(3, requires_grad=True)
    recomputable(made, x).square().sum().backward()
    assert made.calls == 2


def test_autocast_is_the_forwards() -> None:
    seen = []

    def product(a: Tensor) -> Tensor:
        out = a @ torch.eye(4)
        seen.append(out.dtype)
        return out

    x = torch.randn(4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), recomputing(PRODUCT):
        result = recomputable(product, x * 1, cost=PRODUCT)
        loss = (result * result).sum()
    loss.backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("most", [None, ELEMENTWISE, PRODUCT])
def test_recomputed_results_are_not_held(most: int | None) -> None:
    """The memory itself, not what hooks are shown of it: a result's storage is gone with the forward."""
    x = torch.ones(1000, requires_grad=True)
    with nullcontext() if most is None else recomputing(most):
        result = recomputable(torch.sin, x * 1)  # which saves its input, not its result
        held = StorageWeakRef(result.untyped_storage())
        loss = result.square().sum()
        del result
    assert held.expired() is (most is not None)
    loss.backward()
    assert held.expired()


def test_an_error_in_the_forward_leaves_nothing_behind(gemma2: Path) -> None:
    """Out of memory, say, while the probe runs: no cycle of a function and what it saved keeps the layers' tensors."""
    model, batch, held = classifier(exact(gemma2, fuse=PARTS)).train(), pack(LENGTHS), []
    for policy in ("elementwise", "elementwise_and_mlp"):
        set_policies(model.model, [policy] * 3)
        layer: Any = backbone(model.model).layers[0]
        handles = [
            layer.self_attn.register_forward_hook(
                lambda _m, _a, out: held.append(StorageWeakRef(out[0].untyped_storage()))
            ),
            backbone(model.model).layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError)),
        ]
        with pytest.raises(MemoryError):
            model(batch)
        for handle in handles:
            handle.remove()
    gc.collect()
    assert len(held) == 2 and all(each.expired() for each in held)


def test_a_saved_tensor_that_is_changed_in_place_is_an_error() -> None:
    x = torch.ones(8, requires_grad=True)
    with recomputing(ELEMENTWISE):
        doubled = x * 2
        loss = (doubled * doubled).sum()
    with torch.no_grad():
        doubled.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_hold_with_all_parts_fused(family: str, tmp_path: Path, policy: str) -> None:
    base, batch, results = make_base(tmp_path, family), pack(LENGTHS), []
    for each in ("none", policy):
        model = classifier(exact(base, checkpointing=each, fuse=PARTS)).train()
        results.append(logits_and_gradients(model.model, model(batch), batch))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shared", [False, True])
def test_policies_change_no_number(gemma2: Path, policy: str, shared: bool) -> None:
    batch = shared_batch(random_family(3), 4) if shared else pack(LENGTHS)
    results = []
    for each in ("none", policy):
        model = classifier(exact(gemma2, checkpointing=each)).train()
        results.append(logits_and_gradients(model.model, model(batch), batch))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_policies_hold_with_four_bits_bf16_and_full_tuning(gemma2: Path, tune: str) -> None:
    batch, results = pack(LENGTHS), []
    for policies in (["none"] * 3, ["elementwise_and_mlp", "elementwise", "full"]):
        quantization = "nf4" if tune == "lora" else "none"
        model = classifier(exact(gemma2, tune=tune, quantization=quantization, dtype="bfloat16")).train()
        set_policies(model.model, policies)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch)
        results.append(logits_and_gradients(model.model, logits, batch))
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)


def products_of(model: PackedClassifier, policy: str) -> int:
    """Calls of a middle layer's gate projection in a forward and backward."""
    set_policies(model.model, [policy] * 3)
    layer: Any = backbone(model.model).layers[1]
    calls: list[int] = []
    handle = layer.mlp.gate_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = pack(LENGTHS)
    loss_sum(model(batch), batch.label).backward()
    handle.remove()
    return len(calls)


def test_wide_products_are_recomputed_under_the_policy(gemma2: Path) -> None:
    model = classifier(exact(gemma2)).train()
    assert [products_of(model, policy) for policy in POLICIES] == [1, 1, 2, 2]


def test_dropout_is_never_drawn_anew(gemma2: Path) -> None:
    results = []
    for policy in ("none", "elementwise_and_mlp"):
        settings = exact(gemma2, checkpointing=policy, lora={"r": 4, "dropout": 0.5})
        model, batch = classifier(settings).train(), pack(LENGTHS)
        torch.manual_seed(7)
        results.append(logits_and_gradients(model.model, model(batch), batch))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, atol=1e-6, rtol=1e-5)
