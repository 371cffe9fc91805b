"""The benchmark's models: ours and transformers' own, from the same files and with the same trainable weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, Gemma2Config

from arena.config import LoraSettings, ModelSettings
from arena.metrics import LABELS
from arena.model.backbone import HEAD, load_base
from arena.model.safety import SAFE_WEIGHTS
from arena.model.tuning import adapt
from arena.training.optim import trainable
from benchmarks.settings import BenchSettings, Size

PAD = 0
LORA = LoraSettings()


@dataclass(frozen=True)
class Models:
    """The same weights three times.

    transformers' model is there once to train and once to judge: on some CPUs bitsandbytes repacks 4-bit weights in
    place in an evaluation forward, after which a training step reads garbage.
    """

    ours: nn.Module
    stock_train: nn.Module
    stock_infer: nn.Module


def make_base(folder: Path, size: Size, seed: int) -> Path:
    """Writes a random Gemma-2 whose weights are large enough for attention, soft cap and window to matter."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim, query_pre_attn_scalar=size.head_dim, sliding_window=size.window,
        attn_logit_softcapping=size.softcap, max_position_embeddings=8192, initializer_range=1.4 * size.hidden**-0.5,
        pad_token_id=PAD, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    # as published weights are; so 4-bit weights are the same in every precision
    model.to(torch.bfloat16).to(torch.float32).save_pretrained(folder)
    return folder


def load_models(base: Path, settings: BenchSettings, device: torch.device, *, quantised: bool, dtype: str) -> Models:
    """Loads a base for all variants, with adapters and heads that are the same in all and nowhere zero."""
    ours = adapted(base, settings, quantised=quantised, dtype=dtype)
    stock = [stock_model(base, settings, quantised=quantised, dtype=dtype) for _ in range(2)]
    for model in (ours, *stock):
        fill(model, settings.seed)
        model.to(device)
    return Models(ours, stock[0].train(), stock[1].eval())


def adapted(base: Path, settings: BenchSettings, *, quantised: bool, dtype: str) -> nn.Module:
    """Our model, as training loads it."""
    ours = ModelSettings.model_validate(
        {
            "base": str(base), "dtype": dtype, "quantization": "nf4" if quantised else "none", "lora": LORA,
            "checkpointing": "full" if settings.checkpointing else "none",
        }
    )  # fmt: skip
    model: nn.Module = adapt(load_base(ours), ours)
    return model


def stock_model(base: Path, settings: BenchSettings, *, quantised: bool, dtype: str) -> nn.Module:
    """transformers' classifier with peft's adapters, as their documentation has it, with eager attention."""
    options: dict[str, Any] = {}
    if quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    plain = AutoModelForSequenceClassification.from_pretrained(
        str(base), num_labels=len(LABELS), dtype=getattr(torch, dtype), attn_implementation="eager",
        **SAFE_WEIGHTS, **options,
    )  # fmt: skip
    if settings.checkpointing:
        plain.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=LORA.r, lora_alpha=LORA.alpha, target_modules=LORA.targets, modules_to_save=[HEAD]
    )
    model: nn.Module = get_peft_model(plain, lora)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    return model


def fill(model: nn.Module, seed: int) -> None:
    """Gives the trainable weights random values that depend on their names' order and the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(trainable(model).items()):
            scale = 0.05 if HEAD in name else 0.02
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the head and of the adapters, each as one float32 vector on the CPU.

    Raises:
        ValueError: a trainable parameter has none.
    """
    parts: dict[str, list[Tensor]] = {"head": [], "adapters": []}
    for name, parameter in sorted(trainable(model).items()):
        if parameter.grad is None:
            raise ValueError(f"{name} got no gradient")
        parts["head" if HEAD in name else "adapters"].append(parameter.grad.detach().float().cpu().reshape(-1))
    return {name: torch.cat(found) for name, found in parts.items()}
