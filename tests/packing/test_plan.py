"""Plans: every example once, never over the budget, few and even micro-batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arena.inference.evaluate import share
from arena.packing.plan import (
    PackPlan,
    epoch_order,
    least_bins,
    plan_evaluation,
    plan_training,
)
from benchmarks.workload import competition_lengths

BUDGET = 100
some_lengths = st.lists(st.integers(1, BUDGET), min_size=1, max_size=60).map(np.array)


def everything(plan: PackPlan) -> list[int]:
    """Example indices over all steps, ranks and micro-batches."""
    parts = [plan.step(step, rank) for step in range(plan.n_steps) for rank in range(plan.ranks)]
    return [int(index) for members in itertools.chain.from_iterable(parts) for index in members]


@settings(deadline=None)
@given(lengths=some_lengths, step_size=st.integers(1, 20), ranks=st.integers(1, 4), seed=st.integers(0, 5))
def test_training_has_each_example_once_in_its_step(lengths: np.ndarray, step_size: int, ranks: int, seed: int) -> None:
    order = epoch_order(len(lengths), seed, 0)
    plan = plan_training(lengths, order, step_size=step_size, budget=BUDGET, ranks=ranks)
    assert sorted(everything(plan)) == list(range(len(lengths)))
    assert (plan.tokens <= BUDGET).all()
    assert plan.n_steps == -(-len(lengths) // step_size)
    for step in range(plan.n_steps):
        wanted = order[step * step_size : (step + 1) * step_size]
        shares = [plan.step(step, rank) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1  # every rank has as many micro-batches
        members = [int(index) for share in shares for part in share for index in part]
        assert sorted(members) == sorted(wanted.tolist())
        assert plan.step_size(step) == len(wanted)


@settings(deadline=None)
@given(lengths=some_lengths, ranks=st.integers(1, 4))
def test_evaluation_has_each_example_once(lengths: np.ndarray, ranks: int) -> None:
    indices = np.arange(len(lengths))[::-1].copy()
    plan = plan_evaluation(lengths, indices, budget=BUDGET, ranks=ranks)
    assert sorted(everything(plan)) == list(range(len(lengths)))
    assert (plan.tokens <= BUDGET).all()
    assert plan.n_micro_batches % ranks == 0
    sums = [int(lengths[plan.micro_batch(at)].sum()) for at in range(plan.n_micro_batches)]
    assert sums == plan.tokens.tolist()


def test_best_possible_packings_are_found() -> None:
    lengths = np.array([60, 40, 70, 30, 50, 50, 100])
    for plan in (
        plan_evaluation(lengths, np.arange(7), budget=BUDGET),
        plan_training(lengths, np.arange(7), step_size=7, budget=BUDGET),
    ):
        assert plan.n_micro_batches == 4
        assert plan.fill_rate == 1.0


def test_even_where_there_is_room() -> None:
    """Two micro-batches are needed; best-fit would fill one and leave the other nearly empty."""
    plan = plan_training(np.full(12, 10), np.arange(12), step_size=12, budget=BUDGET)
    assert plan.tokens.tolist() == [60, 60]


def test_over_budget_examples_are_named() -> None:
    lengths = np.array([5, 101, 7, 300])
    for plan in (
        lambda: plan_training(lengths, np.arange(4), step_size=2, budget=BUDGET),
        lambda: plan_evaluation(lengths, np.arange(4), budget=BUDGET),
    ):
        with pytest.raises(ValueError, match=r"2 of 4 examples .* example 1 has 101 tokens, example 3 has 300 tokens"):
            plan()
    assert plan_evaluation(lengths, np.array([0, 2]), budget=BUDGET).n_micro_batches == 1


def test_empty_evaluation() -> None:
    plan = plan_evaluation(np.array([5]), np.zeros(0, dtype=np.int64), budget=BUDGET)
    assert (plan.n_steps, plan.n_micro_batches, plan.fill_rate) == (0, 0, 0.0)


def test_same_seed_same_plan_and_fingerprint() -> None:
    lengths = np.random.default_rng(0).integers(1, BUDGET, 200)

    def made(seed: int) -> PackPlan:
        return plan_training(lengths, epoch_order(200, seed, 0), step_size=20, budget=BUDGET)

    assert made(1).fingerprint == made(1).fingerprint
    assert made(1).fingerprint != made(2).fingerprint
    assert sorted(epoch_order(50, 1, 0).tolist()) == list(range(50))
    assert epoch_order(50, 1, 0).tolist() != epoch_order(50, 1, 1).tolist()


def test_ranks_share_cost_evenly() -> None:
    lengths = np.random.default_rng(0).lognormal(6.8, 0.7, 4000).astype(int).clip(20, 4096)
    for plan in (
        plan_training(lengths, epoch_order(4000, 0, 0), step_size=320, budget=16384, ranks=4),
        plan_evaluation(lengths, np.arange(4000), budget=16384, ranks=4),
    ):
        totals = [
            sum(int(lengths[members].sum()) for step in range(plan.n_steps) for members in plan.step(step, rank))
            for rank in range(4)
        ]
        assert max(totals) / min(totals) < 1.02


def test_no_rank_of_eight_is_much_busier_than_the_mean() -> None:
    """In tokens and in cost, with lengths like the competition's; a control with ranks by length is far from it."""
    lengths = competition_lengths(11_496, seed=0)  # a fold's
    order = epoch_order(len(lengths), 0, 0)
    training = plan_training(lengths, order, step_size=320, budget=16_384, ranks=8)
    whole = plan_evaluation(lengths, order, budget=16_384)
    for plan in (training, whole):
        shares = [share(plan, rank, 8) for rank in range(8)]
        assert sorted(np.concatenate([each.examples for each in shares]).tolist()) == list(range(len(lengths)))
        for loads in ([each.tokens.sum() for each in shares], [each.costs(lengths).sum() for each in shares]):
            assert max(loads) <= 1.01 * np.mean(loads)
    by_length = [part.sum() for part in np.array_split(np.sort(lengths), 8)]
    assert max(by_length) > 1.5 * np.mean(by_length)


def test_steps_need_few_micro_batches_and_fill_them_evenly() -> None:
    """Competition-like lengths (log-normal, median 900, mean 1,250), steps of 80, the figures of a good plan."""
    lengths = np.random.default_rng(1).lognormal(6.8, 0.8, 20_000).astype(int).clip(30, 4096)
    order = epoch_order(len(lengths), 0, 0)
    plan = plan_training(lengths, order, step_size=80, budget=16384)
    steps = [lengths[order[at : at + 80]] for at in range(0, len(order), 80)]
    assert plan.n_micro_batches <= 1.005 * sum(least_bins(step, 16384) for step in steps)
    evenness = [tokens.min() / tokens.max() for tokens in np.split(plan.tokens, plan.step_ends[:-1])]
    assert np.mean(evenness) >= 0.97
    whole = plan_evaluation(lengths, np.arange(len(lengths)), budget=16384)
    assert whole.n_micro_batches <= 1.005 * least_bins(lengths, 16384)
