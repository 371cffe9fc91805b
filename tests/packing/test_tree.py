"""Common beginnings: found from token ids alone, laid out once, every example read back whole."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from arena.data.tokens import Lists, TokenStore, tokenise
from arena.packing import tree as tree_module
from arena.packing.batch import PackedBatch, VarlenCollator, collate
from arena.packing.plan import PackPlan, _tree_within, plan_evaluation, plan_training
from arena.packing.tree import Prefixes, Tree, find_prefixes, grow_tree, prefixes_for
from arena.settings import PackingSettings
from tests.helpers import examples_of, make_tokenizer, prompt_settings, random_family, rows_of

BUDGET = 390


def common(a: np.ndarray, b: np.ndarray) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def sorted_tree(examples: list[np.ndarray], least: int) -> tuple[list[np.ndarray], Tree]:
    prefixes = find_prefixes(examples)
    order = np.argsort(prefixes.rank)
    shared = prefixes.between(prefixes.rank[order])
    ordered = [examples[at] for at in order]
    return ordered, grow_tree([len(each) for each in ordered], shared.tolist(), least)


families = st.one_of(
    st.integers(0, 10_000).map(random_family),
    st.integers(0, 10_000).map(lambda seed: random_family(seed, longest=300)),  # past the blocks of the sort
)
long_families = st.integers(0, 10_000).map(lambda seed: random_family(seed, longest=BUDGET // 3))


@settings(deadline=None)
@given(examples=families)
def test_what_any_two_examples_share_is_found(examples: list[np.ndarray]) -> None:
    prefixes = find_prefixes(examples)
    assert sorted(prefixes.rank.tolist()) == list(range(len(examples)))
    for i, a in enumerate(examples):
        for j, b in enumerate(examples):
            if prefixes.rank[i] < prefixes.rank[j]:
                assert prefixes.between(prefixes.rank[[i, j]])[1] == common(a, b)


@settings(deadline=None)
@given(examples=families, least=st.sampled_from([1, 4, 32]))
def test_every_example_is_read_back_along_its_segments(examples: list[np.ndarray], least: int) -> None:
    ordered, tree = sorted_tree(examples, least)
    for example, node in zip(ordered, tree.ends_in, strict=True):
        parts = []
        while node >= 0:
            parts.append(ordered[tree.example[node]][tree.start[node] : tree.end[node]])
            node = tree.parent[node]
        assert np.concatenate(parts[::-1]).tolist() == example.tolist()
    assert all(parent < node for node, parent in enumerate(tree.parent))
    assert all(end > start for start, end in zip(tree.start, tree.end, strict=True))


@settings(deadline=None)
@given(examples=families)
def test_with_no_least_length_each_prefix_is_there_once(examples: list[np.ndarray]) -> None:
    _, tree = sorted_tree(examples, least=1)
    assert tree.tokens == len({example[:n].tobytes() for example in examples for n in range(1, len(example) + 1)})


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 300))
def test_the_minimum_over_any_range_of_neighbours(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 10_000, count).astype(np.int32)
    ranks = np.sort(rng.permutation(count)[: int(rng.integers(1, count + 1))])
    found = Prefixes.of(np.arange(count), shared).between(ranks)
    pairs = zip(ranks[:-1].tolist(), ranks[1:].tolist(), strict=True)
    assert found.tolist() == [0, *(shared[first + 1 : last + 1].min() for first, last in pairs)]


def store_of(examples: list[np.ndarray], at_once: int) -> TokenStore:
    """A store in chunks of this many examples."""
    kind = pa.list_(pa.int32())
    parts = [pa.array(examples[at : at + at_once], kind) for at in range(0, len(examples), at_once)]
    none = np.zeros(len(examples), dtype=np.int32)
    return TokenStore(1, Lists.of(pa.chunked_array(parts, kind)), none, none, "x")


@settings(deadline=None)
@given(examples=families, few=st.integers(1, 8), at_once=st.integers(1, 5))
def test_large_groups_are_divided_to_the_same_order(examples: list[np.ndarray], few: int, at_once: int) -> None:
    """Also with tokens whose bytes sort in another order than their numbers, and zeros."""
    examples = [each * 37 % 1000 for each in examples]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_module, "FEW", few)
        counts: list[int] = []
        found, plain = find_prefixes(store_of(examples, at_once), counts.append), find_prefixes(examples)
    assert found.rank.tolist() == plain.rank.tolist() and found.shared.tolist() == plain.shared.tolist()
    assert sum(counts) == len(examples)


def test_sorting_many_examples_takes_memory_by_their_number_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undivided, the control, it holds blocks of the tokens of all of them at a time."""
    rng, peaks = np.random.default_rng(0), []
    beginning = np.arange(200, dtype=np.int32)
    examples = [np.concatenate([beginning, rng.integers(0, 9, 200).astype(np.int32)]) for _ in range(8_000)]
    store = store_of(examples, 500)
    for few in (2**9, 2**30):
        monkeypatch.setattr(tree_module, "FEW", few)
        tracemalloc.start()
        find_prefixes(store)
        peaks.append(tracemalloc.get_traced_memory()[1] / len(examples))
        tracemalloc.stop()
    assert peaks[0] < 600 and peaks[1] > 900


