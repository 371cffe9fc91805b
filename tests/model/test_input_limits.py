"""What a base cannot be given is refused: more positions than it has, ids without a row in its embedding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)  # fmt: skip

from arena.data.tokens import tokenise
from arena.inference.judge_model import JudgeModel
from arena.inference.saved import SavedJudge, save_judge
from arena.model.backbone import load_base, load_tokenizer
from arena.model.base_files import base_digest, check_ids, check_length, positions
from arena.model.tuning import adapt
from arena.tasks.preference import CLASSES
from arena.training.run import run_fold
from tests.helpers import prompt_settings, rows_of, tiny_recipe

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (Gemma2Config(), 8192),
        (Gemma3TextConfig(max_position_embeddings=32768), 32768),
        (LlamaConfig(max_position_embeddings=2048), 2048),
        (LlamaConfig(max_position_embeddings=2048, rope_parameters={"rope_type": "linear", "factor": 4.0}), 8192),
        (LlamaConfig(max_position_embeddings=131072, rope_parameters=LLAMA3), 131072),  # counted in already
        (Qwen2Config(max_position_embeddings=32768, rope_parameters=YARN), 131072),  # not counted in
        (GPT2Config(n_positions=1024), 1024),
        (BloomConfig(), None),  # ALiBi: no positions to run out of
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PretrainedConfig) else str(value),
)
def test_positions_are_those_of_the_config_and_of_its_scaling(config: Any, most: int | None) -> None:
    assert positions(config) == most
    check_length(config, most or 10**9, "it")
    if most is not None:
        with pytest.raises(ValueError, match=f"max_length is {most + 1:,}, but it supports at most {most:,} tokens"):
            check_length(config, most + 1, "it")


def test_too_long_prompts_are_refused_before_anything_is_prepared(gemma2: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2, "packing.budget=1024", "prompt.max_length=513")
    with pytest.raises(ValueError, match=r"max_length is 513, .* at most 512 .*pass prompt\.max_length=512"):
        run_fold(recipe, 0, tmp_path / "runs")
    assert not (tmp_path / "cache").exists()


def with_token(base: Path, folder: Path, content: str) -> Path:
    """A copy of a base whose tokenizer knows one token more than the embedding has rows."""
    shutil.copytree(base, folder)
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    state["added_tokens"].append({"id": rows, "content": content, **plain})
    file.write_text(json.dumps(state))
    return folder


def test_an_id_without_a_row_is_refused_where_it_occurs(gemma2: Path, tmp_path: Path) -> None:
    occurs = with_token(gemma2, tmp_path / "occurs", "badbad")  # stands in `write_rows`
    recipe = tiny_recipe(tmp_path, occurs)
    with pytest.raises(
        ValueError, match=r"occurs gives the token 'badbad' the id (\d+), but the embedding has \1 rows"
    ):
        run_fold(recipe, 0, tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_an_id_without_a_row_that_never_occurs_is_fine(gemma2: Path, tmp_path: Path) -> None:
    never = with_token(gemma2, tmp_path / "never", "unheard")
    tokenizer, settings = load_tokenizer(str(never)), prompt_settings()
    config = load_base(tiny_recipe(tmp_path, never).model, CLASSES).config
    assert len(tokenizer) == config.vocab_size + 1
    for text, wrong in (("hello", False), ("unheard", True)):
        rows = Dataset.from_dict({"prompt": [[text]], "response_a": [["a"]], "response_b": [["b"]]})
        store = tokenise(rows_of(rows, text), tokenizer, settings, tmp_path, orders=1)
        assert store.largest_id() == int(store[0].max())
        if wrong:
            with pytest.raises(ValueError, match="the token 'unheard'"):
                check_ids(config, store, tokenizer, "it")
        else:
            check_ids(config, store, tokenizer, "it")


def test_a_judge_refuses_rows_with_such_an_id(gemma2: Path, tmp_path: Path) -> None:
    base = with_token(gemma2, tmp_path / "base", "badbad")
    recipe = tiny_recipe(tmp_path, base)
    model = adapt(load_base(recipe.model, CLASSES), recipe.model)
    prior = np.full(3, 1 / 3)
    save_judge(
        model, load_tokenizer(str(base)), SavedJudge(tmp_path / "judge", recipe, prior, "x", base_digest(str(base)))
    )
    judge = JudgeModel(tmp_path / "judge")
    with pytest.raises(ValueError, match="the token 'badbad'"):
        judge.probabilities(judge.read([tmp_path / "rows/test.csv"]))
