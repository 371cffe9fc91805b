"""What is trained of a base: adapters, all of it or the head alone; saved, and loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from arena.config import LoraSettings, ModelSettings
from arena.model.backbone import HEAD, backbone, load_base
from arena.model.checkpointing import set_policies
from arena.model.fused_lora import fuse_lora


def adapt(model: PreTrainedModel, settings: ModelSettings) -> PreTrainedModel:
    """Adds LoRA adapters, and makes them and the head trainable, in float32; without LoRA all weights train.

    Raises:
        ValueError: the base has no modules of the names in `model.lora.targets`.
    """
    if settings.tune == "lora":
        try:
            model = get_peft_model(model, _lora(settings.lora))
        except ValueError as error:
            raise ValueError(f"model.lora.targets {settings.lora.targets} do not fit this base: {error}") from None
        fuse_lora(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    policy = "full" if settings.checkpointing == "auto" else settings.checkpointing
    set_policies(model, [policy] * len(backbone(model).layers))
    return model


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes what training changed, as safetensors and JSON: adapter and head; the whole model without LoRA."""
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def load_trained(folder: Path, settings: ModelSettings) -> PreTrainedModel:
    """The model that `save_model` wrote, ready for inference."""
    if (folder / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(load_base(settings), str(folder)).eval()
        fuse_lora(model)
        return model
    whole = settings.model_copy(update={"base": str(folder), "revision": None})
    model = load_base(whole)
    _load_head(model, folder)
    return model.eval()


def _lora(settings: LoraSettings) -> LoraConfig:
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,  # without it the head stays frozen
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        modules_to_save=[HEAD],
    )


def _load_head(model: PreTrainedModel, folder: Path) -> None:
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    name = f"{HEAD}.weight"
    file = json.loads(index.read_text())["weight_map"][name] if index.is_file() else "model.safetensors"
    with safe_open(folder / file, framework="pt") as tensors, torch.no_grad():
        model.score.weight.copy_(tensors.get_tensor(name))
