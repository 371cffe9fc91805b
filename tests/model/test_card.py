"""What is known of a device, the dtype that products are in, and that of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arena.model.card import Card, card_of, product_dtype, resolve_dtype, with_dtype
from tests.helpers import tiny_recipe

H100 = Card("cuda", "NVIDIA H100", (9, 0), 80 << 30)
T4 = Card("cuda", "Tesla T4", (7, 5), 16 << 30)
CPU = Card("cpu", "x86_64", (0, 0), 16 << 30)


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


@pytest.mark.parametrize(
    ("setting", "card", "expected"),
    [
        ("auto", H100, "bfloat16"), ("auto", Card("cuda", "A100", (8, 0), 0), "bfloat16"), ("auto", T4, "float16"),
        ("auto", CPU, "bfloat16"), ("float16", H100, "float16"), ("float32", T4, "float32"),
        ("bfloat16", CPU, "bfloat16"),
    ],
)  # fmt: skip
def test_auto_takes_what_the_card_has(setting: str, card: Card, expected: str) -> None:
    assert resolve_dtype(setting, card) == expected


def test_a_dtype_that_the_card_lacks_names_the_way_out(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2, "model.dtype=bfloat16")
    with pytest.raises(ValueError, match=r"bfloat16, which Tesla T4 .*7\.5.* pass model\.dtype=float16"):
        with_dtype(recipe, T4)
    auto = tiny_recipe(tmp_path, gemma2, "model.dtype=auto")
    assert with_dtype(auto, T4).model.dtype == "float16"
    assert auto.model.dtype == "auto"
