"""Tiles of FlexAttention on made-up cards, held to what Triton said that its kernels need."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arena.model.attention.flex import BLOCK
from arena.model.attention.tiles import BACKWARD as BACKWARD_TILES
from arena.model.attention.tiles import FORWARD as FORWARD_TILES
from arena.model.attention.tiles import backward_need, forward_need, kernel_options
from arena.model.card import Card

BF16, FP32 = torch.bfloat16, torch.float32
SMALL = [(8, 6), (8, 9), (12, 0), (12, 1)]  # A10, RTX 3090; L4, RTX 4090; RTX 5090; GB10
LIMIT = 101_376  # bytes a block on these


def card(*capability: int, shared: int | None = None) -> Card:
    return Card("cuda", "a card", (capability[0], capability[1]), 1 << 34, shared)


def needs(options: dict[str, int], row: int) -> tuple[int, int]:
    forward = (options["fwd_BLOCK_M"], options["fwd_BLOCK_N"], options["fwd_num_stages"])
    backward = (options["bwd_BLOCK_M1"], options["bwd_BLOCK_N1"], options["bwd_num_stages"])
    return forward_need(row, *forward), backward_need(row, *backward)


@pytest.mark.parametrize("capability", SMALL)
@pytest.mark.parametrize(("dtype", "head_dim"), [(BF16, 256), (BF16, 192), (FP32, 256), (FP32, 128), (FP32, 80)])
def test_small_cards_get_tiles_that_fit(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> None:
    options = kernel_options(card(*capability), dtype, head_dim)
    assert options is not None and options == kernel_options(card(*capability, shared=LIMIT), dtype, head_dim)
    rounded = 1 << (head_dim - 1).bit_length()
    assert max(needs(options, rounded * dtype.itemsize)) <= LIMIT
    tiles = {name: value for name, value in options.items() if "BLOCK" in name}
    assert len(tiles) == 6 and all(value >= 16 and BLOCK % value == 0 for value in tiles.values())
    assert tiles["bwd_BLOCK_N1"] % tiles["bwd_BLOCK_M1"] == 0 == tiles["bwd_BLOCK_M2"] % tiles["bwd_BLOCK_N2"]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (10, 3)])
def test_large_cards_keep_those_of_torch(capability: tuple[int, int]) -> None:
    assert kernel_options(card(*capability), FP32, 256) is None
    assert kernel_options(card(8, 6, shared=163 << 10), BF16, 256) is None, "what the card says itself counts"
    assert kernel_options(card(*capability, shared=LIMIT), BF16, 256) is not None


def test_heads_that_torch_does_not_know_get_tiles_where_its_own_do_not_fit() -> None:
    assert kernel_options(card(8, 0), BF16, 160) is not None and kernel_options(card(8, 0), FP32, 96) is not None
    assert kernel_options(card(9, 0), BF16, 160) is None
    assert kernel_options(card(9, 0), FP32, 160) is not None


def test_short_heads_and_processors_keep_those_of_torch() -> None:
    assert kernel_options(card(8, 6), BF16, 128) is None and kernel_options(card(8, 6), FP32, 64) is None
    assert kernel_options(Card("cpu", "a processor", (0, 0), 1 << 34), FP32, 256) is None


def test_it_is_an_error_if_no_tile_fits() -> None:
    with pytest.raises(ValueError, match="smallest tiles need 69 KiB of shared memory, but there are 64"):
        kernel_options(card(7, 5, shared=64 << 10), FP32, 256)


# bytes that Triton 3.4 reported for torch's templates, soft cap and our mask, four warps, capability 8.6
FORWARD = {
    (512, 32, 64, 1): 53_248, (512, 32, 64, 2): 86_016, (512, 32, 64, 3): 151_552, (512, 64, 32, 2): 69_632,
    (512, 64, 64, 2): 106_496, (512, 64, 64, 3): 172_032, (512, 32, 32, 3): 83_968, (1024, 32, 16, 2): 67_712,
    (1024, 64, 16, 2): 102_528, (1024, 16, 16, 1): 33_792, (512, 128, 32, 2): 106_496,
    (256, 128, 64, 3): 98_304, (256, 64, 64, 3): 90_112, (256, 128, 32, 3): 82_176,
}  # fmt: skip
BACKWARD = {
    (512, 32, 32, 2): 71_168, (512, 64, 64, 2): 137_216, (512, 16, 64, 2): 87_296, (512, 16, 32, 2): 54_528,
    (512, 32, 64, 2): 103_936, (512, 16, 16, 1): 33_792, (1024, 16, 16, 1): 66_560,
    (256, 64, 64, 2): 69_120, (256, 64, 64, 3): 86_528,
}  # fmt: skip


@pytest.mark.parametrize(("need", "measured"), [(forward_need, FORWARD), (backward_need, BACKWARD)])
def test_the_arithmetic_is_that_of_the_compiler(need: Any, measured: dict[tuple[int, ...], int]) -> None:
    """Never too little; and of the tiles that are ours at most 8 KiB too much."""
    own = {each[:3] for each in (*FORWARD_TILES, *BACKWARD_TILES)}
    for case, found in measured.items():
        assert found <= need(*case), case
        assert case[1:] not in own or need(*case) <= found + (8 << 10), case
