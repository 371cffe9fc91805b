"""LoRA added within its products: peft's own numbers, and peft's own code for all that is not plain LoRA."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from arena.model import lora
from arena.model.backbone import backbone
from arena.model.lora import fuse_lora, peft_is_known
from arena.training.optimizer import trainable
from tests.helpers import classifier, exact, pack
from tests.model.test_classifier import relative

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    "8 bits": {"load_in_8bit": True},
}


def peft_model(base: Path, quantization: str = "none", **changes: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if asked := QUANTIZATIONS[quantization]:
        options = {"quantization_config": BitsAndBytesConfig(**asked)}
    plain = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, attn_implementation="eager", **options
    )
    settings: dict[str, Any] = {"task_type": TaskType.SEQ_CLS, "r": 4, "target_modules": "all-linear", **changes}
    model = get_peft_model(plain, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def logits_and_gradients(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)  # the same dropout
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=pack([20]).input_ids, use_cache=False).logits
    logits.float().square().sum().backward()
    found = [parameter.grad.reshape(-1) for parameter in trainable(model).values() if parameter.grad is not None]
    return logits.detach().float(), torch.cat(found)


@pytest.fixture
def ours_ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    peft_is_known()  # once, before calls are counted
    calls: list[int] = []
    whole = lora._LoraLinear.apply
    monkeypatch.setattr(lora._LoraLinear, "apply", lambda *args: (calls.append(1), whole(*args))[1])
    return calls


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_equal_to_pefts_own(
    gemma2: Path, dtype: torch.dtype, bound: float, quantization: str, ours_ran: list[int]
) -> None:
    right = logits_and_gradients(peft_model(gemma2, quantization), dtype)
    assert not ours_ran
    fused = peft_model(gemma2, quantization)
    fuse_lora(fused)
    found = logits_and_gradients(fused, dtype)
    assert len(ours_ran) == 3 * 7
    for ours, theirs in zip(found, right, strict=True):
        assert relative(ours, theirs) <= bound


def test_another_scaling_is_seen(gemma2: Path) -> None:
    """The control."""
    right = logits_and_gradients(peft_model(gemma2), torch.float32)
    fused = peft_model(gemma2)
    fuse_lora(fused)
    for module in fused.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: 1.1 * value for name, value in module.scaling.items()}
    assert all(relative(a, b) > 1e-3 for a, b in zip(logits_and_gradients(fused, torch.float32), right, strict=True))


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.2}])
@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
def test_other_kinds_of_lora_are_computed_by_peft(gemma2: Path, changes: dict[str, Any], ours_ran: list[int]) -> None:
    right = logits_and_gradients(peft_model(gemma2, **changes), torch.float32)
    model = peft_model(gemma2, **changes)
    fuse_lora(model)
    for ours, theirs in zip(logits_and_gradients(model, torch.float32), right, strict=True):
        assert torch.equal(ours, theirs)
    assert not ours_ran


def test_without_dropout_in_evaluation(gemma2: Path, ours_ran: list[int]) -> None:
    model = peft_model(gemma2, lora_dropout=0.2)
    fuse_lora(model)
    model.eval()(input_ids=pack([20]).input_ids, use_cache=False)
    assert len(ours_ran) == 3 * 7


@pytest.mark.parametrize("fused", [True, False])
def test_an_8_bit_layer_keeps_nothing_for_the_backward(gemma2: Path, fused: bool) -> None:
    """Its input is freed as soon as nothing else holds it; bitsandbytes' own product is the control."""
    model = peft_model(gemma2, "8 bits", use_dora=True)  # whose products peft computes
    if fused:
        fuse_lora(model)
    layer = backbone(model).layers[0].mlp.up_proj.base_layer
    given = torch.randn(5, 64, requires_grad=True)
    x = 2 * given
    alive = weakref.ref(x)
    out = layer(x)
    del x
    assert (alive() is None) == fused
    out.sum().backward()
    weight = layer.state.CB.float() * layer.state.SCB[:, None] / 127
    torch.testing.assert_close(given.grad, 2 * weight.sum(0).expand(5, -1))


def test_a_trained_bias_of_an_8_bit_layer_gets_its_gradient(gemma2: Path) -> None:
    model = peft_model(gemma2, "8 bits")
    fuse_lora(model)
    layer = backbone(model).layers[0].mlp.up_proj
    bias = layer.base_layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    layer(torch.ones(1, 5, 64)).sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 5))


def test_no_rows(gemma2: Path) -> None:
    for quantization in QUANTIZATIONS:
        model = peft_model(gemma2, quantization)
        fuse_lora(model)
        assert backbone(model).layers[0].mlp.up_proj(torch.ones(1, 0, 64)).shape == (1, 0, 128)


def test_switched_off_and_merged_adapters(gemma2: Path) -> None:
    model, batch = classifier(exact(gemma2)), pack([20, 5])
    peft: Any = model.model
    with torch.no_grad():
        adapted = model(batch)
        with peft.disable_adapter():
            bare = model(batch)
        peft.merge_adapter()
        merged = model(batch)
        peft.unmerge_adapter()
        again = model(batch)
    assert relative(bare, adapted) > 1e-3
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, adapted, atol=1e-5, rtol=1e-5)


@pytest.fixture
def unknown_peft() -> Iterator[None]:
    peft_is_known.cache_clear()
    yield
    peft_is_known.cache_clear()


def test_this_peft_is_known(unknown_peft: None) -> None:
    with torch.inference_mode():
        assert peft_is_known()


@pytest.mark.parametrize("change", ["no variants", "variants of another shape", "another result"])
def test_a_peft_that_is_not_known_computes_itself(
    gemma2: Path, change: str, unknown_peft: None, ours_ran: list[int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = peft_model(gemma2)
    if change == "another result":
        whole = Linear.forward
        monkeypatch.setattr(Linear, "forward", lambda self, x: 1.01 * whole(self, x))
    else:
        made = LoraLayer.__init__

        def changed(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            if change == "no variants":
                self.lora_variants = self.__dict__.pop("lora_variant")
            else:
                self.lora_variant = None

        monkeypatch.setattr(LoraLayer, "__init__", changed)
    peft_is_known.cache_clear()
    fuse_lora(model)
    assert "slower layers are used" in capsys.readouterr().out
    ours_ran.clear()  # of the comparison itself
    model(input_ids=pack([20]).input_ids, use_cache=False)
    assert not ours_ran
