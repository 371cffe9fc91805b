"""Bases whose checkpoint is stored quantised: used as it is stored, in the dtype of the recipe, or refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from arena.inference.export import export_judge
from arena.inference.saved import SavedJudge, save_judge
from arena.model.backbone import base_config, load_base, load_tokenizer
from arena.model.base_files import base_digest
from arena.model.safety import WEIGHTS
from arena.settings import ModelSettings
from arena.tasks.preference import CLASSES
from arena.training.run import run_fold
from benchmarks.random_base import create_base
from tests.helpers import classifier, exact, known_head, pack, tiny_recipe

LENGTHS = [20, 3, 11]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
STORED: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4 in bfloat16 words": {**NF4, "bnb_4bit_quant_storage": torch.bfloat16},
    "nf4 but for the head": {**NF4, "llm_int8_skip_modules": ["lm_head"]},
    "nf4 with an empty list": {**NF4, "llm_int8_skip_modules": []},
    "int8": {"load_in_8bit": True},
}


def store(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """A copy of a base that is stored quantised."""
    config = BitsAndBytesConfig(**how)
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    return folder


@pytest.fixture(scope="module")
def bases(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: store(gemma2, tmp_path_factory.mktemp("stored"), **how) for name, how in STORED.items()}


def kind(name: str) -> str:
    return name.split()[0]


@pytest.mark.parametrize("name", STORED)
def test_it_is_the_base_quantised_here(name: str, gemma2: Path, bases: dict[str, Path]) -> None:
    """Stored from the same float32 weights, it gives the same logits to the last bit."""
    with torch.no_grad():
        stored = classifier(exact(bases[name], quantization=kind(name))).eval()(pack(LENGTHS))
        ours = classifier(exact(gemma2, quantization=kind(name))).eval()(pack(LENGTHS))
    if "words" in name and Version(transformers.__version__) < Version("5.8"):  # 5.0, which writes them, rounds first
        torch.testing.assert_close(stored, ours, atol=0.01, rtol=0)
    else:
        assert torch.equal(stored, ours)
    assert ours.abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", STORED)
def test_every_weight_is_in_the_dtype_of_the_recipe(name: str, dtype: str, bases: dict[str, Path]) -> None:
    model = load_base(exact(bases[name], quantization=kind(name), dtype=dtype), CLASSES)
    expected = getattr(torch, dtype)
    layers = [each for each in model.modules() if isinstance(each, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    assert len(layers) == 21
    if kind(name) == "nf4":
        assert {layer.compute_dtype for layer in layers} == {expected}
        assert {layer.weight.quant_state.dtype for layer in layers} == {expected}
    packed = {id(layer.weight) for layer in layers}
    others = {key: each.dtype for key, each in model.named_parameters() if id(each) not in packed}
    assert others.pop("score.weight") == torch.float32
    assert set(others.values()) == {expected}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def refusals() -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """What a config says of its weights, the settings, and the message."""
    unquantised = "use the unquantised model as the base"
    nf4 = {**NF4, "quant_method": "bitsandbytes"}
    for asked in ("none", "int8"):
        needed = rf"cannot be loaded with model\.quantization={asked}: set model\.quantization=nf4, or {unquantised}"
        yield nf4, {"quantization": asked}, needed
    needed = rf"set model\.quantization=nf4 and model\.tune=lora, or {unquantised}"
    yield nf4, {"quantization": "none", "tune": "full"}, needed
    yield {"load_in_8bit": True}, {"quantization": "nf4"}, r"\(int8\).* set model\.quantization=int8, or"
    yield {"load_in_4bit": True}, {"quantization": "nf4"}, rf"\(fp4\), which is not supported: {unquantised}"
    for method in ("gptq", "awq", "fp8", "hqq"):
        for asked in ("none", "nf4"):
            yield {"quant_method": method}, {"quantization": asked}, rf"\({method}\), which is not supported"


@pytest.mark.parametrize(("stored", "settings", "message"), refusals())
def test_unsuitable_stored_quantisation_is_refused_from_the_config_alone(
    stored: dict[str, Any], settings: dict[str, Any], message: str, gemma2: Path, tmp_path: Path
) -> None:
    config = json.loads((gemma2 / "config.json").read_text()) | {"quantization_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        base_config(ModelSettings(base=str(tmp_path), **settings))


def test_it_is_refused_before_data_are_prepared(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, bases["nf4"], "model.quantization=none", "model.tune=full")
    with pytest.raises(ValueError, match="stored quantised"):
        run_fold(recipe, 0, tmp_path / "runs")
    assert not (tmp_path / "cache").exists() and not list(tmp_path.rglob("recipe.yaml"))


def test_weights_that_are_not_as_the_config_says_are_named(
    gemma2: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(bases["nf4"], tmp_path / "base")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {key: each for key, each in load_file(bases["nf4"] / WEIGHTS).items() if not key.startswith(name)}
    tensors[name] = load_file(gemma2 / WEIGHTS)[name]
    save_file(tensors, tmp_path / "base" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"an unquantised {name}"):
        load_base(exact(tmp_path / "base", quantization="nf4"), CLASSES)


@pytest.mark.parametrize("skip", [None, ["lm_head"], []])
def test_a_reward_model_that_is_stored_quantised(skip: list[str] | None, gemma2: Path, tmp_path: Path) -> None:
    """Its head is left out, also one that is stored in 4 bits."""
    config = BitsAndBytesConfig(**NF4, llm_int8_skip_modules=skip)
    reward = AutoModelForSequenceClassification.from_pretrained(gemma2, num_labels=1, dtype=torch.float32)
    reward.save_pretrained(tmp_path / "reward")
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", quantization_config=config)
    reward.save_pretrained(tmp_path)
    assert ("score.weight.absmax" in load_file(tmp_path / WEIGHTS)) == (skip is not None)
    with torch.no_grad():
        found = known_head(load_base(exact(tmp_path, quantization="nf4"), CLASSES))(pack(LENGTHS))
        expected = known_head(load_base(exact(gemma2, quantization="nf4"), CLASSES))(pack(LENGTHS))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tune", ["lora", "head"])
@pytest.mark.parametrize("name", ["nf4", "nf4 in bfloat16 words", "int8"])
def test_exported_gives_the_same_logits(name: str, tune: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """To 1e-4; 8-bit layers, which also round their inputs, to that rounding."""
    recipe = tiny_recipe(tmp_path, bases[name])
    settings = exact(bases[name], quantization=kind(name), tune=tune)
    recipe = recipe.model_copy(update={"model": settings})
    model = classifier(settings).eval()
    batch = pack(LENGTHS)
    with torch.no_grad():
        ours = model(batch)
    prior, digest = np.full(3, 1 / 3), base_digest(settings.base)
    save_judge(model.model, load_tokenizer(settings.base), SavedJudge(tmp_path / "judge", recipe, prior, "x", digest))
    export_judge(tmp_path / "judge", tmp_path / "plain", dtype="float32")
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "plain", dtype="float32", attn_implementation="eager"
    )
    assert not hasattr(plain.config, "quantization_config")
    with torch.no_grad():
        rows = batch.input_ids[0].split(batch.seq_lens)
        theirs = torch.cat([plain(input_ids=row[None]).logits for row in rows])
        plain.score.weight.mul_(1.2)
        wrong = torch.cat([plain(input_ids=row[None]).logits for row in rows])
    limit = 0.1 if name == "int8" else 1e-4
    assert (theirs - ours).norm() / ours.norm() < limit < (wrong - ours).norm() / ours.norm()


def test_random_weights_of_its_architecture_are_quantised_here(bases: dict[str, Path]) -> None:
    settings = exact(bases["nf4"], quantization="nf4")
    model = create_base(base_config(settings), settings, CLASSES, "cpu", seed=0)
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
