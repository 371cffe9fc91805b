"""Attention by flash-attn 2 (Dao 2023, arXiv:2307.08691): the fastest backend, on CUDA cards from Ampere on."""

from __future__ import annotations

import torch
from torch import Tensor

from arena.model.card import product_dtype

HALF = (torch.bfloat16, torch.float16)


def flash(
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
    """Attends within each segment, as `arena.model.attention.varlen_attention` says.

    Products are in bfloat16 or float16: the dtype of autocast, or that of q, k and v. The gradient is the same bit by
    bit in each run where `torch.use_deterministic_algorithms` is on; else dq is added up in the order of arrival.

    Args and Returns: as there; q (T_q, heads, head_dim), k and v (T_k, kv_heads, head_dim), boundaries int32 (n + 1,)
    on the device of q.

    Raises:
        ValueError: another dtype.
    """
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]

    dtype = product_dtype(q, k, v)
    if dtype not in HALF:
        raise ValueError(f"flash attention is for bfloat16 and float16, not {dtype}: set model.attention=auto")
    if len(q) == 0:
        return torch.empty_like(q)
    for ends in (cu_seqlens_q, cu_seqlens_k):
        assert ends.dtype == torch.int32 and ends.device == q.device, f"boundaries {ends.dtype} on {ends.device}"
    out: Tensor = flash_attn_varlen_func(
        *(_dense_heads(states.to(dtype)) for states in (q, k, v)),
        cu_seqlens_q,
        cu_seqlens_k,
        # An upper bound, which sizes the grid. At 1 flash-attn takes the path made for generation instead: without the
        # causal mask, query heads moved into the query axis, another layout of what the backward reads; and small
        # builds leave that path out. Our last layer asks one query of each segment.
        max(max_seqlen_q, 2),
        max_seqlen_k,
        softmax_scale=scale,
        causal=True,  # aligned at the bottom right
        window_size=(-1, -1) if window is None else (window - 1, 0),  # keys before the own one, both bounds included
        softcap=0.0 if softcap is None else softcap,  # 0 is none
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.to(q.dtype)


def _dense_heads(states: Tensor) -> Tensor:
    """The kernel reads heads of consecutive numbers; tokens and heads may lie in any order."""
    return states if states.stride(-1) == 1 else states.contiguous()