def test_a_short_common_beginning_does_not_pay() -> None:
    examples = [np.array([1, 2, 3, 4, tail], dtype=np.int32) for tail in (5, 6)]
    assert len(sorted_tree(examples, least=4)[1].parent) == 3
    assert len(sorted_tree(examples, least=5)[1].parent) == 2


def test_a_tree_by_hand() -> None:
    """An instruction, two prompts below it, a pair below one of them; one example ends where another goes on."""
    instruction, prompt = [1] * 5, [2] * 4
    both = instruction + prompt
    examples = [np.array(ids, dtype=np.int32) for ids in ([*both, 3, 3], [*both, 4], [*instruction, 5], both)]
    ordered, tree = sorted_tree(examples, least=3)
    assert [each.tolist() for each in ordered] == [examples[at].tolist() for at in (3, 0, 1, 2)]
    assert tree == Tree(
        example=[0, 0, 3, 1, 2], start=[0, 5, 5, 9, 9], end=[5, 9, 6, 11, 10], parent=[-1, 0, 0, 1, 1],
        ends_in=[1, 3, 4, 2],
    )  # fmt: skip
    batch = collate([{"input_ids": each} for each in ordered], tree=tree)
    assert batch.input_ids.tolist() == [[*instruction, *prompt, 5, 3, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 9, 10, 9]]
    assert batch.cu_seqlens_q.tolist() == [0, 5, 9, 10, 12, 13]
    assert batch.cu_seqlens_k.tolist() == [0, 5, 14, 20, 31, 41]
    assert batch.kv_index is not None
    assert batch.kv_index[5:14].tolist() == list(range(9))
    assert batch.kv_index[14:20].tolist() == [0, 1, 2, 3, 4, 9]
    assert batch.kv_index[20:31].tolist() == [*range(9), 10, 11]
    assert batch.kv_index[31:].tolist() == [*range(9), 12]
    assert batch.segment.tolist() == [1, 3, 4, 2]
    assert batch.seq_lens == [9, 11, 10, 6]
    assert (batch.max_seq_len, batch.max_segment_len, batch.tokens) == (11, 5, 13)


def test_deep_nesting_is_no_recursion() -> None:
    """1,500 examples, each of which goes on where the one before ended."""
    base = np.arange(48_000, dtype=np.int32)
    examples = [np.append(base[: 32 * (at + 1)], np.int32(50_000 + at)).astype(np.int32) for at in range(1_500)]
    lengths, prefixes = np.array([len(each) for each in examples]), find_prefixes(examples)
    whole = plan_evaluation(lengths, np.arange(1_500), budget=50_000, prefixes=prefixes)
    assert whole.n_micro_batches == 1 and whole.tokens.tolist() == [48_000 + 1_500]
    cut = plan_evaluation(lengths, np.arange(1_500), budget=48_001, prefixes=prefixes)
    check_plan(cut, examples, np.arange(1_500))


def test_a_plan_of_nothing() -> None:
    examples = random_family(0)
    lengths = np.array([len(each) for each in examples])
    plan = plan_evaluation(lengths, np.arange(0), budget=BUDGET, prefixes=find_prefixes(examples))
    assert (plan.n_steps, plan.n_micro_batches) == (0, 0)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_indices_of_any_integer_type(kind: type) -> None:
    lengths = np.array([5, 6, 7])
    plan = plan_evaluation(lengths, np.arange(3, dtype=kind), budget=BUDGET)
    assert sorted(plan.examples.tolist()) == [0, 1, 2]


def test_a_tree_over_the_budget_shares_every_token() -> None:
    """Two examples share 31 tokens, one too few to pay; where the planner counted on them they are shared."""
    common = np.arange(31)
    examples = [np.concatenate([common, np.full(50, tail)]).astype(np.int32) for tail in (90, 91)]
    shape = [81, 81], [0, 31]
    assert _tree_within(*shape, budget=200).tokens == 162
    assert _tree_within(*shape, budget=131).tokens == 131
    assert find_prefixes(examples).between(np.array([0, 1])).tolist() == [0, 31]


