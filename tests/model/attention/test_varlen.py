"""Packed attention against attention written out in full, its refusals, and the gather of shared keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arena.model.attention import reference as exact
from arena.model.attention.varlen import gather, transformers_attention, varlen_attention
from tests.model.test_classifier import relative

SCALE = 0.25
SEEN = torch.cat([torch.arange(20).repeat(60), torch.arange(20, 50)])  # twenty tokens that sixty segments see


def written_out(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, window: int | None) -> Tensor:
    """One segment in float64, query by query and head by head, as the definition says."""
    n_q, heads, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(n_q, heads, v.shape[-1], dtype=torch.float64)
    for i in range(n_q):
        at = i + len(k) - n_q
        first = 0 if window is None else max(0, at - window + 1)
        for head in range(heads):
            keys, values = k[first : at + 1, head // group].double(), v[first : at + 1, head // group].double()
            scores = keys @ q[i, head].double() * SCALE
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[i, head] = scores.softmax(0) @ values
    return out


def random_qkv(n_q: int, n_k: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (n_q, heads, dim), (n_k, kv_heads, dim), (n_k, kv_heads, dim)
    return [3 * torch.randn(shape, generator=generator) for shape in shapes]


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def attend(q: Tensor, k: Tensor, v: Tensor, n_q: list[int], n_k: list[int], **options: object) -> Tensor:
    return varlen_attention(
        q,
        k,
        v,
        boundaries(n_q),
        boundaries(n_k),
        max(n_q),
        max(n_k),
        scale=SCALE,
        **options,  # type: ignore[arg-type]
    )


@settings(max_examples=40, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(1, 14), st.integers(0, 9)), min_size=1, max_size=4),
    softcap=st.sampled_from([None, 1.5]),
    window=st.sampled_from([None, 1, 3, 5, 50]),
    chunk=st.sampled_from([4, 512]),
    groups=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
)
def test_reference_is_the_definition(
    segments: list[tuple[int, int]], softcap: float | None, window: int | None, chunk: int, groups: tuple[int, int]
) -> None:
    """Segments may have more keys than queries (a shared beginning before them)."""
    n_q = [queries for queries, _ in segments]
    n_k = [queries + before for queries, before in segments]
    q, k, v = random_qkv(sum(n_q), sum(n_k), *groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "QUERY_CHUNK", chunk)
        out = attend(q, k, v, n_q, n_k, softcap=softcap, window=window)
    parts = zip(q.split(n_q), k.split(n_k), v.split(n_k), strict=True)
    expected = torch.cat([written_out(*part, softcap, window) for part in parts])
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"window": 4}, {"window": 6}, {"softcap": None}, {"softcap": 2.0}])
def test_a_wrong_window_or_softcap_is_seen(changes: dict[str, object]) -> None:
    q, k, v = random_qkv(30, 30)
    right = attend(q, k, v, [30], [30], softcap=1.5, window=5)
    wrong = attend(q, k, v, [30], [30], **{"softcap": 1.5, "window": 5, **changes})
    assert (right - wrong).abs().max() > 1e-2


def test_gradients_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    for chunk in (512, 3):
        monkeypatch.setattr(exact, "QUERY_CHUNK", chunk)
        q, k, v = (tensor.double().requires_grad_() for tensor in random_qkv(20, 26))
        out = attend(q, k, v, [7, 13], [7, 19], softcap=1.5, window=5)
        grads.append(torch.autograd.grad((out * out.detach().cos()).sum(), (q, k, v)))
    for whole, chunked in zip(*grads, strict=True):
        torch.testing.assert_close(whole, chunked, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_no_worse_than_twice_a_naive_one() -> None:
    q, k, v = random_qkv(40, 40)
    exact = written_out(q, k, v, 1.5, 8)
    half = [tensor.bfloat16() for tensor in (q, k, v)]
    naive = written_out_in_bfloat16(*half)
    ours = attend(*half, [40], [40], softcap=1.5, window=8)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).abs().max() <= 2 * (naive.double() - exact).abs().max()


def written_out_in_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    scores = 1.5 * torch.tanh(scores / 1.5)
    at = torch.arange(len(q))
    hidden = (at[None] > at[:, None]) | (at[None] <= at[:, None] - 8)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "message"),
    [
        ([4], [5], "cu_seqlens_k must go from 0 to 6"),
        ([3], [6], "cu_seqlens_q must go from 0 to 4"),
        ([2, 2], [6], "segments"),
    ],
)
def test_boundaries_that_do_not_belong_are_refused(lengths_q: list[int], lengths_k: list[int], message: str) -> None:
    q, k, v = random_qkv(4, 6)
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, lengths_q, lengths_k)


def test_fewer_keys_than_queries_are_refused() -> None:
    q, k, v = random_qkv(6, 6)
    with pytest.raises(ValueError, match="each query needs the key at its own position"):
        attend(q, k, v, [2, 4], [4, 2])


def test_unknown_backend_and_odd_shapes_are_refused() -> None:
    q, k, v = random_qkv(4, 4)
    with pytest.raises(ValueError, match="no attention backend 'nope'"):
        attend(q, k, v, [4], [4], backend="nope")
    with pytest.raises(ValueError, match="do not match"):
        attend(q, k, v[:, :1], [4], [4])
    with pytest.raises(ValueError, match="is too small"):
        attend(q, k, v, [4], [4], window=0)


class Module(torch.nn.Module):
    is_causal = True
    config = type("Config", (), {"arena_backend": "reference"})()


def call(**changes: object) -> Tensor:
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in random_qkv(4, 4))
    ends = boundaries([1, 3])
    good = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 3, "max_length_k": 3}
    return transformers_attention(Module(), q, k, v, **{"attention_mask": None, **good, **changes})[0]  # type: ignore[arg-type]


def test_the_transformers_signature() -> None:
    assert call().shape == (1, 4, 4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(1, 4)}, "not accept an attention_mask"),
        ({"cu_seq_lens_q": None}, "needs cu_seq_lens_q"),
        ({"cu_seqlens_q": torch.tensor([0, 4])}, "cu_seqlens_q is unknown"),
        ({"max_seqlen_q": 3}, "max_seqlen_q is unknown"),
        ({"dropout": 0.1}, "no dropout"),
    ],
)
def test_a_mask_or_a_wrong_keyword_is_an_error(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def gradient_of_gather(ours: bool, dtype: torch.dtype, index: Tensor = SEEN, device: str = "cpu") -> Tensor:
    torch.manual_seed(0)
    states = torch.randn(50, 2, 8).to(device, dtype).requires_grad_()
    weights, index = torch.rand(len(index), 2, 8).bfloat16().to(device, dtype), index.to(device)
    gathered = gather(states, index) if ours else states.index_select(0, index)
    assert torch.equal(gathered, states[index])
    (gathered * weights).sum().backward()
    assert states.grad is not None
    return states.grad.float().cpu()


def test_the_gradient_is_the_sum_of_all_that_see_a_token() -> None:
    truth = gradient_of_gather(False, torch.float32)
    assert relative(gradient_of_gather(True, torch.float32), truth) <= 1e-6
    assert relative(gradient_of_gather(True, torch.bfloat16), truth) <= 2e-3
    assert relative(gradient_of_gather(True, torch.float32, SEEN.flip(0)), truth) > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_is_rounded_once_too() -> None:
    truth = gradient_of_gather(False, torch.float32)
    assert relative(gradient_of_gather(True, torch.bfloat16, device="cuda"), truth) <= 2e-3
