"""Tokens on disk: the same ids as encoding anew, found again, whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from arena.data import tokens
from arena.data.prompt import PromptEncoder
from arena.data.tokens import TokenStore, join, tokenise
from tests.helpers import make_tokenizer, prompt_settings


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def conversations(n: int = 30) -> Dataset:
    column = [[f"which is better {at}"] * (1 + at % 3) for at in range(n)]
    return Dataset.from_dict({"prompt": column, "response_a": column, "response_b": [turns[::-1] for turns in column]})


def test_same_ids_as_encoding_anew(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ROWS_AT_ONCE", 7)  # several record batches
    rows, settings = conversations(), prompt_settings()
    store = tokenise(rows, "a", tokenizer, settings, tmp_path, both_orders=True)
    expected = list(PromptEncoder(tokenizer, settings).encode(rows[:], both_orders=True))
    assert len(store) == len(expected) == 60
    for index, example in enumerate(expected):
        assert np.array_equal(store[index], example.input_ids)
        assert store.lengths[index] == len(example.input_ids)
    assert store[0].dtype == np.int32 and not store[0].flags.writeable
    for index in (-1, 60):
        with pytest.raises(IndexError):
            store[index]


def test_found_again_by_what_it_was_made_from(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = conversations(3)
    tokenise(rows, "a", tokenizer, prompt_settings(), tmp_path, both_orders=False)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_write", lambda *_: pytest.fail("tokenised again"))
        tokenise(rows, "a", tokenizer, prompt_settings(), tmp_path, both_orders=False)
    made = set(tmp_path.iterdir())
    tokenise(rows, "b", tokenizer, prompt_settings(), tmp_path, both_orders=False)
    tokenise(rows, "a", tokenizer, prompt_settings(max_length=255), tmp_path, both_orders=False)
    tokenise(rows, "a", tokenizer, prompt_settings("judge", max_length=3000), tmp_path, both_orders=False)
    tokenise(rows, "a", tokenizer, prompt_settings(), tmp_path, both_orders=True)
    assert len(set(tmp_path.iterdir()) - made) == 4


def test_an_interrupted_write_leaves_nothing(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    rows = conversations(3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokens, "_record_batch", stop)
        tokenise(rows, "a", tokenizer, prompt_settings(), tmp_path, both_orders=False)
    assert list(tmp_path.iterdir()) == []
    assert len(tokenise(rows, "a", tokenizer, prompt_settings(), tmp_path, both_orders=False)) == 3


def test_joined_stores(tokenizer: Any, tmp_path: Path) -> None:
    def store(n: int, source: str) -> TokenStore:
        return tokenise(conversations(n), source, tokenizer, prompt_settings(), tmp_path, both_orders=False)

    first, second = store(5, "a"), store(3, "b")
    joined = join([first, second])
    assert len(joined) == 8
    assert all(np.array_equal(joined[at], first[at]) for at in range(5))
    assert all(np.array_equal(joined[5 + at], second[at]) for at in range(3))
