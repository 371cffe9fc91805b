"""Packed judging: results in the order of the rows, both orders averaged."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from arena.data.tokens import TokenStore, tokenise
from arena.inference import evaluate as inference
from arena.inference.evaluate import Evaluation
from arena.inference.logits import LogitsCache
from arena.metrics import softmax
from arena.model.backbone import load_tokenizer
from arena.packing.batch import collate
from arena.packing.tree import find_prefixes
from arena.stopping import Stop, Stopped
from tests.helpers import PREFERENCE, classifier, exact, prompt_settings, rows_of


@pytest.fixture
def store(gemma2: Path, tmp_path: Path) -> TokenStore:
    rng = np.random.default_rng(0)
    a, b = ([["good " * int(n)] for n in rng.integers(1, 30, 17)] for _ in range(2))
    rows = Dataset.from_dict({"prompt": [["which is better?"]] * 17, "response_a": a, "response_b": b})
    return tokenise(rows_of(rows), load_tokenizer(str(gemma2)), prompt_settings(), tmp_path, orders=2)


def predict(
    model: torch.nn.Module, store: TokenStore, rows: np.ndarray, *, budget: int, orders: list[int], dtype: str,
    prefixes: Any = None, ids: Any = None, **options: Any,
) -> np.ndarray:  # fmt: skip
    evaluation = Evaluation(PREFERENCE, store, rows, orders=orders, budget=budget, prefixes=prefixes, ids=ids)
    return evaluation.probabilities(model, dtype=dtype, **options)


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
    store = tokenise(rows_of(rows), load_tokenizer(str(gemma2)), prompt_settings(), tmp_path, orders=2)
    averaged = predict(model, store, np.arange(2), budget=512, orders=[0, 1], dtype="float32")
    np.testing.assert_allclose(averaged[0], averaged[1][[1, 0, 2]], atol=1e-6)
    straight = predict(model, store, np.arange(2), budget=512, orders=[0], dtype="float32")
    assert np.abs(straight[0] - straight[1][[1, 0, 2]]).max() > 1e-3  # without it there is a bias


def test_a_logit_that_is_not_finite_is_a_failure(gemma2: Path, store: TokenStore) -> None:
    model = classifier(exact(gemma2)).eval()
    with torch.no_grad():
        model.model.get_base_model().score.modules_to_save["default"].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite, first row 2"):
        predict(model, store, np.array([4, 2]), budget=512, orders=[0], dtype="float32")


def test_training_mode_is_restored(gemma2: Path, store: TokenStore) -> None:
    model = classifier(exact(gemma2)).train()
    predict(model, store, np.array([0]), budget=512, orders=[0], dtype="float32")
    assert model.training


def test_a_row_listed_twice_is_computed_once(gemma2: Path, store: TokenStore) -> None:
    model, seen = classifier(exact(gemma2)).eval(), []
    model.register_forward_hook(lambda module, args, output: seen.extend(args[0].index.tolist()))
    settings: dict[str, Any] = {"budget": 256, "orders": [0, 1], "dtype": "float32"}
    found = predict(model, store, np.array([5, 3, 5, 16, 3]), **settings)
    assert len(seen) == len(set(seen)) == 6
    np.testing.assert_array_equal(found[[0, 1, 3]], predict(model, store, np.array([5, 3, 16]), **settings))
    np.testing.assert_array_equal(found[[2, 4]], found[[0, 1]])
    assert predict(model, store, np.array([], dtype=int), **settings).shape == (0, 3)


def test_logits_that_are_missing_are_no_numbers(gemma2: Path, store: TokenStore) -> None:
    model = classifier(exact(gemma2)).eval()
    model.register_forward_hook(lambda module, args, output: output[:-1])
    with pytest.raises(AssertionError, match="every example has one number for each column"):
        predict(model, store, np.arange(5), budget=256, orders=[0], dtype="float32")


class CutError(Exception):
    """What ends a judging in these tests."""


class Bench:
    """A judge whose micro-batches are counted, and which fails when so many have been asked for."""

    def __init__(self, base: Path, store: TokenStore, folder: Path) -> None:
        self.model, self.store, self.folder = classifier(exact(base)).eval(), store, folder
        self.asked: list[list[int]] = []
        self.limit = 10**9
        self.settings: dict[str, Any] = {"budget": 256, "orders": [0, 1], "dtype": "float32"}
        self.model.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if len(self.asked) == self.limit:
            raise CutError
        self.asked.append(sorted(args[0].index.tolist()))

    def __call__(self, limit: int = 10**9, rows: np.ndarray | None = None, **changes: Any) -> np.ndarray:
        self.asked, self.limit = [], limit
        cache = changes.pop("logits_cache", LogitsCache(self.folder, {"judge": "a"}, seconds=0))
        chosen = np.arange(17) if rows is None else rows
        return predict(self.model, self.store, chosen, **{**self.settings, "logits_cache": cache, **changes})


@pytest.fixture
def judging(gemma2: Path, store: TokenStore, tmp_path: Path) -> Bench:
    return Bench(gemma2, store, tmp_path / "parts")


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_interrupted_anywhere_it_resumes_to_the_same_bits(judging: Bench, seconds: float) -> None:
    """Cut at every micro-batch, whether a shard is written for each or only at the end: nothing is computed twice."""
    rows = np.arange(8)
    whole = judging(logits_cache=None, rows=rows)
    every = judging.asked
    assert len(every) > 6
    for cut in range(len(every)):
        shutil.rmtree(judging.folder, ignore_errors=True)
        cache = LogitsCache(judging.folder, {"judge": "a"}, seconds=seconds)
        with pytest.raises(CutError):
            judging(limit=cut, logits_cache=cache, rows=rows)
        assert judging.asked == every[:cut]
        np.testing.assert_array_equal(judging(logits_cache=cache, rows=rows), whole)
        assert judging.asked == every[cut:]
    np.testing.assert_array_equal(judging(rows=rows), whole)
    assert judging.asked == []  # all of it is kept


def test_interrupted_repeatedly_it_still_finishes(judging: Bench) -> None:
    whole, every = judging(logits_cache=None), list(judging.asked)
    for index in range(len(every)):
        with pytest.raises(CutError):
            judging(limit=1) if index < len(every) - 1 else judging(limit=0)
        assert judging.asked == ([every[index]] if index < len(every) - 1 else [])
    np.testing.assert_array_equal(judging(), whole)
    assert judging.asked == every[-1:]


def test_only_a_missing_part_is_recomputed(judging: Bench) -> None:
    whole = judging()
    every = judging.asked
    for at, shard in enumerate(sorted(next(judging.folder.glob("[!.]*")).iterdir())):
        shard.unlink()
        np.testing.assert_array_equal(judging(), whole)
        assert judging.asked == [every[at]]


def test_logits_of_other_work_are_not_used(judging: Bench, gemma2: Path) -> None:
    judging()
    count = len(judging.asked)
    changes: list[tuple[str, Callable[[], Any]]] = [
        ("judge", lambda: judging(logits_cache=LogitsCache(judging.folder, {"judge": "b"}, seconds=0))),
        ("rows", lambda: judging(rows=np.arange(1, 17))),
        ("budget", lambda: judging(budget=300)),
        ("orders", lambda: judging(orders=[0])),
        ("dtype", lambda: judging(dtype="bfloat16")),
        ("sharing", lambda: judging(prefixes=find_prefixes(judging.store))),
    ]
    for name, ask in changes:
        ask()
        assert len(judging.asked) > count // 3, name  # all that it needs
        ask()
        assert judging.asked == [], name  # control: asked again, it is
    whole = judging()
    assert judging.asked == []
    np.testing.assert_array_equal(judging(rows=np.arange(17)[::-1]), whole[::-1])  # the same rows in another order
    assert judging.asked == []


def test_rows_without_input_get_the_prior_and_are_not_computed(gemma2: Path, store: TokenStore) -> None:
    model, prior, seen = classifier(exact(gemma2)).eval(), np.array([0.5, 0.3, 0.2]), []
    model.register_forward_hook(lambda module, args, output: seen.extend(args[0].index.tolist()))
    rows, has_input = np.array([5, 4, 2]), np.arange(17) != 4
    options: dict[str, Any] = {"orders": [0], "budget": 512}
    known = Evaluation(PREFERENCE, store, rows, **options, has_input=has_input)
    found = known.probabilities(model, dtype="float32", prior=prior)
    assert sorted(seen) == [4, 10] and found[1].tolist() == prior.tolist()
    plain = predict(model, store, rows, budget=512, orders=[0], dtype="float32")
    np.testing.assert_allclose(found[[0, 2]], plain[[0, 2]], atol=1e-6)
    nothing = Evaluation(PREFERENCE, store, np.array([4]), **options, has_input=has_input)
    assert nothing.probabilities(model, dtype="float32", prior=prior).tolist() == [prior.tolist()]
    with pytest.raises(AssertionError, match="need a prior"):
        known.probabilities(model, dtype="float32")


def test_logits_that_are_not_finite_are_not_cached(judging: Bench) -> None:
    """The row is named by its id; its micro-batch is recomputed, and no other."""
    whole, every = judging(logits_cache=None), judging.asked
    victim = every[4][0]

    def spoil(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        output[args[0].index == victim, 1] = float("inf")
        return output

    ids = [f"id-{row}" for row in range(17)]
    for seconds in (0.0, 1e9):
        shutil.rmtree(judging.folder, ignore_errors=True)
        cache = LogitsCache(judging.folder, {"judge": "a"}, seconds=seconds)
        handle = judging.model.register_forward_hook(spoil)
        with pytest.raises(FloatingPointError, match=f"not finite, first row {victim // 2}, id 'id-{victim // 2}'"):
            judging(ids=ids, logits_cache=cache)
        reached = len(judging.asked)
        handle.remove()
        np.testing.assert_array_equal(judging(ids=ids, logits_cache=cache), whole)
        assert judging.asked == [every[4], *every[reached:]]


def test_a_stop_finishes_the_micro_batch_and_saves_it(judging: Bench) -> None:
    whole, every = judging(logits_cache=None), judging.asked
    stop = Stop()

    def ask(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if len(judging.asked) == 3:
            stop.signal = signal.SIGTERM

    handle = judging.model.register_forward_hook(ask)
    cache = LogitsCache(
        judging.folder, {"judge": "a"}
    )  # with the seconds that a user gets: only the stop writes a shard
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        judging(logits_cache=cache, stop=stop)
    assert stopped.value.status == 143
    assert judging.asked == every[:3]
    handle.remove()
    np.testing.assert_array_equal(judging(logits_cache=cache, stop=Stop()), whole)
    assert judging.asked == every[3:]


def test_a_part_is_written_every_few_seconds(judging: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(inference.time, "monotonic", lambda: clock[0])
    judging.model.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 9.0))
    judging(logits_cache=LogitsCache(judging.folder, {"judge": "a"}))
    names = sorted(path.name for path in next(judging.folder.glob("[!.]*")).iterdir())
    assert [(int(name[:8]), int(name[9:17])) for name in names][:2] == [(0, 3), (3, 6)]  # 27 s of work are the most
    assert len(names) == -(-len(judging.asked) // 3)
