"""Tokens on disk: the same ids as encoding anew, found again, whole or absent."""

from __future__ import annotations

import copy
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import normalizers
from transformers import AutoTokenizer

from arena.data import tokens
from arena.data.dataset import Rows
from arena.data.text_encoder import TextEncoder
from arena.data.tokens import TextMemo, TokenStore, join, tokenise
from arena.tasks.preference import PromptEncoder
from tests.helpers import make_tokenizer, prompt_settings, rows_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def conversations(n: int = 30, source: str = "a") -> Rows:
    column = [[f"which is better {at}"] * (1 + at % 3) for at in range(n)]
    texts = {"prompt": column, "response_a": column, "response_b": [turns[::-1] for turns in column]}
    return rows_of(Dataset.from_dict(texts), source)


def test_same_ids_as_encoding_anew(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ROWS_AT_ONCE", 7)  # several record batches
    rows, settings = conversations(), prompt_settings()
    store = tokenise(rows, tokenizer, settings, tmp_path, orders=2)
    expected = list(PromptEncoder(tokenizer, settings).encode(rows.table[:], orders=2))
    assert len(store) == len(expected) == 60
    for index, example in enumerate(expected):
        assert np.array_equal(store[index], example.input_ids)
        assert store.lengths[index] == len(example.input_ids)
    assert store[0].dtype == np.int32 and not store[0].flags.writeable
    for index in (-1, 60):
        with pytest.raises(IndexError):
            store[index]


def test_a_store_is_reused_if_nothing_it_is_made_from_changed(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = conversations(3)
    tokenise(rows, tokenizer, prompt_settings(), tmp_path, orders=1)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_write", lambda *_: pytest.fail("tokenised again"))
        tokenise(rows, tokenizer, prompt_settings(), tmp_path, orders=1)
    made = set(tmp_path.iterdir())
    tokenise(conversations(3, "b"), tokenizer, prompt_settings(), tmp_path, orders=1)
    tokenise(rows, tokenizer, prompt_settings(max_length=255), tmp_path, orders=1)
    tokenise(rows, tokenizer, prompt_settings("judge", max_length=3000), tmp_path, orders=1)
    tokenise(rows, tokenizer, prompt_settings(), tmp_path, orders=2)
    assert len(set(tmp_path.iterdir()) - made) == 4


def test_an_interrupted_write_leaves_nothing(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    rows = conversations(3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokens, "_record_batch", stop)
        tokenise(rows, tokenizer, prompt_settings(), tmp_path, orders=1)
    assert list(tmp_path.iterdir()) == []
    assert len(tokenise(rows, tokenizer, prompt_settings(), tmp_path, orders=1)) == 3


def test_joined_stores(tokenizer: Any, tmp_path: Path) -> None:
    def store(n: int, source: str) -> TokenStore:
        return tokenise(conversations(n, source), tokenizer, prompt_settings(), tmp_path, orders=1)

    first, second = store(5, "a"), store(3, "b")
    joined = join([first, second])
    assert len(joined) == 8
    assert all(np.array_equal(joined[at], first[at]) for at in range(5))
    assert all(np.array_equal(joined[5 + at], second[at]) for at in range(3))


def test_a_changed_tokenizer_is_noticed(tokenizer: Any, tmp_path: Path) -> None:
    """Also one that was changed in memory only, and one whose vocabulary and added tokens are the same."""
    made_by = copy.deepcopy(tokenizer)
    names = set()
    for change in (
        lambda: None,
        lambda: made_by.add_tokens(["<unused1>"]),
        lambda: setattr(made_by.backend_tokenizer, "normalizer", normalizers.Lowercase()),
        lambda: setattr(made_by.backend_tokenizer.model, "byte_fallback", False),
    ):
        change()
        names.add(tokenise(conversations(3), made_by, prompt_settings(), tmp_path, orders=1).fingerprint)
    assert len(names) == len(list(tmp_path.iterdir())) == 4


def test_fingerprint_tells_the_content(tokenizer: Any, tmp_path: Path) -> None:
    def store(source: str, orders: int = 1) -> TokenStore:
        return tokenise(conversations(3, source), tokenizer, prompt_settings(), tmp_path, orders=orders)

    a, b = store("a"), store("b")
    assert store("a").fingerprint == a.fingerprint
    assert join([a, b]).fingerprint == join([store("a"), store("b")]).fingerprint
    stores = (a, b, store("a", orders=2), join([a, b]), join([b, a]))
    assert len({each.fingerprint for each in stores}) == len(stores)


def test_the_memo_holds_the_latest_texts_within_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "TOKENS_OF_A_TEXT", 0)
    memo, ids = TextMemo(limit=10), np.arange(4, dtype=np.int32)
    memo[b"a"], memo[b"b"] = ids, ids + 1
    assert memo.get(b"a") is not None and memo.get(b"none") is None
    memo[b"c"] = ids + 2  # 12 tokens: `b`, not asked for since, goes
    assert set(memo) == {b"a", b"c"} and memo.currsize == 8
    memo[b"c"] = ids[:1]
    assert memo.currsize == 5
    ids[:] = 7
    assert memo[b"a"].tolist() == [0, 1, 2, 3]  # its own copy
    memo[b"long"] = np.zeros(11, dtype=np.int32)
    assert set(memo) == {b"a", b"c"} and memo.currsize == 5  # longer than the limit, so not held


def test_many_short_texts_in_the_memo_take_no_more_memory_than_few_long_ones() -> None:
    """What Python needs for a text is counted with its tokens."""
    peaks = []
    for size in (1, 10_000):
        memo = TextMemo(limit=2**20)
        tracemalloc.start()
        for number in range(30_000 if size == 1 else 150):
            memo[number.to_bytes(16)] = np.zeros(size, dtype=np.int32)
        peaks.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert memo.currsize > 0.98 * memo.maxsize
    assert max(peaks) <= 1.25 * 4 * 2**20


@pytest.mark.parametrize("limit", [tokens.REMEMBERED_TOKENS, 40])
def test_repeated_texts_are_tokenised_once(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Within a batch and from batch to batch; where the memo is too small, again, with the same ids."""
    monkeypatch.setattr(tokens, "ROWS_AT_ONCE", 5)
    monkeypatch.setattr(tokens, "TextMemo", lambda: TextMemo(limit))
    seen: list[str] = []
    encode = TextEncoder._encode
    monkeypatch.setattr(TextEncoder, "_encode", lambda self, texts: seen.extend(texts) or encode(self, texts))
    texts = [[f"which is better {at % 12}"] for at in range(40)]
    rows = rows_of(Dataset.from_dict({"prompt": texts, "response_a": texts[::-1], "response_b": texts}))
    store = tokenise(rows, tokenizer, prompt_settings(), tmp_path, orders=2)
    counts = Counter(text for text in seen if text.startswith("which"))
    assert len(counts) == 12
    assert (max(counts.values()) == 1) is (limit == tokens.REMEMBERED_TOKENS)
    monkeypatch.undo()
    for index, example in enumerate(PromptEncoder(tokenizer, prompt_settings()).encode(rows.table[:], orders=2)):
        assert np.array_equal(store[index], example.input_ids)


def test_an_error_in_the_tokenizer_comes_through_and_leaves_nothing(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(PromptEncoder, "tokenise", broken)
    with pytest.raises(RuntimeError, match="broken"):
        tokenise(conversations(3), tokenizer, prompt_settings(), tmp_path, orders=1)
    assert list(tmp_path.iterdir()) == []
