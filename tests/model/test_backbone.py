"""Loading, 4-bit weights, adapters, head: what is in which precision, what trains, what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from arena.config import recipe_names
from arena.model.backbone import backbone, load_base, load_tokenizer, underlying
from arena.model.card import card_of, with_dtype
from arena.model.classifier import PackedClassifier, loss_sum
from arena.model.safety import WEIGHTS
from arena.model.tuning import load_trained, save_model
from arena.packing.batch import PackedBatch, VarlenCollator, collate
from arena.settings import ModelSettings
from arena.tasks.preference import CLASSES
from arena.training.optimizer import trainable
from tests.helpers import classifier, exact, known_head, make_base, pack, recipe_on

LENGTHS = [20, 3, 11]


def recipe_model(name: str, base: Path) -> ModelSettings:
    return with_dtype(recipe_on(base, name), card_of("cpu")).model


@pytest.mark.parametrize("name", recipe_names())
def test_precision_of_every_recipe(name: str, gemma2: Path) -> None:
    settings = recipe_model(name, gemma2)
    model = classifier(settings).model
    assert backbone(model).rotary_emb.inv_freq.dtype == torch.float32
    named = trainable(model)
    assert {parameter.dtype for parameter in named.values()} == {torch.float32}
    assert any("score" in key for key in named) and any("lora_A" in key for key in named)
    assert all("score" in key or "lora_" in key for key in named)
    score = underlying(model).score
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in score.modules())
    layers = backbone(model).layers
    quantised = not name.startswith("gemma-3-270m")  # whose base was rounded to 4 bits before
    mlp = layers[0].mlp.up_proj
    for linear in (layers[-1].self_attn.q_proj.base_layer, getattr(mlp, "base_layer", mlp)):
        assert isinstance(linear, bnb.nn.Linear4bit) == quantised
        assert not quantised or (linear.weight.quant_state.nested and linear.weight.quant_type == "nf4")
    frozen = backbone(model).embed_tokens.weight
    assert frozen.dtype == getattr(torch, settings.dtype) and not frozen.requires_grad


def test_every_decoder_linear_layer_is_quantised_and_adapted(gemma2: Path) -> None:
    model = classifier(recipe_model("demo", gemma2)).model
    plain = [
        name
        for name, module in backbone(model).named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and not isinstance(module, bnb.nn.Linear4bit)
    ]
    assert plain == []
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in trainable(model) if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_fresh_head_gives_even_probabilities(gemma2: Path) -> None:
    model = PackedClassifier(load_base(exact(gemma2), CLASSES))
    assert torch.equal(model(pack(LENGTHS)), torch.zeros(3, 3))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_adapter_saved_and_loaded_gives_the_same_logits(gemma2: Path, quantization: str, tmp_path: Path) -> None:
    settings = exact(gemma2, quantization=quantization)
    model = classifier(settings).eval()
    save_model(model.model, tmp_path)
    names = {path.suffix for path in tmp_path.iterdir()}
    assert names == {".safetensors", ".json"}
    loaded = PackedClassifier(load_trained(tmp_path, settings, CLASSES))
    with torch.no_grad():
        torch.testing.assert_close(loaded(pack(LENGTHS)), model(pack(LENGTHS)), atol=1e-6, rtol=1e-6)


def test_fully_trained_model_saved_and_loaded_gives_the_same_logits(gemma2: Path, tmp_path: Path) -> None:
    settings = exact(gemma2, tune="full")
    model = classifier(settings).eval()
    save_model(model.model, tmp_path)
    loaded = PackedClassifier(load_trained(tmp_path, settings, CLASSES))
    with torch.no_grad():
        torch.testing.assert_close(loaded(pack(LENGTHS)), model(pack(LENGTHS)), atol=1e-6, rtol=1e-6)


def test_four_bit_weights_survive_an_evaluation(gemma2: Path) -> None:
    """An evaluation must not repack the weights: what is dequantised, merged or trained after it would be garbage."""
    settings = exact(gemma2, quantization="nf4")
    model = classifier(settings)
    linear = backbone(model.model).layers[0].mlp.up_proj.base_layer
    before = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).clone()
    batch = pack([64, 64])
    gradients = []
    for evaluated in (False, True):
        if evaluated:
            with torch.inference_mode():
                model.eval()(batch)
        model.train().zero_grad()
        loss_sum(model(batch), batch.label).backward()
        gradients.append(torch.cat([parameter.grad.reshape(-1) for parameter in trainable(model).values()]))
    after = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert torch.equal(before, after)
    assert torch.equal(*gradients)


def test_packed_four_bit_equals_one_by_one(gemma2: Path) -> None:
    """Also with 4-bit weights the layout of the rows does not change them, but for rounding."""
    model = classifier(exact(gemma2, quantization="nf4")).eval()
    batch = pack([30, 30, 30])
    rows = batch.input_ids[0].split(batch.seq_lens)
    with torch.no_grad():
        together = model(batch)
        alone = torch.cat([model(collate([{"input_ids": row.numpy()}])) for row in rows])
    assert (together - alone).abs().max() <= 1e-4


def with_head(base: Path, folder: Path, head: dict[str, torch.Tensor], **config: Any) -> Path:
    """A copy of a base whose weights file also holds those of a head, which its config describes."""
    shutil.copytree(base, folder)
    save_file(load_file(base / WEIGHTS) | head, folder / WEIGHTS, metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def labels(count: int) -> dict[str, Any]:
    return {"id2label": {str(at): f"LABEL_{at}" for at in range(count)}, "num_labels": count}


OTHER_HEADS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "reward model": (
        {"score.weight": torch.randn(1, 64)},
        {"architectures": ["Gemma2ForSequenceClassification"], "problem_type": "regression", **labels(1)},
        "score",
    ),
    "three labels": (
        {"score.weight": torch.randn(3, 64)},
        {"architectures": ["Gemma2ForSequenceClassification"], **labels(3)},
        "score",
    ),
    "token classifier": (
        {"score.weight": torch.randn(5, 64), "score.bias": torch.randn(5)},
        {"architectures": ["Gemma2ForTokenClassification"], **labels(5)},
        "score",
    ),
    "value head": ({"v_head.summary.weight": torch.randn(1, 64), "v_head.summary.bias": torch.randn(1)}, {}, "v_head"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_HEADS)
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_base_with_a_head_of_its_own_is_used_without_it(
    name: str, quantization: str, gemma2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, config, said = OTHER_HEADS[name]
    base = with_head(gemma2, tmp_path / "base", head, **config)
    settings = exact(base, quantization=quantization)
    fresh = load_base(settings, CLASSES, announce=True)
    assert f"has a head of its own ({said}), which is not used" in capsys.readouterr().out
    assert fresh.score.weight.shape == (3, 64) and not fresh.score.weight.any() and fresh.score.bias is None
    assert fresh.config.num_labels == 3 and fresh.config.problem_type is None
    plain = load_base(exact(gemma2, quantization=quantization), CLASSES)
    found, expected = (known_head(model)(pack(LENGTHS)) for model in (fresh, plain))
    assert torch.equal(found, expected) and found.abs().max() > 0.1


def test_a_plain_base_has_no_head_to_leave_out(gemma2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_base(exact(gemma2), CLASSES, announce=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_another_shape_below_the_head_is_named(quantization: str, name: str, gemma2: Path, tmp_path: Path) -> None:
    wrong = {name: load_file(gemma2 / WEIGHTS)[name][:-2].clone()}
    base = with_head(gemma2, tmp_path / "base", {"score.weight": torch.randn(1, 64), **wrong})
    with pytest.raises(ValueError, match=rf"has {name} of shape \({wrong[name].shape[0]},.*config.json"):
        load_base(exact(base, quantization=quantization), CLASSES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"attention_mask": torch.ones(1, 4, dtype=torch.long)}, "not accept attention_mask"),
        ({"use_cache": True}, "use_cache=False"),
        ({"position_ids": None}, "needs position_ids"),
    ],
)
def test_mask_and_cache_are_refused(gemma2: Path, call: dict[str, object], message: str) -> None:
    model = backbone(load_base(exact(gemma2), CLASSES))
    ends = torch.tensor([0, 4], dtype=torch.int32)
    good = {
        "input_ids": torch.arange(10, 14)[None], "position_ids": torch.arange(4)[None], "use_cache": False,
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4,
    }  # fmt: skip
    assert model(**good).last_hidden_state.shape == (1, 4, 64)
    with pytest.raises(ValueError, match=message):
        model(**{**good, **call})
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(**{**{key: value for key, value in good.items() if "len" not in key}, "cu_seqlens": ends})


def tensors(batch: PackedBatch) -> dict[str, object]:
    """What a model that knows plain variable-length batches alone would be given of a batch."""
    return {
        "input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False,
        "cu_seq_lens_q": batch.cu_seqlens_q, "cu_seq_lens_k": batch.cu_seqlens_q,
        "max_length_q": batch.max_segment_len, "max_length_k": batch.max_segment_len,
    }  # fmt: skip


def test_a_shared_batch_without_its_keys_is_refused(gemma2: Path) -> None:
    """By any door: the classifier of transformers, its decoder, with kv_index left out or None."""
    model = load_base(exact(gemma2), CLASSES)
    begin = list(range(10, 60))
    [shared] = VarlenCollator(share=True)([{"input_ids": [*begin, 1]}, {"input_ids": [*begin, 2, 3]}])
    for call in (model, backbone(model)):
        for more in ({}, {"kv_index": None}):
            with pytest.raises(ValueError, match=r"without kv_index each segment .*packing\.share=false"):
                call(**tensors(shared), **more)
    right = {"cu_seq_lens_k": shared.cu_seqlens_k, "max_length_k": shared.max_seq_len, "kv_index": shared.kv_index}
    backbone(model)(**{**tensors(shared), **right})
    backbone(model)(**tensors(pack(LENGTHS)))


def test_a_missing_base_is_an_error_that_says_how_to_get_it(tmp_path: Path) -> None:
    for base in ("google/no-such-model", str(tmp_path / "nothing")):
        with pytest.raises(ValueError, match=r"model\.base"):
            load_base(exact(Path(base)), CLASSES)
        with pytest.raises(ValueError, match=r"model\.base"):
            load_tokenizer(base)
    with pytest.raises(ValueError, match="hf auth login"):
        load_tokenizer("google/no-such-model")


def test_other_head_dim_and_single_kv_head(tmp_path: Path) -> None:
    base = make_base(tmp_path, head_dim=16, num_key_value_heads=1, query_pre_attn_scalar=16)
    assert torch.isfinite(PackedClassifier(load_base(exact(base), CLASSES))(pack(LENGTHS))).all()


def test_a_library_that_repacks_all_the_same_is_refused(gemma2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a rename of what switches it off. Unquantised bases need none of it."""
    whole = bnb.nn.Linear4bit.forward

    def repacking(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = whole(self, x)
        if not self.training:
            self.weight.data = self.weight.data.flip(0)
        return out

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", repacking)
    with pytest.raises(ValueError, match=r"bitsandbytes .* changes 4-bit weights in place.*quantization=none"):
        load_base(ModelSettings(base=str(gemma2), dtype="float32"), CLASSES)
    load_base(exact(gemma2), CLASSES)


def test_loading_a_base_is_quiet(
    gemma2: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also for those who use the modules: the head that every base lacks is no news. What the user set comes back."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.set_verbosity_warning()
        transformers_logging.enable_progress_bar()
        load_base(exact(gemma2), CLASSES)
        assert (caplog.text, *capfd.readouterr()) == ("", "", "")
        assert transformers_logging.get_verbosity() == logging.WARNING
        AutoModelForSequenceClassification.from_pretrained(gemma2)  # the control
        assert caplog.text + capfd.readouterr().err != ""  # what depends on the version: a table, a bar
    finally:
        transformers_logging.set_verbosity(level)
        (transformers_logging.enable_progress_bar if bar else transformers_logging.disable_progress_bar)()


def test_dropout_in_attention_is_turned_off_and_reported(
    gemma2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(gemma2, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    model = load_base(exact(base), CLASSES, announce=True).train()
    assert "attention dropout of 0.1, which is not used" in capsys.readouterr().out
    assert model.config.attention_dropout == 0.0 and model.model.layers[0].self_attn.attention_dropout == 0.0


def test_of_bitsandbytes_one_note_is_left_out() -> None:
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
    assert logging.getLogger("bitsandbytes.cextension").isEnabledFor(logging.WARNING)
