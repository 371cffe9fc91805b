"""Bases whose rows are their own in a packed batch, bases whose rows are not, and how each is told from the other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, Gemma2Config, LlamaConfig, Phi3Config, PretrainedConfig

from arena.model import exactness
from arena.model.attention import reference
from arena.model.backbone import base_config
from arena.model.exactness import SIMPLEST, check_exact, longest_row, why_not_exact
from arena.model.families import ARCHITECTURES
from arena.model.miniature import BEYOND, LONGEST, ORIGINAL, WINDOW, miniature
from arena.settings import ModelSettings
from tests.model.every_base import PAGE, page, verdicts

DEMO = ModelSettings(base="demo_base")
SETTINGS = DEMO.model_copy(update=SIMPLEST)
LAYERS = {"num_hidden_layers": 6}


def stretched(kind: str, limit: int = 1024, **more: Any) -> LlamaConfig:
    """A Llama whose rotary embedding is stretched from `limit` positions to eight times as many."""
    rope = {"rope_type": kind, "factor": 8.0, "rope_theta": 10000.0, **more}
    if kind in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = limit
    most = limit if kind == "dynamic" else 8 * limit
    return LlamaConfig(max_position_embeddings=most, rope_parameters=rope, **LAYERS)


LONGROPE: dict[str, Any] = {"short_factor": [1.0] * 64, "long_factor": [1.0 + at / 8 for at in range(64)]}


@pytest.mark.parametrize(
    "family", ["gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe"]
)
def test_decoders_whose_attention_alone_mixes_tokens_are_exact(family: str) -> None:
    config = CONFIG_MAPPING[family](**LAYERS)
    assert why_not_exact(config, SETTINGS, longest_row(config, 1024)) is None


@pytest.mark.parametrize("tune", ["lora", "head", "full"])
def test_it_holds_however_the_base_is_trained(tune: str) -> None:
    assert why_not_exact(base_config(DEMO), SETTINGS.model_copy(update={"tune": tune}), LONGEST) is None


@pytest.mark.parametrize(
    ("kind", "more"),
    [("linear", {}), ("yarn", {}), ("llama3", {"low_freq_factor": 1.0, "high_freq_factor": 4.0})],
)
def test_a_rotary_embedding_that_is_stretched_once_and_for_all_is_exact(kind: str, more: dict[str, Any]) -> None:
    config = stretched(kind, **more)
    assert why_not_exact(config, SETTINGS, longest_row(config, 4096)) is None


@pytest.mark.parametrize(("kind", "more"), [("dynamic", {}), ("longrope", LONGROPE)])
def test_a_rotary_embedding_of_the_longest_row_is_refused_where_rows_reach_so_far(
    kind: str, more: dict[str, Any], tmp_path: Path
) -> None:
    config = stretched(kind, **more)
    with pytest.raises(ValueError, match="depend on the rows beside it") as refused:
        check_exact(config, DEMO, 1025, cache=tmp_path)
    assert str(refused.value).endswith("Rows of at most 1024 tokens are exact: set prompt.max_length=1024")
    check_exact(config, DEMO, 1024, cache=tmp_path)  # what the message says


def test_also_where_both_factors_come_with_other_widths() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [1.0 + at / 8 for at in range(48)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    config = Phi3Config(
        rope_parameters=rope, original_max_position_embeddings=4096, max_position_embeddings=131072, **LAYERS
    )
    assert why_not_exact(config, SETTINGS, longest_row(config, 4096)) is None
    assert "depend on the rows" in str(why_not_exact(config, SETTINGS, longest_row(config, 4097)))


@pytest.mark.parametrize(("family", "part", "n"), [("llama", 1.0, 64), ("phi3", 0.25, 12)])
def test_rope_factors_that_begin_alike_are_distinguished(family: str, part: float, n: int) -> None:
    """As published ones do: the high frequencies are not stretched."""
    long = [1.0] * (n // 2) + [8.0] * (n - n // 2)
    rope = {"rope_type": "longrope", "rope_theta": 5e5, "short_factor": [1.0] * n, "long_factor": long}
    rope |= {"original_max_position_embeddings": 1024, "partial_rotary_factor": part}
    places = {"max_position_embeddings": 8192, "original_max_position_embeddings": 1024}
    config = CONFIG_MAPPING[family](rope_parameters=rope, partial_rotary_factor=part, **places, **LAYERS)
    assert why_not_exact(config, SETTINGS, longest_row(config, 1024)) is None
    assert "depend on the rows" in str(why_not_exact(config, SETTINGS, longest_row(config, 1025)))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("phi", {"hidden_size": 2560, "num_attention_heads": 32, "partial_rotary_factor": 0.35, "pad_token_id": 0}),
        ("phi", {"hidden_size": 2560, "num_attention_heads": 32, "partial_rotary_factor": 0.1, "pad_token_id": 0}),
        ("llama", {"vocab_size": 33, "hidden_size": 48, "num_attention_heads": 6}),
        ("helium", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}),
        (
            "exaone4",
            {"sliding_window": 64, "layer_types": ["full_attention"] * 4, "num_hidden_layers": 4, "pad_token_id": 0},
        ),
        ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 1}),
        ("starcoder2", {"attention_dropout": 0.1}),
    ],
)
def test_unusual_sizes_are_exact(family: str, settings: dict[str, Any]) -> None:
    config = CONFIG_MAPPING[family](**{**LAYERS, **settings})
    assert why_not_exact(config, SETTINGS, LONGEST) is None


def test_dropout_in_attention_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """That which cannot be switched off by the one name that most configs have."""
    monkeypatch.setattr(exactness, "as_classifier", lambda config, classes: setattr(config, "num_labels", 3))
    config = CONFIG_MAPPING["llama"](attention_dropout=0.1, **LAYERS)
    assert "no dropout" in str(why_not_exact(config, SETTINGS, LONGEST))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bert", "no linear layer `score`"),
        ("bart", "encoder in addition to its decoder"),
        ("bloom", "attention cannot be replaced"),  # ALiBi
        ("gemma3", "a multimodal model"),
        ("gpt_oss", "s_aux"),  # attention sinks
        ("gpt2", "in `layers`"),
        ("mamba", "no sequence classifier"),
        ("minimax", "depend on the rows beside it"),  # a state that goes from token to token
    ],
)
def test_others_are_refused_with_the_reason(family: str, reason: str) -> None:
    config = CONFIG_MAPPING[family](num_hidden_layers=4)
    assert reason in str(why_not_exact(config, SETTINGS, LONGEST))


def test_the_smaller_model_has_every_kind_of_layer_of_the_base() -> None:
    config = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=26)
    small = miniature(config)
    assert small.num_hidden_layers == 3 and set(small.layer_types) == set(config.layer_types)
    assert (small.layer_types[-1], small.sliding_window) == (config.layer_types[-1], WINDOW)
    # a layer that no list of the config tells from its neighbours
    mixed = CONFIG_MAPPING["qwen3_moe"](num_hidden_layers=8, decoder_sparse_step=4)
    assert miniature(mixed).num_hidden_layers == 8


def test_rows_go_over_a_limit_just_where_the_recipe_does() -> None:
    for kind, more, first in (("longrope", LONGROPE, ORIGINAL), ("yarn", {}, LONGEST)):
        config = stretched(kind, **more)
        asked = [longest_row(config, n) for n in (1024, 1025, 8192, 8193)]
        assert asked == [first, LONGEST, LONGEST, BEYOND]
    assert longest_row(Gemma2Config(), 4096) == LONGEST


@pytest.mark.parametrize("fault", ["window", "softcap"])
def test_wrong_attention_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is worth what it catches."""
    right = reference._chunk

    def wrong(q: Any, k: Any, v: Any, offset: int, scale: float, softcap: Any, window: Any) -> Any:
        if fault == "softcap":
            return right(q, k, v, offset, scale, None, window)
        return right(q, k, v, offset, scale, softcap, window and window + 1)

    monkeypatch.setattr(reference, "_chunk", wrong)
    config = base_config(DEMO)
    config.attn_logit_softcapping = 1.0
    assert "even for a single row" in str(why_not_exact(config, SETTINGS, LONGEST))


