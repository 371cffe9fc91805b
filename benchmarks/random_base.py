"""Random bases of any size, created on their device: each weight is drawn and quantised before the next one.

A matrix product takes as long with random weights as with published ones, so the speed and memory of a large judge can
be measured without downloading it. The loader of transformers builds the model from a state dict whose tensors are
drawn on access. The result is equivalent to that of `load_base`, and memory never holds more than the finished model
and one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from arena.model.backbone import HEAD, as_classifier, keep_layout, loader_options, take_over
from arena.model.base_files import base_path
from arena.settings import ModelSettings
from arena.storage.files import fingerprint

PIECE = 2**22  # normals drawn at once in float32, before they are rounded to the weights' dtype


def create_base(
    config: PretrainedConfig, settings: ModelSettings, classes: Sequence[str], device: torch.device | str, seed: int
) -> PreTrainedModel:
    """A base with random weights and the same modules, dtypes, flags and state dict keys as a loaded one.

    Matrices are normal with the standard deviation `config.initializer_range`, norms and biases have their family's
    initial values, and `score` is zeros in float32. Weights depend on their names, the seed and the kind of device, not
    on their order.

    Args:
        config: of the model, such as one of `ARCHITECTURES`; it is not changed.
        settings: `dtype`, `quantization` and `attention` are used; `base` is stored in the model but not read.
        classes: the names of the head's outputs.
        device: where the weights are created.
        seed: of the weights.
    """
    config = deepcopy(config)
    config.__dict__.pop("quantization_config", None)  # describes a quantised checkpoint, which this is not
    as_classifier(config, classes)
    with torch.device("meta"):
        empty = AutoModelForSequenceClassification.from_config(config)
    weights = dict(_weights(empty, getattr(torch, settings.dtype), torch.device(device), seed))
    model = type(empty).from_pretrained(
        None, config=config, state_dict=weights, device_map={"": str(device)}, **loader_options(settings)
    )
    keep_layout(model)
    model.name_or_path = model.config.name_or_path = base_path(settings.base)
    take_over(model, settings)
    return model


@dataclass(frozen=True)
class _Drawn:
    """A matrix that is drawn when the loader reads it, like a tensor in a file."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    std: float
    seed: int

    def __getitem__(self, places: Any) -> Tensor:
        assert places is ..., f"the loader must read a weight as a whole, but reads {places}"
        generator = torch.Generator(self.device).manual_seed(self.seed)
        drawn = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for piece in drawn.view(-1).split(PIECE):
            piece.copy_(torch.randn(len(piece), generator=generator, device=self.device).mul_(self.std))
        return drawn


def _weights(
    empty: PreTrainedModel, dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[tuple[str, Tensor | _Drawn]]:
    """The state dict for a model on the meta device: matrices that are drawn on access, and the small weights."""
    std = empty.config.initializer_range
    for path, module in empty.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if name == f"{HEAD}.weight":
                yield name, torch.zeros(parameter.shape)
            elif parameter.ndim > 1:
                number = int(fingerprint(seed, name)[:15], 16)
                yield name, _Drawn(parameter.shape, dtype, device, std, number)
            elif name.endswith(".bias"):
                yield name, torch.zeros(parameter.shape)
            else:
                yield name, _started(empty, module).get_parameter(name.rpartition(".")[2]).data


def _started(model: PreTrainedModel, module: nn.Module) -> nn.Module:
    """A module on the CPU with its family's initial weights, such as those of norms."""
    own = deepcopy(module).to_empty(device="cpu")
    model._init_weights(own)
    return own
