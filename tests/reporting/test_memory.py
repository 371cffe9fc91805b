"""The table of cards: small ones degrade by rule."""

from __future__ import annotations

import pytest

from arena.config import load_recipe
from arena.model.memory.estimate import GIB
from arena.reporting.memory import CARDS, HEADER, card_rows, known_config


def rows(name: str, *overrides: str) -> dict[str, list[str]]:
    recipe = load_recipe(name, overrides)
    found = card_rows(recipe, known_config(recipe.model))
    assert len(found) == len(CARDS) and all(len(row) == len(HEADER) for row in found)
    return {row[0].split(":")[0]: row[1:] for row in found}


def test_small_cards_degrade_by_rule() -> None:
    table = rows("gemma-2-9b")
    assert table["16 GB"][:3] == ["float16", "blockwise", "8,192"]
    assert table["24 GB"][:3] == ["bfloat16", "flash or flex", "16,384"]
    assert [table[card][2] for card in ("12 GB", "80 GB")] == ["4,096", "16,384"]
    recomputed = [int(table[card][5].rstrip("%")) for card in ("24 GB", "40 GB", "80 GB", "141 GB")]
    assert recomputed == sorted(recomputed, reverse=True) and recomputed[0] > 90 and recomputed[-1] == 0
    assert float(table["80 GB"][3]) < 20


def test_layers_below_the_first_with_adapters_are_frozen() -> None:
    notebook, all_layers = (rows("gemma-2-9b-notebook", f"model.lora.first_layer={first}") for first in (16, 0))
    assert all(row[4].startswith("16 frozen, ") for row in notebook.values())
    assert notebook["80 GB"][4] == "16 frozen, 26 none"
    # their input, and the state of adapters that are not there
    saved = 16 * (2 * 3584 * 8192 + (4 + 4 + 2) * 16 * (3 * 3584 + 4096 + 2 * 2048))
    assert float(all_layers["80 GB"][3]) - float(notebook["80 GB"][3]) == pytest.approx(saved / GIB, abs=0.11)
    assert int(notebook["12 GB"][5].rstrip("%")) <= 100 * 26 // 42 < int(all_layers["12 GB"][5].rstrip("%"))
    assert {row[4] for row in rows("gemma-2-9b", "model.tune=head").values()} == {"42 frozen"}


def test_gemma_2_2b_fits_a_card_of_16_gb_as_a_judge_and_for_instructions() -> None:
    """With whole micro-batches and room for more than the least, in float16 without flash-attn on a T4."""
    for task in ("preference", "instruction"):
        dtype, attention, budget, least, policies, recomputed = rows("gemma-2-2b", f"task={task}")["16 GB"]
        assert (dtype, attention, budget) == ("float16", "blockwise", "16,384")
        assert float(least) < 8 and "elementwise_and_mlp" in policies and int(recomputed.rstrip("%")) < 80
    small = "packing.budget=1024", "prompt.max_length=1024"
    judge, answers = (
        float(rows("gemma-2-2b", f"task={task}", *small)["16 GB"][3]) for task in ("preference", "instruction")
    )
    assert 0.2 < answers - judge < 0.6  # the output layer's work


def test_cards_that_are_too_small_are_marked() -> None:
    table = rows("gemma-2-2b", "model.tune=full", "model.quantization=none")
    assert table["40 GB"][2] == "does not fit" and table["80 GB"][2] == "16,384"
    assert rows("demo")["16 GB"][0] == "float32"
