"""The exact attention backend, to which the others are compared: float32 scores and softmax, segment by segment."""

from __future__ import annotations

import torch
from torch import Tensor

from arena.model.card import Card

QUERY_CHUNK = 512  # queries processed at once, which limits the memory for scores


def reference(
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
    """Attends within each segment, on any device and in any dtype; see `varlen_attention`."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out: list[Tensor] = []
    with torch.autocast(q.device.type, enabled=False):
        for i in range(len(starts_q) - 1):
            keys = slice(starts_k[i], starts_k[i + 1])
            out += _segment(q[starts_q[i] : starts_q[i + 1]], k[keys], v[keys], scale, softcap, window)
    return torch.cat(out) if out else torch.empty_like(q)


def supports(card: Card, dtype: torch.dtype, head_dim: int, softcap: float | None, training: bool) -> None:
    """It runs on any device and in any dtype, with any head size and softcap."""


def _segment(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None) -> list[Tensor]:
    """One segment, a chunk of queries at a time, each with only the keys that some of its queries see."""
    n_q, n_k = len(q), len(k)
    offset = n_k - n_q  # the key at the position of the segment's first query
    if offset < 0:
        raise ValueError(f"a segment has {n_q} queries but {n_k} keys: each query needs the key at its own position")
    out = []
    for start in range(0, n_q, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, n_q)
        first = 0 if window is None else max(0, start + offset - window + 1)
        last = end + offset
        out.append(_chunk(q[start:end], k[first:last], v[first:last], start + offset - first, scale, softcap, window))
    return out


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, offset: int, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """Queries with keys, where query i has the position of key i + `offset`. A group of heads shares each key head."""
    n_q, heads, head_dim = q.shape
    n_k, kv_heads, _ = k.shape
    group = heads // kv_heads
    queries = q.float().view(n_q, kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
    scores = torch.bmm(queries, k.float().permute(1, 2, 0)).view(kv_heads, group, n_q, n_k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    at = torch.arange(n_q, device=q.device)[:, None] + offset
    keys = torch.arange(n_k, device=q.device)[None, :]
    hidden = keys > at
    if window is not None:
        hidden |= keys <= at - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    mixed = torch.bmm(weights.view(kv_heads, group * n_q, n_k), v.float().transpose(0, 1))
    return mixed.view(kv_heads, group, n_q, head_dim).permute(2, 0, 1, 3).reshape(n_q, heads, head_dim).to(q.dtype)
