"""DoRA (Liu et al., 2024, arXiv:2402.09353) over peft's layers: y = m / |W + sBA| * (Wx + sBAx), a length m a row of W.

peft finds BA by sending the identity through the adapters, which for a layer with 14,336 inputs is a matrix of 0.8 GB,
takes the lengths in the dtype of the weights, and gives a float32 result under autocast. Here the lengths are taken in
float32 from a product of the adapters' weights, and the result has the dtype of the frozen layer's.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


def _forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **others: Any) -> Tensor:
    """What a peft layer asks its variant for."""
    length = module.lora_magnitude_vector[active_adapter].weight
    change = module.lora_B[active_adapter](module.lora_A[active_adapter](module.lora_dropout[active_adapter](x)))
    bias = module.get_base_layer().bias
    straight = result if bias is None else result - bias
    factor = length / _lengths(module, active_adapter)  # float32: half precision has no room for its changes
    found = (factor * (straight + module.scaling[active_adapter] * change.to(result.dtype))).to(result.dtype)
    return torch.as_tensor(found if bias is None else found + bias)


def install_dora(model: nn.Module, *, fresh: bool) -> None:
    """Makes a model's DoRA layers compute this way; layers without DoRA are left alone.

    Args:
        fresh: the lengths are set to those of the weights, so that the layer starts as the frozen one.
    """
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        for adapter, variant in getattr(layer, "lora_variant", {}).items():
            kind = type(variant)
            assert "Dora" in kind.__name__, f"no other variant is asked for: {kind}"
            # a kind of peft's own, so that merging stays peft's
            layer.lora_variant[adapter] = type(kind.__name__, (kind,), {"forward": staticmethod(_forward)})()
            if fresh:
                layer.lora_magnitude_vector[adapter].weight.data = _lengths(layer, adapter)


@torch.no_grad()
def _lengths(layer: Any, adapter: str) -> Tensor:
    """Float32 (out,): the norm of each row of W + sBA. It gets no gradient, as the paper has it in section 4.3."""
    weight = _weight(layer.get_base_layer()).float()
    down, up = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
    with torch.autocast(weight.device.type, enabled=False):
        lengths: Tensor = torch.linalg.vector_norm(torch.addmm(weight, up, down, alpha=layer.scaling[adapter]), dim=1)
    return lengths


def _weight(base: Any) -> Tensor:
    """The frozen weight, (out, in), dequantised."""
    weight = base.weight
    if isinstance(base, Linear4bit):
        return torch.as_tensor(dequantize_4bit(weight.data, weight.quant_state))
    if isinstance(base, Linear8bitLt):  # peft's own reading loses the scales on a CPU after the first forward
        scales = base.state.SCB if weight.SCB is None else weight.SCB
        return torch.as_tensor(int8_vectorwise_dequant(weight.data, scales))
    return torch.as_tensor(weight)
