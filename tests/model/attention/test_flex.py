"""The flex backend against the exact one: compiled forward, gradients on FlexAttention's plain formulas, the masks.

FlexAttention's kernels have no backward on a CPU, and compiling takes seconds. So one kernel is compiled for many
batches; all else runs FlexAttention's own plain formulas for the forward and the backward (`plain`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from arena.model.attention import flex as module
from arena.model.attention.backends import BACKENDS
from arena.model.attention.flex import BLOCK, block_mask, bucket, flex, mask_mod, score_mod, visible
from arena.model.attention.reference import reference
from arena.model.attention.tiles import kernel_options
from arena.model.attention.trial import cannot_compile
from arena.model.attention.varlen import used_backends, varlen_attention
from arena.model.card import Card
from arena.model.classifier import loss_sum
from arena.training.optimizer import trainable
from tests.helpers import classifier, pack
from tests.helpers import exact as exact_settings
from tests.model.attention.test_blockwise import attend, distance, random_qkv, with_gradients
from tests.model.test_classifier import shared_batch, swap_pairs

WINDOW = 24
LENGTHS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW, 131]
OPTIONS: dict[str, Any] = {"softcap": 1.5, "window": WINDOW}


def use(monkeypatch: pytest.MonkeyPatch, backend: str) -> CompileCounterWithBackend:
    """Makes `flex` compile with another backend of torch's; it counts what it compiles."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    with monkeypatch.context() as here:
        here.setattr(torch, "compile", partial(torch.compile, backend=counter))
        compiled = module._compiled.__wrapped__()
    monkeypatch.setattr(module, "_compiled", lambda: compiled)
    return counter


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """FlexAttention's plain formulas, forward and backward, on a CPU."""
    monkeypatch.setattr(module, "_refuse_gradients_on_cpu", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    yield use(monkeypatch, "aot_eager")
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_masks", module._MaskCache())


def random_batch(seed: int) -> tuple[list[int], list[int]]:
    """Segments of 129 to 256 queries and 385 to 512 keys in all, some of one query, some of length W - 1 to 4 W."""
    rng = np.random.default_rng(seed)
    total_q, total_k = int(rng.integers(129, 257)), int(rng.integers(385, 513))
    n_q = [int(each) for each in rng.permutation(LENGTHS)] + [1, 1]
    ends = np.minimum(np.cumsum(n_q), total_q)
    n_q = [int(each) for each in np.diff(ends, prepend=0) if each > 0]
    n_q[-1] += total_q - sum(n_q)
    before = rng.multinomial(total_k - total_q, rng.dirichlet(np.full(len(n_q), 0.5)))
    return n_q, [n + int(more) for n, more in zip(n_q, before, strict=True)]


@pytest.mark.slow
@pytest.mark.skipif(cannot_compile("cpu") is not None, reason="no C++ compiler")
def test_twelve_batches_take_one_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other lengths, segments, shared beginnings and windows; all equal to the reference, wrong ones are not."""
    counter = use(monkeypatch, "inductor")
    for seed in range(12):
        n_q, n_k = random_batch(seed)
        qkv = random_qkv(sum(n_q), sum(n_k), seed=seed)
        ask = partial(attend, qkv=qkv, n_q=n_q, n_k=n_k, softcap=1.5)
        window = None if seed % 3 == 0 else WINDOW
        exact = ask(reference, window=window)
        assert distance(ask(flex, window=window), exact) < 1e-5
        for wrong in (WINDOW - 1, WINDOW + 1):
            assert distance(ask(flex, window=wrong), exact) > 1e-3
    assert counter.frame_count == 1


@pytest.mark.slow
def test_more_sizes_than_the_compiler_keeps_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = use(monkeypatch, "eager")
    sizes = range(1, torch._dynamo.config.recompile_limit + 3)
    for _ in range(2):
        for n in sizes:
            attend(flex, random_qkv(BLOCK * n, BLOCK * n, heads=1, kv_heads=1), [BLOCK * n], [BLOCK * n], **OPTIONS)
    assert counter.frame_count == len(sizes)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("before", [0, 60])
def test_values_and_gradients_are_those_of_the_reference(
    plain: CompileCounterWithBackend, kv_heads: int, softcap: float | None, before: int
) -> None:
    n_k = [n + before for n in LENGTHS]
    qkv = random_qkv(sum(LENGTHS), sum(n_k), kv_heads=kv_heads)
    for window in (None, 1, WINDOW):
        ours, exact = (with_gradients(b, qkv, LENGTHS, n_k, softcap=softcap, window=window) for b in (flex, reference))
        assert max(map(distance, ours, exact)) < 1e-5
    assert plain.frame_count == 1


def test_the_kernel_gets_the_tiles_of_the_card(
    plain: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = kernel_options(Card("cuda", "L4", (8, 9), 22 << 30), torch.bfloat16, 256)
    assert tiles is not None
    qkv, told = random_qkv(40, 40), []
    for chosen in (None, tiles):
        monkeypatch.setattr(module, "kernel_options", lambda *_, chosen=chosen: chosen)
        ours, exact = (with_gradients(b, qkv, [40], [40], **OPTIONS) for b in (flex, reference))
        assert max(map(distance, ours, exact)) < 1e-5
        calls = [node for node in plain.graphs[-1].graph.nodes if "flex_attention" in str(node.target)]
        (options,) = (next(each for each in call.args if isinstance(each, dict)) for call in calls)
        told.append({name: value for name, value in options.items() if name in tiles})
    assert told == [{}, tiles]


@pytest.mark.parametrize("changes", [{"window": WINDOW + 1}, {"window": WINDOW - 1}, {"softcap": None}])
def test_a_wrong_window_or_softcap_is_seen(plain: CompileCounterWithBackend, changes: dict[str, Any]) -> None:
    qkv = random_qkv(100, 130)
    wrong = with_gradients(flex, qkv, [100], [130], **{**OPTIONS, **changes})
    exact = with_gradients(reference, qkv, [100], [130], **OPTIONS)
    assert min(map(distance, wrong, exact)) > 1e-3


@pytest.mark.parametrize("n", [1, BLOCK, BLOCK + 1])
def test_single_queries_and_full_sizes(plain: CompileCounterWithBackend, n: int) -> None:
    """As in the last layer, where only the last token of each segment asks; also with nothing to pad."""
    n_k = [3 + at % 5 for at in range(n)]
    n_k[0] += BLOCK * 8 - sum(n_k)
    assert bucket(sum(n_k)) == sum(n_k)
    qkv = random_qkv(n, sum(n_k))
    ours, exact = (with_gradients(b, qkv, [1] * n, n_k, **OPTIONS) for b in (flex, reference))
    assert max(map(distance, ours, exact)) < 1e-5


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_model_gives_the_logits_and_gradients_of_the_reference(
    gemma2: Path, share: bool, checkpointing: str, plain: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through sliding and full layers, the last layer's single queries and keys taken by `kv_index`."""
    monkeypatch.setitem(BACKENDS, "flex", replace(BACKENDS["flex"], supports=lambda *_: None))
    batch = shared_batch(swap_pairs(), 4) if share else pack([40, 1, 9, 8, 33])
    found = []
    for name in ("flex", "reference"):
        model = classifier(exact_settings(gemma2, attention=name, checkpointing=checkpointing)).train()
        with torch.inference_mode():
            judged = model(batch)
        logits = model(batch)
        loss_sum(logits, batch.label).backward()
        assert used_backends(model) == name
        found.append((judged, logits.detach(), *(each.grad for each in trainable(model.model).values())))
    assert max((ours - right).norm() / right.norm() for ours, right in zip(*found, strict=True)) < 1e-5
    assert plain.frame_count > 0


def test_checkpoints_views_and_mixed_dtypes(plain: CompileCounterWithBackend) -> None:
    q, k, v = random_qkv(40, 40)
    exact = with_gradients(reference, [q, k, v], [40], [40], **OPTIONS)

    def checkpointed(*arguments: Any, **options: Any) -> Tensor:
        result: Tensor = checkpoint(flex, *arguments, use_reentrant=False, **options)
        return result

    views = [states.transpose(0, 1).contiguous().transpose(0, 1) for states in (q, k, v)]
    for backend, qkv in ((checkpointed, [q, k, v]), (flex, views)):
        ours = with_gradients(backend, qkv, [40], [40], **OPTIONS)
        assert max(map(distance, ours, exact)) < 1e-5
    assert plain.frame_count == 1  # neither needs a kernel of its own
    mixed = with_gradients(flex, [q, k.bfloat16(), v], [40], [40], **OPTIONS)
    assert [tensor.dtype for tensor in mixed] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    assert max(map(distance, mixed, exact)) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_and_autocast(plain: CompileCounterWithBackend, dtype: torch.dtype) -> None:
    full = random_qkv(40, 60)
    half = [states.to(dtype) for states in full]
    exact = with_gradients(reference, half, [40], [60], **OPTIONS)
    ours = with_gradients(flex, half, [40], [60], **OPTIONS)
    with torch.autocast("cpu", dtype=dtype):
        cast = with_gradients(flex, full, [40], [60], **OPTIONS)
    for mine, under_autocast, truth in zip(ours, cast, exact, strict=True):
        assert mine.dtype == dtype and under_autocast.dtype == torch.float32
        assert max(distance(mine, truth), distance(under_autocast, truth)) < 0.03
    assert plain.frame_count == 1


def test_a_batch_may_be_judged_and_then_trained_on(plain: CompileCounterWithBackend) -> None:
    """Also one whose boundaries were made in inference mode."""
    exact = with_gradients(reference, random_qkv(40, 40), [40], [40], **OPTIONS)
    with torch.inference_mode():
        q, k, v = random_qkv(40, 40)
        ends = torch.tensor([0, 40], dtype=torch.int32)
        judged = flex(q, k, v, ends, ends, 40, 40, scale=0.5, **OPTIONS)
    assert distance(judged, exact[0]) < 1e-5
    leaves = [states.requires_grad_() for states in random_qkv(40, 40)]
    out = flex(*leaves, ends, ends, 40, 40, scale=0.5, **OPTIONS)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, leaves, weights)
    assert max(map(distance, (out.detach(), *grads), exact)) < 1e-5


