"""Techniques of fine-tuning: what trains, in which precision, what is kept for the backward, saved and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForSequenceClassification

from arena.distributed import compute_in
from arena.inference.export import export_judge
from arena.inference.judge_model import JudgeModel
from arena.inference.saved import SavedJudge, save_judge
from arena.model.backbone import backbone, load_base, load_tokenizer, underlying
from arena.model.base_files import base_digest
from arena.model.card import Card
from arena.model.classifier import PackedClassifier, loss_sum
from arena.model.tuning import adapt, load_trained, save_model
from arena.settings import ModelSettings
from arena.tasks.preference import CLASSES
from arena.training.optimizer import trainable
from tests.helpers import classifier, exact, pack, tiny_recipe

LENGTHS = [20, 3, 11]
DORA = {"lora": {"dora": True}}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "full": {"tune": "full"},
    "head": {"tune": "head"},
    "head over nf4": {"tune": "head", "quantization": "nf4"},
    "lora": {},
    "nf4": {"quantization": "nf4"},
    "int8": {"quantization": "int8"},
    "upper": {"lora": {"first_layer": 1}},
    "two over nf4": {"lora": {"layers": (0, 2)}, "quantization": "nf4"},
    "dora": DORA,
    "dora over nf4": {**DORA, "quantization": "nf4"},
    "dora over int8": {**DORA, "quantization": "int8"},
}
every_technique = pytest.mark.parametrize("name", TECHNIQUES)


def settings_of(name: str, base: Path, **changes: Any) -> ModelSettings:
    return exact(base, **{**TECHNIQUES[name], **changes})


def gradients(model: nn.Module, dtype: str = "float32") -> dict[str, Tensor]:
    batch = pack(LENGTHS)
    with compute_in(torch.device("cpu"), dtype):
        logits = model(batch)
    loss_sum(logits, batch.label).backward()
    return {name: each.grad.clone() for name, each in trainable(model).items() if each.grad is not None}


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@every_technique
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_trains_is_float32_and_gets_a_gradient(gemma2: Path, name: str, dtype: str) -> None:
    model = classifier(settings_of(name, gemma2, dtype=dtype))
    named = trainable(model)
    assert {each.dtype for each in named.values()} == {torch.float32}
    found = gradients(model, dtype)
    assert found.keys() == named.keys()
    assert all(torch.isfinite(each).all() and each.any() for each in found.values())
    adapters = {"lora_A", "lora_B", "lora_magnitude_vector"} if "dora" in name else {"lora_A", "lora_B"}
    kinds = {part for key in named for part in key.split(".") if part.startswith("lora_") or part == "score"}
    expected = {"full": {"score"}, "head": {"score"}}.get(name.split()[0], adapters | {"score"})
    assert kinds == expected
    assert (len(named) == len(list(model.parameters()))) == (name == "full")
    assert type(underlying(model.model).score) is not bnb.nn.Linear8bitLt


@every_technique
def test_saved_and_loaded_gives_the_same_logits(gemma2: Path, tmp_path: Path, name: str) -> None:
    settings = settings_of(name, gemma2)
    model = classifier(settings).eval()
    save_model(model.model, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json"}
    loaded = PackedClassifier(load_trained(tmp_path, settings, CLASSES))
    fresh = PackedClassifier(adapt(load_base(settings, CLASSES), settings)).eval()
    with torch.no_grad():
        ours = model(pack(LENGTHS))
        torch.testing.assert_close(loaded(pack(LENGTHS)), ours, atol=1e-6, rtol=1e-6)
        assert difference(fresh(pack(LENGTHS)), ours) > 0.1


def test_a_head_is_saved_alone(gemma2: Path, tmp_path: Path) -> None:
    save_model(classifier(settings_of("head", gemma2)).model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]
    assert (tmp_path / "head.safetensors").stat().st_size < 3 * 64 * 4 + 200


@pytest.mark.parametrize("name", ["head", "head over nf4", "dora", "dora over nf4", "int8", "two over nf4"])
def test_exported_gives_the_same_logits(gemma2: Path, tmp_path: Path, name: str) -> None:
    """To 1e-4; 8-bit layers, which also round their inputs, to that rounding, and a base alone is far from both."""
    recipe = tiny_recipe(tmp_path, gemma2)
    recipe = recipe.model_copy(update={"model": settings_of(name, gemma2)})
    model = classifier(recipe.model).eval()
    batch = pack(LENGTHS)
    with torch.no_grad():
        ours = model(batch)
    tokenizer, digest = load_tokenizer(str(gemma2)), base_digest(str(gemma2))
    save_judge(model.model, tokenizer, SavedJudge(tmp_path / "judge", recipe, np.full(3, 1 / 3), "x", digest))
    export_judge(tmp_path / "judge", tmp_path / "plain", dtype="float32")
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "plain", dtype="float32", attn_implementation="eager"
    )
    with torch.no_grad():
        theirs = torch.cat([plain(input_ids=row[None]).logits for row in batch.input_ids[0].split(batch.seq_lens)])
        plain.score.weight.mul_(1.2)
        wrong = torch.cat([plain(input_ids=row[None]).logits for row in batch.input_ids[0].split(batch.seq_lens)])
    limit = 0.1 if name == "int8" else 1e-4
    assert difference(theirs, ours) < limit < difference(wrong, ours)


class Kept:
    """Counts the numbers that a forward keeps for the backward."""

    def __init__(self) -> None:
        self.numbers = 0

    def __enter__(self) -> Kept:
        self.hooks = saved_tensors_hooks(self.count, lambda kept: kept)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def count(self, tensor: Tensor) -> Tensor:
        self.numbers += tensor.numel()
        return tensor


def test_a_head_keeps_nothing_of_the_backbone(gemma2: Path) -> None:
    """The last tokens' states, the logits and what the loss needs of them; with adapters it is all the activations."""
    kept = {}
    batch = pack([40, 30, 20])
    for name in ("head", "head over nf4", "lora"):
        model = classifier(settings_of(name, gemma2)).train()
        with Kept() as count:
            loss_sum(model(batch), batch.label)
        kept[name] = count.numbers
        assert any(each.requires_grad for each in backbone(model.model).parameters()) == (name == "lora")
    head = 3 * 64 + 3 * 64 + 4 * 3 * 3  # states, weights, and a few tables of 3 x 3
    assert kept["head"] == kept["head over nf4"] <= head
    assert kept["lora"] > 100 * head


