"""LoRA with fewer passes over the activations: the product of the adapters is added, scaled, within itself.

peft computes `result + lora_B(lora_A(x)) * scaling`: after the product a pass that scales it, one that adds it, and one
more in the backward. A matrix product can scale and add while it writes its result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn


class _Fused(LoraVariant):
    """What a peft layer asks in place of its own sum."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **others: Any) -> Tensor:
        down, up = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        low = F.linear(module.lora_dropout[active_adapter](x), down)
        scaling = module.scaling[active_adapter]
        return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=scaling).view_as(result)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refuses: peft's empty methods would drop the adapter."""
        raise ValueError("a model that is trained or run cannot be merged: `arena export` merges a saved judge")

    merge_unsafe = merge_safe
    unmerge = merge_safe


def fuse_lora(model: nn.Module) -> None:
    """Makes the LoRA layers of a model that is to be trained or run, not merged, add their products this way."""
    for module in model.modules():
        layer: Any = module
        if isinstance(module, LoraLayer):
            for adapter in layer.lora_A:  # a variant of peft's own, such as DoRA, or a bias stays as it is
                if layer.lora_B[adapter].bias is None:
                    layer.lora_variant.setdefault(adapter, _Fused())
            layer.cast_input_dtype_enabled = False  # autocast does it, to the dtype of the product
