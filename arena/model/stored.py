"""Bases with a quantised checkpoint, which is either used as it is or refused, because it cannot be requantised."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from arena.config import ModelSettings


def stored_quantization(config: Any) -> str | None:
    """The quantisation of the weights that a transformers config describes: `nf4`, `fp4`, `int8` or another method.

    None: they are not quantised.
    """
    stored = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not stored:
        return None
    if stored.get("load_in_4bit"):
        return str(stored.get("bnb_4bit_quant_type", "fp4"))  # the library's default
    if stored.get("load_in_8bit"):
        return "int8"
    return str(stored.get("quant_method", "an unknown method"))


def check_stored(config: Any, settings: ModelSettings) -> None:
    """Compares the quantisation in a base's config with that in a recipe.

    Raises:
        ValueError: they differ; the message names the settings that suit the base, if there are any.
    """
    stored = stored_quantization(config)
    if stored in (None, settings.quantization):
        return
    other = "use the unquantised model as the base"
    if stored not in ("nf4", "int8"):
        raise ValueError(
            f"model.base: {settings.base!r} is stored quantised ({stored}), which is not supported: {other}"
        )
    needed = f"model.quantization={stored}"
    if settings.tune == "full":
        needed += " and model.tune=lora"
    raise ValueError(
        f"model.base: {settings.base!r} is stored quantised ({stored}), and cannot be loaded with "
        f"model.quantization={settings.quantization}: set {needed}, or {other}"
    )


def keep_head(config: Any, head: str) -> None:
    """Adds the head to a config's list of unquantised modules, if there is such a list."""
    stored = getattr(config, "quantization_config", None)
    if stored and stored.get("llm_int8_skip_modules") is not None:
        stored["llm_int8_skip_modules"] = sorted({*stored["llm_int8_skip_modules"], head})


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes a model with a quantised checkpoint compute in `dtype`, and converts its unquantised weights to it.

    The library leaves these weights in the stored dtype, unlike those of a checkpoint that it quantises itself.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.weight.quant_state.dtype = dtype
        for name, parameter in module.named_parameters(recurse=False):
            packed = isinstance(module, Linear4bit | Linear8bitLt) and name == "weight"
            if parameter.is_floating_point() and not packed:
                parameter.data = parameter.data.to(dtype)