def check_plan(plan: PackPlan, examples: list[np.ndarray], wanted: np.ndarray) -> None:
    lengths = np.array([len(each) for each in examples])
    assert sorted(plan.examples.tolist()) == sorted(wanted.tolist())
    assert (plan.tokens <= plan.budget).all()
    assert plan.n_micro_batches >= plan.least_micro_batches
    for at, tokens in enumerate(plan.tokens.tolist()):
        members = plan.micro_batch(at)
        assert int(lengths[members].sum()) == plan.logical_tokens[at]
        if len(members):
            tree = plan.tree(at, lengths)
            assert tree is not None and tree.tokens == tokens <= plan.logical_tokens[at]
            batch = collate([{"input_ids": examples[index]} for index in members], tree=tree)
            for index, read in zip(members, examples_of(batch), strict=True):
                assert read.tolist() == examples[index].tolist()


@settings(deadline=None)
@given(examples=long_families, more=st.integers(0, 400), ranks=st.integers(1, 3), seed=st.integers(0, 3))
def test_plans_count_what_is_computed(examples: list[np.ndarray], more: int, ranks: int, seed: int) -> None:
    lengths, prefixes = np.array([len(each) for each in examples]), find_prefixes(examples)
    budget = int(lengths.max()) + more
    twice = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(examples)), 2))  # a step over two epochs
    training = plan_training(lengths, twice, step_size=7, budget=budget, ranks=ranks, prefixes=prefixes)
    check_plan(training, examples, twice)
    some = np.arange(0, len(examples), 2)
    check_plan(plan_evaluation(lengths, some, budget=budget, ranks=ranks, prefixes=prefixes), examples, some)


def test_sharers_stay_together_and_groups_that_are_too_large_are_cut() -> None:
    """40 examples under one prompt of 100 tokens, 40 under another; 15 fit beside the prompt in a budget of 251."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 9, 100) for _ in range(2)]
    examples = [
        np.concatenate([[1], prompt, rng.integers(10, 1000, 10)]).astype(np.int32)
        for prompt in prompts
        for _ in range(40)
    ]
    lengths, prefixes = np.array([len(each) for each in examples]), find_prefixes(examples)
    plan = plan_evaluation(lengths, rng.permutation(80), budget=251, prefixes=prefixes)
    assert plan.n_micro_batches == 6
    assert plan.unique_share < 0.2
    plain = plan_evaluation(lengths, np.arange(80), budget=251)
    assert plain.n_micro_batches == 40


def test_a_step_is_cut_evenly_by_what_is_computed() -> None:
    rng = np.random.default_rng(0)
    instruction = np.arange(200)
    examples = [
        np.concatenate([instruction, rng.integers(300, 2000, n)]).astype(np.int32)
        for n in rng.lognormal(6, 0.8, 800).astype(int).clip(20, 3000)
    ]
    lengths, prefixes = np.array([len(each) for each in examples]), find_prefixes(examples)
    plan = plan_training(lengths, np.arange(800), step_size=80, budget=16384, prefixes=prefixes)
    plain = plan_training(lengths, np.arange(800), step_size=80, budget=16384)
    assert plan.evenness.mean() > 0.97
    assert plan.n_micro_batches <= 1.01 * plan.least_micro_batches
    assert plan.tokens.sum() < 0.85 * plain.tokens.sum()
    check_plan(plan, examples, np.arange(800))


def batches(examples: list[np.ndarray], share: bool) -> list[PackedBatch]:
    return VarlenCollator(budget=BUDGET, share=share)([{"input_ids": each} for each in examples])


def test_the_collator_shares_only_on_request() -> None:
    examples = random_family(3, longest=BUDGET // 3)
    plain, shared = batches(examples, False), batches(examples, True)
    assert all(batch.kv_index is None and batch.cu_seqlens_k is batch.cu_seqlens for batch in plain)
    assert sum(batch.tokens for batch in plain) == sum(map(len, examples))
    assert sum(batch.tokens for batch in shared) < sum(map(len, examples))
    assert sorted(int(at) for batch in shared for at in batch.index) == list(range(len(examples)))


def test_prefixes_are_cached_by_the_stores_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict(
        {"prompt": [["which?"]] * 4, "response_a": [[f"answer {at}"] for at in range(4)], "response_b": [["b"]] * 4}
    )
    tokenizer = make_tokenizer(tmp_path)
    store = tokenise(rows_of(rows), tokenizer, prompt_settings(), tmp_path, orders=2)
    found = prefixes_for(store, PackingSettings(), tmp_path)
    assert isinstance(found, Prefixes)
    monkeypatch.setattr("arena.packing.tree.find_prefixes", None)  # the second time they are read
    again = prefixes_for(store, PackingSettings(), tmp_path)
    assert again is not None and again.rank.tolist() == found.rank.tolist()
    assert np.array_equal(again.shared, found.shared)
    assert prefixes_for(store, PackingSettings(share=False), tmp_path) is None
    (kept,) = tmp_path.glob("prefixes-*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"prefixes-.* is damaged .*delete it"):
        prefixes_for(store, PackingSettings(), tmp_path)
