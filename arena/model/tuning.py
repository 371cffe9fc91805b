"""Makes parts of a base trainable (adapters, all weights, or only the head), and saves and loads them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from arena.model.backbone import HEAD, backbone, classifies, load_base, underlying
from arena.model.card import card_of
from arena.model.lora import adapted_layers, install_dora
from arena.model.memory.estimate import estimate_policies, shape_of
from arena.model.memory.fused import install, set_policies
from arena.model.safety import check_adapter, undamaged
from arena.settings import LoraSettings, ModelSettings, PackingSettings

HEAD_FILE = "head.safetensors"  # of a judge with only the head trained
WHOLE_FILE = "model.safetensors"
HEAD_WEIGHT = f"{HEAD}.weight"
LOADED_WITH = "arena_settings"  # the attribute of a loaded model that holds its settings


def adapt(model: PreTrainedModel, settings: ModelSettings, budget: int = PackingSettings().budget) -> PreTrainedModel:
    """Makes the weights that `model.tune` selects trainable, in float32: new LoRA or DoRA adapters, all, or none.

    A classifier's head is always trained, a language model's only with `full`. A trainable float32 parameter takes 16
    bytes with its gradient and AdamW's two moments. That is little for adapters, and four times the weights for `full`
    (42 GB for 2.6 billion), where autocast adds another 2 bytes in half precision. Frozen weights stay as they were
    loaded.

    With `model.checkpointing=auto`, as little is recomputed in the backward as the estimated memory of the GPU allows,
    or without one that of this machine. The trainer measures on a GPU and chooses again.

    Args:
        budget: the most tokens of a micro-batch (`packing.budget`), for that estimate.

    Raises:
        ValueError: the base has no modules with the names in `model.lora.targets`, or not the layers of `model.lora`;
            or only the head of a language model was to be trained.
    """
    if settings.tune == "lora":
        config = lora_config(settings.lora, backbone(model), with_head=classifies(model))
        try:
            model = _with_peft(model, config)
        except ValueError as error:
            raise ValueError(f"model.lora.targets {settings.lora.targets} do not fit this base: {error}") from None
        install_dora(model, fresh=True)
    elif settings.tune == "head":
        if not classifies(model):
            raise ValueError(
                "model.tune=head trains the head of classes, but this task predicts tokens: set model.tune to "
                "lora or full"
            )
        model.requires_grad_(False)
        model.score.requires_grad_(True)
    install(backbone(model), settings.fuse)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if settings.checkpointing == "auto":
        card = card_of("cuda" if torch.cuda.is_available() else "cpu")
        shape, classes = shape_of(backbone(model).config), classifies(model)
        set_policies(model, estimate_policies(shape, settings, budget, card, classes=classes))
    else:
        set_policies(model, [settings.checkpointing] * len(backbone(model).layers))
    return model


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes the trained weights as safetensors and JSON: adapter and head, only the head, or the whole model."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if trained.keys() == {HEAD_WEIGHT}:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({HEAD_WEIGHT: trained[HEAD_WEIGHT].detach().contiguous()}, folder / HEAD_FILE)
        return
    # peft would look for the base's config, perhaps on the hub, to see if its vocabulary was changed: it never is
    options = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    model.save_pretrained(str(folder), **options)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def is_whole(folder: Path) -> bool:
    """Whether `save_model` wrote all weights of a model, not only those trained on top of a base."""
    return not (folder / "adapter_config.json").is_file() and not (folder / HEAD_FILE).is_file()


def load_trained(folder: Path, settings: ModelSettings, classes: Sequence[str]) -> PreTrainedModel:
    """The model that `save_model` wrote, ready for inference.

    Args:
        classes: the names of the head's outputs; empty for a language model.

    Raises:
        ValueError: the saved weights are damaged, are not safetensors, or do not fit the base.
    """
    if (folder / "adapter_config.json").is_file():
        model = with_adapter(load_base(settings, classes), folder, settings)
        install_dora(model, fresh=False)
    elif (folder / HEAD_FILE).is_file():
        model = with_head(load_base(settings, classes), folder / HEAD_FILE)
    else:
        model = load_base(settings.model_copy(update={"base": str(folder), "revision": None}), classes)
        if classes:
            with_head(model, _file_of_head(folder))
    install(backbone(model), settings.fuse)
    setattr(underlying(model), LOADED_WITH, settings)
    return model.eval()


def with_adapter(
    model: PreTrainedModel, folder: Path, settings: ModelSettings, name: str = "default"
) -> PreTrainedModel:
    """The model with the adapter in a folder, configured by the settings and not by the adapter's own config."""
    check_adapter(folder)
    config = lora_config(settings.lora, backbone(model), with_head=classifies(model))
    config.inference_mode = True
    with undamaged(folder):
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = _with_peft(model, config, name)
        found = model.load_adapter(str(folder), name)
        if wrong := [*found.missing_keys, *found.unexpected_keys]:  # peft only warns, or says nothing
            raise RuntimeError(f"its weights and model.lora differ in {len(wrong)} places, such as {wrong[0]}")
    return model


def _with_peft(model: PreTrainedModel, config: LoraConfig, name: str = "default") -> PreTrainedModel:
    with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        return get_peft_model(model, config, name)


def with_head(model: PreTrainedModel, file: Path) -> PreTrainedModel:
    """The model with its head replaced by the one in a safetensors file."""
    load_head(model.score, file)
    return model


def load_head(head: nn.Module, file: Path) -> None:
    """Loads the weight of a head from a safetensors file."""
    with undamaged(file.parent), safe_open(file, framework="pt") as tensors:
        head.load_state_dict({"weight": tensors.get_tensor(HEAD_WEIGHT)})


def lora_config(settings: LoraSettings, decoder: PreTrainedModel, *, with_head: bool = True) -> LoraConfig:
    """peft's config of the adapters for a decoder, and of a classifier's head. Raises as `adapted_layers` does."""
    layers: Any = decoder.layers
    adapted = adapted_layers(settings, len(layers))
    # peft's own layers_to_transform does not go with all-linear
    outside = rf"(?!(.*\.)?layers\.({'|'.join(map(str, adapted))})\.).*" if len(adapted) < len(layers) else None
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    return LoraConfig(
        task_type=TaskType.SEQ_CLS if with_head else TaskType.CAUSAL_LM,  # without the first the head stays frozen
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        exclude_modules=outside,
        modules_to_save=[HEAD] if with_head else None,
        use_dora=settings.dora,
    )


def _file_of_head(folder: Path) -> Path:
    """The file of a whole model that contains the head."""
    index = folder / "model.safetensors.index.json"
    return folder / (json.loads(index.read_text())["weight_map"][HEAD_WEIGHT] if index.is_file() else WHOLE_FILE)
