"""Blockwise attention with a hand-written gradient: fast on CPUs, memory linear in the number of tokens.

The forward saves its output and one number for each query and head, the logarithm of the sum of its exponentiated
scores; the backward recomputes the scores block by block (Dao 2023, FlashAttention-2, arXiv:2307.08691). A block is a
few queries with all keys that they see, because matrix products on a CPU need long rows and its caches can hold them.
A row is one query of one head; the heads that share a key head are folded into the rows of one product. Neighbouring
segments of one shape are computed together as `count` segments, because each small operation costs a CPU a fixed time.

Two identities make the softcap cheap, since tanh costs a CPU as much as the product before it: `c tanh(s / c)` equals
`2c g - c` with the sigmoid g of `2s / c`, whose constant does not affect the softmax, and the derivative in s is
`4 g (1 - g)`. Exponentials are powers of two, which cost less than half as much as powers of e.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from arena.model.attention.blocks import Form, Segments, Space, in_groups
from arena.model.card import Card


def blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Attends within each segment, on any device; see `varlen_attention`.

    Products of bfloat16 are in bfloat16 if the CPU supports it, with the softmax in float32; float64 stays float64;
    everything else is in float32. Differentiable once in q, k and v.

    Raises:
        ValueError: a segment has no query, or fewer keys than queries.
    """
    groups = in_groups(_lengths(cu_seqlens_q, cu_seqlens_k), q.shape[1], k.shape[1] * k.shape[2])
    form = Form(scale, None if softcap is None else abs(softcap), window)
    dtype = _product_dtype(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = _Blockwise.apply(q.to(dtype), k.to(dtype), v.to(dtype), groups, form)
    return out.to(q.dtype)


def supports(card: Card, dtype: torch.dtype, head_dim: int, softcap: float | None, training: bool) -> None:
    """It runs on any device and in any dtype, with any head size and softcap."""


def _lengths(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[int, int]]:
    """The numbers of queries and keys of each segment."""
    lengths = list(zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True))
    for n_q, n_k in lengths:
        if n_q < 1:
            raise ValueError("a segment has no query: remove it")
        if n_k < n_q:
            raise ValueError(
                f"a segment has {n_q} queries but {n_k} keys: each query needs the key at its own position"
            )
    return lengths


def _product_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """The dtype of the matrix products."""
    dtype = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
    if dtype == torch.bfloat16 and (q.device.type != "cpu" or _bfloat16_instructions()):
        return dtype
    return dtype if dtype == torch.float64 else torch.float32


@cache
def _bfloat16_instructions() -> bool:
    """Whether this CPU has bfloat16 products; torch reports all of a CPU's capabilities from 2.10 on."""
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())


def _rows(states: Tensor, n: int, kv_heads: int) -> Tensor:
    """(count * n, heads, head_dim) to (count * kv_heads, n * group, head_dim): a block of queries is some rows."""
    by_group: Tensor = states.unflatten(1, (kv_heads, -1)).unflatten(0, (-1, n))
    return by_group.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _unfold(rows: Tensor, into: Tensor, n: int, kv_heads: int) -> None:
    """Undoes `_rows`, into (count * n, heads, head_dim)."""
    by_group = into.unflatten(1, (kv_heads, -1)).unflatten(0, (-1, n))
    by_group.copy_(rows.unflatten(1, (n, -1)).unflatten(0, (-1, kv_heads)).transpose(1, 2))


def _by_head(states: Tensor, n: int) -> Tensor:
    """(count * n, heads, head_dim) to (count * heads, n, head_dim).

    Copied where count > 1, and for bfloat16, whose products are slow with strides.
    """
    heads_first: Tensor = states.unflatten(0, (-1, n)).transpose(1, 2).flatten(0, 1)
    return heads_first.contiguous() if states.dtype == torch.bfloat16 else heads_first


