"""The blockwise backend against the exact one: values, gradients, dtypes, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from arena.model.attention import blocks
from arena.model.attention.blocks import Form
from arena.model.attention.blockwise import blockwise
from arena.model.attention.reference import reference

DIM = 16
WINDOW = 24
BEFORE = [0, 5, 60]  # keys before a segment's own: none, fewer than the window, more
LENGTHS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW, 131]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 rows, so that segments of a hundred tokens have several."""
    monkeypatch.setattr(blocks, "ROWS", 32)
    monkeypatch.setattr(blocks, "ROWS_BFLOAT16", 32)
    monkeypatch.setattr(blocks, "FEW_SCORES", 0)


def test_segments_of_the_tests_have_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for form in (Form(1.0, None, None), Form(1.0, 2.0, WINDOW)):
        assert len(list(form.blocks(131, 131, 2, 2, blocks.ROWS))) > 4
    monkeypatch.undo()  # with the real sizes a short segment is one block
    assert len(list(Form(1.0, None, None).blocks(131, 131, 2, 2, blocks.ROWS))) == 1


def test_a_segment_without_a_query_is_an_error() -> None:
    with pytest.raises(ValueError, match="no query"):
        attend(blockwise, random_qkv(3, 5), [3, 0], [3, 2])


def random_qkv(n_q: int, n_k: int, heads: int = 4, kv_heads: int = 2, dim: int = DIM, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (n_q, heads, dim), (n_k, kv_heads, dim), (n_k, kv_heads, dim)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attend(backend: Callable[..., Tensor], qkv: list[Tensor], n_q: list[int], n_k: list[int], **options: Any) -> Tensor:
    ends = (torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in (n_q, n_k))
    return backend(*qkv, *ends, max(n_q), max(n_k), **{"scale": 0.5, "softcap": None, "window": None, **options})


def with_gradients(
    backend: Callable[..., Tensor], qkv: list[Tensor], n_q: list[int], n_k: list[int], **options: Any
) -> list[Tensor]:
    """The output and the gradients of q, k and v for the same random gradient of the output."""
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    out = attend(backend, leaves, n_q, n_k, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def distance(ours: Tensor, exact: Tensor) -> float:
    """The largest difference relative to the largest value, or to 1: one key alone has no slope in q and k."""
    return float((ours.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1.0))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("softcap", [None, 1.5, 50.0])
@pytest.mark.parametrize("window", [None, 1, WINDOW, 1000])
@pytest.mark.parametrize("before", BEFORE)
def test_values_and_gradients_are_those_of_the_reference(
    kv_heads: int, softcap: float | None, window: int | None, before: int
) -> None:
    n_k = [n + before for n in LENGTHS]
    qkv = random_qkv(sum(LENGTHS), sum(n_k), kv_heads=kv_heads)
    ours, exact = (
        with_gradients(backend, qkv, LENGTHS, n_k, softcap=softcap, window=window) for backend in (blockwise, reference)
    )
    assert max(map(distance, ours, exact)) < 1e-5


@pytest.mark.parametrize("length", [31, 32, 33, 64, 65])
@pytest.mark.parametrize("rows", [1, 3, 32, 64, 512])
def test_block_sizes_do_not_matter(length: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ROWS", rows)
    qkv = random_qkv(length, length + 7)
    ours, exact = (
        with_gradients(backend, qkv, [length], [length + 7], softcap=5.0, window=20)
        for backend in (blockwise, reference)
    )
    assert max(map(distance, ours, exact)) < 1e-5


SAME = [(7, 9), (7, 9), (7, 12), (40, 45), (40, 45), (1, 8), (1, 8), (1, 8), (1, 3)]  # queries and keys of segments


def test_neighbours_of_one_shape_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grouped() == [(2, 7, 9), (1, 7, 12), (2, 40, 45), (3, 1, 8), (1, 1, 3)]
    monkeypatch.setattr(blocks, "TOGETHER_SCORES", 4 * 2 * 8)
    apart = [(1, 7, 9), (1, 7, 9), (1, 7, 12), (1, 40, 45), (1, 40, 45), (2, 1, 8), (1, 1, 8), (1, 1, 3)]
    assert grouped() == apart
    monkeypatch.undo()
    monkeypatch.setattr(blocks, "TOGETHER_KEYS", 2 * DIM * 2 * 8)  # many keys are copied for a single query too
    assert grouped() == apart


def grouped() -> list[tuple[int, int, int]]:
    """How many segments are in each group, and their queries and keys; they follow each other."""
    groups = blocks.in_groups(SAME, heads=4, key_size=2 * DIM)
    for places in zip(*((group.queries, group.keys) for group in groups), strict=True):
        assert [place.start for place in places] == [0, *(place.stop for place in places[:-1])]
    return [((group.queries.stop - group.queries.start) // group.n_q, group.n_q, group.n_k) for group in groups]


@pytest.mark.parametrize("together", [1, 1 << 20])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segments_of_one_shape(
    together: int, window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "TOGETHER_SCORES", together)
    n_q, n_k = ([lengths[at] for lengths in SAME] for at in (0, 1))
    qkv = [tensor.to(dtype) for tensor in random_qkv(sum(n_q), sum(n_k))]
    ours, exact = (with_gradients(b, qkv, n_q, n_k, softcap=5.0, window=window) for b in (blockwise, reference))
    assert max(map(distance, ours, exact)) < 1e-5
    other = with_gradients(reference, qkv, [*n_q[1:], n_q[0]], n_k[1:] + n_k[:1], softcap=5.0, window=window)
    assert distance(other[0], exact[0]) > 1e-3  # a wrong boundary would be seen


def test_many_single_queries() -> None:
    """As in the last layer, where only the last token of each example asks."""
    n_k = [500, 33, 1, 700]
    qkv = random_qkv(4, sum(n_k))
    ours, exact = (with_gradients(b, qkv, [1] * 4, n_k, softcap=5.0, window=600) for b in (blockwise, reference))
    assert max(map(distance, ours, exact)) < 1e-5


@pytest.mark.parametrize("changes", [{"window": WINDOW + 1}, {"window": WINDOW - 1}, {"softcap": None}])
def test_a_wrong_window_or_softcap_is_seen(changes: dict[str, Any]) -> None:
    qkv, right = random_qkv(100, 100), {"softcap": 1.5, "window": WINDOW}
    wrong = with_gradients(blockwise, qkv, [100], [100], **{**right, **changes})
    exact = with_gradients(reference, qkv, [100], [100], **right)
    assert min(map(distance, wrong, exact)) > 1e-3


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
def test_the_gradient_is_that_of_finite_differences(softcap: float | None, window: int | None) -> None:
    qkv = [tensor.double().requires_grad_() for tensor in random_qkv(20, 25, dim=3)]
    assert torch.autograd.gradcheck(
        lambda *leaves: attend(blockwise, list(leaves), [1, 19], [3, 22], softcap=softcap, window=window), qkv
    )


def naive(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, window: int) -> Tensor:
    """One segment without a prefix, every step in the dtype of its inputs."""
    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(len(q))
    hidden = (at[None] > at[:, None]) | (at[None] <= at[:, None] - window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_is_no_worse_than_twice_a_naive_one(softcap: float | None, seed: int) -> None:
    half = [tensor.bfloat16() for tensor in random_qkv(150, 150, seed=seed)]

    def naively(*arguments: Any, softcap: float | None, window: int, **_: Any) -> Tensor:
        return naive(*arguments[:3], softcap, window)

    options: dict[str, Any] = {"softcap": softcap, "window": 100}
    exact = with_gradients(naively, [tensor.double() for tensor in half], [150], [150], **options)
    plain = with_gradients(naively, half, [150], [150], **options)
    ours = with_gradients(blockwise, half, [150], [150], **options)
    for name, mine, naive_one, truth in zip(("out", "q", "k", "v"), ours, plain, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert distance(mine, truth) <= 2 * distance(naive_one, truth), name


def test_what_is_saved_grows_with_the_tokens() -> None:
    """q, k, v, the output and one number for each query and head, and nothing of the size of the scores."""
    sizes = []
    for length in (2048, 4096):
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        leaves = [tensor.requires_grad_() for tensor in random_qkv(length, length, heads=2, kv_heads=1)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attend(blockwise, leaves, [length], [length], softcap=5.0)
        sizes.append(sum(saved))
    assert sizes[1] == 4096 * (2 * 2 * DIM + 2 * DIM + 2)
    assert sizes[1] == 2 * sizes[0]


@pytest.mark.parametrize("rows", [32, 512])
def test_the_scores_of_a_block_are_bounded(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ROWS", rows)
    for n_k in (4_096, 16_384, 65_536):
        cut = list(Form(1.0, None, None).blocks(n_k, n_k, 2, 2, rows))
        assert [block.rows.start for block in cut[1:]] == [block.rows.stop for block in cut[:-1]]
        largest = max(2 * (b.rows.stop - b.rows.start) * (b.keys.stop - b.keys.start) for b in cut)
        assert largest <= max(blocks.BLOCK_SCORES, 2 * blocks.MIN_ROWS * n_k)


def test_only_the_wanted_gradients() -> None:
    q, k, v = random_qkv(40, 45)
    whole = with_gradients(blockwise, [q, k, v], [40], [45], softcap=5.0)
    for i in range(3):
        leaves = [tensor.clone().requires_grad_(i == j) for j, tensor in enumerate((q, k, v))]
        out = attend(blockwise, leaves, [40], [45], softcap=5.0)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(torch.autograd.grad(out, leaves[i], weights)[0], whole[1 + i])


def test_autocast_inference_mode_and_checkpoints_change_nothing() -> None:
    qkv = random_qkv(40, 40)
    out, *grads = with_gradients(blockwise, qkv, [40], [40])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, plain in zip(with_gradients(blockwise, qkv, [40], [40]), (out, *grads), strict=True):
            torch.testing.assert_close(ours, plain)
    with torch.inference_mode():
        torch.testing.assert_close(attend(blockwise, qkv, [40], [40]), out)

    def checkpointed(*arguments: Any, **options: Any) -> Tensor:
        result: Tensor = checkpoint(blockwise, *arguments, use_reentrant=False, **options)
        return result

    for ours, plain in zip(with_gradients(checkpointed, qkv, [40], [40]), (out, *grads), strict=True):
        torch.testing.assert_close(ours, plain)


def test_mixed_dtypes_and_views_are_taken() -> None:
    """The model's keys and queries come as transposed views; only some may be bfloat16."""
    q, k, v = random_qkv(40, 40)
    views = [states.transpose(0, 1).contiguous().transpose(0, 1) for states in (q, k, v)]
    for ours, exact in zip(*(with_gradients(blockwise, x, [40], [40]) for x in (views, [q, k, v])), strict=True):
        torch.testing.assert_close(ours, exact)
    mixed = with_gradients(blockwise, [q, k.bfloat16(), v], [40], [40])
    assert [tensor.dtype for tensor in mixed] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]


def test_fewer_keys_than_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="each query needs the key at its own position"):
        attend(blockwise, random_qkv(6, 6), [2, 4], [4, 2])
