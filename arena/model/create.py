"""Random bases of any size, made where they will stand: each weight is drawn, quantised and done with before the next.

A matrix product takes as long with random weights as with published ones, so the speed and memory of a large judge can
be measured without them. The loader of transformers makes the model, from a state dict whose tensors are drawn when
they are asked for: what comes out is what `load_base` would give, and held at most is the finished model and a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, Gemma2Config, PretrainedConfig, PreTrainedModel

from arena.config import ModelSettings
from arena.files import fingerprint
from arena.model.backbone import HEAD, as_judge, base_config, loader_options, take_over
from arena.model.base_files import base_path

PIECE = 2**22  # normals drawn at once in float32, before they are rounded to the weights' dtype


def _gemma2(**sizes: int) -> Gemma2Config:
    """What the published sizes of Gemma-2 have in common (Gemma Team, 2024, arXiv:2408.00118)."""
    return Gemma2Config(
        vocab_size=256000, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, max_position_embeddings=8192,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, rms_norm_eps=1e-6, initializer_range=0.02,
        hidden_activation="gelu_pytorch_tanh", attention_dropout=0.0, attention_bias=False, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, **sizes,
    )  # fmt: skip


_2B = _gemma2(
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4
)
_9B = _gemma2(
    hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8
)

ARCHITECTURES: Mapping[str, Gemma2Config] = {
    "google/gemma-2-2b": _2B,
    "google/gemma-2-2b-it": _2B,
    "google/gemma-2-9b": _9B,
    "google/gemma-2-9b-it": _9B,
}


def known_config(settings: ModelSettings) -> PretrainedConfig:
    """The config of a recipe's base, without the network for those in `ARCHITECTURES`; errors as `load_base`."""
    known: PretrainedConfig = ARCHITECTURES.get(settings.base) or base_config(settings)
    return known


def create_base(
    config: PretrainedConfig, settings: ModelSettings, device: torch.device | str, seed: int
) -> PreTrainedModel:
    """A base of random weights in the place of a loaded one: the same modules, dtypes, flags and state dict keys.

    Matrices are normal with the standard deviation `config.initializer_range`, norms and biases as the family starts
    them, `score` zeros in float32. Weights depend on their names, the seed and the kind of device, not on their order.

    Args:
        config: of the model, such as one of `ARCHITECTURES`; it is not changed.
        settings: `dtype`, `quantization` and `attention` are used; `base` is noted in the model, nothing is read there.
        device: where the weights are drawn and stay.
        seed: of the weights.
    """
    config = deepcopy(config)
    config.__dict__.pop("quantization_config", None)  # of a checkpoint that is stored quantised: these weights are not
    as_judge(config)
    with torch.device("meta"):
        empty = AutoModelForSequenceClassification.from_config(config)
    weights = dict(_weights(empty, getattr(torch, settings.dtype), torch.device(device), seed))
    model = type(empty).from_pretrained(
        None, config=config, state_dict=weights, device_map={"": str(device)}, **loader_options(settings)
    )
    model.name_or_path = model.config.name_or_path = base_path(settings.base)
    take_over(model, settings)
    return model


@dataclass(frozen=True)
class _Drawn:
    """A matrix that is drawn when the loader takes all of it, as it takes a tensor that lies in a file."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    std: float
    seed: int

    def __getitem__(self, places: Any) -> Tensor:
        assert places is ..., f"the loader is to take the whole of a weight, it asks for {places}"
        generator = torch.Generator(self.device).manual_seed(self.seed)
        drawn = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for piece in drawn.view(-1).split(PIECE):
            piece.copy_(torch.randn(len(piece), generator=generator, device=self.device).mul_(self.std))
        return drawn


def _weights(
    empty: PreTrainedModel, dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[tuple[str, Tensor | _Drawn]]:
    """The state dict of a model on the meta device: matrices to be drawn, and the few small weights."""
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
    """A module on the CPU with the weights that its family starts it with, such as norms that change nothing."""
    own = deepcopy(module).to_empty(device="cpu")
    model._init_weights(own)
    return own
