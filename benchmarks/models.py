"""The models that are measured: random weights of a real or a small architecture, ours or as transformers has them.

Speed and memory do not depend on what the weights are, so nothing has to be downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from arena.model.attention.backends import choose_backend
from arena.model.backbone import HEAD, attention_choice, backbone, load_base, underlying
from arena.model.base_files import base_folder, base_path, config_place
from arena.model.card import card_of
from arena.model.classifier import PackedClassifier
from arena.model.families import ARCHITECTURES
from arena.model.memory.fused import policies_of, set_policies
from arena.model.safety import SAFE, SAFE_WEIGHTS
from arena.model.tuning import adapt, lora_config
from arena.packing.loader import PackedLoader
from arena.settings import ModelSettings, Recipe
from arena.tasks.preference import CLASSES
from arena.training.optimizer import trainable
from arena.training.probe import choose_policies
from benchmarks.cells import Cell
from benchmarks.flops import Shapes, linear_shapes
from benchmarks.passes import PAD
from benchmarks.random_base import create_base
from benchmarks.timing import release


class CannotRun(Exception):  # noqa: N818 - a fact to be recorded, not a mistake
    """A cell's backend or technique is not to be had on this machine."""


class PaddedClassifier(nn.Module):
    """transformers' classifier as it is, to be called with a `PaddedBatch`; logits in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        logits: Tensor = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
        return logits.float()


class RestartedClassifier(PaddedClassifier):
    """transformers' own packing: positions that start again tell it to build a block mask over the whole row."""

    def forward(self, batch: Any) -> Tensor:
        hidden = backbone(self.model)(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        logits: Tensor = underlying(self.model).score(hidden[0, batch.cu_seqlens[1:].long() - 1])
        return logits.float()


CLASSIFIERS = {
    "ours": PackedClassifier, "padded": PaddedClassifier, "sorted": PaddedClassifier, "restarted": RestartedClassifier,
}  # fmt: skip


def architecture(base: str) -> Any:
    """transformers' config of a base: of a folder, a GGUF file or a known hub name, without the network.

    Raises:
        ValueError: neither.
    """
    place = config_place(base) if Path(base).is_file() else base_path(base)
    if (Path(place) / "config.json").is_file():
        return AutoConfig.from_pretrained(place, **SAFE)
    if base not in ARCHITECTURES:
        raise ValueError(f"the architecture of {base} is not known here: give a folder, or {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[base]


def shapes_of(base: str) -> Shapes:
    """The shapes of a base's linear layers."""
    return linear_shapes(architecture(base))


class Holder:
    """Holds the model of the latest cell, and only that one: two would not fit."""

    def __init__(self, recipe: Recipe, device: torch.device, seed: int) -> None:
        self.recipe, self.device, self.seed = recipe, device, seed
        self.key: tuple[object, ...] | None = None
        self.classifier: nn.Module | None = None

    def take(self, cell: Cell) -> nn.Module:
        """The cell's classifier, made anew where the latest cell's will not do.

        Raises:
            CannotRun: its backend or technique does not exist here.
        """
        if self.key != cell.model_key or self.classifier is None:
            self.drop()
            try:
                model = make_model(cell, self.recipe, self.device, self.seed)
            except (ValueError, ImportError) as error:
                raise CannotRun(_first_line(error)) from None
            self.classifier, self.key = CLASSIFIERS[cell.way](model), cell.model_key
        if cell.way == "ours":
            set_backend(self.classifier, cell, self.recipe.model.dtype)
        return self.classifier

    def drop(self) -> None:
        """Forgets the model and gives its memory back."""
        self.classifier = self.key = None
        release(self.device)


def make_model(cell: Cell, recipe: Recipe, device: torch.device, seed: int, *, stored: bool = False) -> Any:
    """A cell's model, with random adapters and head.

    Args:
        stored: take the weights in the folder of the recipe's base, not random ones of its architecture.
    """
    settings = cell.settings(recipe)
    if cell.way != "ours":
        return _stock(settings, cell.attention, device, seed, stored)
    base = (
        load_base(settings, CLASSES)
        if stored
        else create_base(architecture(settings.base), settings, CLASSES, device, seed)
    )
    model = adapt(base, settings).to(device)
    if settings.tune != "full":
        fill(model, seed)
    return model


def _stock(settings: ModelSettings, attention: str, device: torch.device, seed: int, stored: bool) -> Any:
    """transformers' classifier with peft's adapters, as their documentation has it, and nothing of ours."""
    if stored:
        plain = _as_transformers_loads_it(settings, attention)
    else:
        unfused = settings.model_copy(update={"fuse": "none"})
        plain = _as_transformers_has_it(
            create_base(architecture(settings.base), unfused, CLASSES, device, seed), attention
        )
    model: Any = get_peft_model(plain, lora_config(settings.lora, backbone(plain)))
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    fill(model, seed)
    return model.to(device)


def _as_transformers_loads_it(settings: ModelSettings, attention: str) -> PreTrainedModel:
    options: dict[str, Any] = {}
    dtype = getattr(torch, settings.dtype)
    if settings.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    folder = base_folder(settings.base, settings.revision, settings.dtype)
    plain: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(CLASSES), dtype=dtype, attn_implementation=attention, **SAFE_WEIGHTS, **options
    )
    return plain


def fill(model: nn.Module, seed: int) -> None:
    """Gives the trainable weights random values that depend on their names' order and the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(trainable(model).items()):
            scale = 0.05 if HEAD in name else 0.02
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def _as_transformers_has_it(created: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A plain model of the class, without our hooks and attention, that holds the created model's weights.

    Linear layers are moved over as they are, quantised or not; of all other modules the weights and buffers.
    """
    config = created.config.__class__.from_dict(created.config.to_dict())
    config.use_cache, config.pad_token_id = False, PAD
    with torch.device("meta"):
        plain = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    given = dict(created.named_modules())
    for name, module in list(plain.named_modules()):
        if isinstance(module, nn.Linear):
            plain.set_submodule(name, given[name])
            continue
        for held in ("_parameters", "_buffers"):
            getattr(module, held).update({key: getattr(given[name], key) for key in getattr(module, held)})
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer", "quantization_method"):
        if hasattr(created, flag):  # what peft asks to know which layers it adapts
            setattr(plain, flag, getattr(created, flag))
    assert not any(each.is_meta for each in [*plain.parameters(), *plain.buffers()]), "a weight was left behind"
    return plain


def best_backend(base: str, dtype: str, device: torch.device) -> str:
    """The attention backend that `auto` takes for training a base on this device."""
    config = architecture(base)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    softcap = getattr(config, "attn_logit_softcapping", None)
    return choose_backend(
        "auto", card_of(device), getattr(torch, dtype), head_dim, softcap, training=True
    ).name  # fmt: skip


def set_backend(classifier: nn.Module, cell: Cell, dtype: str) -> None:
    """Gives our model another attention backend.

    Raises:
        CannotRun: it does not run on this device.
    """
    packed: Any = classifier
    underlying(packed.model).config.arena_backend = cell.attention
    try:
        attention_choice(packed.model, dtype, training=cell.task != "infer")
    except ValueError as error:
        raise CannotRun(_first_line(error)) from None


def set_checkpointing(classifier: nn.Module, cell: Cell, recipe: Recipe, loader: PackedLoader | None) -> list[str]:
    """Gives each layer its checkpointing policy, and says which.

    Args:
        loader: of the step; with its fullest micro-batch `auto` is probed, as before training.

    Raises:
        CannotRun: a micro-batch does not fit even where every layer is recomputed.
    """
    packed: Any = classifier
    layers = len(backbone(packed.model).layers)
    if cell.way != "ours":
        if cell.checkpointing == "none":
            packed.model.gradient_checkpointing_disable()
        else:
            packed.model.gradient_checkpointing_enable({"use_reentrant": False})
        return [cell.checkpointing] * layers
    if cell.checkpointing != "auto" or cell.tune == "head":
        set_policies(packed.model, ["none" if cell.tune == "head" else cell.checkpointing] * layers)
        return policies_of(packed.model)
    assert loader is not None, "auto is probed with the micro-batches of a plan"
    try:
        plan = choose_policies(packed, loader, recipe.model_copy(update={"model": cell.settings(recipe)}))
    except ValueError as error:
        raise CannotRun(_first_line(error)) from None
    assert plan is not None
    return policies_of(packed.model)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
