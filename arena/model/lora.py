"""LoRA with fewer passes over the activations than peft's, 8-bit layers that keep no activations, DoRA with less memory
and in better precision, and where.

For LoRA, peft copies the frozen layer's result, multiplies by both adapters, scales that product and adds it: four
passes over memory besides the products, and three more in the backward. A matrix product can scale and add while it
writes, so here the adapters' product is added in place, and so is its part of the input's gradient.

bitsandbytes' 8-bit product keeps its input and, in numbers that depend on the data, the columns with outliers until the
backward, out of reach of the recomputation that would do without them. The gradient of its input needs neither, only
the weights.

DoRA (Liu et al., 2024, arXiv:2402.09353) is y = m / |W + sBA| * (Wx + sBAx), with one m for each row of W. peft
computes BA by sending the identity through the adapters, which for a layer with 14,336 inputs is a matrix of 0.8 GB,
computes the norms in the dtype of the weights, and returns float32 under autocast. Here the norms are computed in
float32 from a product of the adapters' weights, and the result has the dtype of the frozen layer's result.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

import peft
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from arena.progress import console
from arena.settings import LoraSettings, ModelSettings


def adapted_layers(settings: LoraSettings, depth: int) -> list[int]:
    """The layers that get adapters.

    Args:
        depth: the number of the base's layers.

    Raises:
        ValueError: the base has no such layer.
    """
    chosen = sorted(set(settings.layers or ())) or range(settings.first_layer, max(depth, settings.first_layer + 1))
    if chosen[-1] >= depth:
        key = "layers" if settings.layers else "first_layer"
        raise ValueError(
            f"model.lora.{key} names layer {chosen[-1]}, but the base has {depth} layers, 0 to {depth - 1}: name "
            "one of these"
        )
    return list(chosen)


def first_trained_layer(settings: ModelSettings, depth: int) -> int:
    """The layer from which on there is a backward; `depth` if only the head is trained.

    Arguments and errors are those of `adapted_layers`.
    """
    if settings.tune == "lora":
        return adapted_layers(settings.lora, depth)[0]
    return depth if settings.tune == "head" else 0


def fuse_lora(model: nn.Module) -> None:
    """Makes a model's 8-bit layers, and its LoRA layers if they are plain LoRA, use this implementation.

    peft still computes the others: DoRA and other variants, layers with dropout, merged or disabled adapters, and
    several adapters at once. If this version of peft computes LoRA in another way, peft computes all of them, and a
    note is printed.
    """
    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        return
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            frozen: Any = module
            frozen.forward = MethodType(_forward_8bit, frozen)
    if not peft_is_known():
        console.print(
            f"peft {peft.__version__} computes LoRA in another way than this package expects, so peft's own slower "
            "layers are used"
        )
        return
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            layer: Any = module
            layer.forward = MethodType(_forward, layer)


@cache
def peft_is_known() -> bool:
    """Whether this implementation and peft's give the same result and gradients for a small layer."""
    try:
        with torch.random.fork_rng(devices=()), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(0)
            config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
            small = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 6)))
            layer: Any = small[0]
            x = torch.randn(5, 4)
            adapters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
            assert _plain_adapter(layer) == "default"
            outs = [_forward(layer, x), type(layer).forward(layer, x)]
            results, expected = ((out, *torch.autograd.grad(out.square().sum(), adapters)) for out in outs)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, AssertionError):
        return False
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(results, expected, strict=True))


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Replaces the forward of a peft layer."""
    name = None if args or kwargs else _plain_adapter(layer)
    if name is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    base = layer.get_base_layer()
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    down, up = (each[name].weight.to(dtype) for each in (layer.lora_A, layer.lora_B))
    with torch.autocast(kind, enabled=False):
        out: Tensor = _LoraLinear.apply(x.to(dtype), base, down, up, layer.scaling[name])
    return out


def _plain_adapter(layer: Any) -> str | None:
    """The name of a layer's only adapter if it is plain LoRA over weights that `_weight` can read; else None."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged or names[0] in layer.lora_variant:
        return None
    name, base = names[0], layer.get_base_layer()
    plain = type(base) is nn.Linear and not base.weight.requires_grad
    readable = plain or isinstance(base, Linear4bit) or (isinstance(base, Linear8bitLt) and _is_frozen_8bit(base))
    dropped = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    biased = layer.lora_B[name].bias is not None or (base.bias is not None and base.bias.requires_grad)
    return name if readable and not dropped and not biased else None


