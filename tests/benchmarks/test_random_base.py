"""Random bases: as if they had been loaded, of the published sizes, drawn anew by seed and name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from arena.config import recipe_names
from arena.model.backbone import backbone, load_base, underlying
from arena.model.card import card_of, with_dtype
from arena.model.classifier import PackedClassifier, loss_sum
from arena.model.families import ARCHITECTURES
from arena.model.last_layer import takes_last_token
from arena.model.tuning import adapt
from arena.settings import ModelSettings
from arena.tasks.preference import CLASSES
from arena.training.optimizer import trainable
from benchmarks.random_base import create_base
from tests.helpers import CONFIGS, exact, make_base, pack, recipe_on

QUANTISED = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt, "none": nn.Linear}
FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "name_or_path", "training")


def created(settings: ModelSettings, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random base of the size of a loaded one."""
    config: PretrainedConfig = AutoConfig.from_pretrained(settings.base)
    for name, value in changes.items():
        setattr(config, name, value)
    return create_base(config, settings, CLASSES, "cpu", seed)


@pytest.mark.parametrize(
    ("name", "count"), [("google/gemma-2-2b-it", 2_614_341_888), ("google/gemma-2-9b-it", 9_241_705_984)]
)
def test_architectures_have_the_published_number_of_weights(name: str, count: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name])
    model.tie_weights()  # the first versions of transformers 5 do not, where there is no memory for the weights
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert ARCHITECTURES[name] is ARCHITECTURES[name.removesuffix("-it")]
    windows = [kind == "sliding_attention" for kind in model.config.layer_types]
    assert windows == [True, False] * (len(windows) // 2)


@pytest.mark.parametrize("quantization", QUANTISED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_created_is_as_loaded(gemma2: Path, quantization: str, dtype: str) -> None:
    settings = exact(gemma2, quantization=quantization, dtype=dtype)
    ours, loaded = created(settings), load_base(settings, CLASSES)
    assert isinstance(backbone(ours).layers[0].mlp.up_proj, QUANTISED[quantization])
    for flag in FLAGS:
        assert getattr(ours, flag, None) == getattr(loaded, flag, None), flag
    assert ours.config.to_dict() == loaded.config.to_dict()
    assert takes_last_token(backbone(ours)) and takes_last_token(backbone(loaded))
    assert len(backbone(ours)._forward_pre_hooks) == len(backbone(loaded)._forward_pre_hooks) == 1
    assert [(name, type(each)) for name, each in ours.named_modules()] == [
        (name, type(each)) for name, each in loaded.named_modules()
    ]
    assert described(ours) == described(loaded)
    for (name, buffer), (_, other) in zip(ours.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(buffer, other) and buffer.dtype == other.dtype, name
    if quantization != "none":
        assert vars(ours.hf_quantizer.quantization_config) == vars(loaded.hf_quantizer.quantization_config)


def described(model: nn.Module) -> list[tuple[object, ...]]:
    """Every parameter's name, type, shape and dtype, how it is quantised, and every key of the state dict."""
    found: list[tuple[object, ...]] = []
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        how = (state.nested, state.quant_type, state.blocksize, state.dtype, state.shape) if state is not None else ()
        found.append((name, type(parameter), parameter.shape, parameter.dtype, parameter.requires_grad, *how))
    return found + [(key, value.dtype) for key, value in model.state_dict().items()]


def loaded(settings: ModelSettings) -> PreTrainedModel:
    return load_base(settings, CLASSES)


@pytest.mark.parametrize("make", [loaded, created])
@pytest.mark.parametrize("name", recipe_names())
def test_precision_in_every_recipe(gemma2: Path, name: str, make: Callable[[ModelSettings], PreTrainedModel]) -> None:
    settings = with_dtype(recipe_on(gemma2, name), card_of("cpu")).model
    model = adapt(make(settings), settings)
    decoder, score = backbone(model), underlying(model).score
    assert decoder.embed_tokens.weight.dtype == decoder.norm.weight.dtype == getattr(torch, settings.dtype)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert not any(isinstance(each, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for each in score.modules())
    assert torch.equal(score.weight, torch.zeros(3, 64)) and score.weight.dtype == torch.float32
    right = 10000.0 ** -(torch.arange(0, 32, 2).float() / 32)
    for buffer in (decoder.rotary_emb.inv_freq, decoder.rotary_emb.original_inv_freq):
        assert buffer.dtype == torch.float32
        torch.testing.assert_close(buffer, right)
        assert not torch.allclose(buffer.bfloat16().float(), right, rtol=1e-4)  # as a cast of the model would leave it


@pytest.mark.parametrize("quantization", QUANTISED)
def test_created_is_trained_and_all_its_adapters_learn(gemma2: Path, quantization: str) -> None:
    settings = exact(gemma2, quantization=quantization, dtype="bfloat16", checkpointing="full")
    model = adapt(created(settings, initializer_range=0.1), settings).train()
    batch = pack([20, 3, 11])
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "score" in name else 0.05))
    with torch.autocast("cpu", torch.bfloat16):
        logits = PackedClassifier(model)(batch)
    loss_sum(logits, batch.label).backward()
    assert torch.isfinite(logits).all() and logits.std() > 0.01
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


@pytest.mark.parametrize("family", CONFIGS)
def test_norms_and_biases_start_as_the_family_has_them(family: str, tmp_path: Path) -> None:
    settings = exact(make_base(tmp_path, family))
    ours, loaded = created(settings).state_dict(), load_base(settings, CLASSES).state_dict()
    small = [name for name, value in ours.items() if value.ndim == 1]
    assert len(small) >= 7 and list(ours) == list(loaded)
    for name in small:  # the loaded base was never trained
        assert torch.equal(ours[name], loaded[name]), name


def test_weights_follow_seed_name_and_scale(gemma2: Path) -> None:
    settings = exact(gemma2)
    first, again, other = (weights(created(settings, seed)) for seed in (0, 0, 1))
    wide = weights(created(settings, 0, initializer_range=0.5))
    for name, weight in first.items():
        assert torch.equal(weight, again[name]) and not torch.equal(weight, other[name])
        assert abs(float(weight.mean())) < 0.002 and abs(float(weight.std()) - 0.02) < 0.002, name
        torch.testing.assert_close(wide[name], weight * 25)
    flat = [weight.flatten()[:1000] for weight in first.values()]
    for at, one in enumerate(flat):
        assert not any(torch.equal(one, two) for two in flat[:at])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if value.ndim > 1 and "score" not in name}


def test_quantised_weights_are_those_drawn(gemma2: Path) -> None:
    """Four bits keep a normal weight to 10% or so; the weights of another seed are nothing like it."""
    drawn, other = (created(exact(gemma2), seed).model.layers[1].mlp.up_proj.weight for seed in (0, 1))
    weight = created(exact(gemma2, quantization="nf4")).model.layers[1].mlp.up_proj.weight
    kept = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert (kept - drawn).norm() < 0.12 * drawn.norm()
    assert (kept - other).norm() > drawn.norm()


def test_a_config_is_not_changed(gemma2: Path) -> None:
    config = AutoConfig.from_pretrained(gemma2)
    before = config.to_dict()
    create_base(config, exact(gemma2), CLASSES, "cpu", 0)
    assert config.to_dict() == before
