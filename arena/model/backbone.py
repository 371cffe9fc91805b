"""Loads a base model, quantised or not, and prepares it for packed batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from arena.model.attention.backends import Choice, choose_backend
from arena.model.attention.varlen import NAME
from arena.model.base_files import base_folder, base_load_errors, base_path, config_place
from arena.model.card import card_of
from arena.model.families import family_of, unknown_family_note
from arena.model.last_layer import only_last_tokens
from arena.model.safety import (
    SAFE,
    SAFE_WEIGHTS,
    check_loaded,
    check_stored,
    compute_in,
    keep_head,
    own_heads,
    stored_quantization,
)
from arena.progress import console, loading_quietly
from arena.settings import ModelSettings

REPACKS = "support_avx512bf16_for_cpu"  # the attribute of bitsandbytes' 4-bit layers that permits repacking
HEAD = "score"  # the name in transformers' sequence classifiers, so that a merged model loads as one of them


def load_tokenizer(base: str, revision: str | None = None) -> Any:
    """The tokenizer of a base model.

    Raises:
        ValueError: it cannot be loaded; the message says how to get it.
    """
    place = config_place(base)
    with base_load_errors(base):
        return AutoTokenizer.from_pretrained(place, revision=revision, **SAFE)


def load_base(settings: ModelSettings, classes: Sequence[str], *, announce: bool = False) -> PreTrainedModel:
    """A base model under a head: frozen weights quantised or in `dtype`.

    With classes it is a sequence classifier, whose `score` is of float32 zeros; a base that already has such a head, as
    a reward model has, is used without it. Without classes it is a language model, with the base's own output layer.

    Args:
        classes: the names of the head's outputs; empty for a language model.
        announce: print a line if the base's head or attention dropout is not used, or if its family is not known.

    Raises:
        ValueError: the base is missing or gated, is stored with another quantisation than the settings ask for, or is
            not a decoder with replaceable attention; the message says what to do.
    """
    folder = base_folder(settings.base, settings.revision, settings.dtype)
    config = base_config(settings, folder)
    if announce and (dropout := getattr(config, "attention_dropout", None)):
        console.print(
            f"{settings.base} has an attention dropout of {dropout}, which is not used: packed attention has none"
        )
    if announce and (note := unknown_family_note(config)):
        console.print(note)
    if classes:
        as_classifier(config, classes)
        keep_head(config, HEAD)
    else:
        without_cache(config)
    kind, head = (AutoModelForSequenceClassification, HEAD) if classes else (AutoModelForCausalLM, None)
    model, report = load_weights(kind, config, folder, settings, partial(check_loaded, settings.base, head=head))
    heads = own_heads(model.base_model_prefix, report, HEAD) if classes else []
    if heads and announce:
        console.print(
            f"{settings.base} has a head of its own ({', '.join(heads)}), which is not used: a new one is trained"
        )
    model.name_or_path = model.config.name_or_path = base_path(settings.base)  # not the folder in the hub's cache
    take_over(model, settings)
    return model


def load_weights(
    kind: Any,
    config: Any,
    folder: Path,
    settings: ModelSettings,
    check: Callable[[PreTrainedModel, Mapping[str, Any]], None],
    attention: str = NAME,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A base's model, quantised as it is stored or as the settings say, and transformers' report of its weights.

    Args:
        kind: the class of transformers that loads it, such as `AutoModelForCausalLM`.
        check: raises `ValueError` if the model and the report are not those of a whole base.
        attention: transformers' name of the attention function.
    """
    options = loader_options(settings) | {"attn_implementation": attention}
    stored = stored_quantization(config) is not None
    if stored:
        del options["quantization_config"]  # the checkpoint's own config applies
    with base_load_errors(settings.base), loading_quietly():
        model, report = kind.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **SAFE_WEIGHTS, **options
        )
    check(model, report)
    if stored:
        compute_in(model, options["dtype"])
    keep_layout(model)
    return model, report


def base_config(settings: ModelSettings, folder: Path | None = None) -> Any:
    """The config of a base model, as transformers reads it. Raises the same errors as `load_base`.

    Args:
        folder: the folder of the base, if known; the hub is then not contacted.
    """
    place = folder or config_place(settings.base)
    with base_load_errors(settings.base):
        config = AutoConfig.from_pretrained(place, revision=settings.revision, **SAFE)
    check_stored(config, settings)
    return config


def as_classifier(config: Any, classes: Sequence[str]) -> None:
    """Turns a base's config into that of a classifier, without a cache or attention dropout."""
    without_cache(config)
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.problem_type = None  # may be regression in a reward model


def without_cache(config: Any) -> None:
    """Turns off a config's cache and its attention dropout, which packed attention does not have."""
    config.use_cache = False
    if getattr(config, "attention_dropout", None):
        config.attention_dropout = 0.0