@pytest.mark.parametrize("value", [1e-3, float("nan")])
@pytest.mark.parametrize(("call", "reason"), [(0, "single row"), (1, "rows beside"), (2, "rows beside")])
def test_each_comparison_counts(call: int, reason: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, packed, with shared beginnings: a difference in one of them is enough."""
    found = iter([*[0.0] * call, value])
    monkeypatch.setattr(exactness, "_apart", lambda *_: next(found))
    assert reason in str(why_not_exact(base_config(DEMO), SETTINGS, LONGEST))


@pytest.mark.parametrize(("call", "reason"), [(3, "two rows taken for one"), (4, "a wider window")])
def test_a_comparison_that_cannot_fail_is_refused(call: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([0.0, 0.0, 0.0, *[1.0] * (call - 3), 1e-3])
    monkeypatch.setattr(exactness, "_apart", lambda *_: next(found))
    why = str(why_not_exact(base_config(DEMO), SETTINGS, LONGEST))
    assert reason in why and "proves nothing" in why


def test_targets_of_lora_are_no_matter_of_the_base(tmp_path: Path) -> None:
    lora = DEMO.lora.model_copy(update={"targets": ("layers.20.self_attn.q_proj",)})
    check_exact(ARCHITECTURES["google/gemma-2-9b"], DEMO.model_copy(update={"lora": lora}), 1024, cache=tmp_path)


def test_a_base_that_passed_is_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ARCHITECTURES["google/gemma-2-9b"]
    began = time.process_time()
    check_exact(config, DEMO, 4096, cache=tmp_path)
    assert time.process_time() - began < 3
    calls: list[PretrainedConfig] = []

    def noted(*given: Any) -> str:
        calls.append(given[0])
        return "for some reason"

    monkeypatch.setattr(exactness, "why_not_exact", noted)
    began = time.process_time()
    check_exact(config, DEMO, 4096, cache=tmp_path)
    assert not calls and time.process_time() - began < 0.1
    for changed in (
        lambda: check_exact(config, DEMO.model_copy(update={"tune": "head"}), 4096, cache=tmp_path),
        lambda: check_exact(config, DEMO, 9000, cache=tmp_path),
        lambda: check_exact(ARCHITECTURES["google/gemma-2-2b"], DEMO, 4096, cache=tmp_path),
        lambda: check_exact(
            ARCHITECTURES["google/gemma-2-2b"], DEMO, 4096, cache=tmp_path
        ),  # a refusal is not remembered
    ):
        calls.clear()
        with pytest.raises(ValueError, match="for some reason"):
            changed()
        assert calls
    for where, name, value in (
        (exactness.transformers, "__version__", "another"),
        (exactness, "_code", lambda: "other"),
    ):
        with monkeypatch.context() as changed_here, pytest.raises(ValueError, match="for some reason"):
            changed_here.setattr(where, name, value)
            check_exact(config, DEMO, 4096, cache=tmp_path)


def test_a_cache_that_cannot_be_written_costs_no_judge(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_exact(base_config(DEMO), DEMO, 1024, cache=tmp_path / "file" / "cache")


def test_the_run_s_random_numbers_and_threads_stay_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    check_exact(base_config(DEMO), DEMO, 1024, cache=tmp_path)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


@pytest.mark.slow
def test_every_sequence_classifier_of_transformers_is_exact_or_refused() -> None:
    """The page holds what is found here and now."""
    found = verdicts()
    assert PAGE.read_text(encoding="utf-8") == page(found)
    assert sum(why is None for why in found.values()) >= 30
