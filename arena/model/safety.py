"""What is loaded of a base or a judge: safetensors and JSON alone. Code that comes with either is never run."""

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

SAFE: dict[str, Any] = {"trust_remote_code": False}  # for configs and tokenizers
SAFE_WEIGHTS: dict[str, Any] = {**SAFE, "use_safetensors": True, "weights_only": True}
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"


def check_base(folder: Path) -> None:
    """Looks at a base's folder before anything of it is loaded.

    Raises:
        ValueError: its weights are not in safetensors files that lie in it, or it would have other files loaded; names
            the file, and says what to do.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"model.base: {folder} holds an adapter (adapter_config.json): name the folder of its base")
    if "transformers_weights" in _json(folder / "config.json"):
        raise ValueError(f"{folder / 'config.json'} names its own weight files (transformers_weights): remove that key")
    if (folder / WEIGHTS).is_file():
        return
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        why = f"has {', '.join(others)}, which can hold code, but " if others else "has "
        raise ValueError(
            f"model.base: {folder} {why}no {WEIGHTS}: convert its weights to safetensors, or fetch them as such"
        )
    parts = _json(folder / INDEX).get("weight_map")
    names = sorted(map(str, parts.values())) if isinstance(parts, dict) else [""]
    if odd := next((name for name in names if Path(name).name != name or not name.endswith(".safetensors")), None):
        raise ValueError(f"{folder / INDEX} names {odd!r}, not a safetensors file beside it: fetch the base again")


def weight_files(folder: Path) -> list[Path]:
    """The files that a base's weights are loaded from, by name; for a folder that `check_base` has looked at."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return sorted({folder / name for name in _json(folder / INDEX)["weight_map"].values()})


def check_loaded(base: str, model: nn.Module, found: Mapping[str, Any], head: str) -> None:
    """Looks at a base after loading: the library fills up what is missing with random weights.

    Args:
        found: its report, of which `missing_keys` and `mismatched_keys` are read.
        head: the module that a base need not have, and whose weights are not used.

    Raises:
        ValueError: weights are missing, or have another shape than the config says.
    """
    lacks = sorted(name for name in found["missing_keys"] if not name.startswith(f"{head}."))
    if lacks:
        raise ValueError(f"model.base: {base!r} lacks {len(lacks)} weights, such as {lacks[0]}: fetch it again, whole")
    shapes = [each for each in sorted(found["mismatched_keys"]) if not each[0].startswith(f"{head}.")]
    for name, module in model.named_modules():  # the library does not compare those of quantised layers
        if isinstance(module, Linear4bit | Linear8bitLt):
            weight, four = module.weight, isinstance(module, Linear4bit)
            if getattr(weight, "quant_state" if four else "SCB", None) is None:
                raise ValueError(
                    f"model.base: {base!r} has {name}.weight unquantised, which its config.json says is quantised: "
                    "fetch both again"
                )
            shape = weight.quant_state.shape if four else weight.shape
            shapes.append((f"{name}.weight", shape, (module.out_features, module.in_features)))
    if any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules()):
        shapes += [
            each for each in _unquantised_shapes(model) if not each[0].startswith(f"{head}.")
        ]  # nor, in its first versions 5, those of the other layers
    for name, stored, expected in shapes:
        if tuple(stored) != tuple(expected):
            raise ValueError(
                f"model.base: {base!r} has {name} of shape {tuple(stored)}, its config.json says {tuple(expected)}: "
                "fetch both again"
            )


def _unquantised_shapes(model: Any) -> list[tuple[str, Any, Any]]:
    """Name, shape and the config's shape of each weight outside of quantised layers."""
    with torch.device("meta"):
        empty = type(model)(model.config)
    quantised = {
        f"{name}.weight" for name, each in model.named_modules() if isinstance(each, Linear4bit | Linear8bitLt)
    }
    found = {name: each.shape for name, each in model.named_parameters() if name not in quantised}
    return [(name, found[name], each.shape) for name, each in empty.named_parameters() if name in found]


def own_heads(decoder: str, found: Mapping[str, Any], head: str) -> list[str]:
    """Modules beside the decoder that a base brings and that are not used: heads, but for that of a language model.

    Args:
        decoder: the decoder's name in the model.
        found, head: as in `check_loaded`.
    """
    names = {name.split(".")[0] for name in found["unexpected_keys"]} - {decoder, "lm_head"}
    return sorted(names if f"{head}.weight" in found["missing_keys"] else {*names, head})


def check_adapter(folder: Path) -> None:
    """Raises `ValueError` for an adapter that is not safetensors: its library would load it all the same."""
    if not (folder / ADAPTER).is_file():
        raise ValueError(f"{folder} has an adapter without {ADAPTER}; nothing else is loaded: train the fold again")


@contextmanager
def undamaged(folder: Path) -> Iterator[None]:
    """Around the loading of what was trained.

    Raises:
        ValueError: it is damaged, or does not fit the base.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ValueError(f"{folder} is damaged or of another base ({reason}): train the fold again") from error


def _json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch the base again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object: fetch the base again")
    return value
