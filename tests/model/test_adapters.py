"""Several judges on one base: each computes, to the bit, what it computes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from arena.model.adapters import activate, add_trained, judge_names, unload
from arena.model.classifier import PackedClassifier
from arena.model.tuning import load_trained, save_model
from arena.settings import ModelSettings
from arena.tasks.preference import CLASSES
from tests.helpers import classifier, exact, make_base, pack

BATCH = pack([40, 1, 9, 33])
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 4}},
    "narrow": {"lora": {"r": 2, "alpha": 3, "targets": ("q_proj", "down_proj")}},
    "dora": {"lora": {"r": 4, "dora": True}},
    "upper": {"lora": {"r": 3, "first_layer": 1}},
    "head": {"tune": "head"},
    "other head": {"tune": "head"},
}
TARGETS: dict[str, Any] = {"lora": "all-linear", "narrow": ("q_proj", "down_proj")}


def trained(folder: Path, base: Path, kind: str, **changes: Any) -> tuple[Path, ModelSettings]:
    """A judge of a kind, saved, and its settings."""
    settings = exact(base, **{**KINDS[kind], **changes})
    save_model(classifier(settings, seed=len(kind)).model, folder / kind)
    return folder / kind, settings


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return PackedClassifier(model)(BATCH)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("fuse", ["none", ("lora",)])
def test_each_judge_computes_what_it_computes_alone(
    first: str, quantization: str, fuse: Any, gemma2: Path, tmp_path: Path
) -> None:
    judges = {kind: trained(tmp_path, gemma2, kind, quantization=quantization, fuse=fuse) for kind in KINDS}
    alone = {kind: logits(load_trained(*judge, CLASSES)) for kind, judge in judges.items()}
    names = {"default": first, **{f"fold {kind}": kind for kind in KINDS if kind != first}}
    model = load_trained(*judges[first], CLASSES)
    for name, kind in names.items():
        if name != "default":
            model = add_trained(model, *judges[kind], name)
        assert torch.equal(logits(model), alone[first]), "the active judge stays active"
    assert set(judge_names(model)) == set(names)
    for name, kind in [*names.items(), *reversed(names.items())]:
        activate(model, name)
        assert [other for other, right in alone.items() if torch.equal(logits(model), right)] == [kind]
        assert not any(each.requires_grad for each in model.parameters()) and not model.training


@pytest.mark.parametrize("kind", ["narrow", "head"])
def test_an_unloaded_judge_takes_no_memory(kind: str, gemma2: Path, tmp_path: Path) -> None:
    model = load_trained(*trained(tmp_path, gemma2, "lora"), CLASSES)
    right, size = logits(model), sum(each.numel() for each in model.parameters())
    judge = trained(tmp_path, gemma2, kind)
    for _ in range(2):
        model = add_trained(model, *judge, "fold1")
        activate(model, "fold1")
        with pytest.raises(ValueError, match=r"not active can be unloaded \(default\): 'fold1'"):
            unload(model, "fold1")
        activate(model, "default")
        model = unload(model, "fold1")
        assert judge_names(model) == ["default"] and torch.equal(logits(model), right)
        assert sum(each.numel() for each in model.parameters()) == size


def test_the_first_of_several_can_be_unloaded(gemma2: Path, tmp_path: Path) -> None:
    judges = [trained(tmp_path, gemma2, kind) for kind in ("lora", "head", "narrow")]
    right = logits(load_trained(*judges[1], CLASSES))
    model = add_trained(load_trained(*judges[0], CLASSES), *judges[1], "fold1")
    activate(model, "fold1")
    model = unload(model, "default")
    assert not isinstance(model, PeftModel) and torch.equal(logits(model), right)
    for name in ("fold2", "fold3"):
        model = add_trained(model, *judges[2], name)
    model = unload(model, "fold2")  # peft's active adapter, though the head is
    assert torch.equal(logits(model), right)
    activate(model, "fold3")
    assert torch.equal(logits(model), logits(load_trained(*judges[2], CLASSES)))


def test_a_head_alone_needs_no_adapters(gemma2: Path, tmp_path: Path) -> None:
    model = load_trained(*trained(tmp_path, gemma2, "head"), CLASSES)
    assert not isinstance(add_trained(model, *trained(tmp_path, gemma2, "other head"), "fold1"), PeftModel)


@pytest.mark.parametrize(("kind", "other"), [("lora", "narrow"), ("narrow", "lora")])
@pytest.mark.parametrize("alone", [True, False])
def test_other_targets_than_those_that_were_trained_are_refused(
    kind: str, other: str, alone: bool, gemma2: Path, tmp_path: Path
) -> None:
    """Weights that are left out, and adapters without weights, would only change the numbers."""
    judge, settings = trained(tmp_path, gemma2, kind, lora=KINDS["lora"]["lora"] | {"targets": TARGETS[kind]})
    wrong = settings.model_copy(update={"lora": settings.lora.model_copy(update={"targets": TARGETS[other]})})
    with pytest.raises(ValueError, match=r"its weights and model\.lora differ in \d+ places"):
        if alone:
            load_trained(judge, wrong, CLASSES)
        else:
            add_trained(load_trained(*trained(tmp_path, gemma2, "dora"), CLASSES), judge, wrong, "fold1")


def test_what_cannot_share_a_base_is_refused(gemma2: Path, tmp_path: Path) -> None:
    model = load_trained(*trained(tmp_path, gemma2, "lora"), CLASSES)
    judge, settings = trained(tmp_path, gemma2, "narrow")
    whole = exact(gemma2, tune="full")
    save_model(classifier(whole).model, tmp_path / "whole")
    with pytest.raises(ValueError, match="contains all weights of a model"):
        add_trained(model, tmp_path / "whole", whole, "fold1")
    with pytest.raises(ValueError, match=r"needs model\.quantization=nf4, but the base was loaded with none"):
        add_trained(model, judge, settings.model_copy(update={"quantization": "nf4"}), "fold1")
    for name in ("", "r", "fold.1"):
        with pytest.raises(ValueError, match="is no name for a judge"):
            add_trained(model, judge, settings, name)
    with pytest.raises(ValueError, match="already a judge 'default'"):
        add_trained(model, judge, settings, "default")
    with pytest.raises(ValueError, match="no judge 'fold1' on this base: name one of default"):
        activate(model, "fold1")
    other = trained(tmp_path, make_base(tmp_path / "wider", hidden_size=96), "head")[0]
    with pytest.raises(ValueError, match="is damaged or belongs to another base"):
        add_trained(model, other, exact(gemma2, tune="head"), "fold1")
    assert judge_names(model) == ["default"]
    (judge / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        add_trained(model, judge, settings, "fold1")
