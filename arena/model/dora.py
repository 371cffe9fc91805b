"""DoRA (Liu et al., 2024, arXiv:2402.09353) for peft's layers: y = m / |W + sBA| * (Wx + sBAx), one m per row of W.

peft computes BA by sending the identity through the adapters, which for a layer with 14,336 inputs is a matrix of
0.8 GB, computes the norms in the dtype of the weights, and returns float32 under autocast. Here the norms are computed
in float32 from a product of the adapters' weights, and the result has the dtype of the frozen layer's result.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


def _forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **others: Any) -> Tensor:
    """The forward of a peft variant."""
    length = module.lora_magnitude_vector[active_adapter].weight
    change = module.lora_B[active_adapter](module.lora_A[active_adapter](module.lora_dropout[active_adapter](x)))
    bias = module.get_base_layer().bias
    straight = result if bias is None else result - bias
    factor = length / _lengths(module, active_adapter)  # float32, because half precision cannot represent its changes
    scaled = (factor * (straight + module.scaling[active_adapter] * change.to(result.dtype))).to(result.dtype)
    return torch.as_tensor(scaled if bias is None else scaled + bias)


def install_dora(model: nn.Module, *, fresh: bool) -> None:
    """Makes a model's DoRA layers use this implementation; layers without DoRA are unchanged.

    Args:
        fresh: set the magnitudes to the norms of the weights, so that the layer starts equal to the frozen one.
    """
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        for adapter, variant in getattr(layer, "lora_variant", {}).items():
            kind = type(variant)
            if kind.forward is _forward:  # of a judge that was loaded earlier
                continue
            assert "Dora" in kind.__name__, f"unexpected variant: {kind}"
            # a subclass of peft's own, so that peft still does the merging
            layer.lora_variant[adapter] = type(kind.__name__, (kind,), {"forward": staticmethod(_forward)})()
            if fresh:
                layer.lora_magnitude_vector[adapter].weight.data = _lengths(layer, adapter)


@torch.no_grad()
def _lengths(layer: Any, adapter: str) -> Tensor:
    """Float32 (out,): the norm of each row of W + sBA, without a gradient, as in section 4.3 of the paper."""
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