def test_a_head_gets_the_gradient_that_it_has_with_all_weights_training(gemma2: Path) -> None:
    found = [gradients(classifier(settings_of(name, gemma2)))["model.score.weight"] for name in ("head", "head")]
    whole = classifier(settings_of("full", gemma2))
    head = classifier(settings_of("head", gemma2))
    whole.load_state_dict(head.state_dict())
    assert torch.equal(*found)
    assert difference(found[0], gradients(whole)["model.score.weight"]) < 1e-6


def test_eight_bit_layers_are_close_to_the_weights(gemma2: Path) -> None:
    """Forward and backward, in training and after an evaluation; the head stays as it is. NF4 is the coarse control."""
    found = {}
    for quantization in ("none", "int8", "nf4"):
        model = classifier(exact(gemma2, quantization=quantization)).train()
        first = gradients(model)
        with torch.inference_mode():
            model.eval()(pack(LENGTHS))
        model.train().zero_grad()
        again = gradients(model)
        assert all(torch.equal(first[name], again[name]) for name in first)
        found[quantization] = torch.cat([each.reshape(-1) for each in first.values()])
        linear = backbone(model.model).layers[0].mlp.up_proj.base_layer
        assert isinstance(linear, bnb.nn.Linear8bitLt) == (quantization == "int8")
        score = underlying(model.model).score
        assert not any(isinstance(each, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit) for each in score.modules())
    close, coarse = (difference(found[name], found["none"]) for name in ("int8", "nf4"))
    assert 0 < close < 0.5 * coarse


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["dora", "dora over nf4", "dora over int8"])
def test_fresh_dora_starts_as_its_base(gemma2: Path, name: str, dtype: str) -> None:
    settings = settings_of(name, gemma2, dtype=dtype)
    base, dora = load_base(settings, CLASSES), adapt(load_base(settings, CLASSES), settings)
    hidden = torch.randn(5, 64, dtype=getattr(torch, dtype))
    layers = [backbone(model).layers[0].mlp.up_proj for model in (base, dora)]
    with torch.no_grad(), compute_in(torch.device("cpu"), dtype):
        straight, changed = (layer(hidden) for layer in layers)
        assert changed.dtype == straight.dtype
        assert torch.equal(changed, straight)
        layers[1].lora_magnitude_vector["default"].weight.mul_(1.5)
        torch.testing.assert_close(layers[1](hidden), 1.5 * straight, rtol=1e-2, atol=1e-2)


def test_dora_is_that_of_peft(gemma2: Path) -> None:
    """Logits and gradients equal those of peft's own layers. Without the lengths, as plain LoRA, they do not."""
    ours, theirs, plain = (classifier(settings_of("dora", gemma2)) for _ in range(3))
    for module in theirs.modules():
        for adapter in getattr(module, "lora_variant", {}):
            module.lora_variant[adapter] = DoraLinearVariant()
    for module in plain.modules():
        getattr(module, "lora_variant", {}).clear()
    batch = pack(LENGTHS)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs(batch), atol=1e-5, rtol=1e-5)
        assert difference(plain(batch), theirs(batch)) > 1e-2
    expected = gradients(theirs)
    for name, each in gradients(ours).items():
        assert difference(each, expected[name]) < 1e-4, name


def test_a_judge_of_another_card(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained in bfloat16, read where there is none: refused, and run with the override that the message names."""
    recipe = tiny_recipe(tmp_path, gemma2, "model.dtype=bfloat16")
    model = adapt(load_base(recipe.model, CLASSES), recipe.model)
    digest = base_digest(recipe.model.base)
    save_judge(
        model, load_tokenizer(str(gemma2)), SavedJudge(tmp_path / "judge", recipe, np.full(3, 1 / 3), "x", digest)
    )
    assert JudgeModel(tmp_path / "judge").recipe.model.dtype == "bfloat16"
    monkeypatch.setattr(
        "arena.inference.judge_model.card_of", lambda device: Card("cuda", "Tesla T4", (7, 5), 16 << 30)
    )
    with pytest.raises(ValueError, match=r"model\.dtype=float16"):
        JudgeModel(tmp_path / "judge")
    judge = JudgeModel(tmp_path / "judge", ["model.dtype=float16"])
    assert backbone(judge.classifier.model).embed_tokens.weight.dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_technique
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_technique_trains_on_a_gpu(gemma2: Path, name: str, dtype: str) -> None:
    model = classifier(settings_of(name, gemma2, dtype=dtype, attention="blockwise")).to("cuda").train()
    batch = pack(LENGTHS).to("cuda")
    with compute_in(torch.device("cuda"), dtype):
        logits = model(batch)
    loss_sum(logits, batch.label).backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(each.grad).all() and each.grad.any() for each in trainable(model).values())