def loader_options(settings: ModelSettings) -> dict[str, Any]:
    """The options with which transformers loads or creates a base: precision and attention."""
    assert settings.dtype != "auto", "the dtype must be resolved for the card first (arena.model.card)"
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "attn_implementation": NAME}
    if settings.quantization != "none":
        options["quantization_config"] = _quantization(settings)
    return options


def take_over(model: PreTrainedModel, settings: ModelSettings) -> None:
    """Restricts a model of transformers to packed batches, and sets a new float32 `score` if it is a classifier."""
    model.config.arena_backend = settings.attention  # `auto` is resolved in each call, by device and dtype
    if classifies(model):
        score = nn.Linear(model.score.in_features, model.config.num_labels, bias=False, dtype=torch.float32)
        nn.init.zeros_(score.weight)  # initial probabilities are uniform, whatever the scale of the hidden states
        model.score = score.to(next(model.parameters()).device)
        if family_of(model.config).only_last_tokens:
            only_last_tokens(backbone(model).layers[-1])
    backbone(model).register_forward_pre_hook(_refuse_mask_and_cache, with_kwargs=True)


def classifies(model: PreTrainedModel) -> bool:
    """Whether a loaded model is a classifier; otherwise it is a language model."""
    return hasattr(underlying(model), HEAD)


def underlying(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder below the head."""
    inner = underlying(model)
    return getattr(inner, inner.base_model_prefix)


def attention_choice(model: PreTrainedModel, dtype: str, *, training: bool) -> Choice:
    """The attention backend that a model will use on its present device.

    Args:
        dtype: compute dtype of the recipe.

    Raises:
        ValueError: the recipe names a backend that cannot run there.
    """
    config = underlying(model).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    softcap = getattr(config, "attn_logit_softcapping", None)
    card = card_of(next(model.parameters()).device)
    return choose_backend(config.arena_backend, card, getattr(torch, dtype), head_dim, softcap, training=training)


def sliding_window(settings: ModelSettings) -> int | None:
    """The window size of the base's sliding-window layers; None without such layers or without a config."""
    place = base_path(settings.base)
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        return None
    return getattr(base_config(settings), "sliding_window", None)


def _quantization(settings: ModelSettings) -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation (Dettmers et al., 2023, arXiv:2305.14314), or LLM.int8()."""
    # No list of modules to skip is given, because the library spares the head only without one.
    if settings.quantization == "int8":
        # otherwise each product warns that it rounds its input to float16, as LLM.int8() does
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
    )


def keep_layout(model: nn.Module) -> None:
    """Prevents bitsandbytes from repacking 4-bit weights in place.

    On CPUs with bf16 instructions an evaluation forward repacks them, and whatever reads the weights in another way
    afterwards (a merge, a backward) gets wrong numbers; the repacked product also depends on the batch's shape.

    Raises:
        ValueError: this version of bitsandbytes repacks them nevertheless.
    """
    for module in model.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)
    on_cpu = any(isinstance(each, Linear4bit) and each.weight.device.type == "cpu" for each in model.modules())
    if on_cpu and _repacks():
        raise ValueError(
            f"bitsandbytes {bitsandbytes.__version__} changes 4-bit weights in place on this CPU, after which training "
            "and merging read wrong numbers: install 'bitsandbytes<0.51', or set model.quantization=none"
        )


@torch.inference_mode()
def _repacks() -> bool:
    """Whether an evaluation forward changes the weights of a small 4-bit layer although `REPACKS` is off.

    The library's decision depends only on the processor's instructions, not on the layer.
    """
    layer: Any = Linear4bit(128, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").eval()
    if hasattr(layer, REPACKS):
        setattr(layer, REPACKS, False)
    before = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    layer(torch.ones(2, 128, dtype=torch.bfloat16))
    after = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return bool((after - before).norm() > 0.05 * before.norm())  # repacked weights are unrelated to the original ones


def _refuse_mask_and_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a mask or a cache, which packed attention would ignore or which would mix examples."""
    for name in ("attention_mask", "past_key_values"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"a packed model does not accept {name}: pass cu_seq_lens_q, cu_seq_lens_k and position_ids"
            )
    if kwargs.get("use_cache") or len(args) > 1:
        raise ValueError("a packed model accepts only input_ids as a positional argument, and needs use_cache=False")
    position_ids, begin = kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q")
    if position_ids is None:
        raise ValueError("a packed model needs position_ids that start at 0 with each example")
    if kwargs.get("kv_index") is not None or begin is None:
        return
    # on a GPU this waits for the device, so it is checked only for callers that do not pass kv_index=None
    if position_ids.device.type == "cpu" or "kv_index" not in kwargs:
        first = begin[:-1][begin[:-1] < position_ids.shape[-1]].long()
        if bool(position_ids[..., first].any()):
            raise ValueError(
                "without kv_index each segment of cu_seq_lens_q must begin at position 0, but one continues a shared "
                "beginning: pass the batch's kv_index, cu_seqlens_k and max_seq_len too, or load batches without "
                "sharing (packing.share=false, or share=False for VarlenCollator)"
            )
