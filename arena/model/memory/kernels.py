"""Fused RMSNorm, gated MLP activation and rotary embedding: one pass over memory in the forward and in the backward.

These are plain formulas that torch compiles (to Triton on a GPU, C++ on a CPU) into one loop each, instead of separate
operations that each read and write the whole tensor. They compute in float32 and round once, when writing. For the
backward they save only their inputs. Where nothing is compiled, `in_place.py` has the same for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from arena.model.compiler import compiled, leave_rows_open
from arena.model.memory.in_place import CUBIC, SQRT_2_PI, Kernels

Compiled = Callable[..., Any]
VARIANTS = 64  # of one function: for dtypes, widths, a single row, tensors of inference mode


def _compiled(function: Compiled) -> Compiled:
    """Compiles a function in its first call, once for all numbers of rows, and again for another dtype or width.

    More than `VARIANTS`, or a failure to compile, is an error, never a silent slow fallback. Gradients and autocast are
    turned off inside, because they would need separate variants.
    """
    made = compiled(function, VARIANTS)

    @wraps(function)
    def run(*args: Any) -> Any:
        plain = [_open(each) if isinstance(each, Tensor) else each for each in args]
        kind = plain[0].device.type
        # This is called thousands of times per step, so it avoids what is already off, and sets only autocast's flag.
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            if not torch.is_autocast_enabled(kind):
                return made(*plain)
            torch.set_autocast_enabled(kind, False)
            try:
                return made(*plain)
            finally:
                torch.set_autocast_enabled(kind, True)

    return run


def _open(x: Tensor) -> Tensor:
    """The tensor without its history and with a dynamic number of rows."""
    bare = x.detach()
    if bare.ndim > 1:  # a norm's weight has one width
        leave_rows_open(bare)
    return bare


# --- RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467) ---


@_compiled
def _norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (offset + weight.float())).to(x.dtype)


@_compiled
def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit = wide * scale
    inner = grad.float() * (offset + weight.float())
    return ((inner - unit * (inner * unit).mean(-1, keepdim=True)) * scale).to(x.dtype)


@_compiled
def _norm_backward_weight(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (grad.float() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset, ctx.kernels = eps, offset, kernels
        return kernels.norm(x, weight, eps, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, kernels = grad.contiguous(), ctx.kernels
        grad_x = kernels.norm_backward(grad, x, weight, ctx.eps, ctx.offset) if ctx.needs_input_grad[0] else None
        of_weight = kernels.norm_backward_weight(grad, x, ctx.eps) if ctx.needs_input_grad[1] else None
        return grad_x, None if of_weight is None else of_weight.to(weight.dtype), None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, kernels: Kernels | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), over the last dimension, in the dtype of x.

    Args:
        x: (..., width).
        weight: (width,).
        offset: 1 for Gemma, whose weights are added to one.
        kernels: `COMPILED` or `IN_PLACE`.
    """
    out: Tensor = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps, offset, kernels or COMPILED)
    return out.view(x.shape)


# --- gated activation (Shazeer, 2020, arXiv:2002.05202) ---


@_compiled
def _gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    x = gate.float()
    return (0.5 * x * (1 + torch.tanh(SQRT_2_PI * (x + CUBIC * x * x * x))) * up.float()).to(gate.dtype)


@_compiled
def _gelu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    x, wide = gate.float(), grad.float()
    tanh = torch.tanh(SQRT_2_PI * (x + CUBIC * x * x * x))
    slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * SQRT_2_PI * (1 + 3 * CUBIC * x * x)
    return (wide * up.float() * slope).to(gate.dtype), (wide * 0.5 * x * (1 + tanh)).to(up.dtype)


@_compiled
def _silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    x = gate.float()
    return (x * torch.sigmoid(x) * up.float()).to(gate.dtype)


@_compiled
def _silu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    x, wide = gate.float(), grad.float()
    open_ = torch.sigmoid(x)
    slope = open_ * (1 + x * (1 - open_))
    return (wide * up.float() * slope).to(gate.dtype), (wide * x * open_).to(up.dtype)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate, up)
        forward, ctx.to_grads = kernels.gates[name]
        return forward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *ctx.to_grads(grad.contiguous(), gate, up), None, None


def gated(gate: Tensor, up: Tensor, name: str, kernels: Kernels | None = None) -> Tensor:
    """activation(gate) * up, in their dtype.

    Args:
        gate, up: (..., width).
        name: `gelu`, which is the tanh form, or `silu`.
        kernels: `COMPILED` or `IN_PLACE`.
    """
    width = gate.shape[-1]
    out: Tensor = _Gate.apply(gate.reshape(-1, width), up.reshape(-1, width), name, kernels or COMPILED)
    return out.view(gate.shape)


# --- rotary position embedding (Su et al., 2021, arXiv:2104.09864) ---


@_compiled
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    c, s = cos[:, None].float(), sin[:, None].float() * sign
    turned = first * c[..., :half] - second * s[..., :half], second * c[..., half:] + first * s[..., half:]
    return torch.cat(turned, -1).to(x.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return kernels.rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.kernels.rotate(grad.contiguous(), cos, sin, -1.0), None, None, None


COMPILED = Kernels(
    _norm, _norm_backward, _norm_backward_weight,
    {"gelu": (_gelu_gate, _gelu_gate_backward), "silu": (_silu_gate, _silu_gate_backward)}, _rotate,
)  # fmt: skip


def rotary(x: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels | None = None) -> Tensor:
    """Rotates each pair (x[i], x[i + head_dim / 2]) by its position's angle, and the gradient back by the same angle.

    Args:
        x: (T, heads, head_dim).
        cos, sin: (T, head_dim), of the angles; the second half repeats the first.
        kernels: `COMPILED` or `IN_PLACE`.
    """
    out: Tensor = _Rotary.apply(x, cos, sin, kernels or COMPILED)
    return out
