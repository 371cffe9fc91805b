"""Exports a trained judge, with its adapter merged, as a transformers model that does not need this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from arena.config import ModelSettings, change
from arena.inference.card import as_json, read_card
from arena.inference.find import CARD
from arena.model.backbone import load_base, load_tokenizer
from arena.model.tuning import HEAD_FILE, is_whole, load_trained, with_adapter, with_head
from arena.storage.files import atomic_write, write_json


def export_judge(judge: Path, folder: Path, dtype: str = "bfloat16", overrides: Sequence[str] = ()) -> None:
    """Writes a judge so that `AutoModelForSequenceClassification.from_pretrained(folder)` gives its logits.

    An adapter that was trained over quantised weights is added to the dequantised weights in float32, and the sum is
    rounded to `dtype` once; merging into 4-bit weights would lose the adapter in rounding. 8-bit layers also round
    their inputs, which a plain model does not, so its logits differ from such a judge's by that rounding.

    Args:
        judge: a `model` folder of a run.
        dtype: of the written weights, including the head; load with `dtype="float32"` for exact logits.
        overrides: settings to change, such as `model.base=FOLDER` for a base that was moved.

    Raises:
        ValueError: `judge` is not a judge, or its base differs from the one that it was trained on.
    """
    card = read_card(judge)
    settings = change(card.recipe, overrides).model
    card.check_base(settings)
    model = merge(judge, settings, card.task.classes).to(getattr(torch, dtype))
    model.config._attn_implementation = "eager"  # this package's attention is registered only where it is imported
    del model.config.arena_backend
    tokenizer = load_tokenizer(str(judge))
    model.config.pad_token_id = tokenizer.pad_token_id
    with atomic_write(folder) as draft:
        model.save_pretrained(str(draft))
        # its recipe documents the prompt that the model expects
        write_json(draft / CARD, {**as_json(card), "exported": True})
        tokenizer.save_pretrained(str(draft))


def merge(judge: Path, settings: ModelSettings, classes: Sequence[str]) -> PreTrainedModel:
    """The judge's model in float32: weights loaded and dequantised, with its adapter merged or its head loaded."""
    if is_whole(judge):
        return load_trained(judge, settings, classes).float()
    base = load_base(settings, classes)
    if settings.quantization != "none":
        base = base.dequantize(dtype=torch.float32)
        # for a checkpoint that is stored quantised: conversions that saving would otherwise try to reverse
        base.__dict__.pop("_weight_conversions", None)
    if (judge / HEAD_FILE).is_file():
        return with_head(base.float(), judge / HEAD_FILE)
    return with_adapter(base.float(), judge, settings).merge_and_unload()
