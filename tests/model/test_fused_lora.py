"""LoRA added within its product: peft's own numbers, and nothing that loses an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from arena.model.fused_lora import _Fused, fuse_lora
from arena.training.optim import trainable
from tests.helpers import classifier, exact, pack
from tests.model.test_classifier import relative


def peft_model(base: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, attn_implementation="eager")
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules="all-linear", lora_dropout=0.2, **changes)
    model = get_peft_model(plain, config)
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


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_equal_to_pefts_own_sum(gemma2: Path, dtype: torch.dtype, bound: float) -> None:
    right = logits_and_gradients(peft_model(gemma2), dtype)
    fused = peft_model(gemma2)
    fuse_lora(fused)
    assert any(layer.lora_variant for layer in fused.modules() if hasattr(layer, "lora_variant"))
    for ours, theirs in zip(logits_and_gradients(fused, dtype), right, strict=True):
        assert relative(ours, theirs) <= bound


@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused(gemma2: Path, safe: bool) -> None:
    """peft's variants merge nothing unless they say how: the adapter would be lost without a word."""
    with pytest.raises(ValueError, match="cannot be merged"):
        classifier(exact(gemma2)).model.merge_and_unload(safe_merge=safe)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_lora_stay_as_they_are(gemma2: Path, changes: dict[str, bool]) -> None:
    model = peft_model(gemma2, **changes)
    fuse_lora(model)
    variants = [each for layer in model.modules() for each in getattr(layer, "lora_variant", {}).values()]
    assert not any(isinstance(each, _Fused) for each in variants)
