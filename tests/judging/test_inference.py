"""Packed judging: results in the order of the rows, both orders averaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from arena.data.tokens import TokenStore, tokenise
from arena.judging.inference import predict, predict_or_prior
from arena.metrics import softmax
from arena.model.backbone import load_tokenizer
from arena.packing.batch import collate
from arena.packing.tree import find_prefixes
from tests.helpers import classifier, exact, prompt_settings, tiny_recipe


@pytest.fixture
def store(gemma2: Path, tmp_path: Path) -> TokenStore:
    rng = np.random.default_rng(0)
    a, b = ([["good " * int(n)] for n in rng.integers(1, 30, 17)] for _ in range(2))
    rows = Dataset.from_dict({"prompt": [["which is better?"]] * 17, "response_a": a, "response_b": b})
    return tokenise(rows, "x", load_tokenizer(str(gemma2)), prompt_settings(), tmp_path, both_orders=True)


def alone(model: torch.nn.Module, store: TokenStore, example: int) -> np.ndarray:
    with torch.no_grad():
        return softmax(model(collate([{"input_ids": store[example]}])).numpy())[0]


@pytest.mark.parametrize("budget", [256, 2048])
@pytest.mark.parametrize("swap", [False, True])
def test_each_row_as_if_it_were_alone(gemma2: Path, store: TokenStore, budget: int, swap: bool) -> None:
    model = classifier(exact(gemma2)).eval()
    rows = np.array([5, 0, 16, 3, 11])
    found = predict(model, store, rows, budget=budget, orders=[0, 1] if swap else [0], dtype="float32")
    for row, probabilities in zip(rows, found, strict=True):
        expected = alone(model, store, 2 * row)
        if swap:
            expected = (expected + alone(model, store, 2 * row + 1)[[1, 0, 2]]) / 2
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("swap", [False, True])
def test_what_is_known_in_straight_order_is_not_judged_again(
    gemma2: Path, store: TokenStore, swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier(exact(gemma2)).eval()
    rows, judgeable, prior = np.arange(17), np.arange(17) != 4, np.full(3, 1 / 3)
    recipe = tiny_recipe(tmp_path, gemma2, f"judge.swap={str(swap).lower()}")
    prefixes = find_prefixes(store)
    from_nothing = predict_or_prior(model, store, rows, judgeable, prior, recipe, prefixes)
    straight = predict(model, store, rows[judgeable], budget=512, orders=[0], dtype="float32")
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, output: seen.extend(args[0].index.tolist()))
    found = predict_or_prior(model, store, rows, judgeable, prior, recipe, prefixes, straight)
    np.testing.assert_allclose(found, from_nothing, atol=1e-6)
    assert sorted(seen) == ([2 * row + 1 for row in rows[judgeable]] if swap else [])


@pytest.mark.parametrize("orders", [[0], [0, 1], [1]])
def test_sharing_changes_no_probability(gemma2: Path, store: TokenStore, orders: list[int]) -> None:
    model, rows = classifier(exact(gemma2)).eval(), np.array([5, 0, 16, 3, 11])
    tokens: list[int] = []
    model.register_forward_hook(lambda module, args, output: tokens.append(args[0].tokens))
    settings = {"budget": 2048, "orders": orders, "dtype": "float32"}
    plain = predict(model, store, rows, **settings)  # type: ignore[arg-type]
    count = sum(tokens)
    shared = predict(model, store, rows, **settings, prefixes=find_prefixes(store))  # type: ignore[arg-type]
    np.testing.assert_allclose(shared, plain, atol=1e-6)
    assert sum(tokens) - count < 0.8 * count


def test_swap_average_has_no_position_bias(gemma2: Path, tmp_path: Path) -> None:
    model = classifier(exact(gemma2)).eval()
    a, b = [["good"], ["bad answer"]], [["bad answer"], ["good"]]
    rows = Dataset.from_dict({"prompt": [["which?"]] * 2, "response_a": a, "response_b": b})
    store = tokenise(rows, "x", load_tokenizer(str(gemma2)), prompt_settings(), tmp_path, both_orders=True)
    averaged = predict(model, store, np.arange(2), budget=512, orders=[0, 1], dtype="float32")
    np.testing.assert_allclose(averaged[0], averaged[1][[1, 0, 2]], atol=1e-6)
    straight = predict(model, store, np.arange(2), budget=512, orders=[0], dtype="float32")
    assert np.abs(straight[0] - straight[1][[1, 0, 2]]).max() > 1e-3  # without it there is a bias


def test_a_logit_that_is_not_finite_is_a_failure(gemma2: Path, store: TokenStore) -> None:
    model = classifier(exact(gemma2)).eval()
    with torch.no_grad():
        model.model.get_base_model().score.modules_to_save["default"].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite, first row 4"):
        predict(model, store, np.array([4, 2]), budget=512, orders=[0], dtype="float32")


def test_training_mode_is_given_back(gemma2: Path, store: TokenStore) -> None:
    model = classifier(exact(gemma2)).train()
    predict(model, store, np.array([0]), budget=512, orders=[0], dtype="float32")
    assert model.training
