"""RMSNorm, gated activation and rotary embedding for a CPU, without a compiler: few passes, in place, in the cache.

The formulas are those of `kernels.py`, which explains them. Rows are processed in chunks that a cache holds, each in
float32, and every operation but the first writes into memory that the chunk already has. GELU's tanh is written as a
sigmoid, 0.5 (1 + tanh(z)) = sigmoid(2 z), which costs a CPU a fraction of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**19  # numbers of one tensor in a chunk of rows
SQRT_2_PI, CUBIC = math.sqrt(2 / math.pi), 0.044715  # of the tanh form of GELU (Hendrycks and Gimpel, arXiv:1606.08415)


class Kernels(NamedTuple):
    """One implementation of each kernel.

    Attributes:
        norm: (x, weight, eps, offset) to the result.
        norm_backward: (grad, x, weight, eps, offset) to the gradient of x.
        norm_backward_weight: (grad, x, eps) to that of the weight.
        gates: by activation: (gate, up) to the result, and (grad, gate, up) to both gradients.
        rotate: (x, cos, sin, sign) to the rotated x.
    """

    norm: Callable[..., Tensor]
    norm_backward: Callable[..., Tensor]
    norm_backward_weight: Callable[..., Tensor]
    gates: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]]
    rotate: Callable[..., Tensor]


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of equally many rows, a few rows at a time."""
    rows = max(1, CHUNK * len(tensors[0]) // max(1, tensors[0].numel()))
    return zip(*(each.split(rows) for each in tensors), strict=True)


def _wide(into: Tensor) -> Tensor:
    """Memory for a chunk's result in float32: the result itself if it is."""
    return into if into.dtype == torch.float32 else torch.empty_like(into, dtype=torch.float32)


def _write(result: Tensor, into: Tensor) -> None:
    if result is not into:
        into.copy_(result)


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row."""
    squares: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return squares.div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    out, factor = torch.empty_like(x), offset + weight.float()
    for part, into in _chunks(x, out):
        wide = part.float()
        _write(torch.mul(wide, _scale(wide, eps), out=_wide(into)).mul_(factor), into)
    return out


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    out, factor = torch.empty_like(x), offset + weight.float()
    for grad_part, part, into in _chunks(grad, x, out):
        wide = part.float()
        scale = _scale(wide, eps)
        inner = torch.mul(grad_part.float(), factor, out=_wide(into))
        along = torch.mul(inner, wide).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(x.shape[-1])
        _write(inner.mul_(scale).addcmul_(wide, along, value=-1), into)
    return out


def _norm_backward_weight(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * _scale(wide, eps)).mul_(grad.float()).sum(0)


def _gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    for x, up_part, into in _chunks(gate, up, out):
        wide = x.float()
        act = torch.mul(wide, wide, out=_wide(into)).mul_(2 * SQRT_2_PI * CUBIC).add_(2 * SQRT_2_PI)
        _write(act.mul_(wide).sigmoid_().mul_(wide).mul_(up_part), into)
    return out


def _gelu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    for grad_part, x, up_part, into_gate, into_up in _chunks(grad, gate, up, grad_gate, grad_up):
        wide = x.float()
        square = torch.mul(wide, wide, out=_wide(into_gate))
        open_ = torch.mul(square, 2 * SQRT_2_PI * CUBIC, out=_wide(into_up)).add_(2 * SQRT_2_PI)
        open_.mul_(wide).sigmoid_()
        slope = square.mul_(6 * SQRT_2_PI * CUBIC).add_(2 * SQRT_2_PI).mul_(wide).mul_(open_)
        slope.addcmul_(slope, open_, value=-1).add_(open_)
        _write(slope.mul_(up_part).mul_(grad_part), into_gate)
        _write(open_.mul_(wide).mul_(grad_part), into_up)
    return grad_gate, grad_up


def _silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    for x, up_part, into in _chunks(gate, up, out):
        wide = x.float()
        _write(torch.sigmoid(wide, out=_wide(into)).mul_(wide).mul_(up_part), into)
    return out


def _silu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    for grad_part, x, up_part, into_gate, into_up in _chunks(grad, gate, up, grad_gate, grad_up):
        wide = x.float()
        open_ = torch.sigmoid(wide, out=_wide(into_up))
        slope = torch.mul(wide, open_, out=_wide(into_gate))
        slope.addcmul_(slope, open_, value=-1).add_(open_)
        _write(slope.mul_(up_part).mul_(grad_part), into_gate)
        _write(open_.mul_(wide).mul_(grad_part), into_up)
    return grad_gate, grad_up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out, half = torch.empty_like(x), x.shape[-1] // 2
    for part, cos_part, sin_part, into in _chunks(x, cos[:, None], sin[:, None], out):
        wide, turn = part.float(), sin_part.float()
        turned = torch.mul(wide, cos_part.float(), out=_wide(into))
        turned[..., :half].addcmul_(wide[..., half:], turn[..., :half], value=-sign)
        turned[..., half:].addcmul_(wide[..., :half], turn[..., half:], value=sign)
        _write(turned, into)
    return out


IN_PLACE = Kernels(
    _norm, _norm_backward, _norm_backward_weight,
    {"gelu": (_gelu_gate, _gelu_gate_backward), "silu": (_silu_gate, _silu_gate_backward)}, _rotate,
)  # fmt: skip
