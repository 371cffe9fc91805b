"""The language model that a name refers to, and its loading as transformers has it: with padding, masks and a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from arena.config import change
from arena.inference.find import JUDGE_FILE, find_model
from arena.inference.saved import read_judge
from arena.model.backbone import base_config, load_weights
from arena.model.base_files import CONFIG, DEMO_BASE, base_folder
from arena.model.gguf_base import is_gguf
from arena.model.lora import install_dora
from arena.model.safety import check_loaded
from arena.model.tuning import is_whole, with_adapter
from arena.settings import ModelSettings, Recipe

HEAD = "lm_head"


@dataclass(frozen=True)
class Source:
    """A language model, not loaded yet.

    Attributes:
        recipe: its settings; `model.base` is the base, or a folder with all of the model.
        trained: the folder with what was trained on the base; None: nothing, or all of it.
        tuned: whether it was trained to answer; otherwise it is a base.
        folder: the `model` folder of a fold, or an exported folder; None: it is a base.
    """

    recipe: Recipe
    trained: Path | None
    tuned: bool = True
    folder: Path | None = None


def find_source(name: str, runs: Path, fold: int | None, overrides: Sequence[str], dtype: str) -> Source:
    """The model that a name refers to.

    Args:
        name: a base (a folder, a GGUF file, a hub name), an exported folder, or what `find_model` takes.
        overrides: settings to change, as in `load_recipe`.
        dtype: of a base, for which no recipe sets one.

    Raises:
        ValueError: there is no such model, or it predicts classes.
    """
    if _is_base(name):
        if fold is not None:
            raise ValueError(f"{name} is a base, but --fold {fold} asks for a fold of a run: leave it out")
        settings = {"base": name, "dtype": dtype, "quantization": "none"}
        bare = {"task": "instruction", "data": {"path": "."}, "prompt": {"template": "instruct"}, "model": settings}
        return Source(change(Recipe.model_validate({"name": "base", **bare}), overrides), None, tuned=False)
    folder = find_model(name, runs, fold=fold)
    saved = read_judge(folder, exported=True)
    if saved.task.classes:
        raise ValueError(
            f"{folder} is a judge, which gives probabilities ({', '.join(saved.task.columns)}) and no text: "
            "use `arena infer`, or name a run of instruction tuning or a base"
        )
    if is_whole(folder):
        whole = {"base": str(folder), "revision": None, "quantization": "none"}
        model = saved.recipe.model.model_copy(update=whole)
        return Source(change(saved.recipe.model_copy(update={"model": model}), overrides), None, folder=folder)
    recipe = change(saved.recipe, overrides)
    saved.check_base(recipe.model)
    return Source(recipe, folder, folder=folder)


def _is_base(name: str) -> bool:
    place = Path(name)
    if place.is_dir():
        return (place / CONFIG).is_file() and not (place / JUDGE_FILE).is_file()
    return name == DEMO_BASE or is_gguf(name) or (name.count("/") == 1 and not place.parent.is_dir())


def load_causal(settings: ModelSettings, trained: Path | None = None) -> PreTrainedModel:
    """A base with its language model's head, quantised as the settings say.

    Args:
        trained: the folder of an adapter to use over it, unmerged.

    Raises:
        ValueError: the base is missing, gated, stored with another quantisation, or no language model; or the adapter
            is damaged or does not fit it.
    """
    folder = base_folder(settings.base, settings.revision, settings.dtype)
    config = base_config(settings, folder)
    capped = getattr(config, "attn_logit_softcapping", None) is not None  # which torch's own attention lacks
    check, attention = partial(_check, settings.base), "eager" if capped else "sdpa"
    model, _ = load_weights(AutoModelForCausalLM, config, folder, settings, check, attention)
    model.generation_config = GenerationConfig()  # some bases come with settings that sample
    if trained is not None:
        model = with_adapter(model, trained, settings)
        install_dora(model, fresh=False)
    return model.eval()


def _check(base: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a base is damaged or has another head, which nothing else shows if embeddings are tied."""
    if names := {name.split(".")[0] for name in report["unexpected_keys"]} - {model.base_model_prefix, HEAD}:
        raise ValueError(
            f"model.base: {base} has the head {', '.join(sorted(names))} and is no language model: name the base that "
            "it was made from"
        )
    check_loaded(base, model, report, head=None)
