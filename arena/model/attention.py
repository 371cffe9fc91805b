"""Variable-length attention over packed examples: one signature, several backends, and its place in transformers.

Queries and keys of all segments lie end to end; segment i has queries `cu_seqlens_q[i]:cu_seqlens_q[i+1]` and keys
`cu_seqlens_k[i]:cu_seqlens_k[i+1]`. Attention is causal, aligned at the bottom right as in flash-attn: the last query
of a segment sees all of its keys. No mask over the whole row is ever built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from arena.model.blockwise import blockwise
from arena.model.last_layer import KeptKeys

NAME = "arena_varlen"  # under this name transformers finds `transformers_attention`

QUERY_CHUNK = 512  # queries handled at once by `reference`, which bounds the memory for its scores

Backend = Callable[..., Tensor]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    backend: str = "reference",
) -> Tensor:
    """Attends within each segment.

    Args:
        q: (T_q, heads, head_dim).
        k, v: (T_k, kv_heads, head_dim); heads is a multiple of kv_heads.
        cu_seqlens_q, cu_seqlens_k: int32 (n + 1,), 0 first, T_q and T_k last.
        max_seqlen_q, max_seqlen_k: the longest segment's queries and keys.
        scale: scores are multiplied by it.
        softcap: scores become `softcap * tanh(score / softcap)`; None leaves them.
        window: a query sees this many keys at most, the one at its own place included; None sees all before it.

    Returns:
        (T_q, heads, head_dim), in the dtype of q.

    Raises:
        ValueError: shapes or boundaries that do not belong together, a segment with fewer keys than queries, or an
            unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"there is no attention backend {backend!r}: name one of {', '.join(BACKENDS)}")
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, window)
    return BACKENDS[backend](
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=scale, softcap=softcap, window=window
    )


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, window: int | None) -> None:
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(f"{len(cu_seqlens_q) - 1} query segments, but {len(cu_seqlens_k) - 1} key segments")
    for name, ends, rows in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_k", cu_seqlens_k, len(k))):
        if ends.device.type == "cpu" and (int(ends[0]) != 0 or int(ends[-1]) != rows):
            raise ValueError(f"{name} must go from 0 to {rows}, it goes from {int(ends[0])} to {int(ends[-1])}")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys shows nothing: it counts the query's own place")


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
    """The exact backend, for any device: float32 scores and softmax, segment by segment. Others are held to it."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out: list[Tensor] = []
    with torch.autocast(q.device.type, enabled=False):
        for i in range(len(starts_q) - 1):
            keys = slice(starts_k[i], starts_k[i + 1])
            out += _segment(q[starts_q[i] : starts_q[i + 1]], k[keys], v[keys], scale, softcap, window)
    return torch.cat(out) if out else torch.empty_like(q)


def _segment(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None) -> list[Tensor]:
    """One segment, a chunk of queries at a time, each with just the keys that some of its queries see."""
    n_q, n_k = len(q), len(k)
    offset = n_k - n_q  # the key at the place of the segment's first query
    if offset < 0:
        raise ValueError(f"a segment has {n_q} queries but {n_k} keys: each query needs the key at its own place")
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
    """Queries against keys; query i stands at the place of key i + `offset`. Keys are shared by a group of heads."""
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


BACKENDS: dict[str, Backend] = {"reference": reference, "blockwise": blockwise}


def choose_backend(setting: str) -> str:
    """The backend that a recipe's `model.attention` stands for; `auto` is `blockwise`, on any device."""
    return "blockwise" if setting == "auto" else setting


def transformers_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    kv_index: Tensor | None = None,
    last_layer: KeptKeys | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`varlen_attention` under the signature that transformers calls: the one place where the spellings meet.

    Args:
        query: (1, heads, T_q, head_dim); key, value: (1, kv_heads, T, head_dim).
        kv_index: int64 (T_k,), the keys of all segments, one after another, as places among the T; None: as they stand.
        last_layer: set where queries are wanted for the last tokens alone (`model/last_layer.py`).

    Returns:
        (1, T_q, heads, head_dim) and no attention weights.

    Raises:
        ValueError: a mask, dropout, missing or misspelt boundaries, or a model that is not causal.
    """
    boundaries = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    _check_call(module, query, attention_mask, dropout, boundaries, others)
    assert cu_seq_lens_q is not None and cu_seq_lens_k is not None
    assert max_length_q is not None and max_length_k is not None
    if last_layer is not None:
        key, value = last_layer.keys_and_values(key, value)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if kv_index is not None:
        k, v = k.index_select(0, kv_index), v.index_select(0, kv_index)
    out = varlen_attention(
        q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        window=sliding_window,
        backend=getattr(module.config, "arena_backend", "reference"),
    )  # fmt: skip
    return out[None], None


def _check_call(
    module: torch.nn.Module,
    query: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    boundaries: tuple[object, ...],
    others: dict[str, Any],
) -> None:
    if attention_mask is not None:
        raise ValueError(
            "packed attention takes no attention_mask: boundaries come from cu_seq_lens_q and cu_seq_lens_k"
        )
    wrong = [name for name in others if name.startswith(("cu_", "max_seq", "max_len"))]
    if wrong or any(each is None for each in boundaries):
        raise ValueError(
            "packed attention needs cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k in the model call"
            + (f"; it does not know {', '.join(wrong)}" if wrong else "")
        )
    if dropout:
        raise ValueError("packed attention has no dropout: set attention_dropout to 0 in the model's config")
    if query.shape[0] != 1:
        raise ValueError(f"packed attention takes one row of examples end to end, not {query.shape[0]} rows")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"packed attention is causal, {type(module).__name__} is not")


# Only the attention function is registered and no mask function: transformers then builds no mask at all.
AttentionInterface.register(NAME, transformers_attention)
