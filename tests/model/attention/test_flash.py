"""What is asked of flash-attn, shown on a stand-in that follows its documentation word by word, held to `reference`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from arena.model.attention.flash import flash
from arena.model.attention.reference import reference
from tests.model.attention.test_blockwise import attend, distance, random_qkv, with_gradients

WINDOW = 24
LENGTHS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW, 131]


def documented(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: None = None,
    deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """`flash_attn_varlen_func`: query i of a segment sees keys i + n_k - n_q - left to i + n_k - n_q + right."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert {q.stride(-1), k.stride(-1), v.stride(-1)} == {1}
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and dropout_p == 0.0
    n_q, n_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert max_seqlen_q >= max(n_q) and max_seqlen_k >= max(n_k)
    assert max_seqlen_q > 1, "the path for generation, which small builds lack"
    left, right = (size if size >= 0 else int(1e9) for size in window_size)
    right = min(right, 0) if causal else right
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    parts = []
    for queries, keys, values in zip(q.split(n_q), k.split(n_k), v.split(n_k), strict=True):
        group = q.shape[1] // k.shape[1]
        keys, values = (states.float().repeat_interleave(group, dim=1) for states in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries.float(), keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(len(queries))[:, None] + len(keys) - len(queries)
        key = torch.arange(len(keys))[None, :]
        scores = scores.masked_fill((key < place - left) | (key > place + right), -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype))
    return torch.cat(parts)


Calls = list[dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Puts the stand-in where flash-attn would be, and lists how it is called."""
    made: Calls = []

    def listed(*given: Any, **named: Any) -> Tensor:
        made.append({**named, "given": given})
        return documented(*given, **named)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = listed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return made


def half(n_q: int, n_k: int, **options: Any) -> list[Tensor]:
    return [tensor.half() for tensor in random_qkv(n_q, n_k, **options)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, WINDOW, 1000])
@pytest.mark.parametrize("before", [0, 5, 60])
def test_values_and_gradients_are_those_of_the_reference(
    calls: Calls, kv_heads: int, softcap: float | None, window: int | None, before: int
) -> None:
    n_k = [n + before for n in LENGTHS]
    qkv = half(sum(LENGTHS), sum(n_k), kv_heads=kv_heads)
    ours, exact = (with_gradients(b, qkv, LENGTHS, n_k, softcap=softcap, window=window) for b in (flash, reference))
    assert max(map(distance, ours, exact)) < 2e-3
    assert len(calls) == 1


@pytest.mark.parametrize("changes", [{"window": WINDOW + 1}, {"window": WINDOW - 1}, {"softcap": None}])
@pytest.mark.parametrize("before", [0, 60])
def test_a_wrong_window_or_softcap_is_seen(calls: Calls, changes: dict[str, Any], before: int) -> None:
    qkv, right = half(100, 100 + before), {"softcap": 1.5, "window": WINDOW}
    wrong = with_gradients(flash, qkv, [100], [100 + before], **{**right, **changes})
    exact = with_gradients(reference, qkv, [100], [100 + before], **right)
    assert min(map(distance, wrong, exact)) > 1e-2


def test_single_queries_do_not_take_the_path_for_generation(calls: Calls) -> None:
    n_k = [500, 33, 1, 700]
    qkv = half(4, sum(n_k))
    ours, exact = (with_gradients(b, qkv, [1] * 4, n_k, softcap=5.0, window=600) for b in (flash, reference))
    assert max(map(distance, ours, exact)) < 2e-3
    assert calls[0]["given"][5] == 2 and calls[0]["causal"] is True


def test_autocast_decides_the_dtype(calls: Calls) -> None:
    q, k, v = random_qkv(40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(flash, [q, k.bfloat16(), v], [40], [40])
    assert {states.dtype for states in calls[0]["given"][:3]} == {torch.bfloat16} and out.dtype == torch.float32
    assert distance(out, attend(reference, [q, k, v], [40], [40])) < 0.02
    with pytest.raises(ValueError, match=r"supports bfloat16 and float16, not torch\.float32"):
        attend(flash, [q, k, v], [40], [40])


def test_heads_that_are_not_dense_are_copied(calls: Calls) -> None:
    q, k, v = half(40, 40)
    strided = [states.transpose(1, 2).contiguous().transpose(1, 2) for states in (q, k, v)]
    assert strided[0].stride(-1) != 1
    torch.testing.assert_close(attend(flash, strided, [40], [40]), attend(flash, [q, k, v], [40], [40]))


def test_deterministic_on_request(calls: Calls) -> None:
    qkv = half(4, 4)
    attend(flash, qkv, [4], [4])
    torch.use_deterministic_algorithms(True)
    try:
        attend(flash, qkv, [4], [4])
    finally:
        torch.use_deterministic_algorithms(False)
    assert [call["deterministic"] for call in calls] == [False, True]


def test_no_query_is_no_call(calls: Calls) -> None:
    q, k, v = half(0, 0)
    ends = torch.zeros(1, dtype=torch.int32)
    assert flash(q, k, v, ends, ends, 0, 0, scale=1.0, softcap=None, window=None).shape == (0, 4, 16)
    assert calls == []
