"""Tile sizes for FlexAttention's kernels on cards whose shared memory is too small for torch's defaults.

torch 2.8 to 2.13 chooses tiles by compute capability, and uses those of the A100 (163 KiB per block of threads) also
for the L4, A10, RTX 3090 and 4090 (99 KiB). With a head size of 256 the forward then needs 148 KiB and the backward
134 KiB, and compiling fails with "out of resource". torch has tables for head sizes of 64, 128 and 256, and newer
versions also for 192; all others get tiles of 64 by 64 in three stages, which for 160 do not fit an A100 either. The
tables are in `get_flex_attn_fwd_configs` and `get_flex_attn_bwd_configs` of `torch/_inductor/template_heuristics`. The
tiles and formulas here were verified with kernels that Triton 3.4 and 3.9 compiled for capabilities 8.6 and 12.0 from
torch's templates (`torch/_inductor/kernel/flex/templates`).
"""

from __future__ import annotations

from functools import cache

import torch

from arena.model.card import Card

KIB = 1 << 10
# KiB that a block of threads may use, by compute capability (CUDA C++ programming guide, table of technical
# specifications), for versions of torch that do not report it; other cards are assumed to have the least of these.
SHARED = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}
ENOUGH = 163 * KIB  # with this much, torch's tiles for its known head sizes fit
KNOWN = (64, 128, 256)
OTHERS = (64, 64, 3)  # queries, keys and stages of the forward for all other head sizes
SHORT = 256  # bytes of a head up to which torch's tiles fit everywhere
# Queries, keys, pipeline stages and warps, the largest first. The backward needs eight warps where its sums of 32 keys
# would not fit into the registers of four.
FORWARD = ((32, 64, 2, 4), (32, 16, 2, 4), (16, 16, 1, 4))
BACKWARD = ((32, 32, 2, 8), (16, 16, 1, 4))
REST = 4 * KIB  # for sums and other small data


def kernel_options(card: Card, dtype: torch.dtype, head_dim: int) -> dict[str, int] | None:
    """The tile options for `flex_attention`; None if torch's own tiles fit.

    Raises:
        ValueError: no tile fits; the message states the required and the available memory.
    """
    row = (1 << (head_dim - 1).bit_length()) * dtype.itemsize
    shared = KIB * SHARED.get(card.capability, min(SHARED.values())) if card.shared is None else card.shared
    if card.kind == "cpu" or row <= SHORT:
        return None
    if shared >= ENOUGH and (head_dim in KNOWN or forward_need(row, *OTHERS) <= shared):
        return None
    return _tiles(row, shared)


@cache
def _tiles(row: int, shared: int) -> dict[str, int]:
    """The largest tiles that fit for heads of `row` bytes; the mask's blocks are a multiple of each."""
    forward = next((each for each in FORWARD if forward_need(row, *each[:3]) <= shared), None)
    backward = next((each for each in BACKWARD if backward_need(row, *each[:3]) <= shared), None)
    if forward is None or backward is None:
        least = max(forward_need(row, *FORWARD[-1][:3]), backward_need(row, *BACKWARD[-1][:3]))
        raise ValueError(f"its smallest tiles need {least // KIB} KiB of shared memory, but there are {shared // KIB}")
    queries, keys, stages, warps = forward
    options = {"fwd_BLOCK_M": queries, "fwd_BLOCK_N": keys, "fwd_num_stages": stages, "fwd_num_warps": warps}
    queries, keys, stages, warps = backward
    # 1 is for the gradients of keys and values; 2 is for that of queries, where queries and keys change places
    options |= {"bwd_BLOCK_M1": queries, "bwd_BLOCK_N1": keys, "bwd_BLOCK_M2": keys, "bwd_BLOCK_N2": queries}
    return options | {"bwd_num_stages": stages, "bwd_num_warps": warps}


def forward_need(row: int, queries: int, keys: int, stages: int) -> int:
    """Bytes of the forward: queries, keys and values of all stages but one, and float32 scores."""
    return row * (queries + max(1, 2 * (stages - 1)) * keys) + 4 * queries * keys + REST


def backward_need(row: int, queries: int, keys: int, stages: int) -> int:
    """Bytes of the backward: keys and values, queries and gradients of all stages but one, and scores."""
    return 2 * row * (keys + max(1, stages - 1) * queries) + 4 * queries * keys + REST
