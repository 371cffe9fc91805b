"""Attention by flash-attn 2 (Dao 2023, arXiv:2307.08691): the fastest backend, on CUDA cards from Ampere on."""

from __future__ import annotations

from functools import cache
from importlib import metadata

import torch
from packaging.version import Version
from torch import Tensor

from arena.model.attention.trial import Trial, import_error, older_than_ampere, why_it_fails
from arena.model.card import Card, product_dtype

HALF = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256
LEAST_VERSION = "2.6.0"  # the first with a softcap argument
LEAST_VERSION_SOFTCAP = "2.6.2"  # the first with a softcap in the backward


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
    """Attends within each segment; see `varlen_attention`. Boundaries are on the device of q.

    Products are in bfloat16 or float16: the dtype of autocast, or that of q, k and v. With
    `torch.use_deterministic_algorithms` the gradient is reproducible bit for bit; otherwise dq is summed in the order
    of arrival.

    Raises:
        ValueError: the dtype is another one.
    """
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]

    dtype = product_dtype(q, k, v)
    if dtype not in HALF:
        raise ValueError(f"flash attention supports bfloat16 and float16, not {dtype}: set model.attention=auto")
    if len(q) == 0:
        return torch.empty_like(q)
    for ends in (cu_seqlens_q, cu_seqlens_k):
        assert ends.dtype == torch.int32 and ends.device == q.device, f"boundaries {ends.dtype} on {ends.device}"
    out: Tensor = flash_attn_varlen_func(
        *(_dense_heads(states.to(dtype)) for states in (q, k, v)),
        cu_seqlens_q,
        cu_seqlens_k,
        # This is an upper bound that determines the grid size. With 1, flash-attn would use its path for generation,
        # which has no causal mask, moves query heads into the query axis, saves another layout for the backward, and is
        # missing from small builds. The last layer has one query per segment.
        max(max_seqlen_q, 2),
        max_seqlen_k,
        softmax_scale=scale,
        causal=True,  # aligned at the bottom right
        window_size=(-1, -1) if window is None else (window - 1, 0),  # keys before and after the own one
        softcap=0.0 if softcap is None else softcap,  # 0 means none
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.to(q.dtype)


def _dense_heads(states: Tensor) -> Tensor:
    """Makes each head contiguous, as the kernel requires; tokens and heads may have any strides."""
    return states if states.stride(-1) == 1 else states.contiguous()


def supports(card: Card, dtype: torch.dtype, head_dim: int, softcap: float | None, training: bool) -> str | None:
    """Why flash-attn cannot run, in a few words; None if it can.

    On a real GPU it is tried once, because it may be built for certain head sizes and cards only.
    """
    if card.kind != "cuda":
        return "it needs a CUDA device"
    if why := older_than_ampere(card):
        return why
    if dtype not in HALF:
        return f"it supports bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > WIDEST_HEAD or head_dim % 8:
        return f"it supports head sizes up to {WIDEST_HEAD} that are a multiple of 8, not {head_dim}"
    if why := flash_attn_missing(LEAST_VERSION if softcap is None else LEAST_VERSION_SOFTCAP):
        return why
    if card.index is None:  # made up
        return None
    trial = Trial(torch.device(card.kind, card.index), dtype, head_dim, softcap is not None, training)
    failed = why_it_fails("flash", flash, trial)
    return None if failed is None else f"flash-attn {metadata.version('flash-attn')} does not run here: {failed}"


@cache
def flash_attn_missing(least: str) -> str | None:
    """Why flash-attn cannot be used: it is missing, older than version `least`, or built for another torch."""
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return "flash-attn is not installed"
    if Version(version) < Version(least):
        return f"flash-attn {version} is older than {least}, the first version that supports this model"
    return import_error("flash_attn", f"flash-attn {version}")