class _Blockwise(torch.autograd.Function):
    """q (T_q, heads, head_dim), k and v (T_k, kv_heads, head_dim), all of one dtype."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: list[Segments], form: Form) -> Tensor:
        space = Space(q)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(len(q), q.shape[1], 1, dtype=space.wide)
        for segments in groups:
            _forward(q, k, v, out, lse, segments, form, space)
        # detached, because under saved-tensor hooks a function that saves its own result is never freed after an error
        ctx.save_for_backward(q, k, v, out.detach(), lse)
        ctx.groups, ctx.form = groups, form
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        space = Space(q)
        wanted = ctx.needs_input_grad
        grads = (
            torch.empty_like(q) if wanted[0] else None,
            torch.empty_like(k, dtype=space.wide) if wanted[1] else None,
            torch.empty_like(v, dtype=space.wide) if wanted[2] else None,
        )
        with torch.autocast(q.device.type, enabled=False):
            for segments in ctx.groups:
                _backward((q, k, v, out, grad_out, lse), grads, segments, ctx.form, space)
        return *(None if grad is None else grad.to(q.dtype) for grad in grads), None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, form: Form, space: Space
) -> None:
    """Writes some segments' part of `out` and `lse`: (T_q, heads, 1), in powers of two."""
    own, seen, n_q, n_k = segments
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    rows, keys, values = _rows(q[own], n_q, kv_heads), _by_head(k[seen], n_k), _by_head(v[seen], n_k)
    mixed = torch.empty_like(rows)
    minus_max, row_sum = (torch.empty(*rows.shape[:2], 1, device=q.device, dtype=space.wide) for _ in range(2))
    for block in form.blocks(n_q, n_k, kv_heads, group, space.rows):
        weights = form.levels(rows[:, block.rows], keys[:, block.keys], space)
        block.hide(weights, form.window, space)
        top = weights.amax(-1, keepdim=True).mul_(-form.slope)
        torch.add(top, weights, alpha=form.slope, out=weights).exp2_()
        torch.bmm(space.narrowed(weights), values[:, block.keys], out=mixed[:, block.rows])
        minus_max[:, block.rows] = top
        torch.sum(weights, -1, keepdim=True, out=row_sum[:, block.rows])
    _unfold(mixed.div_(row_sum), out[own], n_q, kv_heads)
    _unfold(row_sum.log2_().sub_(minus_max), lse[own], n_q, kv_heads)


def _backward(
    saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], segments: Segments, form: Form, space: Space
) -> None:
    """Writes some segments' part of the required gradients of q, k and v."""
    q, k, v = saved[:3]
    own, seen, n_q, n_k = segments
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    rows, out, grad_rows, lse = (_rows(states[own], n_q, kv_heads) for states in (q, *saved[3:]))
    keys, values = (_by_head(states[seen], n_k) for states in (k, v))
    minus_lse, delta = lse.neg(), (out.to(space.wide) * grad_rows).sum(-1, keepdim=True)
    grad_q = None if grads[0] is None else torch.empty_like(rows)
    grad_k, grad_v = (None if grad is None else _Sum(keys, space) for grad in grads[1:])
    for block in reversed(list(form.blocks(n_q, n_k, kv_heads, group, space.rows))):  # the first sees the most keys
        block_rows, block_keys, block_grad = rows[:, block.rows], keys[:, block.keys], grad_rows[:, block.rows]
        levels = form.levels(block_rows, block_keys, space)
        weights = space.take("weights", levels.shape, space.wide)
        torch.add(minus_lse[:, block.rows], levels, alpha=form.slope, out=weights)
        block.hide(weights, form.window, space)
        weights.exp2_()
        if grad_v is not None:
            grad_v.add(block.keys, space.narrowed(weights).transpose(1, 2), block_grad)
        if grad_q is None and grad_k is None:
            continue
        grad = space.product("grad", block_grad, values[:, block.keys].transpose(1, 2), 1.0)
        grad.sub_(delta[:, block.rows]).mul_(weights)
        factor = form.chain(grad, levels)
        narrow = space.narrowed(grad)
        if grad_q is not None:
            part = grad_q[:, block.rows]
            torch.baddbmm(part, narrow, block_keys, beta=0, alpha=factor, out=part)
        if grad_k is not None:
            grad_k.add(block.keys, narrow.transpose(1, 2), block_rows, factor)
    if grad_q is not None and grads[0] is not None:
        _unfold(grad_q, grads[0][own], n_q, kv_heads)
    for total, into in zip((grad_k, grad_v), grads[1:], strict=True):
        if total is not None and into is not None:
            _unfold(total.into, into[seen], n_k, kv_heads)


class _Sum:
    """Sums the blocks' parts of a gradient of some keys, (count * kv_heads, keys, head_dim)."""

    def __init__(self, keys: Tensor, space: Space) -> None:
        self.into = torch.empty_like(keys, dtype=space.wide, memory_format=torch.contiguous_format)
        self.space, self.written = space, False

    def add(self, keys: slice, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
        if not self.written and keys != slice(0, self.into.shape[1]):
            self.into.zero_()
            self.written = True
        part = self.into[:, keys]
        if part.dtype == a.dtype:
            torch.baddbmm(part, a, b, beta=int(self.written), alpha=factor, out=part)
        else:
            product = self.space.product("part", a, b, factor)
            part.add_(product) if self.written else part.copy_(product)
        self.written = True