def test_gradients_on_a_cpu_are_refused() -> None:
    qkv = random_qkv(5, 5)
    with pytest.raises(ValueError, match=r"no backward on a CPU: train with model\.attention=blockwise"):
        attend(flex, [*qkv[:2], qkv[2].requires_grad_()], [5], [5])
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    keys = torch.tensor([0, 1, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="each query needs the key at its own position"):
        varlen_attention(*random_qkv(5, 5), ends, keys, 3, 4, scale=1.0, backend="flex")


def test_no_query_is_an_empty_result() -> None:
    q, k, v = random_qkv(0, 0)
    ends = torch.zeros(1, dtype=torch.int32)
    assert flex(q, k, v, ends, ends, 0, 0, scale=1.0, softcap=None, window=None).shape == (0, 4, 16)


@given(n=st.integers(1, 300_000))
def test_sizes_waste_an_eighth_at_most(n: int) -> None:
    size = bucket(n)
    assert size % BLOCK == 0 and n <= size < n + max(BLOCK, n / 8) and bucket(size) == size


def test_an_octave_has_eight_sizes() -> None:
    for octave in (1024, 8192, 16384):
        assert len({bucket(n) for n in range(octave + 1, 2 * octave + 1)}) == 8


segments = st.lists(st.tuples(st.integers(1, 200), st.integers(0, 300)), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(segments=segments, window=st.sampled_from([None, 1, 100, 128, 129, 400]))
def test_masks_show_each_query_its_own_keys(segments: list[tuple[int, int]], window: int | None) -> None:
    n_q, n_k = [n for n, _ in segments], [n + before for n, before in segments]
    rows, keys = bucket(sum(n_q)), bucket(sum(n_k))
    expected = torch.zeros(rows, keys, dtype=torch.bool)
    at_q = at_k = 0
    for queries, seen in zip(n_q, n_k, strict=True):
        own = expected[at_q : at_q + queries, at_k : at_k + seen]
        own |= torch.ones_like(own).tril(seen - queries)
        if window is not None:
            own &= torch.ones_like(own).triu(seen - queries - window + 1)
        at_q, at_k = at_q + queries, at_k + seen
    first, last = visible(boundaries(n_q), boundaries(n_k), rows, keys, window)
    sees = mask_mod(first, last)
    none = torch.zeros((), dtype=torch.int32)
    assert torch.equal(sees(none, none, torch.arange(rows)[:, None], torch.arange(keys)[None]), expected)
    assert_same_blocks(block_mask(first, last, keys), create_block_mask(sees, 1, 1, rows, keys, device="cpu"))


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def assert_same_blocks(ours: BlockMask, theirs: BlockMask) -> None:
    """The same blocks in part and whole, by queries for the forward and by keys for the backward."""
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(ours, f"{name}_num_blocks")
        assert torch.equal(counts, getattr(theirs, f"{name}_num_blocks"))
        for row, count in enumerate(counts[0, 0].tolist()):
            mine, other = (getattr(mask, f"{name}_indices")[0, 0, row, :count] for mask in (ours, theirs))
            assert torch.equal(mine, other)


class Largest(TorchDispatchMode):
    """The largest tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple) else (out,):
            self.numel = max(self.numel, each.numel() if isinstance(each, Tensor) else 0)
        return out


def test_masks_are_made_without_reading_a_value_or_a_square() -> None:
    """With tensors that have no values, anything that waits for the device would be an error."""
    rows, keys = 16384, 24576
    with FakeTensorMode(), Largest() as largest:
        first, last = visible(boundaries([5000, 11000]), boundaries([5000, 19000]), rows, keys, 4096)
        block_mask(first, last, keys)
    assert rows * keys / BLOCK <= largest.numel < 2 * rows * keys / BLOCK
    with FakeTensorMode(), pytest.raises(Exception, match=r"data|item|_local_scalar"):
        torch.ones(3).sum().item()


def test_layers_share_their_masks() -> None:
    masks = module._MaskCache()
    ends, same = boundaries([5, 7]), boundaries([5, 7])
    mask = masks.get(ends, ends, (128, 128), 4)
    assert masks.get(ends, ends, (128, 128), 4) is mask
    others = [
        masks.get(ends, ends, (128, 128), None),
        masks.get(ends, ends, (256, 128), 4),
        masks.get(same, same, (128, 128), 4),
        masks.get(ends, same, (128, 128), 4),
    ]
    assert len({id(each) for each in (mask, *others)}) == 5
    assert masks.get(ends, ends, (128, 128), 4) is mask


def test_a_batch_in_the_place_of_another_in_memory_gets_its_own_mask() -> None:
    masks = module._MaskCache()
    found = []
    for lengths in ([1, 99], [50, 50], [99, 1], [100]):
        ends = boundaries(lengths)
        mask = masks.get(ends, ends, (128, 128), None)
        first, _ = visible(ends, ends, 128, 128, None)
        none = torch.zeros((), dtype=torch.int32)
        assert torch.equal(mask.mask_mod(none, none, torch.arange(128), first), torch.arange(128) < 100)
        found.append(id(ends))
        del ends
    assert len(set(found)) == 4  # still held
    for _ in range(20):
        masks.get(boundaries([100]), boundaries([100]), (128, 128), None)
    assert len(masks.masks) == module.MASKS


def test_the_soft_cap_is_that_of_tanh() -> None:
    scores = torch.linspace(-300, 300, 1001)
    none = torch.zeros((), dtype=torch.int32)
    for softcap in (1.5, 50.0):
        capped = score_mod(softcap)
        assert capped is not None
        expected = softcap * torch.tanh(scores.double() / softcap)
        torch.testing.assert_close(capped(scores, none, none, none, none).double(), expected, atol=2e-5, rtol=0)
    assert score_mod(None) is None
