"""Votes: the names of both models in any layout, points, and the style of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arena.data.conversion import BadRowsError
from arena.data.dataset import Rows, read_dataset
from arena.tasks.votes import Votes, models_of, points_of, style_differences
from tests.helpers import SHARED, needs_shared

MARKDOWN = """# Title
Some **bold** and __more__, a * b * c.

- one
  * two
3. three
```
# code, **not bold**
- no list
```"""


def read(path: Path) -> Rows:
    return read_dataset([path], path.parent / "cache", Votes(), labels="required")


def test_models_are_read_beside_any_texts_and_may_be_missing(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    both = {"conversation_a": chat, "conversation_b": chat, "winner": "tie"}
    rows: list[dict[str, Any]] = [
        both | {"model_a": "x", "model_b": "y"}, both | {"model_a": " "}, both | {"model_a": "x", "model_b": "x"}
    ]  # fmt: skip
    path = tmp_path / "votes.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read(path)
    assert models_of(found.table) == [("x", "y"), (None, None), ("x", "x")]
    assert found.groups() == ["hi"] * 3
    assert points_of(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.25, 0.25]])).tolist() == [1, 0, 0.5, 0.625]


def test_a_file_without_models_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "votes.csv"
    path.write_text("id,prompt,response_a,response_b,winner\n1,a,b,c,tie\n")
    with pytest.raises(BadRowsError, match="model_a, model_b: is missing; the columns found are"):
        read(path)


def test_the_style_of_answers(tmp_path: Path) -> None:
    plain = "x" * (len(MARKDOWN) - 1)
    path = tmp_path / "votes.jsonl"
    row = {"model_a": "x", "model_b": "y", "prompt": "p", "winner": "tie", "response_b": plain}
    texts = enumerate((MARKDOWN, plain))
    path.write_text("\n".join(json.dumps(row | {"id": at, "response_a": text}) for at, text in texts))
    differences = style_differences(read(path).table)
    np.testing.assert_allclose(differences[0], [1 / (2 * len(MARKDOWN)), 1 / 2, 2 / 3, 3 / 4])
    assert not differences[1].any()


@needs_shared
@pytest.mark.parametrize("name", ["mtbench_human.jsonl", "arena_140k.parquet"])
def test_published_votes_name_their_models(name: str, tmp_path: Path) -> None:
    rows = read_dataset([SHARED / "data/layouts" / name], tmp_path, Votes(), labels="required")
    assert all(a and b and a != b for a, b in models_of(rows.table))
