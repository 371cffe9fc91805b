"""Attention by compiled FlexAttention (Dong et al. 2024, arXiv:2412.05496): for CUDA cards without flash-attn.

A compiled kernel has fixed numbers of queries and keys, so both are padded to a few sizes. Padded queries see no keys
and no query sees padded keys; the kernel skips them in blocks, so they only take memory.

Each query sees one range of keys: those of its segment from the window's edge up to its own position. Two numbers per
query define the mask, and because they are data, neither lengths nor the window need a new kernel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from arena.model.attention.tiles import kernel_options
from arena.model.attention.trial import Trial, cannot_compile, older_than_ampere, why_it_fails
from arena.model.card import Card, card_of, product_dtype
from arena.model.compiler import compiled

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NARROWEST_HEAD, WIDEST_HEAD = 16, 256  # on a GPU
BLOCK = 128  # queries and keys in a block of the mask; also the smallest size
# Sizes per octave. With these, micro-batches of 16,384 tokens with the competition's lengths need four sizes of queries
# and a dozen pairs of sizes, with 3% padding on average.
STEPS = 8
KERNELS = 256  # most compiled kernels: for sizes of queries and keys, with and without gradients
MASKS = 6  # cached masks: of a micro-batch's sliding, full and last layers, and of the micro-batch before

Mod = Callable[..., Tensor]


def flex(
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
    """Attends within each segment; see `varlen_attention`. On a CPU there is only the forward.

    Products are in bfloat16, float16 or float32: the dtype of autocast, or the widest of q, k and v; the softmax is in
    float32. The gradient is reproducible bit for bit.

    Raises:
        ValueError: gradients are needed on a CPU, or the card has too little shared memory.
    """
    _refuse_gradients_on_cpu(q, k, v)
    if len(q) == 0:
        return torch.empty_like(q)
    sizes = bucket(len(q)), bucket(len(k))
    mask = _masks.get(cu_seqlens_q, cu_seqlens_k, sizes, window)
    dtype = product_dtype(q, k, v)
    tiles = kernel_options(card_of(q.device), dtype, q.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        queries = _padded(q.to(dtype), sizes[0])
        keys, values = (_padded(states.to(dtype), sizes[1]) for states in (k, v))
        out = _compiled()(queries, keys, values, mask, scale, softcap, tiles)
    return out[0].transpose(0, 1)[: len(q)].to(q.dtype)


def supports(card: Card, dtype: torch.dtype, head_dim: int, softcap: float | None, training: bool) -> str | None:
    """Why FlexAttention cannot run, in a few words; None if it can.

    On a real GPU it is compiled and tried once, which takes some seconds.
    """
    if dtype not in DTYPES:
        return f"it supports bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if card.kind == "cpu":
        return "it has no backward on a CPU" if training else cannot_compile("cpu")
    if why := older_than_ampere(card):
        return why
    if not NARROWEST_HEAD <= head_dim <= WIDEST_HEAD:
        return f"it supports head sizes from {NARROWEST_HEAD} to {WIDEST_HEAD}, not {head_dim}"
    try:
        kernel_options(card, dtype, head_dim)
    except ValueError as error:
        return str(error)
    if why := cannot_compile():
        return why
    if card.index is None:  # made up
        return None
    trial = Trial(torch.device(card.kind, card.index), dtype, head_dim, softcap is not None, training)
    failed = why_it_fails("flex", flex, trial)
    return None if failed is None else f"FlexAttention of torch {torch.__version__} does not run here: {failed}"


def _refuse_gradients_on_cpu(*states: Tensor) -> None:
    wanted = torch.is_grad_enabled() and any(each.requires_grad for each in states)
    if wanted and states[0].device.type == "cpu":
        raise ValueError("flex attention has no backward on a CPU: train with model.attention=blockwise, or auto")


def bucket(n: int) -> int:
    """The size to which n queries or keys are padded: at most an eighth more, or less than `BLOCK` more.

    There are eight sizes per octave, all multiples of `BLOCK`.
    """
    assert n > 0
    octave = 1 << ((n - 1).bit_length() - 1) if n > 1 else 1  # the power of two below n
    step = max(BLOCK, octave // STEPS)
    return -(-n // step) * step


def _padded(states: Tensor, size: int) -> Tensor:
    """(T, heads, head_dim) to (1, heads, size, head_dim), padded with zeros; always a copy, so strides are known."""
    return F.pad(states, (0, 0, 0, 0, 0, size - len(states))).transpose(0, 1)[None]


def visible(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows: int, keys: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """The first and the last key that each query sees, int32 (rows,); `keys` and -1, an empty range, for padding."""
    row = torch.arange(rows, dtype=torch.int32, device=cu_seqlens_q.device)
    segment = torch.searchsorted(cu_seqlens_q, row, right=True).sub_(1).clamp_(max=len(cu_seqlens_q) - 2)
    last = row + (cu_seqlens_k - cu_seqlens_q)[1:][segment]  # a segment's queries and keys end together
    first = cu_seqlens_k[:-1][segment]
    if window is not None:
        first = torch.maximum(first, last - (window - 1))
    padding = row >= cu_seqlens_q[-1]
    return first.masked_fill(padding, keys), last.masked_fill(padding, -1)


def block_mask(first: Tensor, last: Tensor, keys: int) -> BlockMask:
    """Which blocks of keys each block of queries sees, partially or fully.

    It is computed from the ranges, which overlap a block or contain it, without a (rows, keys) mask and without waiting
    for the device; the largest tensor is bool (rows, keys / BLOCK).

    Args:
        first, last: int32 (rows,) from `visible`; rows and keys are multiples of `BLOCK`.
    """
    start = torch.arange(0, keys, BLOCK, dtype=torch.int32, device=first.device)
    end = start + (BLOCK - 1)
    low, high = (bound.view(-1, BLOCK, 1) for bound in (first, last))
    touched = ((low <= end) & (high >= start)).any(1)
    whole = ((low <= start) & (high >= end)).all(1)
    return BlockMask.from_kv_blocks(
        *_listed(touched & ~whole), *_listed(whole), BLOCK, mask_mod(first, last), (len(first), keys)
    )


def mask_mod(first: Tensor, last: Tensor) -> Mod:
    """Whether a query sees a key, for positions in the padded rows of queries and keys."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[query] <= key) & (key <= last[query])

    return sees