class _LoraLinear(torch.autograd.Function):
    """x (..., in), down (r, in), up (out, r), all of one dtype, to (..., out); the frozen layer gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = _product(base, rows)
        low = rows @ down.t()
        out.addmm_(low, up.t(), alpha=scaling)
        ctx.save_for_backward(x, down, up, low)
        ctx.base, ctx.scaling = base, scaling
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, low = ctx.saved_tensors
        grad_rows, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            grad_low = (grad_rows @ up).mul_(ctx.scaling)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad_rows @ _weight(ctx.base, grad.dtype)).addmm_(grad_low, down).view_as(x)
            grad_down = grad_low.t() @ rows if ctx.needs_input_grad[2] else None
            grad_up = grad_rows.t() @ low.mul(ctx.scaling) if ctx.needs_input_grad[3] else None
        return grad_x, None, grad_down, grad_up, None


class _Linear8bit(torch.autograd.Function):
    """x (..., in) to (..., out) by a frozen 8-bit layer, of which nothing is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Linear8bitLt) -> Tensor:
        ctx.base = base
        return _product(base, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ _weight(ctx.base, grad.dtype), None


def _forward_8bit(layer: Any, x: Tensor) -> Any:
    """Replaces the forward of an 8-bit layer."""
    if not _is_frozen_8bit(layer):
        return type(layer).forward(layer, x)
    return _Linear8bit.apply(x, layer)


def _is_frozen_8bit(layer: Any) -> bool:
    """Whether it holds 8-bit weights alone (bitsandbytes has a mode with others beside them), and no bias learns."""
    return not layer.state.has_fp16_weights and not any(each.requires_grad for each in layer.parameters())


def _product(base: Any, x: Tensor) -> Tensor:
    """The frozen layer's result, (..., out), in the dtype of `x`, (..., in)."""
    if isinstance(base, Linear8bitLt):
        return torch.as_tensor(type(base).forward(base, x))
    bias = None if base.bias is None else torch.as_tensor(base.bias).to(x.dtype)
    return torch.nn.functional.linear(x, _weight(base, x.dtype), bias)


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
            if kind.forward is _dora_forward:  # of a judge that was loaded earlier
                continue
            assert "Dora" in kind.__name__, f"unexpected variant: {kind}"
            # a subclass of peft's own, so that peft still does the merging
            layer.lora_variant[adapter] = type(kind.__name__, (kind,), {"forward": staticmethod(_dora_forward)})()
            if fresh:
                layer.lora_magnitude_vector[adapter].weight.data = _lengths(layer, adapter)


def _dora_forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **others: Any) -> Tensor:
    """Replaces the forward of a peft variant."""
    length = module.lora_magnitude_vector[active_adapter].weight
    change = module.lora_B[active_adapter](module.lora_A[active_adapter](module.lora_dropout[active_adapter](x)))
    bias = module.get_base_layer().bias
    frozen = result if bias is None else result - bias
    factor = length / _lengths(module, active_adapter)  # float32, because half precision cannot represent its changes
    scaled = (factor * (frozen + module.scaling[active_adapter] * change.to(result.dtype))).to(result.dtype)
    return torch.as_tensor(scaled if bias is None else scaled + bias)


@torch.no_grad()
def _lengths(layer: Any, adapter: str) -> Tensor:
    """Float32 (out,): the norm of each row of W + sBA, without a gradient, as in section 4.3 of the paper."""
    weight = _weight(layer.get_base_layer(), torch.float32)
    down, up = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
    with torch.autocast(weight.device.type, enabled=False):
        lengths: Tensor = torch.linalg.vector_norm(torch.addmm(weight, up, down, alpha=layer.scaling[adapter]), dim=1)
    return lengths


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """The frozen weight, (out, in), dequantised."""
    weight = base.weight
    if isinstance(base, Linear4bit):
        return torch.as_tensor(dequantize_4bit(weight.data, weight.quant_state)).to(dtype)
    if isinstance(base, Linear8bitLt):  # peft's own reading loses the scales on a CPU after the first forward
        scales = base.state.SCB if weight.SCB is None else weight.SCB
        return torch.as_tensor(weight.data.to(dtype).mul_(scales[:, None] / 127))  # without a copy in float32
    return torch.as_tensor(weight).to(dtype)
