"""Checks of bases and judges before and after they are loaded.

Only safetensors and JSON are read, and code that comes with them is never run. A checkpoint that is stored quantised is
used as it is or refused, because it cannot be requantised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors import SafetensorError
from torch import OutOfMemoryError, nn

from arena.settings import ModelSettings

SAFE: dict[str, Any] = {"trust_remote_code": False}  # for configs and tokenizers
SAFE_WEIGHTS: dict[str, Any] = {**SAFE, "use_safetensors": True, "weights_only": True}
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"


def check_base(folder: Path) -> None:
    """Checks a base's folder before anything in it is loaded.

    Raises:
        ValueError: its weights are not safetensors files in that folder, or it refers to other files.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"model.base: {folder} is an adapter (adapter_config.json): name the folder of its base")
    if "transformers_weights" in _json(folder / "config.json"):
        raise ValueError(f"{folder / 'config.json'} names its own weight files (transformers_weights): remove that key")
    if (folder / WEIGHTS).is_file():
        return
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        why = f"has {', '.join(others)}, which can contain code, but " if others else "has "
        raise ValueError(
            f"model.base: {folder} {why}no {WEIGHTS}: convert its weights to safetensors, or fetch them in that format"
        )
    parts = _json(folder / INDEX).get("weight_map")
    names = sorted(map(str, parts.values())) if isinstance(parts, dict) else [""]
    if odd := next((name for name in names if Path(name).name != name or not name.endswith(".safetensors")), None):
        raise ValueError(
            f"{folder / INDEX} names {odd!r}, which is not a safetensors file in its folder: fetch the base again"
        )


def weight_files(folder: Path) -> list[Path]:
    """The files of a base's weights, sorted by name; for a folder that has passed `check_base`."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return sorted({folder / name for name in _json(folder / INDEX)["weight_map"].values()})


def check_loaded(base: str, model: nn.Module, report: Mapping[str, Any], head: str | None) -> None:
    """Checks a base after loading, because the library fills missing weights with random numbers.

    Args:
        report: the library's report, of which `missing_keys` and `mismatched_keys` are used.
        head: a module that is optional in a base, and whose weights are not used; None: there is none.

    Raises:
        ValueError: weights are missing, or their shapes differ from the config.
    """

    def unused(name: str) -> bool:
        return head is not None and name.startswith(f"{head}.")

    lacks = sorted(name for name in report["missing_keys"] if not unused(name))
    if lacks:
        raise ValueError(f"model.base: {base!r} lacks {len(lacks)} weights, such as {lacks[0]}: fetch all of it again")
    shapes = sorted(report["mismatched_keys"])
    for name, module in model.named_modules():  # the library does not check those of quantised layers
        if isinstance(module, Linear4bit | Linear8bitLt):
            weight, four = module.weight, isinstance(module, Linear4bit)
            if getattr(weight, "quant_state" if four else "SCB", None) is None:
                raise ValueError(
                    f"model.base: {base!r} has an unquantised {name}.weight, which is quantised according to its "
                    "config.json: fetch both again"
                )
            shape = weight.quant_state.shape if four else weight.shape
            shapes.append((f"{name}.weight", shape, (module.out_features, module.in_features)))
    if any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules()):
        shapes += _unquantised_shapes(model)  # nor, in early 5.x versions, those of other layers
    for name, stored, expected in shapes:
        if tuple(stored) != tuple(expected) and not unused(name):
            raise ValueError(
                f"model.base: {base!r} has {name} of shape {tuple(stored)}, but {tuple(expected)} according to its "
                "config.json: fetch both again"
            )


def _unquantised_shapes(model: Any) -> list[tuple[str, Any, Any]]:
    """The name, the shape and the shape by config of each weight outside of quantised layers."""
    with torch.device("meta"):
        empty = type(model)(model.config)
    quantised = {
        f"{name}.weight" for name, each in model.named_modules() if isinstance(each, Linear4bit | Linear8bitLt)
    }
    shapes = {name: each.shape for name, each in model.named_parameters() if name not in quantised}
    return [(name, shapes[name], each.shape) for name, each in empty.named_parameters() if name in shapes]


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


def own_heads(decoder: str, report: Mapping[str, Any], head: str) -> list[str]:
    """The heads of a base that are not used, other than that of a language model.

    Args:
        decoder: the decoder's name in the model.
        report, head: as in `check_loaded`.
    """
    names = {name.split(".")[0] for name in report["unexpected_keys"]} - {decoder, "lm_head"}
    return sorted(names if f"{head}.weight" in report["missing_keys"] else {*names, head})


def check_adapter(folder: Path) -> None:
    """Raises `ValueError` for an adapter that is not safetensors, which peft would load nevertheless."""
    if not (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder} has an adapter but no {ADAPTER}, the only format that is loaded: train the fold again"
        )


@contextmanager
def undamaged(folder: Path) -> Iterator[None]:
    """Wraps the loading of trained weights.

    Raises:
        ValueError: they are damaged or do not fit the base.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ValueError(f"{folder} is damaged or belongs to another base ({reason}): train the fold again") from error


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch the base again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} has a {type(value).__name__} instead of an object: fetch the base again")
    return value
