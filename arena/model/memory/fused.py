"""Installs fused kernels in a transformers decoder, and lets each layer recompute parts in its backward.

The decoder's modules and weights stay the same, and so do transformers' modules and other models. The `forward` of
norms, MLPs, attention and LoRA layers is replaced in this decoder alone. The rotary embedding is a global function in
transformers; the attention's `forward` is therefore the original code with another function under that name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from inspect import unwrap
from types import FunctionType, MethodType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from arena.model.attention.trial import cannot_compile
from arena.model.backbone import backbone, underlying
from arena.model.families import family_of
from arena.model.last_layer import MARK
from arena.model.lora import fuse_lora
from arena.model.memory.estimate import FROZEN, POLICIES
from arena.model.memory.in_place import IN_PLACE, Kernels
from arena.model.memory.kernels import COMPILED, gated, rms_norm, rotary
from arena.model.memory.recompute import ELEMENTWISE, PRODUCT, recomputable, recomputing
from arena.settings import Part

PARTS: tuple[Part, ...] = get_args(Part)
ROTARY = "apply_rotary_pos_emb"  # the function's name in each family's module of transformers
ACTIVATIONS = {"GELUTanh": "gelu", "PytorchGELUTanh": "gelu", "SiLUActivation": "silu", "SiLU": "silu"}
POLICY = "recompute_policy"  # the attribute of a layer that names its recompute policy
COSTS = {"elementwise": ELEMENTWISE, "elementwise_and_mlp": PRODUCT}

Setting = tuple[Part, ...] | str


def install(decoder: nn.Module, fuse: Setting) -> None:
    """Replaces the parts that have fused kernels, and makes every layer follow its `POLICY`.

    Args:
        decoder: of any family of transformers; of a family that is not known, only LoRA is fused.
        fuse: the parts to fuse; `auto`: all, which are compiled on a GPU only; or `none`.
    """
    fuse = () if fuse == "none" else fuse
    layers: Any = decoder.layers
    family = family_of(decoder.config)
    for module in decoder.modules():
        kind = type(module).__name__
        if kind == family.norm:
            module.forward = partial(recomputable, partial(_norm, fuse, family.norm_offset, module))
        elif kind == family.mlp:
            module.forward = MethodType(partial(_mlp, fuse), module)
    for layer in layers:
        if family.rotary_halves:
            _replace_rotary(fuse, layer.self_attn)
        layer.forward = partial(_in_layer, layer, layer.forward)
    if fuses_lora(fuse):
        fuse_lora(decoder)


def fuses_lora(fuse: Setting) -> bool:
    """Whether LoRA is fused, which needs no compiler, so that `auto` includes it on every device."""
    return fuse == "auto" or "lora" in fuse


def policies_of(model: PreTrainedModel) -> list[str]:
    """The current policy of each decoder layer."""
    return [getattr(layer, POLICY) for layer in backbone(model).layers]


def set_policies(model: PreTrainedModel, policies: Sequence[str]) -> None:
    """Sets the policy of each decoder layer, one of `POLICIES`; policies can be changed at any time.

    `none` saves everything. `elementwise` recomputes norms, the MLP's activation and gathered keys, which takes no
    matrix product. `elementwise_and_mlp` also recomputes the two wide products of the MLP, and `full` the whole layer
    from its input. A last layer that is computed for last tokens only saves little and is never recomputed as a whole.
    Layers below the first one with trained weights have no backward, and get `FROZEN`.
    """
    layers = backbone(model).layers
    assert len(policies) == len(layers), f"{len(policies)} policies for {len(layers)} layers"
    underlying(model).gradient_checkpointing_enable({"use_reentrant": False})
    underlying(model).disable_input_require_grads()  # only reentrant checkpointing needs a gradient of the embeddings
    has_backward = False
    for layer, policy in zip(layers, policies, strict=True):
        has_backward = has_backward or any(each.requires_grad for each in layer.parameters())
        policy = policy if has_backward else FROZEN
        assert policy in POLICIES or not has_backward, policy
        if policy == "full" and getattr(layer, MARK, False):
            policy = "elementwise"
        layer.gradient_checkpointing = policy == "full"
        setattr(layer, POLICY, policy)


def _kernels(part: Part, fuse: Setting, x: Tensor) -> Kernels | None:
    """The kernels for a part; None: transformers' own code.

    `auto` compiles for a GPU only, because on a CPU compiling small models does not pay.
    """
    if fuse != "auto":
        return COMPILED if part in fuse else None
    if not x.is_cuda:
        return IN_PLACE if x.device.type == "cpu" and x.dtype != torch.float64 else None
    return COMPILED if cannot_compile() is None else None


def _norm(fuse: Setting, offset: float, module: Any, x: Tensor) -> Tensor:
    kernels = _kernels("norm", fuse, x)
    if kernels is None:
        return torch.as_tensor(type(module).forward(module, x))
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    if x.ndim == 4 and not x.is_contiguous():  # heads before tokens, as in Gemma 3: in the order of memory, not copied
        return rms_norm(x.transpose(1, 2), module.weight, eps, offset, kernels).transpose(1, 2)
    return rms_norm(x, module.weight, eps, offset, kernels)


def _mlp(fuse: Setting, module: Any, x: Tensor) -> Tensor:
    gate, up = (_product(each, x) for each in (module.gate_proj, module.up_proj))
    out: Tensor = module.down_proj(recomputable(partial(_gated, fuse, module.act_fn), gate, up))
    return out


def _gated(fuse: Setting, activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    name = ACTIVATIONS.get(type(activation).__name__)
    kernels = None if name is None else _kernels("mlp", fuse, gate)
    if name is None or kernels is None:
        return torch.as_tensor(activation(gate) * up)
    return gated(gate, up, name, kernels)


def _product(layer: Any, x: Tensor) -> Tensor:
    """A linear layer's result, recomputable unless it has dropout."""
    dropped = getattr(layer, "lora_dropout", {})
    if layer.training and any(not isinstance(each, nn.Identity) for each in dropped.values()):
        return torch.as_tensor(layer(x))
    return recomputable(layer, x, cost=PRODUCT)


def _in_layer(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    cost = COSTS.get(getattr(layer, POLICY, ""))
    with nullcontext() if cost is None else recomputing(cost):
        return forward(*args, **kwargs)


def _replace_rotary(fuse: Setting, attention: Any) -> None:
    """Makes an attention module call `_rotary` in place of its modeling file's function."""
    whole = unwrap(type(attention).forward)
    names = {**whole.__globals__, ROTARY: partial(_rotary, fuse, whole.__globals__[ROTARY])}
    forward = FunctionType(whole.__code__, names, whole.__name__, whole.__defaults__, whole.__closure__)
    forward.__kwdefaults__ = whole.__kwdefaults__
    attention.forward = MethodType(forward, attention)


def _rotary(fuse: Setting, plain: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """(1, heads, T, head_dim) rotated by cos and sin (1, T, head_dim), by transformers' function if it is not fused."""
    fits = len(q) == 1 and cos.shape[-1] == q.shape[-1]
    kernels = _kernels("rotary", fuse, q)
    if kernels is None or not fits:
        return plain(q, k, cos, sin)
    return tuple(rotary(x[0].transpose(0, 1), cos[0], sin[0], kernels).transpose(0, 1)[None] for x in (q, k))
