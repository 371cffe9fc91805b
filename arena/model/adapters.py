"""Several trained judges on one loaded base, of which one is active at a time.

Judges of different folds, or with different LoRA settings, differ in their adapters and heads only. The first is loaded
by `load_trained` and named `FIRST`; others are added to it, and switching to one of them loads nothing. A judge of
which only the head was trained runs with all adapters disabled.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from arena.model.backbone import backbone, underlying
from arena.model.lora import fuse_lora, install_dora
from arena.model.memory.fused import fuses_lora
from arena.model.tuning import HEAD_FILE, LOADED_WITH, is_whole, load_head, with_adapter
from arena.settings import ModelSettings

FIRST = "default"  # peft's name for a model's first adapter
SHARED = ("base", "revision", "quantization", "dtype", "attention", "fuse")  # settings that the loaded base fixes
JUDGES = "arena_judges"  # the attribute of a model that holds its `_Judges`


@dataclass
class _Judges:
    """The active judge, and the head weights of those of which only the head was trained."""

    active: str
    heads: dict[str, Tensor] = field(default_factory=dict)


def add_trained(model: PreTrainedModel, folder: Path, settings: ModelSettings, name: str) -> PreTrainedModel:
    """Adds the judge that `save_model` wrote to a model loaded by `load_trained`; the active judge stays active.

    Args:
        settings: of the added judge. The base must be the one that was loaded; LoRA settings may differ.
        name: for `activate`; without a dot.

    Returns:
        The model with both judges, which replaces the one passed in.

    Raises:
        ValueError: the name is taken or unsuitable, the judge contains all weights of a model or needs a base loaded
            with other settings, or its weights are damaged, after which the model must be loaded anew.
    """
    judges = _judges(model)
    _check_name(model, name)
    if is_whole(folder):
        raise ValueError(f"{folder} contains all weights of a model and shares no base: load it on its own")
    loaded: ModelSettings = getattr(underlying(model), LOADED_WITH)
    if (key := incompatible_setting(settings, loaded)) is not None:
        raise ValueError(
            f"{folder} needs model.{key}={getattr(settings, key)}, but the base was loaded with "
            f"{getattr(loaded, key)}: load this judge on its own"
        )
    if (folder / HEAD_FILE).is_file():
        head = deepcopy(_plain_head(model))
        load_head(head, folder / HEAD_FILE)
        judges.heads[name] = head.weight.detach()
        return model
    model = with_adapter(model, folder, settings, name)
    install_dora(model, fresh=False)
    if fuses_lora(settings.fuse):
        fuse_lora(backbone(model))
    activate(model, judges.active)
    return model.eval()


def incompatible_setting(settings: ModelSettings, loaded: ModelSettings) -> str | None:
    """The first setting because of which a judge cannot use a base that was loaded with `loaded`; None if it can."""
    return next((key for key in SHARED if getattr(settings, key) != getattr(loaded, key)), None)


def activate(model: PreTrainedModel, name: str) -> None:
    """Makes a model compute the logits of the judge with this name.

    Raises:
        ValueError: there is no such judge.
    """
    judges = _judges(model)
    if name not in judge_names(model):
        raise ValueError(f"there is no judge {name!r} on this base: name one of {', '.join(judge_names(model))}")
    if name in judges.heads:
        if isinstance(model, PeftModel):
            model.base_model.disable_adapter_layers()
        with torch.no_grad():
            _plain_head(model).weight.copy_(judges.heads[name])
    else:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name)
    model.requires_grad_(False)  # peft makes an active adapter trainable
    judges.active = name


def unload(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Frees the weights of a judge that is not active.

    Returns:
        The model without it, which replaces the one passed in.

    Raises:
        ValueError: it is active, or there is no such judge.
    """
    judges = _judges(model)
    others = [each for each in judge_names(model) if each != judges.active]
    if name not in others:
        raise ValueError(f"only a judge that is loaded and not active can be unloaded ({', '.join(others)}): {name!r}")
    if judges.heads.pop(name, None) is not None:
        return model
    if remaining := [each for each in model.peft_config if each != name]:
        if model.active_adapter == name:  # though disabled, because a judge without adapters is active
            model.set_adapter(remaining[0])
        model.delete_adapter(name)
    else:
        model = model.unload()
    activate(model, judges.active)
    return model


def active_judge(model: PreTrainedModel) -> str:
    """The name of the judge whose logits a model computes."""
    return _judges(model).active


def judge_names(model: PreTrainedModel) -> list[str]:
    """The names of all judges on a model."""
    return [*(model.peft_config if isinstance(model, PeftModel) else ()), *_judges(model).heads]


def _judges(model: PreTrainedModel) -> _Judges:
    inner = underlying(model)
    if not hasattr(inner, JUDGES):
        heads = {} if isinstance(model, PeftModel) else {FIRST: inner.score.weight.detach().clone()}
        setattr(inner, JUDGES, _Judges(FIRST, heads))
    judges: _Judges = getattr(inner, JUDGES)
    return judges


def _check_name(model: PreTrainedModel, name: str) -> None:
    if name in judge_names(model):
        raise ValueError(f"there is already a judge {name!r} on this base: choose another name, or unload it first")
    if not name or "." in name or name in "lora_":  # the last for peft, which looks for names in those of weights
        raise ValueError(f"{name!r} is no name for a judge: use letters and digits without a dot, such as fold1")


def _plain_head(model: PreTrainedModel) -> nn.Linear:
    """The head that is used when adapters are disabled."""
    score = underlying(model).score
    head: nn.Linear = getattr(score, "original_module", score)
    return head