def score_mod(softcap: float | None) -> Mod | None:
    """The softcap of a score, by the sigmoid, because a GPU's exact tanh costs far more: c tanh(s / c) is 2c g - c."""
    if softcap is None:
        return None

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return 2 * softcap * torch.sigmoid(score * (2 / softcap)) - softcap

    return capped


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool (rows, columns) in FlexAttention's int32 form: each row's count of set columns, and these columns first."""
    count = blocks.sum(-1, dtype=torch.int32)
    order = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[None, None], order[None, None]


class _MaskCache:
    """A cache of recent masks, because all layers of a forward and its backward need the same two or three.

    A mask is found by the identity of the tensors that it was made from. The cache holds these tensors, so that no
    other tensor can take their place in memory; boundaries are never changed in place.
    """

    def __init__(self) -> None:
        self.masks: deque[tuple[tuple[Any, ...], BlockMask]] = deque(maxlen=MASKS)

    def get(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, sizes: tuple[int, int], window: int | None) -> BlockMask:
        for (ends_q, ends_k, *rest), mask in self.masks:
            if ends_q is cu_seqlens_q and ends_k is cu_seqlens_k and rest == [sizes, window]:
                return mask
        # Not inference tensors, even in inference mode, because the same batch may be used for training next.
        with torch.inference_mode(False), torch.no_grad():
            first, last = visible(cu_seqlens_q, cu_seqlens_k, *sizes, window)
            mask = block_mask(first, last, sizes[1])
        self.masks.append(((cu_seqlens_q, cu_seqlens_k, sizes, window), mask))
        return mask


_masks = _MaskCache()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    softcap: float | None,
    tiles: dict[str, int] | None,
) -> Tensor:
    """The function that is compiled."""
    options: Any = tiles
    out: Tensor = flex_attention(
        q, k, v, score_mod=score_mod(softcap), block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
    )  # fmt: skip
    return out


@cache
def _compiled() -> Callable[..., Tensor]:
    return compiled(_attend, KERNELS, dynamic=False)
