"""A judge as a plain transformers model, with the helper that writes its prompt and a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from arena.config import change
from arena.data.task import TokenTask
from arena.inference import exported
from arena.inference.find import JUDGE_FILE
from arena.inference.model_card import model_card
from arena.inference.saved import as_json, read_judge
from arena.model.backbone import load_base, load_tokenizer
from arena.model.tuning import HEAD_FILE, is_whole, load_trained, with_adapter, with_head
from arena.progress import optional
from arena.settings import ModelSettings
from arena.storage.files import atomic_write, write_json, write_text

HELPER, PROMPT = "judge_prompt.py", "judge_prompt.json"


def export_judge(judge: Path, folder: Path, dtype: str = "bfloat16", overrides: Sequence[str] = ()) -> None:
    """Writes a judge so that `AutoModelForSequenceClassification.from_pretrained(folder)` gives its logits.

    A language model is written for `AutoModelForCausalLM`. `README.md` is a model card; of a judge that compares
    answers, `judge_prompt.py` writes the prompt that it expects.

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
    saved, metrics = read_judge(judge), judge.resolve().parent / "metrics.json"
    known: dict[str, Any] = {}
    with optional(f"reading {metrics}", "the model card has no scores"):
        known = dict(json.loads(metrics.read_text(encoding="utf-8"))) if metrics.is_file() else {}
    settings = change(saved.recipe, overrides).model
    saved.check_base(settings)
    model = merge(judge, settings, saved.task.classes).to(getattr(torch, dtype))
    model.config._attn_implementation = "eager"  # this package's attention is registered only where it is imported
    del model.config.arena_backend
    model.config.use_cache = isinstance(saved.task, TokenTask)  # which generating needs
    tokenizer = load_tokenizer(str(judge))
    model.config.pad_token_id = tokenizer.pad_token_id
    if isinstance(saved.task, TokenTask):
        _end_answers(model.generation_config, saved.task.encoder(tokenizer, saved.recipe.prompt).end_ids)
    with atomic_write(folder) as draft:
        model.save_pretrained(str(draft))
        # its recipe documents the prompt that the model expects
        write_json(draft / JUDGE_FILE, {**as_json(saved), "exported": True})
        tokenizer.save_pretrained(str(draft))
        parts = saved.task.encoder(tokenizer, saved.recipe.prompt).parts()
        if parts is not None:
            write_json(draft / PROMPT, {**parts, "max_length": saved.recipe.prompt.max_length})
            write_text(draft / HELPER, Path(exported.__file__).read_text(encoding="utf-8"))
        write_text(draft / "README.md", model_card(saved, known, helper=parts is not None))


def _end_answers(generation: Any, ends: Sequence[int]) -> None:
    """Makes these tokens end what a model generates, in addition to those that do so already."""
    known = generation.eos_token_id
    before = [] if known is None else [known] if isinstance(known, int) else known
    generation.eos_token_id = sorted({*before, *ends})


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
