"""Variable-length attention over packed examples: one signature, several backends, registered with transformers.

Queries and keys of all segments lie end to end; segment i has the queries `cu_seqlens_q[i]:cu_seqlens_q[i+1]` and the
keys `cu_seqlens_k[i]:cu_seqlens_k[i+1]`. Attention is causal and aligned at the bottom right as in flash-attn: the last
query of a segment sees all of its keys. No mask over the whole row is ever built.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from arena.model.attention.backends import BACKENDS, choose_backend
from arena.model.card import card_of, product_dtype
from arena.model.last_layer import KeyValueCapture
from arena.model.memory.recompute import recomputable

NAME = "arena_varlen"  # the name under which `transformers_attention` is registered
# arguments that transformers passes to attention and that do not affect its result
NO_EFFECT = frozenset(
    ("position_ids", "cache_position", "use_cache", "last_token", "output_attentions", "output_hidden_states",
     "output_router_logits", "return_dict")
)  # fmt: skip
USED = "arena_used_backend"  # the attribute of an attention module that names its last backend


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
        scale: factor of the scores.
        softcap: scores become `softcap * tanh(score / softcap)`; None leaves them unchanged.
        window: the most keys that a query sees, including the one at its own position; None: all keys before it.

    Returns:
        (T_q, heads, head_dim), in the dtype of q.

    Raises:
        ValueError: shapes or boundaries are inconsistent, a segment has fewer keys than queries, or the backend is
            unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"there is no attention backend {backend!r}: name one of {', '.join(BACKENDS)}")
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, window)
    return BACKENDS[backend].attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=scale, softcap=softcap, window=window
    )


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, window: int | None) -> None:
    if k.shape[:2] == v.shape[:2] and k.shape[-1] != v.shape[-1]:
        raise ValueError(f"keys have head size {k.shape[-1]}, but values {v.shape[-1]}: they must be equal")
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"the shapes of q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not match")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(f"there are {len(cu_seqlens_q) - 1} query segments, but {len(cu_seqlens_k) - 1} key segments")
    for name, ends, rows in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_k", cu_seqlens_k, len(k))):
        if ends.device.type == "cpu" and (int(ends[0]) != 0 or int(ends[-1]) != rows):
            raise ValueError(f"{name} must go from 0 to {rows}, but goes from {int(ends[0])} to {int(ends[-1])}")
    # boundaries on other devices are not checked, because every layer would wait for the device
    if cu_seqlens_q.device.type == "cpu" and bool((cu_seqlens_k.diff() < cu_seqlens_q.diff()).any()):
        raise ValueError("a segment has more queries than keys: each query needs the key at its own position")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys is too small: it includes the query's own position")


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
    last_layer: KeyValueCapture | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`varlen_attention` with the signature that transformers calls, whose argument names differ.

    The backend is chosen here for the present device and dtype of the tensors, because a model may be moved or run
    under autocast after it was loaded. Its name is stored in the module (`used_backends`).

    Args:
        query: (1, heads, T_q, head_dim); key, value: (1, kv_heads, T, head_dim).
        kv_index: int64 (T_k,), the positions of all segments' keys among the T; None: they are in that order already.
        last_layer: set if queries are needed for last tokens only (`model/last_layer.py`).

    Returns:
        (1, T_q, heads, head_dim), and None in place of attention weights.

    Raises:
        ValueError: there is a mask, dropout, or an unknown keyword that may change the result; boundaries are missing
            or misspelt; the model is not causal; or the requested backend cannot run here.
    """
    boundaries = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    _check_call(module, query, attention_mask, dropout, boundaries, others)
    assert cu_seq_lens_q is not None and cu_seq_lens_k is not None
    assert max_length_q is not None and max_length_k is not None
    if last_layer is not None:
        key, value = last_layer.keys_and_values(key, value)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if kv_index is not None:
        gathered = partial(gather, index=kv_index)
        k, v = recomputable(gathered, k), recomputable(gathered, v)
    choice = choose_backend(
        getattr(module.config, "arena_backend", "reference"),
        card_of(q.device), product_dtype(q, k, v), q.shape[-1], softcap,
        training=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )  # fmt: skip
    setattr(module, USED, choice.name)
    out = varlen_attention(
        q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        window=sliding_window,
        backend=choice.name,
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
            "packed attention does not accept an attention_mask: pass boundaries as cu_seq_lens_q and cu_seq_lens_k"
        )
    wrong = [name for name in others if name.startswith(("cu_", "max_seq", "max_len"))]
    if wrong or any(each is None for each in boundaries):
        raise ValueError(
            "packed attention needs cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k in the model call"
            + (f"; {', '.join(wrong)} is unknown" if wrong else "")
        )
    if unknown := [name for name, value in others.items() if value is not None and name not in NO_EFFECT]:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(unknown)} to attention, which packed attention does not support"
        )
    if dropout:
        raise ValueError("packed attention has no dropout: set attention_dropout to 0 in the model's config")
    if query.shape[0] != 1:
        raise ValueError(f"packed attention needs one row of examples end to end, not {query.shape[0]} rows")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"packed attention is causal, but {type(module).__name__} is not")


def used_backends(model: torch.nn.Module) -> str:
    """The backends that the model's layers used in their last call, such as `flash`."""
    return ", ".join(sorted({getattr(module, USED) for module in model.modules() if hasattr(module, USED)}))


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


# Only the attention function is registered and no mask function, so transformers builds no mask at all.
AttentionInterface.register(NAME, transformers_attention)
