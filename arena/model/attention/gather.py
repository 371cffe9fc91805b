"""Gathers keys and values in the order of the segments, with the gradient of shared beginnings summed in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gather(states: Tensor, index: Tensor) -> Tensor:
    """`states[index]`, (K, heads, head_dim) of (T, heads, head_dim), with its gradient summed in float32.

    A token of a shared beginning is a key of many segments, and in half precision the sum of their gradients would be
    rounded with each addition. On a GPU the order of the sum varies from run to run unless torch uses deterministic
    algorithms.
    """
    out: Tensor = _Gather.apply(states, index)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(states)
        return states.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.rows, *grad.shape[1:], dtype=wide, device=grad.device)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None
