"""What is known of a device, and the dtype that products are in."""

from __future__ import annotations

import pytest
import torch

from arena.model.card import Card, card_of, product_dtype


def cuda(major: int, minor: int = 0) -> Card:
    return Card("cuda", f"card {major}.{minor}", (major, minor), 16 * 2**30)


def test_the_cpu_has_memory_and_every_dtype() -> None:
    card = card_of("cpu")
    assert card.kind == "cpu" and card.capability == (0, 0) and card.bfloat16 and card.name
    assert 2**28 < card.memory < 2**50
    assert card_of(torch.device("cpu")) is card


def test_bfloat16_comes_with_ampere() -> None:
    assert [cuda(*each).bfloat16 for each in ((7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0))] == [False] * 2 + [
        True
    ] * 4


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device meta: this package runs on CUDA devices and CPUs"):
        card_of("meta")


def test_the_dtype_of_products() -> None:
    full, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert product_dtype(half, half) == torch.bfloat16
    assert product_dtype(half, full) == torch.float32
    assert product_dtype(half, half.half()) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product_dtype(full, full) == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert product_dtype(full, full) == torch.float32
